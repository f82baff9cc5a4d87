"""The configuration of a run: one frozen dataclass, each field documented where it stands.

`trimtab-rl --help` prints these texts; `--print_config` prints a file with every field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from ..optim import LengthDetector
from .tasks import Task
from .warmup import WarmupConfig


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {found}")


@dataclass(frozen=True)
class PolicyConfig:
    """Where the policy comes from; exactly one of the two.

    Args:
        path: local folder in the transformers format (model and tokenizer).
        warmup: build a small Llama by supervised training on the task's documents.
    """

    path: str | None = None
    warmup: WarmupConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("path", "warmup") if getattr(self, name) is not None]
        _require(len(given) == 1, "policy", "exactly one of path and warmup", given or "neither")


@dataclass(frozen=True)
class RolloutConfig:
    """How training rollouts are made.

    Args:
        prompts: prompts an update, over all processes.
        group_size: rollouts of each prompt.
        max_tokens: most tokens of a rollout.
        temperature: of sampling, > 0; the trainer's log-probs use the same.
        dtype: of the engine's copy of the policy; float32 is the control without mismatch. Servers
            are sent weights in it, and compute in their own.
        quantize_bits: 8 or 4 rounds the copy's linear weights (weight-only); null does not.
        servers: addresses of vLLM servers that make the rollouts, `[http://host:8000]`; [] makes
            them in each process of the trainer. Started by VLLM_SERVER_DEV_MODE=1 vllm serve MODEL
            --logprobs-mode processed_logprobs, where the run's folder has the same path.
        server_timeout: seconds a server has for an answer.
        reward_timeout: seconds one reward may take before its rollout is excluded.
        max_rows: most rollouts decoded at a time, or asked of the servers, by each process.
    """

    prompts: int = 8
    group_size: int = 16
    max_tokens: int = 64
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantize_bits: Literal[4, 8] | None = None
    servers: tuple[str, ...] = ()
    server_timeout: float = 600.0
    reward_timeout: float = 10.0
    max_rows: int = 512

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "max_tokens", "max_rows"):
            value = getattr(self, name)
            _require(value >= 1, f"rollout.{name}", "a count >= 1", value)
        _require(self.temperature > 0, "rollout.temperature", "a number > 0", self.temperature)
        for name in ("reward_timeout", "server_timeout"):
            value = getattr(self, name)
            _require(value > 0, f"rollout.{name}", "seconds > 0", value)
        if self.servers:
            bits = self.quantize_bits
            expected = "null with rollout.servers, whose own options say it"
            _require(bits is None, "rollout.quantize_bits", expected, bits)
            value = self.temperature
            expected = "what vLLM takes, 0.01 to 2"
            _require(0.01 <= value <= 2, "rollout.temperature", expected, value)


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
            _require(value >= 0, f"trust_region.{name}", "nats >= 0", value)


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
        _require(0 < self.rho < 1, "pruning.rho", "a ratio in (0, 1)", self.rho)


@dataclass(frozen=True)
class TokenBaselineConfig:
    """The optimal token baseline (arXiv 2602.07078).

    Args:
        alignment: `column`, or `model_token` for rollouts with gaps.
        leave_one_out: leave the rollout itself out of its own baseline (unbiased).
        tail: advantage beyond the second-longest rollout of a group.
    """

    alignment: Literal["column", "model_token"] = "column"
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
            _require(self.wave_tokens >= 1, "wave_tokens", "a count >= 1", self.wave_tokens)
        _require(self.min_bound >= 0, "min_bound", "a factor >= 0", self.min_bound)


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
        epochs: optimizer steps on each batch of rollouts; 1 is on-policy.
        micro_prompts: prompts whose graphs are alive at a time; 0 takes all.
        route: `packed` computes each prompt once in a row with its responses, whose graph is alive
            as a whole: the fastest for small models; `three_phase` computes it once, too, and
            frees each wave of responses: for long prompts and large groups; `dense` repeats it.
        prefix: options of `three_phase`, which takes one prompt at a time.
        head: `fused` never stores the logits [tokens, vocabulary], which is what runs out of
            memory at large vocabularies; `logits` takes them from the model.
        advantage: `token_baseline`, `group_mean` (GRPO without standard deviation), `group_std`
            (GRPO) or `leave_one_out` (RLOO).
        token_baseline: options of that advantage.
        loss: `ratio` (-A * pi/pi_rollout, the trust-region objective), `ppo_clip` or `reinforce`.
        clip_low: lower clip range of ppo_clip.
        clip_high: upper clip range of ppo_clip.
        aggregation: weights of the tokens (arXiv 2605.04077 compares the rules).
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
    advantage: Literal["token_baseline", "group_mean", "group_std", "leave_one_out"] = (
        "token_baseline"
    )
    token_baseline: TokenBaselineConfig = TokenBaselineConfig()
    loss: Literal["ratio", "ppo_clip", "reinforce"] = "ratio"
    clip_low: float = 0.2
    clip_high: float = 0.28
    aggregation: Literal[
        "balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm"
    ] = "balanced"
    zero_advantage: Literal["count", "exclude"] = "count"
    trust_region: TrustRegionConfig | None = None
    pruning: PruningConfig | None = None
    length_rate: LengthRateConfig | None = None

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "update.lr", "a rate >= 0", self.lr)
        _require(self.clip_norm >= 0, "update.clip_norm", "a norm >= 0", self.clip_norm)
        _require(self.epochs >= 1, "update.epochs", "a count >= 1", self.epochs)
        for name in ("micro_prompts", "lr_warmup"):
            value = getattr(self, name)
            _require(value >= 0, f"update.{name}", "a count >= 0", value)


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out problems, before and after.

    Args:
        problems: held-out problems; 0 skips the evaluation.
        samples: samples of each, beside one greedy answer.
    """

    problems: int = 128
    samples: int = 4

    def __post_init__(self) -> None:
        _require(self.problems >= 0, "evaluation.problems", "a count >= 0", self.problems)
        _require(self.samples >= 1, "evaluation.samples", "a count >= 1", self.samples)


@dataclass(frozen=True)
class RecordConfig:
    """What a run leaves behind while it goes.

    Args:
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: newest checkpoints kept.
        transcripts_every: updates between written transcripts.
        transcripts: rollouts written each time.
    """

    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    transcripts_every: int = 5
    transcripts: int = 4

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "transcripts_every"):
            value = getattr(self, name)
            _require(value >= 1, f"record.{name}", "a count >= 1", value)
        _require(self.transcripts >= 0, "record.transcripts", "a count >= 0", self.transcripts)


@dataclass(frozen=True)
class RLConfig:
    """One run.

    Args:
        task: where problems and rewards come from (`class_path` and `init_args`).
        policy: the model to train.
        seed: of everything random in the run.
        updates: batches of rollouts to train on.
        run_dir: the run's folder; null makes runs/NAME-TIME.
        rollout: how rollouts are made.
        update: how the policy is updated.
        evaluation: before and after.
        record: checkpoints and transcripts.
        threads: CPU threads of torch in each process; 0 takes every core, or one if the cores are
            busy with something else; what it chose stands in the run folder's configuration.
    """

    task: Task
    policy: PolicyConfig
    seed: int = 0
    updates: int = 60
    run_dir: str | None = None
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    record: RecordConfig = RecordConfig()
    threads: int = 0

    def __post_init__(self) -> None:
        _require(self.updates >= 1, "updates", "a count >= 1", self.updates)
        _require(self.threads >= 0, "threads", "a count >= 0", self.threads)
        _require(self.seed >= 0, "seed", "a number >= 0", self.seed)
