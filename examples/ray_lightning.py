"""A Lightning module of your own on a Ray cluster, with trimtab's callbacks.

    python examples/ray_lightning.py --workers 2 --steps 40

Ray's Lightning support starts the processes and Lightning trains by DDP; the callbacks are those of
one machine. On a cluster, `ray.init(address="auto")` first, or `ray job submit`.
"""

import argparse

import lightning.pytorch as pl
import ray.train
import torch
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.integrations.lightning import (
    AdamMiniCallback,
    LengthTriggeredLRCallback,
    StabilityMonitorCallback,
)
from trimtab.stability import ClipEntropyMonitor, GradientNormMonitor, response_statistics

VOCAB, END = 32, 0


class CountingModule(pl.LightningModule):
    """Learns to count upwards from any token to the end token."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes))

    def training_step(self, batch, index):
        ids, mask = batch
        stats = response_statistics(self.model(ids[:, :-1]).logits, ids[:, 1:], mask)
        loss = -stats.logp.sum() / mask.sum()
        self.log("loss", loss, sync_dist=True)
        self.log("mean_length", mask.sum(1).float().mean(), sync_dist=True)  # of responses, in RL
        self.log("entropy/mean", stats.entropy.sum() / mask.sum(), sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(options):
    """Runs in every worker."""
    pl.seed_everything(0, verbose=False)
    starts = torch.randint(1, VOCAB, (16 * options["steps"] * options["workers"],))
    rows = starts[:, None] + torch.arange(9)
    data = list(zip(rows.where(rows < VOCAB, END), (rows < VOCAB)[:, :-1]))
    trainer = pl.Trainer(
        max_steps=options["steps"], accelerator="auto", devices="auto", strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[
            AdamMiniCallback(),
            LengthTriggeredLRCallback("mean_length", warmup=10),
            StabilityMonitorCallback([GradientNormMonitor(), ClipEntropyMonitor()], patience=3),
        ],
    )  # fmt: skip
    prepare_trainer(trainer).fit(
        CountingModule(), torch.utils.data.DataLoader(data, batch_size=16)
    )  # Lightning gives each worker its share
    metrics = {name: round(float(x), 3) for name, x in trainer.callback_metrics.items()}
    return {"optimizer": type(trainer.optimizers[0]).__name__} | metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    options = vars(parser.parse_args())
    scaling = ray.train.ScalingConfig(num_workers=options["workers"])  # use_gpu=True for GPUs
    print(TorchTrainer(train, train_loop_config=options, scaling_config=scaling).fit().return_value)
