"""Rollout budgets: how many rollouts each prompt gets, from what its last ones achieved.

M prompts, p_i the success rate of prompt i, N_i its rollouts. Knapsack allocation maximises

    sum_i Value(N_i, p_i)    with sum_i N_i = budget, low <= N_i <= high
    Value(N, p) = [1 - p^N - (1 - p)^N] p (1 - p)^2

The bracket is the chance that the group has both outcomes, and so a gradient; the factor is what a
gradient there is worth. The gain of one more rollout, p (1 - p)^2 [p^N (1 - p) + (1 - p)^N p], is
positive and falls with N, so giving each rollout to the prompt with the largest gain is optimal.

Source: Knapsack RL, arXiv 2509.25849. ReMax's greedy extras: arXiv 2310.10505.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .rollout import Request

_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def allocate_budget(success_rates: Tensor, budget: int, *, low: int = 2, high: int = 128) -> Tensor:
    """Rollouts of each prompt, with the largest value that the budget can buy.

    Args:
        success_rates: [M] in [0, 1]; NaN at a prompt that was never tried, which gets the uniform
            share. Rates from `SuccessRates.rates`.
        budget: rollouts in all; M * low <= budget <= M * high.
        low: least rollouts of a prompt, >= 1. Prompts at 0 or 1 have no value and get it.
        high: most rollouts of a prompt.

    Returns:
        [M] int64 on the CPU, with sum exactly `budget`. What is left when every prompt with a value
        is full goes to prompts at 0 (the hope is a first success), then to the rest, one at a time
        in turn. Ties go to the earlier prompt, so the result depends on nothing but the arguments.

    Raises:
        ValueError: a rate is out of range, or the bounds cannot be met.

    Source:
        arXiv 2509.25849.
    """
    if not isinstance(success_rates, Tensor):
        raise ValueError(f"expected success_rates as a tensor, got {type(success_rates).__name__}")
    if success_rates.ndim != 1:
        raise ValueError(f"expected success_rates [M], got {tuple(success_rates.shape)}")
    rates = success_rates.double().cpu().tolist()
    if any(not (math.isnan(p) or 0 <= p <= 1) for p in rates):
        raise ValueError(f"expected success_rates in [0, 1] or NaN, got {rates}")
    prompts = len(rates)
    if not 1 <= low <= high:
        raise ValueError(f"expected 1 <= low <= high, got low={low}, high={high}")
    if not prompts * low <= budget <= prompts * high:
        raise ValueError(
            f"expected budget in [{prompts * low}, {prompts * high}] for {prompts} prompts with "
            f"{low} to {high} rollouts each, got {budget}"
        )
    uniform = budget // max(prompts, 1)  # in [low, high], because the budget is
    counts = [uniform if math.isnan(p) else low for p in rates]
    left = budget - sum(counts)
    heap = [(-_log_gain(p, low), i) for i, p in enumerate(rates) if 0 < p < 1]  # NaN is not
    heapq.heapify(heap)
    while left and heap:
        _, i = heapq.heappop(heap)
        if counts[i] == high:
            continue
        counts[i] += 1
        left -= 1
        heapq.heappush(heap, (-_log_gain(rates[i], counts[i]), i))
    hopeful = [i for i, p in enumerate(rates) if p == 0]
    others = [i for i, p in enumerate(rates) if p != 0]
    for rows in (hopeful, others):
        open_rows = [i for i in rows if counts[i] < high]
        while left and open_rows:
            for i in open_rows[:left]:
                counts[i] += 1
            left -= len(open_rows[:left])
            open_rows = [i for i in open_rows if counts[i] < high]
    return torch.tensor(counts, dtype=torch.int64)


def _log_gain(p: float, n: int) -> float:
    """ln of Value(n + 1, p) - Value(n, p), which itself is soon too small for a float."""
    a, b = math.log(p), math.log1p(-p)
    high, low = max(n * a + b, n * b + a), min(n * a + b, n * b + a)
    return a + 2 * b + high + math.log1p(math.exp(low - high))


def allocation_value(success_rates: Tensor, counts: Tensor) -> Tensor:
    """sum_i Value(N_i, p_i): what `allocate_budget` maximises.

    Args:
        success_rates: [M] in [0, 1].
        counts: [M] rollouts, >= 1.

    Returns:
        0-d fp64 tensor.

    Raises:
        ValueError: shapes do not match.
    """
    _check_pair(success_rates, counts)
    p, n = success_rates.double(), counts.double()
    return ((1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2).sum()


def budget_metrics(success_rates: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """What an allocation does, by difficulty.

    Args:
        success_rates: [M] in [0, 1], NaN where unknown.
        counts: [M] rollouts of each prompt.

    Returns:
        0-d fp64 tensors: `budget/mixed_expected`, the expected share of groups with both outcomes
        (an effective gradient) among prompts whose rate is known; the mean rollouts of a prompt,
        `budget/rollouts_unseen`, `budget/rollouts_0`, `budget/rollouts_1` (rate exactly 0 or 1)
        and, for rates strictly between, `budget/rollouts_A_B`. Names without a prompt are absent.

    Raises:
        ValueError: shapes do not match.
    """
    _check_pair(success_rates, counts)
    p, n = success_rates.double().cpu(), counts.double().cpu()
    known = ~p.isnan()
    buckets = {"unseen": ~known, "0": p == 0, "1": p == 1}
    for i, (a, b) in enumerate(zip(_EDGES, _EDGES[1:], strict=False)):
        last = i == len(_EDGES) - 2
        buckets[f"{a:g}_{b:g}"] = (p > 0) & (p < 1) & (p >= a) & ((p < b) | last)
    metrics = {
        f"budget/rollouts_{name}": n[rows].mean() for name, rows in buckets.items() if rows.any()
    }
    if known.any():
        mixed = 1 - p[known] ** n[known] - (1 - p[known]) ** n[known]
        metrics["budget/mixed_expected"] = mixed.mean()
    return metrics


def _check_pair(success_rates: Tensor, counts: Tensor) -> None:
    if success_rates.shape != counts.shape or success_rates.ndim != 1:
        shapes = f"{tuple(success_rates.shape)} and {tuple(counts.shape)}"
        raise ValueError(f"expected success_rates and counts [M], got {shapes}")


class SuccessRates:
    """The success rate of every prompt so far, by a stable id.

    Args:
        decay: weight of what was known before each new group, in [0, 1); 0 keeps the latest group
            alone.
        smoothing: adds half a success and half a failure (the Beta(1/2, 1/2) prior), so that no
            prompt is ever at exactly 0 or 1.
        threshold: a rollout succeeds when its reward is above it.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2509.25849, which takes the latest group; decay and smoothing are options of ours.
    """

    def __init__(
        self, *, decay: float = 0.0, smoothing: bool = False, threshold: float = 0.5
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in [0, 1), got {decay}")
        if not math.isfinite(threshold):
            raise ValueError(f"expected a finite threshold, got {threshold}")
        self.decay, self.smoothing, self.threshold = decay, smoothing, threshold
        self._counts: dict[str | int, tuple[float, float]] = {}  # successes and rollouts, decayed

    def __len__(self) -> int:
        return len(self._counts)

    def observe(
        self,
        prompt_ids: Sequence[str | int],
        rewards: Tensor,
        *,
        valid: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Records one batch of rollouts.

        Args:
            prompt_ids: of each of the B rollouts, in any order; strings or ints that mean the same
                prompt for good.
            rewards: [B], finite where valid.
            valid: [B] bool; a rollout with False (a lost reward, a greedy rollout) is not counted.
                None: all count.
            process_group: ranks whose rollouts are recorded on every one of them, so that all
                hold the same rates; every one must call. None: this process alone.

        Raises:
            ValueError: shapes do not match, or a reward that counts is not finite; nothing is
                recorded then.
        """
        found: dict[str | int, tuple[float, float]] = {}
        error = None
        try:
            rows = self._checked_rows(prompt_ids, rewards, valid)
        except ValueError as wrong:
            rows, error = [], str(wrong)
        for prompt, reward in rows:
            successes, rollouts = found.get(prompt, (0.0, 0.0))
            found[prompt] = (successes + (reward > self.threshold), rollouts + 1)
        if process_group is not None:
            both: list[tuple] = [({}, None)] * dist.get_world_size(process_group)
            dist.all_gather_object(both, (found, error), group=process_group)
            gathered = [part for part, _ in both]
            error = error or next((f"on another rank: {e}" for _, e in both if e), None)
            found = {}
            for part in gathered:
                for prompt, new in part.items():
                    old = found.get(prompt, (0.0, 0.0))
                    found[prompt] = (old[0] + new[0], old[1] + new[1])
        if error is not None:
            raise ValueError(error)
        for prompt, (successes, rollouts) in found.items():
            before = self._counts.get(prompt, (0.0, 0.0))
            self._counts[prompt] = (
                self.decay * before[0] + successes,
                self.decay * before[1] + rollouts,
            )

    @staticmethod
    def _checked_rows(
        prompt_ids: Sequence[str | int], rewards: Tensor, valid: Tensor | None
    ) -> list[tuple[str | int, float]]:
        """(id, reward) of the rollouts that count."""
        ids = _checked(prompt_ids)
        if rewards.ndim != 1 or len(ids) != len(rewards):
            found = f"{len(ids)} and {tuple(rewards.shape)}"
            raise ValueError(f"expected a prompt id for each of rewards [B], got {found}")
        counted = torch.ones(len(rewards), dtype=torch.bool) if valid is None else valid.cpu()
        if counted.dtype != torch.bool or counted.shape != rewards.shape:
            found = f"{tuple(counted.shape)} of {counted.dtype}"
            raise ValueError(f"expected valid {tuple(rewards.shape)} of torch.bool, got {found}")
        if not rewards.cpu()[counted].isfinite().all():
            raise ValueError("expected finite rewards where they count, got NaN or inf")
        rows = zip(ids, rewards.tolist(), counted.tolist(), strict=True)
        return [(prompt, reward) for prompt, reward, counts in rows if counts]

    def rates(self, prompt_ids: Sequence[str | int]) -> Tensor:
        """Success rates of some prompts.

        Args:
            prompt_ids: M ids.

        Returns:
            [M] fp64 in [0, 1]; NaN at a prompt that was never observed.
        """
        rates = [self._rate(prompt) for prompt in _checked(prompt_ids)]
        return torch.tensor(rates, dtype=torch.float64)

    def _rate(self, prompt: str | int) -> float:
        if prompt not in self._counts:
            return math.nan
        successes, rollouts = self._counts[prompt]
        if self.smoothing:
            return (successes + 0.5) / (rollouts + 1)
        return successes / rollouts

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded: {"prompts": [[id, successes, rollouts], ...]}, decayed counts.

        Returns:
            A new dict of plain values, for `torch.load(weights_only=True)` and for JSON.
        """
        return {"prompts": [[prompt, *pair] for prompt, pair in self._counts.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the constructor's arguments stay.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: other keys, or counts that are none; nothing is restored then.
        """
        if state.keys() != {"prompts"}:
            raise ValueError(f"expected state with keys ['prompts'], got {sorted(state)}")
        counts = {prompt: (float(s), float(n)) for prompt, s, n in state["prompts"]}
        wrong = [prompt for prompt, (s, n) in counts.items() if not 0 <= s <= n or n == 0]
        if wrong:
            raise ValueError(f"expected 0 <= successes <= rollouts, got others for {wrong[0]!r}")
        self._counts = counts


def _checked(prompt_ids: Sequence[str | int]) -> list[str | int]:
    """Ids as a list; tensors are equal to nothing but themselves as keys, so none of those."""
    ids = list(prompt_ids)
    if not all(isinstance(prompt, str | int) for prompt in ids):
        kinds = sorted({type(prompt).__name__ for prompt in ids})
        raise ValueError(f"expected prompt_ids of str or int (tensor.tolist()), got {kinds}")
    return ids


def with_greedy_extras(requests: Sequence[Request]) -> list[Request]:
    """ReMax's rollout batch: each request, and behind it one greedy rollout of the same prompt.

    Args:
        requests: with temperature > 0.

    Returns:
        Twice as many requests, in turn sampled and greedy; a greedy one has n = 1, temperature 0,
        no truncation and no tree, the same stop tokens and length limit, and `meta` with
        `greedy: True`. One call of `RolloutEngine.generate` takes them all; the greedy rows go to
        `remax_advantages` as `greedy` and nowhere else.

    Raises:
        ValueError: a request is greedy already.

    Source:
        ReMax, arXiv 2310.10505.
    """
    extras = []
    for i, request in enumerate(requests):
        if request.sampling.temperature == 0:
            raise ValueError(f"requests[{i}]: expected temperature > 0, got a greedy request")
        greedy = replace(
            request.sampling, n=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, tree=None
        )
        extras += [request, replace(request, sampling=greedy, meta=request.meta | {"greedy": True})]
    return extras
