"""Checks of checkpoints, <kind>-<variant>-<ranks>.dcp in pieces or .pt whole, over ranks."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_bag import (
    SETTINGS,
    Bag,
    alone,
    assert_same,
    assert_same_slices,
    backward,
    flattened,
    local,
    sharded,
    train,
)
from torch.distributed.checkpoint import state_dict as states

from trimtab.optim import (
    AdamMini,
    from_adamw_state,
)

KINDS = {"fsdp2": sharded, "fsdp1": flattened}
VARIANTS = {"fp32": {}, "bf16": {"momentum_dtype": torch.bfloat16}}
FULL = states.StateDictOptions(full_state_dict=True)
SAVED_AFTER, RESUMED_TO = 2, 4


def checkpoints(folder, *wanted):
    """(kind, variant, path) of those that another number of ranks has written."""
    for path in sorted(folder.glob("*-*-*.*")):
        kind, variant, ranks = path.stem.split("-")
        if path.suffix in wanted and int(ranks) != dist.get_world_size():
            yield kind, variant, path


def check_save(folder):
    for kind, make in KINDS.items():
        for variant, options in VARIANTS.items():
            model, optimizer = make(torch.float32, **options)
            train(model, optimizer, 1, SAVED_AFTER, torch.float32, backward)
            stem = folder / f"{kind}-{variant}-{dist.get_world_size()}"
            of_model, of_optimizer = states.get_state_dict(model, optimizer)
            dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{stem}.dcp")
            whole = states.get_state_dict(model, optimizer, options=FULL)
            if dist.get_rank() == 0:
                torch.save(whole, f"{stem}.pt")
    dist.barrier()


def check_load(folder):
    """A run goes on from what another number of ranks, or one process, has written."""
    found = list(checkpoints(folder, ".dcp", ".pt"))
    assert len(found) >= 8
    for kind, variant, path in found:
        options = VARIANTS[variant]
        model, optimizer = KINDS.get(kind, sharded)(torch.float32, **options)
        before = [local(p.detach()).clone() for p in model.parameters()]
        of_model, of_optimizer = states.get_state_dict(model, optimizer)
        for old, new in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, local(new.detach())), "its first step, without gradients"
        if path.suffix == ".dcp":
            dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
        else:
            of_model, of_optimizer = torch.load(path, weights_only=True)
        states.set_state_dict(
            model,
            optimizer,
            model_state_dict=of_model,
            optim_state_dict=of_optimizer,
            options=FULL if path.suffix == ".pt" else None,
        )
        train(model, optimizer, SAVED_AFTER + 1, RESUMED_TO, torch.float32, backward)
        expected = alone(torch.float32, RESUMED_TO, **options)
        compare = assert_same_slices if kind == "fsdp1" else assert_same
        compare(model, optimizer, expected, 1e-6)


def save_alone(folder):
    """Writes the checkpoint of one process."""
    for variant, options in VARIANTS.items():
        whole = states.get_state_dict(*alone(torch.float32, SAVED_AFTER, **options))
        torch.save(whole, folder / f"plain-{variant}-1.pt")


def load_alone(path):
    """One process goes on from a checkpoint of several; returns its model and optimizer."""
    kind, variant, _ = path.stem.split("-")
    model = Bag(torch.float32)
    optimizer = AdamMini(model.named_parameters(), **SETTINGS, **VARIANTS[variant])
    of_model, of_optimizer = states.get_state_dict(model, optimizer)
    if path.suffix == ".dcp":
        saved = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(saved, checkpoint_id=path, no_dist=True)
        of_model, of_optimizer = saved["model"], saved["optimizer"]
    else:
        of_model, of_optimizer = torch.load(path, weights_only=True)
    if kind == "fsdp1":  # second moments of entries, as those of AdamW
        model.load_state_dict(of_model)
        names = of_optimizer["param_groups"][0]["params"]
        optimizer.load_state_dict(from_adamw_state(optimizer, of_optimizer, names=names))
    else:
        states.set_state_dict(
            model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer
        )
    train(model, optimizer, SAVED_AFTER + 1, RESUMED_TO, torch.float32)
    return model, optimizer
