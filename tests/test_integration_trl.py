"""SharedPrefixGRPOTrainer against GRPOTrainer, on real runs of a tiny Llama."""

import contextlib
import io
import logging
import math

import datasets
import pytest
import torch
import trl
from peft import LoraConfig
from tiny_models import VOCAB, causal_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trimtab.integrations.trl import SharedPrefixGRPOTrainer as Shared

CHARACTERS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +=-*/()[]{}.,;:!?"]
NAMES = ("grad_norm", "loss", "entropy", "kl", "reward", "clip_ratio/region_mean")


def tokenizer():
    assert len(CHARACTERS) <= VOCAB
    ids = {c: i for i, c in enumerate(CHARACTERS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model_of(**changes):
    return causal_lm("llama_gqa", pad_token_id=0, eos_token_id=1, **changes)


def reward(completions, **_):
    return [text.count("a") + 0.1 * len(text) for text in completions]


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, flat; None counts as zero."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        self.found.append(torch.cat([g.flatten() for g in grads]).clone())


def train(kind, folder, *, steps=1, model=None, prompts=None, options=None, peft=None, **args):
    """(trainer, gradient of each step, log of each step); 8 rows of 2 prompts a step."""
    prompts = (
        [f"what is {i} plus {10 * i}? think: " for i in range(8)] if prompts is None else prompts
    )
    config = trl.GRPOConfig(
        str(folder),
        max_steps=steps,
        **dict(
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=10,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        | args,
    )
    gradients = Gradients()
    extra = {} if kind is trl.GRPOTrainer else {"shared_prefix": options or {}}
    trainer = kind(
        model=model_of() if model is None else model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        callbacks=[gradients],
        peft_config=peft,
        **extra,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    return trainer, gradients.found, logs


def both(folder, **options):
    """Runs of GRPOTrainer and of ours, from the same model with the same samples."""
    shared = options.pop("options", {})
    make = options.pop("make", model_of)
    stock = train(trl.GRPOTrainer, folder, model=make(), **options)
    ours = train(Shared, folder, model=make(), options=shared, **options)
    return stock, ours


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_same(stock, ours, tolerance=1e-5):
    (_, theirs, expected), (_, gradients, logs) = stock, ours
    assert theirs[0].norm() > 0
    assert relative(gradients[0], theirs[0]) < tolerance
    for name in NAMES:
        assert (name in logs[0]) == (name in expected[0])
        if name in logs[0]:
            found, wanted = float(logs[0][name]), float(expected[0][name])
            assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), name
    times = {n for n in logs[0] if n.startswith("prefix/")}
    assert logs[0].keys() - times == expected[0].keys()
    assert logs[0]["prefix/shared"] == 1


CASES = {
    "default": {},
    "keep": dict(options={"prefix_memory": "keep"}, gradient_checkpointing=False),
    "waves": dict(options={"wave_tokens": 15, "head": "fused"}, gradient_checkpointing=False),
    "reentrant": dict(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "temperature": dict(temperature=0.7, entropy_coef=0.1, top_entropy_quantile=0.5),
    "accumulation": dict(gradient_accumulation_steps=2, loss_type="grpo"),
    "old": dict(steps_per_generation=2, num_iterations=2, loss_type="bnpo"),
    "truncated": dict(mask_truncated_completions=True, max_completion_length=40),
    "fp32 head": dict(cast_lm_head_to_fp32=True),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_logs_are_those_of_grpo_trainer(name, tmp_path):
    case = dict(CASES[name])
    options = {"min_bound": 0, "verify": "always"} | case.pop("options", {})
    assert_same(*both(tmp_path, options=options, **case))


def test_three_steps_stay_together(tmp_path):
    stock, ours = both(tmp_path, steps=3, options={"min_bound": 0})
    assert len(ours[1]) == 3 and len(ours[2]) == 3
    for theirs, mine in zip(stock[1], ours[1], strict=True):
        assert relative(mine, theirs) < 1e-3


def test_reference_model(tmp_path):
    """beta: the reference's log-probabilities are shared, too; it is loaded from a folder."""
    model_of().save_pretrained(tmp_path / "model")

    def make():
        model = model_of()
        model.config._name_or_path = str(tmp_path / "model")
        return model

    stock, ours = both(
        tmp_path, make=make, steps=2, beta=0.5, num_iterations=2, options={"min_bound": 0}
    )
    assert_same(stock, ours)
    assert len(ours[0]._steps) == 2
    assert relative(ours[1][1], stock[1][1]) < 1e-3  # the second step: the policy has moved


def test_adapter_and_its_reference(tmp_path):
    def run(kind, **options):
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return train(kind, tmp_path, peft=lora, beta=0.5, **options)

    stock = run(trl.GRPOTrainer)
    ours = run(Shared, options={"min_bound": 0})
    assert_same(stock, ours, tolerance=5e-5)  # the adapter is far from its reference: large k3
    assert float(ours[2][0]["kl"]) > 0


def test_mixed_precision(tmp_path):
    stock, ours = both(tmp_path, bf16=True, options={"min_bound": 0})
    assert relative(ours[1][0], stock[1][0]) < 5e-2


def test_a_prompt_goes_forward_three_times_an_update(tmp_path):
    """Without a graph, phase A and phase C; and not once a row."""
    lengths = []
    model = model_of()
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: (
            lengths.append(kwargs["input_ids"].shape[1])
            if kwargs.get("use_cache") is False
            else None
        ),
        with_kwargs=True,
    )
    prompts = ["a" * 60, "b" * 50] * 4
    options = {"min_bound": 0, "verify": "never", "wave_tokens": 1000}
    _, _, (log,) = train(
        Shared, tmp_path, model=model, prompts=prompts, options=options,
        gradient_checkpointing=False, shuffle_dataset=False,
    )  # fmt: skip
    waves = [n for n in lengths if n not in (59, 49)]
    assert sorted(set(lengths) - set(waves)) == [49, 59]
    assert lengths.count(59) == lengths.count(49) == 3
    assert len(waves) == 4 and max(waves) <= 4 * 10  # of each prompt: one, forward twice
    assert log["prefix/bound"] > 1.2 and log["prefix/shared"] == 1


def test_a_batch_that_gains_nothing_runs_as_in_grpo_trainer(tmp_path, caplog):
    """One row of each prompt: the update's microbatches are shuffled rows."""
    short = dict(prompts=["a", "b", "c", "d"] * 2, max_completion_length=30, steps=2)
    with caplog.at_level(logging.WARNING, logger="trimtab.integrations.trl_prefix"):
        stock, ours = both(tmp_path, **short)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], stock[1], strict=True))
    said = [r for r in caplog.records if "run as in GRPOTrainer" in r.getMessage()]
    assert len(said) == 1 and ours[2][0]["prefix/bound"] == 1


def test_evaluation_shares_prompts(tmp_path):
    trainer, _, _ = train(Shared, tmp_path, options={"min_bound": 0})
    trainer._steps[trainer.model].metrics()
    prompts = datasets.Dataset.from_dict({"prompt": ["what is 1 plus 2? think: "] * 2})
    with contextlib.redirect_stdout(io.StringIO()):
        found = trainer.evaluate(prompts)
    assert found["eval_prefix/shared"] == 1 and math.isfinite(found["eval_loss"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(use_liger_kernel=True), r"use_liger_kernel=False"),
        (dict(torch_compile=True), r"torch_compile=False"),
        (dict(cast_lm_head_to_fp32=True, bf16=True), r"cast_lm_head_to_fp32=False"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        train(Shared, tmp_path, **changes)


def test_options_and_inputs_that_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"shared_prefix: expected some of .*'temperature'"):
        train(Shared, tmp_path, options={"temperature": 1.0})
    trainer, _, _ = train(Shared, tmp_path)
    ids = torch.ones(2, 8, dtype=torch.long)
    call = trainer._get_per_token_logps_and_entropies
    with pytest.raises(ValueError, match="expected text and no loss of the routers, got pixel_va"):
        call(trainer.model, ids, ids, 4, pixel_values=ids)
    with pytest.raises(ValueError, match="row 1 has a gap"):
        call(trainer.model, ids, torch.tensor([[1] * 8, [1, 0, *[1] * 6]]), 4)
    dropout = model_of(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        train(Shared, tmp_path, model=dropout)


def test_verification_reaches_the_user(tmp_path):
    """A model whose layers see how many tokens there are: its shared gradient is another."""
    model = model_of()
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda _module, _args, out: out * (1 + out.shape[1] / 10))
    with pytest.raises(RuntimeError, match="verify: the group's gradient"):
        train(Shared, tmp_path, model=model, options={"min_bound": 0})


# Edits to integrations/trl_prefix.py that must turn this file red:
#   1. _Statistics.backward: without ctx.batch.backward
#   2. _Batch.statistics: rows in the order of the groups
#   3. _Batch.backward: no grad_entropy
#   4. SharedPrefix without temperature
#   5. _get_per_token_logps_and_entropies: takes the groups' path always
