"""GEM as the loss of a transformers Trainer.

    Trainer(model, args, compute_loss_func=gem_compute_loss(beta=0.7))

The Trainer counts the labels of all micro-batches of a step, by default of all processes too
(average_tokens_across_devices), and multiplies the loss by the number of processes, whose mean DDP
and FSDP2 take. So the sum over the count is the loss of the whole batch, however it is cut.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..triton_kernels.gem import gem_loss


def gem_compute_loss(
    beta: float = 0.7,
    *,
    h: Literal["linear", "logsigmoid"] = "linear",
    softcap: float | None = None,
) -> Callable[..., Tensor]:
    """A `compute_loss_func` for causal language models: GEM in place of cross-entropy.

    Labels are those of the input ids, and are shifted here; -100 is ignored. Without a count of the
    Trainer (evaluation) the loss is the mean over the batch's labels.

    Args:
        beta: > 0, see `gem_loss`.
        h: "linear" or "logsigmoid", see `gem_loss`.
        softcap: of the logits, see `gem_loss`; models that cap them themselves need none.

    Returns:
        A function of the model's outputs (`.logits` [B, T, V]), labels [B, T] int64 and
        num_items_in_batch, whose value is a scalar. It raises ValueError for other shapes, without
        labels, and for the counts that DataParallel gives.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv 2408.16673.
    """
    empty = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    gem_loss(*empty, beta=beta, h=h, softcap=softcap)  # refuses bad arguments

    def compute_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels is None or logits.shape[:-1] != labels.shape:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"labels: expected one for each position of the logits {tuple(logits.shape)}, "
                f"found {found}"
            )
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.ndim:
            raise ValueError(
                "num_items_in_batch: expected one number, found "
                f"{tuple(num_items_in_batch.shape)} of DataParallel; start one process for each "
                "GPU (torchrun, accelerate launch)"
            )
        # The labels move, not the logits: leaving out their last position would copy them.
        following = pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        losses = gem_loss(
            logits.reshape(-1, logits.shape[-1]), following, beta=beta, h=h, softcap=softcap
        )
        count = num_items_in_batch
        if count is None:
            count = (following != -100).sum()
        count = torch.as_tensor(count, dtype=losses.dtype, device=losses.device)
        return losses.sum() / count.clamp_min(1)  # no label anywhere: 0, as its gradient

    return compute_loss
