"""AdamW with one second moment per block of a parameter instead of one per entry.

For parameter p with gradient g at step t, and every block b of p (see blocks.py):
    m   <- beta1 * m + (1 - beta1) * g                        one per entry
    v_b <- beta2 * v_b + (1 - beta2) * mean(g_b * g_b)        one per block
    p   <- p * (1 - lr * weight_decay)
    p_b <- p_b - lr / (1 - beta1^t) * m_b / (sqrt(v_b / (1 - beta2^t)) + eps)

State: 4 bytes an entry and 4 bytes a block, where AdamW keeps 8 bytes an entry (fp32; twice that
for float64).
Cost: this plain PyTorch form works on one parameter at a time, with a temporary of its size in fp32
(up to three of them if elementwise, and one more for `maximize`).

Source: arXiv 2406.16793, the update rule.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .blocks import BlockLayout, BlockMap, Preset, geometric_layout, infer_blocks


class AdamMiniState(NamedTuple):
    """What an update returns: param and exp_avg as they came in, exp_avg_sq one entry per block."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adam_mini_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: BlockLayout,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamMiniState:
    """One Adam-mini step by the definition: entries are gathered and spread by block number.

    Args:
        param, grad, exp_avg: `layout.shape`, one floating dtype, in which everything is computed.
        exp_avg_sq: `layout.state_shape`, the same dtype.
        layout: the blocks of `param`.
        step: t, 1 for the first step.
        lr, betas, eps, weight_decay: as in AdamMini.

    Returns:
        New tensors; the arguments are not changed.

    Source: arXiv 2406.16793, the update rule.
    """
    beta1, beta2 = betas
    block = layout.index(param.device)
    sums = param.new_zeros(layout.n_blocks).index_add(0, block.flatten(), (grad * grad).flatten())
    means = sums / block.flatten().bincount(minlength=layout.n_blocks)
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * means.view(layout.state_shape)
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    decayed = param * (1 - lr * weight_decay)
    moved = lr * (m / (1 - beta1**step)) / denominator.flatten()[block]
    return AdamMiniState(decayed - moved, m, v)


def adam_mini_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: BlockLayout,
    *,
    step: float,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One Adam-mini step, in place on `param`, `exp_avg` and `exp_avg_sq`.

    Everything is computed in the dtype of `exp_avg`; a parameter of lower precision is rounded
    once, at the end.

    Args:
        param: `layout.shape`, any floating dtype.
        grad: `layout.shape`, any floating dtype; not changed.
        exp_avg: `layout.shape`, fp32 (float64 for a float64 parameter).
        exp_avg_sq: `layout.state_shape`, dtype of `exp_avg`.
        layout: the blocks of `param`.
        step: t, 1 for the first step.
        lr: a float, or a tensor of 0 dimensions.
        betas, eps, weight_decay: as in AdamMini.

    Source: arXiv 2406.16793, the update rule.
    """
    if param.numel() == 0:  # the mean of an empty block is NaN
        return
    beta1, beta2 = betas
    g = grad.to(exp_avg.dtype)  # before squaring: the square of an fp16 gradient overflows in fp16
    exp_avg.lerp_(g, 1 - beta1)
    squares = g.square() if g is grad else g.square_()
    exp_avg_sq.mul_(beta2).add_(layout.mean(squares), alpha=1 - beta2)
    del g, squares
    # One factor per block, so that the parameter is read and written once.
    denominator = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    scale = layout.broadcastable(-lr / (1 - beta1**step) / denominator)
    p = param.to(exp_avg.dtype)
    p.mul_(1 - lr * weight_decay).addcmul_(exp_avg, scale)
    if p is not param:
        param.copy_(p)


class AdamMini(Optimizer):
    """AdamW with one second moment per block of a parameter: half of AdamW's state.

    A parameter without a gradient is skipped, and NaN gradients are not hidden. The state of each
    parameter is `exp_avg` (its shape), `exp_avg_sq` (one number per block; its shape if
    elementwise) and `step`; moments are fp32, also for fp16 and bf16 parameters, and float64 for
    float64 parameters.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts, as for every torch optimizer.
        lr: at least 0; a float, or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: at least 0; added after the bias-corrected root, as in AdamW.
        weight_decay: at least 0; decoupled, as in AdamW.
        blocks: layouts by parameter name, which needs named parameters; None cuts by shape alone:
            by row from 2 dimensions on, else elementwise.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument out of range; with `blocks`, parameters without names, a name that
            is not in it, or a shape that does not fit; parameters that are complex, not floating,
            sparse or DTensors (no sharding yet).

    Source: arXiv 2406.16793, the update rule. Differs from the paper: blocks come from modules and
        shapes, the default is by row, and norms and biases are elementwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: BlockMap | None = None,
        maximize: bool = False,
    ) -> None:
        self.blocks = blocks
        self._layouts: dict[Tensor, BlockLayout] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: Preset = "rows",
        strict: bool = False,
        no_decay_1d: bool = True,
        maximize: bool = False,
    ) -> "AdamMini":
        """An AdamMini for a model's trainable parameters, with blocks read from its modules.

        Args:
            model: any module; parameters that require a gradient are grouped by their decay.
            lr, betas, eps, weight_decay, maximize: as in AdamMini.
            preset, strict: as in `infer_blocks`.
            no_decay_1d: no weight decay for parameters below 2 dimensions (norms, biases, scalars).

        Returns:
            The optimizer; its map of blocks is `.blocks`.

        Raises:
            ValueError: as in AdamMini and `infer_blocks`, or a model without trainable parameters.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: expected parameters that require a gradient, found none")
        exempt = [no_decay_1d and p.ndim < 2 for _, p in named]
        groups = [
            {"params": [pair for pair, free in zip(named, exempt, strict=True) if not free]},
            {
                "params": [pair for pair, free in zip(named, exempt, strict=True) if free],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        blocks = infer_blocks(model, preset, strict=strict)
        return cls(groups, lr, betas, eps, weight_decay, blocks=blocks, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in every torch optimizer.

        Args:
            param_group: `params`, and any of the constructor's hyper-parameters.

        Raises:
            ValueError: as in the constructor; the optimizer is then unchanged.
        """
        if isinstance(param_group, dict):
            _check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._layouts.update(self._group_layouts(param_group))
        except ValueError:
            self.param_groups.pop()
            raise

    def _group_layouts(self, group: dict[str, Any]) -> dict[Tensor, BlockLayout]:
        names = group.get("param_names")
        if self.blocks is not None and names is None:
            raise ValueError(
                "blocks: expected named parameters (model.named_parameters()), found no names"
            )
        layouts = {}
        for i, param in enumerate(group["params"]):
            name = names[i] if names else f"number {i} of its group"
            _check_parameter(name, param)
            if self.blocks is None:
                layouts[param] = geometric_layout(param)
                continue
            if name not in self.blocks:
                raise ValueError(f"blocks: expected an entry for parameter {name!r}, found none")
            layouts[param] = self.blocks[name].layout
            layouts[param].validate(name, param)
        return layouts

    def layout(self, param: Tensor) -> BlockLayout:
        """The blocks of one of this optimizer's parameters.

        Args:
            param: a parameter in one of the groups.

        Returns:
            Its layout.

        Raises:
            ValueError: `param` is in no group.
        """
        if param not in self._layouts:  # a host has put other parameters into the groups
            for group in self.param_groups:
                if any(p is param for p in group["params"]):
                    self._layouts.update(self._group_layouts(group))
        if param not in self._layouts:
            raise ValueError(
                f"param: expected a parameter of this optimizer, found {tuple(param.shape)}"
            )
        return self._layouts[param]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError: a gradient is sparse or a DTensor; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, param, self.layout(param))
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for _, param, _ in work:
            _check_gradient(param)
        for group, param, layout in work:
            self._update(group, param, layout)
        return loss

    def _update(self, group: dict[str, Any], param: Tensor, layout: BlockLayout) -> None:
        state = self.state[param]
        if not state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.preserve_format
            )
            state["exp_avg_sq"] = torch.zeros(layout.state_shape, dtype=dtype, device=param.device)
        # Not in place: Megatron's loader puts one shared tensor into every parameter's state.
        state["step"] = state["step"] + 1
        lr = group["lr"]
        adam_mini_update(
            param,
            -param.grad if group["maximize"] else param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            layout,
            step=float(state["step"]),
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; moments keep fp32 or float64.

        Args:
            state_dict: from an AdamMini with the same groups and the same blocks.

        Raises:
            ValueError: groups or the shapes of moments do not fit; the optimizer is then unchanged.
        """
        # torch (2.13, Optimizer._process_value_according_to_param_policy) casts state to the
        # parameter's dtype. So keep the moments in a hook after the user's, which sees what is
        # loaded, and put them back before the user's.
        moments: dict[Tensor, dict[str, Tensor]] = {}

        def remember(_: Optimizer, loaded: dict[str, Any]) -> None:
            moments.update(self._loaded_moments(loaded))

        def restore(_: Optimizer) -> None:
            for param, saved in moments.items():
                dtype = torch.promote_types(param.dtype, torch.float32)
                for key, value in saved.items():
                    self.state[param][key] = value.to(dtype=dtype, device=param.device)

        hooks = (
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _loaded_moments(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The moments in `state_dict` by parameter, their shapes checked."""
        moments = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            names = group.get("param_names") or saved["params"]
            for name, param, key in zip(names, group["params"], saved["params"], strict=False):
                state = state_dict["state"].get(key, {})
                layout = self.layout(param)
                expected = {"exp_avg": layout.shape, "exp_avg_sq": layout.state_shape}
                for moment, shape in expected.items():
                    if moment in state and tuple(state[moment].shape) != shape:
                        found = tuple(state[moment].shape)
                        raise ValueError(
                            f"state_dict: {moment} of parameter {name!r} ({layout.kind} blocks) "
                            f"expects shape {shape}, found {found}: saved with other blocks, or by "
                            "another optimizer"
                        )
                moments[param] = {moment: state[moment] for moment in expected if moment in state}
        return moments

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "blocks": self.blocks, "_layouts": self._layouts}


def _check_hyperparameters(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: expected a tensor of one element, found shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected at least 0, found {group[name]}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), found {betas}")


def _check_parameter(name: str, param: Tensor) -> None:
    if _is_dtensor(param):
        raise ValueError(f"parameter {name!r}: expected an unsharded tensor, found a DTensor")
    if not param.is_floating_point() or param.layout != torch.strided:
        raise ValueError(
            f"parameter {name!r}: expected dense and floating, found {param.dtype}, {param.layout}"
        )


def _check_gradient(param: Tensor) -> None:
    grad = param.grad
    if _is_dtensor(grad):
        raise ValueError(
            f"gradient of a {tuple(param.shape)} parameter: found a DTensor, expected unsharded"
        )
    if grad.layout != torch.strided:
        raise ValueError(
            f"gradient of a {tuple(param.shape)} parameter: expected dense, found {grad.layout}"
        )


def _is_dtensor(tensor: Tensor) -> bool:
    """Recognised by name: torch.distributed is missing from some builds of torch."""
    return any(c.__name__ == "DTensor" for c in type(tensor).__mro__)
