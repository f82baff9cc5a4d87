"""A policy loss for Megatron's `forward_step`, on logits that are cut over the vocabulary.

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        logits = model(batch.tokens, batch.position_ids, batch.attention_mask)  # without labels

        def loss(stats):  # of [B, T]: logp, entropy, sum_p2, ...
            token_loss = ratio_policy_loss(
                stats.logp, batch.rollout_logp, batch.advantages, mask=batch.mask
            )
            return (batch.weights * token_loss).sum()

        return logits, policy_loss_function(model, batch.labels, batch.mask, loss)

The statistics are those of the whole vocabulary on every tensor parallel rank, without a tensor of
its size: the logits stay where they are. Whatever the schedule and DistributedDataParallel divide
by, the gradient is that of the sum of `loss` over all micro-batches and data parallel ranks: take
its weights from all rows of the step, say by `aggregation_weights` with a process group.

Shapes: B sequences, T tokens (Megatron's b and s), V vocabulary entries of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..rl.prefix_checks import check_statistics
from ..stability import response_statistics
from ..triton_kernels.token_stats import TokenStats
from .megatron_model import unwrapped

Number = float | Tensor
Loss = Callable[[TokenStats], Tensor | tuple[Tensor, Mapping[str, Number]]]


def policy_loss_function(
    model: nn.Module,
    labels: Tensor | None,
    mask: Tensor | None,
    loss: Loss,
    *,
    temperature: float = 1.0,
    prune: float | None = None,
    vocab_size: int | None = None,
    reduction: Literal["sum", "token_mean"] = "sum",
    num_microbatches: int | None = None,
) -> Callable[..., Any]:
    """What a `forward_step` returns beside the logits: the loss of one micro-batch.

    With Megatron's `collect_non_loss_data=True` (and `forward_only=True`, under `torch.no_grad()`)
    the same forward_step gives the statistics alone: old or reference log-probabilities.

    Args:
        model: the one that forward_step was called with: GPTModel, in DistributedDataParallel,
            Float16Module or both. It was called without labels, with any `parallel_output`.
        labels: [B, T] int64; logits[b, t] predicts labels[b, t]. None where no loss is taken, on
            all stages of a pipeline but the last.
        mask: [B, T] bool, True at a generated token (Megatron's loss_mask by `.bool()`), or None
            likewise.
        loss: of TokenStats of [B, T] tensors, zero where masked, to a scalar; or to a scalar and
            numbers for the log. Called on the last stage, on every tensor parallel rank alike.
        temperature: > 0; statistics are of softmax(logits / temperature).
        prune: rho in (0, 1): statistics are of the safe vocabulary, and `stats.in_safe_set` says
            which labels are in it (see `out_of_set_mask`); None: of the whole one.
        vocab_size: real entries; Megatron pads a vocabulary until its ranks divide it, and counts
            the padding in its own loss. Columns from here on are left out, with gradient 0. None:
            the model's vocabulary has no padding.
        reduction: "sum": the gradient is that of the sum of `loss` over all micro-batches and data
            parallel ranks; "token_mean": of that over the number of tokens in all their masks,
            which needs `calculate_per_token_loss`.
        num_microbatches: of the step, by which the schedule divides; needed for "sum" without
            `calculate_per_token_loss`.

    Returns:
        A function of the model's output, for the schedules of `get_forward_backward_func`. It gives
        them the loss, with `calculate_per_token_loss` the number of tokens, and a dict: "loss", the
        scalar as `loss` returned it, and its numbers.

    Raises:
        ValueError: an argument is out of range, context parallelism (a loss would see parts of
            responses), a reduction that this configuration cannot do; from the function: shapes do
            not match, a label has no finite log-probability, `loss` returned no scalar with a
            graph.
    """
    model, gpt = unwrapped(model)
    if gpt.config.context_parallel_size > 1:
        raise ValueError(
            f"model: context_parallel_size is {gpt.config.context_parallel_size}, expected 1: a "
            "loss would see parts of responses"
        )
    _check_vocabulary(vocab_size, gpt)
    # here, on all stages: the others would wait for an error of the last one
    check_statistics(temperature, prune)
    return _PolicyLoss(
        gpt=gpt,
        labels=labels,
        mask=mask,
        loss=loss,
        options={"temperature": temperature, "prune": prune},
        vocab_size=gpt.vocab_size if vocab_size is None else vocab_size,
        scale=_scale(model, gpt, reduction, num_microbatches),
        count_tokens=reduction == "token_mean",
    )


@dataclass(frozen=True)
class _PolicyLoss:
    """The loss of one micro-batch, as a schedule calls it."""

    gpt: GPTModel
    labels: Tensor | None
    mask: Tensor | None
    loss: Loss
    options: dict[str, Any]
    vocab_size: int
    scale: int
    count_tokens: bool

    def __call__(self, output_tensor: Tensor, non_loss_data: bool = False) -> Any:
        for name in ("labels", "mask"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}: expected [B, T] where the loss is taken, on the last stage of the "
                    "pipeline (of a virtual one: in its last chunk), got None"
                )
        logits, group = self._columns(output_tensor)
        stats = response_statistics(logits, self.labels, self.mask, group=group, **self.options)
        if non_loss_data:
            return TokenStats(*(x if x is None else x.detach() for x in stats))
        value, numbers = _value_and_numbers(self.loss(stats))
        logged = {"loss": value.detach()} | {
            name: x.detach() if isinstance(x, Tensor) else x for name, x in numbers.items()
        }
        # another tensor than what is logged: the schedule divides it in place, and may free it
        scaled = value * self.scale
        if not self.gpt.config.calculate_per_token_loss:
            return scaled, logged
        # of no tokens at all Megatron does not divide by their number
        tokens = self.mask.sum() if self.count_tokens else self.mask.new_zeros(())
        return scaled, tokens.to(torch.int), logged

    def _columns(self, output: Tensor) -> tuple[Tensor, ProcessGroup | None]:
        """Logits without padding, and the group they are cut over, if they are."""
        tp = self.gpt.pg_collection.tp
        width, whole = output.shape[-1], self.gpt.vocab_size
        if output.ndim != 3 or width not in (whole, whole // tp.size()):
            raise ValueError(
                f"output_tensor: expected logits [B, T, V] or [B, T, V / {tp.size()} ranks] of a "
                f"model with V = {whole} that was called without labels, got {tuple(output.shape)}"
            )
        group = tp if width < whole else None
        kept = self.vocab_size - (0 if group is None else tp.rank() * width)
        # a view, whose rows are further apart than they are long
        return (output[..., :kept] if kept < width else output), group


def _check_vocabulary(vocab_size: int | None, gpt: GPTModel) -> None:
    """Every rank keeps a column, so that each takes part."""
    ranks = gpt.pg_collection.tp.size()
    first_of_last = gpt.vocab_size // ranks * (ranks - 1)
    if vocab_size is not None and not first_of_last < vocab_size <= gpt.vocab_size:
        raise ValueError(
            f"vocab_size: expected the real size, above {first_of_last} and at most the model's "
            f"{gpt.vocab_size} (each of {ranks} tensor parallel ranks has some of it), got "
            f"{vocab_size}"
        )


def _scale(model: nn.Module, gpt: GPTModel, reduction: str, num_microbatches: int | None) -> int:
    """What undoes the divisions of the schedule and of DistributedDataParallel."""
    config = gpt.config
    if reduction not in ("sum", "token_mean"):
        raise ValueError(f"reduction: expected 'sum' or 'token_mean', got {reduction!r}")
    if reduction == "token_mean":
        if not config.calculate_per_token_loss:
            raise ValueError(
                "reduction: 'token_mean' needs calculate_per_token_loss=True in the config, else "
                "Megatron averages micro-batches of unlike size; or keep 'sum', with weights of "
                "aggregation_weights(rule='token_mean')"
            )
        return 1
    if config.calculate_per_token_loss:
        auxiliary = [n for n in ("moe_aux_loss_coeff", "moe_z_loss_coeff") if _on(config, n)]
        if config.num_moe_experts and auxiliary:
            raise ValueError(
                f"reduction: 'sum' does not divide by tokens, and with calculate_per_token_loss "
                f"Megatron multiplies the loss of {auxiliary[0]} by them; expected 'token_mean', "
                "or calculate_per_token_loss=False"
            )
        return 1
    if num_microbatches is None or num_microbatches < 1:
        raise ValueError(
            "num_microbatches: expected their number, by which the schedule divides (or set "
            f"calculate_per_token_loss=True in the config), got {num_microbatches}"
        )
    averaged = isinstance(model, DistributedDataParallel)
    return num_microbatches * (model.dp_cp_group.size() if averaged else 1)


def _on(config: Any, name: str) -> bool:
    value = getattr(config, name)
    return any(value) if isinstance(value, list) else bool(value)


def _value_and_numbers(found: Any) -> tuple[Tensor, Mapping[str, Number]]:
    """The scalar and what to log, of what a loss returned."""
    value, numbers = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    scalar = isinstance(value, Tensor) and value.numel() == 1
    if not scalar or value.requires_grad != torch.is_grad_enabled():
        raise ValueError(f"loss: expected a scalar tensor with a graph, got {value!r}")
    if not isinstance(numbers, Mapping) or "loss" in numbers:
        raise ValueError(
            f"loss: expected numbers for the log by name, none of them 'loss', got {numbers!r}"
        )
    return value.reshape(()), numbers
