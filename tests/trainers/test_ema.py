"""The average of the policy's weights: its closed form, and what it does to the model."""

import pytest
import torch

from instruct_trl.trainers.ema import EMACallback


def test_after_n_steps_to_a_constant_the_average_is_the_closed_form():
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    ema = EMACallback(model, decay=0.992)
    torch.nn.init.constant_(model.weight, 5.0)
    for _ in range(100):
        ema.update()
    expected = 5.0 + (2.0 - 5.0) * 0.992**100
    torch.testing.assert_close(ema.shadow[0], torch.full((1, 3), expected))


def test_the_average_of_bf16_weights_is_kept_in_float32():
    """A step of 0.8 % is less than bf16 can tell from 2."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 2.0)
    ema = EMACallback(model, decay=0.992)
    torch.nn.init.constant_(model.weight, 2.125)
    for _ in range(10):
        ema.update()
    torch.testing.assert_close(ema.shadow[0], torch.full((1, 3), 2.125 - 0.125 * 0.992**10))
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.tolist() == [[2.125] * 3]


def test_applied_swaps_the_weights_in_and_back_out_also_after_an_error():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = EMACallback(model, decay=0.0)
    torch.nn.init.constant_(model.weight, 3.0)
    seen = []

    def fails():
        with ema.applied():
            seen.append(model.weight.tolist())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert seen == [[[1.0, 1.0]]]
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_frozen_parameters_are_not_copied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert len(EMACallback(model, 0.9).shadow) == 2


def test_a_decay_of_1_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
        EMACallback(torch.nn.Linear(1, 1), 1.0)
