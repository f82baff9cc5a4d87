"""ReVal: does it reach pi_ref exp(r / beta) from off-policy data, and does V need its gradient?

    python benchmarks/claims/reval_tree.py    # what came out: results/claims/reval_tree.json

Source: arXiv 2603.23355. A tree of two steps with 3 actions each: 9 trajectories, a table of logits
(3 at the root, 3 x 3 below), V(s1) = logsumexp of the root's. Random reference and rewards. Data:
all trajectories, equally often ("uniform"), or each as often as the policy makes it ("on-policy",
weights without gradient). Plain gradient descent in fp64 until the gradient is below 1e-13; the
error is the largest |log pi - log pi*| over trajectories, in nats, pi* = pi_ref exp(r / beta) / Z.
"""

from __future__ import annotations

import argparse

import torch
from common import Rows, run_claim
from torch import Tensor

from trimtab.stability import reval_loss

CLAIM = (
    "from uniform off-policy data it converges to pi_ref exp(r / beta) if V(s1) keeps its "
    "gradient, and to a wrong policy if it is detached (arXiv 2603.23355)"
)
ACTIONS, BETA = 3, 1.0


def trajectories(root: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [9, 2] of the tokens of all trajectories, and V(s1) [9]."""
    first = root.log_softmax(0).repeat_interleave(ACTIONS)
    logp = torch.stack([first, below.log_softmax(1).flatten()], 1)
    return logp, root.logsumexp(0).expand(ACTIONS**2)


def descend(seed: int, detach: bool, on_policy: bool, steps: int) -> dict[str, float]:
    """Error of the policy that gradient descent ends at."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    reference, reference_value = trajectories(normal(ACTIONS), normal(ACTIONS, ACTIONS))
    rewards = normal(ACTIONS**2)
    target = (reference.sum(1) + rewards / BETA).log_softmax(0)
    tables = [normal(ACTIONS).requires_grad_(), normal(ACTIONS, ACTIONS).requires_grad_()]
    mask = torch.ones_like(reference, dtype=torch.bool)
    for step in range(steps):  # noqa: B007 (reported)
        logp, value = trajectories(*tables)
        loss = reval_loss(
            logp, reference, value, reference_value, rewards, mask, beta=BETA, detach_value=detach
        )
        weight = logp.sum(1).detach().exp() if on_policy else torch.full_like(loss, 1 / len(loss))
        gradients = torch.autograd.grad((weight * loss).sum(), tables)
        with torch.no_grad():
            for table, gradient in zip(tables, gradients, strict=True):
                table -= 0.2 * gradient
        norm = max(float(g.abs().max()) for g in gradients)
        if norm < 1e-13:
            break
    with torch.no_grad():
        logp = trajectories(*tables)[0].sum(1)
    return {"error": float((logp - target).abs().max()), "gradient": norm, "steps": step + 1}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    rows: Rows = []
    for data, detach in (("uniform", False), ("uniform", True), ("on-policy", True)):
        for seed in range(arguments.seeds):
            found = descend(seed, detach, data == "on-policy", 3000 if arguments.quick else 30000)
            value = "detached" if detach else "with gradient"
            rows.append({"data": data, "V(s1)": value, "seed": seed} | found)
    kept, detached, own = (
        [r["error"] for r in rows[i : i + arguments.seeds]]
        for i in range(0, len(rows), arguments.seeds)
    )
    word = "holds" if max(kept) < 1e-6 and min(detached) > 1e-2 else "does not hold"
    return rows, (
        f"{word}: error {min(kept):.1e} to {max(kept):.1e} nats with the gradient, "
        f"{min(detached):.2f} to {max(detached):.2f} without; without it on-policy "
        f"{min(own):.1e} to {max(own):.1e}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
