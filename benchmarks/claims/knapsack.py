"""Knapsack RL: how many more groups give a gradient when the same budget goes where it counts?

    python benchmarks/claims/knapsack.py    # what came out: results/claims/knapsack.json

Source: arXiv 2509.25849. A prompt's group gives a gradient only if its outcomes are mixed. Budget:
8 rollouts a prompt in the mean, 2 to 128 each (`allocate_budget`); uniform: 8 each. Success rates:

    demo, base / 12 updates    128 prompts of the demo, by its policy before and after RL
    Beta(a, b)                 2000 prompts, U-shaped, skewed to hard, and uniform

Two ways to know the rates. `known`: the true ones allocate (of the demo: those of 64 rollouts); an
upper limit. `estimated`: 8 earlier rollouts of each prompt allocate, as in training; rates of 0 and
1 then are often wrong. Both are scored by the true rates, exactly: `mixed` is the expected share of
groups with mixed outcomes, `effective` that of rollouts which are in a mixed group (the paper's
ratio), 1 - p^N - (1-p)^N averaged over prompts and over rollouts; `value` is what the knapsack
maximises, sum of [1 - p^N - (1-p)^N] p (1-p)^2. `needed` is the uniform budget, as a multiple of
this one, that reaches the knapsack's number of effective groups; - if more than 16.
"""

from __future__ import annotations

import argparse

import torch
from common import Rows, base_policy, demo_config, rollouts, run_claim, train
from torch import Tensor

from trimtab.rl.budget import allocate_budget

CLAIM = (
    "+20..40 % effective gradients at an equal budget, about half the compute (arXiv 2509.25849)"
)
MEAN, LOW, HIGH, UPDATES = 8, 2, 128, 12


def demo_rates(policy, tokenizer, prompts: int, n: int) -> Tensor:
    """Success rates [prompts] from n fp32 rollouts each."""
    config = demo_config("--update.pruning", "null")
    means = []
    for first in range(0, prompts, 8):
        numbers = range(first, min(prompts, first + 8))
        batch = rollouts(policy, tokenizer, config, numbers, n, dtype=torch.float32)
        means.append(batch.rewards.view(-1, n).mean(1))
    return torch.cat(means).double()


def mixed(p: Tensor, n: Tensor) -> Tensor:
    """Probability that n outcomes are not all the same."""
    return 1 - p.pow(n) - (1 - p).pow(n)


def scored(p: Tensor, n: Tensor) -> dict[str, float]:
    """What an allocation gives at the true rates."""
    chance = mixed(p, n)
    return {
        "mixed": float(chance.mean()),
        "effective": float((chance * n).sum() / n.sum()),
        "value": float((chance * p * (1 - p).square()).sum()),
    }


def compared(name: str, p: Tensor, knowledge: str, seed: int) -> dict:
    """The knapsack's allocation and the uniform one."""
    budget, rates = MEAN * len(p), p
    if knowledge == "estimated":
        random = torch.Generator().manual_seed(seed)
        outcomes = torch.rand(len(p), MEAN, generator=random, dtype=torch.float64) < p[:, None]
        rates = outcomes.double().mean(1)
    allocated = allocate_budget(rates.float(), budget, low=LOW, high=HIGH)
    assert int(allocated.sum()) == budget
    ours, uniform = scored(p, allocated), scored(p, torch.full_like(allocated, MEAN))
    row: dict = {"rates": name, "knowledge": knowledge, "prompts": len(p)}
    row |= {"rates 0 or 1": float(((rates == 0) | (rates == 1)).double().mean())}
    for key in ours:
        row[f"{key} uniform"] = uniform[key]
        row[f"{key} gain"] = ours[key] / uniform[key] - 1
    multiples = [m / 8 for m in range(1, 129)]
    enough = [
        m for m in multiples if float(mixed(p, torch.tensor(MEAN * m)).mean()) >= ours["mixed"]
    ]
    row["needed"] = enough[0] if enough else "-"
    row["largest"] = int(allocated.max())
    return row


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    policy, tokenizer = base_policy()
    prompts, n, size = (8, 16, 200) if arguments.quick else (128, 64, 2000)
    rates = {"demo, base": demo_rates(policy, tokenizer, prompts, n)}
    if not arguments.quick:
        module, _ = train("--updates", str(UPDATES), "--evaluation.problems", "0", seed=0)
        rates[f"demo, {UPDATES} updates"] = demo_rates(module.policy, tokenizer, prompts, n)
    torch.manual_seed(0)
    for a, b in ((0.3, 0.3), (0.3, 1.0), (1.0, 1.0)):
        drawn = torch.distributions.Beta(a, b).sample((size,)).double()
        rates[f"Beta({a}, {b})"] = drawn
    rows = [
        compared(name, p, knowledge, seed=1)
        for name, p in rates.items()
        for knowledge in ("known", "estimated")
    ]
    gains = {(r["rates"], r["knowledge"]): r["effective gain"] for r in rows}
    estimated = [gain for (_, knowledge), gain in gains.items() if knowledge == "estimated"]
    word = (
        "holds"
        if min(estimated) >= 0.2
        else "in part"
        if max(estimated) >= 0.2
        else "does not hold"
    )
    said = "; ".join(
        f"{name}, {knowledge} {gain:+.0%}" for (name, knowledge), gain in gains.items()
    )
    groups = ", ".join(f"{r['mixed gain']:+.0%}" for r in rows if r["knowledge"] == "estimated")
    return rows, (
        f"{word}: effective rollouts at equal budget: {said}; mixed groups, estimated: {groups}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment)
