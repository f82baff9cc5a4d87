"""Balanced aggregation: what do the rules do when length goes with the sign of the advantage?

    python benchmarks/claims/balanced_aggregation.py
    # what came out: results/claims/balanced_aggregation.json

Source: arXiv 2605.04077 (read in part). A policy of 5 parameters writes: a strategy (short or
long), filler tokens, each followed by "go on" or "stop" (mean length 8 for short, 8 x gap for long
at the start), and an answer, right or not. It is right 70 % of the time after a short text and 30 %
after a long one, plus a difficulty of the prompt ~ N(0, 1) on the logit. Within a strategy the
length says nothing about the reward, so the true gradient of the two stop logits is 0. 8 prompts x
8 rollouts a batch, advantage = reward - group mean, update = sum over tokens w A grad log pi.

    coupling    sum(w A), its root mean square over batches: 0 means lengths add nothing
    cosine      of the mean update and the true gradient (exact, by the policy's own formula)
    drift       norm of the mean update's two stop logits over that of the other three: length bias
    noise       root mean squared deviation of the update over the norm of its mean
    after 150   accuracy and mean lengths of the two strategies after 150 updates, from the same
                start, at rates at which every rule's first update has the same norm in the mean;
                mean of 12 runs
    coin        the same 150 updates when the reward is a coin: mean and deviation of the change of
                log mean length, which carries no information then
"""

from __future__ import annotations

import argparse
import math

import torch
from common import Rows, mean_and_error, run_claim
from torch import Tensor

from trimtab.stability import aggregation_weights, dr_grpo_advantages

CLAIM = (
    "balanced has no sign-length coupling, unlike token_mean, less length bias than seq_mean, and "
    "so learns better than both (arXiv 2605.04077)"
)
RULES = ("balanced", "seq_mean", "token_mean", "token_mean_group")
PROMPTS, GROUP, RATE = 8, 8, 0.15
IDS = torch.arange(PROMPTS).repeat_interleave(GROUP)


def start(gap: float) -> Tensor:
    """[5]: strategy, stop of short, stop of long, answer of short, answer of long; logits."""
    stop = lambda length: -math.log(length - 1)  # mean number of filler tokens = length
    answer = math.log(0.7 / 0.3)
    return torch.tensor([0.0, stop(8.0), stop(8.0 * gap), answer, -answer], dtype=torch.float64)


def sample(theta: Tensor, random: torch.Generator, coin: bool) -> tuple[Tensor, ...]:
    """Scores [B, 5] (sums over tokens), lengths [B] and rewards [B] of a batch."""
    b = PROMPTS * GROUP
    draw = lambda: torch.rand(b, generator=random, dtype=torch.float64)
    difficulty = torch.randn(PROMPTS, generator=random, dtype=torch.float64)[IDS]
    long = (draw() < theta[0].sigmoid()).long()
    p_stop = theta[1 + long].sigmoid()
    went_on = (draw().log() / (-p_stop).log1p()).floor().clamp_max(4000)  # geometric, from 0
    p_right = (theta[3 + long] + difficulty).sigmoid()
    right = (draw() < p_right).double()
    scores = torch.zeros(b, 5, dtype=torch.float64)
    scores[:, 0] = long - theta[0].sigmoid()
    scores.scatter_(1, 1 + long[:, None], (1 - p_stop - went_on * p_stop)[:, None])
    scores.scatter_(1, 3 + long[:, None], (right - p_right)[:, None])
    rewards = (draw() < 0.5).double() if coin else right
    return scores, went_on.long() + 3, rewards


def update(batch: tuple[Tensor, ...], rule: str) -> tuple[Tensor, Tensor]:
    """The update [5] and its coupling."""
    scores, lengths, rewards = batch
    advantages = dr_grpo_advantages(rewards, IDS)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    weights = aggregation_weights(mask, IDS, advantages, rule=rule)
    weighted = weights[:, 0] * advantages  # one weight for all tokens of a response
    return (weighted[:, None] * scores).sum(0), (weighted * lengths).sum()


def accuracy(theta: Tensor) -> Tensor:
    """Exact to a quadrature over the difficulty."""
    z = torch.linspace(-5, 5, 201, dtype=torch.float64)
    density = (-z.square() / 2).softmax(0)
    right = (theta[3:, None] + z).sigmoid() @ density
    return right[0] * (1 - theta[0].sigmoid()) + right[1] * theta[0].sigmoid()


def run(gap: float, rule: str, scale: float, seed: int, updates: int, coin: bool) -> Tensor:
    """Parameters after some updates."""
    theta, random = start(gap), torch.Generator().manual_seed(seed)
    for _ in range(updates):
        theta = theta + RATE * scale * update(sample(theta, random, coin), rule)[0]
        theta[1:3] = theta[1:3].clamp(-6, 6)  # mean lengths up to 400
    return theta


def log_lengths(theta: Tensor) -> Tensor:
    return (1 + (-theta[1:3]).exp()).log()


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    batches, updates = (100, 10) if arguments.quick else (2000, 150)
    rows: Rows = []
    for gap in (1, 2, 4, 8):
        theta = start(gap).requires_grad_()
        (true,) = torch.autograd.grad(accuracy(theta), theta)
        theta = theta.detach()
        random = torch.Generator().manual_seed(0)
        drawn = [sample(theta, random, False) for _ in range(batches)]
        for rule in RULES:
            found = [update(batch, rule) for batch in drawn]
            every, coupling = (torch.stack(x) for x in zip(*found, strict=True))
            mean = every.mean(0)
            noise = (every - mean).square().sum(1).mean().sqrt() / mean.norm()
            scale = float(true.norm() / mean.norm())
            ends = [run(gap, rule, scale, s, updates, False) for s in range(arguments.seeds)]
            coins = [run(gap, rule, scale, s, updates, True) for s in range(arguments.seeds)]
            change = torch.stack([(log_lengths(e) - log_lengths(theta)).mean() for e in coins])
            lengths = torch.stack([log_lengths(e).exp() for e in ends]).mean(0).tolist()
            value, error = mean_and_error([float(accuracy(e)) for e in ends])
            rows.append(
                {
                    "gap": gap,
                    "rule": rule,
                    "coupling": float(coupling.square().mean().sqrt()),
                    "cosine": float(torch.cosine_similarity(mean, true, dim=0)),
                    "drift": float(mean[1:3].norm() / mean[[0, 3, 4]].norm()),
                    "noise": float(noise),
                    f"accuracy after {updates}": value,
                    "its error": error,
                    "short": lengths[0],
                    "long": lengths[1],
                    "coin: change": float(change.mean()),
                    "coin: deviation": float(change.std()) if len(change) > 1 else math.nan,
                }
            )
    by = {(r["gap"], r["rule"]): r for r in rows}
    gaps = (2, 4, 8)
    coupled = all(by[g, "balanced"]["coupling"] < by[g, "token_mean"]["coupling"] for g in gaps)
    biased = all(by[g, "balanced"]["drift"] < by[g, "seq_mean"]["drift"] for g in gaps)
    key = f"accuracy after {updates}"
    learns = all(
        by[g, "balanced"][key] > max(by[g, other][key] for other in ("seq_mean", "token_mean"))
        for g in gaps
    )
    parts = (coupled, biased, learns)
    word = "holds" if all(parts) else "in part" if any(parts) else "does not hold"
    said = "; ".join(
        f"{name} at gaps 2, 4, 8: "
        + ", ".join(choose(RULES, key=lambda rule: by[g, rule][column]) for g in gaps)
        for name, column, choose in (
            ("nearest to the true gradient", "cosine", max),
            ("least drift", "drift", min),
            (f"most accurate after {updates} updates", key, max),
        )
    )
    return rows, (
        f"{word}: coupling below token_mean's at gaps 2, 4, 8: {coupled}, drift of the length "
        f"below seq_mean's: {biased}, more accurate than both: {learns}; over all rules, {said}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=12, quick=2)
