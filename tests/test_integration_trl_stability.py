"""StabilityGRPOTrainer: real steps of a tiny Llama against definitions written out in float64."""

import json
import logging
import math
import re

import pytest
import torch
import trl
from processes import run_ranks
from tiny_models import keep_norm_dtype
from trl_stability_workers import (
    GROUP,
    RHO,
    ROWS,
    everything_on_a_rank,
    policy,
    run_everything,
    samples,
    train,
    trainer_of,
)

from trimtab.integrations._versions import require
from trimtab.integrations.transformers import StabilityMonitorCallback
from trimtab.integrations.trl import (
    SharedPrefixGRPOTrainer,
    StabilityGRPOTrainer,
    StabilityMixin,
    StabilityOptions,
)
from trimtab.stability import (
    ClipEntropyMonitor,
    GradientNormMonitor,
    MismatchMonitor,
    SignLengthMonitor,
    StabilityWatch,
)

BATCH = samples()
GROUPS = [range(i, i + GROUP) for i in range(0, ROWS, GROUP)]
OWN = [[t for t, own in enumerate(row) if own] for row in BATCH.tools]  # generated columns
SCORED = [i for i, reward in enumerate(BATCH.rewards) if reward is not None]
NONE = dict(scale_rewards="none")


def logits_of(model):
    """[T, V] of each row: plain forward passes, a row at a time."""
    return [
        model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
        for p, c in zip(BATCH.prompts, BATCH.completions)
    ]


def double_policy(seed=0):
    return keep_norm_dtype(policy(seed).double())


def picked(rows):
    """[T] log-probability of each row's tokens from [T, V] logits."""
    return [
        x.log_softmax(-1)[torch.arange(len(c)), torch.tensor(c)]
        for x, c in zip(rows, BATCH.completions)
    ]


def gradient_of(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(found, expected):
    assert expected.norm() > 0
    return float((found.double() - expected).norm() / expected.norm())


def centred():
    """Reward less the mean of the group's scored rows; 0 where there is no reward."""
    out = [0.0] * ROWS
    for group in GROUPS:
        scored = [i for i in group if i in SCORED]
        mean = sum(BATCH.rewards[i] for i in scored) / len(scored)
        for i in scored:
            out[i] = BATCH.rewards[i] - mean
    return out


def token_advantages(logits, ratios=None, *, leave_one_out, by_token):
    """Optimal token baseline, one position at a time."""
    logp = picked(logits)
    out = [[0.0] * len(c) for c in BATCH.completions]
    for group in GROUPS:
        rows = [i for i in group if i in SCORED]
        place = {i: {(n if by_token else t): t for n, t in enumerate(OWN[i])} for i in rows}
        energy, last = {}, {i: max(place[i]) for i in rows}
        for i in rows:
            total = 0.0
            for where, t in sorted(place[i].items()):
                p = logits[i][t].softmax(-1)
                ratio = 1.0 if ratios is None else float(ratios[i][t])
                total += ratio**2 * float(1 - 2 * logp[i][t].exp() + p.square().sum())
                energy[i, where] = total
        for i in rows:
            for where, t in place[i].items():
                alive = [j for j in rows if last[j] >= where]
                using = [j for j in rows if (j, where) in energy and (not leave_one_out or j != i)]
                baseline = 0.0
                if len(alive) > 1 and using:
                    weight = sum(energy[j, where] for j in using)
                    reward = sum(energy[j, where] * BATCH.rewards[j] for j in using)
                    baseline = reward / (weight + 1e-8)
                out[i][t] = BATCH.rewards[i] - baseline
    return out


def balanced(rows, outcome):
    """Weight of each row's tokens under balanced aggregation of these rows."""
    groups = [[i for i in group if i in rows and i in SCORED] for group in GROUPS]
    groups = [group for group in groups if group]
    weights = [0.0] * ROWS
    for group in groups:
        for i in group:
            side = [j for j in group if sign(outcome[j]) == sign(outcome[i])]
            tokens = sum(len(OWN[j]) for j in side)
            weights[i] = len(side) / (len(group) * len(groups) * tokens)
    return weights


def sign(x):
    return (x > 0) - (x < 0)


def trusted(logp, tokens=OWN, max_threshold=0.05, mean_threshold=1e-3):
    """Rows whose largest (ln rho)^2 / 2 and mean k3 are within the thresholds."""
    keep = []
    for i in range(ROWS):
        ratio = torch.stack([logp[i][t].detach() - BATCH.logp[i][t] for t in tokens[i]])
        k3 = (ratio.exp() - 1 - ratio).mean()
        keep.append(bool((ratio.square() / 2).max() <= max_threshold and k3 <= mean_threshold))
    assert any(keep) and not all(keep)
    return keep


def loss_of(logp, advantages, weights, keep=(True,) * ROWS, penalty=None, tokens=OWN):
    """sum of w (-A ratio + penalty), with ratios that are 1: the policy is the one that sampled."""
    ratio = [(x - x.detach()).exp() for x in logp]
    return sum(
        weights[i] * (-advantages[i][t] * ratio[i][t] + (0 if penalty is None else penalty[i][t]))
        for i in range(ROWS)
        if keep[i]
        for t in tokens[i]
    )


def spread(outcome):
    return [[a] * len(c) for a, c in zip(outcome, BATCH.completions)]


def even(lengths):
    """TRL's "grpo": the mean of the means of rows."""
    return [1 / (ROWS * len(tokens)) for tokens in lengths]


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "importance"])
def test_token_baseline(corrected, tmp_path):
    """With TRL's correction of the engine its truncated ratios enter the energies, squared."""
    args = NONE | dict(loss_type="grpo", vllm_importance_sampling_mode="token_truncate")
    args |= dict(vllm_importance_sampling_clip_max=0.9)
    options = {"leave_one_out": False, "alignment": "column"}
    trainer, steps = trainer_of(tmp_path, batch=BATCH, args=args, token_baseline=options)
    # without vLLM itself: its weights count as synchronised, its samples come from rollout_func
    trainer.use_vllm, trainer._last_loaded_step = corrected, 0
    train(trainer)
    model = double_policy()
    logits = logits_of(model)
    logp = picked(logits)
    ratios = [(x.detach() - torch.tensor(y)).exp().clamp(max=0.9) for x, y in zip(logp, BATCH.logp)]
    ratios = ratios if corrected else [torch.ones_like(x) for x in ratios]
    with torch.no_grad():
        advantages = token_advantages(logits, ratios, leave_one_out=False, by_token=False)
    advantages = [[a * float(r) for a, r in zip(*pair)] for pair in zip(advantages, ratios)]
    loss = loss_of(logp, advantages, even(OWN))
    assert relative(steps.gradients[0], gradient_of(loss, model)) < 1e-5


def test_trust_region_keeps_the_denominator(tmp_path):
    trainer, steps = trainer_of(
        tmp_path, batch=BATCH, args=NONE | dict(loss_type="grpo"), trust_region={}
    )
    (log,) = train(trainer)
    model = double_policy()
    logp = picked(logits_of(model))
    keep = trusted(logp)
    loss = loss_of(logp, spread(centred()), even(OWN), keep)
    assert relative(steps.gradients[0], gradient_of(loss, model)) < 1e-5
    assert log["trust_region/kept_sequences"] == pytest.approx(sum(keep) / ROWS)


@pytest.mark.parametrize("policy_of_outside", ["include", "mask_token", "reject_sequence"])
def test_pruning_in_the_loss(policy_of_outside, tmp_path):
    """Of the policy and of the reference: another model, with safe sets of its own."""
    rho = math.exp(-6)
    policy(seed=1).save_pretrained(tmp_path / "reference")
    model = policy()
    model.config._name_or_path = str(tmp_path / "reference")
    trainer, steps = trainer_of(
        tmp_path,
        batch=BATCH,
        model=model,
        args=NONE | dict(loss_type="dapo", temperature=0.8, beta=0.3),
        pruning={"rho": rho, "out_of_set": policy_of_outside},
    )
    (log,) = train(trainer)

    model = double_policy()
    logits, inside = pruned(logits_of(model), rho, temperature=0.8)
    logp = picked(logits)
    with torch.no_grad():
        reference, _ = pruned(logits_of(double_policy(seed=1)), rho, temperature=0.8)
        reference = picked(reference)
    outside = [any(not inside[i][t] for t in OWN[i]) for i in range(ROWS)]
    assert any(outside) and not all(outside)
    trains = {
        "include": OWN,
        "mask_token": [[t for t in OWN[i] if inside[i][t]] for i in range(ROWS)],
        "reject_sequence": [[] if outside[i] else OWN[i] for i in range(ROWS)],
    }[policy_of_outside]
    weights = [1 / sum(map(len, OWN))] * ROWS
    penalty = [0.3 * k3_of(ref, own) for ref, own in zip(reference, logp)]
    loss = loss_of(logp, spread(centred()), weights, penalty=penalty, tokens=trains)
    assert relative(steps.gradients[0], gradient_of(loss, model)) < 1e-5
    assert log["pruning/kept_mass_mean"] < 1 and log["pruning/out_of_set_fraction"] > 0


def pruned(rows, rho, temperature=1.0):
    """Logits with -inf outside the safe set and the token, and for each token: is it in the set?"""
    out, inside = [], []
    for x, completion in zip(rows, BATCH.completions):
        x, tokens = x / temperature, torch.tensor(completion)[:, None]
        safe = x >= x.amax(-1, keepdim=True) + math.log(rho)
        inside.append(safe.gather(-1, tokens)[:, 0].tolist())
        out.append(x.masked_fill(~safe.scatter(-1, tokens, True), -math.inf))
    return out, inside


def k3_of(reference, own):
    """The KL penalty of each token; at ratios of 1 their correction adds its value to lp's."""
    d = reference - own
    k3 = d.exp() - d - 1
    return k3 * (own - own.detach()).exp()


ACCUMULATED = {
    "one micro-batch": (1, {}),
    "two steps of one generation": (
        3,
        dict(per_device_train_batch_size=2, steps_per_generation=6, max_steps=2),
    ),
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_balanced_aggregation_of_every_accumulated_step(name, tmp_path):
    """Each over the rows it has, as TRL shuffled them."""
    size, args = ACCUMULATED[name]
    args = NONE | dict(gradient_accumulation_steps=size) | args
    trainer, steps = trainer_of(tmp_path, batch=BATCH, args=args, aggregation={})
    train(trainer)
    model, seen = double_policy(), []
    for step, gradient in enumerate(steps.gradients):
        batches = trainer._buffered_inputs[step * size :][:size]
        rows = [find(row) for b in batches for row in b["completion_ids"].tolist()]
        loss = loss_of(picked(logits_of(model)), spread(centred()), balanced(rows, centred()))
        assert relative(gradient, gradient_of(loss, model)) < 1e-5
        seen += rows
    assert sorted(seen) == list(range(ROWS))


def find(padded):
    """The row of the samples with these tokens."""
    (row,) = [
        i for i, c in enumerate(BATCH.completions) if c + [0] * (len(padded) - len(c)) == padded
    ]
    return row


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Everything at once: in one process, and on two ranks, between which a group is divided."""
    folder = tmp_path_factory.mktemp("ranks")
    policy(seed=1).save_pretrained(folder / "reference")
    alone = run_everything(folder / "alone", ranks=1, reference=folder / "reference")
    run_ranks(everything_on_a_rank, (2, str(folder)), 2)
    return alone, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_everything_together_is_its_definition(together):
    alone, _ = together
    model = double_policy()
    logits, inside = pruned(logits_of(model), RHO)
    logp = picked(logits)
    with torch.no_grad():
        advantages = token_advantages(logits, leave_one_out=True, by_token=True)
        reference = picked(pruned(logits_of(double_policy(seed=1)), RHO)[0])
    tokens = [[t for t in own if inside[i][t]] for i, own in enumerate(OWN)]
    keep = trusted(logp, tokens, max_threshold=1e-2)
    assert any(keep[i] and tokens[i] != OWN[i] for i in range(ROWS))
    penalty = [0.3 * k3_of(ref, own) for ref, own in zip(reference, logp)]
    loss = loss_of(logp, advantages, balanced(range(ROWS), centred()), keep, penalty, tokens)
    assert relative(alone["gradient"], gradient_of(loss, model)) < 1e-5
    log, detector = alone["log"], alone["signals"]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert alone["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    length = sum(len(tokens) for tokens in OWN) / ROWS
    assert detector["signals"]["length"]["smoothed"] == length
    ended = sum(c[-1] == 1 for c in BATCH.completions)
    assert detector["smoothed_truncated"] == 1 - ended / ROWS
    assert detector["signals"]["grad_norm"]["smoothed"] == log["grad_norm"]
    assert detector["signals"]["mismatch"]["smoothed"] == log["mismatch/k3"]
    ratios = [logp[i][t].item() - BATCH.logp[i][t] for i in range(ROWS) for t in tokens[i]]
    k3 = sum(math.expm1(r) - r for r in ratios) / len(ratios)
    assert log["mismatch/k3"] == pytest.approx(k3, rel=1e-3)
    assert log["length_lr_factor"] == 1 and log["stability/state"] == 2
    assert log["trust_region/kept_sequences"] == pytest.approx(sum(keep) / ROWS)
    assert {"variance/total_power", "coupling/share", "variance/power_to_signal"} <= log.keys()


def test_two_ranks_take_the_gradient_of_one_process(together):
    alone, ranks = together
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"]), "ranks disagree"
    for found in ranks:
        assert relative(found["gradient"], alone["gradient"].double()) < 1e-5
        assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
        lengths = [x["signals"]["signals"]["length"] for x in (found, alone)]
        assert lengths[0] == lengths[1]
        assert found["log"].keys() == alone["log"].keys()
        for name in (
            "loss",
            "mismatch/k3",
            "mismatch/ess",
            "variance/total_power",
            "coupling/share",
            "trust_region/kept_sequences",
            "stability/state",
        ):
            assert found["log"][name] == pytest.approx(alone["log"][name], rel=1e-5), name


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Both(StabilityMixin, SharedPrefixGRPOTrainer):
    pass


SHARED = {"min_bound": 0, "verify": "never"}
OPTIONS = {
    "nothing": {},
    "token baseline": dict(args=NONE, token_baseline={"leave_one_out": True}),
    "aggregation": dict(aggregation={"rule": "seq_mean_token_sum_norm", "max_length": 3}),
    "trust region": dict(args=dict(num_iterations=2), trust_region={"mean_threshold": 0.1}),
    "pruning": dict(pruning={"rho": 0.2}),
    "rate": dict(length_trigger={"warmup": 1}),
    "monitors": dict(monitors=lambda: StabilityWatch([GradientNormMonitor()])),
    "shared prefix": dict(
        kind=Both,
        args=NONE | dict(steps_per_generation=2, gradient_accumulation_steps=1),
        token_baseline={},
        aggregation={"rule": "seq_mean"},
        trust_region={},
        shared_prefix=SHARED,
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    trainer, steps = trainer_of(
        tmp_path_factory.mktemp("stock"), kind=trl.GRPOTrainer, args=dict(max_steps=3)
    )
    return train(trainer), steps.gradients


@pytest.mark.parametrize("name", OPTIONS)
def test_three_real_steps(name, stock, tmp_path):
    case = dict(OPTIONS[name])
    args = dict(max_steps=3) | dict(case.pop("args", {}))
    if "monitors" in case:
        case["monitors"] = case["monitors"]()
    trainer, steps = trainer_of(tmp_path, args=args, **case)
    logs = train(trainer)
    assert len(logs) == 3 and all(math.isfinite(log["loss"]) for log in logs)
    assert len(steps.gradients) == 3 and all(g.isfinite().all() for g in steps.gradients)
    same = [torch.equal(a, b) for a, b in zip(steps.gradients, stock[1])]
    new = logs[0].keys() - stock[0][0].keys()
    if name == "nothing":
        assert all(same) and logs[0].keys() == stock[0][0].keys()
    elif name == "monitors":
        assert all(same) and "stability/state" in new
    elif name == "rate":
        assert same[0] and new == {"length_lr_factor"}
    elif name == "trust region":
        assert same[0] and logs[0]["trust_region/kept_sequences"] == 1
    elif name == "aggregation":  # every sample has 6 tokens, of which that counts 3
        assert relative(steps.gradients[0], 2 * stock[1][0].double()) < 1e-6
    else:
        assert not same[0]
    if name == "pruning":  # samples are of the safe set
        assert all(log["pruning/out_of_set_fraction"] == 0 for log in logs)
        assert trainer.generation_config.min_p == 0.2 and trainer.args.min_p == 0.2
    if name == "shared prefix":
        assert logs[0]["prefix/shared"] == 1 and "trust_region/kept_tokens" in new


def test_rate_state_and_watch_after_a_resume(tmp_path):
    """The surge at step 1 halves the rate of every later step; a resumed run repeats each bit."""

    def trainer(folder):
        args = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        length = {"warmup": 1, "saturation": 0.5, "period_factor": 1.0}
        watch = StabilityWatch([GradientNormMonitor(window=2), ClipEntropyMonitor(warmup=1)])
        return trainer_of(folder, args=args, length_trigger=length, monitors=watch)[0]

    whole = trainer(tmp_path)
    logs = train(whole)
    factors = [log["length_lr_factor"] for log in logs]
    assert factors == [1.0, 1.0, 0.5, 0.25]
    assert all(log["learning_rate"] == 1e-2 for log in logs)
    state = json.loads((tmp_path / "checkpoint-2" / "trimtab_stability.json").read_text())
    assert state["length_trigger"]["triggered_at"] == 1

    resumed = trainer(tmp_path / "again")
    again = train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed._detector.state_dict() == whole._detector.state_dict()
    assert resumed.stability.monitors.state_dict() == whole.stability.monitors.state_dict()
    for found, expected in zip(again[2:], logs[2:], strict=True):
        for name in expected.keys() - {"step_time"}:
            assert found[name] == expected[name], name
    assert not resumed.optimizer.optimizer._optimizer_step_pre_hooks  # let go after training

    whole.args.max_steps = 1  # a run of its own knows nothing of the one before
    assert [log["length_lr_factor"] for log in train(whole)] == [1.0]
    assert whole._detector.observations == 1 and whole._detector.triggered_at is None
    norms = whole.stability.monitors.state_dict()["monitors"]["GradientNormMonitor"]["norms"]
    assert len(norms) == 1


def test_factor_is_on_the_step_that_the_optimizer_takes(tmp_path):
    """Under SGD a move is rate times gradient; the surge at step 1 halves that of step 2."""
    args = dict(max_steps=3, optim="sgd", lr_scheduler_type="constant")
    length = {"warmup": 1, "saturation": 0.5, "period_factor": 1.0}
    trainer, steps = trainer_of(tmp_path, args=args, length_trigger=length)
    before = parameters(trainer)
    train(trainer)
    expected = -1e-2 * (steps.gradients[0] + steps.gradients[1] + 0.5 * steps.gradients[2])
    assert relative(parameters(trainer) - before, expected.double()) < 1e-4


def test_alarm_is_said_and_ends_training(tmp_path, caplog):
    watch = StabilityWatch([ClipEntropyMonitor(entropy_fall=(9, 8), warmup=1)], patience=2)
    with caplog.at_level(logging.WARNING, logger="trimtab.integrations.trl_stability"):
        trainer, _ = trainer_of(
            tmp_path, args=dict(max_steps=3), monitors=watch, stop_on_alarm=True
        )
        logs = train(trainer)
    assert len(logs) == 2 and trainer.state.global_step == 2
    assert "entropy is collapsing" in caplog.text


class OverflowingTrainer(StabilityGRPOTrainer):
    """The gradients of the second step overflow; with fp16's scaler, nothing else is fp16."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 1:
            next(self.model.parameters()).grad.fill_(math.inf)
        return loss


def test_step_that_the_scaler_skips_is_no_alarm(tmp_path):
    watch = StabilityWatch([GradientNormMonitor(window=4)])
    trainer, _ = trainer_of(
        tmp_path,
        kind=OverflowingTrainer,
        args=dict(max_steps=3),
        monitors=watch,
        stop_on_alarm=True,
    )
    logs = train(trainer)
    assert [math.isfinite(log["grad_norm"]) for log in logs] == [True, False, True]
    assert [log["stability/state"] for log in logs] == [0, 0, 0]
    assert len(watch.state_dict()["monitors"]["GradientNormMonitor"]["norms"]) == 2


def test_two_watches_are_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path, monitors=StabilityWatch([GradientNormMonitor()]))
    trainer.add_callback(StabilityMonitorCallback([GradientNormMonitor()]))
    with pytest.raises(ValueError, match="monitors: expected one watch, found a StabilityMonitorC"):
        train(trainer)
    assert trainer.optimizer is None


SMALL = dict(per_device_train_batch_size=4)
REFUSED = {
    "token_baseline: expected args.scale_rewards='none'": dict(token_baseline={}),
    "token_baseline: expected args.importance_sampling_level='token'": dict(
        args=NONE | dict(importance_sampling_level="sequence"), token_baseline={}
    ),
    "aggregation: expected args.loss_type of": dict(args=dict(loss_type="grpo"), aggregation={}),
    "aggregation: expected args.steps_per_generation to be a multiple": dict(
        args=SMALL | dict(steps_per_generation=1, gradient_accumulation_steps=2), aggregation={}
    ),
    "trust_region: expected use_vllm, a rollout_func, num_iter": dict(trust_region={}),
    "trust_region: expected args.loss_type other than 'bnpo'": dict(
        args=dict(loss_type="bnpo", num_iterations=2), trust_region={}
    ),
    "pruning: expected args.top_p=1.0, found 0.9": dict(args=dict(top_p=0.9), pruning={}),
    "pruning: expected args.generation_kwargs without ['typical_p']": dict(
        args=dict(generation_kwargs={"typical_p": 0.5}), pruning={}
    ),
    "expected args.use_liger_kernel=False": dict(args=dict(use_liger_kernel=True), pruning={}),
    "expected use_vllm or a rollout_func to measure a mismatch": dict(
        monitors=StabilityWatch([MismatchMonitor()])
    ),
    "monitors: expected aggregation with SignLengthMonitor": dict(
        monitors=StabilityWatch([SignLengthMonitor()])
    ),
    "pruning=None with SharedPrefixGRPOTrainer": dict(kind=Both, pruning={}),
    "stop_on_alarm: expected monitors": dict(stop_on_alarm=True),
    "expected rule to be one of": dict(aggregation={"rule": "mean"}),
    "expected max_threshold >= 0": dict(trust_region={"max_threshold": -1.0}),
    "rho: expected a ratio in (0, 1), found 2": dict(pruning={"rho": 2}),
    "ratio: expected finite and above 1": dict(length_trigger={"ratio": 0.5}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_contradictions_are_refused_by_name(message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, **REFUSED[message])


def test_names_types_and_versions_that_are_refused():
    with pytest.raises(TypeError, match=r"trust_region: expected some of .*found \['exact_kl'\]"):
        StabilityOptions(trust_region={"exact_kl": 1})
    with pytest.raises(TypeError, match=r"aggregation: expected a mapping .* found 'balanced'"):
        StabilityOptions(aggregation="balanced")
    with pytest.raises(TypeError, match="monitors: expected a StabilityWatch"):
        StabilityOptions(monitors=[GradientNormMonitor()])
    require("trl", "1.16.0.dev1", "1.16", "2")
    require("trl", "1.99.3", "1.16", "2")
    for found in ("1.15.9", "2.0.0", "2.0.0rc1", "0.29"):
        with pytest.raises(ImportError, match=f"from 1.16 on and below 2, found {found}"):
            require("trl", found, "1.16", "2")


# Edits that must turn this file red (trl_stability.py unless another file is named):
#   inputs["loss_weights"] * ranks              ->  inputs["loss_weights"]      (DDP averages)
#   self._weigh(buffered[start : start + steps])  ->  self._weigh(buffered)     (the generation)
#   weights - 1 / divisor                       ->  weights                     (the penalty twice)
#   valid=out["scored"]                         ->  removed                     (a lost reward is 0)
#   start = process_index * len(inputs)         ->  start = 0                   (groups by rank)
#   mask = mask & keep[:, None]                 ->  removed
#   trl_steps.py: step = global_step - 1        ->  global_step
#   trl_steps.py: part.load_state_dict(...)     ->  pass   (either of the two)
#   trl_steps.py: del numbers["grad_norm"]      ->  pass
#   trl_options.py: args.min_p = options.rho    ->  removed
