"""The verl plugin in verl 0.9.1: its registries, DataProto, configuration files and FSDP engine.

How to run it: tests/verl_cases.py. What it does without verl: test_integration_missing.py.
"""

import copy
import dataclasses
import functools
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl_workers
from tiny_models import causal_lm
from torch.multiprocessing import start_processes
from verl_cases import batch, close, configs, core

import trimtab.stability as ours
from trimtab.integrations import verl as plugin

hydra = pytest.importorskip("hydra")
omegaconf = pytest.importorskip("omegaconf")
trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", exc_type=ImportError)
from verl.utils.metric import Metric  # noqa: E402
from verl.utils.py_functional import append_to_dict  # noqa: E402

# What the plugin's docstrings tell the user to write.
COMMANDS = [
    "actor_rollout_ref.model.external_lib=trimtab.integrations.verl",
    "actor_rollout_ref.actor.policy_loss.loss_mode=trimtab_trust_region",
    "actor_rollout_ref.actor.policy_loss._target_="
    "trimtab.integrations.verl.TrustRegionPolicyLossConfig",
    "+actor_rollout_ref.actor.policy_loss.max_threshold=0.125",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.optim.optimizer_impl=trimtab.integrations.verl",
    "actor_rollout_ref.actor.optim.optimizer=adam_mini",
    "+actor_rollout_ref.actor.optim.override_optimizer_config={momentum_dtype:bfloat16}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
]
ONE_STEP = ["data.train_batch_size=24", "actor_rollout_ref.actor.ppo_mini_batch_size=24"]


@functools.cache
def command_line(*overrides):
    """verl's ppo_trainer.yaml with overrides of its command line."""
    folder = Path(trainer.__file__).parent.parent / "config"
    with hydra.initialize_config_dir(config_dir=str(folder), version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def configuration(*overrides):
    """The same without hydra's seconds, for what is no test of the command line."""
    config = copy.deepcopy(command_line())
    changes = omegaconf.OmegaConf.from_dotlist([x.lstrip("+") for x in overrides])
    with omegaconf.open_dict(config):
        return omegaconf.OmegaConf.merge(config, changes)


def advantages_of_verl(b, name, *overrides, **more):
    """Advantages and returns by verl's `compute_advantage` from a DataProto of the batch."""
    rewards = b.dense if "reinforce_pp" in name or "token" in name else b.sparse
    data = trainer.DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": b.ints, **more},
        non_tensors={"uid": b.uid},
    )
    config = configuration(f"algorithm.adv_estimator={name}", *overrides).algorithm
    data = trainer.compute_advantage(data, adv_estimator=config.adv_estimator, config=config)
    return data.batch["advantages"], data.batch["returns"]


def whole(outcome):
    return lambda b: ours.broadcast_advantages(outcome(b), b.mask)


EXPECTED = {
    "grpo": whole(lambda b: ours.grpo_advantages(b.outcome, b.ids)),
    "dr_grpo": whole(lambda b: ours.dr_grpo_advantages(b.outcome, b.ids)),
    "rloo": whole(lambda b: ours.rloo_advantages(b.outcome, b.ids)),
    "opo": whole(lambda b: ours.opo_advantages(b.outcome, b.mask.sum(1), b.ids)),
    "reinforce": whole(lambda b: b.outcome),
    "reinforce_pp": lambda b: ours.reinforce_pp_advantages(b.dense, b.mask, gamma=0.9),
    "reinforce_pp_baseline": lambda b: ours.reinforce_pp_advantages(
        b.dense, b.mask, gamma=0.9, group_ids=b.ids
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_advantages(name):
    b = batch(3)
    advantages, returns = advantages_of_verl(b, f"trimtab_{name}", "algorithm.gamma=0.9")
    close(advantages, EXPECTED[name](b))
    assert torch.equal(advantages, returns)


def test_remax_takes_the_baselines_of_verl():
    b = batch(4)
    greedy = torch.randn(len(b.ids), dtype=torch.float64, generator=torch.manual_seed(1))
    expected = (b.outcome - greedy)[:, None] * b.mask
    close(advantages_of_verl(b, "trimtab_remax", reward_baselines=greedy)[0], expected)
    with pytest.raises(ValueError, match=r"replace_estimators\('remax'\)"):
        advantages_of_verl(b, "trimtab_remax")


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_replaced_optimal_token_baseline(name, monkeypatch):
    b = batch(5)
    of_policy = dict(old_log_probs=b.logp, sum_pi_squared=b.sum_p2)
    monkeypatch.setitem(core.ADV_ESTIMATOR_REGISTRY, name, core.ADV_ESTIMATOR_REGISTRY[name])
    alignment = "column" if name == "optimal_token_baseline" else "model_token"
    plugin.replace_estimators(name)
    for weights in (None, b.weights):
        more = {} if weights is None else {"rollout_is_weights": weights}
        options = ["+algorithm.trimtab.leave_one_out=true", "+algorithm.trimtab.tail=keep"]
        found, _ = advantages_of_verl(b, name, *options, **of_policy, **more)
        expected = ours.optimal_token_baseline(
            b.dense, b.mask, b.logp, b.sum_p2, b.ids, alignment=alignment, importance=weights,
            leave_one_out=True, tail="keep",
        )  # fmt: skip
        close(found, expected)
    with pytest.raises(ValueError, match="sum_pi_squared"):
        core.ADV_ESTIMATOR_REGISTRY[name](b.dense, b.ints, index=b.uid)
    with pytest.raises(ValueError, match=r"names: .*'grpo'"):
        plugin.replace_estimators("remax", "grpo")
    assert core.ADV_ESTIMATOR_REGISTRY["remax"] is core.compute_remax_outcome_advantage


def test_options_of_estimators():
    b = batch(6)
    batch_wide, _ = advantages_of_verl(
        b, "trimtab_grpo", "+algorithm.trimtab.deviation=batch", *ONE_STEP
    )
    expected = ours.grpo_advantages(b.outcome, b.ids, deviation="batch")
    close(batch_wide, ours.broadcast_advantages(expected, b.mask))
    for overrides, message in (
        (["+algorithm.trimtab.deviatoin=batch"], "found .*deviatoin"),
        (["algorithm.norm_adv_by_std_in_grpo=false"], "trimtab_dr_grpo"),
        (["+algorithm.trimtab.aggregation=balanced"], "found data.train_batch_size=1024 and"),
        (
            ["+algorithm.trimtab.aggregation=balanced", *ONE_STEP,
             "actor_rollout_ref.actor.loss_agg_mode=token-sum"],
            "loss_agg_mode=token-mean",
        ),
        (
            ["+algorithm.trimtab.aggregation=balanced", *ONE_STEP,
             "algorithm.rollout_correction.rollout_rs=seq_mean_k1"],
            "rollout_rs=null",
        ),
        (["+algorithm.trimtab.aggregation=vote", *ONE_STEP], "rule"),
        (["+algorithm.trimtab=balanced"], "algorithm.trimtab: expected options .*'balanced'"),
        (
            ["+algorithm.trimtab.aggregation=balanced", "data.train_batch_size=1",
             "actor_rollout_ref.actor.ppo_mini_batch_size=1"],
            r"found \d+ rows and steps of 1 ",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            advantages_of_verl(b, "trimtab_grpo", *overrides)
    with pytest.raises(ValueError, match="whole configuration"):
        alone = configuration("+algorithm.trimtab.aggregation=balanced").algorithm.copy()
        alone._set_parent(None)
        core.get_adv_estimator_fn("trimtab_rloo")(b.sparse, b.ints, config=alone, index=b.uid)
    with pytest.raises(ValueError, match="uid"):
        core.get_adv_estimator_fn("trimtab_rloo")(b.sparse, b.ints)


def actor(mode="token-mean", **options):
    section = plugin.TrustRegionPolicyLossConfig(
        max_threshold=0.4, mean_threshold=0.2, max_log_ratio=0.3, mean_statistic="k2"
    )
    return configs.ActorConfig(
        strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, policy_loss=section,
        loss_agg_mode=mode, clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5, **options,
    )  # fmt: skip


def trust_region(lp, b, a):
    keep, _ = ours.trust_region_mask(
        lp.detach() - b.old, b.mask, max_threshold=0.4, mean_threshold=0.2, mean_statistic="k2"
    )
    assert 0 < keep.sum() < len(keep)  # there is something to see
    assert ((lp.detach() - b.old).abs() > 0.3)[b.mask & keep[:, None]].any()
    return ours.ratio_policy_loss(lp, b.old, a, max_log_ratio=0.3) * keep[:, None]


TOKEN_LOSSES = {
    "trust_region": trust_region,
    "ppo_clip": lambda lp, b, a: ours.ppo_clip(
        lp, b.old, a, clip_low=0.1, clip_high=0.3, dual_clip=1.5
    ),
    "gspo": lambda lp, b, a: ours.gspo(lp, b.old, a, mask=b.mask, clip_low=0.1, clip_high=0.3),
    "cispo": lambda lp, b, a: ours.cispo(lp, b.old, a, clip_low=0.1, clip_high=0.3),
    "dppo_tv": lambda lp, b, a: ours.dppo_tv(
        lp, b.old, a, threshold_low=0.1, threshold_high=0.3, max_ratio=1.5
    ),
    "dppo_kl": lambda lp, b, a: ours.dppo_kl(
        lp, b.old, a, threshold_low=0.1, threshold_high=0.3, max_ratio=1.5
    ),
    "reinforce": lambda lp, b, a: ours.reinforce(lp, a),
}


def over_two_ranks(name, b, lp, a, config, weights=None):
    """What DDP and FSDP make of two ranks' losses, of two micro-batches each: the mean."""
    config.global_batch_info.update(
        dp_size=2, batch_num_tokens=int(b.mask.sum()), global_batch_size=len(b.ids),
        loss_scale_factor=17,
    )  # fmt: skip
    losses = []
    for rows in torch.arange(len(b.ids)).chunk(4):
        loss, metrics = core.get_policy_loss_fn(name)(
            old_log_prob=b.old[rows],
            log_prob=lp[rows],
            advantages=a[rows],
            response_mask=b.ints[rows],
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=None if weights is None else weights[rows],
        )
        losses.append(loss / 2)
        assert all(isinstance(x, float) and k.startswith("actor/") for k, x in metrics.items())
        kl = (b.old - lp.detach())[rows][b.mask[rows]].mean().item()
        assert metrics["actor/ppo_kl"] == pytest.approx(kl)
    return sum(losses)


RULES = {
    "token-mean": dict(rule="token_mean"),
    "seq-mean-token-mean": dict(rule="seq_mean"),
    "seq-mean-token-sum-norm": dict(rule="seq_mean_token_sum_norm", max_length=17),
}


@pytest.mark.parametrize("mode", RULES)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_policy_losses(name, mode):
    """Value and gradient of two ranks' micro-batches, with weights of rollout correction or not."""
    b = batch(12, spread=0.5)
    a = b.dense  # of no one sign in a response
    one_group = torch.zeros_like(b.ids)
    weights = ours.aggregation_weights(b.mask, one_group, b.outcome, **RULES[mode])
    for importance in (None, b.weights):
        lp, lp_verl = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
        loss = TOKEN_LOSSES[name](lp, b, a)
        loss = ours.apply_weights(loss if importance is None else loss * importance, weights)
        loss.backward()
        found = over_two_ranks(f"trimtab_{name}", b, lp_verl, a, actor(mode), importance)
        found.backward()
        close(found.detach(), loss.detach(), 1e-7)  # verl adds 1e-8 to lengths
        close(lp_verl.grad, lp.grad, 1e-7)


def test_metrics_of_losses_are_those_of_stability():
    b = batch(12, spread=0.5)
    arguments = dict(
        old_log_prob=b.old, log_prob=b.logp, advantages=b.dense, response_mask=b.ints,
        config=actor(),
    )  # fmt: skip
    _, metrics = core.get_policy_loss_fn("trimtab_ppo_clip")(**arguments)
    expected = ours.clip_metrics(b.logp - b.old, b.dense, b.mask, 0.1, 0.3)
    del expected["clip/signal_ratio"]  # not every micro-batch has it
    for key, value in expected.items():
        assert metrics[f"actor/{key}"] == pytest.approx(value.item())
    _, metrics = core.get_policy_loss_fn("trimtab_trust_region")(**arguments)
    assert metrics["actor/trust_region/kept_sequences"] < 1


@pytest.mark.parametrize("name", plugin.LOSSES)
def test_metrics_of_micro_batches_and_ranks_go_together(name):
    """Each reports the same ones, with clipping, without, and where verl's padding has no token."""
    b = batch(12, spread=0.5)
    far = b.logp + torch.where(b.mask, 1.0, 0.0)
    ranks = []
    for micro_batches in ([(b.logp, 1), (b.logp, 0)], [(far, 1), (far, 1)]):
        ranks.append({})
        for logp, kept in micro_batches:
            _, metrics = core.get_policy_loss_fn(name)(
                b.logp, logp, b.dense, b.ints * kept, config=actor()
            )
            append_to_dict(ranks[-1], Metric.from_dict(metrics, "mean"))
    assert ranks[0].keys() == ranks[1].keys()
    for key, first in ranks[0].items():
        assert math.isfinite(Metric.aggregate_dp([first, ranks[1][key]]))


@pytest.mark.parametrize("loss", ["trimtab_ppo_clip", "trimtab_trust_region", "vanilla"])
@pytest.mark.parametrize("name", ["rloo", "reinforce_pp_baseline"])
def test_aggregation_from_the_driver(name, loss):
    """The estimator weighs, verl's token-mean over two ranks gives what the definition gives."""
    b = batch(12, spread=0.5)
    overrides = ["+algorithm.trimtab.aggregation=balanced", "algorithm.gamma=0.9", *ONE_STEP]
    advantages, returns = advantages_of_verl(b, f"trimtab_{name}", *overrides)
    plain = EXPECTED[name](b)
    close(returns, plain)
    outcome = b.outcome if name == "rloo" else b.dense.sum(1)
    sides = ours.dr_grpo_advantages(outcome, b.ids)
    weights = ours.aggregation_weights(b.mask, b.ids, sides, rule="balanced")
    assert (weights[b.mask] - weights[b.mask].mean()).abs().max() > 1e-3
    lp, lp_verl = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    own = TOKEN_LOSSES["trust_region" if "region" in loss else "ppo_clip"](lp, b, plain)
    expected = ours.apply_weights(own, weights)
    expected.backward()
    found = over_two_ranks(loss, b, lp_verl, advantages, actor())
    found.backward()
    close(found.detach(), expected.detach())
    close(lp_verl.grad, lp.grad)


def test_padding_rows_of_verl_change_nothing():
    """Its v1 trainer fills a batch up with rows of a uid of their own that have no token."""
    b = batch(8)
    pad = b._replace(**{n: torch.cat([x, torch.zeros_like(x[:2])]) for n, x in b._asdict().items()})
    pad = pad._replace(ids=torch.cat([b.ids, torch.full((2,), 1000)]))
    overrides = ["+algorithm.trimtab.aggregation=balanced", *ONE_STEP]
    for name in ("trimtab_rloo", "trimtab_reinforce_pp_baseline"):
        alone, _ = advantages_of_verl(b, name, *overrides)
        padded, _ = advantages_of_verl(pad, name, *overrides)
        close(padded[:-2], alone)
        assert (padded[-2:] == 0).all()


def test_what_a_user_writes_reaches_the_workers():
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    config = command_line(*COMMANDS).actor_rollout_ref
    worker = omega_conf_to_dataclass(config.actor)
    assert isinstance(worker.policy_loss, plugin.TrustRegionPolicyLossConfig)
    assert worker.policy_loss.max_threshold == 0.125
    b = batch(9)
    for bound in (0.0, 1e9):  # the threshold is read: nothing but what has not moved, or all
        override = f"+actor_rollout_ref.actor.policy_loss.max_threshold={bound}"
        commands = [x for x in COMMANDS if "max_threshold" not in x] + [
            override, "+actor_rollout_ref.actor.policy_loss.mean_threshold=1e9"
        ]  # fmt: skip
        read = omega_conf_to_dataclass(configuration(*commands).actor_rollout_ref.actor)
        _, metrics = core.get_policy_loss_fn(read.policy_loss.loss_mode)(
            b.old, b.logp, b.dense, b.ints, config=read
        )
        assert metrics["actor/trust_region/kept_sequences"] == float(bound > 0)
    model = causal_lm()
    optimizer = build_optimizer(model.parameters(), worker.optim)
    twin = ours_for(model, momentum_dtype=torch.bfloat16)
    assert [g["lr"] for g in optimizer.param_groups] == [worker.optim.lr] * 2
    assert [g["betas"] for g in optimizer.param_groups] == [tuple(worker.optim.betas)] * 2
    assert optimizer.momentum_dtype == torch.bfloat16
    for param in model.parameters():
        assert optimizer.layout(param) == twin.layout(param)
    for parameters in (list(model.parameters()), (p for p in model.parameters())):
        with pytest.raises(ValueError, match=r"parameters: .*for_model"):
            build_optimizer(parameters, worker.optim)
    with pytest.raises(ValueError, match=r"momentum_dtype: .*'int8'"):
        plugin.adam_mini(model.parameters(), 1e-3, momentum_dtype="int8")
    for changes, message in (
        ({"mean_statistic": "exact_kl"}, "no distributions"),
        ({"mean_statistic": "k4"}, "mean_statistic"),
        ({"max_threshold": -1.0}, "max_threshold"),
        ({"max_log_ratio": 21.0}, "max_log_ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            plugin.TrustRegionPolicyLossConfig(**changes)
    loose = dataclasses.replace(actor(), policy_loss={"max_threshold": 0.0, "mean_threshold": 1e9})
    _, metrics = core.get_policy_loss_fn("trimtab_trust_region")(
        b.old, b.logp, b.dense, b.ints, config=loose
    )
    assert metrics["actor/trust_region/rejected_by_peak"] > 0


def ours_for(model, **options):
    from trimtab.optim import AdamMini

    return AdamMini.for_model(model, **options)


def test_verl_loads_the_plugin():
    """By verl's own variable, before verl has been imported to its end; twice does no harm."""
    code = """
import importlib, os
os.environ["VERL_USE_EXTERNAL_MODULES"] = (
    "trimtab.integrations.verl,trimtab.integrations.verl_replace_otb"
)
import verl
from verl.trainer.ppo import core_algos
from trimtab.integrations import verl as plugin, verl_replace_otb
for module in (plugin, verl_replace_otb):
    importlib.reload(module)
assert plugin.ESTIMATORS.items() <= core_algos.ADV_ESTIMATOR_REGISTRY.items()
assert plugin.LOSSES.items() <= core_algos.POLICY_LOSS_REGISTRY.items()
registry = core_algos.ADV_ESTIMATOR_REGISTRY
for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
    assert registry[name].__module__ == "trimtab.integrations.verl_advantages"
assert registry["remax"].__module__ == "verl.trainer.ppo.core_algos"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_engine_over_two_ranks(tmp_path):
    """verl's FSDP engine equals one process with our functions, torch's clipping and no verl."""
    model = causal_lm("llama", attention="eager")
    model.save_pretrained(tmp_path / "model")
    ids, attention, mask, advantages = verl_workers.batch()
    with torch.no_grad():
        logp = verl_workers.response_logp(model, ids, attention)
    old = logp + 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))
    # not from the server of processes.py, which has imported everything but verl
    start_processes(
        verl_workers.run, (str(tmp_path), old), verl_workers.RANKS, start_method="spawn"
    )
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2))

    settings = dict(verl_workers.OPTIMIZER)
    optimizer = ours_for(model, **settings)
    rejected = 0
    for step in range(verl_workers.STEPS):
        logp = verl_workers.response_logp(model, ids, attention)
        keep, _ = ours.trust_region_mask(logp.detach() - old, mask.bool(), **verl_workers.TRUST)
        loss = ours.ratio_policy_loss(logp, old, advantages, mask=mask.bool())
        (loss * keep[:, None]).sum().div(mask.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), verl_workers.CLIP)
        lr = scheduled(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for rank in (first, second):
            seen = rank["metrics"][step]
            assert seen["lr"] == pytest.approx(lr)
            assert seen["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            assert norm > verl_workers.CLIP  # so that clipping shows
        rejected += int((~keep).sum())
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        for rank in (first, second):
            torch.testing.assert_close(rank["parameters"][name], param.detach(), rtol=0, atol=1e-5)
    start = causal_lm("llama", attention="eager").state_dict()
    moved = [(p.detach() - start[n]).abs().max() for n, p in model.named_parameters()]
    assert rejected and min(moved) > 5e-4
    assert "strategy=fsdp2" in first["refused"] and "found fsdp" in first["refused"]


def scheduled(step):
    """verl's cosine with warm-up, by its documentation."""
    w = verl_workers
    if step < w.WARMUP:
        return w.LR * step / w.WARMUP
    progress = (step - w.WARMUP) / (w.STEPS - w.WARMUP)
    return w.LR * (w.MIN_RATIO + (1 - w.MIN_RATIO) * (1 + math.cos(math.pi * progress)) / 2)


def test_the_example_runs(capsys):
    path = Path(__file__).parent.parent / "examples" / "verl_batch.py"
    runpy.run_path(str(path), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "advantages of responses: [-0.333, 1.0" in first
    assert "actor/trust_region/kept_sequences" in second


# Edits that must turn this file red:
#   verl_advantages.py: advantages * weights * mask.sum()    ->  advantages * weights
#   verl_advantages.py: valid=mask.any(1)                    ->  removed   (verl's padding counts)
#   verl_advantages.py: _token_baseline("model_token")       ->  _token_baseline("column")
#   verl_losses.py: torch.where(keep[:, None], loss, 0)      ->  loss
#   verl_losses.py: **config.global_batch_info               ->  removed   (each rank by itself)
#   verl_losses.py: loss * torch.where(mask, rollout_is_weights, 0)  ->  loss
#   verl_optimizer.py: (betas[0], betas[1])                  ->  (0.5, 0.9)
#   verl_optimizer.py: isinstance(part, FullyShardedDataParallel)    ->  False
