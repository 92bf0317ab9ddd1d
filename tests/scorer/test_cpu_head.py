"""Float32 logits on a CPU against float64, and the settings of the process afterwards."""

import pytest
import torch

from scorer import cpu_head
from scorer.cpu_head import CpuHead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 64, 521), (37, 64, 521), (130, 576, 9001)])
def test_logits_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, tokens: int, hidden: int, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden, generator=generator).to(dtype)
    added = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    monkeypatch.setattr(cpu_head, "BLOCK_ENTRIES", 100 * hidden + 7)  # the last block is a short one
    before = torch.backends.mkldnn.matmul.fp32_precision
    head, places = CpuHead(), set()
    for count in (tokens, max(1, tokens // 2), tokens):
        states = torch.randn(count, hidden, generator=generator).to(dtype)
        logits = head(states, weight, added)
        want = states.double() @ weight.double().T + (0 if added is None else added.double())
        assert (logits.dtype, logits.shape, logits.is_contiguous()) == (torch.float32, want.shape, True)
        # bfloat16 logits would be off by 0.06 here, float32 sums of 576 numbers are off by 1e-4
        assert (logits - want).abs().max() < 2e-5 * hidden**0.5
        places.add(logits.data_ptr())
    assert len(places) == 1
    assert torch.backends.mkldnn.matmul.fp32_precision == before
