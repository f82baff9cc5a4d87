"""The configuration of a run: one frozen dataclass, each field documented where it stands.

`trimtab-rl --help` prints these texts; `--print_config` prints a file with every field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .rollout import Tree
from .tasks import Task
from .update_config import UpdateConfig, require
from .warmup import WarmupConfig

Action = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft): the policy's own weights stay as they are.

    The engine, and the run's `policy/`, get weights with the adapters merged in; `adapter/` has
    them in peft's format. Checkpoints hold the adapters, and a hash of the base.

    Args:
        r: their rank.
        alpha: their product is scaled by alpha / r.
        dropout: 0: with it the trainer's log-probs would be those of another network than the one
            that made the rollouts, at every token another.
        target_modules: names of the linear layers that get one, as peft takes them,
            `[q_proj, v_proj]`; null: all of them but the output head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(self.r >= 1, "policy.lora.r", "a rank >= 1", self.r)
        require(self.alpha > 0, "policy.lora.alpha", "a number > 0", self.alpha)
        expected = "0, so that trainer and engine compute the same network"
        require(self.dropout == 0, "policy.lora.dropout", expected, self.dropout)
        expected = "names of linear layers, or null for all"
        require(self.target_modules != (), "policy.lora.target_modules", expected, "none")


@dataclass(frozen=True)
class PolicyConfig:
    """Where the policy comes from, exactly one of the two; and what of it is trained.

    Args:
        path: local folder in the transformers format (model and tokenizer).
        warmup: build a small Llama by supervised training on the task's documents.
        lora: train adapters on it; null trains all its weights.
    """

    path: str | None = None
    warmup: WarmupConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("path", "warmup") if getattr(self, name) is not None]
        require(len(given) == 1, "policy", "exactly one of path and warmup", given or "neither")


@dataclass(frozen=True)
class BudgetConfig:
    """Knapsack budgets: prompts that can teach more get more of an update's rollouts.

    The success rate of a prompt is known after its first group, so it matters when prompts come
    back: `problems` of the run, or a file's lines.

    Args:
        low: least rollouts of a prompt.
        high: most rollouts of a prompt.
        decay: weight of what was known of a prompt before its newest group, in [0, 1).
        smoothing: adds half a success and half a failure to what is known.
        threshold: a rollout succeeds when its reward is above it.

    Source:
        arXiv 2509.25849.
    """

    low: int = 2
    high: int = 128
    decay: float = 0.0
    smoothing: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        found = f"{self.low} and {self.high}"
        require(1 <= self.low <= self.high, "budget", "1 <= low <= high", found)
        require(0 <= self.decay < 1, "budget.decay", "a weight in [0, 1)", self.decay)


@dataclass(frozen=True)
class VLLMConfig:
    """vLLM in the trainer's process.

    Args:
        gpu_memory_utilization: share of a GPU's memory (on a CPU: of the machine's) that vLLM takes
            for its copy of the policy and its cache, in (0, 1]; the trainer needs the rest.
        max_model_len: most tokens of a prompt with its rollout; null takes the policy's own limit.
        dtype: vLLM computes in; null takes rollout.dtype.
        tensor_parallel_size: GPUs that share the copy; with more than one they are processes, and
            weights go to them through the CPU's memory.
        enforce_eager: neither compiles nor captures CUDA graphs: starts sooner, decodes slower.
    """

    gpu_memory_utilization: float = 0.4
    max_model_len: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        share, most = self.gpu_memory_utilization, self.max_model_len
        name = "rollout.vllm.gpu_memory_utilization"
        require(0 < share <= 1, name, "a share in (0, 1]", share)
        holds = most is None or most >= 2
        require(holds, "rollout.vllm.max_model_len", "a count >= 2 or null", most)
        size = self.tensor_parallel_size
        require(size >= 1, "rollout.vllm.tensor_parallel_size", "a count >= 1", size)


@dataclass(frozen=True)
class PagedCacheConfig:
    """The cache of keys and values of the engine continuous_batching.

    Args:
        memory_fraction: of the GPU's free memory that the cache takes during a call, in (0, 1]; on
            a CPU it takes what its rollouts can need.
        page_size: tokens of a page, >= 4.
        max_batch_tokens: most tokens of one forward pass, >= 1; null: transformers' choice (on a
            CPU 512).
    """

    memory_fraction: float = 0.5
    page_size: int = 256
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        share, page, most = self.memory_fraction, self.page_size, self.max_batch_tokens
        name = "rollout.paged_cache"
        require(0 < share <= 1, f"{name}.memory_fraction", "a share in (0, 1]", share)
        require(page >= 4, f"{name}.page_size", "a count >= 4", page)
        holds = most is None or most >= 1
        require(holds, f"{name}.max_batch_tokens", "a count >= 1 or null", most)


@dataclass(frozen=True)
class RolloutConfig:
    """How training rollouts are made.

    Args:
        prompts: prompts an update, over all processes.
        group_size: rollouts of each prompt; with a budget their mean.
        max_tokens: most tokens of a rollout.
        temperature: of sampling, > 0; the trainer's log-probs use the same.
        dtype: of the engine's copy of the policy; float32 is the control without mismatch. Servers
            are sent weights in it, and compute in their own.
        quantize_bits: 8 or 4 rounds the copy's linear weights (weight-only); null does not.
        engine: what makes the rollouts in the trainer's process: `transformers`;
            `continuous_batching`, transformers' own, for long answers of unequal lengths on GPUs;
            or `vllm` where it is installed beside the trainer, which then has one process.
        vllm: options of the engine vllm; null takes its defaults.
        paged_cache: of the engine continuous_batching; null takes its defaults.
        servers: addresses of vLLM servers that make the rollouts, `[http://host:8000]`; [] makes
            them in each process of the trainer. Started by VLLM_SERVER_DEV_MODE=1 vllm serve MODEL
            --logprobs-mode processed_logprobs, where the run's folder has the same path.
        server_timeout: seconds a server has for an answer.
        server_retries: times that a request which a server could not answer is asked again, of
            the other servers, or of this one once it is back.
        reward_timeout: seconds one reward may take before its rollout is excluded.
        reward_memory_mb: MiB that the reward function's process may allocate, with its imports;
            null: any.
        max_rows: most rollouts decoded at a time, or asked of the servers, by each process.
        asynchronous: makes the rollouts of the next update while this one is computed, by the
            policy of one update before; the losses correct for it by their ratios. On a CPU give
            each side cores: `threads` below their number.
        budget: gives each prompt as many of an update's rollouts as it is worth; null gives
            group_size to each.
        tree: rollouts of a prompt share segments (TreePO); null draws each on its own. A tree's
            mean reward and length are not the policy's; the evaluation draws each on its own.
    """

    prompts: int = 8
    group_size: int = 16
    max_tokens: int = 64
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantize_bits: Literal[4, 8] | None = None
    engine: Literal["transformers", "continuous_batching", "vllm"] = "transformers"
    vllm: VLLMConfig | None = None
    paged_cache: PagedCacheConfig | None = None
    servers: tuple[str, ...] = ()
    server_timeout: float = 600.0
    server_retries: int = 3
    reward_timeout: float = 10.0
    reward_memory_mb: int | None = None
    max_rows: int = 512
    asynchronous: bool = False
    budget: BudgetConfig | None = None
    tree: Tree | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "max_tokens", "max_rows"):
            value = getattr(self, name)
            require(value >= 1, f"rollout.{name}", "a count >= 1", value)
        holds = 0 < self.temperature < math.inf
        require(holds, "rollout.temperature", "a finite number > 0", self.temperature)
        for name in ("reward_timeout", "server_timeout"):
            value = getattr(self, name)
            require(value > 0, f"rollout.{name}", "seconds > 0", value)
        retries, memory = self.server_retries, self.reward_memory_mb
        require(retries >= 0, "rollout.server_retries", "a count >= 0", retries)
        holds = memory is None or memory > 0
        require(holds, "rollout.reward_memory_mb", "MiB > 0 or null", memory)
        if self.budget is not None:
            low, high = self.budget.low, self.budget.high
            expected = f"a mean of rollout.budget, {low} to {high}"
            require(low <= self.group_size <= high, "rollout.group_size", expected, self.group_size)
        inside = self.engine == "vllm"
        require(inside or self.vllm is None, "rollout.vllm", "null without engine vllm", self.vllm)
        paged = self.engine == "continuous_batching"
        holds, expected = paged or self.paged_cache is None, "null without continuous_batching"
        require(holds, "rollout.paged_cache", expected, self.paged_cache)
        holds, expected = not paged or self.tree is None, f"null with engine {self.engine}"
        require(holds, "rollout.tree", expected, self.tree)
        if self.engine != "transformers":
            expected = f"[] with rollout.engine {self.engine}, which is in the trainer's process"
            require(not self.servers, "rollout.servers", expected, list(self.servers))
        if self.servers or inside:
            whose = "rollout.servers" if self.servers else "rollout.engine vllm"
            expected = f"null with {whose}, which cannot grow trees"
            require(self.tree is None, "rollout.tree", expected, self.tree)
            bits = self.quantize_bits
            expected = f"null with {whose}, whose own options say it"
            require(bits is None, "rollout.quantize_bits", expected, bits)
            value = self.temperature
            expected = "what vLLM takes, 0.01 to 2"
            require(0.01 <= value <= 2, "rollout.temperature", expected, value)


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
        require(self.problems >= 0, "evaluation.problems", "a count >= 0", self.problems)
        require(self.samples >= 1, "evaluation.samples", "a count >= 1", self.samples)


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
            require(value >= 1, f"record.{name}", "a count >= 1", value)
        require(self.transcripts >= 0, "record.transcripts", "a count >= 0", self.transcripts)


@dataclass(frozen=True)
class HealthConfig:
    """What is done about an update that is not healthy.

    Args:
        nonfinite: where a log-prob, the loss, the gradient, a weight or the optimizer's state is
            not finite: `skip` takes no step; `rollback` goes back to the last checkpoint (weights,
            optimizer, rate, all that a checkpoint holds) and on with the next problems; `stop`
            ends the run, which can be resumed. A step that has ruined weights cannot be skipped:
            there, `skip` goes back, too. Before the first checkpoint, going back is skipping.
        spike: the same where one of the following is exceeded.
        grad_norm_factor: most that a gradient's norm may be of the median over the last healthy
            updates, > 1; null: anything.
        mismatch_factor: the same of the mean absolute difference between the log-probs of engine
            and trainer.
        window: healthy updates in the medians; spikes are judged once there are so many.
        max_in_a_row: updates in a row that are skipped or go back; one more stops the run.
    """

    nonfinite: Action = "skip"
    spike: Action = "skip"
    grad_norm_factor: float | None = None
    mismatch_factor: float | None = None
    window: int = 32
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        for name in ("grad_norm_factor", "mismatch_factor"):
            value = getattr(self, name)
            holds = value is None or 1 < value < math.inf
            require(holds, f"health.{name}", "null or a factor > 1", value)
        for name in ("window", "max_in_a_row"):
            value = getattr(self, name)
            require(value >= 1, f"health.{name}", "a count >= 1", value)


@dataclass(frozen=True)
class RLConfig:
    """One run.

    Args:
        task: where problems and rewards come from (`class_path` and `init_args`).
        policy: the model to train.
        teacher: the model that the loss `imitation` follows; of the policy's tokenizer.
        seed: of everything random in the run.
        updates: batches of rollouts to train on.
        problems: train on this many problems of the task, over and over, each time in another
            order; null takes new ones as long as the task has them.
        run_dir: the run's folder; null makes runs/NAME-TIME.
        rollout: how rollouts are made.
        update: how the policy is updated.
        evaluation: before and after.
        record: checkpoints and transcripts.
        health: what is done about updates that are not healthy.
        threads: CPU threads of torch in each process; 0 takes every core, or one if the cores are
            busy with something else; what it chose stands in the run folder's configuration.
    """

    task: Task
    policy: PolicyConfig
    teacher: PolicyConfig | None = None
    seed: int = 0
    updates: int = 60
    problems: int | None = None
    run_dir: str | None = None
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()  # noqa: RUF009 (frozen)
    evaluation: EvaluationConfig = EvaluationConfig()
    record: RecordConfig = RecordConfig()
    health: HealthConfig = HealthConfig()
    threads: int = 0

    def __post_init__(self) -> None:
        require(self.updates >= 1, "updates", "a count >= 1", self.updates)
        require(self.threads >= 0, "threads", "a count >= 0", self.threads)
        require(self.seed >= 0, "seed", "a number >= 0", self.seed)
        if self.problems is not None:
            least = self.rollout.prompts
            require(self.problems >= least, "problems", f"a count >= {least}", self.problems)
        update = self.update
        detached = update.loss == "reval" and update.reval.detach_value
        expected = "false with reval.detach_value, which converges to a wrong policy off-policy"
        ahead = self.rollout.asynchronous
        require(not (detached and ahead), "rollout.asynchronous", expected, ahead)
        of_group = update.advantage_used in ("dr_grpo", "grpo", "rloo", "opo", "tree")
        alone = self.rollout.group_size == 1 and self.rollout.budget is None
        expected = f"at least 2 with the advantage {update.advantage_used}, which compares a group"
        holds = not (of_group and alone) or update.loss == "imitation"
        require(holds, "rollout.group_size", expected, self.rollout.group_size)
        imitates = self.update.loss == "imitation"
        expected = "a model for the loss imitation" if imitates else "null without imitation"
        require(imitates == (self.teacher is not None), "teacher", expected, self.teacher)
        expected = "false with the loss imitation, whose dense part nothing corrects"
        if self.teacher is not None:
            given = self.teacher.lora
            require(given is None, "teacher.lora", "null: a teacher is not trained", given)
        ahead = self.rollout.asynchronous
        require(not (imitates and ahead), "rollout.asynchronous", expected, ahead)
        grown = self.rollout.tree is not None
        if getattr(self.task, "in_turns", False):  # what is no Task is refused by Run
            expected = "null with a task whose rollouts have replies in them"
            require(not grown, "rollout.tree", expected, self.rollout.tree)
            alignment = self.update.token_baseline.alignment
            holds = self.update.advantage_used != "otb" or alignment == "model_token"
            expected = "model_token with a task whose rollouts have replies in them"
            require(holds, "update.token_baseline.alignment", expected, alignment)
        needs = self.update.advantage == "tree"
        require(grown or not needs, "rollout.tree", "one for the advantage tree", "null")
        expected = (
            "null unless with the advantage tree or the loss reval: a tree's rollouts are no "
            "samples of the policy, which others take them for"
        )
        takes = needs or self.update.loss == "reval"
        require(takes or not grown, "rollout.tree", expected, self.rollout.tree)
