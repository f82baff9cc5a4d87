"""Trust-region masking: does it train on under a mismatch that takes PPO-clip down?

    python benchmarks/claims/trust_region.py    # what came out: results/claims/trust_region.json

Source: arXiv 2512.23075. The demo's RL (`chain_sum_cpu`, 8 prompts x 16 rollouts, lr 2e-4, one
update a batch, 30 batches), group-relative advantages, no pruning, a constant rate. Two mismatches:

    replica   one engine of four is broken: a quarter of each group's rollouts come from a copy
              whose weights carry noise of their own size, so they are nearly another policy's
    int4      every engine rounds its linear weights to int4: all rollouts are a little off

    ppo_clip  ratio pi / pi_old with pi_old of the trainer: it does not see the mismatch
    trm       the paper's: loss A pi / pi_engine, whole rollouts masked, max k2 <= 0.05 and mean k3
              <= 0.001, divided by all rollouts

Accuracy is held out (64 problems x 4 samples), of the trainer's own policy in fp32; the control is
ppo_clip without mismatch. `kept` is the share of rollouts in the trust region, `mismatch` the mean
|d log p| of sampled tokens, in nats. The noise was chosen so that PPO-clip loses accuracy on seed 0
(0.3 of the weights' size costs it nothing).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from common import Rows, mean_and_error, run_claim, train
from torch import Tensor

from trimtab.rl import PolicyUpdate, Request, RLModule, Sample, TransformersEngine

CLAIM = "TRM trains on under a mismatch that makes PPO-clip collapse (arXiv 2512.23075)"
SHARED = [
    *("--rollout.dtype", "float32", "--update.lr", "2e-4", "--update.advantage", "dr_grpo"),
    *("--update.pruning", "null", "--update.length_rate", "null"),
    *("--evaluation.problems", "64"),
]
INT4 = ["--rollout.quantize_bits", "4"]
PPO = ["--update.loss", "ppo_clip", "--update.trust_region", "null"]
TRM = ["--update.loss", "ratio", "--update.trust_region", "{}"]


class OneReplicaBroken(TransformersEngine):
    """A quarter of each group's rollouts come from weights w (1 + noise), noise ~ N(0, 1)."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.broken = TransformersEngine(*arguments, **options)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        named = list(named_tensors)
        super().update_weights(named, version)
        random = torch.Generator().manual_seed(version)
        noisy = [
            (name, w if w.ndim < 2 else w * (1 + torch.randn(w.shape, generator=random)))
            for name, w in named
        ]
        self.broken.update_weights(noisy, version)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.broken.to(device)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        requests = list(requests)
        n = requests[0].sampling.n
        if n < 4:  # an evaluation
            return super().generate(requests)

        def share(count: int, offset: int) -> list[Request]:
            return [
                replace(r, sampling=replace(r.sampling, n=count, seed=r.sampling.seed + offset))
                for r in requests
            ]

        sound = super().generate(share(n - n // 4, 0))
        broken = self.broken.generate(share(n // 4, 1))
        return [a + b for a, b in zip(sound, broken, strict=True)]


class UpdateIgnoresMismatch(PolicyUpdate):
    def _objective(self, found, part):
        old = part.old_logp.to(part.batch.rollout_logp.dtype)
        return super()._objective(found, replace(part, batch=replace(part.batch, rollout_logp=old)))


class IgnoresMismatch(RLModule):
    """PPO-clip as it is: the objective is told that the engine's log-probs are the trainer's."""

    def _make_policy_update(self):
        return UpdateIgnoresMismatch(self)


class WithReplica(RLModule):
    def _make_engine(self):
        rows = self.config.rollout.max_rows
        return OneReplicaBroken(self.policy, dtype=torch.float32, max_rows=rows)


class IgnoresReplica(IgnoresMismatch, WithReplica):
    pass


ARMS = {
    "no mismatch, ppo_clip": (PPO, IgnoresMismatch),
    "replica, ppo_clip": (PPO, IgnoresReplica),
    "replica, trm": (TRM, WithReplica),
    "int4, ppo_clip": ([*PPO, *INT4], IgnoresMismatch),
    "int4, trm": ([*TRM, *INT4], RLModule),
}


def experiment(arguments: argparse.Namespace) -> tuple[Rows, str]:
    updates = "3" if arguments.quick else "30"
    rows: Rows = []
    accuracies: dict[str, list[float]] = {}
    for name, (options, kind) in ARMS.items():
        for seed in range(arguments.seeds):
            _, found = train(*SHARED, *options, "--updates", updates, seed=seed, module_class=kind)
            mean = lambda key, default, of=found["metrics"]: (
                sum(m.get(key, default) for m in of) / len(of)
            )
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "accuracy": found["accuracy"],
                    "length": found["length"],
                    "kept": mean("trust_region/kept_sequences", 1.0),
                    "mismatch": mean("mismatch/abs_dlogp_mean", 0.0),
                    "rewards": [round(m["reward"], 4) for m in found["metrics"]],
                }
            )
            accuracies.setdefault(name, []).append(found["accuracy"])
    means = {name: mean_and_error(values) for name, values in accuracies.items()}
    said, verdicts = [], []
    for kind in ("replica", "int4"):
        pairs = zip(accuracies[f"{kind}, trm"], accuracies[f"{kind}, ppo_clip"], strict=True)
        gain, error = mean_and_error([a - b for a, b in pairs])
        verdicts.append(gain > 2 * error)
        said.append(f"{kind}: trm minus ppo_clip {gain:+.3f} +- {error:.3f}")
    word = "holds" if all(verdicts) else "in part" if any(verdicts) else "does not hold"
    said += [f"{name} {mean:.3f} +- {error:.3f}" for name, (mean, error) in means.items()]
    return rows, f"{word}: held-out accuracy, {'; '.join(said)}"


if __name__ == "__main__":
    run_claim(__doc__, CLAIM, experiment, full=3, quick=1)
