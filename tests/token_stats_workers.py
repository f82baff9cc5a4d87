"""What test_token_stats_sharded.py starts in several processes: a vocabulary cut over a group.

`run` is started once in every process. Every rank compares what it gets with one process that has
the whole vocabulary, which it computes itself.
"""

import math
import os
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from closeness import assert_as_close_as

from trimtab.stability import linear_response_statistics, response_statistics
from trimtab.triton_kernels import _linear_token_stats_cpu as tiled
from trimtab.triton_kernels import _linear_token_stats_triton as kernels
from trimtab.triton_kernels import linear_token_stats as linear
from trimtab.triton_kernels import token_stats as logits_module
from trimtab.triton_kernels.token_stats import TokenStats

DIFFERENTIABLE = ("logp", "entropy", "sum_p2", "logsumexp", "log_kept_mass")
N, D = 19, 12
# Columns of each rank, by the size of the group: uneven, one column, and a first rank whose columns
# are all masked (padding) where `masked` says so
CUTS = {2: [[60, 41], [1, 100]], 3: [[50, 1, 50]]}


def problem():
    """[N, V] logits by a head, labels in every shard, two of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(101, D, generator=generator)
    labels = torch.randint(101, (N,), generator=generator)
    labels[:4] = torch.tensor([0, 50, 60, 100])
    labels[5] = labels[11] = -100
    return hidden, weight, labels


def upstream(stats):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(N, generator=generator).to(stats.logp)
        for name in DIFFERENTIABLE
        if getattr(stats, name) is not None
    }


def evaluate(stats, *inputs):
    g = upstream(stats)
    grads = torch.autograd.grad([getattr(stats, name) for name in g], inputs, list(g.values()))
    return stats, grads


def compare(mine, one, truth, name):
    """This rank's statistics and gradients with those of one process, and float64."""
    for field, k, r, t in zip(TokenStats._fields, mine[0], one[0], truth[0]):
        if t is None or field == "skipped_fraction":
            continue
        if t.is_floating_point():
            assert_as_close_as(k, r, t, name=f"{name}: {field}")
        else:
            assert torch.equal(k, t), f"{name}: {field}"
    for i, (k, r, t) in enumerate(zip(mine[1], one[1], truth[1])):
        assert_as_close_as(k, r, t, name=f"{name}: gradient {i}")


def check_logits(columns, options, group):
    hidden, weight, labels = problem()
    logits = 2 * hidden @ weight.t()

    def run(dtype, part=slice(None), group=None):
        x = logits[:, part].to(dtype).requires_grad_()
        stats = logits_module.token_stats(x, labels, group=group, **options)
        return evaluate(stats, x)

    one, truth = run(torch.float32), run(torch.float64)
    mine = run(torch.float32, columns, group)
    cut = [(stats, (grads[0][:, columns],)) for stats, grads in (one, truth)]
    compare(mine, *cut, f"token_stats {options}")
    exact = run(torch.float64, columns, group)
    torch.testing.assert_close(exact[0].logp, truth[0].logp, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(exact[1][0], truth[1][0][:, columns], atol=1e-13, rtol=1e-13)


def check_linear(columns, options, group):
    hidden, weight, labels = problem()

    def run(dtype, part=slice(None), group=None):
        h, w = hidden.to(dtype).requires_grad_(), weight[part].to(dtype).requires_grad_()
        stats = linear.linear_token_stats(h, w, labels, group=group, **options)
        return evaluate(stats, h, w)

    one, truth = run(torch.float32), run(torch.float64)
    stats, (grad_hidden, grad_weight) = run(torch.float32, columns, group)
    dist.all_reduce(grad_hidden, group=group)  # as Megatron-core's tensor-parallel region does
    cut = [(s, (grads[0], grads[1][columns])) for s, grads in (one, truth)]
    compare((stats, (grad_hidden, grad_weight)), *cut, f"linear_token_stats {options}")


def check_responses(columns, group):
    """The [B, T] functions pass the group on."""
    hidden, weight, labels = problem()
    mask = (labels >= 0)[None]
    logits = (hidden @ weight.t())[None]
    for prune in (None, 0.05):
        one = response_statistics(logits, labels[None], mask, prune=prune)
        options = {"prune": prune, "group": group}
        cut = response_statistics(logits[..., columns], labels[None], mask, **options)
        fused = linear_response_statistics(
            hidden[None], weight[columns], labels[None], mask, **options
        )
        for mine in (cut, fused):
            for a, b in zip(mine[:8], one[:8]):
                if b is not None:
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def check_masked_shard(columns, group):
    """A shard of nothing but padding (-inf), as a vocabulary rounded up to the group has it."""
    hidden, weight, labels = problem()
    logits = 2 * hidden @ weight.t()
    first = dist.get_rank(group) == 0
    labels = labels + 7  # behind seven columns of padding, which rank 0 has alone
    labels[[5, 11]] = -100
    sizes = [7] + [0] * (dist.get_world_size(group) - 1)
    sizes[1:] = torch.tensor_split(torch.arange(101), len(sizes) - 1)
    x = torch.full((N, 7), -math.inf) if first else logits[:, sizes[dist.get_rank(group)]]
    x.requires_grad_()
    for prune in (None, 0.05):
        whole = torch.cat([torch.full((N, 7), -math.inf), logits], 1)
        one = logits_module.token_stats(whole, labels, prune=prune)
        stats, (grad,) = evaluate(logits_module.token_stats(x, labels, prune=prune, group=group), x)
        torch.testing.assert_close(stats.logp, one.logp, atol=1e-5, rtol=1e-5)
        assert grad.isfinite().all() and (not first or (grad == 0).all())


def check_broken(columns, group):
    """A NaN on one rank breaks the row on all; a label of no shard and an error do, too."""
    hidden, weight, labels = problem()
    logits = hidden @ weight.t()
    logits[2, 100] = math.nan  # the last rank's
    logits[3, 0] = math.inf  # the first rank's
    stats = logits_module.token_stats(logits[:, columns], labels, group=group)
    assert stats.broken.nonzero().squeeze(-1).tolist() == [2, 3]
    assert stats.logp.isnan().nonzero().squeeze(-1).tolist() == [2, 3]
    skipped = logits_module.token_stats(logits[:, columns], labels, group=group, nonfinite="skip")
    assert (skipped.logp[2:4] == 0).all()
    messages = []
    for bad, options in ((labels, {"nonfinite": "raise"}), (labels.clone(), {})):
        if not options:
            bad[7] = 101
        try:
            logits_module.token_stats(logits[:, columns], bad, group=group, **options)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) == 2 and "row 2" in messages[0] and "labels[7] = 101" in messages[1]


def counted(function, *args):
    """Kinds of collectives in a call: sums, maxima, others."""
    seen = []
    all_reduce = dist.all_reduce

    def watched(tensor, op=dist.ReduceOp.SUM, group=None):
        seen.append(op)
        return all_reduce(tensor, op, group)

    with mock.patch.object(dist, "all_reduce", watched):
        out = function(*args)
    return out, seen


def check_messages(columns, group):
    """Sizes, maxima, sums and (pruned) kept sums; nothing in backward."""
    hidden, weight, labels = problem()
    for prune, expected in ((None, "SUM MAX SUM"), (0.05, "SUM MAX SUM SUM")):
        x = (hidden @ weight.t())[:, columns].requires_grad_()
        stats, forward = counted(
            lambda x, p: logits_module.token_stats(x, labels, prune=p, group=group), x, prune
        )
        assert " ".join(op.name for op in forward) == expected
        _, backward = counted(lambda s: s.logp.sum().backward(), stats)
        assert backward == []


def run(rank, world, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    group = dist.group.WORLD
    kernels.TILES = dict.fromkeys((2, 4), kernels.Tiles(16, 32, 16, 4, 2))
    tiled.ROWS, tiled.ENTRIES = 16, 16 * 32
    for sizes in CUTS[world]:
        start = sum(sizes[:rank])
        columns = slice(start, start + sizes[rank])
        for path in ("kernel", "pytorch"):
            on = [
                mock.patch.object(module, "runs_kernel", return_value=path == "kernel")
                for module in (logits_module, linear)
            ]
            with on[0], on[1]:
                for options in (
                    {"temperature": 0.7},
                    {"prune": 0.05},
                    {"prune": 0.05, "softcap": 4.0},
                ):
                    check_logits(columns, options, group)
                    check_linear(columns, options, group)
                check_responses(columns, group)
                check_masked_shard(columns, group)
                check_broken(columns, group)
                check_messages(columns, group)
    dist.destroy_process_group()
