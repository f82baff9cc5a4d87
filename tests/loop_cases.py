"""The loop in this process: a task of letters, its configuration, a run that keeps its metrics."""

import pytorch_lightning as pl
import torch
from reward_functions import digits_written
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.rl import (
    EvaluationConfig,
    PolicyConfig,
    Problem,
    ProblemData,
    RLConfig,
    RLModule,
    RolloutConfig,
    Task,
    UpdateConfig,
)


class Letters(Task):
    """Prompts of letters; the reward function is given."""

    stop = ";"

    def __init__(self, reward=digits_written):
        self.reward = reward

    def problem(self, split, index):
        return Problem(f"{split}/{index}", "abcdef"[index % 6] + str(index % 10), {})

    def reward_function(self):
        return self.reward


def config_of(task, folder, rollout=None, **update):
    return RLConfig(
        task=task,
        policy=PolicyConfig(path=str(folder)),
        updates=3,
        rollout=RolloutConfig(
            **{"prompts": 3, "group_size": 4, "max_tokens": 16, "dtype": "float32"}
            | (rollout or {})
        ),
        update=UpdateConfig(**{"lr": 1e-3} | update),
        evaluation=EvaluationConfig(problems=5, samples=2),
    )


class Watch(pl.Callback):
    """Keeps each update's metrics."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def train(config, folder, callbacks=(), teacher=None, **trainer_options):
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = RLModule(config, policy, tokenizer, config.task, teacher)
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
        **trainer_options,
    )
    trainer.fit(module, ProblemData(config))
    return module, watch.rows


class KeepGradient(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grad = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
