"""The configuration of an update: the objective's parts, each switchable.

Which of them go together is decided here, by the mathematics: what would not be the method that it
is named after is refused before a run begins.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from ..optim import LengthDetector


def require(holds: bool, name: str, expected: str, found: object) -> None:
    """Raises ValueError of one line unless an option holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {found}")


@dataclass(frozen=True)
class TrustRegionConfig:
    """Trust-region masking of whole rollouts (arXiv 2512.23075).

    Args:
        max_statistic: per-token statistic whose maximum is bounded.
        max_threshold: its bound, nats.
        mean_threshold: bound on the mean of k3 over the rollout, nats.
        denominator: `total` divides by all rollouts (the paper), `kept` by those kept.
    """

    max_statistic: Literal["k2", "abs_log_ratio"] = "k2"
    max_threshold: float = 0.05
    mean_threshold: float = 0.001
    denominator: Literal["total", "kept"] = "total"

    def __post_init__(self) -> None:
        for name in ("max_threshold", "mean_threshold"):
            value = getattr(self, name)
            require(value >= 0, f"trust_region.{name}", "nats >= 0", value)


@dataclass(frozen=True)
class PruningConfig:
    """Dynamic vocabulary pruning on both sides (arXiv 2512.23087).

    Args:
        rho: tokens with p < rho * max p leave the safe set; exp(-13) is recalled, not verified.
        out_of_set: what to do with a sampled token outside the trainer's own safe set.
    """

    rho: float = 2.2603294069810542e-06
    out_of_set: Literal["include", "mask_token", "reject_sequence"] = "include"

    def __post_init__(self) -> None:
        require(0 < self.rho < 1, "pruning.rho", "a ratio in (0, 1)", self.rho)


@dataclass(frozen=True)
class TokenBaselineConfig:
    """The optimal token baseline (arXiv 2602.07078).

    Args:
        alignment: of rollouts with each other: `model_token` by the policy's own tokens, or
            `column` by position; the same but for rollouts with a tool's replies in them.
        leave_one_out: leave the rollout itself out of its own baseline (unbiased).
        tail: advantage beyond the second-longest rollout of a group.
    """

    alignment: Literal["column", "model_token"] = "model_token"
    leave_one_out: bool = False
    tail: Literal["zero_baseline", "keep"] = "zero_baseline"


@dataclass(frozen=True)
class LengthRateConfig:
    """Length-triggered learning rate.

    Args:
        warmup: updates whose mean response length is the reference.
        ratio: the rate falls once the smoothed mean length exceeds this many times the reference.
        smoothing: weight of the past in the smoothed mean, in [0, 1).
        period_factor: the rate is halved every period_factor * (update of the trigger) updates.
        decay: factor of each fall, in (0, 1).
        floor: least factor, in [0, 1].
        mode: `alert` only reports the trigger.
        detector: the reference of a rise, `baseline` (the first updates) or `growth` (a slower
            average).
        joint: what must have risen with the length, each with its ratio: `mismatch` (k3),
            `grad_norm`.

    Source:
        arXiv 2602.01826; see `trimtab.optim.LengthDetector`.
    """

    warmup: int = 50
    ratio: float = 3.0
    smoothing: float = 0.9
    period_factor: float = 1.8
    decay: float = 0.5
    floor: float = 0.1
    mode: Literal["decay", "alert"] = "decay"
    detector: Literal["baseline", "growth"] = "baseline"
    joint: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        LengthDetector(**dataclasses.asdict(self))  # it checks them


@dataclass(frozen=True)
class PrefixConfig:
    """The three-phase schedule of shared prompts.

    Args:
        memory: of the prompt's forward pass until its backward: `recompute` it, `keep` it, or
            `offload` it to the CPU's memory.
        wave_tokens: most tokens of the responses whose graph is alive; null: 16384, on a
            CPU 384 to 512.
        min_bound: a group that could gain less than this factor repeats its prompt.
        verify: compare the `first` group's gradient with the dense one, `never` or `always`.

    Source:
        arXiv 2606.01143; see `SharedPrefix`.
    """

    memory: Literal["keep", "recompute", "offload"] = "recompute"
    wave_tokens: int | None = None
    min_bound: float = 1.2
    verify: Literal["first", "never", "always"] = "first"

    def __post_init__(self) -> None:
        if self.wave_tokens is not None:
            require(self.wave_tokens >= 1, "wave_tokens", "a count >= 1", self.wave_tokens)
        require(self.min_bound >= 0, "min_bound", "a factor >= 0", self.min_bound)


@dataclass(frozen=True)
class CorrectionConfig:
    """Weights that turn rollouts of the engine's policy into rollouts of the trainer's.

    The ratio is of the trainer's policy to the engine's where no update lies between; the loss
    `reinforce` takes it up to the policy being trained. Of no use to the losses `ratio` and
    `dppo_*`, whose own ratio starts from the engine, and to `reval`.

    Args:
        level: the ratio of each `token`, of the `sequence` (their product), or its `geometric`
            mean.
        outside: a ratio beyond the bounds is set to them (`truncate`) or to 0 (`zero`: masked
            importance sampling, IcePop with `low`), or drops its response (`reject`).
        low: lower bound; null: 0.
        high: upper bound.

    Source:
        `trimtab.stability.importance_weights`.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    outside: Literal["truncate", "zero", "reject"] = "truncate"
    low: float | None = None
    high: float = 2.0

    def __post_init__(self) -> None:
        require(self.high > 0, "correction.high", "a ratio > 0", self.high)
        if self.low is not None:
            expected = f"a ratio in [0, {self.high}]"
            require(0 <= self.low <= self.high, "correction.low", expected, self.low)


@dataclass(frozen=True)
class ReferenceConfig:
    """A frozen copy of the policy as it was.

    Args:
        kl: weight of k3(pi_ref / pi) of each token in the loss, as in GRPO; 0 with the loss reval,
            which has its own use of the reference.
        penalty: where that is: a term of the `loss`, or off the `advantage` of each token, where it
            is lp - lp_ref and carries no gradient (ReMax's).
        reset_every: updates after which the reference becomes the policy of that moment; 0 keeps
            the first.
    """

    kl: float = 0.0
    penalty: Literal["loss", "advantage"] = "loss"
    reset_every: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.kl < math.inf, "reference.kl", "a finite weight >= 0", self.kl)
        require(self.reset_every >= 0, "reference.reset_every", "a count >= 0", self.reset_every)


@dataclass(frozen=True)
class ReplayConfig:
    """Trajectories of earlier updates, for the loss reval.

    Args:
        size: trajectories kept, the newest.
        updates: optimizer steps on a uniform sample, after the one on the fresh batch.

    Source:
        arXiv 2603.23355.
    """

    size: int = 5120
    updates: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "updates"):
            value = getattr(self, name)
            require(value >= 1, f"replay.{name}", "a count >= 1", value)


@dataclass(frozen=True)
class RevalConfig:
    """The loss reval: logits as action values, whole trajectories against the reference.

    Args:
        beta: temperature of the target pi_ref exp(r / beta), > 0; the paper has 0.02 for responses
            of about 600 tokens and 0.002 for 5,000.
        detach_value: no gradient through V(s1); with replay that converges to a wrong policy.
        truncated: a response that was cut at the token limit counts as it is (`count`), with a
            centred reward of 0 (`zero`), or not at all (`mask`).

    Source:
        arXiv 2603.23355.
    """

    beta: float = 0.02
    detach_value: bool = False
    truncated: Literal["count", "zero", "mask"] = "count"

    def __post_init__(self) -> None:
        holds = 0 < self.beta < math.inf
        require(holds, "reval.beta", "a finite temperature > 0", self.beta)


@dataclass(frozen=True)
class ImitationConfig:
    """The loss imitation: KL of whole trajectories to a teacher, less the reward.

    Args:
        gamma: discount of later costs and rewards a token, in [0, 1]; 1 is the exact gradient, 0
            is on-policy distillation.
        reward_weight: of the reward against the KL, >= 0.
        baseline: subtracts from each token's sparse part what the other rollouts of its group have
            at that position on average.
        teacher_top_k: the teacher's most probable tokens, the rest of the vocabulary as one; null
            takes all.

    Source:
        arXiv 2512.23097 (abstract read; derived).
    """

    gamma: float = 1.0
    reward_weight: float = 1.0
    baseline: bool = True
    teacher_top_k: int | None = None

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "imitation.gamma", "a discount in [0, 1]", self.gamma)
        value = self.reward_weight
        expected = "a finite weight >= 0"
        require(0 <= value < math.inf, "imitation.reward_weight", expected, value)
        if self.teacher_top_k is not None:
            value = self.teacher_top_k
            require(value >= 1, "imitation.teacher_top_k", "a count >= 1", value)


Advantage = Literal[
    "otb",
    "dr_grpo",
    "grpo",
    "rloo",
    "opo",
    "reinforce",
    "reinforce_pp",
    "remax",
    "tree",
]
Loss = Literal[
    "ratio",
    "ppo_clip",
    "reinforce",
    "gspo",
    "cispo",
    "dppo_tv",
    "dppo_kl",
    "reval",
    "imitation",
]
Aggregation = Literal[
    "balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm"
]
BOUNDS: dict[str, tuple[float, float]] = {
    "ppo_clip": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 2.0),
    "dppo_tv": (0.2, 0.2),
    "dppo_kl": (0.05, 0.05),
}
"""Lower and upper bound of the losses that have one, where none is configured."""
OWN_OBJECTIVE = ("reval", "imitation")
"""Losses that are no policy gradient of an advantage: they say themselves how tokens count."""


@dataclass(frozen=True)
class UpdateConfig:
    """The update: each part of the pack, switchable.

    Args:
        optimizer: `adam_mini` (one second moment per block) or `adamw`.
        blocks: partition preset of adam_mini, see `infer_blocks`.
        lr: learning rate.
        lr_warmup: updates of linear warm-up.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; not on vectors and scalars.
        clip_norm: bound on the gradient norm; 0 does not clip.
        epochs: optimizer steps on each batch of rollouts; 1 is on-policy, where the ratio that
            ppo_clip, gspo and cispo clip is 1: their bounds act from the second on.
        micro_prompts: prompts whose graphs are alive at a time; 0 takes all.
        route: `packed` computes each prompt once in a row with its responses, whose graph is alive
            as a whole: the fastest for small models; `three_phase` computes it once, too, and
            frees each wave of responses: for long prompts and large groups; `dense` repeats it.
        prefix: options of `three_phase`, which takes one prompt at a time.
        head: `fused` never stores the logits [tokens, vocabulary], which is what runs out of
            memory at large vocabularies; `logits` takes them from the model.
        advantage: `otb` (the optimal token baseline), `grpo`, `dr_grpo` (no standard deviation),
            `rloo` (leave one out), `opo`, `reinforce` (the reward itself), `reinforce_pp`
            (normalised over the batch), `remax` (less the reward of a greedy rollout, which is one
            more request a prompt) or `tree` (over the paths of rollout.tree). null: otb, and none
            with the losses reval and imitation, which have their own.
        token_baseline: options of `otb`.
        remax_clip: bound on the difference of rewards in `remax`; null: none.
        tree_combine: the depths of `tree` count alike (`average`) or by their `group_size`.
        loss: `ratio` (-A * pi/pi_rollout, the trust-region objective), `ppo_clip`, `reinforce`,
            `gspo`, `cispo`, `dppo_tv`, `dppo_kl`, `reval` (with a reference) or `imitation` (with
            a teacher).
        clip_low: lower bound of the loss: clip range of ppo_clip, gspo and cispo, threshold of
            dppo_tv and dppo_kl; null: the loss's own.
        clip_high: upper bound likewise.
        correction: of the engine's log-probs against the trainer's, by importance weights.
        reval: options of that loss.
        replay: steps on trajectories of earlier updates, for reval; null: none.
        reference: a copy of the policy for reval, or for a KL term; null: none.
        imitation: options of that loss.
        aggregation: weights of the tokens (arXiv 2605.04077 compares the rules); null: balanced,
            and what the losses reval and imitation mean by themselves.
        zero_advantage: rollouts whose outcome advantage is 0 `count` in their group, or are left
            out (`exclude`).
        trust_region: masks rollouts by their mismatch; null does not.
        pruning: takes the objective and the sampling on the safe vocabulary; null does not.
        length_rate: lowers the rate after a surge of the response length; null does not.
    """

    optimizer: Literal["adam_mini", "adamw"] = "adam_mini"
    blocks: Literal["snr", "rows", "paper"] = "snr"
    lr: float = 1e-4
    lr_warmup: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    epochs: int = 1
    micro_prompts: int = 0
    route: Literal["packed", "three_phase", "dense"] = "packed"
    prefix: PrefixConfig = PrefixConfig()
    head: Literal["logits", "fused"] = "logits"
    advantage: Advantage | None = None
    token_baseline: TokenBaselineConfig = TokenBaselineConfig()
    remax_clip: float | None = None
    tree_combine: Literal["average", "group_size"] = "average"
    loss: Loss = "ratio"
    clip_low: float | None = None
    clip_high: float | None = None
    correction: CorrectionConfig = CorrectionConfig()
    reval: RevalConfig = RevalConfig()
    replay: ReplayConfig | None = None
    reference: ReferenceConfig | None = None
    imitation: ImitationConfig = ImitationConfig()
    aggregation: Aggregation | None = None
    zero_advantage: Literal["count", "exclude"] = "count"
    trust_region: TrustRegionConfig | None = None
    pruning: PruningConfig | None = None
    length_rate: LengthRateConfig | None = None

    def __post_init__(self) -> None:
        require(self.lr >= 0, "update.lr", "a rate >= 0", self.lr)
        require(self.clip_norm >= 0, "update.clip_norm", "a norm >= 0", self.clip_norm)
        require(self.epochs >= 1, "update.epochs", "a count >= 1", self.epochs)
        for name in ("micro_prompts", "lr_warmup"):
            value = getattr(self, name)
            require(value >= 0, f"update.{name}", "a count >= 0", value)
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            expected = f"null with the loss {self.loss}, which has no bounds"
            require(value is None or self.loss in BOUNDS, f"update.{name}", expected, value)
            most = 1.0 if self.loss == "dppo_tv" or name == "clip_low" else math.inf
            if self.loss == "dppo_kl":
                most = math.inf
            expected = "a bound >= 0" if most > 1 else "a bound in [0, 1]"
            require(value is None or 0 <= value <= most, f"update.{name}", expected, value)
        if self.remax_clip is not None:
            require(self.remax_clip > 0, "update.remax_clip", "a bound > 0", self.remax_clip)
        for name, default, owner in (
            ("remax_clip", None, "remax"),
            ("tree_combine", "average", "tree"),
            ("token_baseline", TokenBaselineConfig(), "otb"),
        ):
            holds = getattr(self, name) == default or self.advantage_used == owner
            used = self.advantage_used
            expected = f"its default with the advantage {used}, which has no use of it"
            require(holds, f"update.{name}", expected, getattr(self, name))
        self._check_mixture()

    def _check_mixture(self) -> None:
        """Refuses what would not be the method it is named after."""
        loss, reference = self.loss, self.reference
        if loss in OWN_OBJECTIVE:
            for name in ("advantage", "aggregation"):
                expected = f"null with the loss {loss}, which has its own"
                require(
                    getattr(self, name) is None, f"update.{name}", expected, getattr(self, name)
                )
            value = self.zero_advantage
            expected = f"count with the loss {loss}, which has no advantages"
            require(value == "count", "update.zero_advantage", expected, value)
        if loss == "reval":
            expected = "null with the loss reval: its paths come from any policy"
            require(self.trust_region is None, "update.trust_region", expected, self.trust_region)
            expected = "null with the loss reval: V(s1) is of the whole vocabulary"
            require(self.pruning is None, "update.pruning", expected, self.pruning)
            require(reference is not None, "update.reference", "one for the loss reval", "null")
            kl = 0.0 if reference is None else reference.kl
            require(kl == 0, "update.reference.kl", "0 with the loss reval", kl)
            again = self.replay is not None or self.epochs > 1
            expected = "false off-policy (replay, epochs > 1), where it converges to a wrong policy"
            detached = self.reval.detach_value
            require(not (detached and again), "update.reval.detach_value", expected, detached)
        else:
            expected = f"null with the loss {loss}, which needs fresh rollouts"
            require(self.replay is None, "update.replay", expected, self.replay)
            if reference is not None:
                expected = f"a weight > 0 with the loss {loss}, which has no other use of it"
                require(reference.kl > 0, "update.reference.kl", expected, reference.kl)
        if loss == "imitation":
            expected = "1 with the loss imitation, whose dense part is right on fresh rollouts only"
            require(self.epochs == 1, "update.epochs", expected, self.epochs)
            for name, value, wanted in (
                ("head", self.head, "logits"),
                ("pruning", self.pruning, None),
                ("reference", reference, None),
            ):
                expected = f"{wanted or 'null'} with the loss imitation: it is taken at the logits"
                require(value == wanted, f"update.{name}", expected, value)
            expected = "packed or dense with the loss imitation: it is taken at the logits"
            require(self.route != "three_phase", "update.route", expected, self.route)

    @property
    def advantage_used(self) -> Advantage:
        """`advantage`, or what null stands for; of the losses without one what their sign is by."""
        return self.advantage or ("dr_grpo" if self.loss in OWN_OBJECTIVE else "otb")

    @property
    def aggregation_used(self) -> Aggregation:
        """`aggregation`, or what null stands for."""
        # a sum over the tokens and a mean over the rollouts, up to a constant
        own = "seq_mean_token_sum_norm" if self.loss in OWN_OBJECTIVE else "balanced"
        return self.aggregation or own

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of a loss in `BOUNDS`."""
        low, high = BOUNDS[self.loss]
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )
