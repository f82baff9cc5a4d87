"""What decoding a batch of prompts needs, in rows or in trees: prefill, choice, sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .group_cache import GroupCache
from .rollout import FinishReason, Sample, Sampling, truncate_distribution


class Prompts:
    """The prompts of some requests, each once.

    Args:
        model: of the engine, by `ATTENTION`.
        prompts: token ids of each request's prompt, at least one.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.device = model, model.get_input_embeddings().weight.device
        own = [tuple(map(int, prompt)) for prompt in prompts]
        self.ids = list(dict.fromkeys(own))
        place = {ids: p for p, ids in enumerate(self.ids)}
        self.of_request = [place[ids] for ids in own]
        # the last token of a prompt is the first that decoding reads
        self.lengths = torch.tensor([len(ids) - 1 for ids in self.ids], device=self.device)
        self.last = torch.tensor([ids[-1] for ids in self.ids], device=self.device)

    def prefill(self, cache: GroupCache) -> None:
        """Computes the prompts but their last tokens into the cache."""
        longest = max(len(ids) for ids in self.ids) - 1
        if longest:
            tokens = torch.zeros(len(self.ids), longest, dtype=torch.long)
            for row, ids in enumerate(self.ids):
                tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            tokens = tokens.to(self.device)
            self.model(tokens, use_cache=False, logits_to_keep=1, group_cache=cache)


def choose_tokens(
    logits: Tensor, sampling: Sampling, uniform: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """The next token of each row.

    Args:
        logits: [R, V].
        sampling: temperature and truncation.
        uniform: [R] float64 in [0, 1); the token is where the cumulative distribution passes it.
        greedy: [R] bool: takes the most probable token instead.

    Returns:
        Token ids [R] int64 and their log-probabilities [R] fp32, nats.
    """
    chosen, logp = logits.argmax(-1), logits.float()
    if greedy.all():
        logp = logp.log_softmax(-1)
    else:
        sampled_logp = truncate_distribution(logits, sampling)
        cumulative = sampled_logp.double().exp().cumsum(-1)
        # scaled by the total, so that rounding can never put the target beyond the last token
        target = uniform[:, None] * cumulative[:, -1:]
        sampled = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        chosen = torch.where(greedy, chosen, sampled.clamp_max(logits.shape[-1] - 1))
        if greedy.any():
            logp = torch.where(greedy[:, None], logp.log_softmax(-1), sampled_logp)
        else:
            logp = sampled_logp
    return chosen, logp.gather(-1, chosen[:, None]).squeeze(-1)


def finished(ids: list[int], logprobs: list[float], sampling: Sampling, version: int) -> Sample:
    """A rollout of these tokens; whether it was cut is seen by its last one."""
    reason: FinishReason = "stop" if ids[-1] in sampling.stop_token_ids else "length"
    return Sample(ids, logprobs, reason, version)
