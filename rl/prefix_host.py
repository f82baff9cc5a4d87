"""A transformers causal LM as the phases of shared-prefix training call it.

The entries of transformers' attention registry are wrapped once: a call whose keyword arguments
carry a phase computes the phase's attention, any other call goes on as before. A keyword argument
is replayed by gradient checkpointing; a context variable or a cache would not be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..triton_kernels.linear_token_stats import linear_token_stats
from ..triton_kernels.token_stats import TokenStats, token_stats
from .prefix_phases import Phase
from .prefix_router import RouterRecorder, RouterSums
from .prefix_support import refuse_for_phases, refuse_unsupported
from .responses import dense_rows, hidden_at, logits_at
from .sharding import is_sharded

logger = logging.getLogger(__name__)

_KEYWORD = "trimtab_phase"
# four dimensions: a model takes it as it is and makes no [N, N] mask; the phases do not read it
_NO_MASK = (1, 1, 1, 1)


def _with_phases(attention: Callable) -> Callable:
    def attention_of_phase(module, query, key, value, attention_mask, *args, **kwargs):
        phase = kwargs.pop(_KEYWORD, None)
        if phase is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        _refuse_call(module, query, key, value, attention_mask, kwargs, phase)
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return phase.attend(id(module), *rows, kwargs.get("scaling"))[None], None

    attention_of_phase.has_phases = True
    return attention_of_phase


def _refuse_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict,
    phase: Phase,
) -> None:
    name = type(module).__name__
    if mask is not None and mask.shape != _NO_MASK:
        raise ValueError(f"model: {name} makes an attention mask of its own, refused")
    for argument in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(argument) is not None:
            raise ValueError(f"model: {name} computes attention with {argument}, refused")
    if kwargs.get("dropout", 0.0):
        raise ValueError(f"model: attention dropout of {kwargs['dropout']} in {name}, expected 0")
    window = kwargs.get("sliding_window")
    if window is not None and window < phase.longest:
        raise ValueError(
            f"model: {name} has a sliding window of {window} tokens, shorter than the longest "
            f"sequence of {phase.longest}"
        )
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise ValueError(f"model: {name} is not causal, refused")
    if query.shape[-1] != value.shape[-1] or key.shape != value.shape:
        raise ValueError(
            f"model: {name} has keys {tuple(key.shape)} and values {tuple(value.shape)}, expected "
            "one shape"
        )


class ForwardResult(NamedTuple):
    """What a call of the model gives.

    Args:
        stats: [N] statistics of the labels; None without labels.
        router: sums of each sequence; None without a recorder.
        root: scalar 0 whose graph is the whole call; None without gradients or with labels.
    """

    stats: TokenStats | None
    router: RouterSums | None
    root: Tensor | None


class TransformersHost:
    """Calls of one model.

    Args:
        model: causal LM; may be wrapped by DDP (whose own forward is not used) or PEFT, or sharded
            by `fully_shard`.
        head: `fused` never stores [tokens, vocabulary] logits.
        temperature: of the statistics.
        prune: rho of the statistics, or None.
        router_loss: whether to record routers.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        temperature: float,
        prune: float | None,
        router_loss: bool,
    ) -> None:
        self.replicas = None
        if isinstance(model, DistributedDataParallel):
            model, self.replicas = model.module, model.process_group
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(model, torch._dynamo.OptimizedModule):
            raise ValueError("model: torch.compile of the whole model, expected the model itself")
        if not isinstance(inner, PreTrainedModel):
            raise ValueError(
                f"model: expected a transformers causal LM, got {type(model).__name__}"
            )
        self.model, self.inner, self.sharded = model, inner, is_sharded(model)
        self.config = inner.config.get_text_config()
        refuse_unsupported(inner, 1)
        refuse_for_phases(model, self.config)
        self.head, self.temperature, self.prune = head, temperature, prune
        top_k = getattr(self.config, "num_experts_per_tok", None)
        self.recorder = RouterRecorder(inner, top_k) if router_loss else None
        # its own loss of the routers would take the mask, which is none, and be thrown away
        self._always: dict[str, Any] = {}
        if getattr(self.config, "output_router_logits", False):
            self._always = {"output_router_logits": False}
            if not router_loss:
                logger.warning(
                    "shared prefix: the model has output_router_logits, but groups compute no loss "
                    "of the routers without SharedPrefix(.., router_loss=True)"
                )

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def resident(self) -> list[Tensor]:
        """Tensors that are alive whatever a prefix does."""
        return [*self.model.parameters(), *self.model.buffers()]

    def attention(self) -> str:
        """Makes the phases' attention reachable; returns what `restore_attention` wants back.

        Eager attention is a function of each model's own and has no entry in the registry.
        """
        before = self.inner.config._attn_implementation
        for name in ("sdpa", before):
            entry = ALL_ATTENTION_FUNCTIONS.get(name)
            if entry is not None and not getattr(entry, "has_phases", False):
                AttentionInterface.register(name, _with_phases(entry))
        if before == "eager":
            self.config._attn_implementation = "sdpa"
        return before

    def restore_attention(self, before: str) -> None:
        self.config._attn_implementation = before

    @property
    def plain(self) -> bool:
        """Whether the last layer's keys and values depend on all others, as autograd sees it.

        Not in a model that is sharded or checkpointed, or whose last layers read others' keys.
        """
        checkpointed = any(
            getattr(m, "gradient_checkpointing", False) and m.training for m in self.inner.modules()
        )
        reused = getattr(self.config, "num_kv_shared_layers", 0)
        return not (self.sharded or checkpointed or reused)

    def check_layers(self, found: int) -> None:
        """Raises if not every layer's attention went through the phases."""
        expected = self.config.num_hidden_layers
        if found != expected:
            raise ValueError(
                f"model: {expected} layers, but {found} of them called transformers' attention; "
                "layers without it (linear attention, state space) are refused"
            )

    def forward(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        phase: Phase,
        labels: Sequence[int] | None,
    ) -> ForwardResult:
        """One row of packed tokens.

        Args:
            ids: N tokens.
            positions: N positions.
            phase: what attention does.
            labels: N next tokens; None: the head does not run.
        """
        device = self.device
        inputs = self._always | {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": torch.tensor([positions], device=device),
            "attention_mask": torch.ones(_NO_MASK, dtype=torch.bool, device=device),
            _KEYWORD: phase,
        }
        recording = self.recorder.recording() if self.recorder else nullcontext()
        with phase.first_run(), recording as logits:
            if labels is None:
                stats, root = None, self._without_head(inputs)
            else:
                stats, root = self._statistics(inputs, range(len(ids)), labels), None
        router = self.recorder.sums(logits, phase.packing.lengths) if self.recorder else None
        return ForwardResult(stats, router, root)

    def dense(self, context: Sequence[int], responses: Sequence[Sequence[int]]) -> ForwardResult:
        """Each response with its own copy of the context, right-padded rows.

        Returns:
            Statistics of the responses' tokens, one response after the other.
        """
        lengths = [len(response) for response in responses]
        tokens = torch.zeros(len(responses), max(lengths), dtype=torch.long, device=self.device)
        for row, response in enumerate(responses):
            tokens[row, : len(response)] = torch.tensor(response)
        group = torch.zeros(len(responses), dtype=torch.long)
        rows = dense_rows([context], tokens, lengths, group)
        labels = [token for response in responses for token in response]
        with self.recorder.recording() if self.recorder else nullcontext() as logits:
            stats = self._statistics(self._always | rows.inputs, rows.kept, labels, rows.pick)
        router = None
        if self.recorder:
            assert len(responses) == 1, "padding would count"
            router = self.recorder.sums(logits, (rows.ids.shape[1],))
        return ForwardResult(stats, router, None)

    def _without_head(self, inputs: dict[str, Any]) -> Tensor | None:
        layer = self.inner.get_output_embeddings()
        seen = []
        hook = layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        try:
            nothing = torch.empty(0, dtype=torch.long, device=self.device)
            logits = logits_at(self.model, inputs, nothing)
        finally:
            hook.remove()
        if not torch.is_grad_enabled():
            return None
        # FSDP2 reduces the gradients of the parameters that backward comes by: the head's too
        return (logits if self.sharded else seen[0]).sum()

    def _statistics(
        self,
        inputs: dict[str, Any],
        kept: Sequence[int] | Tensor,
        labels: Sequence[int],
        pick: Callable[[Tensor], Tensor] = lambda x: x[0],
    ) -> TokenStats:
        kept = torch.as_tensor(kept, device=self.device)
        labels = torch.tensor(labels, device=self.device)
        options = {"temperature": self.temperature, "prune": self.prune}
        if self.head == "logits":
            return token_stats(pick(logits_at(self.model, inputs, kept)), labels, **options)
        hidden, head = hidden_at(self.model, inputs, kept)
        options |= {"bias": head.bias, "softcap": head.softcap}
        return linear_token_stats(pick(hidden), head.weight, labels, **options)
