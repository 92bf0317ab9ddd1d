"""Peak memory of the loss head as vocabulary and row length grow, beside plain cross entropy over all logits.

    python -m benchmarks.bench_head         (make bench-head; about five minutes on two cores)

One row, hidden size 64, float32, forward and backward, each in a process of its own. The head is bounded by its
budget for logits (3 GiB unless told otherwise) and the gradient of the output embedding, whatever the length.
"""

import subprocess
import sys
from argparse import ArgumentParser

from benchmarks.common import Claim, claim, report

HIDDEN = 64


def peak(kind: str, vocabulary: int, length: int, budget: int) -> None:
    """Print the memory that the loss adds to its inputs."""
    import torch

    from trainer.batch import MicroBatch
    from trainer.head import objective_loss
    from trainer.loss_model import peak_memory_bytes
    from trainer.objectives import ObjectiveSettings, make_objective

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, length, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).requires_grad_()
    ids = torch.randint(0, vocabulary, (1, length), generator=generator)
    predicted = torch.ones(1, length, dtype=torch.bool)
    predicted[0, 0] = False
    reference = -torch.rand(1, length, generator=generator)
    (weight[:8] @ hidden[0, :8].T).sum().backward()  # what torch itself needs once
    hidden.grad = weight.grad = None
    before = peak_memory_bytes(torch.device("cpu"))
    if kind == "head":
        batch, remit = MicroBatch(ids, predicted, {"logprobs": reference}), make_objective(ObjectiveSettings())
        loss = objective_loss(hidden, weight, batch, remit, length - 1, logits_budget_bytes=budget)
    else:
        loss = torch.nn.functional.cross_entropy((hidden[0, :-1] @ weight.T).float(), ids[0, 1:])
    loss.backward()
    print("PEAK", peak_memory_bytes(torch.device("cpu")) - before)


def measured(kind: str, vocabulary: int, length: int, budget: int) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_head", "--only", kind]
    command += ["--vocabulary", str(vocabulary), "--length", str(length), "--budget", str(budget)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split("PEAK")[1])


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 100_352, 151_936])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--budget", type=int, default=3 << 30)
    parser.add_argument("--only", choices=("head", "plain"), help="used by the script itself")
    options = parser.parse_args()
    if options.only:
        peak(options.only, options.vocabulary[0], options.length[0], options.budget)
        return 0
    claims: list[Claim] = []
    for vocabulary in options.vocabulary:
        for length in options.length:
            added = measured("head", vocabulary, length, options.budget)
            bound = min(options.budget, 4 * vocabulary * length) + 4 * vocabulary * HIDDEN
            text = f"memory of the head / its bound, {vocabulary:,} x {length:,} ({added / 1e9:.2f} GB)"
            claims.append(claim(text, [added / bound], at_most=1.25))
    vocabulary, length = options.vocabulary[-1], options.length[1] if len(options.length) > 1 else options.length[0]
    ratio = measured("head", vocabulary, length, options.budget) / measured("plain", vocabulary, length, options.budget)
    claims.append(claim(f"the same / plain cross entropy, {vocabulary:,} x {length:,}", [ratio], at_most=0.5))
    return report("head", claims)


if __name__ == "__main__":
    sys.exit(main())
