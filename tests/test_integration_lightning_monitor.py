"""StabilityMonitorCallback, and all callbacks together: in both namespaces, under DDP and FSDP2."""

import argparse
import copy
import logging
import math
import shutil

import pytest
import torch
from lightning_cases import (
    BATCHES,
    ROWS,
    callbacks_in,
    fit,
    on_two_processes,
    regression,
    rows,
    weights,
)
from processes import run_ranks
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.plugins import MixedPrecision

from trimtab.integrations.lightning import StabilityMonitorCallback
from trimtab.optim import AdamMini, LengthDetector, infer_blocks
from trimtab.stability import ClipEntropyMonitor, GradientNormMonitor, MismatchMonitor

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def by_hand(epochs=3, kept_every=3, poison=(), surge_at=None):
    """The run as a loop: back to the last copy after a poisoned batch, which came from a step."""
    module = regression()
    optimizer = AdamMini(
        module.named_parameters(), lr=0.02, weight_decay=0.1, blocks=infer_blocks(module)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
    detector = LengthDetector(warmup=2, ratio=2.0, smoothing=0.0, period_factor=0.2)
    parts = (module, optimizer, schedule)
    kept, candidate, healthy = None, None, 0
    batches = [x for _ in range(epochs) for x in rows().split(ROWS)]
    for step, x in enumerate(batches):
        loss = (module.net(x) - x[:, :3]).square().mean()
        optimizer.zero_grad()
        (loss * math.nan if step in poison else loss).backward()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = lr * detector.factor_at(step)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
        schedule.step()
        surged = surge_at is not None and step >= surge_at
        detector.observe(500.0 if surged else 10.0, step=step)
        if step in poison:
            for part, state in zip(parts, copy.deepcopy(kept), strict=True):
                part.load_state_dict(state)
            candidate, healthy = None, 0
        else:
            healthy += 1
            if candidate is not None:  # the next gradient is healthy: so was the update
                kept, candidate = candidate, None
            if kept is None or healthy % kept_every == 0:
                candidate = copy.deepcopy([part.state_dict() for part in parts])
    return module


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_rollback_is_a_copy_put_back(namespace, tmp_path, caplog):
    module = regression(namespace, poison=(8, 9, 14), surge_at=11)
    callbacks = callbacks_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        fit(module, *callbacks, namespace=namespace)
    assert "step 9: back to" in caplog.text and "grad_norm is nan" in caplog.text
    assert torch.equal(weights(module), weights(by_hand(poison=(8, 9, 14), surge_at=11)))
    assert not torch.equal(weights(module), weights(by_hand(surge_at=11)))
    assert callbacks[2].rollbacks == 1  # no new good checkpoint since the last one
    # the good one alone, and the one after it
    assert sorted(p.name for p in tmp_path.glob("*/*")) == ["step=13.ckpt", "step=18.ckpt"]
    assert module.trainer.global_step == 3 * BATCHES
    (optimizer,) = module.trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks


def test_healthy_runs_are_what_they_were(tmp_path):
    module = regression()
    fit(module, *callbacks_in(tmp_path))
    assert torch.equal(weights(module), weights(by_hand()))


def test_what_it_measures_and_logs(tmp_path):
    monitor = StabilityMonitorCallback([GradientNormMonitor(window=2, spike=(1.0, 1e9))])
    module = regression()
    seen = []

    class Log:
        """A logger that keeps what it is given."""

        def __new__(cls):
            from pytorch_lightning.loggers import CSVLogger

            logger = CSVLogger(tmp_path)
            logger.log_metrics = lambda metrics, step=None: seen.append(metrics)
            return logger

    trainer = fit(module, monitor, logger=Log(), log_every_n_steps=1, gradient_clip_val=0.01)
    norms = [found["grad_norm"] for found in seen if "grad_norm" in found]
    assert norms == pytest.approx(module.norms)  # before clipping
    assert max(norms) > 0.02
    assert {found["stability/state"] for found in seen if "stability/state" in found} == {0, 1}
    last = seen[-1]["grad_norm/relative"]
    assert last == pytest.approx(norms[-1] / ((norms[-2] + norms[-3]) / 2))
    assert "stability/state" in trainer.progress_bar_metrics
    assert monitor.verdict.reading.metrics["grad_norm"] == pytest.approx(norms[-1])


def test_numbers_of_the_module_are_judged_once_a_step():
    """By their own names or by those given; batches that only accumulate are not steps."""

    class Logging(type(regression())):
        def training_step(self, batch, index):
            self.log("my_entropy", 2.0 if self.batches < 4 else 0.1)
            return super().training_step(batch, index)

    entropy = ClipEntropyMonitor(warmup=1, smoothing=0.0)
    monitor = StabilityMonitorCallback(
        [entropy], on_alarm="stop", patience=2, names={"entropy/mean": "my_entropy"}
    )
    trainer = fit(Logging(), monitor, accumulate_grad_batches=2)
    assert trainer.global_step == 4  # collapses at the third step, is too long so at the fourth
    assert "entropy is collapsing" in monitor.verdict.reading.reason
    assert entropy.state_dict()["entropy/mean"]["seen"] == 4
    assert trainer.should_stop and trainer.current_epoch < 3


def test_a_rollback_survives_what_modules_and_callbacks_keep(tmp_path):
    """Hyper-parameters that only pickle can hold; an average of weights goes back, too."""

    class Module(type(regression())):
        def __init__(self, options):
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch, index):
            return super().training_step(batch, index) * (math.nan if self.batches == 9 else 1.0)

    def run(*callbacks):
        torch.manual_seed(0)
        module = Module(argparse.Namespace(path=tmp_path))
        fit(module, *callbacks_in(tmp_path), *callbacks)
        return weights(module)

    average = EMAWeightAveraging(decay=0.5)
    assert torch.equal(run(), by_hand_weights := weights(by_hand(poison=(8,))))
    ended_with = run(average)  # Lightning ends with the average
    assert ended_with.isfinite().all() and not torch.equal(ended_with, by_hand_weights)


def test_weights_that_an_update_ruined_are_not_gone_back_to(tmp_path):
    """The gradient that a ruinous update came from was healthy; the next one tells."""

    class Module(type(regression())):
        def on_train_batch_start(self, batch, index):
            group = self.trainer.optimizers[0].param_groups[0]
            self.before = group["lr"] if self.batches != 7 else self.before
            group["lr"] = 1e30 if self.batches == 7 else self.before

    module = Module()
    monitor = StabilityMonitorCallback(
        [GradientNormMonitor()], on_alarm="roll_back", healthy_every=1, dirpath=tmp_path
    )
    trainer = fit(module, monitor)
    assert weights(module).isfinite().all() and monitor.rollbacks == 0
    assert trainer.global_step == 3 * BATCHES and weights(module).abs().max() < 10


def test_steps_that_a_scaler_skips_are_not_judged(tmp_path):
    """GradScaler starts at a scale that overflows; going back would bring that scale back."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.precision = "bf16-mixed"  # autocast to fp16 is a GPU's
    monitor = StabilityMonitorCallback(
        [GradientNormMonitor(window=2, spike=(1e9, 1e9))], on_alarm="roll_back", dirpath=tmp_path
    )
    seen = []

    class Module(type(regression())):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * 8

        def on_train_batch_end(self, *_):
            seen.append(scaler.get_scale())

    trainer = fit(Module(), monitor, plugins=[precision])
    assert seen[0] < 2.0**127 and seen[-1] == min(seen)  # some were skipped, early
    assert trainer.global_step == 3 * BATCHES and monitor.rollbacks == 0
    assert monitor.verdict.reading.state == "healthy"


def test_a_second_fit_starts_anew(tmp_path):
    callbacks = callbacks_in(tmp_path)
    fit(regression(poison=(8,), surge_at=5), *callbacks, epochs=2)
    assert callbacks[1].detector.triggered_at == 5
    module = regression()
    fit(module, *callbacks)
    assert callbacks[1].factor == 1 and callbacks[2].rollbacks == 0
    assert torch.equal(weights(module), weights(by_hand()))


def test_a_missing_file_stops(tmp_path, caplog):
    class Module(type(regression(poison=(8,)))):
        def on_train_batch_start(self, batch, index):
            if self.batches == 8:
                shutil.rmtree(tmp_path)

    with caplog.at_level(logging.WARNING):
        trainer = fit(Module(), callbacks_in(tmp_path)[2])
    assert trainer.global_step == 9 and "stopping after 0 rollbacks" in caplog.text


def test_two_optimizers_and_several_steps_in_a_batch():
    class Manual(type(regression())):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                for _ in range(3):
                    optimizer.zero_grad()
                    self.manual_backward((self.net(batch[0]) ** 2).mean())
                    optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[2])
            ]

        def on_before_optimizer_step(self, optimizer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    module = Manual()
    monitor = StabilityMonitorCallback([GradientNormMonitor()])
    fit(module, monitor, epochs=1)
    largest = [max(module.norms[-6:-3]), max(module.norms[-3:])]
    assert monitor.verdict.reading.metrics["grad_norm"] == pytest.approx(math.hypot(*largest))


def test_it_stops_after_too_many_rollbacks(tmp_path, caplog):
    module = regression(poison=range(4, 99))
    monitor = callbacks_in(tmp_path, max_rollbacks=2, patience=2)[2]
    with caplog.at_level(logging.WARNING):
        trainer = fit(module, monitor)
    assert trainer.global_step == 4 + 3 * 2 and monitor.rollbacks == 2
    assert "stopping after 2 rollbacks: grad_norm is nan" in caplog.text


def test_an_alarm_before_anything_was_healthy_stops(tmp_path, caplog):
    monitor = callbacks_in(tmp_path)[2]
    with caplog.at_level(logging.WARNING):
        trainer = fit(regression(poison=(0,)), monitor)
    assert trainer.global_step == 1 and "stopping after 0 rollbacks" in caplog.text


def test_state_resumes(tmp_path):
    """A run cut in two reads the same as a whole one: the median goes on."""

    def run(epochs, **options):
        monitor = StabilityMonitorCallback([GradientNormMonitor(window=8)])
        return monitor, fit(regression(), monitor, epochs=epochs, **options)

    whole, _ = run(3)
    run(1)[1].save_checkpoint(tmp_path / "c.ckpt")
    resumed, _ = run(3, ckpt_path=tmp_path / "c.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    again = StabilityMonitorCallback([GradientNormMonitor(window=8)])
    again.load_state_dict(whole.state_dict() | {"rollbacks": 2})
    assert again.rollbacks == 2
    assert resumed.verdict == whole.verdict


def test_a_monitor_without_numbers_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        fit(regression(), StabilityMonitorCallback([MismatchMonitor()]))
    said = [r.getMessage() for r in caplog.records if "MismatchMonitor found none" in r.message]
    assert len(said) == 1 and "mean_length" in said[0]


def test_bad_arguments_are_named(tmp_path):
    monitors = [GradientNormMonitor()]
    for options, message in (
        ({"on_alarm": "retry"}, r"on_alarm: expected one of .*roll_back"),
        ({"patience": 0}, r"patience: expected a whole number of at least 1"),
        ({"healthy_every": 2.5}, r"healthy_every: expected a whole number of at least 1"),
        ({"max_rollbacks": 0}, r"max_rollbacks: expected a whole number of at least 1"),
        ({"names": {"loss": "x"}}, r"names: expected some of \['grad_norm'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            StabilityMonitorCallback(monitors, **options)
    with pytest.raises(ValueError, match=r"monitors: "):
        StabilityMonitorCallback([])
    with pytest.raises(RuntimeError, match=r"state_key"):
        fit(regression(), *(StabilityMonitorCallback([m()]) for m in 2 * (GradientNormMonitor,)))


def test_two_processes_are_one(tmp_path):
    """DDP and FSDP2 with all three callbacks: rank 1's NaN sends both back, to the same step.

    Sharded, a layer that had no gradient cannot be restored by torch: both stop at the NaN instead.
    """
    run_ranks(on_two_processes, (str(tmp_path),), 2)
    expected = weights(by_hand(poison=(8, 9), surge_at=11))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in ("ddp", "fsdp2", "fsdp2-sharded"):
        one, other = first[name], second[name]
        assert torch.equal(one["weights"], other["weights"]), name
        torch.testing.assert_close(one["weights"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(one["weights"], one.get("resumed", one["weights"])), name
        assert one["factor"] == other["factor"] < 1 and one["rollbacks"] == 0
        assert one["logged_norm"] == other["logged_norm"] == pytest.approx(one["norms"][-1]), name
        assert one.get("idle", 9) == other.get("idle", 9) == 9, name
        assert one["optimizer"] == "AdamMini" and one["v"] == [(7,), (7,), (3,), (3,)]


# Edits to integrations/lightning_monitor.py that must turn this file red:
#   1. _roll_back: do not load the schedulers
#   2. _roll_back: do not load the monitors' state
#   3. on_train_batch_end: judge every batch, whether it stepped or not
#   4. _numbers: without mean_over_ranks
#   5. _confirm: do not remove the one before
