"""Ray: `trimtab-rl` on the machines of a Ray cluster.

    trainer = rl_trainer(
        ["--config", "recipe.yaml", "--run_dir", "/shared/run"],
        ray.train.ScalingConfig(num_workers=16, use_gpu=True),
    )
    trainer.fit()

`ray.train.torch.TorchTrainer` places and starts the processes and forms their process group; in
each of them the run is what it is under torchrun: Lightning trains, by DDP or FSDP2. Your own
LightningModule needs nothing from here: Ray's own `RayDDPStrategy` and `RayLightningEnvironment`
go with the callbacks of `trimtab.integrations.lightning` (examples/ray_lightning.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._versions import require, version_of

require("ray", version_of("ray"), "2.60", "3")

import ray
import ray.train
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ..rl.cli import make_parser, parse, prepared, quieten
from ..rl.recording import OnUpdate

__all__ = ["rl_trainer"]

_RAYS = ("--trainer.devices", "--trainer.num_nodes")


def rl_trainer(
    arguments: Sequence[str],
    scaling_config: ScalingConfig,
    run_config: RunConfig | None = None,
    torch_config: TorchConfig | None = None,
) -> TorchTrainer:
    """A Ray trainer whose `fit()` runs `trimtab-rl` with these arguments.

    Relative paths mean what they mean here, so the cluster's machines share this folder. Every
    update's metrics go to `ray.train.report`, and the path of the run's folder is what `fit()`
    returns as `return_value`. Leave FailureConfig at no retries: `--resume` continues a run.

    Args:
        arguments: of `trimtab-rl`, without --trainer.devices and --trainer.num_nodes.
        scaling_config: how many workers, and with what; as many on each machine.
        run_config: of TorchTrainer.
        torch_config: of TorchTrainer: the process group's backend and timeout.

    Returns:
        The trainer; nothing has run.

    Raises:
        ValueError, ArgumentError, OSError: the arguments are none that `trimtab-rl` takes.
    """
    arguments = list(map(str, arguments))
    for argument in arguments:
        if argument.partition("=")[0] in _RAYS:
            raise ValueError(
                f"arguments: expected none of {', '.join(_RAYS)}, which scaling_config decides, "
                f"found {argument}"
            )
    with contextlib.chdir("."):  # a resumed run goes to where it started
        parse(make_parser(), arguments)
    return TorchTrainer(
        _run,
        train_loop_config={"arguments": arguments, "folder": os.getcwd()},
        scaling_config=scaling_config,
        run_config=run_config,
        torch_config=torch_config,
    )


def _run(config: dict[str, Any]) -> str:
    """One worker: the run, as torchrun would start it."""
    context = ray.train.get_context()
    local = context.get_local_world_size()
    sizes: list[int] = [local] * context.get_world_size()
    dist.all_gather_object(sizes, local)
    if set(sizes) != {local}:
        raise ValueError(
            "scaling_config: expected as many workers on each machine, since Lightning counts on "
            f"it, found {sorted(set(sizes))}; ask for resources_per_worker that fill a machine"
        )
    # Ray has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Not its own
    # RayLightningEnvironment: it is of the namespace lightning.pytorch where that is installed, and
    # the trainer of pytorch_lightning refuses it then.
    os.environ["GROUP_RANK"] = str(context.get_node_rank())
    os.environ["TORCHELASTIC_RUN_ID"] = context.get_experiment_name()  # Lightning looks for it
    os.chdir(config["folder"])
    quieten()
    nodes = len(sizes) // local
    shape = [f"{_RAYS[0]}={local}", f"{_RAYS[1]}={nodes}"]
    run = prepared([*config["arguments"], *shape])
    run.trainer.callbacks.append(OnUpdate(ray.train.report))  # all workers must call it
    run.train()
    return str(Path(run.folder.path).resolve())
