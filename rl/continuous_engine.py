"""`ContinuousBatchingEngine`: transformers' `generate_batch`, where rows that end make room.

For long answers of unequal lengths on a GPU: requests wait for places in a paged cache of keys and
values, so none waits for the longest. On a CPU `TransformersEngine` is many times
as fast (benchmarks/bench_rl.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, PreTrainedModel

from .config import PagedCacheConfig
from .engine import check_requests, is_greedy
from .model_copy import ModelCopy
from .rollout import Capabilities, Request, Sample
from .seeds import stable_seed


class ContinuousBatchingEngine(ModelCopy):
    """Samples from a copy of a transformers causal LM by its own continuous batching.

    One generator samples for a whole call, seeded by all its requests: the same call gives the same
    rollouts, but what a request samples depends on which others it came with.

    Args:
        model: a causal LM; copied.
        cache: of keys and values; None takes the defaults.
        **copied: `ModelCopy`'s arguments; max_rows bounds how many rollouts hold a place at a time.

    Raises:
        ValueError: see `ModelCopy`; or this transformers returns no log-probs from it.
    """

    attention: ClassVar[str] = "sdpa"  # on GPUs transformers takes flash attention if it is there
    capabilities = Capabilities(processed_logprobs=True, min_p=True)

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        cache: PagedCacheConfig | None = None,
        **copied: Any,
    ) -> None:
        self.batching_config = _config_class()
        super().__init__(model, **copied)
        self.cache = cache or PagedCacheConfig()

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            requests: may differ in prompt, n, seed and max_tokens, and some may be greedy; the
                rest of their sampling must be the same, without a tree.

        Returns:
            For each request its `n` samples.

        Raises:
            ValueError: an empty prompt, requests whose sampling differs, or a tree.
            RuntimeError: transformers lost a request.
        """
        requests = list(requests)
        if not requests:
            return []
        check_requests(requests)
        if any(request.sampling.tree for request in requests):
            raise ValueError("requests: expected no tree, this engine grows none")
        results: list[list[Sample]] = [[] for _ in requests]
        # what one call of transformers has the same for all of its requests
        kinds = [(request.sampling.n, is_greedy(request)) for request in requests]
        for kind in dict.fromkeys(kinds):
            members = [i for i, other in enumerate(kinds) if other == kind]
            found = self._generate([requests[i] for i in members])
            for i, samples in zip(members, found, strict=True):
                results[i] = samples
        return results

    def _generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Samples of requests of one kind."""
        sampling = requests[0].sampling
        longest = max(request.sampling.max_tokens for request in requests)
        prompts = [list(map(int, request.prompt_ids)) for request in requests]
        generation = GenerationConfig(
            max_new_tokens=longest,
            num_return_sequences=sampling.n,
            do_sample=not is_greedy(requests[0]),
            eos_token_id=list(sampling.stop_token_ids) or -1,
            pad_token_id=0,
        )
        if generation.do_sample:
            generation.update(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p or None,
            )
        # it seeds the generators of all: whoever draws from them goes on as if it had not
        device = next(self.model.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _min_p_is_supported(),
        ):
            outputs = self.model.generate_batch(
                prompts,
                generation_config=generation,
                continuous_batching_config=self._batching(requests, prompts, longest),
            )
        # in the order of the prompts; the copies of one stand together
        found = [
            self._sample(output, requests[i // sampling.n])
            for i, output in enumerate(outputs.values())
        ]
        if len(found) != len(requests) * sampling.n:
            raise RuntimeError(
                f"transformers' continuous batching lost {len(requests) * sampling.n - len(found)} "
                "of its requests; why, it has logged"
            )
        return [found[i : i + sampling.n] for i in range(0, len(found), sampling.n)]

    def _sample(self, output: Any, request: Request) -> Sample:
        if output.error is not None:
            raise RuntimeError(f"transformers' continuous batching: {output.error}")
        # the longest of the requests set the limit of all
        ids = output.generated_tokens[: request.sampling.max_tokens]
        stopped = ids[-1] in request.sampling.stop_token_ids
        logprobs = output.logprobs[: len(ids)]
        return Sample(ids, logprobs, "stop" if stopped else "length", self.version)

    def _batching(self, requests: list[Request], prompts: list[list[int]], longest: int) -> Any:
        page, rows = self.cache.page_size, sum(request.sampling.n for request in requests)
        config = self.batching_config(
            page_size=page,
            max_batch_tokens=self.cache.max_batch_tokens,
            max_requests_per_batch=min(rows, self.max_rows),
            max_memory_percent=self.cache.memory_fraction,
            return_logprobs=True,
            drop_unsupported_processors=False,
            seed=stable_seed(*(request.sampling.seed for request in requests)) % 2**31,
        )
        if (
            next(self.model.parameters()).device.type == "cpu"
        ):  # where it would take 0.6 of all memory
            needed = ceil((max(map(len, prompts)) + longest) / page)
            config = replace(
                config,
                num_blocks=min(rows, self.max_rows) * needed,
                max_batch_tokens=self.cache.max_batch_tokens or 512,
            )
        return config


def _config_class() -> type:
    """Transformers' configuration of it, if this version has one that returns log-probs."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        fields: Any = {}
    else:
        fields = getattr(ContinuousBatchingConfig, "__dataclass_fields__", {})
    if not {"return_logprobs", "page_size", "seed"} <= set(fields):
        raise ValueError(
            "rollout.engine: expected a transformers whose continuous batching returns log-probs "
            "(5.17 or later) for continuous_batching"
        )
    return ContinuousBatchingConfig


@contextmanager
def _min_p_is_supported() -> Iterator[None]:
    """Without its word at every call that min_p might not be; the tests say that it is."""

    def others(record: logging.LogRecord) -> bool:
        return "MinPLogitsWarper might not be" not in record.getMessage()

    logger = logging.getLogger("ContinuousBatchingLogger")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
