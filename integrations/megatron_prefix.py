"""Shared-prefix training of a Megatron-core GPTModel, also over tensor and pipeline parallel ranks.

The schedule of `trimtab.rl.prefix`, run by Megatron's own `get_forward_backward_func`:

    A  one microbatch, forward only: the prompt but its last token; the output layer does not run
    B  the waves, each one microbatch of packed tokens; their loss is taken on the last stage
    C  one microbatch whose loss is 0: the prompt again, to whose keys and values every layer adds
       the gradients that the waves left there

    step = MegatronSharedPrefix(model)
    for prompt_ids, responses in groups:
        metrics = step.accumulate(prompt_ids, responses, loss)
    finalize_model_grads([model])
    optimizer.step()

Attention learns the phase from `packed_seq_params`, which Megatron hands to every layer and again
to every replay of a checkpointed one: so several waves may be under way in a pipeline.

Source: arXiv 2606.01143. Shapes: G responses, T tokens of the longest, N packed tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from ..rl.prefix_checks import check_options, check_statistics, prompt_tokens, response_tokens
from ..rl.prefix_metrics import ForwardCost, PrefixMetrics, call_cost, expected_gain
from ..rl.prefix_phases import Phase, PrefixStore
from ..rl.prefix_waves import (
    LossFunction,
    Tokens,
    Wave,
    WaveOutput,
    joined,
    padded_rows,
    split_rows,
    wave_of,
)
from ..triton_kernels.prefix_attention import Packing
from ..triton_kernels.token_stats import token_stats
from .megatron_model import unwrapped

logger = logging.getLogger(__name__)

# What is refused, and the options of TransformerConfig that ask for it.
_REFUSED = {
    "not causal softmax attention over all tokens": (
        "window_size",
        "multi_latent_attention",
        "experimental_attention_variant",
        "softmax_type",
    ),
    "reads the attention scores": ("qk_clip", "log_max_attention_logit"),
    "rotary embeddings inside the projection": ("fused_single_qkv_rope",),
    "cuts sequences over ranks": ("context_parallel_size", "hybrid_context_parallel"),
    "ranks would wait for each other's waves": ("expert_model_parallel_size",),
    "several model chunks": ("virtual_pipeline_model_parallel_size",),
    "a schedule of its own": ("overlap_moe_expert_parallel_comm", "mtp_num_layers"),
    "weight gradients come later": ("delay_wgrad_compute", "defer_embedding_wgrad_compute"),
    "made for one sequence length": ("cuda_graph_impl", "tp_comm_overlap"),
    "frees what the prefix keeps": ("cpu_offloading", "fine_grained_activation_offloading"),
    "a token depends on the others of its batch": (
        "fp8",
        "fp4",
        "moe_expert_capacity_factor",
        "moe_expert_rank_capacity_factor",
        "moe_token_dropping",
    ),
    "routers with noise": ("moe_input_jitter_eps", "moe_router_force_load_balancing"),
    "an auxiliary loss is not supported here: a shared token would count once": (
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_enable_expert_bias",
    ),
}
# Their values when off, where that is something.
_OFF = {
    "softmax_type": "vanilla",
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "cuda_graph_impl": "none",
}
_POSITIONS = ("rope", "learned_absolute", "none")

# While a group runs: its gradients are reduced by the caller, once; losses add up; lengths differ.
_CONFIG = {
    "finalize_model_grads_func": None,
    "no_sync_func": None,
    "grad_sync_func": None,
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
}


@dataclass
class _PhaseParams(PackedSeqParams):
    """What brings a phase to the attention layers; without `qkv_format`, so none acts on it."""

    phase: Phase | None = None


class _Microbatch(NamedTuple):
    """A call of the model.

    Args:
        ids: N tokens.
        positions: of each.
        phase: what attention does; None: the model's own causal attention of one sequence.
        wave: responses whose tokens are predicted; None: the prefix.
        labels: next tokens of the last inputs.
    """

    ids: list[int]
    positions: list[int]
    phase: Phase | None
    wave: Wave | None = None
    labels: list[int] | None = None


class MegatronSharedPrefix:
    """Trains a GPTModel on groups of responses to one prompt, which is computed once a group.

    All ranks of a model (tensor and pipeline parallel) call it with the same group, data parallel
    ranks each with their own. Gradients are added to `main_grad` under Megatron's
    DistributedDataParallel, else to `grad`, and are not reduced over data parallel ranks: after the
    last group of a step the caller calls `finalize_model_grads([model])` once (with
    `overlap_grad_reduce` after `model.start_grad_sync()`). It scales as DDP does, by default by
    1 / data parallel size.

    Args:
        model: GPTModel, or a list of one; in DistributedDataParallel, Float16Module or both.
        prefix_memory: "recompute": nothing of the prefix but keys and values is kept, phase C runs
            it forward again. The only choice here.
        wave_tokens: most tokens of a wave; a longer response is a wave of its own.
        accum_dtype: of the prefix's gradient buffers, or that of the keys if wider.
        min_bound: a group that is expected to gain less, by its FLOPs and what calls of the model
            cost beside them, runs densely: each response with its own prompt, as a microbatch.
        temperature: of the statistics.
        prune: rho of vocabulary pruning in the statistics, or None.

    Raises:
        ValueError: an argument is out of range, or the model is wrapped otherwise, or it computes
            something else when its prefix is shared: positions other than rotary or learned ones,
            dropout in training mode, attention that is not causal softmax attention over all
            tokens, context, expert or virtual pipeline parallelism, fp8, experts with capacity,
            noise or auxiliary losses, CUDA graphs, offloading; the message names the option.

    Source:
        arXiv 2606.01143; differs from the paper: the boundary token belongs to the responses.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        prefix_memory: Literal["recompute"] = "recompute",
        wave_tokens: int = 16384,
        accum_dtype: torch.dtype = torch.float32,
        min_bound: float = 1.2,
        temperature: float = 1.0,
        prune: float | None = None,
    ) -> None:
        check_options(prefix_memory, wave_tokens, accum_dtype, min_bound, "never", "logits")
        check_statistics(temperature, prune)  # else only the last stage of a pipeline would
        if prefix_memory != "recompute":
            raise ValueError(f"prefix_memory: expected 'recompute', got {prefix_memory!r}")
        self.model, self.gpt = unwrapped(model)
        _refuse_unsupported(self.gpt)
        self.wave_tokens, self.accum_dtype, self.min_bound = wave_tokens, accum_dtype, min_bound
        self.temperature, self.prune = temperature, prune
        self.cost = _forward_cost(self.gpt, self._device)
        self._said_dense = False

    def accumulate(
        self, prompt_ids: Tokens, responses: Sequence[Tokens], loss: LossFunction
    ) -> dict[str, float]:
        """Adds the gradients of one group.

        If it raises, gradients are those of a part of the group: drop the step. (In a pipeline the
        other stages then wait for this one, as with any loss of Megatron's.)

        Args:
            prompt_ids: [P + 1] token ids, or [G, P + 1] with equal rows.
            responses: token ids of each response, without the prompt and without padding.
            loss: of a `WaveOutput` and its `Wave`, a scalar; the group's loss is the plain sum over
                waves, so its normalisers are global. Called on the last stage, on every tensor
                parallel rank alike.

        Returns:
            prefix/bound, prefix/shared, prefix/unique_tokens, prefix/logical_tokens and others, see
            `PrefixMetrics`; on the last stage also prefix/loss, the sum of the losses.

        Raises:
            ValueError: as when it was made; differing prompts, a response without a token, a token
                outside the vocabulary, a loss that is not a scalar with a graph; with
                `sequence_parallel` a number of packed tokens that the ranks do not divide.
        """
        metrics = PrefixMetrics()
        with torch.enable_grad():
            losses = self._run(prompt_ids, responses, loss, metrics)
        found = metrics.as_dict()
        if losses:
            found["prefix/loss"] = float(torch.stack(losses).sum())
        return found

    def statistics(self, prompt_ids: Tokens, responses: Sequence[Tokens]) -> WaveOutput | None:
        """Statistics of all responses, without gradients: old or reference log-probabilities.

        Args:
            prompt_ids: as in `accumulate`.
            responses: as in `accumulate`.

        Returns:
            WaveOutput of [G, T] tensors on the last stage, else None.

        Raises:
            ValueError: as in `accumulate`.
        """
        with torch.no_grad():
            outs = self._run(prompt_ids, responses, None, PrefixMetrics())
        if not outs:
            return None
        tokens = response_tokens(responses)
        whole = wave_of(range(len(tokens)), tokens, self._device)
        return joined([out for out, _ in outs], [wave for _, wave in outs], whole)

    # What the phases have in common

    def _run(
        self,
        prompt_ids: Tokens,
        responses: Sequence[Tokens],
        loss: LossFunction | None,
        metrics: PrefixMetrics,
    ) -> list[Any]:
        """All phases; what `_wave_loss` gives of each wave, on the last stage."""
        _refuse_unsupported(self.gpt)
        prompt = prompt_tokens(prompt_ids, None, self.gpt.vocab_size)
        tokens = response_tokens(responses, self.gpt.vocab_size, empty=False)
        train = loss is not None
        store = PrefixStore(self.accum_dtype if train else None)
        shared = self._decide(len(prompt) - 1, [len(t) for t in tokens], train, metrics)
        prefix = self._prefix(prompt, store)
        waves = self._waves(prompt, tokens, store) if shared else self._dense(prompt, tokens)
        self._refuse_lengths([prefix, *waves] if shared else waves)
        no_sync = getattr(self.model, "no_sync", nullcontext)
        timed = partial(metrics.timed, device=self._device)
        loss_of_wave = partial(self._wave_loss, loss)
        config = get_model_config(self.model)
        try:
            with _attributes(config, **_CONFIG), no_sync():
                if not shared:
                    with timed("waves"):
                        return self._schedule(waves, loss_of_wave, train)
                with self._attention():
                    with timed("prefix_forward"):
                        self._schedule([prefix], _no_loss, False)
                    self._check_layers(store)
                    metrics.add_prefix(len(prefix.ids), store.bytes, 0.0, 0.0)
                    with timed("waves"):
                        found = self._schedule(waves, loss_of_wave, train)
                    if train:
                        store.drop_keys()
                        with timed("prefix_backward"):
                            self._schedule([prefix], _no_loss, True)
                        store.check_arrived()
                    return found
        finally:
            store.clear()

    def _decide(self, prefix: int, lengths: list[int], train: bool, metrics: PrefixMetrics) -> bool:
        """Whether to share; the same on all ranks, since it depends on the group alone."""
        cost = self.cost
        dense, waves = cost.group(prefix, lengths, train)
        passes = 4 if train else 1  # of the prefix
        once = passes * cost.layers(prefix)
        dense_calls = cost.calls(len(lengths), train)
        calls = cost.calls(len(split_rows(lengths, self.wave_tokens)), train) + passes * cost.call
        gain, bound = expected_gain(dense, dense_calls, waves + once, calls)
        shared = prefix > 0 and gain >= self.min_bound
        logical = sum(lengths) + prefix * len(lengths)
        metrics.add_waves(
            dense=dense,
            dense_calls=dense_calls,
            shared=waves + once,
            shared_calls=calls,
            logical=logical,
            unique=sum(lengths) if shared else logical,
            is_shared=shared,
        )
        if not shared and not self._said_dense:
            self._said_dense = True
            logger.warning(
                "shared prefix: sharing %d tokens among %d responses of %.0f tokens is expected to "
                "be %.2f times as fast (%.2f by FLOPs alone), min_bound is %.2f: such groups run "
                "densely",
                prefix, len(lengths), sum(lengths) / len(lengths), gain, bound, self.min_bound,
            )  # fmt: skip
        return shared

    def _schedule(
        self, microbatches: Sequence[_Microbatch], loss: Callable[..., tuple], train: bool
    ) -> list[Any]:
        """Megatron's forward, and backward, of all microbatches."""

        def forward_step(iterator: Iterator[_Microbatch], _model: nn.Module, *_: object) -> tuple:
            batch = next(iterator)
            return self._forward(batch), partial(loss, batch)

        with torch.set_grad_enabled(train):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=[self.model],
                num_microbatches=len(microbatches),
                seq_length=max(len(batch.ids) for batch in microbatches),
                micro_batch_size=1,
                forward_only=not train,
            )

    def _forward(self, batch: _Microbatch) -> Tensor:
        positions = torch.tensor(batch.positions, device=self._device)
        inputs = {
            "input_ids": torch.tensor([batch.ids], device=self._device),
            "position_ids": positions[None],
            "attention_mask": None,
        }
        if batch.phase is None:
            return self.model(**inputs)
        length = len(batch.ids)
        params = _PhaseParams(max_seqlen_q=length, max_seqlen_kv=length, phase=batch.phase)
        with ExitStack() as stack:
            if self.gpt.position_embedding_type == "rope":
                # what the model makes for one sequence, cached by its length, at our positions
                table = self.gpt.rotary_pos_emb.get_emb(max(batch.positions) + 1)
                rope = partial(_constant, table[positions])
                stack.enter_context(_attributes(self.gpt.rotary_pos_emb, forward=rope))
            if batch.wave is None:
                # the decoder has a flag of its own, by which the final norm stays
                stack.enter_context(_attributes(self.gpt, post_process=False))
            return self.model(**inputs, packed_seq_params=params)

    def _wave_loss(self, loss: LossFunction | None, batch: _Microbatch, logits: Tensor) -> tuple:
        """Megatron's triple of a microbatch: loss, a count that is not used, what to collect."""
        rows = logits[0, len(batch.ids) - len(batch.labels) :]
        cut = self.gpt.parallel_output and self.gpt.pg_collection.tp.size() > 1
        stats = token_stats(
            rows,
            torch.tensor(batch.labels, device=rows.device),
            temperature=self.temperature,
            prune=self.prune,
            group=self.gpt.pg_collection.tp if cut else None,
        )
        out = WaveOutput(*padded_rows(stats, batch.wave.mask), None)
        if loss is None:
            return logits, torch.tensor(1), (out, batch.wave)
        value = loss(out, batch.wave)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss: expected a scalar tensor with a graph, got {value!r}")
        # a copy, since the schedule may free it, and refuses to free a view
        return value.reshape(()).clone(), torch.tensor(1), value.detach().reshape(())

    # Microbatches

    @property
    def _device(self) -> torch.device:
        return next(self.gpt.parameters()).device

    def _prefix(self, prompt: list[int], store: PrefixStore) -> _Microbatch | None:
        ids = prompt[:-1]
        if not ids:
            return None
        phase = Phase([], Packing([len(ids)], self._device), store)
        return _Microbatch(ids, list(range(len(ids))), phase)

    def _waves(
        self, prompt: list[int], tokens: list[list[int]], store: PrefixStore
    ) -> list[_Microbatch]:
        found = []
        for rows in split_rows([len(t) for t in tokens], self.wave_tokens):
            chosen = [tokens[row] for row in rows]
            ids = [x for t in chosen for x in (prompt[-1], *t[:-1])]
            positions = [len(prompt) - 1 + x for t in chosen for x in range(len(t))]
            phase = Phase([store], Packing([len(t) for t in chosen], self._device))
            labels = [x for t in chosen for x in t]
            wave = wave_of(rows, tokens, self._device)
            found.append(_Microbatch(ids, positions, phase, wave, labels))
        return found

    def _dense(self, prompt: list[int], tokens: list[list[int]]) -> list[_Microbatch]:
        found = []
        for row, response in enumerate(tokens):
            ids = prompt + response[:-1]
            wave = wave_of([row], tokens, self._device)
            found.append(_Microbatch(ids, list(range(len(ids))), None, wave, response))
        return found

    # The model

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Every layer computes the attention of the phase that its call carries."""
        config = self.gpt.config
        scale = getattr(config, "softmax_scale", None) or config.kv_channels**-0.5
        with ExitStack() as stack:
            for number, layer in enumerate(self.gpt.decoder.layers):
                attend = partial(_attend, number, scale)
                core = layer.self_attention.core_attention
                stack.enter_context(_attributes(core, forward=attend))
            yield

    def _check_layers(self, store: PrefixStore) -> None:
        expected = len(self.gpt.decoder.layers)
        if len(store.segments) != expected:
            raise ValueError(
                f"model: {expected} layers, but {len(store.segments)} of them called their "
                "core_attention, refused"
            )

    def _refuse_lengths(self, microbatches: Sequence[_Microbatch]) -> None:
        ranks = self.gpt.pg_collection.tp.size()
        for batch in microbatches if self.gpt.config.sequence_parallel else ():
            if len(batch.ids) % ranks:
                raise ValueError(
                    f"sequence_parallel: expected packed tokens in multiples of {ranks} ranks, got "
                    f"{len(batch.ids)} of {'the prefix' if batch.wave is None else 'a wave'}"
                )


def _attend(
    layer: int,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
    packed_seq_params: PackedSeqParams | None = None,
    **__: object,
) -> Tensor:
    """Core attention of [N, 1, heads, width]; output [N, 1, heads * width]."""
    if not isinstance(packed_seq_params, _PhaseParams):
        raise ValueError(
            "packed_seq_params: the model packs sequences itself, or does not hand on what it is "
            f"called with (got {type(packed_seq_params).__name__}), refused"
        )
    rows = (x.squeeze(1) for x in (query, key, value))
    return packed_seq_params.phase.attend(layer, *rows, scale).flatten(1)[:, None]


def _no_loss(_batch: _Microbatch, hidden: Tensor) -> tuple:
    """0 with the graph of the whole call: the prefix has no gradient but the waves'."""
    return 0.0 * hidden.sum(), torch.tensor(1), None


def _constant(value: Tensor, *_: object, **__: object) -> Tensor:
    return value


@contextmanager
def _attributes(owner: object, **values: object) -> Iterator[None]:
    """Sets attributes of one instance; afterwards each is what it was, or its class's again."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


def _refuse_unsupported(gpt: GPTModel) -> None:
    """Raises for what would be computed otherwise, or not at all, when a prefix is shared."""
    config = gpt.config
    for reason, names in _REFUSED.items():
        for name in names:
            value, off = getattr(config, name, None), _OFF.get(name)
            if (any(value) if isinstance(value, list) else value) and value != off:
                raise ValueError(f"model: {name} is {value} ({reason}), expected {off or 'none'}")
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise ValueError(
            "model: moe_router_load_balancing_type is sinkhorn (experts choose tokens), refused"
        )
    if gpt.position_embedding_type not in _POSITIONS:
        raise ValueError(
            f"model: position_embedding_type is {gpt.position_embedding_type!r}, expected one of "
            f"{_POSITIONS}"
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if gpt.training and getattr(config, name):
            raise ValueError(f"model: {name} is {getattr(config, name)} in training, expected 0")
    for layer in gpt.decoder.layers:
        attention = getattr(layer, "self_attention", None)
        if not isinstance(attention, SelfAttention):
            raise ValueError(f"model: a layer attends by {type(attention).__name__}, refused")
        if attention.attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"model: attention mask {attention.attn_mask_type}, expected causal")


def _forward_cost(gpt: GPTModel, device: torch.device) -> ForwardCost:
    """FLOPs of the whole model, of which a rank may hold a part; of experts those of one token."""
    c = gpt.config
    heads, width = c.num_attention_heads, c.kv_channels
    own = 2 * heads + 2 * c.num_query_groups + (heads if c.attention_output_gate else 0)
    matrices = (3 if c.gated_linear_unit else 2) * c.hidden_size
    experts = 0
    if c.num_moe_experts:
        every = c.moe_layer_freq
        experts = sum(every) if isinstance(every, list) else -(-c.num_layers // every)
    visited = c.moe_router_topk * (c.moe_ffn_hidden_size or c.ffn_hidden_size) + (
        c.moe_shared_expert_intermediate_size or 0
    )
    token = c.num_layers * c.hidden_size * width * own
    token += matrices * ((c.num_layers - experts) * c.ffn_hidden_size + experts * visited)
    pair = 4 * heads * width * c.num_layers
    call = call_cost(device, c.num_layers, 2.0 * token)
    return ForwardCost(2.0 * token, float(pair), 2.0 * c.hidden_size * gpt.vocab_size, call)
