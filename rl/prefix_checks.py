"""Arguments of shared-prefix training: token ids as lists, or one clear error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..triton_kernels._rows import check_number, check_temperature


def check_statistics(temperature: float, prune: float | None) -> None:
    """Raises ValueError for options of token statistics, before anything has been computed."""
    check_temperature(temperature)
    if prune is not None:
        check_number(prune, "prune", 0, 1)


def check_options(
    prefix_memory: str,
    wave_tokens: int | None,
    accum_dtype: torch.dtype,
    min_bound: float,
    verify: str,
    head: str,
) -> None:
    """Raises ValueError for the first option of `SharedPrefix` that is none."""
    for name, value, allowed in (
        ("prefix_memory", prefix_memory, ("keep", "recompute", "offload")),
        ("verify", verify, ("first", "never", "always")),
        ("head", head, ("logits", "fused")),
        ("accum_dtype", accum_dtype, (torch.float32, torch.float64)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, allowed))}, got {value!r}"
                + (": gradients of many responses would be lost" if name == "accum_dtype" else "")
            )
    if wave_tokens is not None and (
        isinstance(wave_tokens, bool) or not isinstance(wave_tokens, int) or wave_tokens < 1
    ):
        raise ValueError(f"wave_tokens: expected an int >= 1, got {wave_tokens!r}")
    if not isinstance(min_bound, int | float) or not min_bound >= 0:
        raise ValueError(f"min_bound: expected a number >= 0, got {min_bound!r}")


def prompt_tokens(
    prompt_ids: Sequence[int] | Tensor, attention_mask: Tensor | None, vocabulary: int
) -> list[int]:
    """The prompt of a group.

    Args:
        prompt_ids: [P] ids, or [G, P] with equal rows.
        attention_mask: of the same shape, all ones.
        vocabulary: ids are in [0, vocabulary).
    """
    first = prompt_ids[0] if _is_list(prompt_ids) and len(prompt_ids) else None
    nested = first is not None and _is_list(first)
    rows = [
        _ids(_tensor(row, name), name, vocabulary)
        for name, row in (
            ((f"prompt_ids[{i}]", row) for i, row in enumerate(prompt_ids))
            if nested
            else [("prompt_ids", prompt_ids)]
        )
    ]
    if attention_mask is not None:
        _refuse_padding(attention_mask, (len(rows),) * nested + (len(rows[0]),))
    _refuse_differing(rows)
    return rows[0]


def _refuse_padding(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    mask = torch.as_tensor(attention_mask)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask: expected {shape}, as prompt_ids, got {tuple(mask.shape)}"
        )
    if not mask.bool().all():
        left = bool((mask.reshape(-1, mask.shape[-1])[:, 0] == 0).any())
        side = "left-padded" if left else "padded"
        raise ValueError(f"prompt_ids: {side} prompt, expected its tokens alone")


def _refuse_differing(rows: list[list[int]]) -> None:
    first = rows[0]
    for i, row in enumerate(rows):
        if row == first:
            continue
        pairs = enumerate(itertools.zip_longest(row, first, fillvalue="no token"))
        column, (own, other) = next((c, pair) for c, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"prompt_ids: expected the same prompt in every row, but row {i} first differs at "
            f"token {column}: {own}, not {other}"
        )


def response_tokens(
    responses: Sequence[Sequence[int] | Tensor],
    vocabulary: int | None = None,
    *,
    empty: bool = True,
) -> list[list[int]]:
    """Responses as lists.

    Args:
        responses: ids of each.
        vocabulary: ids are in [0, vocabulary); None: they were checked before.
        empty: whether there may be no response.
    """
    if not _is_list(responses):
        raise ValueError(
            f"responses: expected a list of each one's token ids, got {type(responses).__name__}"
        )
    if isinstance(responses, Tensor) and responses.ndim > 1:
        raise ValueError(
            f"responses: expected a list of unpadded ones, got a tensor {tuple(responses.shape)}; "
            "take [row[mask] for row, mask in zip(tokens, masks)]"
        )
    if not len(responses) and not empty:
        raise ValueError("responses: expected at least one, got none")
    return [
        _ids(_tensor(response, f"responses[{i}]"), f"responses[{i}]", vocabulary)
        for i, response in enumerate(responses)
    ]


def _is_list(x: object) -> bool:
    """Whether it has elements: a 0-d tensor has none."""
    return x.ndim > 0 if isinstance(x, Tensor | np.ndarray) else isinstance(x, Sequence)


def _tensor(ids: Sequence[int] | Tensor, name: str) -> Tensor:
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected token ids, {error}") from error


def _ids(ids: Tensor, name: str, vocabulary: int | None) -> list[int]:
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"{name}: expected at least one token id, got shape {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    ids = ids.long()
    if vocabulary is not None and not bool(((ids >= 0) & (ids < vocabulary)).all()):
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        raise ValueError(f"{name}: expected ids in [0, {vocabulary}), got {int(outside[0])}")
    return ids.tolist()
