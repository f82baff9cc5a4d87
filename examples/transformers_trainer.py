"""A transformers Trainer with Adam-mini, GEM, monitors and a length-triggered rate.

    python examples/transformers_trainer.py --steps 40

Supervised fine-tuning of a tiny model made here; the four lines marked with <- are what is added.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trimtab.integrations.transformers import (
    LengthTriggeredLRCallback,
    StabilityMonitorCallback,
    adam_mini,
    gem_compute_loss,
)
from trimtab.stability import GradientNormMonitor

VOCAB = 32


def rows(count):
    """Counting upwards from a random token."""
    starts = torch.randint(VOCAB, (count,)).tolist()
    counted = [torch.arange(start, start + 8) % VOCAB for start in starts]
    return [{"input_ids": ids, "labels": ids} for ids in counted]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="runs/transformers")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes))
    args = TrainingArguments(
        options.folder, max_steps=options.steps, learning_rate=3e-3, logging_steps=1,
        per_device_train_batch_size=16, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    lengths = LengthTriggeredLRCallback(None, warmup=10)  # <- metric=None: it is told the lengths

    def compute_loss(outputs, labels, num_items_in_batch):
        # of responses, in RL; what an evaluation observes, between steps, does not count
        lengths.observe(float((labels != -100).sum(1).float().mean()))
        return gem(outputs, labels, num_items_in_batch)

    gem = gem_compute_loss(beta=0.7)  # <-
    watching = StabilityMonitorCallback([GradientNormMonitor()], on_alarm="stop")  # <-
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(512),
        optimizer_cls_and_kwargs=adam_mini(args),  # <-
        compute_loss_func=compute_loss,
    )
    for callback in (lengths, watching):  # ahead of W&B's own, unlike callbacks=[...]
        callback.add_to(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log in (logs[0], logs[-1]):
        names = ("step", "loss", "grad_norm", "length_lr_factor", "stability/state")
        print({name: log[name] for name in names})


if __name__ == "__main__":
    main()
