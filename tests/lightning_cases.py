"""Modules and runs of the Lightning tests, in one process and in two, in either namespace."""

from __future__ import annotations

import os
from importlib import import_module

import torch
import torch.distributed as dist

from trimtab.integrations.lightning import (
    AdamMiniCallback,
    LengthTriggeredLRCallback,
    StabilityMonitorCallback,
)
from trimtab.stability import GradientNormMonitor

BATCHES, ROWS = 6, 8  # in an epoch, and in a batch over all processes
QUIET = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")


def regression(namespace="pytorch_lightning", poison=(), on_rank=0, surge_at=None, idle=False):
    """A LightningModule whose gradients are NaN in the batches `poison`, counted over epochs.

    It logs response lengths of 10 tokens, from batch `surge_at` on 500. idle: it has a layer that
    no batch uses.
    """
    base = import_module(namespace).LightningModule

    class Regression(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
            )
            self.idle = torch.nn.ModuleList([torch.nn.Linear(3, 3)] * idle)
            self.batches = 0
            self.norms = []

        def training_step(self, batch, _):
            (x,) = batch
            loss = (self.net(x) - x[:, :3]).square().mean()
            if self.batches in poison and self.global_rank == on_rank:
                loss = loss * float("nan")
            surged = surge_at is not None and self.batches >= surge_at
            self.log("mean_length", 500.0 if surged else 10.0)
            self.batches += 1
            return loss

        def on_before_optimizer_step(self, optimizer):
            grads = [p.grad for p in self.net.parameters()]
            grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
            self.norms.append(float(torch.cat([g.double().flatten() for g in grads]).norm()))

        def configure_model(self):
            if getattr(self, "device_mesh", None) is not None:
                for layer in (self.net[0], self.net[2], self.net, *self.idle):
                    torch.distributed.fsdp.fully_shard(
                        layer, mesh=self.device_mesh["data_parallel"]
                    )

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_save_checkpoint(self, checkpoint):
            checkpoint["batches"] = self.batches

        def on_load_checkpoint(self, checkpoint):
            # how many batches were seen is no state of the training: a rollback does not undo it
            self.batches = max(self.batches, checkpoint["batches"])

    return Regression()


def rows():
    return torch.randn(BATCHES * ROWS, 6, generator=torch.Generator().manual_seed(1))


def fit(module, *callbacks, epochs=3, namespace="pytorch_lightning", batch=ROWS, **options):
    """Fits, and returns the Trainer."""
    resume = options.pop("ckpt_path", None)
    options["use_distributed_sampler"] = False  # Lightning's own shuffles
    options = dict.fromkeys(QUIET, False) | {"accelerator": "cpu", "devices": 1} | options
    trainer = import_module(namespace).Trainer(
        max_epochs=epochs, callbacks=list(callbacks), **options
    )
    data = torch.utils.data.TensorDataset(rows())
    size, rank = trainer.world_size, trainer.global_rank
    sampler = torch.utils.data.DistributedSampler(data, size, rank, shuffle=False)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, sampler=sampler)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def callbacks_in(folder, **monitor):
    """Adam-mini, a rate that falls when lengths surge, and a monitor that rolls back."""
    options = {"on_alarm": "roll_back", "healthy_every": 3, "dirpath": folder} | monitor
    return (
        AdamMiniCallback(),
        LengthTriggeredLRCallback(warmup=2, ratio=2.0, smoothing=0.0, period_factor=0.2),
        StabilityMonitorCallback([GradientNormMonitor(window=4)], **options),
    )


def weights(module):
    """Flat, whole also where they are sharded."""
    found = [p.detach() for p in module.parameters()]
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in found]
    )


def on_two_processes(rank, folder):
    """Runs under DDP and FSDP2, whose gradients rank 1 poisons, cut in two and not; saves them."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    torch.set_num_threads(1)
    # Lightning starts no processes
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    strategies = {
        "ddp": lambda: "ddp",
        "fsdp2": lambda: ModelParallelStrategy(2, 1, False, process_group_backend="gloo"),
        "fsdp2-sharded": lambda: ModelParallelStrategy(2, 1, True, process_group_backend="gloo"),
    }
    found = {}
    for name, strategy in strategies.items():

        def run(epochs, name=name, strategy=strategy, idle=False, **options):
            module = regression(poison=(8, 9), on_rank=1, surge_at=11, idle=idle)
            callbacks = callbacks_in(f"{folder}/{name}")
            trainer = fit(
                module, *callbacks, epochs=epochs, batch=ROWS // 2, strategy=strategy(),
                devices=2, **options,
            )  # fmt: skip
            return module, callbacks, trainer

        module, callbacks, trainer = run(3)
        optimizer = trainer.optimizers[0]
        found[name] = {
            "weights": weights(module),
            "factor": callbacks[1].factor,
            "rollbacks": callbacks[2].rollbacks,
            "norms": module.norms,
            "logged_norm": float(trainer.callback_metrics["grad_norm"]),
            "optimizer": type(optimizer).__name__,
            "v": [tuple(s["exp_avg_sq"].shape) for s in optimizer.state.values()],
        }
        if name != "ddp":
            found[name]["idle"] = run(3, idle=True)[2].global_step
        if name != "fsdp2":
            run(1)[2].save_checkpoint(f"{folder}/{name}.ckpt")
            found[name]["resumed"] = weights(run(3, ckpt_path=f"{folder}/{name}.ckpt")[0])
    torch.save(found, f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
