"""What k stored tokens and one bucket cost a reverse KL against the reference's whole vocabulary.

    python -m benchmarks.bench_bucket --model .cache/real/smollm2     (make bench-bucket; a few minutes on two cores)

The reference is a real model; the base is the same model with noise on its weights, since two models with one vocabulary are
not at hand. Text: this project's pages and sources. For each k the KL and its gradient by the logits, as remit train computes
them, beside those of the whole vocabulary, exact and from log-probs rounded to 1/64 nat; over all tokens, and over those that
--objective switch gates. Without a log partition sum the k + 1 outcomes are softened (--temperature without
--entropy-temperature).
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.common import Claim, claim, report
from trainer.gate import quantile
from trainer.objectives.rkl import divergence, least_rest

ROOT = Path(__file__).parents[1]
STEP, GATED = 1 / 64, 0.2


def text() -> str:
    """Prose and code by turns."""
    files = [file for pair in zip(sorted(ROOT.glob("docs/*.md")), sorted(ROOT.glob("trainer/*.py"))) for file in pair]
    return "\n\n".join(file.read_text(encoding="utf-8")[:4000] for file in files)


@torch.no_grad()
def distributions(folder: Path, rows: int, length: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N], log-probs of the reference and logits of the base, float32 [N, V]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text()).input_ids[: rows * length]).reshape(rows, length)
    reference = torch.cat([model(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for row in ids])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    base = torch.cat([model(input_ids=row[None]).logits[0, :-1] for row in ids])
    return ids[:, 1:].reshape(-1), reference, base


def rounded(values: Tensor) -> Tensor:
    return torch.round(values / STEP) * STEP


def cost(
    targets_N: Tensor, reference_NV: Tensor, base_NV: Tensor, k: int, temperature: float, exact: bool, partition: bool
) -> dict[str, float]:
    """Means over the tokens: KL with k and with the whole vocabulary, share outside of the stored ids, and the distance of the
    gradients in units of the whole one's size."""
    kl = whole = outside = distance = size = 0.0
    label = f"log_partition_t{temperature:g}"
    for place in torch.arange(len(targets_N)).split(128):
        log_p, targets = reference_NV[place], targets_N[place]
        scale, found = torch.full((len(place), 1), temperature**2), []
        for kept in (log_p.shape[1], k):
            top = log_p.topk(kept)
            z = (log_p / temperature).logsumexp(-1)
            values, z = (top.values, z) if exact or kept > k else (rounded(top.values), rounded(z))
            columns = {"topk_ids": top.indices, "topk_logprobs": values.clamp(max=0)}
            columns |= {label: z} if partition and temperature != 1 else {}
            gradient = base_NV[place].clone()
            least = least_rest(0.0 if exact else STEP)
            _, kl_N, missing_N = divergence(gradient, targets, columns, 0.0, scale, temperature, least)
            found.append((kl_N, gradient, missing_N))
        (whole_N, full, _), (kl_N, own, missing_N) = found
        kl, whole, outside = kl + kl_N.sum().item(), whole + whole_N.sum().item(), outside + missing_N.sum().item()
        distance += (own - full).square().sum().item()
        size += full.square().sum().item()
    count = len(targets_N)
    return {"kl": kl / count, "whole": whole / count, "outside": outside / count, "gradient": (distance / size) ** 0.5}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/real/smollm2")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--length", type=int, default=257)
    parser.add_argument("--noise", type=float, default=0.1, help="on each weight, in standard deviations of its matrix")
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 32, 128])
    options = parser.parse_args()
    targets, reference, base = distributions(options.model, options.rows, options.length, options.noise)
    losses = [torch.nn.functional.cross_entropy(logits, targets).item() for logits in (reference, base)]
    print(
        f"{len(targets):,} tokens, vocabulary {reference.shape[1]:,}; nats per token: reference {losses[0]:.2f}, base {losses[1]:.2f}\n"
    )
    print(
        "| temperature | tokens | k | KL | of the whole vocabulary | outside of k | gradient off by | rounded: KL | gradient off by | without log partition: KL | gradient off by |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    claims: list[Claim] = []
    for temperature in (1.0, 2.0):
        hot = (reference / temperature).log_softmax(-1)
        entropy = -(hot.exp() * hot).sum(-1)
        gated = entropy <= quantile(entropy.numpy(), GATED)
        del hot
        for name, mask in (("all", torch.ones_like(gated)), (f"gated, {GATED:.0%}", gated)):
            here = (targets[mask], reference[mask], base[mask])
            for k in options.top_k:
                exact, coarse = cost(*here, k, temperature, True, True), cost(*here, k, temperature, False, True)
                cells = [f"{temperature:g}", name, str(k), f"{exact['kl']:.3f}", f"{exact['whole']:.3f}"]
                cells += [
                    f"{exact['outside']:.1%}",
                    f"{exact['gradient']:.1%}",
                    f"{coarse['kl']:.3f}",
                    f"{coarse['gradient']:.1%}",
                ]
                soft = cost(*here, k, temperature, False, False) if temperature != 1 else None
                cells += [f"{soft['kl']:.3f}", f"{soft['gradient']:.1%}"] if soft else ["", ""]
                print("| " + " | ".join(cells) + " |", flush=True)
                claims.append(
                    claim(f"T {temperature:g}, {name}, k {k}: gradient off by, rounded", [coarse["gradient"]])
                )
    return report("bucket", claims)


if __name__ == "__main__":
    sys.exit(main())
