"""A buffer of the newest trajectories, for updates that may take them from any policy (ReVal).

Every process holds the whole buffer and draws the same sample of it, of which it takes its share:
so two processes replay what one would.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .batch import RolloutBatch


class Trajectory(NamedTuple):
    """One rollout of an earlier update.

    Args:
        prompt_ids: token ids of the prompt.
        token_ids: of the response.
        target: what the loss fits: the reward, centred by the group it came with.
        reward: as it was given.
        truncated: cut at the token limit.
        rollout_logp: the engine's log-probs, nats.
        mask: where the policy sampled the token.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    target: float
    reward: float
    truncated: bool
    rollout_logp: tuple[float, ...]
    mask: tuple[bool, ...]


class ReplayBuffer:
    """First in, first out.

    Args:
        size: trajectories kept, >= 1.

    Raises:
        ValueError: size is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: expected a count >= 1, got {size}")
        self.size = size
        self._kept: deque[Trajectory] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self, batch: RolloutBatch, targets: Tensor, process_group: ProcessGroup | None = None
    ) -> None:
        """Appends the rollouts of a batch, in the order of the processes.

        Args:
            batch: B rollouts of this process.
            targets: [B], of `Trajectory`.
            process_group: every one of its ranks must call, and gets the rollouts of all.
        """
        rows = zip(
            batch.group_index.tolist(),
            batch.responses(),
            targets.tolist(),
            batch.rewards.tolist(),
            batch.truncated.tolist(),
            batch.rollout_logp.cpu(),
            batch.mask.cpu(),
            strict=True,
        )
        own = [
            Trajectory(
                tuple(batch.prompts[p]),
                tuple(ids),
                target,
                reward,
                cut,
                tuple(logp[: len(ids)].tolist()),
                tuple(mask[: len(ids)].tolist()),
            )
            for p, ids, target, reward, cut, logp, mask in rows
        ]
        if process_group is None:
            self._kept.extend(own)
            return
        gathered: list[list[Trajectory]] = [[] for _ in range(dist.get_world_size(process_group))]
        dist.all_gather_object(gathered, own, group=process_group)
        for part in gathered:
            self._kept.extend(Trajectory(*row) for row in part)

    def sample(
        self,
        count: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> tuple[RolloutBatch, Tensor]:
        """Trajectories drawn uniformly without repeats.

        Args:
            count: over all processes; fewer when there are fewer.
            seed: of the draw; the same on every process.
            rank: of this process.
            world: processes; each takes a share that differs by one at most.
            device: of the tensors.

        Returns:
            The batch, whose groups are prompts, not the groups they were centred in; and [B]
            targets. B may be 0.
        """
        chosen = random.Random(seed).sample(range(len(self._kept)), min(count, len(self._kept)))
        rows = [self._kept[i] for i in chosen[rank::world]]
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        width = max((len(row.token_ids) for row in rows), default=1)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        logp = torch.zeros(len(rows), width, dtype=torch.float32)
        present = torch.zeros(len(rows), width, dtype=torch.bool)
        mask = torch.zeros_like(present)
        for i, row in enumerate(rows):
            present[i, : len(row.token_ids)] = True
            mask[i, : len(row.token_ids)] = torch.tensor(row.mask)
            tokens[i, : len(row.token_ids)] = torch.tensor(row.token_ids)
            logp[i, : len(row.token_ids)] = torch.tensor(row.rollout_logp, dtype=torch.float32)
        index = torch.tensor([place[row.prompt_ids] for row in rows], dtype=torch.long)
        batch = RolloutBatch(
            [list(prompt) for prompt in prompts],
            tokens.to(device),
            mask.to(device),
            logp.to(device),
            index.to(device),
            index.to(device),
            torch.tensor([row.reward for row in rows], dtype=torch.float32).to(device),
            torch.tensor([row.truncated for row in rows], dtype=torch.bool).to(device),
            None if mask.equal(present) else present.to(device),
        )
        return batch, torch.tensor([row.target for row in rows], dtype=torch.float32).to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything kept, as flat tensors, oldest first; for `torch.load(weights_only=True)`.

        Returns:
            Prompts once each (`prompts`, `prompt_lengths`), then for each trajectory its prompt,
            tokens, log-probs, mask, target, reward and whether it was truncated.
        """
        rows = list(self._kept)
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        flat = {
            "prompts": [token for prompt in prompts for token in prompt],
            "prompt_lengths": [len(prompt) for prompt in prompts],
            "prompt_of_row": [place[row.prompt_ids] for row in rows],
            "tokens": [token for row in rows for token in row.token_ids],
            "lengths": [len(row.token_ids) for row in rows],
        }
        state = {name: torch.tensor(values, dtype=torch.int64) for name, values in flat.items()}
        state["rollout_logp"] = torch.tensor(
            [x for row in rows for x in row.rollout_logp], dtype=torch.float32
        )
        for name in ("target", "reward"):
            state[name] = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float32)
        state["truncated"] = torch.tensor([row.truncated for row in rows], dtype=torch.bool)
        state["mask"] = torch.tensor([x for row in rows for x in row.mask], dtype=torch.bool)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned; of more than `size` the newest.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: other keys, or sizes that do not fit together; nothing is restored then.
        """
        expected = ReplayBuffer(1).state_dict().keys()
        if state.keys() != expected:
            raise ValueError(f"expected state with keys {sorted(expected)}, got {sorted(state)}")
        lengths, prompt_lengths = state["lengths"].tolist(), state["prompt_lengths"].tolist()
        rows = len(lengths)
        sizes = dict.fromkeys(("tokens", "rollout_logp", "mask"), sum(lengths))
        sizes["prompts"] = sum(prompt_lengths)
        sizes |= dict.fromkeys(("prompt_of_row", "target", "reward", "truncated"), rows)
        for name, size in sizes.items():
            if len(state[name]) != size:
                raise ValueError(f"expected {size} entries of {name}, got {len(state[name])}")
        prompts = [tuple(part.tolist()) for part in state["prompts"].split(prompt_lengths)]
        columns = zip(
            [prompts[i] for i in state["prompt_of_row"].tolist()],
            [tuple(part.tolist()) for part in state["tokens"].split(lengths)],
            state["target"].tolist(),
            state["reward"].tolist(),
            state["truncated"].tolist(),
            [tuple(part.tolist()) for part in state["rollout_logp"].split(lengths)],
            [tuple(part.tolist()) for part in state["mask"].split(lengths)],
            strict=True,
        )
        self._kept = deque((Trajectory(*row) for row in columns), maxlen=self.size)
