"""Group statistics of a batch of rollouts against verl's installed functions, as ratios.

    make test-verl     # installs verl into .cache/peers/verl/site-packages
    OMP_NUM_THREADS=1 PYTHONPATH=.cache/peers/verl/site-packages \
        pytest benchmarks/bench_stability.py --benchmark-json=FILE
    python benchmarks/report.py FILE

About 100k tokens of 64 prompts in fp32 on one CPU thread: groups of 16 with responses of 100
tokens, and groups of 4 to 28 with responses of 50 to 150 tokens, rows in random order. Each side
gets what it takes: verl an integer mask, string ids and rewards by token; we a bool mask, integer
ids and rewards by response.

Providers of one table compute the same, and one that is not within 1e-4 of the other is not timed;
`computes` says what. What verl logs beside (and cannot leave out) is in its time, and in ours where
it is in our result. verl's two forms of GRPO and RLOO are both there. Our aggregation weights are
taken once for all micro-batches of a step; "weights given" is what each of them then costs.

Ratio: before every timed call the baseline (the first verl of the table) is timed; so both see the
same machine. The median over pairs, and quartiles. Extra memory: by how much memory rises during a
call (measure.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from measure import DEVICE, commit, device_name, extra_bytes, synchronize, versions
from torch import Tensor

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    broadcast_advantages,
    dr_grpo_advantages,
    grpo_advantages,
    importance_weights,
    mismatch_report,
    opo_advantages,
    optimal_token_baseline,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)

core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
corr = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
AlgoConfig = pytest.importorskip("verl.trainer.config").AlgoConfig

PROMPTS = 64


class Batch(NamedTuple):
    """One batch, in the forms that the two sides take.

    Args:
        mask: [B, T] bool.
        ints: [B, T] int64, the same.
        ids: [B] int64.
        uid: [B] strings, the same.
        outcome: [B] rewards.
        rewards: [B, T] the same at the last token.
        logp: [B, T].
        old: [B, T].
        sum_p2: [B, T].
        loss: [B, T].
        greedy: [B] bool, one row of each prompt.
        greedy_rewards: [B] of the prompt's greedy row.
        weights: [B, T] by the name of a rule.
    """

    mask: Tensor
    ints: Tensor
    ids: Tensor
    uid: np.ndarray
    outcome: Tensor
    rewards: Tensor
    logp: Tensor
    old: Tensor
    sum_p2: Tensor
    loss: Tensor
    greedy: Tensor
    greedy_rewards: Tensor
    weights: dict[str, Tensor]


def batch(sizes: Tensor, shortest: int, longest: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(PROMPTS), sizes)
    ids = ids[torch.randperm(len(ids), generator=g)]
    lengths = torch.randint(shortest, longest + 1, ids.shape, generator=g)
    mask = torch.arange(longest) < lengths[:, None]
    outcome = torch.randint(2, ids.shape, generator=g).float()
    rewards = torch.zeros(mask.shape).scatter(1, lengths[:, None] - 1, outcome[:, None])
    log_p = (3 * torch.randn(*mask.shape, 16, generator=g)).log_softmax(-1)
    noise = 0.1 * torch.randn(mask.shape, generator=g)
    logp = log_p[..., 0]
    first = torch.full((PROMPTS,), len(ids)).scatter_reduce(0, ids, torch.arange(len(ids)), "amin")
    greedy = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, first, True)
    tensors = (mask, mask.long(), ids, outcome, rewards, logp, (logp - noise).clamp_max(-1e-6))
    mask, ints, ids, outcome, rewards, logp, old = (x.to(DEVICE) for x in tensors)
    rules = ("token_mean", "seq_mean")
    return Batch(
        mask=mask,
        ints=ints,
        ids=ids,
        uid=np.array([f"prompt-{i}" for i in ids.tolist()], dtype=object),
        outcome=outcome,
        rewards=rewards,
        logp=logp,
        old=old,
        sum_p2=log_p.exp().square().sum(-1).to(DEVICE),
        loss=torch.randn(mask.shape, generator=g).to(DEVICE),
        greedy=greedy.to(DEVICE),
        greedy_rewards=outcome[first.to(DEVICE)][ids],
        weights={rule: weights_of(rule, mask, outcome) for rule in rules},
    )


def weights_of(rule: str, mask: Tensor, outcome: Tensor) -> Tensor:
    """Over one group, which is what verl's means are over."""
    ids = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    return aggregation_weights(mask, ids, outcome, rule=rule)


def unequal() -> Tensor:
    """Sizes of 4 to 28 with the mean 16."""
    half = torch.randint(4, 29, (PROMPTS // 2,), generator=torch.Generator().manual_seed(1))
    return torch.cat([half, 32 - half])


SHAPES = {
    "64 x 16, 100 tokens": lambda: batch(torch.full((PROMPTS,), 16), 100, 100),
    "64 unequal, 50-150 tokens": lambda: batch(unequal(), 50, 150),
}


class Provider(NamedTuple):
    """A function of a batch.

    Args:
        computes: what beside the tensor that is compared.
        call: returns the tensor or the numbers that are compared.
    """

    computes: str
    call: Callable[[Batch], Tensor]


def estimator(name: str, **options: object) -> Callable[[Batch], Tensor]:
    function = core.get_adv_estimator_fn(name)
    return lambda b: function(
        token_level_rewards=b.rewards, response_mask=b.ints, index=b.uid, **options
    )[0]


def theirs_otb(name: str) -> Callable[[Batch], Tensor]:
    function = core.get_adv_estimator_fn(name)
    return lambda b: function(b.rewards, b.ints, b.uid, b.logp, b.sum_p2)[0]


def ours_otb(alignment: str) -> Callable[[Batch], Tensor]:
    return lambda b: optimal_token_baseline(
        b.rewards, b.mask, b.logp, b.sum_p2, b.ids, alignment=alignment
    )


def spread(function: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """Advantages of responses as [B, T]."""
    return lambda b: broadcast_advantages(function(b), b.mask)


def ours_aggregation(rule: str) -> Callable[[Batch], Tensor]:
    return lambda b: apply_weights(b.loss, weights_of(rule, b.mask, b.outcome))


def ours_remax(b: Batch) -> Tensor:
    return broadcast_advantages(remax_advantages(b.outcome, b.ids, b.greedy)[0], b.mask)


def theirs_remax(b: Batch) -> Tensor:
    return core.compute_remax_outcome_advantage(b.rewards, b.greedy_rewards, b.ints)[0]


def ours_weights(**options: object) -> Callable[[Batch], Tensor]:
    return lambda b: importance_weights(b.logp - b.old, b.mask, **options)[0]


def theirs_weights(**options: object) -> Callable[[Batch], Tensor]:
    function = corr.compute_rollout_correction_weights
    return lambda b: function(b.logp - b.old, b.ints, **options)[0]


SAME = {  # of theirs: ours
    "kl": "k1",
    "k3_kl": "k3",
    "training_ppl": "ppl_train",
    "rollout_ppl": "ppl_rollout",
    "log_ppl_abs_diff": "log_ppl_gap_abs",
    "chi2_token": "chi2_token",
    "chi2_seq": "chi2_sequence",
}


def ours_metrics(b: Batch) -> Tensor:
    metrics = mismatch_report(b.logp, b.old, b.mask).metrics()
    return torch.stack([metrics[f"mismatch/{name}"] for name in SAME.values()])


def theirs_metrics(b: Batch) -> Tensor:
    metrics = corr.compute_offpolicy_metrics(b.logp, b.old, b.ints)
    return torch.tensor([metrics[name] for name in SAME])


def ours_correction(b: Batch) -> Tensor:
    weights, _ = importance_weights(b.logp - b.old, b.mask)
    mismatch_report(b.logp, b.old, b.mask, weights=weights).metrics()
    return weights


def theirs_correction(b: Batch) -> Tensor:
    proto, _, _ = corr.compute_rollout_correction_and_rejection_mask(
        b.logp, b.old, b.ints, rollout_is="token"
    )
    return proto.batch["rollout_is_weights"]


PLAIN = {"norm_adv_by_std_in_grpo": False}
TABLES = {
    "OTB, columns": {
        "verl": Provider("advantages", theirs_otb("optimal_token_baseline")),
        "trimtab": Provider("advantages", ours_otb("column")),
    },
    "OTB, model tokens": {
        "verl": Provider("advantages", theirs_otb("tir_optimal_token_baseline")),
        "trimtab": Provider("advantages", ours_otb("model_token")),
    },
    "GRPO": {
        "verl": Provider("advantages", estimator("grpo")),
        "verl, vectorized": Provider("advantages", estimator("grpo_vectorized")),
        "trimtab": Provider("advantages", spread(lambda b: grpo_advantages(b.outcome, b.ids))),
    },
    "Dr. GRPO": {
        "verl": Provider("advantages", estimator("grpo", **PLAIN)),
        "verl, vectorized": Provider("advantages", estimator("grpo_vectorized", **PLAIN)),
        "trimtab": Provider("advantages", spread(lambda b: dr_grpo_advantages(b.outcome, b.ids))),
    },
    "RLOO": {
        "verl": Provider("advantages", estimator("rloo")),
        "verl, vectorized": Provider("advantages", estimator("rloo_vectorized")),
        "trimtab": Provider("advantages", spread(lambda b: rloo_advantages(b.outcome, b.ids))),
    },
    "OPO": {
        "verl": Provider("advantages", estimator("opo")),
        "trimtab": Provider(
            "advantages", spread(lambda b: opo_advantages(b.outcome, b.mask.sum(1), b.ids))
        ),
    },
    "ReMax": {
        "verl": Provider("advantages", theirs_remax),
        "trimtab": Provider("advantages, metrics", ours_remax),
    },
    "REINFORCE++": {
        "verl": Provider("advantages", estimator("reinforce_plus_plus", config=AlgoConfig())),
        "trimtab": Provider("advantages", lambda b: reinforce_pp_advantages(b.rewards, b.mask)),
    },
    "REINFORCE++, gamma 0.99": {
        "verl": Provider(
            "advantages", estimator("reinforce_plus_plus", config=AlgoConfig(gamma=0.99))
        ),
        "trimtab": Provider(
            "advantages", lambda b: reinforce_pp_advantages(b.rewards, b.mask, gamma=0.99)
        ),
    },
    "REINFORCE++ baseline": {
        "verl": Provider("advantages", estimator("reinforce_plus_plus_baseline")),
        "trimtab": Provider(
            "advantages", lambda b: reinforce_pp_advantages(b.rewards, b.mask, group_ids=b.ids)
        ),
    },
    "token mean": {
        "verl": Provider("loss", lambda b: core.agg_loss(b.loss, b.ints, "token-mean")),
        "trimtab": Provider("weights, loss", ours_aggregation("token_mean")),
        "trimtab, weights given": Provider(
            "loss", lambda b: apply_weights(b.loss, b.weights["token_mean"])
        ),
    },
    "sequence mean": {
        "verl": Provider("loss", lambda b: core.agg_loss(b.loss, b.ints, "seq-mean-token-mean")),
        "trimtab": Provider("weights, loss", ours_aggregation("seq_mean")),
        "trimtab, weights given": Provider(
            "loss", lambda b: apply_weights(b.loss, b.weights["seq_mean"])
        ),
    },
    "importance, tokens": {
        "verl": Provider("weights, 14 numbers", theirs_weights(rollout_is="token")),
        "trimtab": Provider("weights, 6 numbers", ours_weights()),
    },
    "importance, sequences": {
        "verl": Provider("weights, 14 numbers", theirs_weights(rollout_is="sequence")),
        "trimtab": Provider("weights, 6 numbers", ours_weights(level="sequence")),
    },
    "importance, IcePop": {
        "verl": Provider("weights, 14 numbers", theirs_weights(rollout_is_threshold="0.5_2.0")),
        "trimtab": Provider("weights, 6 numbers", ours_weights(outside="zero", low=0.5)),
    },
    "mismatch metrics": {
        "verl": Provider("13 numbers", theirs_metrics),
        "trimtab": Provider("35 numbers, buckets", ours_metrics),
    },
    "importance and metrics": {
        "verl": Provider("weights, 27 numbers", theirs_correction),
        "trimtab": Provider("weights, 46 numbers, buckets", ours_correction),
    },
}
CASES = [
    pytest.param(table, name, shape, id=f"{table}-{shape}-{name}")
    for table, providers in TABLES.items()
    for shape in SHAPES
    for name in providers
]
PACKAGES = ("torch", "trimtab", "verl", "numpy")


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    return {name: make() for name, make in SHAPES.items()}


def seconds(call: Callable[[], Tensor]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def check(table: str, name: str, inputs: Batch) -> None:
    """Refuses to time what the other side does not compute as well."""
    other = "trimtab" if name.startswith("verl") else "verl"
    found, expected = (TABLES[table][n].call(inputs).double().cpu() for n in (name, other))
    if table == "ReMax":  # theirs has no greedy row in the batch, and gives it 0 as well
        assert (found[inputs.greedy.cpu()] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("table", "name", "shape"), CASES)
def test_stability(benchmark, batches, table, name, shape):
    inputs = batches[shape]
    provider, baseline = TABLES[table][name], TABLES[table]["verl"]
    check(table, name, inputs)
    call = lambda: provider.call(inputs)
    extra = extra_bytes(call)
    before: list[float] = []
    benchmark.group = f"{table}, {shape}"
    benchmark.pedantic(
        lambda: (call(), synchronize()),
        setup=lambda: before.append(seconds(lambda: baseline.call(inputs))),
        rounds=21,
        warmup_rounds=3,
    )
    if not benchmark.enabled:
        return
    times = benchmark.stats.stats.data
    ratios = [t / b for t, b in zip(times, before[-len(times) :])]
    low, _, high = statistics.quantiles(ratios, n=4)
    benchmark.extra_info |= {
        "table": table,
        "provider": name,
        "computes": provider.computes,
        "shape": shape,
        "tokens": int(inputs.mask.sum()),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "baseline_ms": 1e3 * statistics.median(before[-len(times) :]),
        "extra_mb": None if extra is None else extra / 2**20,
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "versions": versions(PACKAGES),
        "commit": commit("stability"),
    }
