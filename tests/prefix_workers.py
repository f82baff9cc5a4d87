"""Processes of test_prefix_distributed.py: groups on two ranks, under DDP and FSDP2."""

import torch
import torch.distributed as dist
from prefix_cases import group_of_responses, loss_of
from prefix_cases import model_of as architecture
from tiny_models import causal_lm, keep_norm_dtype
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trimtab.rl.prefix import SharedPrefix
from trimtab.rl.sharding import shard_policy

# by rank, of two groups: prompt length and response lengths; rank 1 has no second group
GROUPS = [
    [(17, (5, 1, 7, 7, 3, 9)), (30, (4, 4))],
    [(11, (6, 2)), None],
]


def model_of(checkpointing=False):
    model = keep_norm_dtype(causal_lm("llama_gqa", dtype=torch.float64))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def groups_of(rank):
    return [
        None if sizes is None else group_of_responses(*sizes, seed=10 * rank + i)
        for i, sizes in enumerate(GROUPS[rank])
    ]


def no_prefix_on_rank_1(rank):
    return group_of_responses((17, 1)[rank], ((5, 3, 4, 4), (4, 2))[rank], seed=rank)


def full_gradient(model):
    grads = [p.grad for p in model.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])


def train(step, rank, joint=False):
    for group in groups_of(rank):
        if group is None:
            step.idle_group(joint=joint)
            continue
        prompt, responses, weights = group
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of(weights), joint=joint)
    step.all_reduce_gradients()


def sharded_model(checkpointing=False):
    model = model_of(checkpointing)
    shard_policy(model, init_device_mesh("cpu", (2,)))
    return model


def run(rank, world, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    found = {}
    for memory in ("keep", "recompute", "offload"):
        model = model_of()
        options = dict(prefix_memory=memory, wave_tokens=8, min_bound=0, verify="always")
        train(SharedPrefix(DistributedDataParallel(model), **options), rank)
        found["ddp", memory] = full_gradient(model)
        for checkpointing in (False, True) if memory != "offload" else ():
            model = sharded_model(checkpointing)
            step = SharedPrefix(model, **options)
            train(step, rank)
            found["fsdp2", memory, checkpointing] = full_gradient(model)
    for name, bound in (("joint", 0), ("joint, dense", 100)):
        model = sharded_model()
        train(SharedPrefix(model, wave_tokens=8, min_bound=bound), rank, joint=True)
        found["fsdp2", name] = full_gradient(model)
    model = sharded_model()
    step = SharedPrefix(model, wave_tokens=30, min_bound=100)
    train(step, rank)
    found["fsdp2", "dense"] = full_gradient(model)
    found["route"] = step.metrics()["prefix/shared"]

    mesh = init_device_mesh("cpu", (2,))
    for name, memory, units in (
        ("root alone", "recompute", lambda m: [m]),
        ("root alone, keep", "keep", lambda m: [m]),
        ("whole after forward", "recompute", lambda m: [*m.model.layers, m]),
        ("whole after forward, keep", "keep", lambda m: [*m.model.layers, m]),
        ("hybrid", "recompute", lambda m: [*m.model.layers, m]),
    ):
        model = model_of()
        whole = {"reshard_after_forward": False} if name.startswith("whole") else {}
        grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for module in units(model):
            fully_shard(module, mesh=grid if name == "hybrid" else mesh, **whole)
        model(torch.tensor([[1, 2]]))  # parameters of the root are whole now
        options = dict(prefix_memory=memory, wave_tokens=8, min_bound=0, verify="always")
        train(SharedPrefix(model, **options), rank)
        found["fsdp2", name] = full_gradient(model)

    for name, memory, bound in (
        ("no prefix", "recompute", 0),
        ("no prefix, keep", "keep", 0),
        ("no prefix, dense", "keep", 100),
    ):
        model = sharded_model()
        step = SharedPrefix(model, prefix_memory=memory, min_bound=bound, verify="always")
        prompt, responses, weights = no_prefix_on_rank_1(rank)
        with step.group(prompt) as g:
            g.accumulate(responses, loss_of(weights))
        found["fsdp2", name] = full_gradient(model)
        with torch.no_grad(), step.group(prompt) as g:
            found["logp", name] = g.statistics(responses).logp

    experts = architecture("qwen3_moe")
    shard_policy(experts, mesh)
    step = SharedPrefix(experts, min_bound=0, router_loss=True, verify="never")
    prompt, responses, _ = no_prefix_on_rank_1(rank)
    with torch.no_grad(), step.group(prompt) as g:
        found["router loss, no prefix"] = g.statistics(responses).router_loss

    model = sharded_model()  # rank 1 has nothing to say on
    step = SharedPrefix(model, min_bound=100)
    if rank == 0:
        with step.group([1, 2, 3]) as g:
            g.accumulate([[4], [5]], lambda out, _: out.logp.sum())
    else:
        step.idle_group()
    found["idle first"] = float(full_gradient(model).norm())

    step = SharedPrefix(sharded_model(), min_bound=0, verify="always")
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    with step.group(range(20)) as g:  # equal responses, whose gradients cancel
        g.accumulate([[1, 2, 3]] * 8, lambda out, w: (signs[w.rows, None] * out.logp).sum())
    found["cancelled"] = float(full_gradient(step.host.model).norm())

    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    model = model_of()
    train(SharedPrefix(DistributedDataParallel(model, process_group=alone), min_bound=0), rank)
    found["own replicas"] = full_gradient(model)

    mixed = causal_lm("llama_gqa", num_hidden_layers=6, initializer_range=0.1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*mixed.model.layers, mixed):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    with SharedPrefix(mixed, min_bound=0).group(range(60)) as g:
        g.accumulate([list(range(i, i + 20)) for i in range(8)], lambda out, _: out.logp.sum())
    found["mixed"] = g.step._verified, g.step.metrics()["prefix/bound"]

    model = sharded_model()
    step = SharedPrefix(model, wave_tokens=8, min_bound=0)
    (prompt, responses, weights), _ = groups_of(rank)
    with torch.no_grad(), step.group(prompt) as g:
        found["logp"] = g.statistics(responses).logp

    # one rank's error stops both: a rank cannot go on without the other
    model.zero_grad()
    try:
        with step.group(prompt) as g:
            g.accumulate(responses[:1], loss_of(weights))
            raise ZeroDivisionError
    except ZeroDivisionError:
        found["grads after an error"] = [p.grad for p in model.parameters()]
    train(step, rank)
    found["fsdp2", "after an error"] = full_gradient(model)
    for name, options in {
        "branch": {},
        "fused": {"head": "fused"},
        "offload": {"prefix_memory": "offload"},
    }.items():
        try:
            with SharedPrefix(model, min_bound=0, **options).group(prompt) as g:
                if name == "branch":
                    g.step.group([1, 2], parent=g).__enter__()
                g.accumulate(responses[:1], loss_of(weights))
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
