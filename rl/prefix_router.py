"""The load-balancing loss of experts when a prefix is computed once: it counts for each trajectory.

For one trajectory of M tokens (prefix and response) over L layers with E experts and top k:

    loss = E sum_e f_e p_e,  f_e = choices of e / (L M),  p_e = sum of router probabilities / (L M)

f is a count, p has the gradient. A prefix adds its own counts and probabilities to each of its
trajectories, as if it had been computed with each. It is what transformers computes for a batch of
one trajectory (`load_balancing_loss_func`).

Source: Switch Transformer, arXiv 2101.03961, equations 4-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder


class RouterSums(NamedTuple):
    """Sums over layers and over the tokens of each of B sequences.

    Args:
        counts: [B, E] fp32 (fp64 for fp64 logits), how often each expert was chosen; no gradient.
        probabilities: [B, E], sum of the router's probabilities.
        rows: [B] tokens times layers.
    """

    counts: Tensor
    probabilities: Tensor
    rows: Tensor

    def __add__(self, other: RouterSums) -> RouterSums:
        return RouterSums(*(a + b for a, b in zip(self, other, strict=True)))


def router_loss(sums: RouterSums) -> Tensor:
    """[B] load-balancing loss of each sequence."""
    frequency = sums.counts / sums.rows[:, None]
    probability = sums.probabilities / sums.rows[:, None]
    return (frequency * probability).sum(-1) * sums.counts.shape[1]


class RouterRecorder:
    """Reads the routers' logits of a transformers model of experts.

    Args:
        model: causal LM whose class names its routers (`_can_record_outputs`).
        top_k: experts of a token.

    Raises:
        ValueError: it does not, or has none.
    """

    def __init__(self, model: nn.Module, top_k: int | None) -> None:
        recorder = getattr(model, "_can_record_outputs", {}).get("router_logits")
        if not isinstance(recorder, OutputRecorder) or top_k is None:
            raise ValueError(f"router_loss: {type(model).__name__} has no routers with logits")
        self.index, self.top_k = recorder.index, top_k
        self.routers = [m for m in model.modules() if isinstance(m, recorder.target_class)]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Yields the list that a forward pass fills with [tokens, E] logits, a layer each."""
        found: list[Tensor] = []

        def keep(_module, _args, output) -> None:
            found.append(output[self.index] if isinstance(output, tuple) else output)

        hooks = [router.register_forward_hook(keep) for router in self.routers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self, logits: list[Tensor], lengths: tuple[int, ...]) -> RouterSums:
        """Of packed sequences of these lengths."""
        if torch.is_grad_enabled() and not all(x.requires_grad for x in logits):
            raise ValueError(
                "router_loss: the routers' logits have no gradient; reentrant gradient "
                "checkpointing hides them, expected use_reentrant=False (or trainable layers)"
            )
        counts, probabilities = [], []
        for layer in logits:
            p = layer.softmax(-1)
            chosen = torch.zeros_like(p).scatter_(-1, p.topk(self.top_k, -1).indices, 1.0)
            dtype = torch.promote_types(p.dtype, torch.float32)
            for found, x in ((counts, chosen), (probabilities, p)):
                parts = x.to(dtype).split(list(lengths))
                found.append(torch.stack([part.sum(0) for part in parts]))
        rows = torch.tensor(lengths, device=logits[0].device) * len(logits)
        return RouterSums(sum(counts).detach(), sum(probabilities), rows)
