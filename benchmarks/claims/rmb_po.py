"""RMB-PO: does optimising a learned reward on more states than were labelled beat DPO?

    python benchmarks/claims/rmb_po.py    # what came out: results/claims/rmb_po.json

Source: arXiv 2312.10584. A linear bandit: states s ~ U[0, 1], 4 actions, reward phi . (1, 2) with
phi = ((a+1) cos(pi s), sin(pi s) / (a+1)). 20 pairs of different actions, drawn by the uniform
policy (which is also the reference), labelled by Bradley-Terry. Policies are softmax(theta . f):

    reward   psi = argmax sum log sigmoid(psi . (phi_w - phi_l))           maximum likelihood
    DPO      theta = argmax sum log sigmoid(beta theta . (f_w - f_l))      (the reference cancels)
    RMB-PO   theta = argmax mean over states of E_pi[psi . phi] - beta KL(pi || reference)
             on the 20 states of the pairs; RMB-PO+ also on states without a label

With f = phi all three have the same maximiser, theta = psi / beta: it is optimal in every state, so
states do not matter, and DPO's likelihood is the reward's (the script checks that the gradient of
RMB-PO is 0 there). The claim can only be about policies whose features are others than the
reward's: as in the authors' script, f swaps sine and cosine. theta has two entries, so each
objective is maximised over a polar grid, refined twice: what is compared are the methods, not
optimizers. The arm `few steps` is the authors' budget instead: from U[0, 1]^2, steps of 1 / root of
the sum of squared gradients, 200 for DPO and 1000 for the others. beta 0.01. The gap is the best
reward minus the policy's, mean over states. RMB-PO+ is measured with 10 states without a label, as
the authors do, and with 100. Errors are of the mean over paired seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from common import Rows, mean_and_error, run_claim
from torch import Tensor
from torch.nn.functional import logsigmoid

BETA, PAIRS, TRUE = 0.01, 20, torch.tensor([1.0, 2.0], dtype=torch.float64)
CLAIM = "optimality gap DPO > RMB-PO > RMB-PO+ over 10 seeds (arXiv 2312.10584)"


def features(states: Tensor, swapped: bool) -> Tensor:
    """[N, 4, 2] of states [N]."""
    a = torch.arange(1, 5, dtype=torch.float64)
    sine, cosine = (torch.pi * states[:, None]).sin(), (torch.pi * states[:, None]).cos()
    if swapped:
        sine, cosine = cosine, sine
    return torch.stack([a * cosine, sine / a], -1)


def maximiser(objective: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    """[2] the best parameter with a norm in [1 / largest, largest], by a grid refined twice."""
    angle, angle_width, radius, radius_width = 0.0, torch.pi, 0.0, math.log(largest)
    for _ in range(3):
        angles = angle + angle_width * torch.linspace(-1, 1, 181, dtype=torch.float64)
        radii = radius + radius_width * torch.linspace(-1, 1, 31, dtype=torch.float64)
        a, r = (x.flatten() for x in torch.meshgrid(angles, radii, indexing="ij"))
        grid = r.exp()[:, None] * torch.stack([a.cos(), a.sin()], -1)
        best = int(objective(grid).argmax())
        angle, radius = float(a[best]), float(r[best])
        angle_width, radius_width = angle_width / 45, radius_width / 7
    return grid[best]


def few_steps(objective: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """[2] after steps of 1 / sqrt(sum of squared gradient norms)."""
    theta, total = start.clone(), 0.0
    for _ in range(steps):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(theta[None]).sum(), theta)
        total += float(gradient.square().sum())
        theta = theta.detach() + gradient / total**0.5
    return theta


def gaps(seed: int, converged: bool) -> dict[str, float]:
    """Optimality gap of each method on one data set, and the check for equal features."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=random, dtype=torch.float64)
    states = draw(PAIRS)
    pairs = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(PAIRS)])
    margins = (features(states, False) @ TRUE).gather(1, pairs)
    wins = draw(PAIRS) < (margins[:, 0] - margins[:, 1]).sigmoid()
    pairs = torch.where(wins[:, None], pairs, pairs.flip(1))

    def likelihood(f: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        chosen = f.gather(1, pairs[..., None].expand(-1, -1, 2))
        difference = chosen[:, 0] - chosen[:, 1]
        return lambda theta: logsigmoid(scale * theta @ difference.T).mean(1)

    def regularised_reward(on: Tensor, swapped: bool = True) -> Callable[[Tensor], Tensor]:
        learned, f = features(on, False) @ psi, features(on, swapped)

        def objective(theta: Tensor) -> Tensor:
            logp = torch.einsum("nad,kd->kna", f, theta).log_softmax(-1)
            return (logp.exp() * (learned - BETA * (logp + math.log(4)))).sum(-1).mean(1)

        return objective

    psi = maximiser(likelihood(features(states, False), 1.0), largest=100.0)
    start, extra = draw(2), draw(100)
    objectives = {
        "dpo": (likelihood(features(states, True), BETA), 200),
        "rmb_po": (regularised_reward(states), 1000),
        "rmb_po_plus": (regularised_reward(torch.cat([states, extra[:10]])), 1000),
        "rmb_po_plus_100": (regularised_reward(torch.cat([states, extra])), 1000),
    }
    held_out = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    true = features(held_out, False) @ TRUE
    found = {}
    for name, (objective, steps) in objectives.items():
        if converged:
            theta = maximiser(objective, largest=100.0 / BETA)
        else:
            theta = few_steps(objective, start, steps)
        policy = (features(held_out, True) @ theta).softmax(-1)
        found[name] = float((true.amax(1) - (policy * true).sum(1)).mean())
    same = (psi / BETA).requires_grad_()
    (gradient,) = torch.autograd.grad(regularised_reward(states, False)(same[None]).sum(), same)
    return found | {"gradient_if_same_features": float(gradient.norm())}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    rows, verdicts = [], []
    for converged in (True, False):
        every = [gaps(seed, converged) for seed in range(arguments.seeds)]
        for seeds in sorted({min(10, arguments.seeds), arguments.seeds}):
            found = every[:seeds]
            row: dict = {"arm": "optimum" if converged else "few steps", "seeds": seeds}
            row |= {name: mean_and_error([f[name] for f in found])[0] for name in found[0]}
            first = mean_and_error([f["dpo"] - f["rmb_po"] for f in found])
            second = mean_and_error([f["rmb_po"] - f["rmb_po_plus"] for f in found])
            row["dpo - rmb_po"] = f"{first[0]:.4f} +- {first[1]:.4f}"
            row["rmb_po - plus"] = f"{second[0]:.4f} +- {second[1]:.4f}"
            rows.append(row | {"by_seed": found})
            verdicts += [mean > 2 * error for mean, error in (first, second)]
    word = "holds" if all(verdicts) else "in part" if any(verdicts) else "does not hold"
    said = "; ".join(
        f"{row['arm']}, {row['seeds']} seeds: {row['dpo - rmb_po']} and {row['rmb_po - plus']}"
        for row in rows
    )
    return rows, f"{word}: DPO - RMB-PO and RMB-PO - RMB-PO+ are, {said}"


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=60, quick=3)
