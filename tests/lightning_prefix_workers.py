"""Processes of test_integration_lightning_prefix.py, and the modules that it trains in any number.

Spawn needs functions in a module by name; a function's first argument is its rank.
"""

import os
from collections.abc import Mapping

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from prefix_cases import dense_loss, group_of_responses, loss_of
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from tiny_models import causal_lm, keep_norm_dtype
from torch.distributed.tensor import DTensor

from trimtab.integrations.lightning import SharedPrefixMixin
from trimtab.rl.sharding import shard_policy

# by rank: prompt length and response lengths of each group
GROUPS = (((17, (5, 1, 7, 7, 3, 9)), (30, (4, 4))), ((11, (6, 2)),))


def model_of(dtype=torch.float64, **changes):
    model = causal_lm("llama_gqa", dtype=dtype, **changes)
    return keep_norm_dtype(model) if dtype == torch.float64 else model


def groups_of(rank):
    return [group_of_responses(*sizes, seed=10 * rank + i) for i, sizes in enumerate(GROUPS[rank])]


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.detach().clone()


class Trained(pl.LightningModule):
    """Keeps the gradient of every optimizer step, flat; a batch is the number of the step."""

    def __init__(self, model):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.scale = torch.nn.Parameter(torch.ones((), dtype=model.dtype))  # not the model's own
        self.gradients = []
        self.rank_of_groups = None

    def groups(self):
        rank = self.global_rank if self.rank_of_groups is None else self.rank_of_groups
        return groups_of(rank)

    def accumulate(self):
        """Backward of this process's groups."""
        raise NotImplementedError

    def training_step(self, batch, batch_index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.accumulate()
        optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        grads = [whole(p.grad).flatten() for p in self.model.parameters()]
        self.gradients.append(torch.cat(grads).double())

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def configure_model(self):
        if self.device_mesh is not None:
            shard_policy(self.model, self.device_mesh["data_parallel"])


class Dense(Trained):
    """Every trajectory on its own."""

    def accumulate(self):
        total = 0.0
        for prompt, responses, weights in self.groups():
            for response, w in zip(responses, weights, strict=True):
                total = total + dense_loss(self.model, prompt, response, w.to(self.model.dtype))
        self.manual_backward(total * self.scale)


class Shared(SharedPrefixMixin, Trained):
    """The same losses by shared-prefix training."""

    shared_prefix_options: Mapping = {"min_bound": 0, "wave_tokens": 12, "verify": "always"}

    def loss_of(self, weights):
        loss = loss_of(weights)
        return lambda out, wave: loss(out, wave) * self.scale

    def accumulate(self):
        groups = self.groups()
        self.loss = self.shared_prefix_backward((p, r, self.loss_of(w)) for p, r, w in groups)


def fit(module, steps=1, **options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "devices": 1} | options
    trainer = pl.Trainer(max_epochs=1, use_distributed_sampler=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(steps)))
    return trainer


class Idle(Shared):
    """The second process has no groups in the first step."""

    def groups(self):
        return super().groups() if self.gradients or self.global_rank == 0 else []


class Joint(Shared):
    """Losses of whole groups; the processes have different numbers of waves."""

    def accumulate(self):
        groups = [(p, r, self.loss_of(w)) for p, r, w in self.groups()]
        self.shared_prefix_backward(groups, joint=True)


def on_two_processes(rank, folder):
    """Saves the gradients of every strategy and module, and what was refused."""
    torch.set_num_threads(1)
    # Lightning starts no processes
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {}
    for kind in (Dense, Shared, Joint, Idle):
        module = kind(model_of())
        fit(module, steps=2, strategy="ddp", devices=2)
        found["ddp", kind.__name__] = module.gradients
        found["ddp", kind.__name__, "scale"] = module.scale.grad
    for kind in (Shared, Joint, Idle):
        module = kind(model_of())
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        trainer = fit(module, steps=2, strategy=strategy, devices=2)
        found["fsdp2", kind.__name__] = module.gradients
        found["fsdp2", kind.__name__, "metrics"] = {
            name: float(value) for name, value in trainer.callback_metrics.items()
        }
    try:
        fit(Shared(model_of()), strategy=DDPStrategy(static_graph=True), devices=2)
    except ValueError as error:
        found["static_graph"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
