"""AdamW with one second moment per block of a parameter instead of one per entry.

For parameter p with gradient g at step t, and every block b of p (see layouts.py):
    m   <- beta1 * m + (1 - beta1) * g                        one per entry
    v_b <- beta2 * v_b + (1 - beta2) * mean(g_b * g_b)        one per block
    p   <- p * (1 - lr * weight_decay)
    p_b <- p_b - lr / (1 - beta1^t) * m_b / (sqrt(v_b / (1 - beta2^t)) + eps)

State: 4 bytes an entry (2 with bf16 momentum) and 4 bytes a block, where AdamW keeps 8 bytes an
entry. A step needs no memory of the size of a parameter beside it, if gradients and parameters are
contiguous; others are copied.

Source: arXiv 2406.16793, the update rule.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..triton_kernels.adam_mini import rounding_key
from .blocks import Preset, infer_blocks, vector_names
from .hyper import check_hyperparameters, hyper_row, hyper_rows_on_device, is_number
from .layouts import BlockLayout, BlockMap
from .pieces import Shard
from .places import Place, check_gradient, check_shape, places_of
from .sharding import (
    cut_of,
    flat_shards,
    is_dtensor,
    is_flattened,
    local_part,
    moment_placements,
    on_other_megatron_ranks,
    second_moments,
)
from .update import Elsewhere, Numbering, Update
from .update import step as update_all


class _Part(NamedTuple):
    """A parameter in a step; `local` is what of it is here."""

    param: Tensor
    place: Place
    local: Tensor
    state: dict[str, Tensor] | None


class AdamMini(Optimizer):
    """AdamW with one second moment per block of a parameter: half of AdamW's state.

    A parameter without a gradient is skipped, and NaN gradients are not hidden. The state of each
    parameter is `exp_avg` (its shape), `exp_avg_sq` (`layout.state_shape`) and `step`; second
    moments are fp32, also for fp16 and bf16 parameters, and float64 for float64 parameters.
    DTensors (FSDP2, tensor parallelism) and the weights of Megatron-core's tensor-parallel layers
    are updated shard by shard with the means of whole blocks.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts, as for every torch optimizer.
        lr: at least 0; a float, or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: at least 0; added after the bias-corrected root, as in AdamW.
        weight_decay: at least 0; decoupled, as in AdamW.
        blocks: a BlockMap, which needs named parameters, or layouts by parameter; None cuts by
            shape alone: by row from 2 dimensions on, else elementwise.
        fused: True for the Triton kernels (CUDA) or the native code (CPU, compiled when first
            needed), an error where they cannot run; None uses them where they can, and says once
            why they cannot; False is PyTorch alone.
        foreach: PyTorch alone, on all tensors together (True) or one at a time (False).
        maximize: ascend instead of descend.
        capturable: hyper-parameters and step counts stay on the device, so that a CUDA graph can
            record the step.
        momentum_dtype: dtype of `exp_avg`; torch.bfloat16 is rounded stochastically. None for fp32,
            float64 for float64 parameters.
        stochastic_rounding: round bf16 parameters stochastically instead of to the nearest.
        seed: of stochastic rounding; with the step and the position of an entry it decides every
            rounding, so a resumed or sharded run rounds alike.
        max_grad_norm: clip the gradients to this norm, over all parameters and ranks, within the
            step; `.grad` is not changed. `.grad_norm` has the norm before clipping.
        error_if_nonfinite: refuse a NaN or infinite norm of the gradients (waits for the device).
        amp_scaling: divide by the scale of a GradScaler within the step instead of before it; hosts
            that clip scaled gradients themselves (Lightning) refuse such optimizers.
        shards: where flat shards lie in their parameters (FSDP1), see `flat_shards`.

    Raises:
        ValueError: an argument out of range; with a BlockMap, parameters without names, a name that
            is not in it, or a shape that does not fit; parameters that are complex, not floating
            or sparse, that are partial sums (DTensor), or flattened by FSDP1 and not in `shards`.

    Source: arXiv 2406.16793, the update rule. Differs from the paper: blocks come from modules and
        shapes, `for_model` cuts some matrices by input neuron, norms and biases are elementwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: BlockMap | Mapping[Tensor, BlockLayout] | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        amp_scaling: bool = False,
        shards: Mapping[Tensor, Shard] | None = None,
    ) -> None:
        if blocks is not None and not isinstance(blocks, Mapping):
            raise ValueError(
                "blocks: expected a BlockMap, which infer_blocks returns, or layouts by parameter, "
                f"found {blocks!r}"
            )
        if momentum_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                "momentum_dtype: expected torch.float32, torch.bfloat16 or None, found "
                f"{momentum_dtype}"
            )
        if not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, found {seed!r}")
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm: expected more than 0, found {max_grad_norm!r}")
        if capturable and error_if_nonfinite:
            raise ValueError(
                "error_if_nonfinite: expected False with capturable=True, found True: a CUDA graph "
                "cannot raise"
            )
        if shards and (capturable or amp_scaling):
            raise ValueError(
                "capturable, amp_scaling: expected False with shards, as ranks have to agree on "
                f"which gradients there are, found {capturable} and {amp_scaling}"
            )
        self.blocks = blocks
        self.shards = shards
        self.momentum_dtype = momentum_dtype
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.error_if_nonfinite = error_if_nonfinite
        self.grad_norm: Tensor | None = None
        self._step_supports_amp_scaling = amp_scaling  # read by torch.amp.GradScaler
        # Of parameters that hosts may add without names, as Lightning does when it unfreezes some.
        self.known_names: dict[Tensor, str] = {}
        self._places: dict[Tensor, Place] = {}
        self._elsewhere: list[Elsewhere] = []
        self._cache: dict[Any, Numbering] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        check_hyperparameters(defaults)
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
        preset: Preset = "snr",
        strict: bool = False,
        no_decay_1d: bool = True,
        **options: Any,
    ) -> "AdamMini":
        """An AdamMini for a model's trainable parameters, with blocks read from its modules.

        Args:
            model: any module; parameters that require a gradient are grouped by their decay.
            lr, betas, eps, weight_decay: as in AdamMini.
            preset, strict: as in `infer_blocks`, for `blocks`.
            no_decay_1d: no weight decay for norms, biases and other vectors, also where their shape
                has 2 dimensions (the biases of experts).
            options: any other argument of AdamMini; `blocks` replaces what `infer_blocks` says.

        Returns:
            The optimizer; its map of blocks is `.blocks`.

        Raises:
            ValueError: as in AdamMini and `infer_blocks`, or a model without trainable parameters.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: expected parameters that require a gradient, found none")
        if options.get("shards") is None and any(is_flattened(p) for _, p in named):
            options["shards"] = flat_shards(model)
        shards = options.get("shards") or {}
        shapes = [shards[p].shape if p in shards else p.shape for _, p in named]
        vectors = vector_names(model)
        exempt = [
            no_decay_1d and (len(shape) < 2 or (name in vectors and param not in shards))
            for (name, param), shape in zip(named, shapes, strict=True)
        ]
        groups = [
            {"params": [pair for pair, free in zip(named, exempt, strict=True) if not free]},
            {
                "params": [pair for pair, free in zip(named, exempt, strict=True) if free],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        if options.get("blocks") is None:
            if any(is_flattened(p) for _, p in named):
                raise ValueError(
                    "blocks: expected infer_blocks(model) from before FSDP1 wrapped the model, or "
                    "from within summon_full_params, found none"
                )
            options["blocks"] = infer_blocks(model, preset, strict=strict)
        optimizer = cls(groups, lr, betas, eps, weight_decay, **options)
        optimizer.known_names = {param: name for name, param in model.named_parameters()}
        return optimizer

    @classmethod
    def for_groups(
        cls,
        groups: list[dict[str, Any]],
        names: Mapping[Tensor, str],
        *,
        blocks: BlockMap,
        shards: Mapping[Tensor, Shard] | None = None,
        **options: Any,
    ) -> "AdamMini":
        """An AdamMini over the very groups of an optimizer that it replaces within a host.

        Args:
            groups: as that optimizer has them, with its hyper-parameters; they get those that
                only AdamMini has. Parameters may be views, which are updated in place as leaves.
            names: of the parameters, and of those in `shards` that this rank lacks.
            blocks: by these names.
            shards: where flat shards lie. Where ranks lack some of the parameters, every shard has
                a number, and those of parameters cut over ranks are here on all of these ranks.
            options: any other argument of AdamMini; `fused` and `foreach` replace what groups have.

        Returns:
            The optimizer, whose `param_groups` is `groups`.

        Raises:
            ValueError: as in AdamMini; the groups are then unchanged.
        """
        nothing = torch.zeros(0)  # torch refuses views as parameters
        optimizer = cls([nothing], shards=shards, **options)
        optimizer.blocks, optimizer.known_names = blocks, dict(names)
        optimizer._places = {}
        kernels = {name: options[name] for name in ("fused", "foreach") if name in options}
        for group in groups:
            check_hyperparameters({**optimizer.defaults, **group, **kernels})
            optimizer._places.update(optimizer._new_places(group))
        lacking = [p for p in shards or {} if p not in optimizer._places]
        for param, place in optimizer._new_places({"params": lacking}).items():
            dtype = torch.promote_types(param.dtype, torch.float32)
            optimizer._elsewhere.append(
                Elsewhere(place.plan, param.device, dtype, place.asked, place.number)
            )
        for group in groups:
            group.update({**optimizer.defaults, **group, **kernels})
        optimizer.param_groups = groups
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in every torch optimizer.

        Args:
            param_group: `params`, and any of the constructor's hyper-parameters.

        Raises:
            ValueError: as in the constructor; the optimizer is then unchanged.
        """
        if isinstance(param_group, dict):
            check_hyperparameters({**self.defaults, **param_group})
            if not param_group.keys().isdisjoint(("blocks", "max_grad_norm", "error_if_nonfinite")):
                raise ValueError(
                    "params: expected options of the whole optimizer beside its groups, found "
                    f"{sorted(param_group)} in one; under ZeroRedundancyOptimizer use "
                    "functools.partial(AdamMini, blocks=parameter_layouts(model, blocks)), and "
                    "clip_grad_norm_"
                )
            if self.param_groups and "param_names" in self.param_groups[0]:
                param_group["params"] = self._with_names(param_group["params"])
        super().add_param_group(param_group)
        try:
            self._places.update(self._new_places(param_group))
        except ValueError:
            self.param_groups.pop()
            raise

    def _with_names(self, params: Any) -> Any:
        params = [params] if isinstance(params, Tensor) else list(params)
        if all(isinstance(param, Tensor) and param in self.known_names for param in params):
            return [(self.known_names[param], param) for param in params]
        return params

    def _new_places(self, group: dict[str, Any]) -> dict[Tensor, Place]:
        whole = self.max_grad_norm is not None or self.error_if_nonfinite
        if whole and any(map(on_other_megatron_ranks, group["params"])):
            raise ValueError(
                "max_grad_norm, error_if_nonfinite: expected neither where Megatron has pipeline "
                "stages or experts on other ranks, whose norms are not added up here; clip with "
                "megatron.core.optimizer.clip_grads"
            )
        return places_of(group, self.blocks, self.shards, len(self._places), self.known_names)

    def layout(self, param: Tensor) -> BlockLayout:
        """The blocks of one of this optimizer's parameters.

        Args:
            param: a parameter in one of the groups.

        Returns:
            Its layout.

        Raises:
            ValueError: `param` is in no group.
        """
        return self._place(param).layout

    def _place(self, param: Tensor) -> Place:
        if param not in self._places:  # of a copied optimizer, or put into the groups by a host
            held = {p for group in self.param_groups for p in group["params"]}
            self._places = {p: place for p, place in self._places.items() if p in held}
            for group in self.param_groups:  # all of them: numbers follow the order of the groups
                if any(p not in self._places for p in group["params"]):
                    self._places.update(self._new_places(group))
        if param not in self._places:
            raise ValueError(
                f"param: expected a parameter of this optimizer, found {tuple(param.shape)}"
            )
        return self._places[param]

    def forget_parameters(self) -> None:
        """Lets go of the parameters that it was given, before a host replaces them by others.

        Hosts that shard a model put the shards into the groups of an optimizer that is there
        already (Accelerate under FSDP2). What this optimizer knew of the whole parameters would
        keep them in memory. It learns of the new ones when it first needs to; names stay.

        Source: arXiv 2406.16793, the update rule.
        """
        self._places.clear()
        self.known_names = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What `closure` returned, else None.

        Raises:
            ValueError: a gradient is sparse, or is not sharded as its parameter; gradients that
                are not finite, under `error_if_nonfinite`. Nothing has been updated then.
        """
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by a GradScaler under `amp_scaling`: what to divide by, and whether to skip the step.
        scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        on_device = all(group["capturable"] for group in self.param_groups)
        if found_inf is not None and not on_device and bool(found_inf):
            return loss
        parts = self._parts()
        updates: list[Update] = []
        for group, mine in parts:
            updates += self._updates(group, mine, scale, found_inf)
        self.grad_norm = update_all(
            updates,
            self._cache,
            round_params=self.stochastic_rounding,
            max_grad_norm=self.max_grad_norm,
            error_if_nonfinite=self.error_if_nonfinite,
            elsewhere=self._elsewhere,
        )
        everything = (part for _, mine in parts for part in mine)
        for update, (param, place, local, state) in zip(updates, everything, strict=True):
            if place.plan.flat and not local.numel():
                continue
            if param.grad is None and not update.present:
                continue
            if update.param is not local:  # it was strided
                local.copy_(update.param)
            if isinstance(update.hyper, Tensor):  # a CUDA graph counts in the memory it recorded
                state["step"].copy_(update.step)
            else:  # Megatron's loader puts one shared tensor into every state
                state["step"] = update.step
            self.state[param] = state
        self._trim_cache()
        return loss

    def _parts(self) -> list[tuple[dict[str, Any], list[_Part]]]:
        """What takes part in a step, group by group; raises before anything is changed."""
        parts = []
        for group in self.param_groups:
            mine = []
            for param in {id(param): param for param in group["params"]}.values():
                place, grad = self._places.get(param) or self._place(param), param.grad
                if grad is None and not (place.asked and param.requires_grad):
                    continue
                if param.shape != place.shape:
                    check_shape(place, param)
                if grad is not None:
                    check_gradient(place, param, grad)
                if not place.empty:
                    local = local_part(param) if place.is_dtensor else param
                    mine.append(_Part(param, place, local, self.state.get(param)))
            parts.append((group, mine))
        return [
            (
                group,
                [
                    part
                    if part.state
                    else part._replace(state=self._new_state(group, part.param, part.place))
                    for part in mine
                ],
            )
            for group, mine in parts
        ]

    def _trim_cache(self) -> None:
        """Keeps sets of gradients that differ from step to step (experts) from filling memory."""
        if len(self._cache) > 8:
            pieces = (piece for place in self._places.values() for piece in place.plan.pieces)
            held = sum(numbering.n_units for numbering in self._cache.values())
            if held > 8 * sum(piece.n_units for piece in pieces):
                self._cache.clear()

    def _new_state(self, group: dict[str, Any], param: Tensor, place: Place) -> dict[str, Tensor]:
        dtype = torch.promote_types(param.dtype, torch.float32)
        v = torch.zeros(place.plan.state_shape, dtype=dtype, device=param.device)
        return {
            "step": torch.zeros(
                (), dtype=torch.float32, device=param.device if group["capturable"] else "cpu"
            ),
            "exp_avg": torch.zeros_like(
                param,
                dtype=self._momentum_dtype(param),
                memory_format=torch.contiguous_format,
            ),
            "exp_avg_sq": second_moments(param, place.layout, v) if is_dtensor(param) else v,
        }

    def init_state(self) -> None:
        """Allocates the state that parameters lack, for hosts that load into it or save it early.

        A step from it is the step that allocates it.
        """
        for group in self.param_groups:
            for param in group["params"]:
                place = self._place(param)
                if not self.state.get(param) and not place.empty:
                    self.state[param] = self._new_state(group, param, place)

    def _momentum_dtype(self, param: Tensor) -> torch.dtype:
        return self.momentum_dtype or torch.promote_types(param.dtype, torch.float32)

    def _updates(
        self,
        group: dict[str, Any],
        parts: list[_Part],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Update]:
        if not parts:
            return []
        numbers = [part.place.number for part in parts]
        counts = [part.state["step"] for part in parts]
        rounds = self.stochastic_rounding or self.momentum_dtype == torch.bfloat16
        keys: Sequence[Any] = [0] * len(parts)
        if group["capturable"]:
            taken = 1 if found_inf is None else 1 - found_inf.reshape(())
            t = torch.stack(counts) + taken
            steps = t.unbind()
            hyper = hyper_rows_on_device(group, t, scale, found_inf)
            if rounds:
                numbers = torch.tensor(numbers, device=t.device)
                keys = rounding_key(self.seed, numbers, t.long()).unbind()
        else:
            one = torch.ones((), dtype=torch.float32, device="cpu")
            steps = torch._foreach_add(counts, one, alpha=1)  # twice as fast as adding 1
            t = [step.item() for step in steps]
            factor = 1.0 if scale is None else 1 / float(scale)
            rows = {count: hyper_row(group, count, factor) for count in set(t)}
            hyper = [rows[count] for count in t]
            if rounds:
                keys = [
                    rounding_key(self.seed, number, int(count))
                    for number, count in zip(numbers, t, strict=True)
                ]
        fused, foreach = group["fused"], group["foreach"]
        updates = []
        for (param, place, local, state), row, count, key, present in zip(
            parts, hyper, steps, keys, _presence(parts), strict=True
        ):
            grad, exp_avg, exp_avg_sq = param.grad, state["exp_avg"], state["exp_avg_sq"]
            if grad is None:  # but other ranks may have one
                grad = torch.zeros_like(param)
            if place.is_dtensor:
                grad, exp_avg, exp_avg_sq = map(local_part, (grad, exp_avg, exp_avg_sq))
            updates.append(
                Update(
                    place.plan, local.contiguous(), grad.contiguous(), exp_avg, exp_avg_sq,
                    row, count, key, fused, foreach, present, place.number,
                )
            )  # fmt: skip
        return updates

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer, and `blocks`: the rules of its parameters, group by group.

        Moments of flat shards (FSDP1) come in fp32, the second ones entry by entry:
        `FSDP.optim_state_dict` takes only what is cut as the parameter is.
        """
        saved = super().state_dict()
        state = dict(saved["state"])
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for param, key in zip(group["params"], packed["params"], strict=True):
                plan, own = self._place(param).plan, state.get(key)
                if plan.flat and own:
                    v = plan.spread(own["exp_avg_sq"]).view(param.shape)
                    state[key] = {**own, "exp_avg": own["exp_avg"].to(v.dtype), "exp_avg_sq": v}
        blocks = [[self._place(p).layout.rule for p in g["params"]] for g in self.param_groups]
        return {**saved, "state": state, "blocks": blocks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; moments keep the dtypes of this optimizer.

        Args:
            state_dict: from an AdamMini with the same groups and the same blocks; parameters are
                matched by their order, and keep the names that they have here, if any.

        Raises:
            ValueError: groups, hyper-parameters or the shapes of moments do not fit, or moments are
                missing; the optimizer is then unchanged.
        """
        # torch (2.13, Optimizer._process_value_according_to_param_policy) casts state to the
        # parameter's dtype. So keep the moments in a hook after the user's, which sees what is
        # loaded, and put them back before the user's.
        moments: dict[Tensor, dict[str, Tensor]] = {}
        names = [group.get("param_names") for group in self.param_groups]

        def remember(_: Optimizer, loaded: dict[str, Any]) -> None:
            moments.update(self._loaded_moments(loaded))

        def restore(_: Optimizer) -> None:
            for param, saved in moments.items():
                dtype = torch.promote_types(param.dtype, torch.float32)
                dtypes = {"exp_avg": self._momentum_dtype(param), "exp_avg_sq": dtype}
                for key, value in saved.items():
                    moved = value.to(dtype=dtypes[key], device=param.device)
                    self.state[param][key] = moved.contiguous()
            for group, own in zip(self.param_groups, names, strict=True):
                if own is not None:
                    group["param_names"] = own

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
        """The moments in `state_dict` by parameter; groups and shapes checked."""
        moments = {}
        rules = state_dict.get("blocks")  # hosts may have dropped them
        for g, (group, saved) in enumerate(
            zip(self.param_groups, state_dict["param_groups"], strict=False)
        ):
            missing = {"lr", "betas", "eps", "weight_decay"} - saved.keys()
            if missing:
                raise ValueError(
                    f"state_dict: expected groups of an AdamMini, found none of {sorted(missing)}: "
                    "saved by another optimizer"
                )
            check_hyperparameters({**self.defaults, **saved})
            for i, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                state = state_dict["state"].get(key, {})
                place, cut = self._place(param), cut_of(param)
                if rules and rules[g][i] != place.layout.rule:
                    raise ValueError(
                        f"state_dict: parameter {place.name!r} has blocks {place.layout.rule!r} "
                        f"here, found {rules[g][i]!r}"
                    )
                if state and not state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
                    raise ValueError(
                        f"state_dict: expected step, exp_avg and exp_avg_sq of parameter "
                        f"{place.name!r}, found {sorted(state)}"
                    )
                state_shape = place.layout.state_shape if cut else place.plan.state_shape
                if place.plan.flat:
                    state_shape = param.shape
                expected = {"exp_avg": tuple(param.shape), "exp_avg_sq": tuple(state_shape)}
                cuts = {"exp_avg": cut, "exp_avg_sq": cut}
                if cut:
                    cuts["exp_avg_sq"] = (cut[0], moment_placements(param, place.layout))
                for moment, shape in expected.items():
                    if moment in state and cut_of(state[moment]) != cuts[moment]:
                        raise ValueError(
                            f"state_dict: {moment} of parameter {place.name!r} expects the mesh "
                            f"and placements {cuts[moment]}, found {cut_of(state[moment])}: load "
                            "it by set_optimizer_state_dict of torch.distributed.checkpoint"
                        )
                    if moment in state and tuple(state[moment].shape) != shape:
                        found = tuple(state[moment].shape)
                        raise ValueError(
                            f"state_dict: {moment} of parameter {place.name!r} (blocks: "
                            f"{place.layout.rule}) expects shape {shape}, found {found}: saved "
                            "with other blocks, or by another optimizer (from_adamw_state and "
                            "from_authors_state convert)"
                        )
                moments[param] = {moment: state[moment] for moment in expected if moment in state}
                if place.plan.flat and moments[param]:
                    moments[param]["exp_avg_sq"] = self._gathered(place, state["exp_avg_sq"])
        return moments

    def _gathered(self, place: Place, entries: Tensor) -> Tensor:
        try:
            return place.plan.gather(entries)
        except ValueError:
            raise ValueError(
                f"state_dict: exp_avg_sq of parameter {place.name!r} expects one number for each "
                f"of its blocks ({place.layout.rule}), found several: saved with other blocks, or "
                "by another optimizer"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        if self.shards:
            raise ValueError(
                "shards: an AdamMini with shards cannot be copied or pickled, as process groups "
                "cannot; make a new one with flat_shards(model) and load the state dict"
            )
        own = {name: value for name, value in self.__dict__.items() if name in self._SAVED}
        return {**super().__getstate__(), **own}

    # Beyond what torch's Optimizer copies and pickles. Process groups in places cannot be.
    _SAVED = (
        "blocks",
        "momentum_dtype",
        "stochastic_rounding",
        "seed",
        "max_grad_norm",
        "error_if_nonfinite",
        "_step_supports_amp_scaling",
    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("shards", None)
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("known_names", {})
        self.__dict__.setdefault("_places", {})
        self.__dict__.setdefault("_elsewhere", [])
        self.__dict__.setdefault("_cache", {})
        for group in self.param_groups:  # saved by an earlier version
            for name in ("foreach", "fused"):
                group.setdefault(name, None)
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
            for param in group["params"]:
                held = self.state.get(param, {})
                if "step" in held:  # may be a number, or shared; torch moves it under `fused`
                    device = param.device if group["capturable"] else "cpu"
                    count = torch.as_tensor(held["step"], dtype=torch.float32, device=device)
                    held["step"] = count.clone()


def _presence(parts: Sequence[_Part]) -> list[Tensor | None]:
    """`Update.present` of every parameter; all of them in one copy to the device."""
    if not any(part.place.asked for part in parts):
        return [None] * len(parts)
    there = [float(part.param.grad is not None) for part in parts]
    flags = torch.tensor(there, device=parts[0].param.device).unbind()
    return [flag if part.place.asked else None for part, flag in zip(parts, flags, strict=True)]


def _check_capture(optimizer: Optimizer) -> None:
    """torch's own check that a graph records capturable groups only; renamed in torch 2.13."""
    name = "_accelerator_graph_capture_health_check"
    if not hasattr(optimizer, name):
        name = "_cuda_graph_capture_health_check"
    getattr(optimizer, name)()
