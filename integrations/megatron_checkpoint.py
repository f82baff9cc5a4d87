"""Checkpoints of Megatron-core's optimizers around an AdamMini: they have the form of Adam's.

Megatron takes every state to have the shape of its parameter, and calls the second one exp_avg_sq.
So every entry is saved with the second moment of its block, and on loading blocks take the mean of
their entries. Then Megatron's resharding is AdamMini's too, and a run may go on with AdamMini from
a checkpoint of Adam, or the other way round. On disk the state is as large as Adam's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

from ..optim.adam_mini import AdamMini
from ..optim.entries import fold_moments, spread_moments, sum_moments

logger = logging.getLogger(__name__)

# In every group: which blocks its second moments have. Adam's groups lack it.
_BLOCKS = "adam_mini_blocks"

# Formats of DistributedOptimizer. Its default where metadata name none, fully_sharded_model_space,
# has flattened ranges, which Megatron's own checkpoints have ceased to take (0.16 to 0.19).
_FORMATS = ("fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter")


def adam_checkpoints(part: MegatronOptimizer, inner: Mapping[Tensor, Tensor], blocks: str) -> None:
    """Makes an optimizer around an AdamMini save and load states in Adam's form.

    Args:
        part: a FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer, of these
            very classes, with an AdamMini inside.
        inner: by parameter of the model, what the AdamMini updates.
        blocks: by which name these blocks go; a checkpoint of others is refused.
    """
    part.__class__ = _KINDS[type(part)]
    part.init_state_fn = lambda optimizer, config=None: optimizer.init_state()
    part._inner, part._blocks, part._sums = inner, blocks, {}
    for group in part.optimizer.param_groups:
        group[_BLOCKS] = blocks


class _AdamForm(MegatronOptimizer):
    """What the three have in common.

    optimizer: the AdamMini.
    _inner: by parameter of the model, what it updates.
    _blocks: the name of its blocks.
    """

    optimizer: AdamMini
    _inner: Mapping[Tensor, Tensor]
    _blocks: str

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _with_entries(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The inner state dict in Adam's form. Its own rules are those of this rank alone."""
        state = {
            number: {**saved["state"][number], **self._entries(param)}
            for number, param in enumerate(self._params())
            if number in saved["state"]
        }
        return {"state": state, "param_groups": saved["param_groups"]}

    def _entries(self, param: Tensor) -> dict[str, Tensor]:
        exp_avg = self.optimizer.state[param]["exp_avg"].float()
        return {"exp_avg": exp_avg, "exp_avg_sq": spread_moments(self.optimizer, param)}

    def _with_blocks(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The inverse; Adam's state is averaged over blocks."""
        self._check(saved["param_groups"])
        params, state = self._params(), dict(saved["state"])
        common = state.pop("common_step", None)
        for own in state.values():
            if "exp_avg_sq" not in own:
                raise ValueError(
                    f"state_dict: expected exp_avg and exp_avg_sq of an Adam, found {sorted(own)}"
                )
        group_of = {number: group for group in saved["param_groups"] for number in group["params"]}
        sums = {
            params[number]: sum_moments(self.optimizer, params[number], own["exp_avg_sq"])
            for number, own in state.items()
        }
        moments = fold_moments(self.optimizer, sums)
        for number, own in state.items():
            step = own.get("step", common)
            if step is None:  # Transformer Engine and Apex count in groups
                step = group_of[number].get("step")
            if step is None:  # Megatron omits a 0
                if own["exp_avg"].any():
                    raise ValueError("state_dict: expected the step of moments that are not 0")
                step = 0
            state[number] = {**own, "exp_avg_sq": moments[params[number]], "step": step}
        return {**saved, "state": state}

    def _check(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            found = group.get(_BLOCKS)
            if found not in (None, self._blocks):
                raise ValueError(
                    f"state_dict: expected second moments by blocks {self._blocks!r}, found "
                    f"{found!r}: build the optimizer with the preset or blocks it was saved with"
                )

    def _restore(self) -> None:
        """What groups of Adam have not brought along."""
        if any(_BLOCKS not in group for group in self.optimizer.param_groups):
            logger.info("loaded a state of Adam, whose second moments were averaged over blocks")
        own = self.optimizer.defaults
        for group in self.optimizer.param_groups:
            # what computes a step is a choice of this run
            group.update({_BLOCKS: self._blocks, "fused": own["fused"], "foreach": own["foreach"]})

    def restore_from_cpu(self) -> None:
        steps = {param: state["step"] for param, state in self.optimizer.state.items()}
        super().restore_from_cpu()
        for param, step in steps.items():  # Megatron moves these to the GPU, too
            self.optimizer.state[param]["step"] = step


class _FP32(_AdamForm, FP32Optimizer):
    def state_dict(self) -> dict[str, Any]:
        self.optimizer.init_state()  # a checkpoint of before the first step has to load, too
        return self._with_entries(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(self._with_blocks(state_dict))
        self._restore()


class _Float16(_AdamForm, Float16OptimizerWithFloat16Params):
    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        self.optimizer.init_state()  # as above
        saved = super().state_dict(is_loading)
        return {**saved, "optimizer": self._with_entries(saved["optimizer"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        key = "optimizer" if "optimizer" in state_dict else "optimizer_state_dict"
        super().load_state_dict({**state_dict, key: self._with_blocks(state_dict[key])})
        self._restore()


class _Distributed(_AdamForm, DistributedOptimizer):
    """Its state dict has no moments; they pass through the two methods on states, one by one.

    _sums: of the second moments loaded so far.
    """

    _sums: dict[Tensor, Tensor]

    def state_dict(self) -> dict[str, Any]:
        self.optimizer.init_state()  # Megatron looks for a step in it
        steps = [state["step"] for state in self.optimizer.state.values()]
        for group in self.optimizer.param_groups:  # with Transformer Engine and Apex, in these
            if steps:
                group["step"] = int(steps[0])
        saved = super().state_dict()
        saved["optimizer"].pop("blocks", None)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["optimizer"]["param_groups"]
        self._check(groups)
        self.optimizer.init_state()
        super().load_state_dict(state_dict)
        steps = {float(group["step"]) for group in groups if group.get("step") is not None}
        for state in self.optimizer.state.values():
            if steps:
                state["step"] = torch.tensor(max(steps), dtype=torch.float32)
        self._restore()

    def sharded_state_dict(
        self,
        model_sharded_state_dict: Any = None,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        form = sharding_type or (metadata or {}).get("distrib_optim_sharding_type")
        if form not in _FORMATS:
            raise ValueError(
                f"metadata: expected a distrib_optim_sharding_type among {_FORMATS}, found {form!r}"
            )
        return super().sharded_state_dict(
            model_sharded_state_dict or {}, is_loading, sharding_type, metadata
        )

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        param = self._inner[model_param]
        if param not in self.optimizer.state:
            self.optimizer.init_state()
        return {"param": param, **self._entries(param)}

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self, model_param: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        param = self._inner[model_param]
        if param not in self.optimizer.state:
            self.optimizer.init_state()
        param.copy_(tensors["param"])
        self.optimizer.state[param]["exp_avg"].copy_(tensors["exp_avg"])
        self._sums[param] = sum_moments(self.optimizer, param, tensors["exp_avg_sq"])

    def _fold(self) -> None:
        moments = fold_moments(self.optimizer, self._sums)
        self._sums = {}
        for param, v in moments.items():
            self.optimizer.state[param]["exp_avg_sq"].copy_(v)

    def load_parameter_state_from_fully_reshardable(self, state_dict: Any) -> None:
        super().load_parameter_state_from_fully_reshardable(state_dict)
        self._fold()

    def load_parameter_state_from_dp_reshardable(self, state_dict: Any) -> None:
        super().load_parameter_state_from_dp_reshardable(state_dict)
        self._fold()

    def load_parameter_state_from_dp_zero(
        self, state_dict: Any, *, update_legacy_format: bool = False
    ) -> None:
        if update_legacy_format:  # Megatron then writes to the inner states itself
            raise ValueError(
                "update_legacy_format: expected False, found True: update the checkpoint with "
                "Megatron's Adam, then load it here"
            )
        super().load_parameter_state_from_dp_zero(state_dict)
        self._fold()


_KINDS = {
    FP32Optimizer: _FP32,
    Float16OptimizerWithFloat16Params: _Float16,
    DistributedOptimizer: _Distributed,
}
