"""Attention over documents on a GPU: the form that is chosen there is right, alone, compiled and recomputed, and what it takes.

Part of benchmarks/gpu_check.py. Without a GPU the form of CPUs is checked.
"""

from time import perf_counter
from typing import Any

import torch
import transformers

from benchmarks.common import Claim, claim
from trainer.attention_choice import choose_attention
from trainer.model import Base

KINDS: dict[str, dict[str, Any]] = {
    "Olmo2": {},
    "Olmo3": {"sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"]},
}
ROWS = [[1, 100, 3, 152], [256]]  # lengths of documents
MASK = "sdpa"


def make_base(kind: str, device: torch.device, dtype: torch.dtype, hidden: int = 256, **more: Any) -> Base:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "max_position_embeddings": 65_536,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **KINDS[kind], **more)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Base(model.to(device), dtype)


def gradients(base: Base, rows: list[list[int]], times: int = 1) -> torch.Tensor:
    """Of all weights, on the CPU, from the last of so many passes."""
    ids = torch.randint(0, 512, (len(rows), sum(rows[0])), generator=torch.Generator().manual_seed(1)).to(base.device)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).to(base.device)
    for _ in range(times):
        base.model.zero_grad()
        hidden_BTH = base.hidden_states(ids, positions).float()
        upstream_BTH = torch.randn(hidden_BTH.shape, generator=torch.Generator().manual_seed(2))
        (hidden_BTH * upstream_BTH.to(base.device)).sum().backward()
    return torch.cat([p.grad.flatten() for p in base.model.parameters() if p.grad is not None]).float().cpu()


def check_documents(device: torch.device) -> list[tuple[str, float, float]]:
    """(what, found error, bound). 16 bits may be 1.5 times as far from float32 with a mask as 16 bits with a mask are."""
    rows: list[tuple[str, float, float]] = []
    for kind in KINDS:
        wanted = gradients(make_base(kind, device, torch.float32), ROWS)

        def error(base: Base, times: int = 1) -> float:
            return ((gradients(base, ROWS, times) - wanted).norm() / wanted.norm()).item()  # noqa: B023

        exact = make_base(kind, device, torch.float32)
        name = choose_attention(exact).text
        rows.append((f"documents, {kind}, float32, {name}", error(exact), 1e-5))
        bound = 1.5 * error(make_base(kind, device, torch.bfloat16))
        for checkpointing, compiled in ((False, "off"), (True, "off"), (False, "on"), (True, "on")):
            base = make_base(kind, device, torch.bfloat16)
            name = choose_attention(base).text
            base.prepare(checkpointing, compiled)
            what = f"documents, {kind}, bfloat16, {name}, checkpointing {checkpointing}, compile {compiled}"
            rows.append((what, error(base, 2), bound))
        if device.type == "cuda":
            rows.append(
                (f"documents, {kind}: another form than varlen_attn", float(name != "PyTorch's varlen_attn"), 0.0)
            )
            twice = [gradients(base, ROWS) for _ in range(2)]
            if torch.are_deterministic_algorithms_enabled():
                rows.append((f"documents, {kind}: twice", float((twice[0] - twice[1]).abs().max()), 0.0))
    return rows


def measure_documents(device: torch.device) -> list[Claim]:
    """Memory and time of a long row of documents, with a mask and as chosen; on a GPU alone."""
    if device.type != "cuda":
        return []
    length = 16_384
    rows = [[1_000] * (length // 1_000) + [length % 1_000]]
    found: dict[str, tuple[float, float]] = {}
    for form in ("mask", "chosen"):
        base = make_base("Olmo2", device, torch.bfloat16, hidden=2048)
        if form == "chosen":
            choose_attention(base)
        gradients(base, rows)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        began = perf_counter()
        gradients(base, rows, 3)
        torch.cuda.synchronize()
        found[form] = torch.cuda.max_memory_allocated() - before, perf_counter() - began
        del base
    memory, seconds = (found["chosen"][place] / found["mask"][place] for place in range(2))
    return [
        claim(f"documents in a row of {length:,}, memory / that with a mask", [memory], at_most=1.0),
        claim(f"documents in a row of {length:,}, time / that with a mask", [seconds], at_most=1.0),
    ]
