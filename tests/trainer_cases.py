"""A small transformers Trainer, alone or as one of several ranks, under DDP or FSDP2 on the CPU."""

import gc
import os
import weakref

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny_models import VOCAB, causal_lm
from transformers import Trainer, TrainerCallback, TrainingArguments

from trimtab.integrations.transformers import (
    LengthTriggeredLRCallback,
    StabilityMonitorCallback,
    adam_mini,
    gem_compute_loss,
)
from trimtab.stability import GradientNormMonitor

ROWS, LENGTH = 24, 9  # three steps of eight rows are an epoch
STEPS, SAVED = 5, 2


def rows():
    """Rows of which the first few tokens, more in some than in others, are no labels."""
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(LENGTH) < (torch.arange(ROWS) % 7)[:, None], -100)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


class LengthTrainer(Trainer):
    """Logs response lengths as TRL does, but each rank its own: their mean is 10 (step + 1).

    Those of the first of two ranks do not rise, so alone it would not see what happens.
    """

    def log(self, logs, start_time=None):
        if "loss" in logs:
            mean, others = 10.0 * self.state.global_step, dist.is_initialized()
            mine = (10.0, 2 * mean - 10.0)[self.args.process_index]
            logs["completions/mean_length"] = mine if others else mean
        super().log(logs, start_time)


class ShardingTrainer(LengthTrainer):
    """Under FSDP2 on the CPU.

    Accelerate 1.15 has the whole of FSDP2 working there, but does not choose it: AcceleratorState
    looks at a plugin only for a list of devices without the CPU, and goes on with DDP, silently.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            **self.args.fsdp_plugin_args
        )
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


class Recorder(TrainerCallback):
    """Of each step the gradients, and of each log what came to a callback that stands last."""

    def __init__(self, gradients=False):
        self.wants_gradients, self.gradients, self.logs = gradients, [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.wants_gradients:
            named = model.named_parameters()
            self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def language_model():
    return causal_lm("llama", dtype=torch.float64, num_hidden_layers=1)


class NothingWhole(TrainerCallback):
    """Once the model is sharded, nobody keeps its whole parameters in memory."""

    def __init__(self, model):
        self.whole = [weakref.ref(parameter) for parameter in model.parameters()]

    def on_train_begin(self, args, state, control, **kwargs):
        kept = [i for i, parameter in enumerate(self.whole) if parameter() is not None]
        assert not kept, f"whole parameters are still there: {kept}"


def arguments(folder, **changes):
    options = dict(
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return TrainingArguments(str(folder), **options | changes)


def callbacks(**monitor):
    """A rate that is halved from step 1 on and again at step 3, and a watch on gradients."""
    rate = LengthTriggeredLRCallback(
        warmup=1, ratio=1.5, smoothing=0.0, period_factor=2.0, decay=0.5, floor=0.01
    )
    return [rate, StabilityMonitorCallback([GradientNormMonitor(window=4)], **monitor)]


def make(folder, added=(), *, kind=LengthTrainer, model=None, optimizer="adam_mini", **changes):
    """A Trainer of a float64 model, all of ours in it; `added` are its callbacks."""
    args = arguments(folder, **changes)
    return kind(
        model or language_model(),
        args,
        train_dataset=rows(),
        callbacks=list(added),
        compute_loss_func=gem_compute_loss(),
        optimizer_cls_and_kwargs=adam_mini(args) if optimizer == "adam_mini" else optimizer,
    )


def weights(trainer):
    named = trainer.model.named_parameters()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named
    }


def history(trainer):
    """The logs of training, without times."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# test_integration_transformers_trainer.py starts this


def train_over_ranks(rank, world, folder, modes):
    """Each mode without a break and from its checkpoint; rank 0 saves the results by mode."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # the group is there already
    )
    results = {}
    for mode in modes:
        results[mode] = _train_twice(rank, world, f"{folder}/{mode}", mode)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


def _train_twice(rank, world, folder, mode):
    changes = dict(per_device_train_batch_size=4 // world, ddp_backend="gloo")
    kind = LengthTrainer
    if mode != "ddp":
        kind = ShardingTrainer
        changes |= dict(fsdp=True, fsdp_config={"version": 2, "state_dict_type": mode})
    runs = []
    for resumed in (False, True):
        AcceleratorState._reset_state(True)
        added = callbacks()
        trainer = make(folder, added, kind=kind, save_strategy="steps", save_steps=SAVED, **changes)
        if mode != "ddp":
            trainer.add_callback(NothingWhole(trainer.model))
        wrapper = "DistributedDataParallel" if mode == "ddp" else "FSDPLlamaForCausalLM"
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}" if resumed else None)
        assert type(trainer.model_wrapped).__name__ == wrapper
        inner = trainer.optimizer.optimizer
        held = {p for group in inner.param_groups for p in group["params"]}
        assert set(inner._places) == held  # and nothing that was replaced
        assert sorted(place.number for place in inner._places.values()) == list(range(len(held)))
        runs.append((weights(trainer), history(trainer), [c.state_dict() for c in added]))
    # one mind: what rank 1 logged and decided is what rank 0 did
    everyone = [None] * world
    dist.all_gather_object(everyone, [(entry["length_lr_factor"]) for entry in runs[0][1]])
    assert everyone[0] == everyone[rank]
    return runs
