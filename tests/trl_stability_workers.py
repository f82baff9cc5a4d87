"""Runs of test_integration_trl_stability.py: fixed samples under a real GRPOTrainer, on ranks too.

The samples come from here by `rollout_func`, so a test knows every token, its log-probability when
sampled and its reward without asking the trainer.
"""

import contextlib
import io
import math
import os
from typing import NamedTuple

import datasets
import torch
import torch.distributed as dist
import trl
from tiny_models import VOCAB, causal_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trimtab.integrations.trl import StabilityGRPOTrainer
from trimtab.stability import MismatchMonitor, SignLengthMonitor, StabilityWatch, VarianceMonitor

EOS, GROUP, ROWS = 1, 4, 12


class Samples(NamedTuple):
    """Twelve rows of three prompts; tools: 1 at a generated token, 0 at a tool's."""

    prompts: list[list[int]]
    completions: list[list[int]]
    tools: list[list[int]]
    logp: list[list[float]]
    rewards: list[float | None]

    def of_rank(self, rank, ranks):
        size = ROWS // ranks
        return Samples(*(x[rank * size : (rank + 1) * size] for x in self))

    def rollout(self, prompts, trainer):
        own = self.of_rank(trainer.accelerator.process_index, trainer.accelerator.num_processes)
        return {
            "prompt_ids": own.prompts,
            "completion_ids": own.completions,
            "logprobs": own.logp,
            "env_mask": own.tools,
            "rank_rewards": own.rewards,
        }

    @staticmethod
    def reward(completions, rank_rewards, **_):
        return rank_rewards


def samples():
    """Of the policy's log-probabilities, far off for rows 1, 6 and 7 and close for the others."""
    g = torch.Generator().manual_seed(5)
    lengths = [5, 2, 6, 3, 1, 6, 4, 4, 2, 6, 3, 5]
    heads = [torch.randint(3, VOCAB, (2 + i,), generator=g).tolist() for i in range(3)]
    prompts = [heads[i // GROUP] for i in range(ROWS)]
    completions = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]
    for row in (0, 3, 8):
        completions[row][-1] = EOS
    tools = [[1] * n for n in lengths]
    tools[2][2] = tools[5][1] = tools[9][4] = 0
    noise = [0.3 if i in (1, 6, 7) else 1e-3 for i in range(ROWS)]
    logp = []
    with torch.no_grad():
        for prompt, completion, size in zip(prompts, completions, noise):
            logits = policy()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            logp.append((own + size * (1 + torch.rand(len(own), generator=g))).tolist())
    rewards = [1.0, 0.0, 0.0, 1.0, 0.2, 0.7, None, -0.4, 0.0, 0.0, 1.0, 0.0]
    return Samples(prompts, completions, tools, logp, rewards)


def policy(seed=0, **changes):
    return causal_lm("llama_gqa", seed=seed, pad_token_id=0, eos_token_id=EOS, **changes)


def tokenizer():
    ids = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


class Steps(TrainerCallback):
    """Keeps the gradient of every optimizer step, flat, and the rate it takes."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        self.gradients.append(torch.cat(grads).clone())


def trainer_of(folder, *, kind=StabilityGRPOTrainer, batch=None, model=None, args=(), **options):
    """A trainer on the samples of `batch`; without one it generates."""
    config = trl.GRPOConfig(
        str(folder),
        **dict(
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=6,
            max_steps=1,
            learning_rate=0.0 if batch else 1e-2,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        | dict(args),
    )
    steps = Steps()
    trainer = kind(
        policy() if model is None else model,
        Samples.reward if batch else length_reward,
        config,
        datasets.Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 15)]}),
        processing_class=tokenizer(),
        rollout_func=batch.rollout if batch else None,
        callbacks=[steps],
        **options,
    )
    return trainer, steps


def length_reward(completion_ids, **_):
    return [float(ids[0] % 3) + 0.1 * len(ids) for ids in completion_ids]


def train(trainer, **options):
    """The logs of the steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)
    return [x for x in trainer.state.log_history if "loss" in x]


RHO = math.exp(-7)  # one sampled token is outside its safe set
EVERYTHING = dict(
    pruning={"rho": RHO, "out_of_set": "mask_token"},
    token_baseline={"alignment": "model_token", "leave_one_out": True},
    aggregation={"rule": "balanced"},
    trust_region={"max_threshold": 1e-2},
    length_trigger={"warmup": 1, "joint": {"mismatch": 1.5, "grad_norm": 2.0}},
)


def run_everything(folder, *, ranks, reference):
    """One step over micro-batches of two rows: its gradient, its log and the loss of a test."""
    model = policy()
    model.config._name_or_path = str(reference)
    trainer, steps = trainer_of(
        folder,
        batch=samples(),
        model=model,
        args=dict(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ROWS // 2 // ranks,
            per_device_eval_batch_size=ROWS // ranks,
            scale_rewards="none",
            beta=0.3,
        ),
        monitors=StabilityWatch([MismatchMonitor(), SignLengthMonitor(), VarianceMonitor()]),
        **EVERYTHING,
    )
    (log,) = train(trainer)
    with contextlib.redirect_stdout(io.StringIO()):
        loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]  # of the same rows, 4 times
    signals = trainer._detector.state_dict()
    return {"gradient": steps.gradients[0], "log": log, "signals": signals, "eval_loss": loss}


def everything_on_a_rank(rank, ranks, folder):
    """accelerate takes the process group that is there, and DDP by the environment's numbers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # not used: it is there
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    found = run_everything(f"{folder}/out", ranks=ranks, reference=f"{folder}/reference")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
