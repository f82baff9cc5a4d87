"""Checks that test_divergence_sharded.py runs in several processes: a vocabulary over ranks.

`run` is started once in every process and goes through the worlds of WORLDS, each a process group
of its own with uneven shards.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from row_cases import example, value_and_gradients

from trimtab.triton_kernels import divergence, gem, imitation, soft_value

V = 5200
WORLDS = {2: [(0, 4100), (4100, V)], 3: [(0, 7), (7, 4103), (4103, V)]}
MASK = torch.tensor([True, False, True, True, True])
MODULES = (divergence, gem, imitation, soft_value)


def logits_of(dtype, *, hidden=()):
    """Two sets of logits [5, V]; `hidden` columns are masked in row 2, row 3 is far away."""
    pair = [example((5, V), "cpu", seed=seed)[:, :V] for seed in (0, 1)]
    for x in pair:
        x[1] = torch.nan  # a row that is not read
        x[2, slice(*hidden) if hidden else slice(0)] = -torch.inf
        x[3] += 1e3 * x[3]
    pair[1][4] = pair[0][4] + 1e-3 * pair[1][4]  # nearly the same
    return [x.to(dtype).contiguous() for x in pair]


def assert_equal(found, whole, shard, tolerance):
    """Value the same on every rank, gradients those of the rank's columns."""
    value, *gradients = found
    expected, *plain = whole
    torch.testing.assert_close(value, expected, **tolerance)
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    assert all(v.equal(value) for v in values)
    for g, p in zip(gradients, plain):
        torch.testing.assert_close(g, p[:, slice(*shard)], **tolerance)


def compare(fn, logits, *others, tolerance, messages, **options):
    shard = WORLDS[dist.get_world_size()][dist.get_rank()]
    whole = value_and_gradients(fn, logits, V, *others, **options)
    columns = slice(*shard)
    counted, reduce = [], dist.all_reduce

    def counting(x, *args, **kwargs):
        counted.append(x.numel())
        return reduce(x, *args, **kwargs)

    dist.all_reduce = counting
    try:
        mine = [x[:, columns].clone() for x in logits]
        width = shard[1] - shard[0]
        found = value_and_gradients(fn, mine, width, *others, group=dist.group.WORLD, **options)
    finally:
        dist.all_reduce = reduce
    assert len(counted) == messages, counted
    assert_equal(found, whole, shard, tolerance)


def check_token_kl(dtype, tolerance):
    for hidden in ((), WORLDS[dist.get_world_size()][0], WORLDS[dist.get_world_size()][-1]):
        logits = logits_of(dtype, hidden=hidden)
        for options in ({}, {"temperature": 1.3, "softcap": 5.0, "other_temperature": 0.9}):
            compare(
                divergence.token_kl,
                logits,
                mask=MASK,
                tolerance=tolerance,
                messages=2,
                **options,
            )


def check_small_divergence(dtype, tolerance):
    """Far below the rounding of one logsumexp: relative error."""
    x, u = logits_of(dtype)
    x, u = x[4:], u[4:]
    x, u = (t.gather(-1, x.argsort(-1)) for t in (x, u))  # every shard has maxima of its own
    columns = slice(*WORLDS[dist.get_world_size()][dist.get_rank()])
    kl = divergence.token_kl(x[:, columns], u[:, columns], group=dist.group.WORLD)
    truth = divergence.token_kl_reference(x.double(), u.double())
    torch.testing.assert_close(kl.double(), truth, atol=0, rtol=1e-3)
    assert 1e-7 < truth < 1e-4


def check_q_without_an_entry_of_p(dtype, tolerance):
    """One shard of q is masked as a whole: +inf on every rank."""
    x, u = (t[[0, 2]] for t in logits_of(dtype))
    shards = WORLDS[dist.get_world_size()]
    u[0, slice(*shards[-1])] = -torch.inf
    columns = slice(*shards[dist.get_rank()])
    x, u = x[:, columns].requires_grad_(), u[:, columns].requires_grad_()
    kl = divergence.token_kl(x, u, group=dist.group.WORLD)
    assert kl[0] == torch.inf and kl[1].isfinite()
    gradients = torch.autograd.grad(kl.sum(), [x, u])
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][0].any()


def check_teacher_kl(dtype, tolerance):
    for hidden in ((), WORLDS[dist.get_world_size()][0]):
        logits = logits_of(dtype, hidden=hidden)[0]
        generator = torch.Generator().manual_seed(4)
        ids = torch.stack([torch.randperm(V, generator=generator)[:9] for _ in MASK])
        ids[0] = torch.arange(4110, 4119)  # all in one shard
        ids[2, :2] = torch.tensor([0, V - 1])
        ids[1] = -5  # not read
        log_q = example((5, 9), "cpu", seed=6)[:, :9].log_softmax(-1) - 0.1
        for options in ({}, {"temperature": 1.3, "softcap": 5.0}):
            compare(
                imitation.teacher_kl,
                [logits],
                ids,
                log_q.to(dtype),
                mask=MASK,
                tolerance=tolerance,
                messages=3,
                **options,
            )


def check_gem_loss(dtype, tolerance):
    logits, _ = logits_of(dtype)
    labels = torch.tensor([0, -100, 4099, V - 1, 4103])
    for h in ("linear", "logsigmoid"):
        for cap in (None, 5.0):
            compare(
                gem.gem_loss,
                [logits],
                labels,
                h=h,
                softcap=cap,
                tolerance=tolerance,
                messages=4,
            )


def check_initial_value(dtype, tolerance):
    for hidden in ((), WORLDS[dist.get_world_size()][0]):
        logits, _ = logits_of(dtype, hidden=hidden)
        compare(
            soft_value.initial_value,
            [logits],
            mask=MASK,
            softcap=5.0,
            tolerance=tolerance,
            messages=2,
        )


def check_broken_rows(dtype, tolerance):
    """NaN in one shard is NaN on every rank; so is a row without a finite logit, and no other."""
    shards = WORLDS[dist.get_world_size()]
    for bad in (torch.nan, torch.inf, -torch.inf):
        x, u = (t[[0, 2, 4]] for t in logits_of(dtype))
        x[0, V - 1 if bad != -torch.inf else slice(None)] = bad
        columns = slice(*shards[dist.get_rank()])
        x, u = x[:, columns], u[:, columns]
        ids = torch.tensor([[1, 9]] * 3)
        found = [
            divergence.token_kl(x, u, group=dist.group.WORLD),
            divergence.token_kl(u, x, group=dist.group.WORLD),
            imitation.teacher_kl(x, ids, -ids.to(dtype), group=dist.group.WORLD),
            gem.gem_loss(x, ids[:, 0], group=dist.group.WORLD),
            soft_value.initial_value(x, group=dist.group.WORLD),
        ]
        assert all(t.isnan().tolist() == [True, False, False] for t in found), found


def check_wrong_ids_and_labels(dtype, tolerance):
    """Those of the whole vocabulary are right, those past it are refused on every rank."""
    columns = slice(*WORLDS[dist.get_world_size()][dist.get_rank()])
    x = logits_of(dtype)[0][:1, columns]
    for call in (
        lambda: gem.gem_loss(x, torch.tensor([V]), group=dist.group.WORLD),
        lambda: imitation.teacher_kl(
            x, torch.tensor([[V]]), torch.tensor([[-1.0]]), group=dist.group.WORLD
        ),
    ):
        try:
            call()
        except ValueError as error:
            assert f"[0, {V})" in str(error)
        else:
            raise AssertionError("not refused")


CHECKS = [
    check_token_kl,
    check_small_divergence,
    check_q_without_an_entry_of_p,
    check_teacher_kl,
    check_gem_loss,
    check_initial_value,
    check_broken_rows,
    check_wrong_ids_and_labels,
]
PATHS = {
    "kernel": (torch.float32, {"atol": 2e-6, "rtol": 1e-5}),
    "chunked": (torch.float32, {"atol": 2e-6, "rtol": 1e-5}),
    "fp64": (torch.float64, {"atol": 1e-13, "rtol": 1e-12}),
}


def ids():
    return [
        f"{check.__name__.removeprefix('check_')}-{path}-{world}"
        for world in WORLDS
        for path in PATHS
        for check in CHECKS
    ]


def run(rank, folder):
    """Every check of every world this process belongs to; rank 0 notes those that passed."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        for path, (dtype, tolerance) in PATHS.items():
            for module in MODULES:
                module.runs_kernel = lambda x, kernel=path == "kernel": kernel
            for check in CHECKS:
                check(dtype, tolerance)
                dist.barrier()
                if rank == 0:
                    with Path(folder, "passed").open("a") as notes:
                        notes.write(f"{check.__name__.removeprefix('check_')}-{path}-{world}\n")
        dist.destroy_process_group()
