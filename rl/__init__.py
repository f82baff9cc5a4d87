"""The RL loop behind `trimtab-rl`: tasks, rollouts, objective, run.

Names are resolved on first use, so that a reward process, which imports `trimtab.rl.rewards`, does
not load torch.
"""

from importlib import import_module

_HOMES = {
    "batch": ("RolloutBatch", "collate"),
    "budget": (
        "SuccessRates",
        "allocate_budget",
        "allocation_value",
        "budget_metrics",
        "with_greedy_extras",
    ),
    "chain_sum": ("ChainSumTask", "Styles"),
    "collect": ("Collected", "Collector", "ScoredGroup"),
    "advantages": ("outcome_advantages",),
    "config": (
        "BudgetConfig",
        "EvaluationConfig",
        "HealthConfig",
        "PolicyConfig",
        "RLConfig",
        "RecordConfig",
        "LoraConfig",
        "PagedCacheConfig",
        "RolloutConfig",
        "VLLMConfig",
    ),
    "update_config": (
        "CorrectionConfig",
        "ImitationConfig",
        "LengthRateConfig",
        "PrefixConfig",
        "PruningConfig",
        "ReferenceConfig",
        "ReplayConfig",
        "RevalConfig",
        "TokenBaselineConfig",
        "TrustRegionConfig",
        "UpdateConfig",
    ),
    "health": ("Stopped",),
    "evaluation": ("Evaluation", "evaluate"),
    "data": ("ProblemData", "problems_of_update"),
    "continuous_engine": ("ContinuousBatchingEngine",),
    "engine": ("TransformersEngine",),
    "loop": ("RLModule",),
    "objective": ("Prepared", "Statistics", "objective", "policy_statistics", "token_weights"),
    "policy_update": ("PolicyUpdate",),
    "prefix": ("PrefixGroup", "SharedPrefix", "Wave"),
    "prefix_support": ("refuse_unsupported",),
    "replay": ("ReplayBuffer",),
    "responses": ("Head", "response_hidden", "response_logits"),
    "rewards": ("RewardWorker", "Scored"),
    "rollout": (
        "Capabilities",
        "Request",
        "RolloutEngine",
        "Sample",
        "Sampling",
        "Tree",
    ),
    "server_engine": ("VLLMServerEngine",),
    "vllm_engine": ("VLLMEngine",),
    "seeds": ("stable_seed",),
    "tasks": ("JsonLinesTask", "Problem", "ReasoningGymTask", "Task"),
    "tools": ("ToolUse",),
    "turns": ("ToolTurns",),
    "verifiers_task": ("VerifiersTask",),
    "warmup": ("WarmupConfig", "warm_up"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
