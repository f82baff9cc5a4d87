"""`TransformersEngine`: rollouts from a transformers causal LM in this process.

It computes a prompt's keys and values once for its whole group, decodes with a static cache for the
responses (`rl/group_cache.py`), drops finished rows as it goes, and samples by inverting the
cumulative distribution at uniform numbers drawn from each request's own seed, so that what a
request samples does not depend on which other requests share its batch (up to the rounding of the
logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .decoding import Prompts, choose_tokens, finished
from .group_cache import ATTENTION, GroupCache, rectangle
from .model_copy import ModelCopy
from .rollout import Capabilities, Request, Sample, Sampling
from .tree import grow_trees


class TransformersEngine(ModelCopy):
    """Samples from a copy of a transformers causal LM, in this process.

    Its batches are static: rows that end are dropped, and no others take their place
    (`ContinuousBatchingEngine` fills it); a call with more than max_rows rollouts is split between
    prompts. The arguments are `ModelCopy`'s.
    """

    attention: ClassVar[str] = ATTENTION
    capabilities = Capabilities(processed_logprobs=True, min_p=True, tree=True)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            requests: may differ in prompt, n, seed and max_tokens, and some may be greedy; the
                rest of their sampling must be the same.

        Returns:
            For each request its `n` samples.

        Raises:
            ValueError: an empty prompt, or requests whose sampling differs.
        """
        requests = list(requests)
        if not requests:
            return []
        check_requests(requests)
        results: list[list[Sample]] = []
        chunk: list[Request] = []
        rows = 0
        for request in requests:
            if chunk and rows + request.sampling.n > self.max_rows:
                results += self._generate_alike(chunk)
                chunk, rows = [], 0
            chunk.append(request)
            rows += request.sampling.n
        return results + self._generate_alike(chunk)

    def _generate_alike(self, requests: list[Request]) -> list[list[Sample]]:
        """The engine has its own dtype: a trainer's autocast around the call must not reach it."""
        device = self.model.get_input_embeddings().weight.device
        tree = [i for i, r in enumerate(requests) if r.sampling.tree and not is_greedy(r)]
        results: list[list[Sample]] = [[] for _ in requests]
        with torch.autocast(device.type, enabled=False):
            if len(tree) < len(requests):
                plain = [i for i in range(len(requests)) if i not in set(tree)]
                found = self._generate([requests[i] for i in plain])
                for i, samples in zip(plain, found, strict=True):
                    results[i] = samples
            if tree:
                found = grow_trees(self.model, [requests[i] for i in tree], self.version)
                for i, samples in zip(tree, found, strict=True):
                    results[i] = samples
        return results

    def _generate(self, requests: list[Request]) -> list[list[Sample]]:
        """Prefill each prompt once, then decode all rows together, finished ones dropped."""
        sampling = next((r.sampling for r in requests if not is_greedy(r)), requests[0].sampling)
        prompts = Prompts(self.model, [r.prompt_ids for r in requests])
        device = prompts.device
        longest = max(r.sampling.max_tokens for r in requests)
        cache = GroupCache(prompts.lengths, longest)
        prompts.prefill(cache)

        samples: list[list[tuple[int, int]]] = [[] for _ in prompts.ids]  # of each prompt
        for r, request in enumerate(requests):
            samples[prompts.of_request[r]] += [(r, i) for i in range(request.sampling.n)]
        segments, width = rectangle([len(of_prompt) for of_prompt in samples])
        cache.begin_decoding(torch.tensor(segments, device=device), width)
        rest = [iter(of_prompt) for of_prompt in samples]
        # (request, sample) of each row; None fills the last segment of a prompt
        source = [next(rest[p], None) for p in segments for _ in range(width)]
        rows = len(source)

        drawn = [_uniforms(r.sampling) for r in requests]
        uniforms = torch.zeros(rows, longest, dtype=torch.float64)
        limits = torch.zeros(rows, dtype=torch.long)
        for row, entry in enumerate(source):
            if entry is not None:
                own = drawn[entry[0]][entry[1]]
                uniforms[row, : len(own)] = own
                limits[row] = len(own)
        limits = limits.to(device)
        uniforms = uniforms.to(device)
        greedy = torch.tensor([e is not None and is_greedy(requests[e[0]]) for e in source])
        greedy = greedy.to(device)
        tokens = torch.zeros(rows, longest, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, longest, dtype=torch.float32, device=device)
        counts = torch.zeros(rows, dtype=torch.long, device=device)
        stops = torch.tensor(sampling.stop_token_ids, device=device, dtype=torch.long)

        row = torch.arange(rows, device=device)  # output row of each row still decoded
        alive = torch.tensor([entry is not None for entry in source], device=device)
        of_row = torch.tensor(segments, device=device).repeat_interleave(width)
        # The last prompt token is the first one decoded: then every step has the same form.
        last, position = prompts.last[of_row], prompts.lengths[of_row]
        for step in range(longest):
            row, alive, last, position = cache.compact(row, alive, last, position)
            logits = self.model(
                last[:, None], position_ids=position[:, None], use_cache=False, group_cache=cache
            ).logits[:, -1]
            last, logp = choose_tokens(logits, sampling, uniforms[row, step], greedy[row])
            written = row[alive]
            tokens[written, step] = last[alive]
            logprobs[written, step] = logp[alive]
            counts[written] = step + 1
            alive = alive & ~torch.isin(last, stops) & (step + 1 < limits[row])
            position = position + 1
            if not alive.any():
                break
        results: list[list[Sample]] = [[] for _ in requests]
        tokens, logprobs, counts = tokens.cpu(), logprobs.cpu(), counts.cpu()
        for i, entry in enumerate(source):  # the samples of a request stand in their order
            if entry is not None:
                ids = tokens[i, : counts[i]].tolist()
                logp = logprobs[i, : counts[i]].tolist()
                results[entry[0]].append(finished(ids, logp, sampling, self.version))
        return results


def is_greedy(request: Request) -> bool:
    """Whether a request asks for the most probable tokens."""
    return request.sampling.temperature == 0


def check_requests(requests: Sequence[Request]) -> None:
    """Refuses requests that cannot be decoded together.

    Args:
        requests: those that sample must agree but in n, seed and max_tokens, and the greedy ones
            with them in what holds for greedy ones.

    Raises:
        ValueError: they differ, or a prompt is empty.
    """
    first = next((r.sampling for r in requests if not is_greedy(r)), requests[0].sampling)
    for i, request in enumerate(requests):
        if not len(request.prompt_ids):
            raise ValueError(f"requests[{i}]: expected a prompt of at least one token, got none")
        same = {name: getattr(first, name) for name in ("n", "seed", "max_tokens")}
        own = replace(request.sampling, **same)
        if is_greedy(request):  # truncation does not change the largest
            others = {name: getattr(first, name) for name in ("top_p", "top_k", "min_p", "tree")}
            own = replace(own, temperature=first.temperature, **others)
        if own != first:
            raise ValueError(
                f"requests[{i}]: expected the sampling of the others (n, seed, max_tokens and "
                f"whether greedy may differ), got {request.sampling} and {first}"
            )


def _uniforms(sampling: Sampling) -> Tensor:
    """[n, max_tokens] float64 uniforms of one request."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(sampling.n, sampling.max_tokens, generator=generator, dtype=torch.float64)
