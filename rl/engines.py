"""The engine that a run's configuration asks for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from .config import RolloutConfig
from .continuous_engine import ContinuousBatchingEngine
from .engine import TransformersEngine
from .rollout import RolloutEngine
from .server_engine import VLLMServerEngine


def make_engine(
    rollout: RolloutConfig, policy: PreTrainedModel, folder: Path, *, retries: int = 0
) -> RolloutEngine:
    """Makes the engine.

    Args:
        rollout: of the run.
        policy: whose rollouts it will make.
        folder: of the run: weights for servers, and vLLM's copy of the configuration, go there.
        retries: of requests to servers.

    Returns:
        The engine.

    Raises:
        ConnectionError: a server does not answer.
        Stopped: vLLM cannot start.
        ValueError: it cannot do what is asked of it.
    """
    dtype = getattr(torch, rollout.dtype)
    if rollout.servers:
        return VLLMServerEngine(
            policy,
            rollout.servers,
            folder / "rollout-weights",
            dtype=dtype,
            max_rows=rollout.max_rows,
            timeout=rollout.server_timeout,
            retries=retries,
        )
    if rollout.engine == "vllm":
        from .vllm_engine import VLLMEngine

        return VLLMEngine(
            policy,
            folder / "rollout-model",
            dtype=dtype,
            options=rollout.vllm,
            max_rows=rollout.max_rows,
        )
    copied = {
        "dtype": dtype,
        "quantize_bits": rollout.quantize_bits,
        "max_rows": rollout.max_rows,
    }
    if rollout.engine == "continuous_batching":
        return ContinuousBatchingEngine(policy, cache=rollout.paged_cache, **copied)
    return TransformersEngine(policy, **copied)
