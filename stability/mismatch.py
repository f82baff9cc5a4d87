"""How far the trainer's log-probabilities are from the rollout engine's: one report, in sums.

Shapes: B sequences, T tokens. r = pi_train / pi_rollout of the sampled token, ln r = lp_train -
lp_rollout, nats. ppl of a response = exp(-mean_t lp).

A report holds sums and maxima, so reports of micro-batches add up (`a + b`) and those of ranks
reduce (`all_reduce`) to exactly that of the whole batch; `metrics()` divides at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ._numerics import (
    MAX_LOG_RATIO,
    agreed,
    check_mask,
    check_tokens,
    k3,
    masked,
    maximum,
    minimum,
    ratio,
    total,
)
from .statistics import segment_sum

_P_EDGES = ("1e-6", "1e-4", "1e-2", "0.1", "0.5")  # of the trainer's probability of the token
_LENGTH_EDGES = (16, 64, 256, 1024, 4096)  # tokens of the response
_BUCKETS = (
    *(f"p_{a}_{b}" for a, b in pairwise(("0", *_P_EDGES, "1"))),
    *(f"length_{a}_{b}" for a, b in pairwise((0, *_LENGTH_EDGES, "inf"))),
)


@dataclass(frozen=True, eq=False)
class MismatchReport:
    """Sums and maxima of one or more batches; made by `mismatch_report`.

    Args:
        sums: [S] fp64, in an order of this file's own.
        maxima: [M] fp64, likewise; -inf where nothing was seen.
        weighted: whether weights were given.
        masked: whether a kept mask was given.
        bounds: low and high, of the fractions.
    """

    sums: Tensor
    maxima: Tensor
    weighted: bool
    masked: bool
    bounds: tuple[float, float]

    def __add__(self, other: MismatchReport) -> MismatchReport:
        """The report of both batches together."""
        if not isinstance(other, MismatchReport):
            return NotImplemented
        if self._settings() != other._settings():
            raise ValueError("expected reports made with the same optional arguments, got others")
        maxima = torch.maximum(self.maxima, other.maxima)
        return replace(self, sums=self.sums + other.sums, maxima=maxima)

    def __radd__(self, other: int) -> MismatchReport:
        """So that sum(reports) works, which starts at 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _settings(self) -> list[float]:
        return [float(self.weighted), float(self.masked), *self.bounds]

    def all_reduce(self, process_group: ProcessGroup | None = None) -> MismatchReport:
        """The report of all ranks' batches together; every rank must call.

        Args:
            process_group: the ranks; None: the default group.

        Returns:
            A new report, the same on every rank.

        Raises:
            ValueError: on every rank, if the ranks' reports were made with other arguments.
        """
        group = dist.group.WORLD if process_group is None else process_group
        settings = self.sums.new_tensor(self._settings())
        if not torch.equal(maximum(settings, group), minimum(settings, group)):
            raise ValueError("expected reports made with the same optional arguments on all ranks")
        return replace(self, sums=total(self.sums, group), maxima=maximum(self.maxima, group))

    def metrics(self) -> dict[str, Tensor]:
        """The numbers, under `mismatch/`.

        Returns:
            0-d fp64 tensors, over tokens unless said otherwise; empty when there is no token.
            `count`: of tokens. `k1`, `k3`: two estimates of KL(rollout || train), nats.
            `abs_dlogp_mean`, `abs_dlogp_max`: of |lp_train - lp_rollout|. Over responses:
            `ppl_train`, `ppl_rollout`, `log_ppl_train`, `log_ppl_rollout`; `log_ppl_gap` (mean of
            ln ppl_train - ln ppl_rollout), `log_ppl_gap_abs`, `log_ppl_gap_max`, `log_ppl_gap_min`;
            `ppl_ratio` (mean of ppl_train / ppl_rollout). `chi2_token`: mean r^2 - 1;
            `chi2_sequence`: that of the product of r over a response. Of r: `ratio_mean`,
            `ratio_std`, `ratio_max`, `ratio_min`, `ess` = (sum r)^2 / (tokens sum r^2),
            `fraction_high`, `fraction_low` (outside the bounds). Of the product of r over a
            response, over responses: `sequence_ratio_mean`, `_std`, `_max`, `_min`, `_ess`,
            `sequence_fraction_high`, `sequence_fraction_low`. Of the mean of r over a response,
            over responses: `response_ratio_mean`, `_std`, `_max`, `_min`, `_max_deviation` (from
            1), `response_fraction_high`, `response_fraction_low`. With weights: `weight_mean`,
            `_std`, `_max`, `_min`, `_ess`; of their means over responses `response_weight_mean`,
            `_std`, `_max`, `_min`, `_max_deviation`. With a kept mask: `masked_tokens`,
            `masked_sequences` (with any token masked), fractions.
            `abs_dlogp/p_A_B` and `k3/p_A_B`: where the trainer's probability is in [A, B);
            `abs_dlogp/length_A_B`, `k3/length_A_B`: of responses of A to B - 1 tokens; a bucket
            without a token is absent.
        """
        s = SimpleNamespace(**dict(zip(_SCALARS, self.sums)))
        if s.tokens == 0:
            return {}
        high, low = dict(zip(_MAXIMA, self.maxima)), dict(zip(_MAXIMA, -self.maxima))
        n, rows = s.tokens, s.sequences
        out = {
            "count": n,
            "k1": s.k1 / n,
            "k3": s.k3 / n,
            "abs_dlogp_mean": s.gap / n,
            "abs_dlogp_max": high["gap"],
            "ppl_train": s.ppl_train / rows,
            "ppl_rollout": s.ppl_rollout / rows,
            "log_ppl_train": s.log_ppl_train / rows,
            "log_ppl_rollout": s.log_ppl_rollout / rows,
            "log_ppl_gap": (s.log_ppl_train - s.log_ppl_rollout) / rows,
            "log_ppl_gap_abs": s.log_ppl_gap_abs / rows,
            "log_ppl_gap_max": high["log_ppl_gap"],
            "log_ppl_gap_min": low["-log_ppl_gap"],
            "ppl_ratio": s.ppl_ratio / rows,
            "chi2_token": s.ratio2 / n - 1,
            "chi2_sequence": s.sequence2 / rows - 1,
            **_moments("ratio", n, s.ratio, s.ratio2),
            "ratio_max": high["ratio"],
            "ratio_min": low["-ratio"],
            "ess": _effective(n, s.ratio, s.ratio2),
            "fraction_high": s.high / n,
            "fraction_low": s.low / n,
            **_moments("sequence_ratio", rows, s.sequence, s.sequence2),
            "sequence_ratio_max": high["sequence"],
            "sequence_ratio_min": low["-sequence"],
            "sequence_ratio_ess": _effective(rows, s.sequence, s.sequence2),
            "sequence_fraction_high": s.sequence_high / rows,
            "sequence_fraction_low": s.sequence_low / rows,
            **_moments("response_ratio", rows, s.response, s.response2),
            "response_ratio_max": high["response"],
            "response_ratio_min": low["-response"],
            "response_ratio_max_deviation": high["response_deviation"],
            "response_fraction_high": s.response_high / rows,
            "response_fraction_low": s.response_low / rows,
        }
        if self.weighted:
            out |= _moments("weight", n, s.weight, s.weight2)
            out |= {"weight_max": high["weight"], "weight_min": low["-weight"]}
            out["weight_ess"] = _effective(n, s.weight, s.weight2)
            out |= _moments("response_weight", rows, s.response_weight, s.response_weight2)
            out["response_weight_max"] = high["response_weight"]
            out["response_weight_min"] = low["-response_weight"]
            out["response_weight_max_deviation"] = high["response_weight_deviation"]
        if self.masked:
            out["masked_tokens"] = s.masked_tokens / n
            out["masked_sequences"] = s.masked_sequences / rows
        table = self.sums[len(_SCALARS) :].view(-1, 3)  # of each bucket: tokens, gap, k3
        seen = table[:, 0].tolist()  # at once: a GPU would be waited for at every bucket
        for bucket, some, (count, gap, divergence) in zip(_BUCKETS, seen, table):
            if some:
                out[f"abs_dlogp/{bucket}"] = gap / count
                out[f"k3/{bucket}"] = divergence / count
        return {f"mismatch/{name}": value for name, value in out.items()}


_SCALARS = (
    *("tokens", "k1", "k3", "gap", "ratio", "ratio2", "high", "low", "weight", "weight2"),
    *("response_high", "response_low", "response_weight", "response_weight2"),
    *("masked_tokens", "sequences", "ppl_train", "ppl_rollout", "log_ppl_train"),
    *("log_ppl_rollout", "log_ppl_gap_abs", "ppl_ratio", "sequence", "sequence2"),
    *("sequence_high", "sequence_low", "response", "response2", "masked_sequences"),
)
_MAXIMA = (
    *("gap", "ratio", "-ratio", "weight", "-weight", "log_ppl_gap", "-log_ppl_gap"),
    *("sequence", "-sequence", "response", "-response", "response_deviation"),
    *("response_weight", "-response_weight", "response_weight_deviation"),
)


@torch.no_grad()
def mismatch_report(
    logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    low: float = 0.5,
    high: float = 2.0,
    weights: Tensor | None = None,
    kept: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> MismatchReport:
    """Measures the mismatch of one batch, or of one part of it.

    Args:
        logp: [B, T] of the trainer, nats.
        rollout_logp: [B, T] of the rollout engine, nats, at the same temperature.
        mask: [B, T] bool.
        low: bound of `fraction_low` on the ratio; counted, not applied.
        high: bound of `fraction_high`.
        weights: [B, T] from `importance_weights`, to be reported beside the ratios.
        kept: [B, T] bool, the mask after trust-region masking or pruning.
        process_group: ranks whose batches are reported together; every one of them must call. None:
            this process alone (add up micro-batches first, then `all_reduce` the sum).

    Returns:
        A report; add it to those of the other micro-batches, then take its `metrics()`. Log-ratios
        (summed over a response where a product is meant) are clamped to +-20 before the exp.

    Raises:
        ValueError: shapes do not match, an unmasked input is not finite, or the bounds are no
            interval.

    Source:
        What verl 0.9 logs of its rollout correction, and the buckets of arXiv 2512.23087 (abstract
        read), whose bound says that the mismatch is in the tail of the distribution.
    """
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"expected 0 <= low <= high, got low={low}, high={high}")
    with agreed(process_group, mask):
        check_mask(mask)
        check_tokens("logp", logp, mask)
        check_tokens("rollout_logp", rollout_logp, mask)
        if weights is not None:
            check_tokens("weights", weights, mask)
        if kept is not None and (kept.shape != mask.shape or kept.dtype != torch.bool):
            found = f"{tuple(kept.shape)} of {kept.dtype}"
            raise ValueError(f"expected kept {tuple(mask.shape)} of torch.bool, got {found}")
    train, rollout = masked(logp.double(), mask), masked(rollout_logp.double(), mask)
    place = mask.flatten().nonzero().squeeze(1)  # once: a boolean index looks for it each time
    lengths, rows = mask.sum(1), mask.any(1)
    train_of_token = train.flatten()[place]
    log_r = train_of_token - rollout.flatten()[place]  # [N], as all of `tokens`
    gap, r, divergence = log_r.abs(), ratio(log_r), k3(log_r)
    tokens = {
        "tokens": torch.ones_like(r),
        "k1": -log_r,
        "k3": divergence,
        "gap": gap,
        "ratio": r,
        "-ratio": -r,
        "ratio2": r.square(),
        "high": (r > high).double(),
        "low": (r < low).double(),
    }
    # [rows with tokens], as all of `responses`
    n = lengths[rows]
    surprise_train, surprise_rollout = (-x.sum(1)[rows] / n for x in (train, rollout))
    log_ppl_gap = surprise_train - surprise_rollout
    sequence = ratio(-log_ppl_gap * n)
    row_of_token = torch.arange(len(n), device=mask.device).repeat_interleave(n)
    response = segment_sum(r, row_of_token, len(n)) / n
    responses = {
        "sequences": torch.ones_like(sequence),
        "ppl_train": surprise_train.clamp_max(MAX_LOG_RATIO).exp(),
        "ppl_rollout": surprise_rollout.clamp_max(MAX_LOG_RATIO).exp(),
        "log_ppl_train": surprise_train,
        "log_ppl_rollout": surprise_rollout,
        "log_ppl_gap": log_ppl_gap,
        "-log_ppl_gap": -log_ppl_gap,
        "log_ppl_gap_abs": log_ppl_gap.abs(),
        "ppl_ratio": ratio(log_ppl_gap),
        "sequence": sequence,
        "-sequence": -sequence,
        "sequence2": sequence.square(),
        "sequence_high": (sequence > high).double(),
        "sequence_low": (sequence < low).double(),
        "response": response,
        "-response": -response,
        "response2": response.square(),
        "response_deviation": (response - 1).abs(),
        "response_high": (response > high).double(),
        "response_low": (response < low).double(),
    }
    if weights is not None:
        w = weights.flatten()[place].double()
        tokens |= {"weight": w, "-weight": -w, "weight2": w.square()}
        of_response = segment_sum(w, row_of_token, len(n)) / n
        responses |= {
            "response_weight": of_response,
            "-response_weight": -of_response,
            "response_weight2": of_response.square(),
            "response_weight_deviation": (of_response - 1).abs(),
        }
    if kept is not None:
        dropped = mask & ~kept
        tokens["masked_tokens"] = dropped.flatten()[place].double()
        responses["masked_sequences"] = dropped.any(1)[rows].double()

    seen = tokens | responses
    nothing, lowest = log_r.new_zeros(()), log_r.new_full((1,), -math.inf)
    sums = torch.stack([seen[name].sum() if name in seen else nothing for name in _SCALARS])
    maxima = [
        torch.cat([lowest, seen[name]]).amax() if name in seen else lowest[0] for name in _MAXIMA
    ]
    table = torch.stack([tokens["tokens"], gap, divergence], -1)
    edges = log_r.new_tensor([math.log(float(edge)) for edge in _P_EDGES])
    length_of_token = n.repeat_interleave(n)
    report = MismatchReport(
        torch.cat(
            [
                sums,
                _bucket_sums(train_of_token, edges, table),
                _bucket_sums(length_of_token, n.new_tensor(_LENGTH_EDGES), table),
            ]
        ),
        torch.stack(maxima),
        weights is not None,
        kept is not None,
        (low, high),
    )
    return report if process_group is None else report.all_reduce(process_group)


def _bucket_sums(values: Tensor, edges: Tensor, table: Tensor) -> Tensor:
    """Flat sums of the rows of `table` by bucket; an edge belongs to the bucket above it."""
    bucket = torch.bucketize(values, edges, right=True)
    return table.new_zeros(len(edges) + 1, table.shape[1]).index_add(0, bucket, table).flatten()


def _moments(name: str, n: Tensor, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    mean = first / n
    return {f"{name}_mean": mean, f"{name}_std": (second / n - mean.square()).clamp_min(0).sqrt()}


def _effective(n: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2), 0 when every weight is 0."""
    return first.square() / (n * torch.where(second > 0, second, 1.0))
