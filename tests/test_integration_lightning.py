import importlib.util
import logging
import sys

import pytest
import pytorch_lightning as pl
import torch
from processes import run_ranks
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader, TensorDataset
from workers import lightning_ddp, lightning_regression

from trimtab.integrations import lightning_callback as base
from trimtab.integrations.lightning import AdamMiniCallback, LengthTriggeredLRCallback
from trimtab.optim import AdamMini, BlockMap, LengthDetector, LengthTriggeredLR, infer_blocks

STEPS = 4  # per epoch
# Triggers at the first long response after two short ones.
EARLY = dict(warmup=2, ratio=2.0, smoothing=0.0)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*max_epochs.*",
    "ignore:.*isinstance.treespec.*",
)


def data():
    x = torch.randn(8 * STEPS, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def fit(module, *callbacks, epochs=2, ckpt_path=None, **trainer):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer |= dict.fromkeys(quiet, False)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", devices=1, **trainer
    )
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def adamw_with(make_schedule):
    def configure(module):
        optimizer = AdamW(module.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_schedule(optimizer), "interval": "step"},
        }

    return configure


def linear(optimizer):
    return torch_schedulers.LinearLR(optimizer, 1.0, 0.1, 12)


def sequential(optimizer):
    parts = [
        torch_schedulers.LinearLR(optimizer, 0.1, 1.0, 3),
        torch_schedulers.StepLR(optimizer, 2),
    ]
    return torch_schedulers.SequentialLR(optimizer, parts, [3])


def length_triggered(optimizer):
    return LengthTriggeredLR(optimizer, torch_schedulers.ExponentialLR(optimizer, 0.95), **EARLY)


def assert_same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_swap_equals_an_adam_mini_written_by_hand(recwarn):
    def by_hand(module):
        optimizer = AdamMini(
            module.named_parameters(),
            lr=1e-2,
            betas=(0.8, 0.9),
            weight_decay=0.1,
            blocks=infer_blocks(module),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": linear(optimizer), "interval": "step"},
        }

    swapped = lightning_regression(adamw_with(linear))
    callback = AdamMiniCallback(strict=True)
    trainer = fit(swapped, callback, gradient_clip_val=0.5)
    expected = lightning_regression(by_hand)
    fit(expected, gradient_clip_val=0.5)
    assert_same(swapped, expected)
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]  # of the schedulers
    assert type(trainer.optimizers[0]) is AdamMini
    assert callback.blocks == infer_blocks(swapped)
    weight = swapped.net[0].weight
    assert trainer.optimizers[0].state[weight]["exp_avg_sq"].shape == (weight.shape[0],)


@pytest.mark.parametrize("make_schedule", [linear, sequential, length_triggered])
def test_swap_resumes_bitwise(make_schedule, tmp_path):
    whole = lightning_regression(adamw_with(make_schedule))
    whole_trainer = fit(whole, AdamMiniCallback(), epochs=3)
    fit(
        lightning_regression(adamw_with(make_schedule)), AdamMiniCallback(), epochs=1
    ).save_checkpoint(tmp_path / "c.ckpt")
    resumed = lightning_regression(adamw_with(make_schedule))
    trainer = fit(resumed, AdamMiniCallback(), epochs=3, ckpt_path=tmp_path / "c.ckpt")
    assert trainer.global_step == 3 * STEPS
    assert_same(whole, resumed)
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == whole_trainer.optimizers[0].param_groups[0]["lr"]
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is optimizer


def test_swap_keeps_groups_and_takes_given_hyperparameters():
    def two_groups(module):
        weights = [p for p in module.parameters() if p.ndim == 2]
        biases = [p for p in module.parameters() if p.ndim == 1]
        return SGD(
            [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 1e-3}], lr=1e-2
        )

    trainer = fit(
        lightning_regression(two_groups), AdamMiniCallback(betas=(0.5, 0.6), eps=1e-5), epochs=1
    )
    first, second = trainer.optimizers[0].param_groups
    assert (first["lr"], first["weight_decay"], second["lr"]) == (1e-2, 0.1, 1e-3)
    assert first["betas"] == second["betas"] == (0.5, 0.6) and first["eps"] == 1e-5
    assert second["param_names"] == ["net.0.bias", "net.2.bias"]


def test_options_and_a_map_reach_the_optimizer():
    module = lightning_regression(adamw_with(linear))
    blocks = infer_blocks(module).edited({"net.0.weight": "column"})
    callback = AdamMiniCallback(blocks=blocks, momentum_dtype=torch.bfloat16, max_grad_norm=1.0)
    (optimizer,) = fit(module, callback).optimizers
    assert optimizer.layout(module.net[0].weight).kind == "column"
    assert optimizer.state[module.net[0].weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.grad_norm > 0
    with pytest.raises(TypeError, match=r"options: expected some of .* found \['lr'\]"):
        AdamMiniCallback(lr=1e-3)


@pytest.mark.parametrize("ours_first", [False, True])
def test_finetuning_may_unfreeze_a_backbone(ours_first):
    """Lightning then adds a group whose parameters have no names."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

        def training_step(self, batch, _):
            return self.head(self.backbone(batch[0])).square().mean()

        def configure_optimizers(self):
            trainable = filter(lambda p: p.requires_grad, self.parameters())
            optimizer = AdamW(trainable, lr=1e-2)
            return [optimizer], [linear(optimizer)]

    module = Module()
    start = module.backbone.weight.detach().clone()
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1), AdamMiniCallback()]
    fit(module, *callbacks[:: -1 if ours_first else 1])
    assert not torch.equal(start, module.backbone.weight)
    (optimizer,) = module.trainer.optimizers
    assert isinstance(optimizer, AdamMini)
    assert optimizer.param_groups[-1]["param_names"] == ["backbone.weight", "backbone.bias"]


def test_swap_shares_the_group_dicts():
    made = []

    def configure(module):
        made.append(AdamW(module.parameters()))
        return made[0]

    trainer = fit(lightning_regression(configure), AdamMiniCallback(), epochs=1)
    assert trainer.optimizers[0].param_groups[0] is made[0].param_groups[0]


def stepped(module):
    optimizer = AdamW(module.parameters())
    module.loss(torch.ones(2, 6)).backward()
    optimizer.step()
    return optimizer


def frozen(module):
    """Nothing but biases is trained."""
    for layer in (module.net[0], module.net[2]):
        layer.weight.requires_grad_(False)
    return [p for p in module.parameters() if p.requires_grad]


def test_swap_keeps_the_hooks_of_the_optimizer():
    steps, handles = [], []

    def configure(module):
        optimizer = AdamW(module.parameters())
        handles.append(optimizer.register_step_post_hook(lambda *_: steps.append(1)))
        return optimizer

    module = lightning_regression(configure)
    fit(module, AdamMiniCallback(), epochs=1)
    assert len(steps) == STEPS
    handles[0].remove()
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_swap_leaves_choices_of_the_old_optimizer_behind():
    trainer = fit(
        lightning_regression(lambda m: AdamW(m.parameters(), foreach=True, fused=False)),
        AdamMiniCallback(),
        epochs=1,
    )
    group = trainer.optimizers[0].param_groups[0]
    assert group["foreach"] is None and group["fused"] is None


def test_swap_refuses_what_it_cannot_honour(caplog):
    foreign = torch.nn.Parameter(torch.ones(3))
    for configure, message in (
        (lambda m: AdamW(m.parameters(), amsgrad=True), "group 0 of AdamW uses amsgrad"),
        (lambda m: AdamMini(m.parameters()), "AdamMini already"),
        (lambda m: AdamW([*m.parameters(), foreign]), r"not in the module, shapes \[\(3,\)\]"),
        (lambda m: stepped(m), r"AdamW before its first step, found one with state of 4 param"),
        (lambda m: AdamW(frozen(m)), r"expected a matrix among its trainable parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(lightning_regression(configure), AdamMiniCallback(), epochs=1)
    with caplog.at_level(logging.WARNING):
        fit(lightning_regression(lambda m: AdamW(m.parameters())), AdamMiniCallback(), epochs=1)
        assert "decoupled" not in caplog.text
        fit(lightning_regression(lambda m: Adam(m.parameters())), AdamMiniCallback(), epochs=1)
        assert "AdamMini replaces Adam:" in caplog.text


def test_a_checkpoint_with_other_blocks_is_refused(tmp_path):
    def configure(module):
        return AdamW(module.parameters())

    fit(lightning_regression(configure), AdamMiniCallback(), epochs=1).save_checkpoint(
        tmp_path / "c.ckpt"
    )
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    saved = checkpoint["callbacks"]["trimtab.AdamMini"]["blocks"]
    assert BlockMap.from_dict(saved) == infer_blocks(lightning_regression(configure))
    saved["net.0.weight"]["kind"] = "whole"
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    with pytest.raises(
        ValueError, match=r"'net.0.weight': the checkpoint has .*whole.*, found .*row"
    ):
        fit(lightning_regression(configure), AdamMiniCallback(), ckpt_path=tmp_path / "whole.ckpt")
    # Sharded strategies restore callbacks after on_fit_start.
    callback = AdamMiniCallback()
    callback.blocks = infer_blocks(lightning_regression(configure))
    callback.load_state_dict({"blocks": saved})
    with pytest.raises(ValueError, match=r"the checkpoint has"):
        callback.on_train_start(None, None)


def test_an_adamw_checkpoint_is_refused(tmp_path):
    def configure(module):
        return AdamW(module.parameters())

    fit(lightning_regression(configure), epochs=1).save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 'net.0.weight'"):
        fit(lightning_regression(configure), AdamMiniCallback(), ckpt_path=tmp_path / "c.ckpt")


SCHEDULES = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda e: 1 / (1 + e)),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 40),
    "LinearLR": linear,
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, max_lr=0.1, total_steps=40),
}


def sgd_with(make_schedule):
    def configure(module):
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_schedule(optimizer), "interval": "step"},
        }

    return configure


def factors(steps, triggered_at=5):
    detector = LengthDetector(**EARLY)
    for step, length in ((0, 1.0), (1, 1.0), (triggered_at, 9.0)):
        detector.observe(length, step=step)
    return [detector.factor_at(step) for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_callback_is_exact_with_every_schedule(name):
    """The same run with the factor multiplied in by hand, at the step."""
    module = lightning_regression(sgd_with(SCHEDULES[name]), surge_at=5)
    callback = LengthTriggeredLRCallback(**EARLY)
    trainer = fit(module, callback, epochs=6)
    assert callback.detector.triggered_at == 5 and callback.factor == factors(24)[-1] == 0.25

    expected = lightning_regression(sgd_with(SCHEDULES[name]))
    config = expected.configure_optimizers()
    optimizer, schedule = config["optimizer"], config["lr_scheduler"]["scheduler"]
    batches = [batch for _ in range(6) for batch in data()]
    for factor, (x,) in zip(factors(24), batches, strict=True):
        optimizer.zero_grad()
        expected.loss(x).backward()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
        schedule.step()
    assert_same(module, expected)
    # What the scheduler wrote is on the groups, without the factor.
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert float(trainer.callback_metrics["length_lr_factor"]) == 0.25


@pytest.mark.parametrize("swap", [False, True], ids=["sgd", "adam-mini"])
@pytest.mark.parametrize("cut", [1, 2, 5], ids=["before", "triggered", "decayed"])
def test_the_callback_resumes_bitwise(cut, swap, tmp_path):
    def run(epochs, **kwargs):
        module = lightning_regression(sgd_with(SCHEDULES["OneCycleLR"]), surge_at=5)
        callbacks = [LengthTriggeredLRCallback(**EARLY), *([AdamMiniCallback()] if swap else [])]
        return module, callbacks[0], fit(module, *callbacks, epochs=epochs, **kwargs)

    whole, callback, _ = run(7)
    run(cut)[2].save_checkpoint(tmp_path / "c.ckpt")
    resumed, callback2, _ = run(7, ckpt_path=tmp_path / "c.ckpt")
    assert_same(whole, resumed)
    assert callback2.state_dict() == callback.state_dict()
    assert callback2.factor == callback.factor


def test_the_scheduler_and_the_callback_agree():
    def run(*callbacks, configure):
        module = lightning_regression(configure, surge_at=5)
        fit(module, *callbacks, epochs=6)
        return module

    by_callback = run(LengthTriggeredLRCallback(**EARLY), configure=sgd_with(linear))
    by_scheduler = run(configure=sgd_with(lambda o: LengthTriggeredLR(o, linear(o), **EARLY)))
    assert_same(by_callback, by_scheduler)  # the module observes for a LengthTriggeredLR


def test_alert_mode_and_rearm_leave_the_rate():
    plain = lightning_regression(sgd_with(linear), surge_at=5)
    fit(plain, epochs=4)
    watched = lightning_regression(sgd_with(linear), surge_at=5)
    callback = LengthTriggeredLRCallback(**EARLY, mode="alert")
    fit(watched, callback, epochs=4)
    assert callback.detector.triggered_at == 5
    assert_same(plain, watched)
    callback.rearm()
    assert callback.detector.triggered_at is None


def test_accumulated_gradients_count_optimizer_steps():
    callback = LengthTriggeredLRCallback(**EARLY)
    module = lightning_regression(sgd_with(linear), surge_at=6)
    fit(module, callback, epochs=2, accumulate_grad_batches=2)
    # batches 6 and 7 are of step 3, counted from 0; its length is the mean over them
    assert callback.detector.triggered_at == 3
    assert callback.detector.observations == 4
    assert callback.detector.smoothed == 500.0


def test_a_missing_metric_is_logged_once(caplog):
    callback = LengthTriggeredLRCallback("response_length", **EARLY)
    with caplog.at_level(logging.WARNING, logger="trimtab.integrations.lightning_rate"):
        fit(lightning_regression(sgd_with(linear)), callback, epochs=2)
    records = [r for r in caplog.records if "response_length" in r.getMessage()]
    assert len(records) == 1 and "mean_length" in records[0].getMessage()
    assert callback.detector.observations == 0
    caplog.clear()
    callback = LengthTriggeredLRCallback(truncated_metric="truncted", **EARLY)
    fit(lightning_regression(sgd_with(linear)), callback, epochs=2)
    assert "expected finite metrics 'truncted'" in caplog.text
    assert callback.detector.observations == 8


def test_truncated_responses_reach_the_detector():
    callback = LengthTriggeredLRCallback(truncated_metric="truncated", **EARLY)
    fit(lightning_regression(sgd_with(linear), surge_at=None, truncated_from=3), callback, epochs=2)
    assert callback.detector.triggered_at == 3


def test_joint_triggers_wait_for_the_other_numbers():
    class Module(type(lightning_regression(sgd_with(linear), surge_at=5))):
        def training_step(self, batch, index):
            self.log("kl", 0.5 if self.seen >= 8 else 0.1)
            return super().training_step(batch, index)

    callback = LengthTriggeredLRCallback(joint={"mismatch": 2.0}, mismatch_metric="kl", **EARLY)
    fit(Module(), callback, epochs=3)
    assert callback.detector.triggered_at == 8
    for options in ({"joint": {"mismatch": 2.0}}, {"mismatch_metric": "kl"}):
        with pytest.raises(ValueError, match=r"mismatch_metric: expected"):
            LengthTriggeredLRCallback(**options)


def test_an_exception_takes_the_hooks_off():
    class Module(type(lightning_regression(sgd_with(linear)))):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("out of data")
            return super().training_step(batch, index)

    module = Module()
    with pytest.raises(RuntimeError, match="out of data"):
        fit(module, LengthTriggeredLRCallback(**EARLY))
    (optimizer,) = module.trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("make", [AdamMiniCallback, LengthTriggeredLRCallback])
def test_two_callbacks_of_a_kind_are_refused(make):
    with pytest.raises(RuntimeError, match=r"state_key"):
        pl.Trainer(callbacks=[make(), make()], logger=False, accelerator="cpu")
    trainer = pl.Trainer(
        callbacks=[make()],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        max_epochs=1,
    )
    trainer.callbacks.append(make())  # past the Trainer's own check
    with pytest.raises(ValueError, match=f"expected one {make.__name__}, found 2"):
        trainer.fit(lightning_regression(sgd_with(linear)), data())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"ratio: "):
        LengthTriggeredLRCallback(ratio=0.5)
    with pytest.raises(TypeError, match=r"ration"):
        LengthTriggeredLRCallback(ration=2.0)
    for options, message in (
        ({"preset": "bogus"}, "preset: expected one of"),
        ({"betas": (2, 3)}, "betas: "),
        ({"momentum_dtype": torch.float16}, "momentum_dtype: "),
        ({"seed": "x"}, "seed: "),
    ):
        with pytest.raises(ValueError, match=message):
            AdamMiniCallback(**options)
    with pytest.raises(ValueError, match=r"max_grad_norm: expected one limit"):
        both = AdamMiniCallback(max_grad_norm=1.0)
        fit(lightning_regression(sgd_with(linear)), both, gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"preset: "):
        fit(lightning_regression(sgd_with(linear)), AdamMiniCallback("row"), epochs=1)


@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning.pytorch", None])
def test_it_takes_the_namespace_that_the_program_has(first, monkeypatch):
    """Imported again where only `first` has been imported, or can be."""
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        if first is None:
            monkeypatch.setitem(sys.modules, name, None)  # not installed
        elif first not in (name, f"{name}.pytorch"):
            monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("trimtab.integrations.again", base.__file__)
    again = importlib.util.module_from_spec(spec)
    if first is None:
        with pytest.raises(ImportError, match=r"needs `lightning` or `pytorch-lightning`"):
            spec.loader.exec_module(again)
        return
    spec.loader.exec_module(again)
    assert again.Callback is importlib.import_module(first).Callback
    monkeypatch.setattr(importlib.import_module(first), "__version__", "2.4.1")
    with pytest.raises(ImportError, match=r"expected a version from 2.6 on and below 3, found 2.4"):
        spec.loader.exec_module(again)


def test_two_processes_decide_together(tmp_path):
    """Rank 1's responses are short; by the mean both ranks trigger at one step and stay equal."""
    run_ranks(lightning_ddp, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["detector"] == second["detector"] and first["detector"]["triggered_at"] == 5
    assert first["optimizer"] == second["optimizer"] == "AdamMini"
    for p, q in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(p, q)
    assert first["moment_shapes"] == [(8,), (8,), (2,), (2,)]
    assert "found ZeroRedundancyOptimizer, which is cut over ranks already" in first["refused"]


# Edits to integrations/lightning_*.py that must turn this file red:
#   1. AdamMiniCallback.on_fit_start: do not rebind schedulers (wrong lr after resume)
#   2. _rebind: do not descend into nested schedulers
#   3. LengthTriggeredLRCallback.on_train_start: do not attach
#   4. mean_over_ranks: return the values without the reduction
#   5. LengthTriggeredLRCallback.state_dict: return {}
