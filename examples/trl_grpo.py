"""TRL's GRPO with the optimal token baseline, balanced aggregation, pruning and a watched rate.

    python examples/trl_grpo.py --steps 30

Replace `GRPOTrainer` by `StabilityGRPOTrainer` and switch on what you need; `{}` is the defaults.
The model is a tiny one made here, and learns to answer with digits.
"""

import argparse

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from trimtab.integrations.transformers import use_adam_mini
from trimtab.integrations.trl import StabilityGRPOTrainer
from trimtab.stability import ClipEntropyMonitor, GradientNormMonitor, StabilityWatch

CHARACTERS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +="]


def tokenizer_and_model():
    vocabulary = {token: i for i, token in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), num_attention_heads=4, eos_token_id=1, pad_token_id=0, **sizes
    )
    return fast, LlamaForCausalLM(config)


def digits(completions, **_):
    """Share of digits in each completion."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", default="runs/trl")
    options = parser.parse_args()
    tokenizer, model = tokenizer_and_model()
    args = GRPOConfig(
        options.folder, max_steps=options.steps, logging_steps=1, save_strategy="no",
        report_to="none", per_device_train_batch_size=16, num_generations=8, num_iterations=2,
        max_completion_length=8, learning_rate=3e-3, scale_rewards="none", use_cpu=True,
    )  # fmt: skip
    trainer = StabilityGRPOTrainer(
        model, digits, args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one =", "two ="] * 64}),
        token_baseline={"leave_one_out": True},
        aggregation={"rule": "balanced"},
        trust_region={"mean_threshold": 0.1, "max_threshold": 2.0},
        pruning={"rho": 1e-3},
        # eight tokens cut nearly every answer off, from the start: here only a rise is a surge
        length_trigger={"warmup": 10, "saturation": 1.0},
        monitors=StabilityWatch([GradientNormMonitor(), ClipEntropyMonitor()], patience=3),
    )  # fmt: skip
    use_adam_mini(trainer)
    trainer.train()
    for log in trainer.state.log_history:
        if "reward" in log and log["step"] % 5 == 1:
            print(f"step {log['step']}: reward {float(log['reward']):.3f}")


if __name__ == "__main__":
    main()
