"""Second moments entry by entry, as Adam keeps them, for hosts whose checkpoints have Adam's form.

Every entry gets the moment of its block; the way back takes the mean over each block, over all
ranks that the block lies on. That is exact both ways: the mean of equal fp32 numbers is taken in
float64, and the mean of Adam's v is the v of AdamMini, as v is linear in g^2.

Source: arXiv 2406.16793, the update rule.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .adam_mini import AdamMini
from .sharding import all_reduce_packed


def spread_moments(optimizer: AdamMini, param: Tensor) -> Tensor:
    """The second moment of every entry.

    Args:
        optimizer: with a state of `param`.
        param: a plain tensor, whole or a shard.

    Returns:
        The shape of `param`, in the dtype of its second moments; a new tensor.
    """
    place = optimizer._place(param)
    v = optimizer.state[param]["exp_avg_sq"]
    if place.plan.flat:
        return place.plan.spread(v).view(param.shape)
    return place.layout.expand(v).reshape(param.shape).clone()


def sum_moments(optimizer: AdamMini, param: Tensor, entries: Tensor) -> Tensor:
    """Sums of what is here of every block, for `fold_moments`.

    Args:
        optimizer: over `param`.
        param: a plain tensor, whole or a shard.
        entries: as many as `param` has, of any floating dtype.

    Returns:
        One number a block in float64, on the device of `param`; the entries themselves where
        every entry is a block.
    """
    place = optimizer._place(param)
    values = entries.detach().reshape(-1).to(param.device, torch.float64)
    if place.plan.elementwise:
        return values
    if place.plan.flat:
        index = place.plan.entry_blocks(param.device)
    else:
        index = place.layout.index(param.device).reshape(-1)
    sums = values.new_zeros(len(place.plan.lengths))
    return sums.index_add_(0, index, values)


def fold_moments(optimizer: AdamMini, sums: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The means of blocks: one all-reduce for each set of ranks.

    Args:
        optimizer: over the parameters.
        sums: from `sum_moments`, for all parameters of this rank on every rank.

    Returns:
        The second moments of every parameter, as its state keeps them.
    """
    sums = {param: part.clone() for param, part in sums.items()}
    places = {param: optimizer._place(param) for param in sums}
    parts = [
        (place.number, place.plan.reduce, sums[param])
        for param, place in places.items()
        if place.plan.reduce
    ]
    for other in optimizer._elsewhere:
        if other.plan.reduce:
            size = len(other.plan.lengths)
            nothing = torch.zeros(size, dtype=torch.float64, device=other.device)
            parts.append((other.number, other.plan.reduce, nothing))
    parts.sort(key=lambda part: part[0])
    all_reduce_packed([(groups, part) for _, groups, part in parts])
    found = {}
    for param, place in places.items():
        means = sums[param]
        if not place.plan.elementwise:
            means = means / place.plan.lengths.to(means)
        dtype = torch.promote_types(param.dtype, torch.float32)
        found[param] = means.to(dtype).view(place.plan.state_shape)
    return found
