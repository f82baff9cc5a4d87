"""TRL's GRPOTrainer with each distinct prompt of a batch computed once.

    trainer = SharedPrefixGRPOTrainer(
        model, reward_funcs, args=GRPOConfig(per_device_train_batch_size=64, num_generations=16),
        train_dataset=dataset, shared_prefix={"wave_tokens": 16384},
    )

TRL takes the update backward itself, through [B, T] log-probabilities. Here those come from groups
without a graph, and their backward runs the groups' three phases with the gradients that arrive,
adding to `.grad` on the way as reentrant checkpointing does. So the responses go forward twice:
FLOPs of an update in units of a forward pass, P of the distinct prompts, S of the responses, D of
all rows with their prompts: 5 P + 4 S (4 P + 4 S with prefix_memory "keep" or "offload") instead of
3 D. Old and reference log-probabilities, which have no backward: P + S instead of D.

Prompts are shared within what TRL hands over at once: the whole generation batch for old and
reference log-probabilities, `per_device_train_batch_size` shuffled rows for the update. So make
that as large as the generation batch (steps_per_generation=1): waves bound the memory, not rows.

Of TRL (read and run at 1.16.0, trainer/grpo_trainer.py): `_get_per_token_logps_and_entropies` is
the one place that calls the model for log-probabilities, and private. The fused LM head that TRL
patches into `model.forward` acts only on calls with fused_lm_head=True, which groups do not pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from trl import GRPOTrainer

from ..rl.prefix import SharedPrefix, Wave, WaveOutput
from ..rl.prefix_metrics import expected_gain
from ..rl.prefix_waves import split_rows

_logger = logging.getLogger(__name__)

# What TRL's own path could not do as well, where a batch takes it.
_OPTIONS = frozenset(("prefix_memory", "wave_tokens", "accum_dtype", "min_bound", "verify", "head"))


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probabilities and entropies are computed by `SharedPrefix`.

    Gradients, losses and TRL's metrics are those of GRPOTrainer, to rounding. A batch that would
    gain less than `min_bound` (every prompt another, say) takes GRPOTrainer's own path, which is
    logged once. Adds metrics: `prefix/bound`, FLOPs of GRPOTrainer's updates over those done;
    `prefix/shared`, `prefix/hot_bytes` and `prefix/seconds_*`, see `SharedPrefix.metrics`.

    Args:
        *args: of GRPOTrainer.
        shared_prefix: keyword arguments of SharedPrefix: prefix_memory, wave_tokens, accum_dtype,
            min_bound, verify, head. The temperature is the trainer's.
        **kwargs: of GRPOTrainer.

    Raises:
        TypeError: another option in `shared_prefix`.
        ValueError: several processes (gradients that appear within a backward pass would not be
            reduced), DeepSpeed or FSDP, a compiled model, Liger kernels, a loss of the routers, a
            head in fp32 under mixed precision, images; on the first batch, a model that
            SharedPrefix refuses.

    Source: arXiv 2606.01143; see SharedPrefix.
    """

    def __init__(
        self, *args: Any, shared_prefix: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self._options = dict(shared_prefix or {})
        unknown = self._options.keys() - _OPTIONS
        if unknown:
            raise TypeError(
                f"shared_prefix: expected some of {sorted(_OPTIONS)}, found {sorted(unknown)}"
            )
        super().__init__(*args, **kwargs)
        self._refuse()
        self._steps: dict[nn.Module, SharedPrefix] = {}  # of the policy and of a reference model
        self._flops = torch.zeros(2, dtype=torch.float64)  # of updates: GRPOTrainer's, and done
        self._said_stock = False

    def _refuse(self) -> None:
        mixed = self.accelerator.mixed_precision != "no"
        distributed = self.accelerator.distributed_type.value
        for refused, reason in (
            (
                self.accelerator.num_processes > 1 or distributed != "NO",
                f"one process, got {self.accelerator.num_processes} ({distributed}): gradients "
                "that appear within a backward pass would not be reduced",
            ),
            (self.args.torch_compile, "args.torch_compile=False: the phases replace attention"),
            (
                self.args.use_liger_kernel,
                "args.use_liger_kernel=False: its kernels are untested with shared prefixes",
            ),
            (
                self.aux_loss_enabled,
                "args.router_aux_loss_coef=0: the routers' loss of a batch counts its padding",
            ),
            (
                self.args.cast_lm_head_to_fp32 and mixed,
                "args.cast_lm_head_to_fp32=False under mixed precision, which would undo it",
            ),
        ):
            if refused:
                raise ValueError(f"SharedPrefixGRPOTrainer: expected {reason}")

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = sorted(name for name, value in multimodal.items() if value is not None)
        if given or compute_aux_loss:
            raise ValueError(
                "SharedPrefixGRPOTrainer: expected text and no loss of the routers, got "
                f"{', '.join(given) or 'compute_aux_loss'}"
            )
        train = torch.is_grad_enabled()
        step = self._step_of(model)
        batch = _Batch(step, input_ids, attention_mask, logits_to_keep, self.accelerator.autocast)
        stock, shared = batch.flops(train)
        gain, bound = expected_gain(stock, batch.stock_calls(train), shared, batch.calls(train))
        takes = shared > 0 and gain >= step.min_bound
        if train:
            self._flops += torch.tensor([stock, shared if takes else stock])
        if not takes:
            self._say_stock(step, batch, gain, bound)
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
            )
        if train:
            anchor = torch.zeros((), device=input_ids.device, requires_grad=True)
            logp, entropy = _Statistics.apply(anchor, batch)
        else:
            logp, entropy = batch.statistics()
        return logp, entropy if compute_entropy else None, None

    def _step_of(self, model: nn.Module) -> SharedPrefix:
        if model not in self._steps:
            self._steps[model] = SharedPrefix(model, temperature=self.temperature, **self._options)
        return self._steps[model]

    def _say_stock(self, step: SharedPrefix, batch: _Batch, gain: float, bound: float) -> None:
        if not self._said_stock:
            self._said_stock = True
            _logger.warning(
                "sharing %d prompts among %d rows is expected to be %.2f times as fast (%.2f by "
                "FLOPs alone), less than min_bound %.2f: such batches run as in GRPOTrainer",
                len(batch.groups), batch.shape[0], gain, bound, step.min_bound,
            )  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As GRPOTrainer, with `prefix/*` of the batches since the last call."""
        found = {}
        stock, shared = self._flops.tolist()
        if shared:
            found["prefix/bound"] = stock / shared
            self._flops.zero_()
        if self.model in self._steps:
            # a group's tokens and speed-up would count its forward pass without a graph, too
            left_out = ("prefix/bound", "prefix/expected", "prefix/speedup")
            for name, value in self._steps[self.model].metrics().items():
                if not name.endswith("_tokens") and name not in left_out:
                    found[name] = value
        prefix = "" if self.model.training else "eval_"  # as GRPOTrainer names its own
        logs.update({prefix + name: value for name, value in found.items()})
        super().log(logs, start_time)


class _Batch:
    """Rows of left-padded prompts and right-padded completions, by distinct prompt.

    Args:
        step: of the model.
        input_ids: [B, P + T].
        attention_mask: [B, P + T].
        width: T, columns of the completions.
        autocast: the precision that TRL calls the model in.

    Attributes:
        shape: (B, T).
        groups: (prompt, rows, completions without padding) of each; a row without completion
            (TRL masks truncated ones) is in none, its statistics are 0.
    """

    def __init__(
        self,
        step: SharedPrefix,
        input_ids: Tensor,
        attention_mask: Tensor,
        width: int,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.step, self.autocast = step, autocast
        self.shape, self.device = (len(input_ids), width), input_ids.device
        before = input_ids.shape[1] - width
        prompts: dict[tuple[int, ...], list[int]] = {}
        completions = {}
        rows = zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
        for row, (ids, mask) in enumerate(rows):
            start, end = before - sum(mask[:before]), before + sum(mask[before:])
            if not all(mask[start:end]):
                raise ValueError(
                    f"attention_mask: row {row} has a gap, expected padding on the left of the "
                    "prompt and on the right of the completion"
                )
            if end > before:
                prompts.setdefault(tuple(ids[start:before]), []).append(row)
                completions[row] = ids[before:end]
        self.groups = [
            (prompt, rows, [completions[row] for row in rows]) for prompt, rows in prompts.items()
        ]

    def flops(self, train: bool) -> tuple[float, float]:
        """Of GRPOTrainer's path and of the groups, without padding."""
        cost, passes = self.step.cost, self._prompt_passes(train)
        stock = shared = 0.0
        for prompt, _, completions in self.groups:
            lengths = [len(completion) for completion in completions]
            dense, own = cost.group(len(prompt) - 1, lengths, train)
            stock += dense
            shared += own * (4 / 3 if train else 1) + passes * cost.layers(len(prompt) - 1)
        return stock, shared

    def stock_calls(self, train: bool) -> float:
        """What GRPOTrainer's one call costs beside its FLOPs, as FLOPs."""
        return self.step.cost.calls(1, train)

    def calls(self, train: bool) -> float:
        """What the groups' calls cost beside their FLOPs."""
        cost = self.step.cost
        waves = sum(
            len(split_rows(lengths, self.step.tokens_of_waves(len(prompt), lengths)))
            for prompt, _, completions in self.groups
            for lengths in [[len(completion) for completion in completions]]
        )
        prompts = len(self.groups) * self._prompt_passes(train) * cost.call
        return cost.calls(waves, train) * (4 / 3 if train else 1) + prompts

    def _prompt_passes(self, train: bool) -> int:
        """Forward passes of a prompt: without a graph, then phases A and C."""
        return (5 if self.step.prefix_memory == "recompute" else 4) if train else 1

    def statistics(self) -> tuple[Tensor, Tensor]:
        """[B, T] log-probabilities and entropies without a graph, 0 at padding."""
        found = [torch.zeros(self.shape, device=self.device) for _ in range(2)]
        for prompt, rows, completions in self.groups:
            with self.autocast(), torch.no_grad(), self.step.group(prompt) as group:
                out = group.statistics(completions)
            for total, part in zip(found, (out.logp, out.stats.entropy), strict=True):
                total[rows, : part.shape[1]] = part.to(total.dtype)
        return found[0], found[1]

    def backward(self, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> None:
        """Adds to `.grad` what these gradients of the statistics give."""
        for prompt, rows, completions in self.groups:

            def product(out: WaveOutput, wave: Wave, rows: list[int] = rows) -> Tensor:
                of_wave = [rows[i] for i in wave.rows.tolist()]
                pairs = ((out.logp, grad_logp), (out.stats.entropy, grad_entropy))
                return sum(
                    (x * grad[of_wave, : x.shape[1]].to(x.dtype)).sum()
                    for x, grad in pairs
                    if grad is not None
                )

            with self.autocast(), torch.enable_grad(), self.step.group(prompt) as group:
                group.accumulate(completions, product)


class _Statistics(torch.autograd.Function):
    """A batch's statistics; `anchor` is what makes them need a gradient, and gets none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        ctx.batch = batch
        ctx.set_materialize_grads(False)  # the entropies are only logged, mostly
        return batch.statistics()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        if grad_logp is not None or grad_entropy is not None:
            ctx.batch.backward(grad_logp, grad_entropy)
        return None, None
