"""ReMiT's weights against cases computed by hand and against float64."""

import math

import pytest
import torch

from trainer.objectives.remit import remit_weights


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
