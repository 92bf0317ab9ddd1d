"""What is kept of logits, against float64: the functions themselves, and inside the prompt log-probs of vLLM's V2 runner.

V2 itself needs a GPU. Here its own code for prompts runs on the CPU around the function that takes the place of its own: how
it cuts logits into chunks, prompts into steps, and puts both together. Its two Triton kernels are replaced by torch.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scorer.engine import VllmEngine, common_runner
from scorer.kernel import LogprobKernel, replace_in_v1
from scorer.logits import Kept, token_scores

ROOT = Path(__file__).parents[2]
BOTH = (1.0, 2.0)


def tempered(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and log partition sum in float64, from torch's own distribution."""
    logprobs = logits.double().log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logprobs / temperature).entropy()
    return entropy, (logprobs / temperature).exp().sum(-1).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 2, 521, 50_001])
def test_entropies_are_those_of_float64(dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, vocabulary, generator=generator) * torch.linspace(0, 30, 40)[:, None]).to(dtype)
    tokens = torch.randint(0, vocabulary, (40,), generator=generator)
    for temperatures in ((1.0,), BOTH, (1.0, 0.1), (1.0, 100.0)):
        kept = Kept(min(2, vocabulary), temperatures)
        ids, values = token_scores(logits, tokens, kept, 7 * vocabulary)
        assert ids.shape == values.shape == (40, kept.width)
        assert values.dtype == torch.float32
        found = values[:, 1 + kept.top_k :].double()
        assert (found[:, 0] - tempered(logits, 1)[0]).abs().max() < 1e-5
        if len(temperatures) > 1:
            entropy, log_partition = tempered(logits, temperatures[1])
            assert (found[:, 1] - entropy).abs().max() < 1e-5 * max(1, 1 / temperatures[1])
            assert (found[:, 2] - log_partition).abs().max() < 1e-5 * max(1, 1 / temperatures[1])
            # what the log partition sum is stored for: the log-prob of a stored token at that temperature
            own = (logits.double().log_softmax(-1) / temperatures[1]).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            assert (values[:, 0].double() / temperatures[1] - found[:, 2] - own).abs().max() < 1e-4 * max(
                1, 1 / temperatures[1]
            )
        # entropies change nothing of the rest
        plain = token_scores(logits, tokens, Kept(kept.top_k), 7 * vocabulary)
        assert torch.equal(ids[:, : 1 + kept.top_k], plain[0])
        assert torch.equal(values[:, : 1 + kept.top_k], plain[1])


def test_entropies_by_hand() -> None:
    """Two tokens that are equally probable among tokens that are impossible, a certain one, and a place with a NaN."""
    none = -torch.inf
    logits = torch.tensor([[0.0, 0.0, none, none], [5.0, none, none, none], [0.0, torch.nan, 0.0, 0.0]])
    _, values = token_scores(logits, torch.tensor([0, 0, 0]), Kept(0, BOTH), 1 << 18)
    log2 = float(np.log(2))
    assert values[0].tolist() == pytest.approx([-log2, log2, log2, log2 / 2], abs=1e-6)
    assert values[1].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert values[2].isnan().all()


V2 = """
import sys
from types import SimpleNamespace
import numpy as np, torch
from vllm.v1.worker.gpu.sample import prompt_logprob
from scorer.engine import VllmEngine
from scorer.kernel import LogprobKernel
from scorer.logits import Kept

VOCABULARY, LENGTHS, STEP = 97, (2, 23, 40, 3, 61), 17
prompt_logprob.CHUNK_SIZE = 11
generator = torch.Generator().manual_seed(0)
head = torch.randn(VOCABULARY, 8, generator=generator)
# each token has a twin with the same logit, so that ties are everywhere
head[1::2] = head[0:-1:2]
prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
states = [torch.randn(length, 8, generator=generator) for length in LENGTHS]
all_ids = torch.zeros(len(LENGTHS), 64, dtype=torch.int32)
for index, prompt in enumerate(prompts):
    all_ids[index, : len(prompt)] = prompt.int()

def token_ids(num_tokens, starts, slots, computed, ids):  # Triton's kernel in torch
    found = [ids[slot, computed[slot] + 1 :][: starts[i + 1] - starts[i]] for i, slot in enumerate(slots.tolist())]
    return torch.cat(found).long()

prompt_logprob.get_prompt_logprobs_token_ids = token_ids
prompt_logprob.compute_token_logprobs = lambda logits, ids: logits.float().log_softmax(-1).gather(-1, ids)
own = prompt_logprob.compute_topk_scores

for kept in (Kept(), Kept(8), Kept(0, (1.0,)), Kept(5, (1.0, 2.0)), Kept(VOCABULARY, (1.0, 2.0))):
    prompt_logprob.compute_topk_scores = own
    worker = prompt_logprob.PromptLogprobsWorker(len(LENGTHS), torch.device("cpu"))
    kernel = LogprobKernel()
    kernel.model_runner = SimpleNamespace(prompt_logprobs_worker=worker, is_last_pp_rank=True, sampler=object())
    assert kernel.keep_scores(kept, 5 * VOCABULARY) == "V2"
    params = SimpleNamespace(prompt_logprobs=kept.width - 1, prompt_logprob_token_ids=None)
    for index in range(len(LENGTHS)):
        worker.add_request(str(index), index, params)
    done, computed = {}, np.zeros(len(LENGTHS), dtype=np.int32)
    while (computed < LENGTHS).any():  # steps of at most STEP tokens of each prompt: long ones come in chunks
        slots = np.flatnonzero(computed < LENGTHS)[::-1].copy()
        counts = np.minimum(STEP, np.array(LENGTHS)[slots] - computed[slots])
        starts = np.concatenate([[0], np.cumsum(counts)])
        batch = SimpleNamespace(
            idx_mapping_np=slots, idx_mapping=torch.from_numpy(slots), req_ids=[str(slot) for slot in slots],
            num_computed_prefill_tokens_np=computed[slots], prefill_len_np=np.array(LENGTHS)[slots],
            num_tokens=int(starts[-1]), query_start_loc=torch.from_numpy(starts), query_start_loc_np=starts,
            num_scheduled_tokens=counts,
        )
        hidden = torch.cat([states[s][computed[s] : computed[s] + n] for s, n in zip(slots, counts)])
        done |= worker.compute_prompt_logprobs(
            lambda states: states @ head.T, hidden, batch, all_ids, torch.from_numpy(computed), np.array(LENGTHS)
        )
        computed[slots] += counts
    assert sorted(done) == [str(index) for index in range(len(LENGTHS))]
    for key, tensors in done.items():
        index = int(key)
        ids = prompts[index].numpy()
        answer = VllmEngine._answer(SimpleNamespace(_kept=kept), key, ids, tensors)
        # in float32 as they were made, so that ties are the same; from there on float64
        logits = (states[index] @ head.T)[:-1].double()
        full = logits.log_softmax(-1)
        want = full.gather(-1, prompts[index][1:, None])[:, 0].numpy()
        assert answer.logprobs.dtype == np.float32 and abs(answer.logprobs - want).max() < 1e-5
        if kept.top_k:
            values = logits.numpy()
            order = np.lexsort((np.broadcast_to(np.arange(VOCABULARY), values.shape), -values), axis=-1)
            assert np.array_equal(answer.topk_ids, order[:, : kept.top_k])
            best = np.take_along_axis(full.numpy(), answer.topk_ids.astype(int), -1)
            assert abs(answer.topk_logprobs - best).max() < 1e-5
        else:
            assert answer.topk_ids is None
        if kept.temperatures:
            for place, temperature in enumerate(kept.temperatures):
                entropy = torch.distributions.Categorical(logits=full / temperature).entropy().numpy()
                assert abs(answer.entropies[:, place] - entropy).max() < 1e-5
            if len(kept.temperatures) > 1:
                log_partition = (full / 2).exp().sum(-1).log().numpy()
                assert abs(answer.entropies[:, 2] - log_partition).max() < 1e-5
        else:
            assert answer.entropies is None
print("RIGHT")
"""


@pytest.mark.usefixtures("starts_processes")
def test_v2_runner_keeps_what_float64_gives() -> None:
    done = subprocess.run([sys.executable, "-c", V2], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.strip().endswith("RIGHT"), done.stderr[-3000:]


TRITON = """
import torch
from scorer.gpu_entropies import gpu_entropies
for dtype in (torch.float32, torch.bfloat16):
    for vocabulary in (1, 2, 521, 4096, 9001):
        logits = (torch.randn(6, vocabulary) * torch.linspace(0, 30, 6)[:, None]).to(dtype)
        if vocabulary > 5:
            logits[2, 3] = -torch.inf
        full = logits.double().log_softmax(-1)
        for temperatures in ((1.0,), (1.0, 2.0), (1.0, 0.1)):
            found = gpu_entropies(logits, temperatures).double()
            want = []
            for temperature in temperatures:
                hot = (full / temperature).clamp(min=-1e5)
                want.append(torch.distributions.Categorical(logits=hot).entropy())
                want += [hot.logsumexp(-1)] if temperature != 1 else []
            assert found.shape == (6, len(want)) and (found - torch.stack(want, -1)).abs().max() < 1e-5, (vocabulary, found)
logits[1, 1] = torch.nan
found = gpu_entropies(logits, (1.0, 2.0))
assert found[1].isnan().all() and found[[0, 2, 3, 4, 5]].isfinite().all()
print("RIGHT")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with vLLM for GPUs alone")
@pytest.mark.usefixtures("starts_processes")
def test_gpu_kernel_in_triton_s_interpreter() -> None:
    """On the CPU; what compiles for a GPU is another matter, which the canary of an engine tells."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRITON], capture_output=True, text=True, timeout=300, cwd=ROOT, env=env
    )
    assert done.stdout.strip().endswith("RIGHT"), done.stderr[-3000:]


def test_runners_that_are_not_known_are_told_and_refused() -> None:
    kernel, kept = LogprobKernel(), Kept(8)
    kernel.model_runner = SimpleNamespace(sampler=object())
    assert kernel.keep_scores(kept, 1 << 18) == "none"
    # V2's module by a worker whose class stands in another module
    kernel.model_runner = SimpleNamespace(prompt_logprobs_worker=object(), is_last_pp_rank=True)
    assert kernel.keep_scores(kept, 1 << 18) == "none"
    kernel.model_runner = SimpleNamespace(prompt_logprobs_worker=None, is_last_pp_rank=False)
    assert kernel.keep_scores(kept, 1 << 18) is None
    assert common_runner([None, "V2"], kept, "0.32") == "V2"
    assert common_runner(["V1", "V1"], kept, "0.32") == "V1"
    assert common_runner(["none"], Kept(), "0.99") == "none"
    for runners in (["none"], ["V1", "none"], ["V1", "V2"], [None]):
        for asked in (kept, Kept(0, (1.0,))):
            with pytest.raises(ValueError, match=r"vLLM 0\.99 computes log-probs by other functions"):
                common_runner(runners, asked, "0.99")


def test_answers_for_other_tokens_are_refused() -> None:
    def answer(ids: list[int], width: int = 1) -> None:
        tensors = SimpleNamespace(logprob_token_ids=torch.tensor([ids]).T, logprobs=torch.zeros(len(ids), width))
        VllmEngine._answer(SimpleNamespace(_kept=Kept()), "7", np.array([3, 1, 4]), tensors)  # type: ignore[arg-type]

    answer([1, 4])
    for wrong, message in (([1, 5], "for other tokens"), ([1], "for each token"), ([1, 4, 1], "for each token")):
        with pytest.raises(ValueError, match=message):
            answer(wrong)
    with pytest.raises(ValueError, match="for each token"):
        answer([1, 4], width=2)
    assert not replace_in_v1(None, Kept(), 1)
