"""Shared-prefix training for Lightning modules that train on groups of rollouts.

    class Module(SharedPrefixMixin, LightningModule): ...

The mixin stands before the LightningModule of either namespace.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..rl.prefix import LossFunction, SharedPrefix, Tokens, WaveOutput
from .lightning_callback import refuse_strategy


class SharedPrefixMixin:
    """Shared-prefix training for a LightningModule with manual optimization.

        class Module(SharedPrefixMixin, LightningModule):
            shared_prefix_options = {"wave_tokens": 8192}

            def __init__(self, model):
                super().__init__()
                self.automatic_optimization = False
                self.model = model

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.shared_prefix_backward((g.prompt, g.responses, loss_of(g)) for g in batch)
                optimizer.step()

    Works on one device, under DDP, and under FSDP2 (ModelParallelStrategy, the model sharded whole
    by `fully_shard`). A LightningModule's `backward` hooks run once for each wave.

    Attributes:
        shared_prefix_options: keyword arguments of SharedPrefix.
    """

    shared_prefix_options: Mapping[str, Any] = {}
    _shared_prefix: tuple[Any, SharedPrefix] | None = None

    def configure_shared_prefix(self) -> SharedPrefix:
        """Made once a Trainer, at its first use: the model is where the strategy wants it by then.

        Override it if the causal LM is not `self.model`.
        """
        return SharedPrefix(self.model, **self.shared_prefix_options)

    def shared_prefix(self) -> SharedPrefix:
        """What `configure_shared_prefix` made, for groups of your own (trees of rollouts).

        Raises:
            ValueError: a strategy under which gradients would be wrong, by its name; or as
                SharedPrefix.
        """
        # not a property: torch hides an AttributeError of one, such as that of a missing self.model
        strategy = self.trainer.strategy
        if self._shared_prefix is None or self._shared_prefix[0] is not strategy:
            _refuse_strategy(strategy)
            self._shared_prefix = strategy, self.configure_shared_prefix()
        return self._shared_prefix[1]

    def shared_prefix_backward(
        self,
        groups: Iterable[tuple[Tokens, Sequence[Tokens], LossFunction]],
        *,
        joint: bool = False,
    ) -> float:
        """Forward and backward of groups; adds their gradients' mean over the processes to `.grad`.

        That is the gradient of dense training under the same strategy, where each process goes
        backward once through the sum of its groups' losses: a loss that is to be a sum over the
        processes is multiplied by their number, as always under DDP and FSDP2. Processes may have
        different numbers of groups, or none. All of them call this alike. Metrics `prefix/*`, see
        `SharedPrefix.metrics`, are logged; each process's are its own.

        Args:
            groups: (prompt_ids, responses, loss) of each, as in `PrefixGroup.accumulate`; the
                group's loss is the sum of `loss(out, wave)` over its waves.
            joint: the losses need every response of their group, see `PrefixGroup.accumulate`.

        Returns:
            Sum of this process's losses.

        Raises:
            RuntimeError: the module optimizes automatically.
            ValueError: as `shared_prefix`. On any error gradients are what they were before.
        """
        if self.automatic_optimization:
            raise RuntimeError(
                "shared_prefix_backward: expected self.automatic_optimization = False; automatic "
                "optimization sets gradients to zero after training_step, and all that the phases "
                "have accumulated there would be lost"
            )
        step, strategy = self.shared_prefix(), self.trainer.strategy
        groups = list(groups)
        idle = step.ranks.most(len(groups)) - len(groups)
        total = 0.0
        gradients = [(p, p.grad) for p in self.parameters()]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            # DDP would average after every wave, and not at all after phase C
            unsynchronized = getattr(strategy, "block_backward_sync", nullcontext)
            with self.trainer.precision_plugin.forward_context(), unsynchronized():
                for prompt_ids, responses, loss in groups:
                    with step.group(prompt_ids) as group:
                        total += group.accumulate(
                            responses, loss, joint=joint, by=self.manual_backward
                        )
                for _ in range(idle):
                    step.idle_group(joint=joint)
            self._average_gradients(step)
        except BaseException:
            for parameter, before in gradients:
                parameter.grad = before
            raise
        for parameter, before in gradients:
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        self.log_dict({name: float(value) for name, value in step.metrics().items()})
        return total

    def shared_prefix_statistics(
        self, prompt_ids: Tokens, responses: Sequence[Tokens]
    ) -> WaveOutput:
        """Old or reference log-probabilities: no gradients, in the Trainer's precision.

        Args:
            prompt_ids: of one group.
            responses: token ids of each, without the prompt and without padding.

        Returns:
            WaveOutput of [G, T] tensors. Under FSDP2 all processes call this alike.

        Raises:
            ValueError: as `shared_prefix`.
        """
        group = self.shared_prefix().group(prompt_ids)
        with self.trainer.precision_plugin.forward_context(), torch.no_grad(), group:
            return group.statistics(responses)

    def _average_gradients(self, step: SharedPrefix) -> None:
        """As DDP does: of every parameter of the module that has a gradient on some process."""
        if step.host.sharded:
            return  # by phase C
        trained = [p for p in self.parameters() if p.requires_grad]
        has = torch.tensor([float(p.grad is not None) for p in trained], device=self.device)
        has = self.trainer.strategy.reduce(has, reduce_op="sum").tolist()
        step.ranks.all_reduce([p for p, some in zip(trained, has) if some], average=True)


def _refuse_strategy(strategy: Any) -> None:
    refuse_strategy(strategy, "shared-prefix training")
    if getattr(strategy.model, "static_graph", False):
        raise ValueError(
            "trainer.strategy: expected DDP without static_graph, which counts a backward pass "
            "for each step, and the phases go backward several times"
        )
    mesh = getattr(strategy, "device_mesh", None)
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError("trainer.strategy: expected tensor_parallel_size = 1")
