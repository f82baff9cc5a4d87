"""A factor on the learning rate that is there only while `optimizer.step` runs.

Schedulers compute a rate from the last one, or from one that they keep, or anew: what is multiplied
into `lr` between steps is lost or counts twice under some of them. So it goes in before the step
and comes out after it, by hooks of the optimizer, and schedulers never see it.

Source: practice; tried under every scheduler of torch.optim.lr_scheduler.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_logger = logging.getLogger(__name__)


class StepFactor:
    """Multiplies the lr of every group by `factor()` while a step runs.

        rate = StepFactor(lambda: detector.factor_at(step))
        rate.attach([optimizer])

    What schedulers and loggers show is the rate without the factor: log the factor as well. A
    closure runs within the step and sees the rate with it; an lr that something sets there stays,
    without the factor, which is logged once: set it before the step.

    Args:
        factor: called before each step, also of a step that is repeated after an error; at least 0.

    Source: arXiv 2602.01826 for the length-triggered factor.
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self._factor = factor
        self._hooks: list[Any] = []
        # Group, lr, and what it is while the step runs: a number, or a tensor and its count of
        # in-place changes, which to read does not wait for a device.
        self._unscaled: list[tuple[dict[str, Any], Any, Any]] = []
        self._said_changed = False

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Acts on these optimizers from now on, and on no others.

        Args:
            optimizers: torch optimizers, not wrappers without hooks (Accelerate's: `.optimizer`).

        Raises:
            ValueError: another StepFactor acts on one of them; none has changed then.
        """
        self.release()
        optimizers = list(optimizers)
        for optimizer in optimizers:
            hooks = optimizer._optimizer_step_pre_hooks.values()
            if any(isinstance(getattr(hook, "__self__", None), StepFactor) for hook in hooks):
                raise ValueError(
                    f"optimizers: expected none with a StepFactor, found {type(optimizer).__name__}"
                    " with one (of a length-triggered rate added twice?); release that one first"
                )
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._scale))
            self._hooks.append(optimizer.register_step_post_hook(self._restore))

    def release(self) -> None:
        """Acts on no optimizer any more; also after a step that raised every lr is as it was."""
        self._restore()
        while self._hooks:
            self._hooks.pop().remove()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()  # after a step that raised, the post hook has not run
        factor = self._factor()
        tensors = set()  # torch gives several groups one and the same
        for group in optimizer.param_groups:
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                group["lr"] = lr * factor
                self._unscaled.append((group, lr, group["lr"]))
            elif id(lr) not in tensors:
                tensors.add(id(lr))
                before = lr.clone()
                lr.mul_(factor)  # in place: compiled optimizers hold on to the tensor
                self._unscaled.append((group, before, (id(lr), lr._version)))

    def _restore(self, *_: Any) -> None:
        while self._unscaled:
            group, lr, scaled = self._unscaled.pop()
            now = group["lr"]
            if ((id(now), now._version) if isinstance(now, Tensor) else now) != scaled:
                self._say_changed(lr, now)
            elif isinstance(lr, Tensor):
                now.copy_(lr)
            else:
                group["lr"] = lr

    def _say_changed(self, before: Any, found: Any) -> None:
        if not self._said_changed:
            self._said_changed = True
            _logger.warning(
                "lr was set within a step, from %s to %s, which undid the factor: set it before "
                "the step, or by a scheduler",
                float(before), float(found),
            )  # fmt: skip
