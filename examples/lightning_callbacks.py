"""A Lightning trainer with Adam-mini, a length-triggered rate and monitors: three callbacks.

    python examples/lightning_callbacks.py --steps 40

The module is yours: it configures AdamW and logs what it knows. Replace `lightning.pytorch` by
`pytorch_lightning` if that is what you use; DDP and FSDP2 (ModelParallelStrategy) work alike.
"""

import argparse

import lightning.pytorch as pl
import torch
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
        logits = self.model(ids[:, :-1]).logits
        stats = response_statistics(logits, ids[:, 1:], mask)
        loss = -stats.logp.sum() / mask.sum()
        self.log("loss", loss, prog_bar=True)
        self.log("mean_length", mask.sum(1).float().mean())  # of responses, in RL
        self.log("entropy/mean", stats.entropy.sum() / mask.sum())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def counting(start):
    row = torch.arange(start, start + 9)
    row[row >= VOCAB] = END
    ended = (row == END).cumsum(0)
    return row, ended[:-1] == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", help="of the logs and the healthy checkpoint")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    data = [counting(start) for start in torch.randint(1, VOCAB, (16 * options.steps,)).tolist()]
    monitors = [GradientNormMonitor(), ClipEntropyMonitor()]
    trainer = pl.Trainer(
        max_steps=options.steps, accelerator="auto", devices=1, log_every_n_steps=1,
        default_root_dir=options.folder,
        callbacks=[
            AdamMiniCallback(),
            LengthTriggeredLRCallback("mean_length", warmup=10),
            StabilityMonitorCallback(monitors, on_alarm="roll_back", patience=3),
        ],
    )  # fmt: skip
    trainer.fit(CountingModule(), torch.utils.data.DataLoader(data, batch_size=16))
    metrics = {name: round(float(x), 3) for name, x in trainer.callback_metrics.items()}
    print(type(trainer.optimizers[0]).__name__, metrics)


if __name__ == "__main__":
    main()
