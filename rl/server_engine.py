"""`VLLMServerEngine`: rollouts from vLLM servers, with machines and an environment of their own.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --port 8000
    trimtab-rl --config RECIPE --rollout.servers '[http://HOST:8000]'

A client of HTTP: prompts go out as token ids, and token ids come back with the log-probs of the
distribution that they were sampled from. New weights go through a folder that trainer and servers
see under the same path: the first process writes a checkpoint, every server is paused, reads it and
goes on. Each update's weights have a name of their own, which every answer is checked against: what
a server sampled with others is thrown away. One that was restarted is sent the weights again; one
that another trainer has taken ends the run instead of spoiling it.

A server that goes away costs its requests in flight, which the others take over; the last one is
waited for.

Of vLLM (0.32.0, run here on a CPU): /pause, /resume, /collective_rpc, /weight_info and
/update_weight_version exist in dev mode only. A pause drops the prefix cache, whose keys and values
are of the old weights. Temperatures below 0.01 are raised to it, those above 2 refused; n rollouts
are sampled with the seeds seed, seed + 1, ...
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from .ranks import world_size
from .rollout import Capabilities, Request, Sample, Sampling
from .sampling_checks import LEAST_TEMPERATURE, finish_reason
from .server_client import Server, ServerFailed, by_threads
from .sharding import stored_buffers

logger = logging.getLogger(__name__)

_SERVE = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
_NAME = r"\d+-[0-9a-f]{12}"  # of weights that a trainer has sent
_LOOK_SECONDS = 5.0  # for a server that was away to say that it is back
_AWAY = (ConnectionError, ServerFailed)


class VLLMServerEngine:
    """Samples on vLLM servers; each process of the trainer asks for its own share.

    Args:
        model: the trainer's policy, as it is saved for the servers.
        servers: their addresses, `http://host:port`; requests are dealt to them in turn.
        folder: of the weights on their way; every server must see it under this path.
        dtype: of the weights that are written; what a server computes in is its own `--dtype`.
        max_rows: most rollouts of this process in flight at a time, >= 1.
        timeout: seconds for the answer to one request, for one step of a reload, or for the return
            of the last server, > 0.
        retries: times that a request is asked again after a server has failed; 0: none, and each
            failure is raised.

    Raises:
        ConnectionError: a server does not answer; names it.
        ValueError: a server cannot do what is asked of it, or an option is out of range.
    """

    capabilities = Capabilities(processed_logprobs=True, min_p=True)

    def __init__(
        self,
        model: PreTrainedModel,
        servers: Sequence[str],
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_rows: int = 512,
        timeout: float = 600.0,
        retries: int = 0,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: expected a count >= 1, got {max_rows}")
        if retries < 0:
            raise ValueError(f"server_retries: expected a count >= 0, got {retries}")
        self.model, self.folder, self.dtype = model, Path(folder).absolute(), dtype
        self.max_rows, self.version = max_rows, 0
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.rank = dist.get_rank() if world_size() > 1 else 0
        self.servers = check_servers(servers, model, timeout, layers=self.rank == 0)
        self.timeout, self.retries = timeout, retries
        self._away: dict[Server, Exception] = {}  # and why
        self._name = ""  # of the weights that the servers have
        self._names: set[str] = set()  # all that this trainer has given

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gives every server new weights; all processes must call, and return together.

        Args:
            named_tensors: (checkpoint name, tensor) pairs, of which the first process keeps a copy
                in the CPU's memory, in the engine's dtype; the model's buffers go along.
            version: number the following samples carry.

        Raises:
            ConnectionError, ValueError: without retries, a server did not take them; with them, no
                server did in `timeout`; on every process.
        """
        if world_size() > 1:
            dist.barrier()  # one that still samples would have a share of other weights
        if self.rank == 0:
            weights = {name: t.to("cpu", self.dtype, copy=True) for name, t in named_tensors}
            weights |= {name: t.cpu() for name, t in stored_buffers(self.model).items()}
            outcome = self._hand_over(weights, version)
        else:
            for _ in named_tensors:  # to gather a sharded one takes all processes
                pass
            outcome = [None, None]
        if world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        failed, self._name = outcome
        self._names.add(self._name)
        if failed is not None:
            raise failed
        self.version = version

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            requests: each with its own sampling.

        Returns:
            For each request its `n` samples.

        Raises:
            ConnectionError, ServerFailed: a server has failed, and so did the retries.
            ValueError: it refuses a request, its answer is none, or another trainer has given it
                weights; or a request that no server can take.
        """
        requests = list(requests)
        for i, request in enumerate(requests):
            _check_request(f"requests[{i}]", request)
        if not requests:
            return []
        at_once = max(1, self.max_rows // max(request.sampling.n for request in requests))
        groups: list[list[Sample] | None] = [None] * len(requests)
        for retries in range(self.retries, -1, -1):
            todo = [i for i, group in enumerate(groups) if group is None]
            ready = self._ready()
            # a process with few prompts must not leave all of them to the first server
            dealt = [ready[(self.rank + n) % len(ready)] for n in range(len(todo))]
            call = self._complete if not retries else self._complete_or_note
            jobs = [(server, requests[i]) for server, i in zip(dealt, todo, strict=True)]
            found = by_threads(call, jobs, min(at_once, len(todo)))
            for server in dict.fromkeys(dealt):
                if server not in self._away:
                    self._look(server, raises=not retries)
            for i, server, group in zip(todo, dealt, found, strict=True):
                if server not in self._away:  # what it sampled with other weights is none
                    groups[i] = group
            if None not in groups:
                break
        return groups

    def close(self) -> None:
        """Removes the weights on disk; the servers go on."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _hand_over(self, weights: dict[str, Tensor], version: int) -> list[Any]:
        """[error or None, name of the new weights]; the first process only."""
        name = f"{version}-{uuid.uuid4().hex[:12]}"
        path = self.folder / name  # a new one each time: no cache of a network folder is stale

        def give(server: Server) -> None:
            try:
                if server in self._away:
                    Server(server.url, min(_LOOK_SECONDS, self.timeout)).call(
                        "/weight_info", once=True
                    )
                _reload(server, path, name)
            except _AWAY as error:
                # the first weights of a run must reach all: what is wrong then will stay so
                if not self.retries or not self._names:
                    raise
                self._note(server, error)
            else:
                self._away.pop(server, None)

        try:
            self.model.save_pretrained(path, state_dict=weights)
            with ThreadPoolExecutor(len(self.servers)) as pool:  # until the last one is done
                list(pool.map(give, self.servers))
            self._name = name
            self._ready()
        except (OSError, ValueError) as error:
            return [error, name]  # whatever the servers have now, it is not that
        finally:
            for old in self.folder.glob("*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
        return [None, name]

    def _ready(self) -> list[Server]:
        """The servers with the last weights, at least one; those that are back are sent them again.

        Raises:
            ConnectionError, ServerFailed: none is back in `timeout`.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            for server in list(self._away):
                self._bring_back(server)
            ready = [server for server in self.servers if server not in self._away]
            if ready:
                return ready
            if time.monotonic() > deadline:
                raise next(iter(self._away.values()))
            time.sleep(1.0)

    def _bring_back(self, server: Server) -> None:
        """Sends the weights again to a server that answers; one that does not stays away."""
        look = Server(server.url, min(_LOOK_SECONDS, self.timeout))
        try:
            found = look.call("/weight_info", once=True).get("weight_version")
            if self._name and found != self._name:
                self._refuse_taken(server, found)
                _reload(server, self.folder / self._name, self._name)
        except _AWAY as error:
            self._away[server] = error
            return
        del self._away[server]
        logger.warning("%s is back, with the last weights", server.url)

    def _note(self, server: Server, error: Exception) -> None:
        """Once for each time that it goes away."""
        if self._away.setdefault(server, error) is error:  # not by two threads
            logger.warning("%s; the server is left out until it is back", error)
        self._away[server] = error

    def _complete_or_note(self, server: Server, request: Request) -> list[Sample] | None:
        if server in self._away:
            return None
        try:
            return self._complete(server, request)
        except _AWAY as error:
            self._note(server, error)
            return None

    def _complete(self, server: Server, request: Request) -> list[Sample]:
        answer = server.call("/v1/completions", _body(request.prompt_ids, request.sampling))
        return _samples(server, answer, request, self.vocabulary, self.version)

    def _look(self, server: Server, *, raises: bool) -> None:
        """Whether it still has the last weights, now that it has answered."""
        try:
            found = server.call("/weight_info").get("weight_version")
            if self._name and found != self._name:
                self._refuse_taken(server, found)
                raise ServerFailed(self._other(server, found))
        except _AWAY as error:
            if raises:
                raise
            self._note(server, error)

    def _refuse_taken(self, server: Server, found: Any) -> None:
        """To send ours again to a server that another trainer uses would spoil both runs."""
        if re.fullmatch(_NAME, str(found)) and found not in self._names:
            raise ValueError(self._other(server, found))

    def _other(self, server: Server, found: Any) -> str:
        return (
            f"{server.url}: expected the weights {self._name!r} of this trainer, found "
            f"{found!r}: it was restarted, or another trainer uses it"
        )


def check_servers(
    servers: Sequence[str],
    model: PreTrainedModel,
    timeout: float,
    *,
    layers: bool,
    tokens: int = 0,
) -> list[Server]:
    """Raises unless every server can sample for a trainer; asks each for eight tokens.

    Args:
        servers: addresses, `http://host:port`.
        model: the policy, whose sizes the servers must have.
        timeout: seconds for an answer.
        layers: count theirs too, which takes a server the time to read its weights.
        tokens: of a prompt with its longest answer.

    Returns:
        A client of each.

    Raises:
        ConnectionError: a server does not answer; names it.
        ValueError: no address, one that is none, one twice; or a server not in dev mode, with raw
            log-probs, with a smaller vocabulary or another number of layers, or with room for
            fewer tokens.
    """
    clients = [Server(url, timeout) for url in servers]
    if not clients or len({client.url for client in clients}) < len(clients):
        raise ValueError(f"servers: expected addresses, each once, got {list(servers)}")
    vocabulary = model.get_input_embeddings().num_embeddings
    for client in clients:
        if client.call("/weight_info", missing_ok=True) is None:
            raise ValueError(
                f"{client.url}: expected vLLM 0.32 or later in dev mode, which can take new "
                f"weights; start it by `{_SERVE}` (without, a server can answer `trimtab-rl eval "
                "--server`, not train)"
            )
        for served in (client.call("/v1/models", missing_ok=True) or {}).get("data", []):
            room = served.get("max_model_len")
            if room is not None and room < tokens:
                raise ValueError(
                    f"{client.url}: expected room for a prompt and its rollout, {tokens} tokens, "
                    f"found {room}; start it with --max-model-len {tokens} or more"
                )
        probe = Request([vocabulary - 1], Sampling(max_tokens=8, top_k=1))
        answer = client.call("/v1/completions", _body(probe.prompt_ids, probe.sampling))
        [sample] = _samples(client, answer, probe, vocabulary, 0)
        if not all(map(_is_of_top_1, sample.logprobs)):
            raise ValueError(
                f"{client.url}: expected log-probs of the distribution sampled from, found raw "
                f"ones; start it by `{_SERVE}`"
            )
        if layers:
            _check_layers(client, model)
    return clients


def _is_of_top_1(logprob: float) -> bool:
    """Whether k tokens of one logit, which top_k=1 keeps all, have 1/k each; in bf16 ties occur."""
    tied = math.exp(-logprob)
    return abs(tied - round(tied)) < 1e-5 * tied


def _check_layers(client: Server, model: PreTrainedModel) -> None:
    """A reload says nothing of layers that it does not fill."""
    try:
        answer = client.call("/weight_checker", {"action": "checksum"}, missing_ok=True)
    except ValueError as error:  # not every kind of worker can
        logger.warning("layers are not compared with the policy's: %s", error)
        return
    expected = _layers(name for name, _ in model.named_parameters())
    found = _layers((answer or {}).get("checksums", {}))
    if found and expected and found != expected:
        raise ValueError(
            f"{client.url}: expected the policy's {len(expected)} layers, found {len(found)}; does "
            "it serve the policy's model?"
        )


def _layers(names: Iterable[str]) -> set[str]:
    # towers for pictures or sound, and layers that predict more tokens, are not the policy's
    text = (name for name in names if not re.search("vis|audio|mtp", name))
    found = (re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name) for name in text)
    return {match[1] for match in found if match}


def _reload(server: Server, path: Path, name: str) -> None:
    """Waits for what is being sampled, replaces the weights and names them."""
    server.call("/pause?mode=wait&clear_cache=true", {})
    try:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        server.call("/collective_rpc", call)
        server.call("/update_weight_version", {"new_version": name})
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            server.call("/resume", {})
        raise type(error)(
            f"{error}; does it see {path}, and serve the policy's model? Start it again: vLLM does "
            "not survive a reload that failed"
        ) from error
    server.call("/resume", {})


def _check_request(where: str, request: Request) -> None:
    if not len(request.prompt_ids):
        raise ValueError(f"{where}: expected a prompt of at least one token, got none")
    if request.sampling.tree is not None:
        raise ValueError(f"{where}: expected no tree, which a server cannot grow, got one")
    if 0 < request.sampling.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"{where}: expected a temperature of 0 or >= {LEAST_TEMPERATURE}, to which vLLM "
            f"raises smaller ones, got {request.sampling.temperature}"
        )


def _body(prompt_ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """A request of /v1/completions; spelled out what a checkpoint's generation_config could set."""
    return {
        "prompt": [int(token) for token in prompt_ids],
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # it ends a rollout where it is one of the stop tokens, and only there
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
    }


def _samples(
    server: Server, answer: Any, request: Request, vocabulary: int, version: int
) -> list[Sample]:
    """The rollouts in an answer, each checked."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        rows = [
            (choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["token_logprobs"])
            for choice in choices
        ]
        samples = [
            Sample(ids, logprobs, finish_reason(ids, request.sampling), version)
            for _, ids, logprobs in rows
        ]
        whole = all(
            prompt == list(request.prompt_ids)
            and all(0 <= token < vocabulary for token in ids)
            and all(math.isfinite(logprob) and logprob < 1e-3 for logprob in logprobs)
            for prompt, ids, logprobs in rows
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{server.url}: expected completions with token ids and their log-probs, got "
            f"{str(answer)[:200]} ({type(error).__name__}: {error})"
        ) from error
    if not whole or len(samples) != request.sampling.n:
        raise ValueError(
            f"{server.url}: expected {request.sampling.n} completions of the prompt, with token "
            f"ids below {vocabulary} and finite log-probs; does it serve the policy's model? Got "
            f"{str(answer)[:200]}"
        )
    return samples
