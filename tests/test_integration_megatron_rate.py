"""length_triggered on Megatron's own scheduler: its rate times the factor, group by group.

The parts of the reference are Megatron's scheduler on a twin optimizer and `LengthTriggeredLR`.
"""

import importlib
import json
import logging

import megatron.core
import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trimtab.integrations import megatron as integration
from trimtab.integrations._versions import require
from trimtab.integrations.megatron import LengthTriggeredParamScheduler, length_triggered
from trimtab.optim import LengthTriggeredLR

DETECTOR = {"warmup": 4, "ratio": 2.0, "smoothing": 0.5, "period_factor": 0.5, "decay": 0.5}
LENGTHS = [100, 110, 90, 100, 105, 400, 900, *[1000] * 30]
STYLES = [
    ("constant", None),
    ("linear", None),
    ("cosine", None),
    ("inverse-square-root", None),
    *(("WSD", shape) for shape in ("linear", "cosine", "exponential", "minus_sqrt")),
]


def optimizer():
    """Groups as Megatron makes them: the default, decoupled rates, weight decay of its own."""
    groups = [
        {"params": [torch.zeros(2)], "wd_mult": 1.0},
        {"params": [torch.zeros(2)], "wd_mult": 0.0, "max_lr": 5e-4, "min_lr": 1e-5},
        {"params": [torch.zeros(2)], "wd_mult": 1.0, "start_wd": 0.05, "end_wd": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=1.0)


def make(style="cosine", shape=None, cls=OptimizerParamScheduler, **options):
    settings = {
        "init_lr": 1e-5,
        "max_lr": 3e-3,
        "min_lr": 1e-4,
        "lr_warmup_steps": 5 * 8,
        "lr_decay_steps": 30 * 8,
        "start_wd": 0.01,
        "end_wd": 0.1,
        "wd_incr_steps": 30 * 8,
        "wd_incr_style": "linear",
        "wsd_decay_steps": 10 * 8 if style == "WSD" else None,
        "lr_wsd_decay_style": shape,
    }
    return cls(optimizer(), lr_decay_style=style, **(settings | options))


def rates(scheduler):
    return [(group["lr"], group["weight_decay"]) for group in scheduler.optimizer.param_groups]


def torch_factors():
    """What LengthTriggeredLR makes of the lengths, after each step."""
    twin = LengthTriggeredLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), **DETECTOR)
    found = []
    for length in LENGTHS:
        twin.observe(length)
        twin.step()
        found.append(twin.factor)
    return found


@pytest.mark.parametrize(("style", "shape"), STYLES)
def test_every_style_is_megatrons_times_the_factor(style, shape):
    plain, ours = make(style, shape), length_triggered(make(style, shape), **DETECTOR)
    factors = torch_factors()
    assert set(factors) >= {1.0, 0.5, 0.25, 0.125, 0.1}
    for length, factor in zip(LENGTHS, factors, strict=True):
        ours.observe(length)
        for scheduler in (plain, ours):
            scheduler.step(8)  # samples: the detector's steps are calls
        assert ours.factor == factor
        assert rates(ours) == [(lr * factor, decay) for lr, decay in rates(plain)]
    assert ours.triggered_at == 5 and ours.updates == len(LENGTHS) and ours.num_steps == 8 * 37


def test_rearm_and_a_step_of_nothing():
    plain, ours = make(), length_triggered(make(), **DETECTOR)
    for length in LENGTHS:
        ours.observe(length)
        plain.step(1), ours.step(1)
    before = rates(ours)
    ours.step(0)
    assert rates(ours) == before != rates(plain) and ours.updates == len(LENGTHS)
    ours.rearm()
    assert rates(ours) == rates(plain) and ours.factor == 1 and ours.triggered_at is None


def test_resume_restores_the_factor_before_megatron_steps():
    whole, first = (length_triggered(make(), **DETECTOR) for _ in range(2))
    for number, length in enumerate(LENGTHS):
        for scheduler in (whole, first) if number < 12 else (whole,):
            scheduler.observe(length)
            scheduler.step(8)
    state = json.loads(json.dumps(first.state_dict()))
    assert first.factor < 1
    second = length_triggered(make(), **DETECTOR)
    second.load_state_dict(state)
    assert rates(second) == rates(first)  # at once: load_state_dict steps
    for length in LENGTHS[12:]:
        second.observe(length)
        second.step(8)
    assert rates(second) == rates(whole) and second.state_dict() == whole.state_dict()
    plain = make()  # Megatron's own reads it, without the factor
    plain.load_state_dict(state)
    assert rates(plain) == [(lr / first.factor, decay) for lr, decay in rates(first)]


def test_a_checkpoint_without_the_state_says_so(caplog):
    plain, ours = make(), length_triggered(make(), **DETECTOR)
    plain.step(80)
    with caplog.at_level(logging.WARNING, "trimtab.integrations.megatron_rate"):
        ours.load_state_dict(plain.state_dict())
    (record,) = caplog.records
    assert "without the state of length_triggered" in record.message
    assert rates(ours) == rates(plain) and ours.updates == 0 and ours.factor == 1
    kept = rates(ours)
    state = ours.state_dict()
    for wrong in ({"updates": 1}, {"updates": 1, "detector": {}}):
        with pytest.raises(ValueError, match="expected"):
            ours.load_state_dict(state | {"length_triggered": wrong})
    assert rates(ours) == kept and ours.num_steps == 80


def test_what_megatron_refuses_leaves_the_detector():
    strict = {"use_checkpoint_opt_param_scheduler": False}
    surged, fresh = (length_triggered(make(**strict), **DETECTOR) for _ in range(2))
    before = fresh.state_dict()
    for length in LENGTHS[:12]:
        surged.observe(length)
        surged.step(8)
    with pytest.raises(AssertionError, match="learning rate"):
        fresh.load_state_dict(surged.state_dict() | {"max_lr": 1.0})
    assert surged.factor < 1 and fresh.factor == 1
    assert fresh.state_dict()["length_triggered"] == before["length_triggered"]


def test_a_derived_scheduler_keeps_its_rate():
    class Halved(OptimizerParamScheduler):
        def get_lr(self, param_group):
            return super().get_lr(param_group) / 2

    plain, live = make(), make(cls=Halved)
    ours = length_triggered(live, warmup=1, max_length=10, period_factor=1.0)
    assert ours is live and isinstance(live, Halved | LengthTriggeredParamScheduler)
    for length in (10, 10, 10):
        ours.observe(length, 0.5)
        plain.step(1), ours.step(1)
    assert ours.factor == 0.25
    assert rates(ours) == [(lr / 8, decay) for lr, decay in rates(plain)]


def test_alert_leaves_the_rate():
    plain, ours = make(), length_triggered(make(), **DETECTOR, mode="alert")
    for length in LENGTHS:
        ours.observe(length)
        plain.step(8), ours.step(8)
    assert rates(ours) == rates(plain) and ours.triggered_at == 5


def test_bad_input_changes_nothing():
    live = make()
    with pytest.raises(ValueError, match="ratio: expected"):
        length_triggered(live, ratio=1.0)
    assert type(live) is OptimizerParamScheduler and not hasattr(live, "detector")
    length_triggered(live, **DETECTOR)
    with pytest.raises(ValueError, match=r"not length-triggered yet.*once"):
        length_triggered(live, **DETECTOR)
    assert live.detector.warmup == 4
    with pytest.raises(ValueError, match="mean_length: expected"):
        live.observe(float("nan"))
    torchs = torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda _: 1.0)
    with pytest.raises(ValueError, match=r"OptimizerParamScheduler .*LengthTriggeredLR.*LambdaLR"):
        length_triggered(torchs)


@pytest.mark.parametrize("found", ["0.16", "0.16.1rc2", "0.19.2+cu12", "0.16.0"])
def test_versions_of_the_range_pass(found):
    require("megatron-core", found, "0.16", "0.20")


def test_the_integration_itself_asks(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.20.0rc1")
    with pytest.raises(ImportError, match=r"megatron-core: .* below 0.20, found 0.20.0rc1"):
        importlib.reload(integration)


@pytest.mark.parametrize("found", ["0.15.9", "0.20.0", "1.0", "0.9"])
def test_other_versions_get_one_line_with_the_range(found):
    with pytest.raises(ImportError) as caught:
        require("megatron-core", found, "0.16", "0.20")
    (line,) = str(caught.value).splitlines()
    assert found in line and "megatron-core>=0.16,<0.20" in line


# Edits to integrations/megatron_rate.py that must turn this file red:
#   super().get_lr(param_group) * self.factor   ->  super().get_lr(param_group)
#   if increment and not self._loading          ->  if increment
#   if increment and not self._loading          ->  if not self._loading
#   self.updates += 1                           ->  self.updates += increment
#   self.detector.load_state_dict(...)          ->  after super().load_state_dict
#   self.detector.load_state_dict(detector)     ->  removed
#   (ours, own), {}                             ->  (ours,), {}
