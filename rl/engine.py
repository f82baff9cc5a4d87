"""`TransformersEngine`: rollouts from a transformers causal LM in this process.

It computes a prompt's keys and values once for its whole group, decodes with a static cache for the
responses, drops finished rows as it goes, and samples by inverting the cumulative distribution at
uniform numbers drawn from each request's own seed, so that what a request samples does not depend
on which other requests share its batch (up to the rounding of the logits).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .prefix_support import refuse_unsupported
from .rollout import Capabilities, FinishReason, Request, Sample, Sampling, truncate_distribution


def quantize_weights_(model: nn.Module, bits: int, group: int = 64) -> None:
    """Rounds every linear weight to `bits` integers with one scale per `group` input columns.

    Weight-only round-to-nearest, kept dequantised in the model's dtype: the numbers an integer
    engine would compute with, without its kernels. Embeddings, the output head, and experts that
    are stacked in one parameter stay as they are.

    Args:
        model: changed in place.
        bits: 4 or 8.
        group: columns that share a scale.

    Raises:
        ValueError: bits is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantize_bits: expected 4 or 8, got {bits}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            weight = module.weight.data
            if isinstance(module, Conv1D):  # GPT-2's layers keep [in, out]
                weight = weight.T
            rows, columns = weight.shape
            padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
            top = 2 ** (bits - 1) - 1
            scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
            rounded = (padded / scale).round().clamp(-top - 1, top) * scale
            weight.copy_(rounded.view(rows, -1)[:, :columns])


class TransformersEngine:
    """Samples from a copy of a transformers causal LM, in this process.

    The copy may have another dtype or rounded weights than the trainer's model: then the mismatch
    between the two is the real thing, as between a training and an inference engine.

    Args:
        model: a causal LM whose attention goes through transformers' attention registry; copied.
        dtype: of the copy; float32 is the control without mismatch.
        quantize_bits: 4 or 8 rounds the copy's linear weights; None does not.
        max_rows: most rollouts decoded at a time; a call with more is split between prompts.

    Raises:
        ValueError: the model has layers whose attention this engine cannot do exactly.
    """

    capabilities = Capabilities(processed_logprobs=True, min_p=True)

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quantize_bits: int | None = None,
        max_rows: int = 512,
    ) -> None:
        refuse_unsupported(model)
        if max_rows < 1:
            raise ValueError(f"max_rows: expected a count >= 1, got {max_rows}")
        self.quantize_bits, self.max_rows, self.version = quantize_bits, max_rows, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            # not model.to(dtype): buffers would go along, and bf16 rotary frequencies turn far
            # positions by the wrong angle
            parameter.data = parameter.data.to(dtype)
        self.model.set_attn_implementation(_ATTENTION_NAME)
        if quantize_bits is not None:
            quantize_weights_(self.model, quantize_bits)

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies new weights in, cast to the engine's dtype and rounded if it rounds.

        Args:
            named_tensors: (checkpoint name, tensor) pairs; every name must exist here.
            version: number the following samples carry.

        Raises:
            ValueError: a name is unknown or a shape differs (nothing is copied then).
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        new = list(named_tensors)
        for name, tensor in new:
            if name not in own or own[name].shape != tensor.shape:
                expected = tuple(own[name].shape) if name in own else "no such weight"
                raise ValueError(
                    f"named_tensors: {name} is {tuple(tensor.shape)}, here: {expected}"
                )
        for name, tensor in new:
            own[name].copy_(tensor)
        if self.quantize_bits is not None:
            quantize_weights_(self.model, self.quantize_bits)
        self.version = version

    def to(self, device: torch.device) -> None:
        """Moves the engine's copy of the model.

        Args:
            device: where it samples from now on.
        """
        self.model.to(device)

    def close(self) -> None:
        """Nothing to free."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples of each request, in order.

        Args:
            requests: may differ in prompt, n and seed, and some may be greedy; the rest of their
                sampling must be the same.

        Returns:
            For each request its `n` samples.

        Raises:
            ValueError: an empty prompt, or requests whose sampling differs.
        """
        requests = list(requests)
        if not requests:
            return []
        _check_requests(requests)
        results: list[list[Sample]] = []
        chunk: list[Request] = []
        widest = 0
        for request in requests:
            widest = max(widest, request.sampling.n)
            if chunk and (len(chunk) + 1) * widest > self.max_rows:
                results += self._generate_alike(chunk)
                chunk, widest = [], request.sampling.n
            chunk.append(request)
        return results + self._generate_alike(chunk)

    def _generate_alike(self, requests: list[Request]) -> list[list[Sample]]:
        """The engine has its own dtype: a trainer's autocast around the call must not reach it."""
        device = self.model.get_input_embeddings().weight.device
        with torch.autocast(device.type, enabled=False):
            return self._generate(requests)

    def _generate(self, requests: list[Request]) -> list[list[Sample]]:
        """One padded batch of groups: prefill each prompt once, then decode all rows together."""
        sampling = next((r.sampling for r in requests if not _greedy(r)), requests[0].sampling)
        device = self.model.get_input_embeddings().weight.device
        width = max(r.sampling.n for r in requests)
        # The last prompt token is the first one decoded: then every step has the same form.
        lengths = torch.tensor([len(r.prompt_ids) - 1 for r in requests], device=device)
        cache = _GroupCache(self.model, lengths, width, sampling.max_tokens)
        if int(lengths.max()) > 0:
            prompts = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long)
            for row, request in enumerate(requests):
                prompts[row, : len(request.prompt_ids) - 1] = torch.tensor(request.prompt_ids[:-1])
            self.model(prompts.to(device), use_cache=False, logits_to_keep=1, group_cache=cache)
        cache.begin_decoding()

        uniforms = torch.stack([_uniforms(r.sampling, width) for r in requests]).to(device)
        uniforms = uniforms.flatten(0, 1)  # [rows, max_tokens]
        greedy = torch.tensor([_greedy(r) for r in requests], device=device)
        greedy = greedy.repeat_interleave(width)
        rows = len(requests) * width
        tokens = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, sampling.max_tokens, dtype=torch.float32, device=device)
        counts = torch.zeros(rows, dtype=torch.long, device=device)
        stops = torch.tensor(sampling.stop_token_ids, device=device, dtype=torch.long)

        row = torch.arange(rows, device=device)  # output row of each row still decoded
        sizes = torch.tensor([r.sampling.n for r in requests], device=device)
        alive = (row % width) < sizes[row // width]
        last = torch.tensor([r.prompt_ids[-1] for r in requests], device=device)
        last = last.repeat_interleave(width)
        position = lengths.repeat_interleave(width)
        for step in range(sampling.max_tokens):
            row, alive, last, position = cache.compact(row, alive, last, position)
            logits = self.model(
                last[:, None], position_ids=position[:, None], use_cache=False, group_cache=cache
            ).logits[:, -1]
            last, logp = _choose(logits, sampling, uniforms[row, step], greedy[row])
            written = row[alive]
            tokens[written, step] = last[alive]
            logprobs[written, step] = logp[alive]
            counts[written] = step + 1
            alive = alive & ~torch.isin(last, stops)
            position = position + 1
            if not alive.any():
                break
        return self._samples(requests, width, tokens.cpu(), logprobs.cpu(), counts.cpu())

    def _samples(
        self, requests: list[Request], width: int, tokens: Tensor, logprobs: Tensor, counts: Tensor
    ) -> list[list[Sample]]:
        groups = []
        for g, request in enumerate(requests):
            group = []
            for row in range(g * width, g * width + request.sampling.n):
                count = int(counts[row])
                ids = tokens[row, :count].tolist()
                stopped = ids[-1] in request.sampling.stop_token_ids
                reason: FinishReason = "stop" if stopped else "length"
                group.append(Sample(ids, logprobs[row, :count].tolist(), reason, self.version))
            groups.append(group)
        return groups


def _greedy(request: Request) -> bool:
    return request.sampling.temperature == 0


def _check_requests(requests: list[Request]) -> None:
    """Those that sample must agree, and the greedy ones with them in what holds for greedy ones."""
    first = next((r.sampling for r in requests if not _greedy(r)), requests[0].sampling)
    for i, request in enumerate(requests):
        if not len(request.prompt_ids):
            raise ValueError(f"requests[{i}]: expected a prompt of at least one token, got none")
        own = replace(request.sampling, n=first.n, seed=first.seed)
        if _greedy(request):  # truncation does not change the largest
            truncation = {name: getattr(first, name) for name in ("top_p", "top_k", "min_p")}
            own = replace(own, temperature=first.temperature, **truncation)
        if own != first:
            raise ValueError(
                f"requests[{i}]: expected the sampling of the others (n, seed and whether greedy "
                f"may differ), got {request.sampling} and {first}"
            )


def _uniforms(sampling: Sampling, width: int) -> Tensor:
    """[width, max_tokens] float64 uniforms of one request; row r is the same whatever the width."""
    generator = torch.Generator().manual_seed(sampling.seed)
    drawn = torch.rand(sampling.n, sampling.max_tokens, generator=generator, dtype=torch.float64)
    return torch.cat([drawn, drawn.new_zeros(width - sampling.n, sampling.max_tokens)])


def _choose(
    logits: Tensor, sampling: Sampling, uniform: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids [rows] and their log-probabilities [rows]."""
    chosen, logp = logits.argmax(-1), logits.float()
    if greedy.all():
        logp = logp.log_softmax(-1)
    else:
        sampled_logp = truncate_distribution(logits, sampling)
        cumulative = sampled_logp.double().exp().cumsum(-1)
        # scaled by the total, so that rounding can never put the target beyond the last token
        target = uniform[:, None] * cumulative[:, -1:]
        sampled = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        chosen = torch.where(greedy, chosen, sampled.clamp_max(logits.shape[-1] - 1))
        if greedy.any():
            logp = torch.where(greedy[:, None], logp.log_softmax(-1), sampled_logp)
        else:
            logp = sampled_logp
    return chosen, logp.gather(-1, chosen[:, None]).squeeze(-1)


class _GroupCache:
    """Keys and values of one batch of groups: per prompt [P, Hkv, L, D], per row [R, Hkv, T, D].

    Passed to the attention function through the model's keyword arguments. Rows are ordered by
    group, with the same number of rows (some of them finished) in each group.
    """

    def __init__(self, model: PreTrainedModel, lengths: Tensor, width: int, tokens: int) -> None:
        self.lengths, self.width, self.tokens = lengths, width, tokens
        self.decoding = False
        self.step = -1
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffix: dict[int, tuple[Tensor, Tensor]] = {}
        self.padding: Tensor | None = None
        self.first_layer: int | None = None

    def begin_decoding(self) -> None:
        self.decoding = True
        longest = int(self.lengths.max())
        inside = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        self.padding = torch.where(inside, 0.0, -torch.inf)[:, None, None, :]  # [P, 1, 1, L]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds this step's [R, Hkv, 1, D] and returns what the rows have so far, [R, Hkv, t, D]."""
        if self.first_layer is None:
            self.first_layer = layer
        if layer == self.first_layer:
            self.step += 1
        if layer not in self.suffix:
            rows, heads, _, size = key.shape
            shape = (rows, heads, self.tokens, size)
            self.suffix[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.suffix[layer]
        keys[:, :, self.step] = key[:, :, 0]
        values[:, :, self.step] = value[:, :, 0]
        return keys[:, :, : self.step + 1], values[:, :, : self.step + 1]

    def compact(
        self, row: Tensor, alive: Tensor, last: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drops finished groups and, in the others, finished rows, once a quarter can go."""
        groups = alive.view(-1, self.width)
        left = groups.sum(-1)
        width = int(left.max())
        kept_groups = left > 0
        if int(kept_groups.sum()) * width > 0.75 * row.numel():
            return row, alive, last, position
        # living rows first, in their order; then as many finished ones as fill the rectangle
        order = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :width]
        start = torch.arange(groups.shape[0], device=row.device)[:, None] * self.width
        chosen = (order + start)[kept_groups].flatten()
        self.width = width
        self.lengths = self.lengths[kept_groups]
        self.prefix = {
            layer: (k[kept_groups], v[kept_groups]) for layer, (k, v) in self.prefix.items()
        }
        self.suffix = {layer: (k[chosen], v[chosen]) for layer, (k, v) in self.suffix.items()}
        if self.padding is not None:
            self.padding = self.padding[kept_groups]
        return row[chosen], alive[chosen], last[chosen], position[chosen]


def _group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    group_cache: _GroupCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the engine's model: causal over prompts, then two segments per decoded token."""
    for name in ("softcap", "s_aux", "sliding_window"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"model: attention with {name} is refused, this engine would ignore it"
            )
    assert group_cache is not None, "this model belongs to a TransformersEngine"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    if not group_cache.decoding:  # right padding is invisible to a causal row before it
        group_cache.prefix[layer] = (key.transpose(-1, -2).contiguous(), value.contiguous())
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out.transpose(1, 2), None

    own_keys, own_values = group_cache.append(layer, key, value)
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    query = query.view(rows, kv_heads, heads // kv_heads, size) * scale  # [R, Hkv, H/Hkv, D]
    scores = query @ own_keys.transpose(-1, -2)  # [R, Hkv, H/Hkv, t]
    if layer not in group_cache.prefix:  # prompts of one token have no prefix
        out = scores.softmax(-1) @ own_values
        return out.view(rows, 1, heads, size), None
    keys, values = group_cache.prefix[layer]
    groups, width, length = keys.shape[0], group_cache.width, keys.shape[-1]

    def by_group(x: Tensor) -> Tensor:  # [R, Hkv, H/Hkv, *] -> [P, Hkv, rows of a group * H/Hkv, *]
        x = x.view(groups, width, kv_heads, heads // kv_heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(groups, kv_heads, width * (heads // kv_heads), x.shape[-1])

    def by_row(x: Tensor) -> Tensor:
        x = x.view(groups, kv_heads, width, heads // kv_heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(rows, kv_heads, heads // kv_heads, x.shape[-1])

    prefix_scores = by_row(by_group(query) @ keys + group_cache.padding.to(query.dtype))
    weights = torch.cat([prefix_scores, scores], -1).softmax(-1)
    out = by_row(by_group(weights[..., :length]) @ values) + weights[..., length:] @ own_values
    return out.reshape(rows, 1, heads, size), None


_ATTENTION_NAME = "trimtab_group_decode"
# A name without a mask function: transformers then builds no mask, and this function needs none.
AttentionInterface.register(_ATTENTION_NAME, _group_attention)
