"""Parity with the installed GRPOTrainer of TRL 1.16, and the places where we differ on purpose.

Samples are made here and handed to the trainer by its `rollout_func`; scoring, correction and loss
are its own methods. `test_difference_...` pins a difference; its docstring says whether it is a bug
or a convention. Not in our menus and so not here: sapo, vespo, normalize_then_sum.
"""

import contextlib
import io
import math
from typing import NamedTuple

import datasets
import pytest
import torch
import trl
from tiny_models import VOCAB, causal_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    cispo,
    dr_grpo_advantages,
    grpo_advantages,
    gspo,
    importance_weights,
    ppo_clip,
    response_statistics,
    rloo_advantages,
)

PROMPTS, GENERATIONS, LONGEST = 2, 4, 9
ROWS = PROMPTS * GENERATIONS
IDS = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)
EOS = 1


class Samples(NamedTuple):
    """What a rollout engine and a reward function return for one batch.

    Args:
        prompts: token ids of each row.
        completions: token ids of each row, of several lengths.
        tools: 1 at a generated token, 0 at a tool's.
        rollout_logp: of the engine, for each token.
        rewards: a number for each row, or None where there is none.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    tools: list[list[int]]
    rollout_logp: list[list[float]]
    rewards: list[float | None]

    def rollout(self, prompts, trainer):
        return {
            "prompt_ids": self.prompts,
            "completion_ids": self.completions,
            "logprobs": self.rollout_logp,
            "env_mask": self.tools,
        }

    def reward(self, completions, **_):
        return self.rewards

    @property
    def mask(self) -> Tensor:
        width = max(map(len, self.tools))
        return torch.tensor([row + [0] * (width - len(row)) for row in self.tools]).bool()


def samples(seed: int, model, *, mismatch: float = 0.3, scale: float = 1.0) -> Samples:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=g).tolist()
    prompt = [torch.randint(3, VOCAB, (3 + i,), generator=g).tolist() for i in range(PROMPTS)]
    prompts = [prompt[i] for i in IDS.tolist()]
    completions = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]
    tools = [(torch.rand(n, generator=g) < 0.8).int().tolist() for n in lengths]
    for row in tools:
        row[0] = 1
    rollout_logp = []
    for p, c in zip(prompts, completions):
        logp = logp_of(model, [p], [c])[0].detach()
        rollout_logp.append((logp + mismatch * torch.randn(len(c), generator=g)).tolist())
    rewards = (scale * torch.randn(ROWS, generator=g)).tolist()
    return Samples(prompts, completions, tools, rollout_logp, rewards)


def logp_of(model, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """[B, T] of the completions, 0 behind their ends, by a plain forward pass of each row."""
    width = max(map(len, completions))
    rows = []
    for p, c in zip(prompts, completions):
        logits = model(torch.tensor([p + c])).logits[:, len(p) - 1 : -1]
        mask = torch.ones(1, len(c), dtype=torch.bool)
        logp = response_statistics(logits.contiguous(), torch.tensor([c]), mask).logp[0]
        rows.append(torch.nn.functional.pad(logp, (0, width - len(c))))
    return torch.stack(rows)


def policy():
    return causal_lm(pad_token_id=0, eos_token_id=EOS)


def tokenizer():
    ids = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trainer_of(model, batch: Samples, folder, *, callbacks=(), engine_mismatch=False, **options):
    """A GRPOTrainer whose rollouts and rewards are those of `batch`."""
    config = trl.GRPOConfig(
        str(folder),
        **dict(
            per_device_train_batch_size=ROWS,
            num_generations=GENERATIONS,
            max_completion_length=LONGEST,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
        )
        | options,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=batch.reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3"] * PROMPTS}),
        processing_class=tokenizer(),
        rollout_func=batch.rollout,
        callbacks=list(callbacks),
    )
    # without vLLM itself: its weights count as synchronised, its samples come from rollout_func
    trainer.use_vllm, trainer._last_loaded_step = engine_mismatch, 0
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def scored(trainer):
    """What GRPOTrainer makes of its rollouts: advantages, masks, log-probabilities, weights."""
    trainer.model.train()
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer._generate_and_score_completions([{"prompt": "w3"}] * ROWS)


def gradient_of(loss: Tensor, model) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(ours, theirs, model, tolerance=1e-5):
    """Losses and the gradients of all parameters."""
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)
    expected, found = gradient_of(theirs, model), gradient_of(ours, model)
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


def own_weights(batch: Samples, rule: str, **options) -> Tensor:
    outcome = torch.zeros(ROWS)
    return aggregation_weights(batch.mask, IDS, outcome, rule=rule, **options)


PPO = dict(epsilon=0.1, epsilon_high=0.2)
CLIP = dict(clip_low=0.1, clip_high=0.2)
SEQUENCE = dict(importance_sampling_level="sequence", epsilon=0.02, epsilon_high=0.03)
SEQUENCE_CLIP = dict(clip_low=0.02, clip_high=0.03)
SUM = dict(max_length=1)
# TRL's options, our loss, our rule and its constant
LOSSES = {
    "grpo": (dict(loss_type="grpo", **PPO), ppo_clip, CLIP, "seq_mean", {}),
    "bnpo": (dict(loss_type="bnpo", **PPO), ppo_clip, CLIP, "token_mean", {}),
    "dr_grpo": (
        dict(loss_type="dr_grpo", **PPO),
        ppo_clip,
        CLIP,
        "seq_mean_token_sum_norm",
        dict(max_length=LONGEST),
    ),
    "dapo": (dict(loss_type="dapo", **PPO), ppo_clip, CLIP, "token_mean", {}),
    "delta": (
        dict(loss_type="grpo", delta=1.3, **PPO),
        ppo_clip,
        CLIP | dict(dual_clip=1.3),
        "seq_mean",
        {},
    ),
    # their epsilon_high is the bound itself here, ours the distance from 1
    "cispo": (
        dict(loss_type="cispo", epsilon_high=1.2),
        cispo,
        dict(clip_low=1.0, clip_high=0.2),
        "token_mean",
        {},
    ),
    "gspo": (dict(loss_type="grpo", **SEQUENCE), gspo, SEQUENCE_CLIP, "seq_mean", {}),
    "gspo, bnpo": (dict(loss_type="bnpo", **SEQUENCE), gspo, SEQUENCE_CLIP, "token_mean", {}),
    "gspo, luspo": (
        dict(loss_type="luspo", **SEQUENCE),
        gspo,
        SEQUENCE_CLIP,
        "seq_mean_token_sum_norm",
        SUM,
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, seed, tmp_path):
    """With tool tokens and a policy that has moved; the gradient is that of all parameters."""
    options, loss, clip, rule, constant = LOSSES[name]
    model = policy()
    batch = samples(seed, model)
    trainer = trainer_of(model, batch, tmp_path, **options)
    inputs = scored(trainer)
    old = torch.tensor([x + [0.0] * (LONGEST - len(x)) for x in batch.rollout_logp])
    old = inputs["old_per_token_logps"] = old[:, : batch.mask.shape[1]]
    theirs = trainer._compute_loss(model, inputs)
    advantages = inputs["advantages"][:, None].expand_as(batch.mask)
    logp = logp_of(model, batch.prompts, batch.completions)
    tokens = loss(logp, old, advantages, mask=batch.mask, **clip)
    assert_same(apply_weights(tokens, own_weights(batch, rule, **constant)), theirs, model)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, flat."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.found.append(torch.cat(grads).clone())


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_a_real_step_in_micro_batches(name, tmp_path):
    """trainer.train() over two micro-batches; our weights are taken once, over the whole batch."""
    options, loss, clip, rule, constant = LOSSES[name]
    model = policy()
    batch = samples(4, model)
    gradients = Gradients()
    trainer = trainer_of(
        model,
        batch,
        tmp_path,
        callbacks=[gradients],
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2,
        scale_rewards="none",
        **options,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    rewards = torch.tensor(batch.rewards)
    advantages = dr_grpo_advantages(rewards, IDS)[:, None].expand_as(batch.mask)
    logp = logp_of(model, batch.prompts, batch.completions)  # the learning rate is 0
    tokens = loss(logp, logp.detach(), advantages, mask=batch.mask, **clip)
    found = gradient_of(apply_weights(tokens, own_weights(batch, rule, **constant)), model)
    assert (found - gradients.found[0]).norm() <= 1e-5 * found.norm()


def test_grpo_and_dapo_differ_in_the_sample_above():
    """So that the test before this one can tell rules apart."""
    batch = samples(4, policy())
    a, b = own_weights(batch, "seq_mean"), own_weights(batch, "token_mean")
    assert (a - b).abs().max() > 1e-2


# Advantages -------------------------------------------------------------------------------------


ADVANTAGES = {
    "group": grpo_advantages,
    "batch": lambda *args, **options: grpo_advantages(*args, deviation="batch", **options),
    "none": dr_grpo_advantages,
}


@pytest.mark.parametrize("missing", [False, True], ids=["all", "lost rewards"])
@pytest.mark.parametrize("scale_rewards", ADVANTAGES)
def test_advantages(scale_rewards, missing, tmp_path):
    """At rewards of about 1000, where their epsilon of 1e-4 is below rounding."""
    model = policy()
    batch = samples(2, model, scale=1000.0)
    if missing:  # a reward function that returns None
        batch.rewards[1] = batch.rewards[6] = None
    inputs = scored(trainer_of(model, batch, tmp_path, scale_rewards=scale_rewards))
    valid = torch.tensor([x is not None for x in batch.rewards])
    rewards = torch.tensor([math.nan if x is None else x for x in batch.rewards])
    ours = ADVANTAGES[scale_rewards](rewards, IDS, valid=valid)
    torch.testing.assert_close(ours, inputs["advantages"], rtol=1e-5, atol=1e-5)


def test_leave_one_out(tmp_path):
    """RLOOTrainer on its own samples; rewards by their number, and one that is lost."""
    rewards = [1.0, -2.0, 0.5, 3.0, None, 0.25, -1.0, 2.0]
    config = trl.RLOOConfig(
        str(tmp_path),
        per_device_train_batch_size=ROWS,
        num_generations=GENERATIONS,
        max_completion_length=2,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = trl.RLOOTrainer(
        model=policy(),
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3"] * PROMPTS}),
        processing_class=tokenizer(),
    )
    valid = torch.tensor([x is not None for x in rewards])
    ours = rloo_advantages(
        torch.tensor([math.nan if x is None else x for x in rewards]), IDS, valid=valid
    )
    torch.testing.assert_close(ours, scored(trainer)["advantages"], rtol=1e-5, atol=1e-5)


def test_difference_the_epsilon_of_the_deviation(tmp_path):
    """A convention: theirs adds 1e-4, which at rewards of 1e-4 halves the advantage; ours 1e-6."""
    model = policy()
    batch = samples(2, model, scale=1e-4)
    theirs = scored(trainer_of(model, batch, tmp_path))["advantages"]
    rewards = torch.tensor(batch.rewards)
    ours = grpo_advantages(rewards, IDS)
    std = rewards.view(PROMPTS, -1).std(1)[IDS]
    torch.testing.assert_close(theirs, ours * (std + 1e-6) / (std + 1e-4), rtol=1e-3, atol=1e-5)
    assert (ours / theirs).median() > 1.5


def test_difference_equal_rewards_are_exactly_zero_for_us(tmp_path):
    """A bug: rounding of the mean over a deviation that is rounding too gives them a sign."""
    model = policy()
    batch = samples(2, model)
    batch.rewards[:] = [1000.1, 1000.1, 1000.1, None] * PROMPTS
    theirs = scored(trainer_of(model, batch, tmp_path))["advantages"]
    assert theirs.abs().max() > 0.1
    valid = torch.tensor([x is not None for x in batch.rewards])
    rewards = torch.tensor([math.nan if x is None else x for x in batch.rewards])
    assert (grpo_advantages(rewards, IDS, valid=valid) == 0).all()


# Correction of the mismatch ----------------------------------------------------------------------


MODES = {
    "token_truncate": dict(),
    "token_mask": dict(outside="zero"),
    "sequence_truncate": dict(level="sequence"),
    "sequence_mask": dict(level="sequence", outside="zero"),
}


@pytest.mark.parametrize("low", [None, 0.7], ids=["upper", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_importance_weights(mode, low, tmp_path):
    """Their ratios, and the loss and gradient that they give."""
    model = policy()
    batch = samples(3, model)
    trainer = trainer_of(
        model,
        batch,
        tmp_path,
        engine_mismatch=True,
        loss_type="dapo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.3,
        vllm_importance_sampling_clip_min=low,
    )
    inputs = scored(trainer)
    log_ratio = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    ours, _ = importance_weights(log_ratio, batch.mask, high=1.3, low=low, **MODES[mode])
    theirs = inputs["importance_sampling_ratio"]  # [B, T] or [B, 1]; 1 where masked
    torch.testing.assert_close(ours, theirs.expand_as(ours) * batch.mask, rtol=1e-5, atol=1e-6)
    outside = (ours == 0) | ((ours - 1.3).abs() < 1e-6)
    assert outside[batch.mask].any() and not outside[batch.mask].all()

    logp = logp_of(model, batch.prompts, batch.completions)
    advantages = inputs["advantages"][:, None].expand_as(batch.mask)
    old = inputs["old_per_token_logps"]
    tokens = ours * ppo_clip(logp, old, advantages, mask=batch.mask)
    loss = apply_weights(tokens, own_weights(batch, "token_mean"))
    assert_same(loss, trainer._compute_loss(model, inputs), model)


def test_off_policy_mask(tmp_path):
    """Sequences of negative advantage whose mean log-ratio is low are left out, in the total."""
    model = policy()
    batch = samples(6, model, mismatch=1.0)
    trainer = trainer_of(
        model,
        batch,
        tmp_path,
        engine_mismatch=True,
        loss_type="grpo",
        off_policy_mask_threshold=0.01,
        vllm_importance_sampling_correction=False,
    )
    inputs = scored(trainer)
    logp = logp_of(model, batch.prompts, batch.completions)
    log_ratio = logp.detach() - inputs["sampling_per_token_logps"]
    inside, _ = importance_weights(
        log_ratio,
        batch.mask,
        level="geometric",
        outside="reject",
        low=math.exp(-0.01),
        high=1e8,
    )
    keep = (inputs["advantages"] >= 0) | (inside > 0).any(1)
    assert keep.any() and not keep.all()
    advantages = inputs["advantages"][:, None].expand_as(batch.mask)
    tokens = ppo_clip(logp, logp.detach(), advantages, mask=batch.mask)
    ours = apply_weights(tokens, own_weights(batch, "seq_mean"), keep)
    assert_same(ours, trainer._compute_loss(model, inputs), model)


def test_difference_missing_engine_log_probabilities(tmp_path):
    """A convention: theirs takes a ratio of 1 where the engine gave NaN; an error for us."""
    model = policy()
    batch = samples(3, model)
    batch.rollout_logp[0][0] = None
    inputs = scored(trainer_of(model, batch, tmp_path, engine_mismatch=True))
    assert inputs["importance_sampling_ratio"][0].isfinite().all()
    log_ratio = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    with pytest.raises(ValueError, match=r"expected finite log_ratio .* at \(0, 0\)"):
        importance_weights(log_ratio, batch.mask)


def test_difference_a_ratio_is_not_clamped(tmp_path):
    """A bug: exp without a clamp; a ratio of inf with a negative advantage is a loss of inf."""
    model = policy()
    batch = samples(3, model)
    trainer = trainer_of(model, batch, tmp_path, loss_type="dapo", scale_rewards="none")
    inputs = scored(trainer)
    inputs["advantages"] = -torch.ones(ROWS)
    logp = logp_of(model, batch.prompts, batch.completions)
    old = inputs["old_per_token_logps"] = torch.where(batch.mask, logp.detach() - 100, 0.0)
    assert trainer._compute_loss(model, inputs).isinf()
    advantages = inputs["advantages"][:, None].expand_as(batch.mask)
    tokens = ppo_clip(logp, old, advantages, mask=batch.mask)
    loss = apply_weights(tokens, own_weights(batch, "token_mean"))
    assert loss.isfinite() and gradient_of(loss, model).isfinite().all()
