"""What vLLM does with a request, in this process or behind a server."""

from __future__ import annotations

from .rollout import FinishReason, Sampling

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0  # of vLLM: raises smaller ones, refuses larger


def finish_reason(ids: list[int], sampling: Sampling) -> FinishReason:
    """Why a rollout ended, by its tokens, since only our stop tokens may end one.

    Args:
        ids: its token ids.
        sampling: of its request.

    Returns:
        `stop` or `length`.

    Raises:
        ValueError: something else ended it.
    """
    if ids and ids[-1] in sampling.stop_token_ids:
        return "stop"
    if len(ids) == sampling.max_tokens:
        return "length"
    raise ValueError(f"ended after {len(ids)} tokens by {ids[-1:]}, which is no stop token")
