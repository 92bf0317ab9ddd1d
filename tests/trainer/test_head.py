"""The loss head against float64 autograd through full logits, written from the equations."""

from dataclasses import replace

import pytest
import torch
from oracles import kd_token, rkl_token

from trainer.batch import MicroBatch
from trainer.head import gradient_in_place, low_gradient, objective_loss
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.statistics import StepStatistics

NTP, REMIT = (make_objective(ObjectiveSettings(objective=name)) for name in ("ntp", "remit"))


def batch_of(ids, predicted, reference) -> MicroBatch:
    return MicroBatch(ids, predicted, {"logprobs": reference})


def oracle(hidden, weight, bias, ids, predicted, reference, epsilon, normaliser):
    """Loss and gradients by autograd in float64; epsilon None means plain next-token prediction."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    bias = None if bias is None else bias.double().requires_grad_()
    logprobs = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(ids.shape[0]):
        tokens = [t for t in range(ids.shape[1]) if predicted[row, t]]
        if not tokens:
            continue
        loss = torch.stack([-logprobs[row, t - 1, ids[row, t]] for t in tokens])
        w = torch.ones_like(loss)
        if epsilon is not None:
            delta = loss.detach() - torch.stack([-reference[row, t].double() for t in tokens])
            w = (2 / (1 + torch.exp(-(delta - delta.mean())))).clip(1 - epsilon, 1 + epsilon)
        total = total + (w * loss).sum()
    total = total / normaliser
    total.backward()
    return total.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad


def case(seed: int, batch: int, length: int, size: int, vocabulary: int, dtype=torch.float32, spread: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, size, generator=g).to(dtype)
    weight = (spread * torch.randn(vocabulary, size, generator=g) / size**0.5).to(dtype)
    ids = torch.randint(0, vocabulary, (batch, length), generator=g)
    predicted = torch.rand(batch, length, generator=g) < 0.9
    predicted[:, 0] = False
    for row in range(batch):  # unequal lengths, one of them a single token
        predicted[row, [length, 1, 2, length - 1][row % 4] :] = False
    reference = -torch.rand(batch, length, generator=g) * 8
    return hidden, weight, ids, predicted, reference


@pytest.mark.parametrize("objective", ["ntp", "remit"])
@pytest.mark.parametrize(("seed", "shape"), [(0, (1, 9, 8, 50)), (1, (5, 17, 16, 101)), (2, (3, 33, 12, 1031))])
@pytest.mark.parametrize("budget", [1 << 30, 4 * 1031 * 5, 1])
def test_float32_equals_float64_autograd(objective: str, seed: int, shape: tuple, budget: int) -> None:
    hidden, weight, ids, predicted, reference = case(seed, *shape, spread=3.0)
    bias = torch.randn(shape[3], generator=torch.Generator().manual_seed(9)) if seed == 1 else None
    normaliser = 37.0
    want = oracle(hidden, weight, bias, ids, predicted, reference, 0.2 if objective == "remit" else None, normaliser)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()] + ([] if bias is None else [bias.requires_grad_()])
    loss = objective_loss(
        hidden,
        weight,
        batch_of(ids, predicted, reference),
        REMIT if objective == "remit" else NTP,
        normaliser,
        bias_V=bias,
        logits_budget_bytes=budget,
    )
    (2 * loss).backward()
    assert loss.item() == pytest.approx(want[0].item(), rel=1e-5)
    for got, expected in zip(inputs, [grad for grad in want[1:] if grad is not None]):
        torch.testing.assert_close(got.grad.double() / 2, expected, rtol=2e-4, atol=2e-6)


def test_bfloat16_stays_near_float64() -> None:
    hidden, weight, ids, predicted, reference = case(5, 3, 40, 64, 777, dtype=torch.bfloat16)
    want = oracle(hidden, weight, None, ids, predicted, reference, 0.2, 50.0)
    master = weight.float().requires_grad_()
    hidden.requires_grad_()
    loss = objective_loss(hidden, master, batch_of(ids, predicted, reference), REMIT, 50.0)
    loss.backward()
    assert loss.item() == pytest.approx(want[0].item(), rel=1e-2)
    for got, expected in ((hidden.grad, want[1]), (master.grad, want[2])):
        cosine = torch.nn.functional.cosine_similarity(got.double().flatten(), expected.flatten(), dim=0)
        assert cosine > 0.999
    assert master.grad.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_large_vocabulary(dtype: torch.dtype, tolerance: float) -> None:
    """151,936 entries, peaked distributions, rows of unequal length, in three pieces a row."""
    hidden, weight, ids, predicted, reference = case(11, 4, 21, 16, 151_936, dtype=dtype, spread=4.0)
    want = oracle(hidden, weight, None, ids, predicted, reference, 0.2, 31.0)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = objective_loss(
        hidden, weight, batch_of(ids, predicted, reference), REMIT, 31.0, logits_budget_bytes=4 * 151_936 * 8
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(want[0].item(), rel=tolerance)
    for got, expected in ((hidden.grad, want[1]), (weight.grad, want[2])):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_gradients_are_taken_once() -> None:
    hidden, weight, ids, predicted, _ = case(3, 2, 9, 8, 50)
    hidden.requires_grad_()
    loss = objective_loss(hidden, weight, MicroBatch(ids, predicted), NTP, 5.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        loss.backward()


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, ids, predicted, reference = case(7, 2, 12, 16, 60)
    shared = weight.clone().requires_grad_()
    embedded = torch.nn.functional.embedding(ids, shared)
    objective_loss(embedded, shared, batch_of(ids, predicted, reference), REMIT, 20.0).backward()

    double = weight.double().requires_grad_()
    grads = oracle(torch.nn.functional.embedding(ids, weight), weight, None, ids, predicted, reference, 0.2, 20.0)
    torch.nn.functional.embedding(ids, double).backward(grads[1])
    torch.testing.assert_close(shared.grad.double(), double.grad + grads[2], rtol=1e-4, atol=1e-6)


def test_statistics_and_evaluation() -> None:
    hidden, weight, ids, predicted, reference = case(3, 4, 21, 16, 60, spread=3.0)
    statistics = StepStatistics()
    with torch.no_grad():
        loss = objective_loss(
            hidden, weight.requires_grad_(), batch_of(ids, predicted, reference), REMIT, 1.0, statistics=statistics
        )  # fmt: skip
    assert not loss.requires_grad
    sums = statistics.sums
    assert sums["tokens"] == predicted.sum()
    logprobs = (hidden.double() @ weight.detach().double().T).log_softmax(-1)
    plain = sum(-logprobs[r, t - 1, ids[r, t]] for r, t in predicted.nonzero().tolist())
    assert sums["loss"] == pytest.approx(plain.item(), rel=1e-6)
    assert sums["objective_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < sums["clipped_low"] < sums["tokens"]


@pytest.mark.parametrize("scope", ["row", "micro"])
@pytest.mark.parametrize("budget", [1 << 30, 4 * 101 * 7, 1])
def test_rho1_equals_float64_autograd(scope: str, budget: int) -> None:
    """Scopes whose logits are split into pieces choose the same tokens."""
    hidden, weight, ids, predicted, reference = case(8, 5, 17, 16, 101, spread=3.0)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logprobs = torch.nn.functional.linear(*exact).log_softmax(-1)
    tokens = [(r, t) for r, t in predicted.nonzero().tolist()]
    losses = {(r, t): -logprobs[r, t - 1, ids[r, t]] for r, t in tokens}
    groups = [tokens] if scope == "micro" else [[(r, t) for r, t in tokens if r == row] for row in range(5)]
    total = 0.0
    for group in groups:
        best = sorted(group, key=lambda place: -(losses[place].item() + reference[place].item()))
        total = total + sum(losses[place] for place in best[: max(1, int(0.4 * len(group) + 0.5))] if group)
    (total / 0.4 / 30).backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    objective = make_objective(ObjectiveSettings(objective="rho1", keep_ratio=0.4, scope=scope))
    loss = objective_loss(
        hidden, weight, batch_of(ids, predicted, reference), objective, 30.0, logits_budget_bytes=budget
    )
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / 0.4 / 30, rel=1e-5)
    for got, want in zip((hidden, weight), exact):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("missing_mass", ["bucket", "renormalise"])
@pytest.mark.parametrize("budget", [1 << 30, 4 * 101 * 7, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_kd_equals_float64_autograd(missing_mass: str, budget: int, bias: bool) -> None:
    hidden, weight, ids, predicted, reference = case(8, 5, 17, 16, 101, spread=3.0)
    g = torch.Generator().manual_seed(1)
    bias_V = torch.randn(101, generator=g) if bias else None
    stored, top = (3 * torch.randn(5, 17, 101, generator=g)).log_softmax(-1).topk(6)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = torch.nn.functional.linear(*exact, None if bias_V is None else bias_V.double())
    total = 0.0
    for r, t in predicted.nonzero().tolist():
        logprobs_V = logits[r, t - 1].log_softmax(-1)
        kl = kd_token(logprobs_V, top[r, t].tolist(), stored[r, t].tolist(), 1.0, missing_mass)
        total = total - 0.5 * logprobs_V[ids[r, t]] + 0.5 * kl
    (total / 30).backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    columns = {"logprobs": reference, "topk_ids": top.int(), "topk_logprobs": stored}
    objective = make_objective(ObjectiveSettings(objective="kd", missing_mass=missing_mass))
    loss = objective_loss(
        hidden, weight, MicroBatch(ids, predicted, columns), objective, 30.0, bias_V=bias_V,
        logits_budget_bytes=budget, statistics=StepStatistics(figures=objective.figures),
    )  # fmt: skip
    (3 * loss).backward()
    assert loss.item() == pytest.approx(total.item() / 30, rel=1e-5)
    for got, want in zip((hidden, weight), exact):
        torch.testing.assert_close(got.grad.double() / 3, want.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("settings", [{"objective": "rho1", "scope": "micro"}, {"objective": "kd"}])
def test_other_objectives_in_bfloat16(settings: dict) -> None:
    """Beside the same in float32: RHO-1 chooses nearly the same tokens, the gradients point the same way."""
    hidden, weight, ids, predicted, reference = case(5, 4, 40, 64, 777, spread=2.0)
    stored, top = (3 * torch.randn(4, 40, 777, generator=torch.Generator().manual_seed(1))).log_softmax(-1).topk(6)
    batch = MicroBatch(ids, predicted, {"logprobs": reference, "topk_ids": top.int(), "topk_logprobs": stored})
    objective = make_objective(ObjectiveSettings(**settings))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        states, master = hidden.detach().clone().to(dtype).requires_grad_(), weight.clone().requires_grad_()
        statistics = StepStatistics(figures=objective.figures)
        loss = objective_loss(states, master, batch, objective, 50.0, statistics=statistics)
        loss.backward()
        results.append((loss.item(), states.grad.double(), master.grad.double()))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    for got, want in zip(results[1][1:], results[0][1:]):
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.98


def test_memory_of_the_logits_survives_inference_mode() -> None:
    hidden, weight, ids, predicted, reference = case(3, 2, 9, 8, 5003)
    with torch.inference_mode():
        first = objective_loss(hidden, weight, batch_of(ids, predicted, reference), NTP, 1.0)
    hidden.requires_grad_()
    loss = objective_loss(hidden, weight, batch_of(ids, predicted, reference), NTP, 1.0)
    loss.backward()
    assert loss.item() == first.item()


def test_a_global_objective_is_not_weighed_by_micro_batch() -> None:
    hidden, weight, ids, predicted, reference = case(3, 2, 9, 8, 50)
    objective = make_objective(ObjectiveSettings(objective="rho1"))
    with pytest.raises(ValueError, match="a micro-batch is not the global batch"):
        objective_loss(hidden, weight, batch_of(ids, predicted, reference), objective, 1.0)


def test_first_position_cannot_be_predicted() -> None:
    hidden, weight, ids, predicted, _ = case(3, 2, 5, 8, 20)
    predicted[1, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        objective_loss(hidden, weight, MicroBatch(ids, predicted), NTP, 1.0)


@pytest.mark.parametrize("budget", [1 << 30, 4 * 101 * 5, 1])
def test_gated_tokens_have_a_loss_of_their_own(budget: int) -> None:
    """A switch: next-token loss of the others, weighted, and reverse KL of the gated; in one piece or in several."""
    hidden, weight, ids, predicted, _ = case(2, 4, 17, 16, 101, spread=3.0)
    g = torch.Generator().manual_seed(3)
    gated = predicted & (torch.rand(predicted.shape, generator=g) < 0.4)
    gated[0], gated[3] = predicted[0], False  # all of a row, none of another
    top = torch.randn(*ids.shape, 101, generator=g).log_softmax(-1).topk(7)
    columns = {"topk_ids": top.indices, "topk_logprobs": top.values, "weight": torch.rand(ids.shape, generator=g) + 0.5}
    columns |= {"gate_entropy": torch.full(ids.shape, 1.5), "gate_without_topk": torch.zeros(ids.shape)}
    switch = replace(make_objective(ObjectiveSettings(objective="switch", temperature=1.0)), scope="row")
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    statistics = StepStatistics(figures=switch.figures, per=switch.per)
    batch = MicroBatch(ids, predicted, columns, gated_BT=gated)
    loss = objective_loss(*leaves, batch, switch, 37.0, statistics=statistics, logits_budget_bytes=budget)
    loss.backward()
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    total = kl_sum = 0.0
    for row, position in predicted.nonzero().tolist():
        logprobs_V = (exact[0][row, position - 1] @ exact[1].T).log_softmax(-1)
        own = -logprobs_V[ids[row, position]]
        if gated[row, position]:
            place = (row, position)
            own = rkl_token(logprobs_V, top.indices[place].tolist(), top.values[place].tolist(), 1.0, 0.0)
            kl_sum += own.item()
        total = total + columns["weight"][row, position].double() * own / 37
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for got, want in zip(leaves, exact):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=2e-4, atol=2e-6)
    assert statistics.sums["gated"] == gated.sum()
    assert statistics.sums["kd_loss"] == pytest.approx(kl_sum, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_that_is_rounded_in_one_pass_is_the_same(dtype: torch.dtype) -> None:
    """The form that GPUs take, held against float64 and, bit for bit, against the one in the memory of the logits."""
    generator = torch.Generator().manual_seed(5)
    logits_NV = 4 * torch.randn(9, 257, generator=generator)
    targets_N = torch.randint(0, 257, (9,), generator=generator)
    logits_NV[2, targets_N[2]] = 40.0  # a probability near 1, where the target's entry is a small difference
    scale_N, z_N = torch.rand(9, generator=generator) / 97, torch.rand(9, generator=generator) / 1000
    probabilities_NV = logits_NV.double().softmax(-1)
    wanted_NV = (scale_N + z_N)[:, None].double() * probabilities_NV
    wanted_NV[torch.arange(9), targets_N] -= scale_N.double()
    exponentials_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).exp()
    factor_N = (scale_N + z_N) / exponentials_NV.sum(-1)
    found_NV = low_gradient(exponentials_NV.clone(), targets_N, factor_N, scale_N, dtype)
    assert found_NV.dtype == dtype
    in_place_NV = gradient_in_place(exponentials_NV, targets_N, factor_N, scale_N, dtype)
    assert torch.equal(found_NV, in_place_NV.to(dtype))
    assert (found_NV.double() - wanted_NV).norm() < 2e-3 * wanted_NV.norm()
