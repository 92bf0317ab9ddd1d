"""Tokens drawn from the reference: unbiased and repeatable, on disk, through the fake and a real engine."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, score_to
from damage import REFERENCE, read_to_train, read_to_verify, rows, write_folder
from faulty import Faulty
from oracles import load, read_rows, row_distributions
from processes import Command, content, log_lines, part_rows, token_of_one_row
from test_faults import fault, side_file

from scorer.canary import CanaryFailed, Distance, Limits, compare
from scorer.config import ScoreConfig
from scorer.engine import Answer
from scorer.fake import hashed_logprobs, hashed_samples, hashed_topk
from scorer.logits import Kept, _uniform, draws, token_scores
from shards import ShardFolder
from shards.samples import draw
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
OF = {"rl": REFERENCE | {"sample_k": 3, "vocab_size": 120}}


def sample_rows() -> dict[str, list]:
    values: dict = rows()
    values["rl_sample_ids"] = [[None if v is None else [4, 50, 119] for v in row] for row in values["rl_logprobs"]]
    return values


# --- the draws ------------------------------------------------------------------------------------------


def test_draws_by_hand() -> None:
    # points of u = 0.5: 0.125, 0.375, 0.625, 0.875 of the sums 0.3, 0.3, 0.9, 1.0
    assert draw(np.array([[0.3, 0.0, 0.6, 0.1]]), np.array([0.5]), 4).tolist() == [[0, 2, 2, 2]]
    assert draw(np.array([[0.3, 0.0, 0.6, 0.1]]), np.array([0.99]), 4).tolist() == [[0, 2, 2, 3]]
    assert draw(np.array([[0.0, 1.0]]), np.array([0.0]), 3).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(("vocabulary", "count"), [(7, 5), (300, 12), (300, 1)])
def test_the_kernel_draws_without_bias(vocabulary: int, count: int) -> None:
    """Of 20,000 places with nearly one distribution: mean counts are its probabilities, and no count is off by a whole one."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, vocabulary, generator=g) + 1e-3 * torch.randn(20_000, vocabulary, generator=g)
    logprobs, tokens = logits.log_softmax(-1), torch.randint(0, vocabulary, (20_000,), generator=g)
    ids = draws(logprobs, tokens, count)
    counts = torch.zeros(20_000, vocabulary, dtype=torch.float64).scatter_add_(
        1, ids, torch.ones(ids.shape, dtype=torch.float64)
    )
    want = count * logprobs.double().exp()
    assert (counts - want).abs().max() < 1 + 1e-4
    # at most half a standard deviation of a coin per place, over sqrt(places)
    assert (counts - want).mean(0).abs().max() < 5 * 0.5 / 20_000**0.5
    assert (ids[:, 1:] >= ids[:, :-1]).all()


def test_the_same_logits_give_the_same_draws() -> None:
    """However they are cut into blocks and chunks, beside whatever else is kept; as numpy draws from them."""
    g = torch.Generator().manual_seed(1)
    logits, tokens = 3 * torch.randn(50, 97, generator=g), torch.randint(0, 97, (50,), generator=g)
    want, _ = token_scores(logits, tokens, Kept(0, (), 9), 10**6)
    for kept, block in ((Kept(0, (), 9), 97), (Kept(4, (1.0, 2.0), 9), 500), (Kept(4, (), 9), 1)):
        ids, values = token_scores(logits, tokens, kept, block)
        assert torch.equal(ids[:, kept.places[1]], want[:, 1:])
        assert torch.equal(token_scores(logits[20:], tokens[20:], kept, block)[0], ids[20:])
        without, plain = token_scores(logits, tokens, replace(kept, sample_k=0), block)
        best, _, last = kept.places
        assert torch.equal(torch.cat([values[:, :1], values[:, best], values[:, last]], 1), plain)
        assert torch.equal(ids[:, best], without[:, 1 : 1 + kept.top_k])
    logprobs = logits.log_softmax(-1)
    spread = draws(logprobs, tokens, 1)[:, 0]
    assert len(set(spread.tolist())) > 10
    others = [logprobs[:, token] for token in (7, 31, 101 % 97, 211 % 97)]
    uniform = _uniform(tokens, logprobs.gather(1, tokens[:, None])[:, 0], logprobs.amax(-1), *others).numpy()
    assert 0 <= uniform.min() < 0.1
    assert 0.9 < uniform.max() < 1
    same = draw(logprobs.exp().numpy(), uniform, 9) == want[:, 1:].numpy()
    assert same.mean() > 0.99  # sums are added in another order


def test_fake_engine_draws_from_its_distribution() -> None:
    prompt = np.random.default_rng(0).integers(0, 40, 4000)
    logprobs = hashed_logprobs(prompt)
    ids = hashed_samples(prompt, logprobs, 40, 10)
    best = hashed_topk(prompt, logprobs, 40, 16)
    for place in range(2):
        shares = (ids == best.topk_ids[:, place, None]).mean(1)
        assert np.abs(shares - np.exp(best.topk_logprobs[:, place])).max() <= 0.1 + 1e-3
        assert shares.mean() == pytest.approx(np.exp(best.topk_logprobs[:, place]).mean(), abs=0.01)


def test_draws_of_another_model_fail_the_canary() -> None:
    g = torch.Generator().manual_seed(2)
    one, other = (torch.randn(200, 30, generator=g).mul(3).log_softmax(-1) for _ in range(2))
    tokens, zeros = torch.zeros(200, dtype=torch.int64), np.zeros(200, np.float32)
    top = one.topk(16)
    want = [Answer(zeros, top.indices.int().numpy(), top.values.numpy())]
    limits = Limits("bfloat16", Distance(200, 0.01, 0.01, 0.01, 0.0))
    own, wrong = (Answer(zeros, sample_ids=draws(values, tokens, 20).int().numpy()) for values in (one, other))
    assert compare([own], want, limits)["sample_excess"] < 1e-6
    with pytest.raises(CanaryFailed, match="drawn tokens are not from the model's distribution"):
        compare([wrong], want, limits)


# --- on disk --------------------------------------------------------------------------------------------


def test_sound_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", sample_rows(), references=OF)
    read_to_verify(folder.path, tmp_path)
    assert folder.schema.names[-2:] == ["rl_logprobs", "rl_sample_ids"]
    with pytest.raises(ValueError, match="rl_sample_ids has token 119, and the base has 100 embedding rows"):
        read_to_train(folder.path, tmp_path, ("logprobs", "sample_ids"))
    plain = write_folder(tmp_path / "b", rows())
    with pytest.raises(ValueError, match=r"no tokens drawn from it \(rl_sample_ids\); score with --sample-k 25"):
        read_to_train(plain.path, tmp_path, ("logprobs", "sample_ids"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[0].__setitem__(1, None), "rl_sample_ids is null, expected null exactly where"),
        (lambda ids: ids[0].__setitem__(0, [1, 2, 3]), "rl_sample_ids is not null"),
        (lambda ids: ids[0][1].__setitem__(1, None), "rl_sample_ids has a null in an entry"),
        (lambda ids: ids[0][1].__setitem__(2, 120), r"rl_sample_ids: an id is not in 0\.\.119"),
        (lambda ids: ids[0][1].__setitem__(0, -1), r"rl_sample_ids: an id is not in 0\.\.119"),
        (lambda ids: ids[0][1].__setitem__(0, 60), "rl_sample_ids: ids do not ascend in an entry"),
        (lambda ids: ids[1].pop(), "rl_sample_ids and input_ids differ in length"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable, message: str) -> None:
    values = sample_rows()
    change(values["rl_sample_ids"])
    with pytest.raises(ValueError, match=message):
        read_to_verify(write_folder(tmp_path / "a", values, references=OF).path, tmp_path)


@pytest.mark.parametrize("change", [{"sample_k": -1}, {"sample_k": "3"}, {"vocab_size": 0}])
def test_manifest_is_checked(tmp_path: Path, change: dict) -> None:
    plan = write_folder(tmp_path / "a", sample_rows(), references=OF).manifest
    (tmp_path / "b").mkdir()
    replace(plan, references={"rl": OF["rl"] | change}).write(tmp_path / "b")
    with pytest.raises(ValueError, match="reference rl: sample_k is"):
        ShardFolder(tmp_path / "b")


@pytest.mark.parametrize("draws", [-1, 5000])
def test_settings_that_do_not_fit(draws: int) -> None:
    with pytest.raises(ValueError, match=f"--sample-k is {draws}, expected 0"):
        ScoreConfig("a", "b", "c", sample_k=draws)


# --- through the command --------------------------------------------------------------------------------


@pytest.mark.usefixtures("engine", "ray_session")
def test_a_real_engine_draws_from_the_model(tmp_path: Path, packed: Path, reference_model: Path, remit: Remit) -> None:
    """vLLM in float32, with the canary: shares of all tokens against a float64 distribution; verify rescores them."""
    out = score_to(tmp_path / "out", packed, reference_model, sample_k=16, top_k=3, canary=True).path
    (started,) = (line for line in log_lines(out) if line["event"] == "engine")
    assert started["canary"]["sample_excess"] < 1e-4
    assert verify_folder(ShardFolder(out)).problems == []
    model, off, seen = load(reference_model), torch.zeros(VOCABULARY, dtype=torch.float64), 0
    with torch.no_grad():
        for row in read_rows(out)[::9]:
            for ids, logprobs_V in zip(row["rl_sample_ids"], row_distributions(model, row, "packed"), strict=True):
                assert (ids is None) == (logprobs_V is None)
                if ids is not None:
                    counts = torch.bincount(torch.tensor(ids), minlength=VOCABULARY)
                    difference = counts - 16 * logprobs_V.exp()
                    assert difference.abs().max() < 1 + 1e-3
                    off, seen = off + difference, seen + 1
    assert seen > 500
    assert (off / seen).abs().max() < 5 * 0.5 / seen**0.5
    code, output, _ = remit("verify", "--shards", out, "--model", reference_model, "--rows", 3)
    assert (code, "shares of drawn tokens" in output) == (0, True)


def test_killed_driver_bad_rows_and_flipped_bits(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    sound, killed, bad = tmp_path / "sound", tmp_path / "killed", tmp_path / "bad"
    options = ("--sample-k", 4)
    run = Command(tmp_path, *faulty.command("score", sound, *options))
    assert run.finish() == 0, run.errors
    assert verify_folder(ShardFolder(sound)).problems == []
    first = Command(tmp_path, *faulty.command("score", killed, *options), REMIT_CRASH_AT="driver.committed")
    assert first.finish() == -signal.SIGKILL, first.errors
    code, _, error = remit(*faulty.command("score", killed, "--sample-k", 5))
    assert (code, "--sample-k is 4 there, 5 asked for now" in error) == (1, True), error
    again = Command(tmp_path, *faulty.command("score", killed, *options))
    assert again.finish() == 0, again.errors
    assert content(killed) == content(sound)
    token, part, place = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    run = Command(tmp_path, *faulty.command("score", bad, *options), **fault(sample=[token]))
    assert run.finish() == 0, run.errors
    got, want = part_rows(bad, part), part_rows(sound, part)
    nulls = [None] * len(want[place]["input_ids"])
    assert got[place] == want[place] | dict.fromkeys(("rl_logprobs", "rl_sample_ids"), nulls)
    assert got[:place] + got[place + 1 :] == want[:place] + want[place + 1 :]
    (listed,) = side_file(bad, part)
    assert "of the drawn tokens an id is not in 0..520" in listed["reason"]
    assert verify_folder(ShardFolder(bad)).problems == []


def test_places_that_are_nearly_sure_draw_of_their_own() -> None:
    """The log-prob of a token with p = 1 - 1e-7 has a handful of values; the others' have more. The rest of the distribution
    comes up as often as it should over many places: 25 draws of each, standard error of the sum."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20_000, 500, generator=generator) * 1.5
    logits[:, 3] = 16 + torch.rand(20_000, generator=generator)
    logprobs = logits.log_softmax(-1)
    tokens = torch.full((20_000,), 3)
    drawn = (draws(logprobs, tokens, 25) != 3).sum().item()
    expected = 25 * (1 - logprobs[:, 3].double().exp()).sum().item()
    assert abs(drawn - expected) < 4 * expected**0.5
    sure = torch.zeros(1000, 500)
    sure[:, 3] = 30
    sure[:, 3:400] += torch.rand(1000, 397, generator=generator)
    found = draws(sure.log_softmax(-1), torch.full((1000,), 3), 1)
    assert (found == 3).all()
