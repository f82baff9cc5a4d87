"""The flat training record: what the update needs of a batch of rollouts, padded to the longest.

Shapes: P prompts, B rollouts, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Sample


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of several prompts.

    Args:
        prompts: token ids of the P prompts.
        tokens: [B, T] int64, right-padded with 0.
        mask: [B, T] bool, True at a token that the policy sampled; False at a tool's, and at
            padding.
        rollout_logp: [B, T] fp32, the engine's log-probabilities, nats; 0 at padding.
        group_index: [B] int64 in [0, P): prompt of each rollout.
        group_ids: [B] int64: the same over all processes.
        rewards: [B] fp32.
        truncated: [B] bool: cut at the token limit.
        present: [B, T] bool, True at a token, whoever wrote it; None: that is `mask`.
        paths: [B, D] int64: who decoded each segment of a rollout in a tree, -1 behind its end;
            None: no trees.
        greedy_rewards: [P] fp32, of the greedy rollout of each prompt, NaN where it was lost; None:
            there are none.
    """

    prompts: list[list[int]]
    tokens: Tensor
    mask: Tensor
    rollout_logp: Tensor
    group_index: Tensor
    group_ids: Tensor
    rewards: Tensor
    truncated: Tensor
    present: Tensor | None = None
    paths: Tensor | None = None
    greedy_rewards: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def written(self) -> Tensor:
        """[B, T] bool: tokens of each rollout, the policy's and a tool's; no gap in a row."""
        return self.mask if self.present is None else self.present

    def responses(self) -> list[list[int]]:
        """Token ids of each rollout, without padding."""
        rows = zip(self.tokens, self.written, strict=True)
        return [tokens[mask].tolist() for tokens, mask in rows]

    def rows_of_prompts(self, first: int, last: int) -> Tensor:
        """[B] bool: rollouts of the prompts first <= p < last."""
        return (self.group_index >= first) & (self.group_index < last)

    def select(self, rows: Tensor) -> RolloutBatch:
        """The chosen rollouts and their prompts, trimmed to their own longest response.

        Args:
            rows: [B] bool.

        Returns:
            A batch whose group_index counts the prompts that are left; group_ids stay.
        """
        groups, index = torch.unique(self.group_index[rows], return_inverse=True)
        written = self.written[rows]
        width = int(written.sum(-1).max()) if len(written) else 1
        return RolloutBatch(
            [self.prompts[g] for g in groups.tolist()],
            self.tokens[rows, :width],
            self.mask[rows, :width],
            self.rollout_logp[rows, :width],
            index,
            self.group_ids[rows],
            self.rewards[rows],
            self.truncated[rows],
            None if self.present is None else written[:, :width],
            None if self.paths is None else self.paths[rows],
            None if self.greedy_rewards is None else self.greedy_rewards[groups],
        )


def collate(
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    groups: Sequence[Sequence[Sample]],
    rewards: Sequence[Sequence[float | None]],
    device: torch.device | str = "cpu",
    *,
    greedy_rewards: Sequence[float | None] | None = None,
) -> RolloutBatch:
    """Rollouts with a reward as padded tensors; rollouts whose reward was lost are left out.

    Args:
        prompts: token ids of the P prompts.
        prompt_ids: number of each prompt, unique over all processes.
        groups: samples of each prompt.
        rewards: reward of each sample, or None.
        device: of the tensors.
        greedy_rewards: reward of each prompt's greedy rollout, or None; None: there are none.

    Returns:
        The batch; B is 0, and T is 1, when no reward is left.
    """
    kept = [
        (p, sample, reward)
        for p, (samples, scores) in enumerate(zip(groups, rewards, strict=True))
        for sample, reward in zip(samples, scores, strict=True)
        if reward is not None
    ]
    width = max((len(sample.token_ids) for _, sample, _ in kept), default=1)
    tokens = torch.zeros(len(kept), width, dtype=torch.long)
    logp = torch.zeros(len(kept), width, dtype=torch.float32)
    mask = torch.zeros(len(kept), width, dtype=torch.bool)
    present = torch.zeros_like(mask)
    for row, (_, sample, _) in enumerate(kept):
        length = len(sample.token_ids)
        tokens[row, :length] = torch.tensor(sample.token_ids)
        logp[row, :length] = torch.tensor(sample.logprobs, dtype=torch.float32)
        present[row, :length] = True
        mask[row, :length] = torch.tensor(sample.mask) if sample.mask else True
    index = torch.tensor([p for p, _, _ in kept], dtype=torch.long)
    depth = max((len(sample.path) for _, sample, _ in kept), default=0)
    paths = torch.full((len(kept), depth), -1, dtype=torch.long)
    for row, (_, sample, _) in enumerate(kept):
        paths[row, : len(sample.path)] = torch.tensor(sample.path, dtype=torch.long)
    greedy = None
    if greedy_rewards is not None:
        scores = [torch.nan if reward is None else reward for reward in greedy_rewards]
        greedy = torch.tensor(scores, dtype=torch.float32).to(device)
    return RolloutBatch(
        [list(prompt) for prompt in prompts],
        tokens.to(device),
        mask.to(device),
        logp.to(device),
        index.to(device),
        torch.tensor(list(prompt_ids), dtype=torch.long)[index].to(device),
        torch.tensor([r for _, _, r in kept], dtype=torch.float32).to(device),
        torch.tensor([s.finish_reason == "length" for _, s, _ in kept], dtype=torch.bool).to(
            device
        ),
        None if mask.equal(present) else present.to(device),
        paths.to(device) if depth else None,
        greedy,
    )
