"""The loop in one process: every option trains; what is lost or broken costs only itself."""

import dataclasses
import math

import pytest
import pytorch_lightning as pl
import tiny_run
import torch
from loop_cases import KeepGradient, Letters, config_of, train
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from reward_functions import always_fails, fails_on_a
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.optim import LengthDetector
from trimtab.rl import (
    Capabilities,
    LengthRateConfig,
    PrefixConfig,
    PruningConfig,
    Request,
    Sampling,
    TokenBaselineConfig,
    TrustRegionConfig,
    UpdateConfig,
    evaluate,
)
from trimtab.rl.collect import stop_token_ids
from trimtab.rl.length_trigger import replay
from trimtab.rl.ranks import check_shares, combined, refuse_precision, refuse_strategy
from trimtab.rl.rollout import refuse_engine


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_run.make_policy(folder)
    return folder


OPTIONS = {
    "adamw": {"optimizer": "adamw"},
    "paper-blocks": {"blocks": "paper"},
    **{
        name: {"advantage": name}
        for name in ("dr_grpo", "grpo", "rloo", "opo", "reinforce", "reinforce_pp", "remax")
    },
    "baseline-loo-keep": {
        "token_baseline": TokenBaselineConfig("model_token", leave_one_out=True, tail="keep")
    },
    "ppo_clip-2-epochs": {"loss": "ppo_clip", "epochs": 2},
    "reinforce-loss": {"loss": "reinforce"},
    **{name: {"loss": name} for name in ("gspo", "cispo", "dppo_tv", "dppo_kl")},
    "dense": {"route": "dense"},
    "three_phase": {"route": "three_phase", "prefix": PrefixConfig(min_bound=0, wave_tokens=20)},
    "fused-head": {"head": "fused", "pruning": PruningConfig(0.01)},
    "micro": {"micro_prompts": 1},
    "seq_mean": {"aggregation": "seq_mean"},
    "token_mean": {"aggregation": "token_mean"},
    "token_mean_group": {"aggregation": "token_mean_group"},
    "dr_grpo": {"aggregation": "seq_mean_token_sum_norm"},
    "pruning": {"pruning": PruningConfig(0.01, "mask_token")},
    "trust-region-kept": {"trust_region": TrustRegionConfig(denominator="kept")},
    "length-rate": {"length_rate": LengthRateConfig(warmup=1)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(option, policy_folder):
    config = config_of(Letters(), policy_folder, **OPTIONS[option])
    module, rows = train(config, policy_folder)
    start = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    moved = [not p.equal(q) for p, q in zip(module.policy.parameters(), start.parameters())]
    assert all(moved)
    assert module.updates_done == 3 and module.skipped_updates == 0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["rollouts"] == 12


@pytest.mark.parametrize("advantage", ["otb", "grpo"])
@pytest.mark.parametrize("wave_tokens", [8, 1000])
def test_three_phases_take_the_gradient_of_the_packed_row(policy_folder, wave_tokens, advantage):
    found = {}
    for route in ("packed", "three_phase"):
        options = dict(route=route, advantage=advantage, clip_norm=0.0)
        options |= {"trust_region": TrustRegionConfig(denominator="kept")}
        prefix = PrefixConfig(min_bound=0, wave_tokens=wave_tokens)
        config = config_of(Letters(), policy_folder, **options, prefix=prefix)
        config = dataclasses.replace(config, updates=1)
        keep = KeepGradient()
        _, (row,) = train(config, policy_folder, [keep])
        found[route] = keep.grad, row["loss"]
    assert row["prefix/shared"] == 1 and row["prefix/saved_tokens"] > 0
    error = (found["packed"][0] - found["three_phase"][0]).norm() / found["packed"][0].norm()
    assert error < 2e-6 and found["packed"][0].norm() > 0
    assert found["packed"][1] == pytest.approx(found["three_phase"][1], rel=1e-5, abs=1e-7)


def test_without_mismatch_the_ratio_is_one(policy_folder):
    _, rows = train(config_of(Letters(), policy_folder), policy_folder)
    assert max(row["mismatch/abs_dlogp_max"] for row in rows) < 1e-5


@pytest.mark.parametrize("rollout", [{"dtype": "bfloat16"}, {"quantize_bits": 4}])
def test_a_coarser_engine_makes_a_real_mismatch(rollout, policy_folder):
    _, rows = train(config_of(Letters(), policy_folder, rollout=rollout), policy_folder)
    assert min(row["mismatch/abs_dlogp_mean"] for row in rows) > 1e-5


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(precision, policy_folder):
    module, rows = train(config_of(Letters(), policy_folder), policy_folder, precision=precision)
    assert module.updates_done == 3 and all(math.isfinite(row["loss"]) for row in rows)


def test_a_failing_reward_costs_its_rollout_only(policy_folder):
    module, rows = train(config_of(Letters(fails_on_a), policy_folder), policy_folder)
    lost = sum(row["reward_errors"] for row in rows)
    assert lost > 0
    assert sum(row["rollouts"] for row in rows) == 36 - lost
    for row, update in zip(rows, range(3)):
        assert row["update"] == update + 1
    assert None in [r for group in module.last_groups for r in group.rewards]


def test_an_update_without_any_reward_is_skipped(policy_folder, caplog):
    module, rows = train(config_of(Letters(always_fails), policy_folder), policy_folder)
    start = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    assert all(p.equal(q) for p, q in zip(module.policy.parameters(), start.parameters()))
    assert module.skipped_updates == 3 and module.updates_done == 3
    assert rows[-1]["rollouts"] == 0 and "no reward is left" in caplog.text


class PoisonGradient(pl.Callback):
    def on_after_backward(self, trainer, module):
        if module.updates_done == 1:
            module.policy.get_input_embeddings().weight.grad[0, 0] = float("nan")


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(policy_folder, caplog):
    module, _ = train(config_of(Letters(), policy_folder), policy_folder, [PoisonGradient()])
    assert module.skipped_updates == 1 and "not finite" in caplog.text
    assert all(torch.isfinite(p).all() for p in module.policy.parameters())


def test_the_length_trigger_lowers_the_rate_the_optimizer_uses(policy_folder):
    rate = LengthRateConfig(warmup=1, ratio=1.01, smoothing=0.0, period_factor=1.0)
    config = config_of(Letters(), policy_folder, lr_warmup=1, length_rate=rate)
    config = dataclasses.replace(config, updates=12)
    _, rows = train(config, policy_folder)
    for row in rows:
        assert row["lr"] == pytest.approx(1e-3 * row["length_rate/factor"], rel=1e-6)
    assert rows[-1]["lr"] < rows[0]["lr"]
    options = dataclasses.asdict(rate) | {"max_length": config.rollout.max_tokens}
    found = replay(rows, LengthDetector(**options))  # what `trimtab-rl length-trigger` shows
    assert found.replayed == pytest.approx([row["lr"] for row in rows], rel=1e-6)


def test_joint_triggers_read_the_mismatch_and_the_gradient_of_the_update(policy_folder):
    rate = LengthRateConfig(
        warmup=1, ratio=1.01, smoothing=0.0, period_factor=1.0, joint={"mismatch": 1e6}
    )
    config = config_of(Letters(), policy_folder, lr_warmup=1, length_rate=rate)
    config = dataclasses.replace(config, updates=6)
    module, rows = train(config, policy_folder)
    assert {row["length_rate/factor"] for row in rows} == {1.0}
    signal = module.lr_schedulers().state_dict()["detector"]["signals"]["mismatch"]
    assert signal["seen"] == 6 and signal["first_sum"] == pytest.approx(rows[0]["mismatch/k3"])


def test_evaluation_counts_what_the_engine_wrote(policy_folder):
    config = config_of(Letters(), policy_folder)
    module, _ = train(config, policy_folder)
    result = evaluate(module, module.engine, 3)
    again = evaluate(module, module.engine, 3)
    assert result == again, "held-out sampling is seeded"
    assert 0 <= result.greedy <= 1 and 0 < result.length <= 16 and result.lost == 0


def test_shares_strategies_and_precisions_that_are_not_exact_are_refused():
    with pytest.raises(ValueError, match=r"rollout.prompts: .* multiple of the 2 processes, got 3"):
        check_shares(3, 2)
    whole = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    refuse_strategy(whole, UpdateConfig())
    refuse_strategy(DDPStrategy(), UpdateConfig(head="fused"))
    with pytest.raises(ValueError, match=r"update.head: expected logits under FSDP2.*, got fused"):
        refuse_strategy(whole, UpdateConfig(head="fused"))
    with pytest.raises(ValueError, match="save_distributed_checkpoint = false"):
        refuse_strategy(ModelParallelStrategy(2, 1), UpdateConfig())
    with pytest.raises(ValueError, match=r"FSDP2.*, got FSDPStrategy"):
        refuse_strategy(FSDPStrategy(), UpdateConfig())
    for precision in ("bf16-true", "16-mixed"):
        with pytest.raises(ValueError, match=f"trainer.precision: .* got {precision}"):
            refuse_precision(precision)


def test_metrics_do_not_depend_on_the_parts_of_a_batch(policy_folder):
    parts = {"pruning": PruningConfig(0.01), "trust_region": TrustRegionConfig("k2", 1e-4, 1e-5)}
    rollout = {"quantize_bits": 4}
    found = [
        train(config_of(Letters(), policy_folder, rollout, micro_prompts=n, **parts), policy_folder)
        for n in (0, 1, 2)
    ]
    (whole, *_), *others = (rows for _, rows in found)
    assert 0 < whole["trust_region/kept_sequences"] < 1, "the trust region must matter here"
    for first, *_ in others:
        names = [name for name in whole if not name.startswith("time/")]
        assert [first[name] for name in names] == pytest.approx([whole[n] for n in names], rel=1e-3)


def test_the_mismatch_is_that_of_the_rollouts_whatever_the_epochs(policy_folder):
    """Later epochs have drifted from the engine by their own steps; they have other names."""
    one, two = (
        train(config_of(Letters(), policy_folder, lr=1e-2, epochs=n), policy_folder)[1][0]
        for n in (1, 2)
    )
    assert two["mismatch/abs_dlogp_max"] == one["mismatch/abs_dlogp_max"] < 1e-5
    assert two["epoch_2/loss"] != two["loss"] == one["loss"]


def test_metrics_of_ranks_are_joined_by_name():
    found = [{"a": 2.0, "x_max": 3.0, "loss": 1.0, "groups/count": 2.0}, {"a": 6.0, "x_max": 1.0}]
    assert combined(found) == {"a": 4.0, "x_max": 3.0, "loss": 1.0, "groups/count": 2.0}


def test_autocast_of_the_trainer_does_not_reach_the_engine(policy_folder):
    config = config_of(Letters(), policy_folder)
    module, _ = train(config, policy_folder)
    request = [Request([3, 4, 5], Sampling(max_tokens=8, seed=1))]
    alone = module.engine.generate(request)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.engine.generate(request) == alone


def test_an_engine_that_cannot_do_the_recipe_is_refused():
    refuse_engine(Capabilities(False, False), processed=False, min_p=False)
    with pytest.raises(ValueError, match="reports raw ones"):
        refuse_engine(Capabilities(False, True), processed=True, min_p=True)
    with pytest.raises(ValueError, match="expected min_p"):
        refuse_engine(Capabilities(True, False), processed=True, min_p=True)


def test_stop_tokens_must_exist(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    task = Letters()
    assert stop_token_ids(tokenizer, task) == (1, tokenizer.convert_tokens_to_ids(";"))
    task.stop = "ab"
    with pytest.raises(ValueError, match="expected one token"):
        stop_token_ids(tokenizer, task)
    tokenizer.eos_token = None
    task.stop = ""
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        stop_token_ids(tokenizer, task)


# Edits that must turn this file red:
# * _update: call optimizer.step() even when _step found the gradient not finite
# * _schedule: do not step the schedule
# * collate: give every lost reward 0 instead of leaving it out
# * training_step: leave the engine's weights as they were at the start
# * config: hand `blocks` or `epochs` nowhere
