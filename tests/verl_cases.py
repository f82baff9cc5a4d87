"""What the parity tests with verl 0.9.1 share: its modules, and batches in both forms.

CI has no verl, so the files that import this one are skipped there. verl pins an older
transformers, which the functions called here do not need: `make test-verl` installs it into a
folder of its own and runs them.

`test_difference_...` pins a difference; its docstring says whether it is a bug or a convention.
Not in our menus and so not here: GAE, GDPO, pass@k, GPG; sapo, clip_cov, kl_cov, geo_mean, dro.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("verl")
core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
corr = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
configs = pytest.importorskip("verl.workers.config", exc_type=ImportError)

NAN, INF = float("nan"), float("inf")
seeds = given(seed=st.integers(0, 2**20))
few = settings(deadline=None, max_examples=25)


class Batch(NamedTuple):
    """Rows of several prompts in random order, fp64; every row has a token, every group two rows.

    Args:
        mask: [B, T] bool.
        ids: [B] int64.
        logp: [B, T] of the policy.
        old: [B, T] of the policy before, or of the rollout engine.
        sum_p2: [B, T] of the policy's distribution.
        outcome: [B] rewards.
        dense: [B, T] rewards at generated tokens, 0 elsewhere.
        weights: [B, T] positive, at most 2.
    """

    mask: Tensor
    ids: Tensor
    logp: Tensor
    old: Tensor
    sum_p2: Tensor
    outcome: Tensor
    dense: Tensor
    weights: Tensor

    @property
    def sparse(self) -> Tensor:
        """[B, T] the outcome at the last generated token."""
        return at_last_token(self.outcome, self.mask)

    @property
    def uid(self) -> np.ndarray:
        """The ids as verl has them: strings."""
        return uid_of(self.ids)

    @property
    def ints(self) -> Tensor:
        """The mask as verl has it."""
        return self.mask.long()


def uid_of(ids: Tensor) -> np.ndarray:
    return np.array([f"prompt-{i}" for i in ids.tolist()], dtype=object)


def at_last_token(outcome: Tensor, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    column = torch.arange(mask.shape[1]) == last[:, None]
    return torch.where(column & mask, outcome[:, None], 0.0)


def batch(seed: int, *, gaps: bool = True, spread: float = 0.5) -> Batch:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 6, (int(torch.randint(1, 5, (), generator=g)),), generator=g)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 3 - 2, sizes)
    ids = ids[torch.randperm(len(ids), generator=g)]
    b, t = len(ids), int(torch.randint(1, 13, (), generator=g))
    lengths = torch.randint(1, t + 1, (b, 1), generator=g)
    mask = torch.arange(t) < lengths
    if gaps:  # a tool's tokens, at the start and at the end too
        first = torch.arange(t) == (torch.rand(b, 1, generator=g) * lengths).long()
        mask = mask & ((torch.rand(b, t, generator=g) < 0.7) | first)
    logits = 3 * torch.randn(b, t, 7, generator=g, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    logp = log_p[..., 0]
    noise = spread * torch.randn(b, t, generator=g, dtype=torch.float64)
    outcome = torch.randn(b, generator=g, dtype=torch.float64)
    dense = torch.randn(b, t, generator=g, dtype=torch.float64) * mask
    weights = 2 * torch.rand(b, t, generator=g, dtype=torch.float64)
    old = (logp - noise).clamp_max(-1e-6)
    return Batch(mask, ids, logp, old, log_p.exp().square().sum(-1), outcome, dense, weights)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=tolerance, atol=tolerance, equal_nan=False
    )
