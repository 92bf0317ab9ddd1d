"""Objectives as functions: against cases computed by hand, brute force, and float64 autograd through the definition."""

import math
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from oracles import kd_token, rkl_token

from pipelines.commands.verify import VerifyConfig
from pipelines.inspect.settings import InspectConfig
from shards.keep_ratio import keep_count
from trainer.config import TrainConfig
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.objectives.kd import kd_losses
from trainer.objectives.objective import Tokens, differentiable
from trainer.objectives.remit import remit_weights
from trainer.objectives.rho1 import top_share
from trainer.objectives.rkl import divergence, least_rest, log_outcomes
from trainer.objectives.settings import OPTIONS, Name


def tokens_of(losses: list[float], logprobs: list[float], documents: list[int] | None = None) -> Tokens:
    number = torch.zeros(len(losses), dtype=torch.int64)
    document = number if documents is None else torch.tensor(documents)
    return Tokens(torch.tensor(losses), number, document, {"logprobs": torch.tensor(logprobs)})


def test_equal_models_give_weight_one() -> None:
    losses = torch.tensor([0.1, 3.0, 2.5])
    weighted = remit_weights(losses, -losses, epsilon=0.2)
    assert torch.equal(weighted.weights_N, torch.ones(3))
    assert not weighted.clipped_low_N.any()
    assert not weighted.clipped_high_N.any()


def test_hand_computed() -> None:
    # deltas 0.2, -0.2: centred they stay; 2 sigmoid(0.2) = 1.0996680
    weighted = remit_weights(torch.tensor([1.2, 0.8]), torch.tensor([-1.0, -1.0]), epsilon=0.2)
    assert weighted.weights_N.tolist() == pytest.approx([1.0996680, 0.9003320], abs=1e-6)
    # deltas 3, 0, 0: centred 2, -1, -1: 2 sigmoid = 1.7616, 0.5379: both beyond the clip
    weighted = remit_weights(torch.tensor([4.0, 1.0, 1.0]), torch.tensor([-1.0, -1.0, -1.0]), epsilon=0.2)
    assert weighted.weights_N.tolist() == pytest.approx([1.2, 0.8, 0.8])
    assert weighted.clipped_high_N.tolist() == [True, False, False]
    assert weighted.clipped_low_N.tolist() == [False, True, True]


def test_clip_begins_at_ln_one_and_a_half() -> None:
    # two tokens at +-d: the weight reaches 1.2 where d = ln 1.5 (remit: |delta| >= 0.405 saturates)
    for distance, clipped in ((0.40, False), (0.41, True)):
        weighted = remit_weights(torch.tensor([distance, -distance]), torch.zeros(2), epsilon=0.2)
        assert weighted.clipped_high_N[0].item() is clipped
    assert math.log(1.5) == pytest.approx(0.405, abs=1e-3)


def test_one_token_has_weight_one() -> None:
    assert remit_weights(torch.tensor([5.0]), torch.tensor([-1.0]), 0.2).weights_N.item() == 1


@pytest.mark.parametrize("weight_map", ["sigmoid", "exp", "linear"])
@pytest.mark.parametrize("centring", ["row", "document", "none"])
@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.9, math.inf])
def test_variants_equal_float64(weight_map: str, centring: str, epsilon: float) -> None:
    rng = random.Random(3)
    documents = sorted(rng.choices([0, 1, 4, 5], k=40))  # of some documents no token is predicted
    losses, logprobs = ([rng.uniform(0, 6) * sign for _ in documents] for sign in (1, -1))
    settings = ObjectiveSettings(weight_map=weight_map, centring=centring, epsilon=epsilon)
    weighted = make_objective(settings).weigh(tokens_of(losses, logprobs, documents))
    delta = [loss + logprob for loss, logprob in zip(losses, logprobs)]
    for n, document in enumerate(documents):
        same = [d for d, other in zip(delta, documents) if centring == "row" or other == document]
        x = delta[n] - (0 if centring == "none" else sum(same) / len(same))
        raw = {"sigmoid": 2 / (1 + math.exp(-x)), "exp": math.exp(x / 2), "linear": max(0, 1 + x / 2)}[weight_map]
        assert weighted.weights_N[n].item() == pytest.approx(min(max(raw, 1 - epsilon), 1 + epsilon), abs=2e-6)
        assert weighted.clipped_high_N[n].item() == (raw > 1 + epsilon)
        assert weighted.clipped_low_N[n].item() == (raw < 1 - epsilon)
    if epsilon == math.inf:
        assert weighted.weights_N.max() > 1.5
        assert not (weighted.clipped_low_N | weighted.clipped_high_N).any()


def test_keep_count_by_hand() -> None:
    cases = {(5, 0.5): 3, (20, 0.55): 11, (1, 0.1): 1, (10, 0.8): 8, (7, 0.3): 2, (100_000, 0.7): 70_000, (3, 0.99): 3}
    assert {case: keep_count(*case) for case in cases} == cases


@pytest.mark.parametrize("ratio", [0.1, 0.55, 0.8, 0.999])
@pytest.mark.parametrize("seed", range(8))
def test_top_share_equals_sorting(ratio: float, seed: int) -> None:
    """Few different values, so that most choices are between equals: the earlier token wins."""
    rng = random.Random(seed)
    excess = [
        rng.choice([-1.5, 0.0, 0.25, 3.0]) if seed % 2 else rng.gauss(0, 1) for _ in range(rng.choice([1, 2, 63]))
    ]
    excess = torch.tensor(excess).tolist()
    best = sorted(range(len(excess)), key=lambda n: (-excess[n], n))[: keep_count(len(excess), ratio)]
    assert top_share(torch.tensor(excess), ratio).nonzero()[:, 0].tolist() == sorted(best)


def test_rho1_by_hand() -> None:
    objective = make_objective(ObjectiveSettings(objective="rho1", keep_ratio=0.5, scope="row"))
    weighted = objective.weigh(tokens_of([3.0, 1.0, 2.0, 5.0], [-1.0, -1.0, -2.0, -3.0]))
    assert weighted.delta_N.tolist() == [2, 0, 0, 2]
    assert weighted.weights_N.tolist() == [2, 0, 0, 2]  # a kept token weighs 1 / keep_ratio


def kd_case(seed: int, tokens: int, vocabulary: int, k: int, spread: float, step: float) -> tuple:
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, vocabulary, generator=g)
    teacher = (spread * torch.randn(tokens, vocabulary, generator=g)).log_softmax(-1)
    stored, ids = teacher.topk(k)
    if step:
        stored = torch.round(stored / step) * step
    return logits, torch.randint(0, vocabulary, (tokens,), generator=g), ids, stored


@pytest.mark.parametrize("missing_mass", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7, 0.05, 30.0])
@pytest.mark.parametrize(
    ("vocabulary", "k", "spread", "step"),
    [(50, 1, 1, 0), (50, 7, 3, 0), (131, 32, 2, 1 / 64), (40, 39, 4, 0.25), (40, 40, 2, 0)],
)
def test_kd_equals_float64_autograd(
    missing_mass: str, temperature: float, vocabulary: int, k: int, spread: float, step: float
) -> None:
    logits, targets, ids, stored = kd_case(1, 70, vocabulary, k, spread, step)
    leaf = logits.double().requires_grad_()
    want = []
    for n in range(len(logits)):
        logprobs_V = leaf[n].log_softmax(-1)
        kl = kd_token(logprobs_V, ids[n].tolist(), stored[n].tolist(), temperature, missing_mass)
        want.append(0.3 * -logprobs_V[targets[n]] + 0.7 * temperature**2 * kl)
    torch.stack(want).sum().backward()
    buffer = logits.clone()
    result = kd_losses(buffer, targets, ids, stored, 0.7, temperature, missing_mass)
    noise = max(1, temperature**2 / 10)  # the factor of the KL, which then is a small difference
    torch.testing.assert_close(result.losses_N.double(), torch.stack(want).detach(), rtol=2e-5, atol=1e-5 * noise)
    torch.testing.assert_close(buffer.double(), leaf.grad, rtol=1e-4, atol=2e-6 * noise)
    assert result.ntp_N.tolist() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").tolist(), abs=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kd_with_the_whole_vocabulary_is_dense(temperature: float) -> None:
    logits, targets, ids, stored = kd_case(2, 33, 97, 97, 3.0, 0)
    teacher = torch.zeros(33, 97, dtype=torch.float64).scatter_(1, ids, stored.double())
    leaf = logits.double().requires_grad_()
    dense = torch.nn.functional.kl_div(
        (leaf / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (temperature**2 * dense).sum().backward()
    for missing_mass in ("bucket", "renormalise"):
        buffer = logits.clone()
        result = kd_losses(buffer, targets, ids, stored, 1.0, temperature, missing_mass)
        torch.testing.assert_close(result.losses_N.double(), temperature**2 * dense.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffer.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_kd_of_certain_predictions_is_finite() -> None:
    """All mass on the top k in float32, in base and reference, while the other one disagrees."""
    logits = torch.zeros(3, 50)
    logits[0, 4], logits[1, 9], logits[2, 4] = 200.0, 200.0, -200.0
    ids = torch.tensor([[4, 5], [4, 5], [4, 5]])
    stored = torch.tensor([[0.0, -100.0], [0.0, -100.0], [-3.0, -4.0]])
    for missing_mass, temperature in product(("bucket", "renormalise"), (1.0, 2.0)):
        buffer = logits.clone()
        result = kd_losses(buffer, torch.tensor([4, 4, 4]), ids, stored, 0.5, temperature, missing_mass)
        assert torch.isfinite(result.losses_N).all()
        assert torch.isfinite(buffer).all()
        assert result.figures["kd_loss"][0].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("missing_mass", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0, 30.0])
def test_kd_where_probabilities_underflow(missing_mass: str, temperature: float) -> None:
    """A base that is sure beyond float32's exponent, a reference that is nearly flat: as float64 has it."""
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    if temperature >= 1:  # below, the oracle's own float64 underflows
        logits[0, 5] += 110
        logits[1, 900] += 150
    ids = torch.arange(0, 6).expand(4, 6).contiguous()
    stored = torch.tensor([[-0.01, -5, -6, -7, -8, -9], [-7.0] * 6, [-7.4, -7.4, -7.5, -7.5, -7.6, -9], [-3.0] * 6])
    leaf = logits.double().requires_grad_()
    kl = torch.stack(
        [
            kd_token(leaf[n].log_softmax(-1), ids[n].tolist(), stored[n].tolist(), temperature, missing_mass)
            for n in range(4)
        ]
    )
    (temperature**2 * kl).sum().backward()
    buffer = logits.clone()
    result = kd_losses(buffer, torch.tensor([5, 5, 5, 5]), ids, stored, 1.0, temperature, missing_mass)
    torch.testing.assert_close(result.figures["kd_loss"].double(), kl.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(buffer.double(), leaf.grad, rtol=1e-4, atol=2e-6 * max(1, temperature**2 / 10))


def rkl_case(case: tuple, temperature: float, plain: float, partition: bool, step: float) -> tuple[torch.Tensor, ...]:
    """Loss, KL and gradient of the project, and loss and gradient of the definition in float64."""
    logits, targets, ids, stored, teacher = case
    log_partition = (teacher.double() / temperature).exp().sum(-1).log().float()
    if step:
        log_partition = torch.round(log_partition / step) * step
    columns = {"topk_ids": ids, "topk_logprobs": stored}
    if partition and temperature != 1:
        columns[f"log_partition_t{temperature:g}".replace(".", "p")] = log_partition
    scale = (1 - plain) * temperature**2 * torch.linspace(0.5, 2, len(logits))
    leaf, want = logits.double().requires_grad_(), []
    for n in range(len(logits)):
        logprobs_V = leaf[n].log_softmax(-1)
        z = 0.0 if temperature == 1 else log_partition[n].item() if partition else None
        kl = rkl_token(logprobs_V, ids[n].tolist(), stored[n].tolist(), temperature, z, least_rest(step))
        want.append(plain * -logprobs_V[targets[n]] + scale[n].double() * kl)
    torch.stack(want).sum().backward()
    buffer = logits.clone()
    ntp, kl, _ = divergence(buffer, targets, columns, plain, scale[:, None], temperature, least_rest(step))
    assert ntp.tolist() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").tolist(), abs=1e-5
    )
    return (plain * ntp + scale * kl).double(), buffer.double(), torch.stack(want).detach(), leaf.grad


@pytest.mark.parametrize("plain", [0.0, 0.4])
@pytest.mark.parametrize("partition", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize(
    ("vocabulary", "k", "spread", "step"),
    [(50, 1, 1, 0), (131, 32, 3, 1 / 64), (40, 39, 6, 0.25), (40, 40, 2, 0), (2000, 8, 2, 0)],
)
def test_rkl_equals_float64_autograd(
    plain: float, partition: bool, temperature: float, vocabulary: int, k: int, spread: float, step: float
) -> None:
    g = torch.Generator().manual_seed(vocabulary + k)
    logits, teacher = (
        spread * torch.randn(70, vocabulary, generator=g),
        spread * torch.randn(70, vocabulary, generator=g),
    )
    teacher = teacher.log_softmax(-1)
    stored, ids = teacher.topk(k)
    stored = torch.round(stored / step) * step if step else stored
    targets = torch.randint(0, vocabulary, (70,), generator=g)
    case = (logits, targets, ids, stored, teacher)
    losses, gradient, want, want_gradient = rkl_case(case, temperature, plain, partition, step)
    noise = max(1, temperature**2 / 10)
    torch.testing.assert_close(losses, want, rtol=2e-5, atol=1e-5 * noise)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5 * noise)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_rkl_with_the_whole_vocabulary_is_dense(temperature: float) -> None:
    """Against torch's own KL; also where the base is sure beyond float32's exponent and disagrees."""
    logits, targets, ids, stored = kd_case(2, 33, 97, 97, 3.0, 0)
    logits[0, 5] += 110
    teacher = torch.zeros(33, 97, dtype=torch.float64).scatter_(1, ids, stored.double())
    leaf = logits.double().requires_grad_()
    student, reference = (leaf / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    dense = torch.nn.functional.kl_div(reference, student, reduction="none", log_target=True).sum(-1)
    (temperature**2 * dense).sum().backward()
    buffer = logits.clone()
    scale = torch.full((33, 1), temperature**2)
    _, kl, missing = divergence(
        buffer, targets, {"topk_ids": ids, "topk_logprobs": stored}, 0.0, scale, temperature, 1e-6
    )  # fmt: skip
    torch.testing.assert_close(kl.double(), dense.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffer.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert missing.abs().max() == 0


def test_what_a_sure_reference_leaves_keeps_its_digits() -> None:
    """A millionth and more outside of the stored ids, of which a float32 sum would lose a tenth."""
    g = torch.Generator().manual_seed(3)
    for temperature in (0.7, 1.0, 2.0):
        rest_N = torch.logspace(-5.5, -1, 40, dtype=torch.float64)
        inside_NK = torch.rand(40, 12, generator=g, dtype=torch.float64) ** 8
        hot_NK = (inside_NK / inside_NK.sum(-1, keepdim=True) * (1 - rest_N[:, None])).log()
        z_N = torch.randn(40, generator=g)
        stored_NK = (temperature * (hot_NK + z_N.double()[:, None])).float()
        want_N = 1 - (stored_NK.double() / temperature - z_N.double()[:, None]).exp().sum(-1)
        log_p_NO, missing_N = log_outcomes(stored_NK, temperature, z_N, 1e-6, whole=False)
        torch.testing.assert_close(log_p_NO[:, -1].double(), want_N.log(), rtol=0, atol=1e-5)
        torch.testing.assert_close(missing_N.double(), want_N, rtol=1e-5, atol=0)


def test_rkl_of_certain_predictions_is_finite() -> None:
    """The reference leaves nothing outside of the stored ids, the base has all there: what rounding leaves open bounds it."""
    logits = torch.zeros(3, 50)
    logits[0, 4], logits[1, 9], logits[2, 4] = 200.0, 200.0, -200.0
    ids = torch.tensor([[4, 5]] * 3)
    stored = torch.tensor([[0.0, -100.0], [0.0, -100.0], [0.0, 0.0]])  # the last sums to 2
    for temperature, step in product((0.5, 1.0, 2.0), (0.0, 1 / 64)):
        buffer, columns = logits.clone(), {"topk_ids": ids, "topk_logprobs": stored}
        scale = torch.ones(3, 1)
        _, kl, missing = divergence(buffer, torch.tensor([4, 4, 4]), columns, 0.5, scale, temperature, least_rest(step))
        assert torch.isfinite(buffer).all()
        assert missing.tolist() == [0, 0, 0]
        if temperature == 1:
            # all of the base is outside: -log of what the reference has there at least
            assert kl[1].item() == pytest.approx(-math.log(least_rest(step)), rel=1e-4)
        assert kl[0].item() == pytest.approx(0, abs=0.1)
        assert torch.isfinite(kl).all()


def test_a_loss_by_automatic_differentiation() -> None:
    """The wrapper for plain functions: dense distillation written in one line gives kd's loss and gradient."""
    logits, targets, ids, stored = kd_case(4, 20, 60, 60, 2.0, 0)
    teacher = torch.zeros(20, 60).scatter_(1, ids, stored.exp())
    loss = differentiable(lambda z, y, columns: -(columns["teacher"] * z.log_softmax(-1)).sum(-1))
    mine, theirs = logits.clone(), logits.clone()
    got = loss(mine, targets, {"teacher": teacher})
    want = kd_losses(theirs, targets, ids, stored, 1.0, 1.0, "bucket")
    entropy = -(teacher * stored.new_zeros(20, 60).scatter_(1, ids, stored)).sum(-1)
    torch.testing.assert_close(got.losses_N - entropy, want.losses_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.ntp_N, want.ntp_N)


def test_the_default_temperature_is_that_of_the_objective() -> None:
    found = {name: ObjectiveSettings(objective=name).temperature for name in OPTIONS}
    softened = {"kd": 1.0, "rkl": 1.0, "switch": 2.0}
    assert found == dict.fromkeys(("remit", "ntp", "rho1", "sampled", "entropy")) | softened
    assert replace(ObjectiveSettings(objective="switch"), gate_quantile=0.3).temperature == 2.0


def test_every_objective_is_registered() -> None:
    assert set(OPTIONS) == set(get_args(Name))
    for name in OPTIONS:
        objective = make_objective(ObjectiveSettings(objective=name))
        assert (objective.columns == ()) == (name == "ntp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft"}, "--objective is 'sft', expected one of remit, ntp, rho1, kd, rkl, switch"),
        ({"epsilon": 0.0}, "--epsilon is 0,"),
        ({"epsilon": 1.0}, "or inf for no clip"),
        ({"epsilon": math.nan}, "--epsilon is nan"),
        ({"epsilon": -math.inf}, "--epsilon is -inf"),
        ({"objective": "rho1", "keep_ratio": 0.0}, "--keep-ratio is 0.0"),
        ({"objective": "rho1", "keep_ratio": 1.0}, "ntp keeps all tokens"),
        ({"objective": "rho1", "keep_ratio": math.nan}, "--keep-ratio is nan"),
        ({"objective": "rho1", "scope": "batch"}, "--scope is 'batch'"),
        ({"objective": "kd", "kd_weight": 0.0}, "--kd-weight is 0.0"),
        ({"objective": "kd", "kd_weight": 1.5}, "--kd-weight is 1.5"),
        ({"objective": "kd", "temperature": 0.0}, "--temperature is 0.0"),
        ({"objective": "kd", "temperature": math.inf}, "--temperature is inf"),
        ({"objective": "rkl", "kd_weight": 2.0}, "--kd-weight is 2.0"),
        ({"objective": "rkl", "missing_mass": "renormalise"}, "--missing-mass belongs to --objective kd"),
        ({"objective": "rkl", "scope": "micro"}, "--scope belongs to --objective rho1 or switch"),
        ({"objective": "switch", "gate_quantile": 0.0}, "--gate-quantile is 0.0"),
        ({"objective": "switch", "gate_quantile": 1.0}, "a share of the tokens between 0 and 1"),
        ({"objective": "switch", "gate_quantile": math.nan}, "--gate-quantile is nan"),
        ({"objective": "switch", "scope": "row"}, "--scope is 'row', expected global or micro"),
        ({"objective": "switch", "kd_weight": 0.7}, "--kd-weight belongs to --objective kd or rkl"),
        ({"objective": "kd", "missing_mass": "drop"}, "--missing-mass is 'drop'"),
        ({"objective": "remit", "keep_ratio": 0.5}, "--keep-ratio belongs to --objective rho1"),
        ({"objective": "ntp", "epsilon": 0.5}, "--epsilon belongs to --objective remit"),
        ({"weight_map": "cube"}, "--weight-map is 'cube'"),
        ({"centring": "token"}, "--centring is 'token'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**settings)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 5.0, -0.2, math.nan, -math.inf])
@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (TrainConfig, {"shards": "s", "model": "m", "out": Path("o")}),
        (VerifyConfig, {"shards": "s"}),
        (InspectConfig, {"shards": "s"}),
    ],
)
def test_every_command_takes_the_same_epsilons(settings: Any, given: dict[str, Any], epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"--epsilon is .*, expected a number between 0 and 1, .* or inf for no clip"):
        settings(**given, epsilon=epsilon)
    for valid in (0.2, 0.999, math.inf):
        settings(**given, epsilon=valid)
