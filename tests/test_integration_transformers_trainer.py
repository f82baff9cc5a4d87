import gc
import importlib
import json
import math
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from processes import run_ranks
from tiny_models import KINDS, VOCAB, causal_lm
from torch.nn.functional import pad
from trainer_cases import (
    SAVED,
    STEPS,
    LengthTrainer,
    Recorder,
    arguments,
    callbacks,
    history,
    language_model,
    make,
    rows,
    train_over_ranks,
    weights,
)
from transformers import Trainer, TrainerCallback, TrainerState, get_scheduler
from transformers.trainer_utils import HPSearchBackend, IntervalStrategy, SchedulerType

from trimtab.integrations.transformers import (
    LengthTriggeredLRCallback,
    StabilityMonitorCallback,
    adam_mini,
    gem_compute_loss,
    use_adam_mini,
)
from trimtab.optim import AdamMini, infer_blocks
from trimtab.stability import ClipEntropyMonitor, GradientNormMonitor
from trimtab.triton_kernels.gem import gem_loss_reference


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """The Trainer collects garbage at each start: most of a small run, once much is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process without a break: its folder, weights, logs and callbacks."""
    folder = tmp_path_factory.mktemp("alone")
    added = callbacks()
    trainer = make(folder, added, save_strategy="steps", save_steps=SAVED)
    trainer.train()
    return folder, weights(trainer), history(trainer), added


# The optimizer


def test_optimizer_is_adam_mini_with_the_settings_of_the_arguments(tmp_path, alone):
    settings = dict(adam_beta2=0.95, adam_epsilon=1e-6)
    trainer = make(tmp_path, **settings)
    use = make(tmp_path, optimizer=None, **settings)
    use_adam_mini(use)  # a trainer that is there already
    by_hand = make(tmp_path, optimizer=None, **settings)
    by_hand.optimizer = AdamMini.for_model(by_hand.model, 1e-2, (0.9, 0.95), 1e-6, 0.1)
    for each in (trainer, use, by_hand):
        each.train()
        inner = each.optimizer.optimizer
        assert type(inner) is AdamMini and inner.blocks == infer_blocks(each.model)
    assert largest_difference(weights(trainer), weights(by_hand)) == 0
    assert largest_difference(weights(use), weights(by_hand)) == 0
    assert largest_difference(weights(trainer), alone[1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_decays_is_what_the_trainer_decays(tmp_path, kind):
    model = causal_lm(kind)
    make_optimizer, options = adam_mini(arguments(tmp_path))
    optimizer = make_optimizer()(model, **options)
    found = {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group["weight_decay"]
    }
    named = {name for name, _ in model.named_parameters()}
    assert found == named & set(Trainer.get_decay_parameter_names(None, model))


def test_hyperparameter_search_sets_what_the_next_optimizer_has(tmp_path):
    trainer = make(tmp_path, max_steps=1, lr_scheduler_type="constant")
    trainer.model_init, trainer.hp_search_backend = language_model, HPSearchBackend.WANDB
    for rate, decay, beta in ((0.5, 0.25, 0.8), (0.125, 0.5, 0.7)):
        trial = {"learning_rate": rate, "weight_decay": decay, "adam_beta1": beta}
        trainer._hp_search_setup(trial)
        trainer.train()
        decayed, _ = trainer.optimizer.param_groups
        assert (decayed["lr"], decayed["weight_decay"], decayed["betas"][0]) == (rate, decay, beta)


def test_lora_trains_its_own_matrices_in_bf16(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal_lm("llama_gqa"), peft.LoraConfig(task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(tmp_path, model=model, bf16=True, max_steps=2)
    trainer.train()
    held = {n for g in trainer.optimizer.param_groups for n in g["param_names"]}
    assert held == {name for name in before if "lora_" in name}
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == held
    assert all(math.isfinite(entry["loss"]) for entry in history(trainer))


def test_gradient_scaler_skips_a_step_and_the_rate_still_counts():
    """Accelerate refuses fp16 on the CPU; this is what its Trainer makes of an optimizer."""
    args = arguments("unused")  # making them takes accelerate's state away
    Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    plain = AdamMini.for_model(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(plain, scaler=scaler)
    rate = LengthTriggeredLRCallback(None, warmup=1, ratio=1.5, smoothing=0.0)
    state = TrainerState()
    rate.on_train_begin(args, state, None, optimizer=optimizer)
    rate.detector.observe(1.0, step=0)
    rate.detector.observe(9.0, step=1)
    rate._step = 3  # two periods of one step each
    lrs = []
    plain.register_step_pre_hook(lambda o, *_: lrs.append(o.param_groups[0]["lr"]))
    for bad in (False, True):
        before = model.weight.detach().clone()
        loss = model(torch.ones(1, 3)).sum() * (math.inf if bad else 1)
        scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == bad
        assert torch.equal(before, model.weight) == bad
        optimizer.zero_grad()
    assert lrs == [pytest.approx(0.1 * rate.factor)] and rate.factor < 1
    assert plain.param_groups[0]["lr"] == 0.1


# Resuming


@pytest.mark.parametrize("flag", [False, True])
def test_resuming_is_exact_with_and_without_the_flag(tmp_path, caplog, alone, flag):
    folder, straight, logged, before = alone
    added = callbacks()
    trainer = make(tmp_path, added, restore_callback_states_from_checkpoint=flag)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}")
    assert largest_difference(weights(trainer), straight) == 0
    assert history(trainer) == logged
    assert [c.state_dict() for c in added] == [c.state_dict() for c in before]
    assert all(c in trainer.callback_handler.callbacks for c in added)  # the same objects
    factors = [entry["length_lr_factor"] for entry in logged]
    assert factors == [1, 1, 1, 0.5, 0.5]  # so the run was cut after the trigger, at step 1
    assert ("leaves this to the callback" in caplog.text) == flag
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # let go after training


def test_callback_added_at_a_resume_starts_anew_and_is_saved(tmp_path, caplog):
    first = make(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    added = callbacks()
    second = make(tmp_path, added, max_steps=3, save_strategy="steps", save_steps=1)
    second.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert caplog.text.count("it starts anew") == 2
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["trimtab.LengthTriggeredLR"] == added[0].state_dict()
    assert added[0].detector.observations == 1


def test_other_blocks_at_a_resume_are_refused(tmp_path, alone):
    trainer = make(tmp_path, optimizer=None)
    use_adam_mini(trainer, "paper")
    with pytest.raises(ValueError, match=r"state_dict: parameter .* has blocks"):
        trainer.train(resume_from_checkpoint=f"{alone[0]}/checkpoint-{SAVED}")


def test_another_train_forgets_the_run_before(tmp_path):
    added = callbacks()
    trainer = make(tmp_path, added, max_steps=3)
    trainer.train()
    assert added[0].detector.triggered_at == 1
    trainer.args.max_steps = 1
    trainer.train()
    assert added[0].detector.triggered_at is None and added[0].detector.observations == 1
    assert len(added[1].state_dict()["monitors"]["GradientNormMonitor"]["norms"]) == 1


# The rate


class RecordingSGD(torch.optim.SGD):
    """Keeps the rate that each step was made with."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


class Bigram(torch.nn.Module):
    """The smallest language model."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids, labels=None):  # the Trainer leaves out what it does not take
        return {"logits": self.table(input_ids)}


OPTIONS = {  # of schedules that need some
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize(
    "schedule", sorted(s.value for s in SchedulerType if "plateau" not in s and s != "greedy")
)
def test_rate_is_the_schedules_times_the_factor(tmp_path, schedule):
    trainer = make(
        tmp_path,
        callbacks()[:1],
        model=Bigram(),
        optimizer=(RecordingSGD, {"lr": 1e-2}),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=OPTIONS.get(schedule),
        gradient_accumulation_steps=1,
    )
    trainer.train()
    sgd = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1e-2)
    options = OPTIONS.get(schedule)
    plain, rates = get_scheduler(schedule, sgd, 1, STEPS, scheduler_specific_kwargs=options), []
    for _ in range(STEPS):
        rates += plain.get_last_lr()
        sgd.step()
        plain.step()
    factors = [1, 1, 1, 0.5, 0.5]
    expected = [lr * factor for lr, factor in zip(rates, factors, strict=True)]
    assert trainer.optimizer.optimizer.rates == pytest.approx(expected, rel=1e-12)
    logged = [entry["learning_rate"] for entry in history(trainer)]
    assert logged == pytest.approx(rates, rel=1e-12) and max(rates) > 0  # without the factor


def test_lengths_can_be_observed_in_each_step(tmp_path, caplog):
    rate = LengthTriggeredLRCallback(
        None, warmup=2, ratio=1.5, smoothing=0.0, joint={"mismatch": 2.0}, mode="decay"
    )
    lengths = iter([10, 30, 10, 30, 35, 45, 40, 40])

    class Observing(Trainer):
        def training_step(self, *args, **kwargs):
            rate.observe(next(lengths), 0.5, mismatch=1.0 if self.state.global_step < 2 else 9.0)
            return super().training_step(*args, **kwargs)

    make(tmp_path, [rate], kind=Observing, max_steps=4, logging_steps=2).train()
    detector = rate.detector
    assert detector.observations == 4 and detector.baseline == 20 and detector.smoothed == 40
    assert detector.triggered_at == 2 and detector.smoothed_truncated == 0.5
    with pytest.raises(ValueError, match="metric: expected None with `observe`"):
        LengthTriggeredLRCallback().observe(3.0)
    rate.rearm()
    assert rate.factor == 1 and not caplog.text.count("unwatched")


def test_lengths_that_are_not_there_are_said_once(tmp_path, caplog):
    rate = LengthTriggeredLRCallback("my_length")
    make(tmp_path, [rate], max_steps=2).train()
    assert caplog.text.count("expected finite my_length in the logs, found: loss") == 1
    assert rate.detector.observations == 0
    rate = LengthTriggeredLRCallback(truncated_metric="cliped_ratio")
    make(tmp_path, [rate], max_steps=2).train()
    assert caplog.text.count("expected finite cliped_ratio in the logs, found: loss") == 1
    assert caplog.text.count("truncation goes unwatched") == 1 and rate.detector.observations == 2


def test_lengths_of_every_other_log_are_enough(tmp_path, caplog):
    """As TRL logs them with num_iterations=2: where it has generated."""

    class EveryOther(LengthTrainer):
        def log(self, logs, start_time=None):
            even = self.state.global_step % 2 == 0
            (Trainer if even else LengthTrainer).log(self, logs, start_time)

    rate = LengthTriggeredLRCallback()
    make(tmp_path, [rate], kind=EveryOther, max_steps=4).train()
    assert rate.detector.observations == 2 and "unwatched" not in caplog.text


def test_what_is_observed_outside_of_a_step_does_not_count(tmp_path):
    rate = LengthTriggeredLRCallback(None, warmup=4)
    trainer = make(tmp_path, [rate], max_steps=4, eval_steps=1, eval_on_start=True)
    trainer.args.eval_strategy, trainer.eval_dataset = IntervalStrategy.STEPS, rows()[:4]
    loss_of, evaluated = trainer.compute_loss_func, []

    def compute_loss(*args, **kwargs):  # the Trainer calls it in evaluations, too
        evaluated.append(not trainer.model.training)
        rate.observe(1000.0 if evaluated[-1] else 10.0)
        return loss_of(*args, **kwargs)

    trainer.compute_loss_func = compute_loss
    rate.observe(1000.0)
    trainer.train()
    assert any(evaluated) and not all(evaluated)
    assert rate.detector.observations == 4 and rate.detector.baseline == 10


class At(TrainerCallback):
    """Does something at the end of the first step."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.act()


def test_optimizer_of_a_run_that_was_interrupted_can_be_released(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    model = Bigram()
    sgd = RecordingSGD(model.parameters(), lr=1e-2)
    schedule = get_scheduler("constant", sgd)

    def run(*added):
        trainer = make(tmp_path, added, model=model, optimizer=None, max_steps=2)
        trainer.optimizer, trainer.lr_scheduler = sgd, schedule
        trainer.train()

    first, second = callbacks()[0], callbacks()[0]
    with pytest.raises(KeyboardInterrupt):
        run(first, At(interrupt))
    with pytest.raises(ValueError, match="release that one first"):
        run(second)
    first.release()
    run(second)
    assert second.detector.observations == 2 and not sgd._optimizer_step_pre_hooks


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "changes", [dict(max_steps=1), dict(logging_steps=50)], ids=["log", "step"]
)
def test_callback_added_during_training_is_refused(tmp_path, which, changes):
    late = callbacks()[which]
    early = At(lambda: trainer.add_callback(late))
    trainer = make(tmp_path, [early], model=Bigram(), optimizer=None, **changes)
    with pytest.raises(ValueError, match="begins, found it added during training"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "changes, silent",
    [
        (dict(logging_strategy="no"), True),
        (dict(logging_steps=5), True),
        (dict(logging_strategy="no", logging_first_step=True), False),
        (dict(logging_steps=4), False),
        (dict(logging_strategy="epoch"), False),
    ],
)
def test_callbacks_that_will_not_see_a_log_say_so_once(tmp_path, caplog, changes, silent):
    added = [*callbacks(), Recorder()]
    quick = dict(model=Bigram(), optimizer=None, max_steps=4)
    trainer = make(tmp_path, added, **quick, **changes)
    trainer.train()
    trainer.train()
    assert caplog.text.count("of which there will be none") == (2 if silent else 0)
    assert any("loss" in log for log in added[-1].logs) != silent


def test_callbacks_behind_those_that_report_say_so_once(tmp_path, caplog):
    for ahead in (True, False):
        added = callbacks()
        trainer = make(tmp_path, () if ahead else added, model=Bigram(), optimizer=None)
        trainer.args.report_to, trainer.args.max_steps = ["wandb"], 1
        for callback in added if ahead else ():
            callback.add_to(trainer)
        trainer.train()
        trainer.train()
        assert caplog.text.count("wandb, which report_to asks for, come") == (0 if ahead else 2)


# The monitors


class SpikingTrainer(LengthTrainer):
    """Logs an entropy from a loss function, as many do, and a spike of the gradient norm."""

    def compute_loss(self, *args, **kwargs):
        self.log({"policy_entropy": 1.0})
        return super().compute_loss(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "grad_norm" in logs:
            logs["grad_norm"] = 100.0 if self.state.global_step > 3 else 1.0
        super().log(logs, start_time)


@pytest.mark.parametrize(
    "on_alarm, patience, last", [("stop", 1, 4), ("stop", 2, 5), ("log", 1, 7)]
)
def test_alarm_stops_when_it_is_to(tmp_path, caplog, on_alarm, patience, last):
    monitor = StabilityMonitorCallback(
        [GradientNormMonitor(window=4), ClipEntropyMonitor()],
        on_alarm=on_alarm,
        patience=patience,
        names={"entropy/mean": "policy_entropy"},
    )
    reporter = Recorder()
    trainer = make(tmp_path, [reporter], kind=SpikingTrainer, max_steps=7)
    monitor.add_to(trainer)
    with pytest.raises(ValueError, match="expected one StabilityMonitorCallback, found a second"):
        monitor.add_to(trainer)
    trainer.train()
    logged = history(trainer)
    assert [entry["step"] for entry in logged] == list(range(1, last + 1))
    states = [entry["stability/state"] for entry in logged]
    assert states[:4] == [0, 0, 0, 2]
    assert logged[3]["grad_norm/relative"] == 100 and logged[3]["entropy/change"] == 0
    seen = [entry for entry in reporter.logs if "loss" in entry]
    assert [entry["stability/state"] for entry in seen] == states  # reporters have it, too
    assert monitor.verdict.reading.metrics["grad_norm"] == 100
    assert "grad_norm/relative 100" in caplog.text and ("stopping" in caplog.text) == (last < 7)


class OverflowingTrainer(LengthTrainer):
    """Gradients of the second and fourth step overflow."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.inf if self.state.global_step in (1, 3) else loss


class ScalingTrainer(OverflowingTrainer):
    """With fp16's scaler, as far as accelerate lets it onto a CPU: nothing else is fp16."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_step_that_the_scaler_skips_is_no_alarm(tmp_path, caplog, logging_steps):
    monitor = StabilityMonitorCallback([GradientNormMonitor(window=4)], on_alarm="stop")
    changes = dict(kind=ScalingTrainer, max_steps=6, logging_steps=logging_steps)
    trainer = make(tmp_path, [monitor], **changes)
    trainer.train()
    logged = history(trainer)
    assert [entry["step"] for entry in logged] == list(range(logging_steps, 7, logging_steps))
    skipped = {entry["step"] for entry in logged if not math.isfinite(entry["grad_norm"])}
    assert skipped == {2, 4} and all(entry["stability/state"] == 0 for entry in logged)
    assert len(monitor.state_dict()["monitors"]["GradientNormMonitor"]["norms"]) == len(logged) - 2
    assert caplog.text.count("step 2: its gradients overflowed") == 1
    assert "step 4" not in caplog.text and "none of its numbers" not in caplog.text


def test_overflow_without_a_scaler_stops(tmp_path):
    monitor = StabilityMonitorCallback([GradientNormMonitor(window=4)], on_alarm="stop")
    trainer = make(tmp_path, [monitor], kind=OverflowingTrainer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_monitor_without_its_numbers_says_so_once(tmp_path, caplog):
    monitor = StabilityMonitorCallback([ClipEntropyMonitor()])
    make(tmp_path, [monitor], max_steps=2).train()
    assert caplog.text.count("ClipEntropyMonitor found none of its numbers in the logs") == 1


@pytest.mark.parametrize("which", [0, 1])
def test_second_callback_is_refused(tmp_path, which):
    trainer = make(tmp_path, [callbacks()[which], callbacks()[which]])
    with pytest.raises(ValueError, match=r"callbacks: expected one .*, found a second"):
        trainer.train()


# GEM


def definition(model, batch, beta, h):
    """The loss of all rows at once, from the definition, and its gradients."""
    model.zero_grad()
    ids = torch.stack([row["input_ids"] for row in batch])
    labels = torch.stack([row["labels"] for row in batch])
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    losses = gem_loss_reference(logits, labels, beta=beta, h=h)
    loss = losses.sum() / (labels != -100).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("beta, h", [(0.7, "linear"), (1.3, "logsigmoid")])
def test_gem_of_micro_batches_is_that_of_the_batch(tmp_path, beta, h):
    expected, gradients = definition(language_model(), rows(), beta, h)
    for accumulation in (1, 4):
        recorder = Recorder(gradients=True)
        trainer = make(
            tmp_path,
            [recorder],
            max_steps=1,
            max_grad_norm=0,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=len(rows()) // accumulation,
        )
        trainer.compute_loss_func = gem_compute_loss(beta, h=h)
        trainer.train()
        assert largest_difference(recorder.gradients[0], gradients) < 1e-14
        assert history(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-6)  # summed in fp32


def test_gem_without_a_count_and_what_it_refuses():
    loss_of = gem_compute_loss()
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, 2], [-100, -100, 3, 4]])
    following = pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    each = gem_loss_reference(logits.flatten(0, 1), following)
    expected = each.sum() / 4
    assert loss_of({"logits": logits}, labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss_of((logits,), labels, 8).item() == pytest.approx(expected.item() / 2, rel=1e-12)
    assert loss_of((logits,), torch.full_like(labels, -100), torch.tensor(0)) == 0
    with pytest.raises(ValueError, match=r"labels: expected one for each position .* found None"):
        loss_of((logits,), None)
    with pytest.raises(ValueError, match=r"found \(2, 3\)"):
        loss_of((logits,), labels[:, 1:])
    with pytest.raises(ValueError, match="num_items_in_batch: expected one number"):
        loss_of((logits,), labels, torch.ones(2, 1))
    with pytest.raises(ValueError, match="beta"):
        gem_compute_loss(-1.0)


# Several processes


def test_two_ranks_are_one_under_ddp_and_fsdp2(tmp_path, alone):
    modes = ["ddp", "FULL_STATE_DICT", "SHARDED_STATE_DICT"]
    run_ranks(train_over_ranks, (2, str(tmp_path), modes), 2)
    _, expected, logged, _ = alone
    for mode, (straight, resumed) in torch.load(tmp_path / "results.pt").items():
        assert largest_difference(straight[0], expected) < 1e-9, mode
        assert largest_difference(resumed[0], straight[0]) == 0, mode
        assert resumed[2] == straight[2], mode
        for run in (straight, resumed):
            for entry, other in zip(run[1], logged, strict=True):
                for key in ("loss", "grad_norm", "length_lr_factor", "stability/state"):
                    assert entry[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), (mode, key)


# Bad input


def with_deepspeed(args):
    args.deepspeed_plugin = object()  # as under accelerate launch --use_deepspeed
    return args


@pytest.mark.parametrize(
    "make_it, error, message",
    [
        (lambda a: adam_mini(a, fused=True), TypeError, "options: expected some of"),
        (lambda a: adam_mini("out"), TypeError, "args: expected TrainingArguments, found str"),
        (lambda a: adam_mini(a, max_grad_norm=1.0), ValueError, "max_grad_norm: expected one"),
        (lambda a: use_adam_mini(language_model()), TypeError, "trainer: expected a Trainer"),
        (lambda a: adam_mini(a, "bogus"), ValueError, "preset: expected one of"),
        (lambda a: adam_mini(a, betas=(2, 3)), ValueError, "betas"),
        (lambda a: adam_mini(a, momentum_dtype="x"), ValueError, "momentum_dtype: expected"),
        (lambda a: adam_mini(a, blocks={}), TypeError, "blocks: expected a BlockMap or None"),
        (lambda a: adam_mini(with_deepspeed(a)), ValueError, "found DeepSpeed; use fsdp=True"),
        (
            lambda a: StabilityMonitorCallback([GradientNormMonitor()], on_alarm="roll_back"),
            ValueError,
            "on_alarm: expected one of .*resume from the last healthy checkpoint",
        ),
        (lambda a: StabilityMonitorCallback([]), ValueError, "monitors: expected"),
        (lambda a: LengthTriggeredLRCallback(ratio=0.5), ValueError, "ratio: expected"),
        (lambda a: LengthTriggeredLRCallback(3), TypeError, "metric: expected a key .* found 3"),
        (
            lambda a: LengthTriggeredLRCallback(joint={"mismatch": 2.0}),
            ValueError,
            "mismatch_metric: expected the key",
        ),
        (
            lambda a: LengthTriggeredLRCallback(None, truncated_metric="x"),
            ValueError,
            "truncated_metric: expected None",
        ),
    ],
)
def test_bad_arguments(tmp_path, make_it, error, message):
    with pytest.raises(error, match=message):
        make_it(arguments(tmp_path))


def test_what_the_trainer_cannot_take_is_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="trainer: expected no optimizer_cls_and_kwargs"):
        use_adam_mini(trainer)
    trainer.train()
    with pytest.raises(ValueError, match="trainer: expected one without an optimizer"):
        use_adam_mini(trainer)
    model = language_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match="model: expected a matrix"):
        make(tmp_path, model=model).train()
    plugin = type("Plugin", (), {"fsdp_version": 1})
    for kind, found in ((DistributedType.FSDP, "FSDP1"), (DistributedType.DEEPSPEED, "DeepSpeed")):
        trainer, rate = make(tmp_path), callbacks()[0]
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        with pytest.raises(ValueError, match=f"expected one process, DDP or FSDP2 .* {found}"):
            trainer.create_optimizer()
    with pytest.raises(ValueError, match="train with DDP or FSDP2 instead of DeepSpeed"):
        rate.on_train_begin(trainer.args, trainer.state, None, optimizer=None)


def test_one_line_without_accelerate_or_with_another_transformers(tmp_path, monkeypatch):
    front = importlib.import_module("trimtab.integrations.transformers")
    with monkeypatch.context() as patch:
        patch.setattr(front, "is_accelerate_available", lambda: False)
        with pytest.raises(
            ImportError, match=r"adam_mini needs accelerate.*; pip install accelerate"
        ):
            from trimtab.integrations.transformers import adam_mini  # noqa: F401
        from trimtab.integrations.transformers import pruned_generation  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'adam_maxi'"):
        front.adam_maxi  # noqa: B018
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.1.0")
    with pytest.raises(ImportError, match=r"transformers: expected .* from 5.2 on .* 5.1.0"):
        use_adam_mini(make(tmp_path, optimizer=None))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers: expected a version from 5.0 on") as error:
        importlib.reload(front)
    assert "\n" not in str(error.value) and "4.57.1" in str(error.value)


# Edits that must turn this file red:
#   transformers_loss.py: [..., 1:]  ->  [..., :-1]                    (labels are not shifted)
#   transformers_loss.py: if count is None  ->  if True                (a mean of means)
#   transformers_callback.py: elif not isinstance(saved, _Saved)  ->  elif False   (state is lost)
#   transformers_callback.py: mean_over_ranks returns list(values) always          (ranks differ)
#   transformers_callback.py: callbacks.insert(0, self)  ->  callbacks.append(self)
#   transformers_rate.py: step=self._step  ->  step=self._step + 1
#   transformers_rate.py: self._rate.attach(...)  ->  removed
#   transformers_optimizer.py: _expect_shards  ->  does nothing        (whole parameters stay)
#   transformers_optimizer.py: args.weight_decay  ->  0.0
#   transformers_rate.py: self.release() in on_train_end  ->  pass
#   transformers_rate.py: self._observed.clear()  # of an evaluation  ->  removed
#   transformers_callback.py: overflow_was_skipped  ->  False always
