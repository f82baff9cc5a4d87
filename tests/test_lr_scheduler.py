import copy
import logging
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedulers

from trimtab.optim import AdamMini, LengthDetector, LengthTriggeredLR


def halve(epoch):
    return 0.5**epoch


def sequential(optimizer):
    warmup = torch_schedulers.LinearLR(optimizer, 0.1, 1.0, 4)
    cosine = torch_schedulers.CosineAnnealingLR(optimizer, 40)
    return torch_schedulers.SequentialLR(optimizer, [warmup, cosine], [4])


BASES = {
    "constant": lambda o: None,
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda e: 1 / (1 + e)),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 25, eta_min=0.01),
    "LinearLR": lambda o: torch_schedulers.LinearLR(o, 1.0, 0.1, 30),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, max_lr=[1.0, 0.3], total_steps=60),
    "StepLR": lambda o: torch_schedulers.StepLR(o, 7, gamma=0.9),
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, 0.97),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: torch_schedulers.ChainedScheduler(
        [torch_schedulers.ExponentialLR(o, 0.99), torch_schedulers.StepLR(o, 5, 0.8)]
    ),
}
EARLY = dict(
    warmup=2, ratio=2.0, smoothing=0.0
)  # triggers at the first long response after two short ones


def make_optimizer(tensor_lr=False):
    lrs = (1.0, 0.3)
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "lr": torch.tensor(lr) if tensor_lr else lr}
        for lr in lrs
    ]
    return SGD(groups, momentum=0.5)


def lrs_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def length_at(step, trigger=4):
    return 500.0 if step >= trigger else 10.0


def trace(optimizer, schedule, first, last):
    """The rates in use at steps first .. last - 1."""
    used = []
    for step in range(first, last):
        used.append(lrs_of(optimizer))
        optimizer.step()
        if isinstance(schedule, LengthTriggeredLR):
            schedule.observe(length_at(step))
        if schedule is not None:
            schedule.step()
    return used


def test_the_papers_numbers():
    """lr0 1e-6, S = 110: P = 198, rates 1e-6, 5e-7, 2.5e-7, ..., floor 1e-7."""
    optimizer = AdamMini([nn.Parameter(torch.ones(1))], lr=1e-6)
    schedule = LengthTriggeredLR(optimizer, smoothing=0.0)
    used = []
    for step in range(1200):
        used.append(lrs_of(optimizer)[0])
        optimizer.step()
        assert schedule.observe(300.0 if step < 110 else 901.0) is (step == 110)
        schedule.step()
    assert schedule.triggered_at == 110
    want = [1e-6] * (110 + 198) + [5e-7] * 198 + [2.5e-7] * 198 + [1.25e-7] * 198 + [1e-7] * 298
    assert used == pytest.approx(want, rel=1e-12)
    assert schedule.factor == 0.1 and schedule.get_last_lr() == [pytest.approx(1e-7)]


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", BASES)
def test_composed_rate_is_the_base_rate_times_the_factor(name, tensor_lr):
    plain = make_optimizer(tensor_lr)
    base = trace(plain, BASES[name](plain), 0, 50)
    optimizer = make_optimizer(tensor_lr)
    schedule = LengthTriggeredLR(optimizer, BASES[name](optimizer), **EARLY, floor=0.2)
    used = trace(optimizer, schedule, 0, 50)
    factors = [max(0.2, 0.5 ** max(0, math.floor((step - 4) / 7.2))) for step in range(50)]
    assert {1.0, 0.5, 0.25, 0.2} == set(factors)
    for step, factor in enumerate(factors):
        want = [lr * factor for lr in base[step]]
        if tensor_lr:
            want = torch.tensor(want).tolist()  # the product, rounded to the tensor's fp32
        assert used[step] == want
    assert [float(lr) for lr in schedule.get_last_lr()] == lrs_of(optimizer)
    assert optimizer.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]


def test_reduce_on_plateau_as_a_base():
    def run(wrap):
        optimizer = make_optimizer()
        schedule = torch_schedulers.ReduceLROnPlateau(optimizer, patience=1, factor=0.7)
        if wrap:
            schedule = LengthTriggeredLR(optimizer, schedule, **EARLY)
        used = []
        for step in range(30):
            used.append(lrs_of(optimizer))
            optimizer.step()
            if wrap:
                schedule.observe(length_at(step))
            schedule.step(1.0)
        return used, schedule

    (base, _), (used, schedule) = run(False), run(True)
    factors = [max(0.1, 0.5 ** max(0, math.floor((step - 4) / 7.2))) for step in range(30)]
    assert used == [[lr * f for lr in lrs] for lrs, f in zip(base, factors, strict=True)]
    with pytest.raises(ValueError, match=r"metrics: .*found None"):
        schedule.step()
    with pytest.raises(ValueError, match=r"metrics: expected None"):
        LengthTriggeredLR(make_optimizer()).step(1.0)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("cut", [1, 3, 5, 20], ids=["early", "baseline", "triggered", "decayed"])
def test_resume_is_exact(name, cut, tmp_path):
    whole = make_optimizer()
    schedule = LengthTriggeredLR(whole, BASES[name](whole), **EARLY)
    want = trace(whole, schedule, 0, 40)

    first = make_optimizer()
    schedule1 = LengthTriggeredLR(first, BASES[name](first), **EARLY)
    trace(first, schedule1, 0, cut)
    state = {"optimizer": first.state_dict(), "schedule": schedule1.state_dict()}
    torch.save(state, tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=False)
    second = make_optimizer()
    schedule2 = LengthTriggeredLR(second, BASES[name](second), **EARLY)
    second.load_state_dict(state["optimizer"])
    schedule2.load_state_dict(state["schedule"])
    assert (
        schedule2.factor == schedule1.factor and schedule2.get_last_lr() == schedule1.get_last_lr()
    )
    assert trace(second, schedule2, cut, 40) == want[cut:]
    assert schedule2.state_dict().keys() == schedule.state_dict().keys()


def test_deepcopy_continues():
    optimizer = make_optimizer()
    schedule = LengthTriggeredLR(optimizer, torch_schedulers.LambdaLR(optimizer, halve), **EARLY)
    trace(optimizer, schedule, 0, 6)
    optimizer2, schedule2 = copy.deepcopy((optimizer, schedule))
    assert schedule2.base.optimizer is optimizer2
    assert trace(optimizer, schedule, 6, 20) == trace(optimizer2, schedule2, 6, 20)


def test_rearm_undoes_the_factor_and_takes_a_new_baseline():
    optimizer = make_optimizer()
    schedule = LengthTriggeredLR(optimizer, **EARLY)
    trace(optimizer, schedule, 0, 13)
    assert schedule.triggered_at == 4 and lrs_of(optimizer) == [0.5, 0.15]
    schedule.rearm()
    assert schedule.triggered_at is None and schedule.factor == 1.0
    assert lrs_of(optimizer) == schedule.get_last_lr() == [1.0, 0.3]
    trace(optimizer, schedule, 13, 40)  # 500 tokens are the normal now
    assert schedule.detector.baseline == 500.0 and lrs_of(optimizer) == [1.0, 0.3]
    schedule.observe(1001.0)
    assert schedule.triggered_at == 40


def test_alert_mode_only_logs(caplog):
    optimizer = make_optimizer()
    schedule = LengthTriggeredLR(optimizer, **EARLY, mode="alert")
    with caplog.at_level(logging.WARNING):
        trace(optimizer, schedule, 0, 60)
    assert schedule.triggered_at == 4 and lrs_of(optimizer) == [1.0, 0.3]
    assert len(caplog.records) == 1 and "step 4" in caplog.text


def test_origin_warmup_counts_from_the_end_of_the_baseline():
    schedules = []
    for origin in ("trigger", "warmup"):
        optimizer = make_optimizer()
        schedule = LengthTriggeredLR(optimizer, warmup=10, ratio=2.0, smoothing=0.0, origin=origin)
        used = [
            lrs[0]
            for step in range(100)
            for lrs in [lrs_of(optimizer)]
            if not _advance(schedule, step)
        ]
        schedules.append(used.index(0.5))
    assert schedules == [20 + 36, 9 + 36]


def _advance(schedule, step):
    schedule.optimizer.step()
    schedule.observe(length_at(step, trigger=20))
    schedule.step()


def test_a_period_in_floats_does_not_delay_a_decay():
    """In floats 1.1 * 50 is above 55, so step S + 55 would not have completed a period."""
    assert 55 // (1.1 * 50) == 0
    detector = LengthDetector(**EARLY, period_factor=1.1)
    for step, length in ((0, 1.0), (1, 1.0), (50, 9.0)):
        detector.observe(length, step=step)
    assert [detector.factor_at(step) for step in (104, 105, 159, 160)] == [1.0, 0.5, 0.5, 0.25]


def test_smoothing_is_an_exponential_average_from_the_first_observation():
    detector = LengthDetector(warmup=3, ratio=1.5, smoothing=0.5)
    seen = [
        detector.observe(x, step=i) or detector.smoothed for i, x in enumerate([8, 16, 12, 20, 20])
    ]
    assert seen == [8.0, 12.0, 12.0, 16.0, 18.0]
    assert detector.baseline == 12.0
    assert not detector.observe(18.0, step=5)  # 18.0 = 1.5 * 12: not above
    assert detector.observe(18.5, step=6)
    assert not detector.observe(1e6, step=7)  # the first surge counts
    assert detector.triggered_at == 6


def test_no_trigger_while_the_baseline_is_collected():
    detector = LengthDetector(warmup=4, ratio=1.1, smoothing=0.0)
    assert not any(detector.observe(10.0**i, step=i) for i in range(4))
    assert detector.baseline == 1111 / 4


@pytest.mark.parametrize("start", [400.0, 1000.0], ids=["grows", "from the start"])
def test_a_length_stuck_at_the_maximum_is_a_surge(start):
    """From 400 tokens, 3 times the baseline is beyond the limit of 1000 and would never be seen."""
    for limit, want in ((None, None), (1000, 5)):
        detector = LengthDetector(warmup=5, smoothing=0.0, max_length=limit)
        for step in range(20):
            detector.observe(start if step < 5 else 960.0, step=step)
        assert detector.triggered_at == want


def test_truncated_responses_are_a_surge_without_a_known_limit():
    detector = LengthDetector(warmup=2, smoothing=0.5, saturation=0.8)
    for step, truncated in enumerate([0.0, 0.0, None, 1.0, 1.0, 1.0, 1.0]):
        detector.observe(10.0, truncated, step=step)
    assert detector.triggered_at == 5  # smoothed shares 0.5, 0.75, 0.875


def test_growth_sees_a_fast_rise_and_not_a_slow_one():
    """Both double; against the first steps both are surges, against a slow average only one is."""
    fast = [100.0] * 30 + [200.0] * 30
    slow = [100.0] * 30 + [100.0 + i for i in range(200)]
    found = {}
    for detector in ("baseline", "growth"):
        for name, lengths in (("fast", fast), ("slow", slow)):
            each = LengthDetector(
                warmup=10, ratio=1.5, smoothing=0.5, detector=detector, slow_smoothing=0.95
            )
            for step, length in enumerate(lengths):
                each.observe(length, step=step)
            found[detector, name] = each.triggered_at
    assert found["baseline", "fast"] == 31 and found["baseline", "slow"] is not None
    assert found["growth", "fast"] == 31 and found["growth", "slow"] is None


def joint_trace(mismatches, norms, **joint):
    detector = LengthDetector(warmup=2, ratio=2.0, smoothing=0.0, joint=joint)
    for step, (mismatch, norm) in enumerate(zip(mismatches, norms, strict=True)):
        detector.observe(10.0 if step < 3 else 50.0, step=step, mismatch=mismatch, grad_norm=norm)
    return detector.triggered_at


def test_joint_triggers_wait_for_every_number_to_rise():
    mismatches, norms = [1.0, 1.0, 1.0, 1.0, 2.1, 2.1], [1.0, 1.0, 9.0, 1.0, 1.0, 4.1]
    assert joint_trace(mismatches, norms) == 3
    assert joint_trace(mismatches, norms, mismatch=2.0) == 4
    assert joint_trace(mismatches, norms, mismatch=2.0, grad_norm=4.0) == 5
    assert joint_trace(mismatches, norms, mismatch=3.0) is None
    with pytest.raises(ValueError, match=r"^mismatch: expected a number of at least 0, found -0.1"):
        joint_trace([-0.1] * 6, norms, mismatch=1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_joint_number_that_is_not_finite_has_risen_and_leaves_the_averages_alone(value):
    norms = [1.0, 1.0, value, 1.0, value, 1.0]
    assert joint_trace([None] * 6, norms, grad_norm=4.0) == 4
    detector = LengthDetector(warmup=2, smoothing=0.5, joint={"grad_norm": 2.0})
    for step, norm in enumerate(norms):
        detector.observe(10.0, step=step, grad_norm=norm)
    assert detector.state_dict()["signals"]["grad_norm"]["smoothed"] == 1.0


def test_joint_numbers_are_required_and_resumed():
    detector = LengthDetector(**EARLY, joint={"mismatch": 1.5})
    before = detector.state_dict()
    with pytest.raises(ValueError, match=r"^mismatch: expected a number, because it is in joint"):
        detector.observe(1.0, step=0)
    assert detector.state_dict() == before
    optimizer = make_optimizer()
    schedule = LengthTriggeredLR(optimizer, **EARLY, joint={"mismatch": 1.5})
    for mismatch in (0.1, 0.1):
        schedule.observe(10.0, mismatch=mismatch)
        optimizer.step()
        schedule.step()
    resumed = LengthTriggeredLR(make_optimizer(), **EARLY, joint={"mismatch": 1.5})
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for each in (schedule, resumed):
        assert not each.observe(30.0, mismatch=0.14)
        assert each.observe(30.0, mismatch=0.16)
    added = LengthTriggeredLR(make_optimizer(), **EARLY, joint={"grad_norm": 1.5})
    added.load_state_dict(schedule.state_dict())  # a signal that the old run did not watch
    assert added.triggered_at == schedule.triggered_at


@settings(max_examples=50, deadline=None)
@given(
    s=st.integers(0, 500),
    period_factor=st.floats(0.1, 5),
    decay=st.floats(0.05, 0.95),
    floor=st.floats(0, 1),
    steps=st.lists(st.integers(0, 5000), min_size=2, max_size=10),
)
def test_factor_falls_from_one_to_the_floor(s, period_factor, decay, floor, steps):
    detector = LengthDetector(**EARLY, period_factor=period_factor, decay=decay, floor=floor)
    for step, length in ((0, 1.0), (0, 1.0), (s, 9.0)):
        detector.observe(length, step=step)
    factors = [detector.factor_at(step) for step in sorted(steps)]
    assert factors == sorted(factors, reverse=True)
    assert all(floor <= f <= 1 for f in factors)
    assert detector.factor_at(s) == 1.0
    assert detector.factor_at(10**9) == floor or floor == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup", 0), ("ratio", 1.0), ("ratio", math.inf), ("smoothing", 1.0), ("smoothing", -0.1),
        ("period_factor", 0.0), ("decay", 1.0), ("decay", 0.0), ("floor", 1.1), ("origin", "start"),
        ("mode", "log"), ("max_length", 0), ("saturation", 0.0), ("saturation", math.nan),
        ("detector", "slope"), ("slow_smoothing", 0.5), ("slow_smoothing", 1.0),
        ("joint", {"mismatch": 1.0}), ("joint", {"length": 2.0}), ("joint", ["mismatch"]),
        ("warmup", 1.5),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*found {re.escape(repr(value))}"):
        LengthDetector(**{name: value})
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match=f"^{name}: "):
        LengthTriggeredLR(optimizer, **{name: value})
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((math.nan,), "mean_length"),
        ((-1.0,), "mean_length"),
        ((math.inf,), "mean_length"),
        ((1.0, 1.5), "truncated_fraction"),
    ],
)
def test_bad_observations_are_refused_and_not_recorded(arguments, name):
    schedule = LengthTriggeredLR(make_optimizer(), **EARLY)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=f"^{name}: "):
        schedule.observe(*arguments)
    assert schedule.state_dict() == before


def test_arguments_are_not_part_of_the_state():
    """So that a run with a false alarm resumes with mode="alert"."""
    detector = LengthDetector(**EARLY)
    for step, length in enumerate((1.0, 1.0, 9.0)):
        detector.observe(length, step=step)
    calm = LengthDetector(**EARLY, mode="alert")
    calm.load_state_dict(detector.state_dict())
    assert calm.triggered_at == 2 and detector.factor_at(50) == 0.1 and calm.factor_at(50) == 1.0
    with pytest.raises(ValueError, match=r"state: expected keys"):
        calm.load_state_dict({"factor": 1.0})
    part = detector.state_dict()
    part["signals"]["length"].pop("slow")
    for signals in (part["signals"], {}):
        with pytest.raises(ValueError, match=r"state: expected signals"):
            calm.load_state_dict(part | {"signals": signals})


def test_mismatched_bases_are_named():
    optimizer, other = make_optimizer(), make_optimizer()
    with pytest.raises(ValueError, match=r"base: "):
        LengthTriggeredLR(optimizer, torch_schedulers.StepLR(other, 1))
    plain = LengthTriggeredLR(optimizer)
    stepped = LengthTriggeredLR(other, torch_schedulers.StepLR(other, 1))
    with pytest.raises(ValueError, match=r"expected base none, found one"):
        plain.load_state_dict(stepped.state_dict())
    with pytest.raises(ValueError, match=r"expected base StepLR, found none"):
        stepped.load_state_dict(plain.state_dict())


def test_it_is_a_torch_scheduler_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make_optimizer()
        schedule = LengthTriggeredLR(optimizer, torch_schedulers.StepLR(optimizer, 2), **EARLY)
        assert isinstance(schedule, torch_schedulers.LRScheduler)
        trace(optimizer, schedule, 0, 5)
    assert schedule.last_epoch == 5 and schedule.base_lrs == [1.0, 0.3]


def test_a_group_added_later_is_scaled_with_the_others():
    optimizer = make_optimizer()
    schedule = LengthTriggeredLR(optimizer, **EARLY)
    trace(optimizer, schedule, 0, 12)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.8})
    trace(optimizer, schedule, 12, 13)
    assert lrs_of(optimizer) == [0.5, 0.15, 0.4]


# Edits to length_detector.py and lr_scheduler.py that must turn this file red:
#   1. LengthTriggeredLR.step: do not restore the unscaled rates before base.step()
#   2. factor_at: period = self.period_factor * max(self.triggered_at, 1) (floats delay a decay)
#   3. observe: let `self.observations <= self.warmup` be `<`
#   4. _surges: drop `or stuck`
#   5. LengthTriggeredLR.state_dict / load_state_dict: leave out "unscaled"
