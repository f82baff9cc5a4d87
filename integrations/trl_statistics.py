"""Statistics of completions under a model that TRL trains, without its logits.

The model is called as it is (wrappers, adapters, hooks and checkpointing run), but its head is
given one position of each row; what the head would have read goes to `linear_response_statistics`.
TRL's own fused head knows neither sum_p2 beside the entropy nor a pruned vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..stability import linear_response_statistics
from ..triton_kernels.token_stats import TokenStats

_CHECKED: WeakSet[nn.Module] = WeakSet()  # heads


def completion_statistics(
    model: nn.Module,
    inner: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
    *,
    temperature: float,
    prune: float | None = None,
    rows: int | None = None,
    autocast: Callable[[], AbstractContextManager],
) -> TokenStats:
    """Log-probabilities, entropies, sum_p2 and safe set of the last `width` tokens of each row.

    Args:
        model: what is called, also wrapped in DDP.
        inner: the causal LM in it, whose head is a linear layer.
        input_ids: [B, P + T], prompts padded on the left, completions on the right.
        attention_mask: [B, P + T].
        width: T, at least 1.
        temperature: > 0, of the samples.
        prune: rho in (0, 1), or None.
        rows: of one call of the model; None: all B.
        autocast: the precision that TRL calls the model in.

    Returns:
        TokenStats of [B, T] tensors, zero (False) where the attention mask is 0.

    Raises:
        ValueError: the head is no whole linear layer, or the logits are not just the head's (with
            an optional final softcap).
    """
    layer = inner.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or type(layer.weight) is not nn.Parameter:
        raise ValueError(
            "model: expected output embeddings of torch.nn.Linear with a whole weight, found "
            f"{layer} with {type(getattr(layer, 'weight', None)).__name__}"
        )
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    parts = []
    for ids, attention in zip(
        input_ids.split(rows or len(input_ids)), attention_mask.split(rows or len(input_ids))
    ):
        with autocast():
            hidden = _hidden(model, layer, softcap, ids, attention, width)
        with torch.autocast(hidden.device.type, enabled=False):
            parts.append(
                linear_response_statistics(
                    hidden[:, :-1].to(layer.weight.dtype),
                    layer.weight,
                    ids[:, -width:],
                    attention[:, -width:].bool(),
                    bias=layer.bias,
                    temperature=temperature,
                    prune=prune,
                    softcap=softcap,
                )
            )
    return TokenStats(*(None if x[0] is None else torch.cat(x) for x in zip(*parts)))


def _hidden(
    model: nn.Module,
    layer: nn.Linear,
    softcap: float | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
) -> Tensor:
    """[B, T + 1, D] what the head would read at the last T + 1 positions."""
    seen: list[Tensor] = []

    def keep_one(_layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, :1],)

    hook = layer.register_forward_pre_hook(keep_one)
    try:
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits
    finally:
        hook.remove()
    if layer not in _CHECKED:
        _check_head(layer, seen[0][:, :1], softcap, logits)
    return seen[0][:, -width - 1 :]  # of a model that ignores logits_to_keep, too


@torch.no_grad()
def _check_head(layer: nn.Linear, hidden: Tensor, softcap: float | None, got: Tensor) -> None:
    """Raises unless the logits that the model `got` are those of its head."""
    logits = nn.functional.linear(hidden.to(layer.weight.dtype), layer.weight, layer.bias)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    size = logits.abs().max()
    if not (got.to(logits.dtype) - logits).abs().max() <= 4 * torch.finfo(logits.dtype).eps * size:
        raise ValueError(
            "model: expected logits of a linear head and a final softcap, found a model that does "
            "more to them (scales them, say): token_baseline, pruning and VarianceMonitor cannot "
            "read its hidden states"
        )
    if size > 0.1:  # a softcap hardly shows in smaller ones: look again at the next call
        _CHECKED.add(layer)
