"""Optimal token baseline: by how much does it lower the variance of the gradient?

    python benchmarks/claims/otb_variance.py    # what came out: results/claims/otb_variance.json

Source: arXiv 2602.07078. The estimate of one group of N rollouts is

    g = 1/N sum_i sum_t A_it grad log pi(y_it)

with A from the token baseline, or reward minus the mean reward. BOTH leave the rollout itself out,
so both are unbiased: they have one expected gradient, and no step size has to be matched. Measured
is the trace of the covariance of g over groups of fresh rollouts at a fixed policy, mean over
prompts; ratios have 90 % intervals by bootstrap, of prompts and of the groups of each. `cosine` is
between the mean gradients of the two over all groups, which shows that they agree up to noise.

    demo     the demo's base policy, and the same after RL updates: prompts of its task, rollouts
             and gradients both in fp32 (no mismatch)
    bigram   policies over 6 tokens, one of which ends (at most 12 tokens), with random logits; the
             reward is 1 if token 0 came at least twice

`otb@4 / mean@32` is the claim's ratio: at most 1 would be "4 rollouts do what 32 do".
"""

from __future__ import annotations

import argparse

import torch
from common import Rows, base_policy, demo_config, rollouts, run_claim, train
from torch import Tensor

from trimtab.rl import response_logits
from trimtab.stability import (
    broadcast_advantages,
    optimal_token_baseline,
    rloo_advantages,
)
from trimtab.triton_kernels.token_stats import token_stats

CLAIM = "variance: N = 4 with the token baseline matches N = 32 with the group mean (2602.07078)"
SIZES = (4, 8, 16, 32)
UPDATES = 12
Norms = dict[tuple[str, int], list[Tensor]]  # (arm, N) -> of each prompt [groups] |g - mean g|^2


def both_advantages(
    rewards: Tensor, mask: Tensor, logp: Tensor, sum_p2: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """[B, T] of the two arms."""
    token_rewards = torch.zeros_like(logp)
    token_rewards[torch.arange(len(mask)), mask.sum(1) - 1] = rewards.to(logp.dtype)
    token = optimal_token_baseline(token_rewards, mask, logp, sum_p2, groups, leave_one_out=True)
    mean = broadcast_advantages(rloo_advantages(rewards, groups), mask)
    return {"mean": mean.to(token.dtype), "otb": token}


def squared_deviations(gradients: Tensor) -> Tensor:
    """[groups] whose mean is the unbiased trace of the covariance."""
    count = len(gradients)
    return (gradients - gradients.mean(0)).square().sum(1) * count / (count - 1)


def demo_norms(policy, tokenizer, prompts: int, pool: int) -> tuple[Norms, float]:
    """Of fresh rollouts of the first prompts, and the cosine of the arms' mean gradients."""
    config, parameters = demo_config("--update.pruning", "null"), list(policy.parameters())
    norms: Norms = {}
    means = {arm: torch.zeros(sum(p.numel() for p in parameters)) for arm in ("mean", "otb")}
    for number in range(prompts):
        whole = rollouts(policy, tokenizer, config, [number], pool, dtype=torch.float32)
        for size in SIZES:
            found: dict[str, list[Tensor]] = {"mean": [], "otb": []}
            for first in range(0, pool, size):
                rows = torch.zeros(pool, dtype=torch.bool)
                rows[first : first + size] = True
                part = whole.select(rows)
                if part.rewards.min() == part.rewards.max() == 0:
                    for arm in found:  # no reward, no gradient in either arm
                        found[arm].append(torch.zeros_like(means[arm]))
                    continue
                logits = response_logits(
                    policy, part.prompts, part.tokens, part.mask, part.group_index
                )
                stats = token_stats(logits, part.tokens[part.mask])
                logp, p2 = (
                    torch.zeros(part.mask.shape).masked_scatter(part.mask, x)
                    for x in (stats.logp, stats.sum_p2)
                )
                arms = both_advantages(
                    part.rewards, part.mask, logp.detach(), p2.detach(), part.group_ids
                )
                for arm, advantages in arms.items():
                    loss = (advantages * logp).sum() / size
                    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
                    found[arm].append(torch.cat([g.flatten() for g in grads]))
            for arm, gradients in found.items():
                stacked = torch.stack(gradients)
                norms.setdefault((arm, size), []).append(squared_deviations(stacked))
                means[arm] += stacked.mean(0)
    return norms, float(torch.cosine_similarity(means["mean"], means["otb"], dim=0))


def bigram_norms(policies: int, groups: int) -> tuple[Norms, float]:
    """The same of bigram policies, whose gradient is a row of onehot - p."""
    vocabulary, longest, end = 6, 12, 5
    norms: Norms = {}
    means: dict[str, Tensor] = {}
    for seed in range(policies):
        random = torch.Generator().manual_seed(seed)
        logits = torch.randn(vocabulary, vocabulary, generator=random, dtype=torch.float64)
        p = logits.softmax(1)
        for size in SIZES:
            n = groups * size
            tokens = torch.full((n, longest + 1), end)
            tokens[:, 0] = 1
            alive = torch.ones(n, longest + 1, dtype=torch.bool)
            for t in range(longest):
                drawn = torch.multinomial(p[tokens[:, t]], 1, generator=random)[:, 0]
                tokens[:, t + 1] = torch.where(alive[:, t], drawn, end)
                alive[:, t + 1] = alive[:, t] & (tokens[:, t + 1] != end)
            before, after, mask = tokens[:, :-1], tokens[:, 1:], alive[:, :-1]
            rewards = ((after == 0).sum(1) >= 2).double()
            logp = p[before, after].log()
            sum_p2 = p.square().sum(1)[before]
            ids = torch.arange(groups).repeat_interleave(size)
            for arm, advantages in both_advantages(rewards, mask, logp, sum_p2, ids).items():
                scores = torch.nn.functional.one_hot(after, vocabulary) - p[before]
                scores = scores * (advantages * mask)[..., None] / size
                rows = ids[:, None] * vocabulary + before
                table = torch.zeros(groups * vocabulary, vocabulary, dtype=torch.float64)
                table.index_add_(0, rows.flatten(), scores.flatten(0, 1))
                gradients = table.view(groups, -1)
                norms.setdefault((arm, size), []).append(squared_deviations(gradients))
                means.setdefault(arm, torch.zeros(vocabulary**2, dtype=torch.float64))
                means[arm] += gradients.mean(0)
    return norms, float(torch.cosine_similarity(means["mean"], means["otb"], dim=0))


def ratio(norms: Norms, above: tuple[str, int], below: tuple[str, int]) -> tuple[float, ...]:
    """Ratio of two variances, and its bootstrap interval (5 %, 95 %)."""
    random = torch.Generator().manual_seed(0)

    def resampled(values: list[Tensor], prompts: Tensor) -> float:
        picked = [values[i] for i in prompts.tolist()]
        draws = [torch.randint(len(v), (len(v),), generator=random) for v in picked]
        return float(sum(v[d].mean() for v, d in zip(picked, draws, strict=True)))

    draws = []
    for _ in range(400):
        prompts = torch.randint(len(norms[above]), (len(norms[above]),), generator=random)
        draws.append(
            resampled(norms[above], prompts) / max(resampled(norms[below], prompts), 1e-30)
        )
    low, high = torch.tensor(draws).quantile(torch.tensor([0.05, 0.95])).tolist()
    exact = [float(sum(v.mean() for v in norms[key])) for key in (above, below)]
    return exact[0] / exact[1], low, high


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    policy, tokenizer = base_policy()
    prompts, pool = (2, 64) if arguments.quick else (8, 512)
    measured = {
        "bigram": bigram_norms(5, 200 if arguments.quick else 4000),
        "demo, base": demo_norms(policy, tokenizer, prompts, pool),
    }
    if not arguments.quick:
        module, _ = train("--updates", str(UPDATES), "--evaluation.problems", "0", seed=0)
        after = demo_norms(module.policy, tokenizer, prompts, pool)
        measured[f"demo, {UPDATES} updates"] = after
    rows: Rows = []
    for name, (norms, cosine) in measured.items():
        row: dict = {"policy": name, "cosine": cosine}
        for size in SIZES:
            row[f"var mean@{size}"] = float(sum(v.mean() for v in norms["mean", size]))
        pairs = {f"otb/mean @{n}": (("otb", n), ("mean", n)) for n in SIZES}
        pairs |= {f"otb@4/mean@{n}": (("otb", 4), ("mean", n)) for n in (8, 16, 32)}
        for label, (above, below) in pairs.items():
            found = ratio(norms, above, below)
            row[label] = "{:.2f} [{:.2f}, {:.2f}]".format(*found)
            row["values"] = row.get("values", {}) | {label: list(found)}
        rows.append(row)
    matches = [row["values"]["otb@4/mean@32"][0] <= 1 for row in rows]
    word = "holds" if all(matches) else "in part" if any(matches) else "does not hold"
    said = "; ".join(
        f"{row['policy']}: otb@4/mean@32 {row['otb@4/mean@32']}, at equal N = 4 "
        f"{row['otb/mean @4']} and 16 {row['otb/mean @16']}"
        for row in rows
    )
    return rows, f"{word}: ratios of variances: {said}"


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment)
