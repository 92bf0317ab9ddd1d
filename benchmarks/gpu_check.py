"""The trainer on a GPU, checked and then timed in one call; no vLLM, no network, no shards needed.

    python -m benchmarks.gpu_check        (make gpu-check; at most about five minutes on one GPU)

First correctness: the loss head in float32 and bfloat16 against float64 autograd, compiled layers against plain ones,
activation checkpointing, a training step that lowers the loss. Then speed at the shapes of OLMo-2-1B: NTP, ReMiT from
the shards, ReMiT with the reference online, --float8, --deterministic; tokens/s, model FLOPs as a share of the card's peak and of
what a matrix product was measured to reach, peak memory, and a table of what the time of a step goes to (benchmarks/gpu_speed.py).
Without a GPU it says so and runs small shapes on the CPU.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import make_shards, report
from benchmarks.gpu_speed import Bench, claims_of, show
from benchmarks.training import Steps, annotate, synchronize
from trainer.batch import MicroBatch
from trainer.deterministic import deterministic
from trainer.head import objective_loss
from trainer.model import load_base
from trainer.objectives import ObjectiveSettings, make_objective

OLMO_2_1B = {"hidden_size": 2048, "layers": 16, "heads": 16, "intermediate": 8192, "vocabulary": 100_352}
SMALL = {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate": 1024, "vocabulary": 16_384}


def make_model(folder: Path, shape: dict[str, int], positions: int, seed: int) -> Path:
    torch.manual_seed(seed)
    config = transformers.Olmo2Config(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
        max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def head_error(device: torch.device, dtype: torch.dtype, objective: str, budget: int) -> tuple[float, float, float]:
    """Relative errors of loss and of the gradients of states and weight, against float64 autograd on the CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(3, 257, 128, generator=generator).to(dtype)
    weight_VH = (2 * torch.randn(5003, 128, generator=generator) / 128**0.5).to(dtype)
    ids_BT = torch.randint(0, 5003, (3, 257), generator=generator)
    predicted_BT = torch.rand(3, 257, generator=generator) < 0.9
    predicted_BT[:, 0] = False
    predicted_BT[1, 40:] = False
    predicted_BT[2] = False
    reference_BT = -8 * torch.rand(3, 257, generator=generator)
    count = int(predicted_BT.sum())

    wanted_hidden, wanted_weight = hidden_BTH.double().requires_grad_(), weight_VH.double().requires_grad_()
    logprobs = torch.nn.functional.linear(wanted_hidden, wanted_weight).log_softmax(-1)
    wanted = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        places = predicted_BT[row].nonzero()[:, 0]
        if len(places):
            losses = -logprobs[row, places - 1, ids_BT[row, places]]
            excess = losses.detach() + reference_BT[row, places].double()
            weights = (2 / (1 + torch.exp(excess.mean() - excess))).clip(0.8, 1.2)
            wanted = wanted + ((weights if objective == "remit" else 1) * losses).sum() / count
    wanted.backward()

    hidden = hidden_BTH.to(device).requires_grad_()
    weight = weight_VH.to(device).requires_grad_()
    batch = MicroBatch(ids_BT.to(device), predicted_BT, {"logprobs": reference_BT.to(device)})
    chosen = make_objective(ObjectiveSettings(objective=objective))  # type: ignore[arg-type]
    loss = objective_loss(hidden, weight, batch, chosen, count, logits_budget_bytes=budget)
    loss.backward()

    def relative(found: Any, want: Any) -> float:
        return ((found.detach().cpu().double() - want).norm() / want.norm()).item()

    return (
        relative(loss, wanted.detach()), relative(hidden.grad, wanted_hidden.grad),
        relative(weight.grad, wanted_weight.grad),
    )  # fmt: skip


def check(device: torch.device, folder: Path) -> list[tuple[str, float, float]]:
    """(what, found error, bound) of every check."""
    folder.mkdir()
    rows: list[tuple[str, float, float]] = []
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for objective in ("ntp", "remit"):
            for budget in (1 << 30, 4 * 5003 * 50):
                error = max(head_error(device, dtype, objective, budget))
                pieces = "whole rows" if budget == 1 << 30 else "rows in pieces"
                rows.append((f"head, {objective}, {str(dtype).removeprefix('torch.')}, {pieces}", error, bound))
    model = make_model(folder / "tiny", SMALL, 256, seed=3)
    ids = torch.randint(0, SMALL["vocabulary"], (2, 256), generator=torch.Generator().manual_seed(1))
    want = None
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    for checkpointing, compiled in ((False, "off"), (True, "off"), (False, "on"), (True, "on")):
        base = load_base(model, "float32", device)
        base.prepare(checkpointing, compiled)
        base.hidden_states(ids.to(device)).float().square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in base.model.parameters() if p.grad is not None]).cpu()
        want = gradient if want is None else want
        name = f"gradients of the body, checkpointing {checkpointing}, compile {compiled}"
        rows.append((name, ((gradient - want).norm() / want.norm()).item(), 1e-3))
    make_shards(folder / "few", SMALL["vocabulary"], 1, 4, 256)
    steps = Steps(annotate(folder / "few", folder / "few-rl"), model, "remit", 4, 2, 20, device, dtype)
    for group in steps.optimizer.param_groups:
        group["lr"] = 1e-3
    losses = []
    for _ in range(20):
        steps.step()
        losses.append(steps.loss)
    rows.append((f"loss after 20 steps on 4 rows / before, {dtype}", losses[-1] / losses[0], 0.95))
    return rows


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """What a plain matrix product reaches here."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for index in range(12):
        synchronize(device)
        began = perf_counter()
        left @ right
        synchronize(device)
        if index > 1:
            times.append(perf_counter() - began)
    return 2 * size**3 / median(times)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of each variant")
    parser.add_argument("--rows", type=int, default=None, help="per step; default 8 on a GPU, 2 on a CPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no further variant is timed")
    parser.add_argument("--seq-len", type=int, default=None, help="default 4096 on a GPU, 512 on a CPU")
    options, began = parser.parse_args(), perf_counter()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    where = torch.cuda.get_device_name() if has_gpu else "no GPU here: small shapes on the CPU"
    print(f"torch {torch.__version__}, {where}", flush=True)
    shape, dtype = (OLMO_2_1B, "bfloat16") if has_gpu else (SMALL, "float32")
    seq_len, rows = options.seq_len or (4096 if has_gpu else 512), options.rows or (8 if has_gpu else 2)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with deterministic(device, True):  # first, for the setting of cuBLAS; it is torch's own on this kind of GPU
            checks = [(f"deterministic: {what}", *rest) for what, *rest in check(device, folder / "deterministic")]
        checks += check(device, folder / "plain")
        table = Table("check against float64 or the plain form", "found", "bound", "", title="correctness")
        for what, found, bound in checks:
            table.add_row(what, f"{found:.2g}", f"{bound:g}", "ok" if found <= bound else "WRONG")
        Console(width=130, highlight=False).print(table)
        if any(not found <= bound for _, found, bound in checks):
            return 1
        model = make_model(folder / "base", shape, seq_len, seed=1)
        make_shards(folder / "packed", shape["vocabulary"], 2, 2 * rows, seq_len)
        shards = annotate(folder / "packed", folder / "scored")
        ceiling = matmul_flops_per_second(device, getattr(torch, dtype), 8192 if has_gpu else 1024)
        bench = Bench(model, shards, device, dtype, rows, options.steps, began + 60 * options.minutes)
        found, parts = bench.measure()
    show(found, parts, ceiling, where)
    return report("gpu_check" if has_gpu else "gpu_check_cpu", claims_of(found, parts, ceiling, where))


if __name__ == "__main__":
    sys.exit(main())
