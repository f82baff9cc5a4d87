"""Rollouts that share segments: a tree of paths for each prompt, every token decoded once.

Paths stand in one pool of keys and values; a path is a list of places in it, so a branch copies
numbers and no keys. At each boundary, `segment` tokens apart, the living paths of a tree branch
until it has as many as rollouts are asked for; when all have ended, the missing ones go back to an
earlier boundary of one that has. What a tree becomes depends on its own seed and tokens alone.

Source: TreePO, arXiv 2508.17445.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decoding import Prompts, choose_tokens, finished
from .group_cache import GroupCache, rectangle
from .rollout import Request, Sample


@dataclass
class _Path:
    """One rollout, so far: tokens, their log-probs, who decoded each segment, places in the pool.

    `places` has one entry per token that was read: the last prompt token and all but the last of
    `ids`.
    """

    ids: list[int]
    logprobs: list[float]
    owners: list[int]
    places: Tensor
    ended: bool = False

    def branch(self, tokens: int, segments: int) -> _Path:
        return _Path(
            self.ids[:tokens], self.logprobs[:tokens], self.owners[:segments], self.places[:tokens]
        )


class _Tree:
    """The paths of one request."""

    def __init__(self, request: Request, prompt: int) -> None:
        assert request.sampling.tree is not None
        self.request, self.prompt, self.shape = request, prompt, request.sampling.tree
        self.paths: list[_Path] = []
        self.chooser = random.Random(request.sampling.seed)
        generator = torch.Generator().manual_seed(request.sampling.seed)
        shape = (request.sampling.n, request.sampling.max_tokens)
        self.uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)

    def living(self) -> list[int]:
        return [i for i, path in enumerate(self.paths) if not path.ended]

    def branch(self) -> None:
        """New paths at a boundary, as many as are missing and may be."""
        for path in self.paths:
            path.ended = path.ended or self._ends(path)
        living = self.living()
        missing = self.request.sampling.n - len(self.paths)
        if not missing:
            return
        if not self.paths:
            nothing = torch.zeros(0, dtype=torch.long)
            for _ in range(min(missing, self.shape.branches)):
                self.paths.append(_Path([], [], [], nothing))
        elif living:  # in turn, so that the tree stays even
            parents = living * (self.shape.branches - 1)
            for parent in parents[:missing]:
                path = self.paths[parent]
                self.paths.append(path.branch(len(path.ids), len(path.owners)))
        else:
            ended = list(self.paths)
            for _ in range(min(missing, self.shape.branches)):
                path = self.chooser.choice(ended)
                # a boundary before its end: going on from the end itself would be no other path
                segments = self.chooser.randrange(len(path.owners))
                self.paths.append(path.branch(segments * self.shape.segment, segments))

    def _ends(self, path: _Path) -> bool:
        size, repeats = self.shape.segment, self.shape.repeats
        if not repeats or len(path.ids) < repeats * size:
            return False
        tail = path.ids[-repeats * size :]
        return tail == tail[-size:] * repeats


class _TreeCache(GroupCache):
    """A pool of keys and values [capacity, Hkv, D] of each layer, and the places each row reads."""

    def __init__(self, lengths: Tensor) -> None:
        super().__init__(lengths, tokens=0)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.pool: dict[int, tuple[Tensor, Tensor]] = {}
        self.used = 0
        self.rows = torch.arange(0)

    def lay_out(self, segments: Tensor, width: int, places: Tensor, used: Tensor) -> None:
        """Rows of the next segment; `places` [R, t + segment] int64, `used` [R] of them filled."""
        self.prompts = self.prompts or self.prefix
        self.prefix = self.prompts
        self.begin_decoding(segments, width)
        self.places, self.filled = places, used
        self.rows = torch.arange(len(places), device=places.device)

    def begin_step(self) -> None:
        """Gives each row a new place in the pool."""
        self.places[self.rows, self.filled] = self.rows + self.used
        self.used += len(self.rows)
        self.filled = self.filled + 1
        self.width_read = int(self.filled.max())
        inside = torch.arange(self.width_read, device=self.rows.device) < self.filled[:, None]
        self.own_padding = torch.where(inside, 0.0, -torch.inf)[:, None, None, :]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.pool.get(layer, (key[:0, :, 0], value[:0, :, 0]))
        if self.used > len(keys):
            more = max(self.used, 2 * len(keys)) - len(keys)
            keys = torch.cat([keys, keys.new_zeros(more, *key[0, :, 0].shape)])
            values = torch.cat([values, values.new_zeros(more, *value[0, :, 0].shape)])
            self.pool[layer] = keys, values
        first = self.used - len(self.rows)
        keys[first : self.used] = key[:, :, 0]
        values[first : self.used] = value[:, :, 0]
        read = self.places[:, : self.width_read]  # what is not filled yet reads place 0, masked
        return keys[read].transpose(1, 2), values[read].transpose(1, 2)


def grow_trees(model: PreTrainedModel, requests: list[Request], version: int) -> list[list[Sample]]:
    """Rollouts of each request, as paths of a tree.

    Args:
        model: of the engine, by `ATTENTION`; called without gradients.
        requests: with `sampling.tree`, of one sampling but for n and seed.
        version: of the weights.

    Returns:
        For each request its `n` samples, with their `path`.
    """
    prompts = Prompts(model, [request.prompt_ids for request in requests])
    cache = _TreeCache(prompts.lengths)
    prompts.prefill(cache)
    trees = [
        _Tree(request, prompt) for request, prompt in zip(requests, prompts.of_request, strict=True)
    ]
    while True:
        for tree in trees:
            tree.branch()
        rows: list[list[tuple[_Tree, int]]] = [[] for _ in prompts.ids]
        for tree in trees:
            rows[tree.prompt] += [(tree, i) for i in tree.living()]
        if not any(rows):
            break
        _decode_segment(model, prompts, cache, rows)
    return [
        [
            replace(
                finished(path.ids, path.logprobs, tree.request.sampling, version),
                path=tuple(path.owners),
            )
            for path in tree.paths
        ]
        for tree in trees
    ]


def _decode_segment(
    model: PreTrainedModel,
    prompts: Prompts,
    cache: _TreeCache,
    rows: list[list[tuple[_Tree, int]]],
) -> None:
    """One segment of every living path; `rows` are those of each prompt."""
    segments, width = rectangle([len(of_prompt) for of_prompt in rows])
    rest = [iter(of_prompt) for of_prompt in rows]
    source = [next(rest[p], None) for p in segments for _ in range(width)]
    sampling, device = _first(source)[0].request.sampling, prompts.device
    assert sampling.tree is not None
    steps = sampling.tree.segment
    paths = [None if entry is None else entry[0].paths[entry[1]] for entry in source]
    used = torch.tensor([0 if path is None else len(path.ids) for path in paths])
    places = torch.zeros(len(source), int(used.max()) + steps, dtype=torch.long)
    for row, path in enumerate(paths):
        if path is not None:
            places[row, : len(path.places)] = path.places
    cache.lay_out(torch.tensor(segments, device=device), width, places.to(device), used.to(device))

    of_row = torch.tensor(segments, device=device).repeat_interleave(width)
    last = prompts.last[of_row]
    going_on = [row for row, path in enumerate(paths) if path is not None and path.ids]
    ends = torch.tensor([paths[row].ids[-1] for row in going_on], dtype=torch.long, device=device)
    last[torch.tensor(going_on, dtype=torch.long, device=device)] = ends
    position = prompts.lengths[of_row] + used.to(device)
    stops = torch.tensor(sampling.stop_token_ids, device=device, dtype=torch.long)
    limits = torch.tensor(
        [0 if entry is None else entry[0].request.sampling.max_tokens for entry in source]
    ).to(device)
    uniforms = torch.zeros(len(source), steps, dtype=torch.float64)
    for row, entry in enumerate(source):
        if entry is not None:
            drawn = entry[0].uniforms[entry[1], used[row] : used[row] + steps]
            uniforms[row, : len(drawn)] = drawn
    uniforms = uniforms.to(device)
    alive = torch.tensor([path is not None for path in paths], device=device)
    nobody = torch.zeros_like(alive)
    for step in range(steps):
        cache.begin_step()
        logits = model(
            last[:, None], position_ids=position[:, None], use_cache=False, group_cache=cache
        ).logits[:, -1]
        last, logp = choose_tokens(logits, sampling, uniforms[:, step], nobody)
        full = position - prompts.lengths[of_row] + 1 >= limits
        written = alive.tolist()
        alive = alive & ~torch.isin(last, stops) & ~full
        after = zip(written, last.tolist(), logp.tolist(), alive.tolist(), strict=True)
        for path, (was_alive, token, logprob, goes_on) in zip(paths, after, strict=True):
            if path is not None and was_alive:
                path.ids.append(token)
                path.logprobs.append(logprob)
                path.ended = not goes_on
        position = position + 1
        if not alive.any():
            break
    filled = cache.places.cpu()
    for row, (path, entry) in enumerate(zip(paths, source, strict=True)):
        if path is not None and entry is not None:
            path.owners.append(entry[1])
            path.places = filled[row, : len(path.ids)].clone()


def _first(source: list[tuple[_Tree, int] | None]) -> tuple[_Tree, int]:
    return next(entry for entry in source if entry is not None)
