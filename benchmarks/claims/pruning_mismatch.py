"""Vocabulary pruning: is the mismatch of two engines in the tail, and does pruning remove it?

    python benchmarks/claims/pruning_mismatch.py
    # what came out: results/claims/pruning_mismatch.json

Source: arXiv 2512.23087 (abstract read; the bound is derived). The trainer is the demo's base
policy in fp32, the engines are copies of it: bf16, weights rounded to int8, weights rounded to
int4 (both computing in fp32). |d| = |log p_trainer - log p_engine|, in nats, mean by the trainer's
probability without pruning.

    vocabulary   every token of the vocabulary (64) at every position of the engine's rollouts.
                 The bound is 2 eps (1 - p), eps the largest difference of two logits at that
                 position; `beyond bound` counts tokens above it, with the smaller of the two p
                 (a mean-value argument holds for some p between them). Pruned: tokens in both
                 safe sets, each side normalised over its own; the bound is derived for one set
                 and promises nothing where two engines' sets differ.
    sampled      the tokens that the engine sampled, by the log-probabilities it reported. Pruned:
                 sampling and trainer prune with their own logits, at the same rho; a sampled token
                 outside the trainer's set is forced into it (the package's default).

rho is exp(-13), the package's default, and two larger ones: 64 characters have a short tail.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from common import Rows, base_policy, demo_config, rollouts, run_claim
from torch import Tensor

from trimtab.rl import RolloutBatch, response_logits
from trimtab.rl.model_copy import quantize_weights_
from trimtab.triton_kernels.token_stats import token_stats

CLAIM = (
    "a token's mismatch is at most 2 eps (1 - p), so it sits in the tail; with both sides pruned "
    "it is smaller (arXiv 2512.23087)"
)
ENGINES = {
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantize_bits": 8},
    "int4": {"dtype": torch.float32, "quantize_bits": 4},
}
RHOS = {"off": None, "e^-13": math.exp(-13), "e^-9": math.exp(-9), "0.01": 0.01}
EDGES = torch.tensor([1e-6, 1e-4, 1e-2, 0.1, 0.5])
NAMES = ("<1e-6", "<1e-4", "<0.01", "<0.1", "<0.5", ">0.5")


def rounded_copy(policy, dtype: torch.dtype, quantize_bits: int | None = None):
    """The policy as the engine computes with it, callable as a model."""
    model = copy.deepcopy(policy)
    for parameter in model.parameters():  # buffers stay: bf16 rotary frequencies would be wrong
        parameter.data = parameter.data.to(dtype)
    if quantize_bits is not None:
        quantize_weights_(model, quantize_bits)
    return model


def logits_of(model, batch: RolloutBatch) -> Tensor:
    """[N, V] fp32 of the response tokens."""
    parts = [batch.select(batch.group_index == g) for g in range(len(batch.prompts))]
    return torch.cat(
        [response_logits(model, p.prompts, p.tokens, p.mask, p.group_index).float() for p in parts]
    )


def by_bucket(difference: Tensor, p: Tensor) -> dict:
    """Mean of |d| in each bucket of p, over all, and the largest; counts are listed."""
    bucket = torch.bucketize(p, EDGES, right=True)
    found: dict = {
        name: float(difference[bucket == i].mean()) if (bucket == i).any() else math.nan
        for i, name in enumerate(NAMES)
    }
    counts = [int((bucket == i).sum()) for i in range(len(NAMES))]
    return found | {"mean": float(difference.mean()), "max": float(difference.max()), "n": counts}


def over_vocabulary(trainer: Tensor, engine: Tensor, rho: float | None) -> dict:
    """Of logits [N, V] each: mismatch of every token, and how often it is beyond the bound."""
    p = trainer.log_softmax(-1)
    kept = torch.ones_like(p, dtype=torch.bool)
    sides = []
    for z in (trainer.double(), engine.double()):
        if rho is not None:
            own = z >= z.amax(-1, keepdim=True) + math.log(rho)
            kept, z = kept & own, z.masked_fill(~own, -torch.inf)
        sides.append(z.log_softmax(-1))
    difference = (sides[0] - sides[1])[kept].abs()
    eps = (trainer - engine).double().abs().amax(-1, keepdim=True).expand_as(p)[kept]
    bound = 2 * eps * (1 - torch.minimum(*sides)[kept].exp())
    beyond = int((difference > bound * (1 + 1e-9) + 1e-12).sum())
    share = float((difference / bound.clamp_min(1e-12)).mean())
    return by_bucket(difference, p.exp()[kept]) | {
        "beyond bound": beyond,
        "mean share of bound": share,
        "tokens kept": float(kept.double().mean()),
    }


def over_samples(trainer: Tensor, batch: RolloutBatch, rho: float | None) -> tuple[dict, Tensor]:
    """Mismatch of the tokens that were sampled, and each one's |d| [N]."""
    labels = batch.tokens[batch.mask]
    stats = token_stats(trainer, labels, prune=rho)
    difference = (stats.logp - batch.rollout_logp[batch.mask]).abs()
    outside = 0.0 if rho is None else float((~stats.in_safe_set).float().mean())
    row = by_bucket(difference, token_stats(trainer, labels).logp.exp())
    return row | {"outside the trainer's set": outside}, difference


@torch.no_grad()
def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    policy, tokenizer = base_policy()
    prompts, n = (range(2), 32) if arguments.quick else (range(24), 128)
    vocabulary, sampled, said = [], [], []
    bound_holds, lower, beyond = True, [], 0
    for engine, options in ENGINES.items():
        copied, plain = rounded_copy(policy, **options), None
        for name, rho in RHOS.items():
            pruning = "null" if rho is None else f"{{rho: {rho}}}"
            config = demo_config("--update.pruning", pruning)
            batch = rollouts(policy, tokenizer, config, prompts, n, **options)
            trainer = logits_of(policy, batch)
            where = {"engine": engine, "rho": name}
            found = over_vocabulary(trainer, logits_of(copied, batch), rho)
            vocabulary.append({"of": "vocabulary"} | where | found)
            row, difference = over_samples(trainer, batch, rho)
            error = float(difference.std() / len(difference) ** 0.5)
            sampled.append({"of": "sampled"} | where | row | {"error of mean": error})
            if rho is None:
                bound_holds &= found["beyond bound"] == 0
                plain = (row["mean"], error)
            else:
                beyond += found["beyond bound"]
                gain, both = plain[0] - row["mean"], (plain[1] ** 2 + error**2) ** 0.5
                lower.append(gain > 2 * both)
                said.append(f"{engine} {name} {gain / plain[0]:+.1%} +- {both / plain[0]:.1%}")
    unpruned = [r for r in vocabulary if r["rho"] == "off"]
    tail = {r["engine"]: r["<0.01"] > r["<0.5"] > r[">0.5"] for r in unpruned}
    word = "holds" if bound_holds and all(tail.values()) and all(lower) else "in part"
    if not bound_holds and not any(lower):
        word = "does not hold"
    falls = ", ".join(f"{name}: {'yes' if found else 'no'}" for name, found in tail.items())
    return vocabulary + sampled, (
        f"{word}: the bound is {'never' if bound_holds else 'sometimes'} exceeded without pruning, "
        f"{beyond} times with it; mismatch below p = 0.01 > in 0.1-0.5 > above 0.5 ({falls}); "
        f"pruning lowers the sampled mean by {', '.join(said)}"
    )


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment)
