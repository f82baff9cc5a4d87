"""Logits of a group's responses with the prompt computed once: forward, and so backward.

A group's packed row is `[prefix | r1 | r2 | .. | rG]`: a 4-D mask lets every response see the
prefix and itself only, position ids go on at the end of the prefix, and the unmodified model does
the rest. The prefix is prompt[:-1] and every response's input starts with the last prompt token, so
that no prefix position has a loss and each response position is treated alike. Autograd then
accumulates each response's gradient into the prefix's keys and values and goes through the prefix
once.

Source: shared-prefix training, arXiv 2606.01143. The packed row is one graph for the whole group;
the three-phase schedule of that paper frees each response's graph early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .prefix_support import refuse_unsupported

Route = Literal["packed", "dense"]


def response_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    mask: Tensor,
    group_index: Tensor,
    *,
    route: Route = "packed",
) -> Tensor:
    """Logits that predict each response token.

    Args:
        model: causal LM; called with input_ids, attention_mask, position_ids and logits_to_keep.
        prompts: token ids of the P prompts, each at least one token.
        tokens: [B, T] int64 response tokens, right-padded.
        mask: [B, T] bool, True at response tokens; each row is True first, then False.
        group_index: [B] int64 in [0, P): the prompt of each response.
        route: `packed` computes each prompt once; `dense` repeats it for each response.

    Returns:
        [N, V] logits in the model's dtype; N = mask.sum(), in the order of `tokens[mask]`.

    Raises:
        ValueError: shapes do not match, there is no response, a prompt is empty, a mask row has a
            gap, a response is empty, or the route is unknown; on the packed route also if
            `refuse_unsupported` refuses the model or its attention is neither `sdpa` nor `eager`.

    Source:
        Shared-prefix training, arXiv 2606.01143; differs from the paper: one graph per group.
    """
    rows = _rows(model, prompts, tokens, mask, group_index, route)
    return rows.pick(logits_at(model, rows.inputs, rows.kept))


class Head(NamedTuple):
    """What a causal LM makes logits of hidden states with.

    Args:
        weight: [V, D].
        bias: [V] or None.
        softcap: c, where the model replaces logits by c tanh(logits / c); None: it does not.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


def response_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    mask: Tensor,
    group_index: Tensor,
    *,
    route: Route = "packed",
) -> tuple[Tensor, Head]:
    """What the head reads to predict each response token, and the head: its logits are not made.

    The model is called as it is (its hooks run), but its head is given one position of each row.

    Args:
        model: causal LM whose output embeddings are a linear layer, and whose logits are theirs but
            for a final softcap. That is checked, on these positions, at the model's first call.
        prompts: as in `response_logits`.
        tokens: as in `response_logits`.
        mask: as in `response_logits`.
        group_index: as in `response_logits`.
        route: as in `response_logits`.

    Returns:
        [N, D] hidden states, in the order of `tokens[mask]`, and the head, for
        `linear_token_stats`.

    Raises:
        ValueError: as `response_logits`; also if the logits are not those of the head, or its
            weight is sharded (FSDP2).

    Source:
        Shared-prefix training, arXiv 2606.01143; differs from the paper: one graph per group.
    """
    rows = _rows(model, prompts, tokens, mask, group_index, route)
    hidden, head = hidden_at(model, rows.inputs, rows.kept)
    return rows.pick(hidden), head


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], kept: Tensor) -> Tensor:
    """[R, K, V] logits of a call of the model, at the K columns `kept` of its rows."""
    return model(**inputs, use_cache=False, logits_to_keep=kept).logits


def hidden_at(model: PreTrainedModel, inputs: dict[str, Any], kept: Tensor) -> tuple[Tensor, Head]:
    """[R, K, D] what the head would read at the columns `kept`, and the head."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"model: expected output embeddings of torch.nn.Linear for a fused head, got {layer}"
        )
    if isinstance(layer.weight, DTensor):
        raise ValueError(
            "model: expected whole output embeddings for a fused head, got a DTensor (FSDP2 "
            "shards them); compute the logits (update.head: logits)"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    seen = []

    def keep_one(_layer, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, :1],)

    hook = layer.register_forward_pre_hook(keep_one)
    try:
        output = model(**inputs, use_cache=False, logits_to_keep=kept)
    finally:
        hook.remove()
    if model not in _HEADS_CHECKED:
        _check_head(model, seen[0][:, :1], layer, softcap, output.logits)
    return seen[0], Head(layer.weight, layer.bias, softcap)


_HEADS_CHECKED: WeakSet[PreTrainedModel] = WeakSet()


@torch.no_grad()
def _check_head(
    model: PreTrainedModel,
    hidden: Tensor,
    layer: torch.nn.Linear,
    softcap: float | None,
    got: Tensor,
) -> None:
    """Raises unless the logits that the model `got` are those of a head of weight and bias."""
    logits = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    size = logits.abs().max()
    if not (got - logits).abs().max() <= 4 * torch.finfo(logits.dtype).eps * size:
        raise ValueError(
            f"model: {type(model).__name__} does more to its logits than a linear head and a "
            "softcap, or they are not finite; compute the logits (update.head: logits)"
        )
    if size > 0.1:  # a softcap hardly shows in smaller ones: look again at the next call
        _HEADS_CHECKED.add(model)


def _rows(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Tensor,
    mask: Tensor,
    group_index: Tensor,
    route: Route,
) -> Rows:
    lengths = _check(prompts, tokens, mask, group_index)
    if route == "packed":
        rows = packed_rows(prompts, tokens, lengths, group_index)
        refuse_unsupported(model, int(rows.position.max()) + 1)
        rows.inputs |= {
            "attention_mask": _additive_mask(model, rows.segment),
            "position_ids": rows.position,
        }
    elif route == "dense":
        rows = dense_rows(prompts, tokens, lengths, group_index)
    else:
        raise ValueError(f"route: expected packed or dense, got {route!r}")
    return rows


class Rows:
    """Model input: ids, positions and segments [R, L]; and where each response token is predicted.

    segment: 0 in the prefix, i > 0 in the i-th response of the row, -1 in the padding.
    kept: [K] columns from the first on at which some row predicts a response token.
    inputs: keyword arguments of the model, those of a causal model over `ids` unless more are set.
    """

    def __init__(self, ids: list[list[int]], position: list[list[int]], segment: list[list[int]],
                 where: list[tuple[int, int]], device: torch.device) -> None:  # fmt: skip
        self.ids = _padded(ids, 0, device)
        self.position = _padded(position, 0, device)
        self.segment = _padded(segment, -1, device)
        first, width = min(column for _, column in where), self.ids.shape[1]
        self.kept = torch.arange(first, width, device=device)
        index = [row * (width - first) + column - first for row, column in where]
        whole = index == list(range(len(ids) * (width - first)))
        self._index = None if whole else torch.tensor(index, device=device)
        self.inputs = {"input_ids": self.ids, "attention_mask": None, "position_ids": None}

    def pick(self, x: Tensor) -> Tensor:
        """[N, ..] of [R, K, ..]: where each response token is predicted; a view if it is all."""
        flat = x.flatten(0, 1)
        return flat if self._index is None else flat.index_select(0, self._index)


def packed_rows(
    prompts: Sequence[Sequence[int]], tokens: Tensor, lengths: list[int], group_index: Tensor
) -> Rows:
    ids = [list(prompt[:-1]) for prompt in prompts]
    position = [list(range(len(row))) for row in ids]
    segment = [[0] * len(row) for row in ids]
    count = [0] * len(prompts)
    where = []
    for response, group, length in zip(tokens.tolist(), group_index.tolist(), lengths, strict=True):
        start, prefix = len(ids[group]), len(prompts[group]) - 1
        count[group] += 1
        ids[group] += [prompts[group][-1], *response[: length - 1]]
        position[group] += range(prefix, prefix + length)
        segment[group] += [count[group]] * length
        where += [(group, start + t) for t in range(length)]
    return Rows(ids, position, segment, where, tokens.device)


def dense_rows(
    prompts: Sequence[Sequence[int]], tokens: Tensor, lengths: list[int], group_index: Tensor
) -> Rows:
    ids, where = [], []
    for response, group, length in zip(tokens.tolist(), group_index.tolist(), lengths, strict=True):
        prompt = list(prompts[group])
        where += [(len(ids), len(prompt) - 1 + t) for t in range(length)]
        ids.append(prompt + response[: length - 1])
    nothing = [[0] for _ in ids]
    return Rows(ids, nothing, nothing, where, tokens.device)


def _additive_mask(model: PreTrainedModel, segment: Tensor) -> Tensor:
    """[R, 1, L, L]: column <= row, and in the prefix or in the same segment."""
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"model: expected sdpa or eager attention, got {implementation!r}")
    width = segment.shape[1]
    seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    seen = seen & torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    # a float mask serves both: eager attention adds it, and bool would be added as 0 and 1
    dtype = torch.get_autocast_dtype(segment.device.type)
    if not torch.is_autocast_enabled(segment.device.type):
        dtype = model.dtype
    blocked = torch.zeros(seen.shape, dtype=dtype, device=segment.device)
    return blocked.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def _check(
    prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor, group_index: Tensor
) -> list[int]:
    """Length of each response."""
    if tokens.ndim != 2 or mask.shape != tokens.shape or group_index.shape != tokens.shape[:1]:
        found = f"{tuple(tokens.shape)}, {tuple(mask.shape)} and {tuple(group_index.shape)}"
        raise ValueError(f"expected tokens [B, T], mask [B, T] and group_index [B], got {found}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")
    if not len(tokens):
        raise ValueError("tokens: expected at least one response, got none")
    for group, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{group}]: expected at least one token, got none")
    if not bool(((group_index >= 0) & (group_index < len(prompts))).all()):
        raise ValueError(f"group_index: expected values in [0, {len(prompts)}), got {group_index}")
    lengths = mask.sum(-1)
    expected = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    bad = ((mask != expected).any(-1) | (lengths == 0)).nonzero()
    if len(bad):
        raise ValueError(
            f"mask: row {int(bad[0])} is empty or has a gap; expected True, then False"
        )
    return lengths.tolist()
