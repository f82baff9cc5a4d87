import logging
import warnings

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as schedulers

from trimtab.optim import AdamMini, StepFactor

SCHEDULES = {
    "constant": lambda o: schedulers.ConstantLR(o, 0.5, 7),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda e: 1 / (1 + e)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda e: 0.9),
    "step": lambda o: schedulers.StepLR(o, 3, 0.7),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 12),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "one-cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 15),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(o, 12)], [4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.95), schedulers.StepLR(o, 5, 0.8)]
    ),
}
FACTORS = [1.0] * 5 + [0.5] * 5 + [0.25] * 4 + [1.0] * 2


def optimizer_of(parameter, lr=0.05):
    return SGD([parameter], lr=lr, momentum=0.9)


def gradient(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_exact_under_every_schedule(name, tensor):
    """The rate of a step is the schedule's own, times the factor; SGD's formula by hand."""
    twin = torch.nn.Parameter(torch.ones(3))
    alone = optimizer_of(twin, torch.tensor(0.05) if tensor else 0.05)
    schedule_alone = SCHEDULES[name](alone)
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optimizer_of(parameter, torch.tensor(0.05) if tensor else 0.05)
    schedule = SCHEDULES[name](optimizer)
    now = iter(FACTORS)
    rate = StepFactor(lambda: next(now))
    rate.attach([optimizer])

    expected, buffer = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step, factor in enumerate(FACTORS):
        lr = float(alone.param_groups[0]["lr"])
        buffer = 0.9 * buffer + gradient(step) if step else gradient(step)
        expected = expected - lr * factor * buffer
        parameter.grad = gradient(step)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
        assert float(optimizer.param_groups[0]["lr"]) == lr  # schedules never see the factor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
            schedule_alone.step()


def test_several_optimizers_and_groups():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    first = SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=1.0)
    second = AdamMini([c], lr=0.1)
    rate = StepFactor(lambda: 0.25)
    rate.attach([first, second])
    for parameter in (a, b, c):
        parameter.grad = torch.ones(2)
    first.step()
    second.step()
    assert torch.equal(a, torch.full((2,), 0.75)) and torch.equal(b, torch.full((2,), 0.875))
    torch.testing.assert_close(c.detach(), torch.full((2,), 1 - 0.025))
    assert [group["lr"] for group in first.param_groups] == [1.0, 0.5]


def test_groups_that_share_a_tensor_are_scaled_once():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=torch.tensor(1.0))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    StepFactor(lambda: 0.5).attach([optimizer])
    for parameter in (a, b):
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert a.item() == b.item() == 0.5 and optimizer.param_groups[0]["lr"] == 1


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_an_lr_that_is_set_within_a_step_stays_and_is_said(tensor, caplog):
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=torch.tensor(1.0) if tensor else 1.0)
    StepFactor(lambda: 0.5).attach([optimizer])

    def closure(group=optimizer.param_groups[0]):
        parameter.grad = torch.ones(1)
        if tensor:
            group["lr"].fill_(0.2)
        else:
            group["lr"] = 0.2

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            optimizer.step(closure)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.2)
    assert parameter.item() == pytest.approx(0.6)
    said = [r for r in caplog.records if "lr was set within a step" in r.getMessage()]
    assert len(said) == 1


def test_a_step_that_raised_does_not_scale_twice():
    for lr in (0.5, torch.tensor(0.5)):
        optimizer = Adam([torch.nn.Parameter(torch.ones(1))], lr=lr)
        rate = StepFactor(lambda: 0.5)
        rate.attach([optimizer])

        def closure(group=optimizer.param_groups[0], lr=lr):
            assert not isinstance(lr, torch.Tensor) or group["lr"] is lr
            raise RuntimeError(f"lr is {float(group['lr'])}")

        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"lr is 0\.25"):
                optimizer.step(closure)
        rate.release()
        assert optimizer.param_groups[0]["lr"] is lr and float(lr) == 0.5  # the same tensor
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_two_on_one_optimizer_are_refused():
    free, taken = (optimizer_of(torch.nn.Parameter(torch.ones(1))) for _ in range(2))
    first = StepFactor(lambda: 0.5)
    first.attach([taken])
    with pytest.raises(ValueError, match=r"optimizers: expected none with a StepFactor, found SGD"):
        StepFactor(lambda: 0.5).attach([free, taken])
    assert not free._optimizer_step_pre_hooks
    first.attach([free])  # lets go of the other one
    StepFactor(lambda: 0.5).attach([taken])


# Edits to optim/step_factor.py that must turn this file red:
#   1. attach: no post hook
#   2. _scale: without self._restore()
#   3. _scale: group["lr"] = lr * factor for tensors too (then _restore copies into another tensor)
#   4. attach: register while checking, so that `free` keeps a hook
#   5. _scale: only param_groups[0]
