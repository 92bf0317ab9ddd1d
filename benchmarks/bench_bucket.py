"""What k stored tokens and one bucket cost a reverse KL against the reference's whole vocabulary.

    python -m benchmarks.bench_bucket --model .cache/real/smollm2     (make bench-bucket; some minutes on two cores)

The reference is a real model; the base is the same model with noise on its weights, since two models with one vocabulary are
not at hand. Text: this project's pages and sources. For each k the KL and its gradient by the logits, as remit train computes
them, beside those of the whole vocabulary: from exact log-probs, from log-probs rounded to 1/64 nat, and from these without a
log partition sum, where the k + 1 outcomes are softened. Over all tokens, and over those that --objective switch gates.
"""

import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.common import Claim, claim, report
from trainer.gate import quantile
from trainer.objectives.rkl import divergence, least_rest

ROOT = Path(__file__).parents[1]
STEP, GATED, KINDS = 1 / 64, 0.2, ("exact", "rounded", "softened")


def text() -> str:
    """Prose and code by turns."""
    files = [file for pair in zip(sorted(ROOT.glob("docs/*.md")), sorted(ROOT.glob("trainer/*.py"))) for file in pair]
    return "\n\n".join(file.read_text(encoding="utf-8")[:2000] for file in files)


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


@dataclass
class Cost:
    """Sums over tokens: KL, probability outside of the stored ids, squared distance of the gradient from the whole one's."""

    kl: float = 0.0
    outside: float = 0.0
    distance: float = 0.0

    def add(self, kl_N: Tensor, missing_N: Tensor, off_NV: Tensor) -> None:
        self.kl += kl_N.sum().item()
        self.outside += missing_N.sum().item()
        self.distance += off_NV.square().sum().item()


def costs(
    targets_N: Tensor, reference_NV: Tensor, base_NV: Tensor, counts: list[int], temperature: float
) -> tuple[dict[tuple[int, str], Cost], float, float]:
    """By k and kind; the KL of the whole vocabulary, and the squared size of its gradient: sums over the tokens."""
    found = {(k, kind): Cost() for k in counts for kind in KINDS}
    whole, size, label = 0.0, 0.0, f"log_partition_t{temperature:g}"
    for place in torch.arange(len(targets_N)).split(64):
        log_p, targets, logits = reference_NV[place], targets_N[place], base_NV[place]
        scale = torch.full((len(place), 1), temperature**2)
        every = torch.arange(log_p.shape[1]).repeat(len(place), 1)
        full, columns = logits.clone(), {"topk_ids": every, "topk_logprobs": log_p}
        whole += divergence(full, targets, columns, 0.0, scale, temperature, 0.0)[1].sum().item()
        size += full.square().sum().item()
        z_N, top = (log_p / temperature).logsumexp(-1), log_p.topk(max(counts))
        for (k, kind), cost in found.items():
            values, z = top.values[:, :k], z_N
            values, z = (values, z) if kind == "exact" else (rounded(values), rounded(z))
            columns = {"topk_ids": top.indices[:, :k], "topk_logprobs": values.clamp(max=0)}
            columns |= {label: z} if kind != "softened" and temperature != 1 else {}
            own, least = logits.clone(), least_rest(0.0 if kind == "exact" else STEP)
            _, kl_N, missing_N = divergence(own, targets, columns, 0.0, scale, temperature, least)
            cost.add(kl_N, missing_N, own.sub_(full))
    return found, whole, size


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
    print(f"{len(targets):,} tokens, vocabulary {reference.shape[1]:,}", end="; ")
    print(f"nats per token: reference {losses[0]:.2f}, base {losses[1]:.2f}\n")
    print("| T | tokens | k | outside of k | KL: whole vocabulary | exact | rounded | softened |", end="")
    print(" gradient off by: exact | rounded | softened |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    claims: list[Claim] = []
    for temperature in (1.0, 2.0):
        parts = [torch.special.entr((part / temperature).softmax(-1)).sum(-1) for part in reference.split(64)]
        entropy = torch.cat(parts)
        gated = entropy <= quantile(entropy.numpy(), GATED)
        for name, mask in (("all", torch.ones_like(gated)), ("gated", gated)):
            found, whole, size = costs(targets[mask], reference[mask], base[mask], options.top_k, temperature)
            count = int(mask.sum())
            for k in options.top_k:
                kinds = [found[k, kind] for kind in KINDS]
                off = [(kind.distance / size) ** 0.5 for kind in kinds]
                cells = [f"{temperature:g}", name, str(k), f"{kinds[0].outside / count:.1%}", f"{whole / count:.3f}"]
                cells += [f"{kind.kl / count:.3f}" for kind in kinds] + [f"{value:.1%}" for value in off]
                print("| " + " | ".join(cells) + " |", flush=True)
                text = f"T {temperature:g}, {name}, k {k}: gradient off by"
                claims += [claim(f"{text}, {kind}", [value]) for kind, value in zip(KINDS, off)]
    return report("bucket", claims)


if __name__ == "__main__":
    sys.exit(main())
