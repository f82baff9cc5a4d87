"""What a StabilityMixin can be asked for, and what of TRL's own options that contradicts.

Everything here is decided from arguments alone, before a model is loaded or an engine is started.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig

from ..optim import LengthDetector
from ..stability import (
    DEFAULT_RHO,
    StabilityWatch,
    aggregation_weights,
    optimal_token_baseline,
    out_of_set_mask,
    trust_region_mask,
)
from .transformers import pruned_generation

_NAMES = {
    "token_baseline": ("alignment", "leave_one_out", "tail"),
    "aggregation": ("rule", "max_length", "zero_advantage"),
    "trust_region": ("max_statistic", "max_threshold", "mean_statistic", "mean_threshold"),
    "pruning": ("rho", "out_of_set"),
}
# What TRL divides the sum over tokens by is one number for the whole step with these.
_SUMS = ("dapo", "cispo", "vespo")
_POWER = "variance/total_power"


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """Keyword arguments of a trainer with StabilityMixin; each is off by default.

    Args:
        token_baseline: advantages of tokens by `optimal_token_baseline` instead of TRL's; its
            alignment, leave_one_out and tail, or {}. Needs scale_rewards="none". Costs a forward
            pass of the samples without gradients.
        aggregation: the weight of each token in the loss, and of its KL penalty, by
            `aggregation_weights` instead of TRL's normalisation; its rule, max_length (default:
            the trainer's max_completion_length) and zero_advantage, or {} for "balanced". Counted
            over what one optimizer step sees: all its micro-batches and processes. Needs a
            loss_type that names no normalisation of its own: "dapo", "cispo" or "vespo".
        trust_region: sequences that `trust_region_mask` rejects are left out of the loss, while
            denominators stay; its max_statistic, max_threshold, mean_statistic and mean_threshold,
            or {}. The log-ratio is that of the policy being trained to the engine that sampled;
            where no engine reports log-probabilities, to the policy that sampled.
        pruning: generation and log-probabilities, also of the reference model, under the safe set
            of arXiv 2512.23087; rho and out_of_set ("include", "mask_token" or "reject_sequence"),
            or {}. A rollout_func prunes by itself (min_p = rho).
        length_trigger: arguments of `LengthDetector`, or {}: lowers the rate of an optimizer step
            after the mean length of completions has surged. max_length is the trainer's
            max_completion_length unless given.
        monitors: a `StabilityWatch`, which judges every training log (so logging_steps=1 judges
            every step). Beside TRL's numbers it reads `grad_norm`, and where a monitor asks for
            them `variance/*`, `mismatch/*` and `coupling/*`; not the gradient norm of a step that
            fp16's scaler has skipped. Instead of a StabilityMonitorCallback, not beside one.
        stop_on_alarm: ends training when the watch has tripped.

    Raises:
        TypeError: an unknown name, or another type.
        ValueError: a value out of range.
    """

    token_baseline: Mapping[str, Any] | None = None
    aggregation: Mapping[str, Any] | None = None
    trust_region: Mapping[str, Any] | None = None
    pruning: Mapping[str, Any] | None = None
    length_trigger: Mapping[str, Any] | None = None
    monitors: StabilityWatch | None = None
    stop_on_alarm: bool = False

    def __post_init__(self) -> None:
        for option in (*_NAMES, "length_trigger"):
            given = getattr(self, option)
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(
                    f"{option}: expected a mapping of options ({{}} for the defaults) or None, "
                    f"found {given!r}"
                )
        for option, names in _NAMES.items():
            unknown = (getattr(self, option) or {}).keys() - names
            if unknown:
                raise TypeError(
                    f"{option}: expected some of {list(names)}, found {sorted(unknown)}"
                )
        if self.monitors is not None and not isinstance(self.monitors, StabilityWatch):
            raise TypeError(f"monitors: expected a StabilityWatch or None, found {self.monitors!r}")
        if self.stop_on_alarm and self.monitors is None:
            raise ValueError("stop_on_alarm: expected monitors with it, found None")
        self._rehearse()

    def _rehearse(self) -> None:
        """The functions' own checks of their options, on one token."""
        token, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        ids = torch.zeros(1, dtype=torch.int64)
        if self.token_baseline is not None:
            optimal_token_baseline(token, mask, token, token, ids, **self.token_baseline)
        if self.aggregation is not None:
            aggregation_weights(mask, ids, token[0], **{"max_length": 1} | dict(self.aggregation))
        if self.trust_region is not None:
            trust_region_mask(token, mask, **self.trust_region)
        if self.pruning is not None:
            pruned_generation(self.rho)
            out_of_set_mask(mask, mask, policy=self.out_of_set)
        if self.length_trigger is not None:
            LengthDetector(**self.length_trigger)

    @property
    def active(self) -> bool:
        """Whether anything is on."""
        return any(getattr(self, name) is not None for name in (*_NAMES, "length_trigger")) or (
            self.monitors is not None
        )

    @property
    def rho(self) -> float | None:
        """The smallest kept probability relative to the largest; None without pruning."""
        return None if self.pruning is None else self.pruning.get("rho", DEFAULT_RHO)

    @property
    def out_of_set(self) -> str:
        """What becomes of a sampled token outside the safe set."""
        return (self.pruning or {}).get("out_of_set", "include")

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the numbers that monitors and a joint length trigger read."""
        return (*(() if self.monitors is None else self.monitors.inputs), *self._joint)

    @property
    def _joint(self) -> list[str]:
        joint = (self.length_trigger or {}).get("joint") or {}
        return ["mismatch/k3" for name in joint if name == "mismatch"]

    @property
    def measures_mismatch(self) -> bool:
        """Whether the log-probabilities of the engine are compared with the trainer's."""
        return bool({"mismatch/k3", "mismatch/ess"} & set(self.watched))

    @property
    def measures_variance(self) -> bool:
        """Whether the power of the policy gradient at the logits is measured."""
        return _POWER in self.watched

    @property
    def reads_hidden(self) -> bool:
        """Whether statistics are computed from what the head reads."""
        return self.pruning is not None or self.reads_sampled

    @property
    def reads_sampled(self) -> bool:
        """Whether the samples' statistics are needed before they train."""
        return self.token_baseline is not None or self.measures_variance

    @property
    def acts_on_loss(self) -> bool:
        """Whether a micro-batch's loss is not the one of TRL on its inputs."""
        return (
            self.aggregation is not None
            or self.trust_region is not None
            or self.measures_mismatch
            or self.out_of_set != "include"
        )


def checked_args(options: StabilityOptions, args: GRPOConfig, own_rollouts: bool) -> GRPOConfig:
    """The config to train with: `args`, with the sampling that pruning asks for.

    Args:
        options: what is on.
        args: of the trainer; not changed.
        own_rollouts: whether a rollout_func samples.

    Returns:
        `args`, or with pruning a copy.

    Raises:
        ValueError: TRL's options contradict ours; all that do are named in one line.
    """
    found = "; ".join(_contradictions(options, args, own_rollouts))
    if found:
        raise ValueError(found)
    if options.pruning is None:
        return args
    args = copy.copy(args)
    # TRL hands min_p to each of its engines; the safe set is that of min_p after the temperature
    args.min_p = options.rho
    if not args.use_vllm:
        args.generation_kwargs = (args.generation_kwargs or {}) | {
            name: value
            for name, value in pruned_generation(options.rho).items()
            if value is not None
            and name not in ("logits_processor", "do_sample", "temperature", "top_k", "top_p")
            and name != "repetition_penalty"  # these are TRL's own arguments
        }
    return args


def _contradictions(
    options: StabilityOptions, args: GRPOConfig, own_rollouts: bool
) -> Iterator[str]:
    reports = args.use_vllm or own_rollouts  # the engine's log-probabilities
    if options.token_baseline is not None:
        for name, expected in (
            ("scale_rewards", "none"),
            ("multi_objective_aggregation", "sum_then_normalize"),
            ("importance_sampling_level", "token"),
            ("off_policy_mask_threshold", None),
        ):
            if getattr(args, name) != expected:
                yield _expected("token_baseline", name, expected, getattr(args, name))
        if args.loss_type == "vespo":
            yield "token_baseline: expected args.loss_type other than 'vespo', found 'vespo'"
    if options.aggregation is not None:
        yield from _against_aggregation(args)
    drops = {
        "trust_region": options.trust_region is not None,
        "pruning (out_of_set)": options.out_of_set != "include",
    }
    for name in (name for name, on in drops.items() if on and args.loss_type == "bnpo"):
        yield f"{name}: expected args.loss_type other than 'bnpo', which divides by what is left"
    generate_every = args.steps_per_generation * args.num_iterations
    if (
        options.trust_region is not None
        and not reports
        and args.gradient_accumulation_steps % generate_every == 0
    ):
        yield (
            "trust_region: expected use_vllm, a rollout_func, num_iterations > 1 or "
            "steps_per_generation > gradient_accumulation_steps, found one update on samples of "
            "the policy itself, which has not left it"
        )
    if options.measures_mismatch and not reports:
        yield "monitors, joint: expected use_vllm or a rollout_func to measure a mismatch"
    if "coupling/share" in options.watched and options.aggregation is None:
        yield "monitors: expected aggregation with SignLengthMonitor, which reads its weights"
    if options.pruning is not None:
        yield from _against_pruning(options, args)
    if options.reads_hidden:
        for name in ("use_liger_kernel", "torch_compile"):
            if getattr(args, name):
                yield (
                    f"pruning, token_baseline, VarianceMonitor: expected args.{name}=False, since "
                    "they read what the head of the model reads"
                )


def _against_aggregation(args: GRPOConfig) -> Iterator[str]:
    if args.loss_type not in _SUMS:
        yield (
            f"aggregation: expected args.loss_type of {list(_SUMS)}, found {args.loss_type!r}, "
            "which names a normalisation of its own (the loss of a token in 'grpo', 'bnpo' and "
            "'dr_grpo' is that of 'dapo')"
        )
    if args.steps_per_generation % args.gradient_accumulation_steps:
        yield (
            "aggregation: expected args.steps_per_generation to be a multiple of "
            f"gradient_accumulation_steps = {args.gradient_accumulation_steps}, found "
            f"{args.steps_per_generation}: the samples of a step are counted before its first loss"
        )


def _against_pruning(options: StabilityOptions, args: GRPOConfig) -> Iterator[str]:
    neutral = {"top_p": (1.0,), "top_k": (0, None), "repetition_penalty": (1.0,)}
    for name, values in (neutral | {"min_p": (None, options.rho)}).items():
        if getattr(args, name) not in values:
            yield _expected("pruning", name, values[0], getattr(args, name))
    clash = (args.generation_kwargs or {}).keys() & (pruned_generation().keys() | {"min_p"})
    if clash:
        yield f"pruning: expected args.generation_kwargs without {sorted(clash)}"


def _expected(option: str, name: str, expected: Any, found: Any) -> str:
    return f"{option}: expected args.{name}={expected!r}, found {found!r}"
