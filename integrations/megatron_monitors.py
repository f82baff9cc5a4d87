"""Monitors of trimtab.stability in Megatron's training step, with one verdict on all ranks.

    monitors = MegatronMonitors(config, StabilityWatch([ClipEntropyMonitor(), ...]))
    in the loss:          monitors.record(stats, mask, log_ratio=log_ratio, advantages=advantages)
    in the training loop: forward_backward(...)
                          _, grad_norm, _ = optimizer.step()
                          verdict = monitors.judge({"grad_norm": grad_norm})

The loss sees micro-batches, on the last stage of a pipeline alone. When the gradients are complete
the records of all micro-batches and data parallel ranks become numbers, and every rank gets them.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from ..stability import (
    ClipEntropyMonitor,
    StabilityWatch,
    Verdict,
    clip_metrics,
    entropy_metrics,
    gradient_variance_proxy,
    mismatch_report,
    sign_length_metrics,
)
from ..triton_kernels.token_stats import TokenStats
from . import megatron_model  # noqa: F401, it refuses versions that were not tried

logger = logging.getLogger(__name__)

Record = dict[str, Tensor]


class MegatronMonitors:
    """Feeds a StabilityWatch from what the loss sees, and judges on every rank alike.

    It takes the place of `config.finalize_model_grads_func`, calls that and then, with all ranks in
    step, measures what was recorded. `watch.state_dict()` is the same on all ranks.

    Args:
        config: the model's, with Megatron's `finalize_model_grads` set already.
        watch: the monitors. A ClipEntropyMonitor also says the range of the clip metrics.

    Raises:
        ValueError: no finalize_model_grads_func, or one that is watched already; context
            parallelism, whose ranks see parts of responses.
    """

    def __init__(self, config: TransformerConfig, watch: StabilityWatch) -> None:
        finalize = config.finalize_model_grads_func
        if finalize is None:
            raise ValueError(
                "config: expected finalize_model_grads_func to be set before it is watched, got "
                "None (Megatron's is megatron.core.distributed.finalize_model_grads)"
            )
        if isinstance(getattr(finalize, "__self__", None), MegatronMonitors):
            raise ValueError(
                "config: expected one MegatronMonitors, got a second one; give one StabilityWatch "
                "all monitors"
            )
        if config.context_parallel_size > 1:
            raise ValueError(
                f"config: context_parallel_size is {config.context_parallel_size}, expected 1: a "
                "monitor would see parts of responses"
            )
        self.watch = watch
        self.metrics: dict[str, float] = {}  # of the last step, the same on all ranks
        self._finalize = finalize
        self._records: list[Record] = []
        self._unjudged: dict[str, float] = {}
        self._said_unjudged = False
        config.finalize_model_grads_func = self._complete

    def record(
        self,
        stats: TokenStats,
        mask: Tensor,
        *,
        advantages: Tensor | None = None,
        log_ratio: Tensor | None = None,
        rollout_logp: Tensor | None = None,
        weights: Tensor | None = None,
        outcome_advantages: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> None:
        """Keeps what the numbers of this step are made of; call it in the loss, per micro-batch.

        Without gradients (evaluation under `torch.no_grad()`) it does nothing.

        Args:
            stats: what the loss was called with.
            mask: [B, T] bool.
            advantages: [B, T]; for `entropy_metrics` and `gradient_variance_proxy`.
            log_ratio: [B, T] lp - lp_old, nats; with advantages for `clip_metrics`.
            rollout_logp: [B, T] of the rollout engine, nats; for `mismatch_report`.
            weights: [B, T], from `aggregation_weights`; with the next two for
                `sign_length_metrics`.
            outcome_advantages: [B].
            group_ids: [B] of an integer dtype.

        Raises:
            ValueError: other tensors are given than in the step's first micro-batch, or a shape
                does not fit the mask.
        """
        if not torch.is_grad_enabled():
            return
        given = {
            "logp": stats.logp,
            "entropy": stats.entropy,
            "sum_p2": stats.sum_p2,
            "mask": mask,
            "advantages": advantages,
            "log_ratio": log_ratio,
            "rollout_logp": rollout_logp,
            "weights": weights,
            "outcome_advantages": outcome_advantages,
            "group_ids": group_ids,
        }
        found = {name: x.detach() for name, x in given.items() if x is not None}
        for name, x in found.items():
            if mask.ndim != 2 or x.shape not in (mask.shape, mask.shape[:1]):
                raise ValueError(
                    f"{name}: expected [B, T] of the mask {tuple(mask.shape)}, or [B], got "
                    f"{tuple(x.shape)}"
                )
        if self._records and found.keys() != self._records[0].keys():
            raise ValueError(
                f"record: expected the tensors of the step's first micro-batch, "
                f"{sorted(self._records[0])}, got {sorted(found)}"
            )
        self._records.append(found)

    def judge(self, metrics: Mapping[str, float | Tensor] | None = None) -> Verdict:
        """Judges the step whose gradients are complete; call it once a step, on every rank.

        Before `optimizer.step` to be able to leave the step out; after it to give the norm.

        Args:
            metrics: further numbers, the same on every rank, say {"grad_norm": grad_norm}.

        Returns:
            The watch's verdict, the same on every rank.
        """
        numbers, self._unjudged = self._unjudged, {}
        return self.watch.judge({**numbers, **(metrics or {})})

    def _complete(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of finalize_model_grads: the schedule calls it on all ranks of the model."""
        result = self._finalize(*args, **kwargs)
        if self._unjudged and not self._said_unjudged:
            self._said_unjudged = True
            logger.warning("the numbers of a step were not judged: call judge once a step")
        records, self._records = self._records, []
        self.metrics = _agreed_metrics(records, self._clip_range(), kwargs.get("pg_collection"))
        self._unjudged = dict(self.metrics)
        return result

    def _clip_range(self) -> tuple[float, float]:
        clipping = [m for m in self.watch.monitors if isinstance(m, ClipEntropyMonitor)]
        return (clipping[0].clip_low, clipping[0].clip_high) if clipping else (0.2, 0.2)


def _agreed_metrics(
    records: Sequence[Record], clip_range: tuple[float, float], groups: Any
) -> dict[str, float]:
    """Numbers of all records of the last stage, on every rank of the model."""
    dp, pp, tp = _groups(groups)
    found: list[Any] = [None]
    if pp.rank() == pp.size() - 1:
        # an error of the last stage is one of every stage: they would wait for the numbers
        try:
            found = [_measured(_joined(records, dp), clip_range, dp)]
        except ValueError as error:
            found = [str(error)]
    # those of one rank: equal to the last bit, also if tensor parallel ranks rounded differently
    for group, source in ((dp, 0), (pp, pp.size() - 1), (tp, 0)):
        if group.size() > 1:
            dist.broadcast_object_list(found, dist.get_global_rank(group, source), group)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


def _groups(given: Any) -> tuple[ProcessGroup, ProcessGroup, ProcessGroup]:
    """Data, pipeline and tensor parallel group, of the schedule's call if it says them."""
    if given is not None:
        return given.dp_cp, given.pp, given.tp
    return (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )


def _joined(records: Sequence[Record], dp: ProcessGroup) -> Record:
    """The rows of all micro-batches of this rank, padded to the longest of them."""
    names: list[Any] = [None] * dp.size()
    dist.all_gather_object(names, sorted(records[0]) if records else [], group=dp)
    if any(other != names[0] for other in names):
        raise ValueError(f"record: expected the same tensors on all ranks, got {names}")
    width = max((record["mask"].shape[1] for record in records), default=0)

    def rows(x: Tensor) -> Tensor:
        return x if x.ndim == 1 else pad(x, (0, width - x.shape[1]))

    return {name: torch.cat([rows(r[name]) for r in records]) for name in names[0]}


def _measured(batch: Record, clip_range: tuple[float, float], dp: ProcessGroup) -> dict[str, float]:
    """What the tensors that are there suffice for, over all rows of all ranks."""
    found: dict[str, Tensor] = {}

    def of(*names: str) -> list[Tensor] | None:
        return [batch[n] for n in names] if batch.keys() >= set(names) else None

    if tensors := of("log_ratio", "advantages", "mask"):
        found |= clip_metrics(*tensors, *clip_range, process_group=dp)
    if tensors := of("entropy", "logp", "advantages", "mask"):
        found |= entropy_metrics(*tensors, process_group=dp)
    if tensors := of("advantages", "logp", "sum_p2", "mask"):
        found |= gradient_variance_proxy(*tensors, process_group=dp)
    if tensors := of("logp", "rollout_logp", "mask"):
        found |= mismatch_report(*tensors, process_group=dp).metrics()
    if tensors := of("weights", "outcome_advantages", "mask", "group_ids"):
        found |= sign_length_metrics(*tensors, process_group=dp)
    return {name: float(x) for name, x in found.items()}
