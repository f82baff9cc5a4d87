"""ReMax: when does the greedy baseline lower the variance of the policy gradient?

    python benchmarks/claims/remax_bandit.py    # what came out: results/claims/remax_bandit.json

Source: arXiv 2310.10505. Two arms with rewards r1 > r2, policy softmax of two logits, p = p(a1).
ReMax's estimate is (r(a) - r(greedy arm)) grad log p(a). Its variance, trace of the covariance over
the draw of the arm, is enumerated exactly on a grid of (p, r1, r2), with and without the baseline,
and `lower` is compared with the claim's inequality. Points at which the two variances, or the two
sides of the inequality, agree to 1e-12 are counted as ties and left out. The grid is split by the
signs of the rewards and by which arm is greedy: a claim about rewards is worth knowing with its
conditions.
"""

from __future__ import annotations

import argparse

import torch
from common import Rows, run_claim
from torch import Tensor

CLAIM = "greedy baseline lowers the variance iff p(a1) < 1/2 + r2 / (2 (r1 - r2)) (2310.10505)"


def variance(p: Tensor, rewards: Tensor, baseline: Tensor) -> Tensor:
    """[N] trace of the covariance of (r - b) grad log p(a) over the draw of a; rewards [N, 2]."""
    probability = torch.stack([p, 1 - p], 1)
    scores = torch.eye(2, dtype=p.dtype) - probability[:, None, :]  # [N, arm, logit]
    estimates = (rewards - baseline[:, None])[..., None] * scores
    mean = (probability[..., None] * estimates).sum(1, keepdim=True)
    return (probability[..., None] * (estimates - mean).square()).sum((1, 2))


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    steps = 21 if arguments.quick else 81
    probabilities = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    values = torch.linspace(-2, 2, steps, dtype=torch.float64)
    p, r1, r2 = (x.flatten() for x in torch.meshgrid(probabilities, values, values, indexing="ij"))
    p, r1, r2 = (x[r1 > r2 + 1e-9] for x in (p, r1, r2))
    decided = (p - 0.5).abs() > 1e-9  # at 1/2 no arm is the greedy one
    p, r1, r2 = p[decided], r1[decided], r2[decided]
    rewards = torch.stack([r1, r2], 1)
    greedy = torch.where(p > 0.5, r1, r2)
    change = variance(p, rewards, greedy) - variance(p, rewards, torch.zeros_like(p))
    side = p - (0.5 + r2 / (2 * (r1 - r2)))
    tied = (change.abs() < 1e-12) | (side.abs() < 1e-12)
    agrees = (change < 0) == (side < 0)
    signs = {
        "both > 0": r2 > 1e-9,
        "r1 > 0 = r2": (r1 > 1e-9) & (r2.abs() <= 1e-9),
        "r1 > 0 > r2": (r1 > 1e-9) & (r2 < -1e-9),
        "both <= 0": r1 <= 1e-9,
    }
    rows: Rows = []
    for name, chosen in signs.items():
        for arm, is_greedy in (("a1", p > 0.5), ("a2", p < 0.5)):
            here = chosen & is_greedy & ~tied
            rows.append(
                {
                    "rewards": name,
                    "greedy arm": arm,
                    "points": int(here.sum()),
                    "ties": int((chosen & is_greedy & tied).sum()),
                    "agree": int((here & agrees).sum()),
                    "variance lower": int((here & (change < 0)).sum()),
                }
            )
    wrong = [f"{r['rewards']}, {r['greedy arm']}" for r in rows if r["agree"] < r["points"]]
    positive = all(r["agree"] == r["points"] for r in rows[:2])
    word = "does not hold" if not positive else "in part" if wrong else "holds"
    points = sum(r["points"] for r in rows[:2])
    return rows, (
        f"{word}: {'at' if positive else 'not at'} every one of the {points} points where both "
        f"rewards are positive; fails somewhere in each of ({'; '.join(wrong) or 'none'})"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment)
