"""State of other optimizers for AdamMini and back, so that a run can switch in the middle.

Second moments of AdamW become those of AdamMini by averaging over each block, which is exact: v is
linear in g^2, so the mean of AdamW's v is the v that AdamMini would have kept on the same
gradients. The way back gives every entry the moment of its block.

Source: arXiv 2406.16793, the update rule; layout of the authors' state: adam-mini 1.1.1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adam_mini import AdamMini
from .layouts import BlockLayout
from .sharding import is_dtensor, second_moments


def from_adamw_state(
    optimizer: AdamMini, state_dict: dict[str, Any], *, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from the state of torch's Adam or AdamW.

    Parameters are matched by name if both sides have names, else by position; the groups need not
    be the same. Hyper-parameters stay those of `optimizer`, but for lr and, where a scheduler left
    it, initial_lr: with the scheduler's own state the schedule goes on. A scheduler with a value
    per group (LambdaLR) needs the same groups.

    Args:
        optimizer: over the same model; not changed.
        state_dict: of torch.optim.AdamW, Adam or NAdam without amsgrad.
        names: of the parameters that AdamW was given, in order, if it was given none: those of
            `model.named_parameters()`, say.

    Returns:
        A state dict: exp_avg as it is, exp_avg_sq averaged over the blocks, step.

    Raises:
        ValueError: amsgrad state, parameters, names or shapes that do not correspond, several rates
            for what is one group of `optimizer`, or blocks that go on on other ranks (of plain
            tensors; DTensors are averaged whole).

    Source: arXiv 2406.16793, the update rule, which is linear in g^2.
    """
    return _converted(optimizer, _saved(state_dict, names), _from_adamw)


def from_authors_state(optimizer: AdamMini, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from the state of the authors' Adam_mini.

    Args:
        optimizer: over the same model, made from named parameters; not changed.
        state_dict: of `adam_mini.Adam_mini` 1.1.1 in one process; it has one group per parameter,
            with its name in lower case.

    Returns:
        A state dict. Second moments are those of the authors' blocks, averaged over ours; rates as
        in `from_adamw_state`.

    Raises:
        ValueError: parameters, names or shapes that do not correspond, or several rates for what
            is one group of `optimizer`.

    Source: the state of adam-mini 1.1.1, by the authors of arXiv 2406.16793.
    """
    saved = {}
    for group in state_dict["param_groups"]:
        if "name" not in group or len(group["params"]) != 1:
            raise ValueError(
                "state_dict: expected one named parameter per group, as Adam_mini makes them, "
                f"found a group with {sorted(group)} and {len(group['params'])} parameters"
            )
        saved[group["name"]] = _Saved(state_dict["state"].get(group["params"][0], {}), group)
    return _converted(optimizer, saved, _from_authors, rename=str.lower)


def to_adamw_state(optimizer: AdamMini) -> dict[str, Any]:
    """What torch.optim.AdamW's `load_state_dict` takes, over the same groups.

    Args:
        optimizer: an AdamMini; not changed.

    Returns:
        A state dict in which every entry has the second moment of its block.

    Source: arXiv 2406.16793, the update rule.
    """
    state_dict = optimizer.state_dict()
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    for group in state_dict["param_groups"]:
        for name, value in defaults.items():
            group.setdefault(name, value)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {}
    for number, param in enumerate(params):
        if number in state_dict["state"]:
            old = state_dict["state"][number]
            layout = optimizer.layout(param)
            v = old["exp_avg_sq"]
            if not optimizer.shards:  # state dicts of flat shards (FSDP1) are spread already
                v = _spread(param, layout, v)
            state[number] = {
                "step": old["step"].clone(),
                "exp_avg": old["exp_avg"].to(v.dtype).clone(),
                "exp_avg_sq": v.clone(),
            }
    return {"state": state, "param_groups": state_dict["param_groups"]}


class _Saved(NamedTuple):
    """What a checkpoint has of one parameter: its state, which may be empty, and its group."""

    state: dict[str, Any]
    group: dict[str, Any]


def _saved(state_dict: dict[str, Any], names: Sequence[str] | None) -> dict[str | int, _Saved]:
    """By name, or by position if there are no names."""
    keys, own, groups = [], [], []
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict: expected a dict, found {type(state_dict).__name__}")
    if not state_dict.keys() >= {"state", "param_groups"}:
        raise ValueError(
            f"state_dict: expected state and param_groups of an Adam, found {sorted(state_dict)}"
        )
    for group in state_dict["param_groups"]:
        if "betas" not in group:
            raise ValueError(f"state_dict: expected groups of an Adam, found {sorted(group)}")
        if group.get("amsgrad"):
            raise ValueError("state_dict: expected amsgrad=False, found True")
        keys += group["params"]
        groups += [group] * len(group["params"])
        own += group.get("param_names", [])
    if names is None:
        names = own or range(len(keys))  # type: ignore[assignment]
    if len(names) != len(keys):
        raise ValueError(
            f"names: expected one for each of {len(keys)} parameters, found {len(names)}"
        )
    return {
        name: _Saved(state_dict["state"].get(key, {}), group)
        for name, key, group in zip(names, keys, groups, strict=True)
    }


def _converted(
    optimizer: AdamMini,
    saved: dict[Any, _Saved],
    convert: Callable[[Tensor, BlockLayout, dict[str, Any]], tuple[Tensor, Tensor]],
    rename: Callable[[str], str] = str,
) -> dict[str, Any]:
    params, own = [], []
    for group in optimizer.param_groups:
        params += group["params"]
        own += [rename(name) for name in group.get("param_names", [])]
    by_name = all(isinstance(name, str) for name in saved)
    if by_name and not own:
        raise ValueError("optimizer: expected named parameters to match the names, found none")
    keys = own if by_name else range(len(params))
    if set(keys) != set(saved) or len(set(keys)) != len(params):
        different = sorted(map(str, set(keys) ^ set(saved)))[:5]
        raise ValueError(
            f"state_dict: expected the {len(params)} parameters of the optimizer, found "
            f"{len(saved)}; in one of them only: {different}"
        )
    state: dict[int, dict[str, Tensor]] = {}
    hint = "" if by_name else "; matched by position: pass names= in the order of the old optimizer"
    for number, (key, param) in enumerate(zip(keys, params, strict=True)):
        old = saved[key].state
        if not old:
            continue
        layout = optimizer.layout(param)
        if optimizer._place(param).plan.reduce and not is_dtensor(param):
            raise ValueError(
                f"optimizer: expected parameter {key!r} whole or a DTensor, found a slice whose "
                "blocks go on on other ranks; convert before the model is cut, or in Megatron-core "
                "load Adam's distributed checkpoint by megatron_adam_mini"
            )
        try:
            exp_avg, v = convert(param, layout, old)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"state_dict: expected moments of parameter {key!r} with shape "
                f"{tuple(param.shape)}, found {_shapes(old)}{hint}"
            ) from error
        if "step" not in old:
            raise ValueError(f"state_dict: expected step of parameter {key!r}, found {sorted(old)}")
        step = torch.as_tensor(old["step"], dtype=torch.float32).cpu().clone()
        state[number] = {
            "step": step,
            "exp_avg": exp_avg.clone(),
            "exp_avg_sq": _averaged(param, layout, v),
        }
    groups = []
    for group in optimizer.state_dict()["param_groups"]:
        mine, keys = keys[: len(group["params"])], keys[len(group["params"]) :]
        groups.append({**group, **_rates(group, [saved[key].group for key in mine])})
    return {**optimizer.state_dict(), "param_groups": groups, "state": state}


def _rates(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """lr and initial_lr of the saved groups, for one group."""
    rates: dict[str, Any] = {}
    for name in ("lr", "initial_lr"):
        values = {float(old[name]) for old in saved if name in old}
        if len(values) > 1:
            raise ValueError(
                f"optimizer: expected groups whose parameters had one {name} each, found "
                f"{sorted(values)} in one group"
            )
        if values:
            rate = values.pop()
            own = group.get(name)
            rates[name] = torch.full_like(own, rate) if isinstance(own, Tensor) else rate
    return rates


def _from_adamw(param: Tensor, layout: BlockLayout, old: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if not old["exp_avg"].shape == old["exp_avg_sq"].shape == param.shape:
        raise RuntimeError
    return old["exp_avg"], old["exp_avg_sq"]


def _from_authors(param: Tensor, layout: BlockLayout, old: dict[str, Any]) -> tuple[Tensor, Tensor]:
    m = old["m"]  # of queries and keys [heads, entries of a head]
    v = old["v"] if "v" in old else old["vmean"]
    return m.reshape(param.shape), v.expand_as(m).reshape(param.shape)


def _averaged(param: Tensor, layout: BlockLayout, v: Tensor) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    if not is_dtensor(param):
        return layout.mean(v.to(dtype)).clone()
    from torch.distributed.tensor import distribute_tensor

    whole = layout.mean(v.full_tensor().to(dtype))  # type: ignore[attr-defined]
    like = second_moments(param, layout, whole[:0])
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _spread(param: Tensor, layout: BlockLayout, v: Tensor) -> Tensor:
    if not is_dtensor(param):
        return layout.expand(v).contiguous()
    from torch.distributed.tensor import distribute_tensor

    whole = layout.expand(v.full_tensor()).contiguous()  # type: ignore[attr-defined]
    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(x.shape) for key, x in state.items() if isinstance(x, Tensor)}
