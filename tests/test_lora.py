"""Adapters on the policy: the engine's merged weights, checkpoints without the base, each route."""

import dataclasses
import json

import pytest
import tiny_run
import torch
from completion_server import CompletionServer, serving
from loop_cases import KeepGradient, Letters, config_of, train
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from test_ddp import TWO, two_ranks
from tiny_run import METHODS, metrics_of, run_here, write_recipe
from transformers import AutoModelForCausalLM
from workers import gradients_of

from trimtab.rl import (
    LoraConfig,
    PolicyConfig,
    PrefixConfig,
    PruningConfig,
    ReferenceConfig,
    Request,
    RevalConfig,
    RLConfig,
    Sampling,
    UpdateConfig,
)
from trimtab.rl.lora import (
    add_adapters,
    base_view,
    copy_of_trained,
    fingerprint,
    has_adapters,
    is_adapter,
    merged_parameters,
    save_adapter,
)
from trimtab.rl.ranks import refuse_strategy
from trimtab.rl.sharding import full_parameters

LORA = LoraConfig(r=4, alpha=8)
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_run.make_policy(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder, **options):
    """A policy whose adapters have been trained, as far as it can be told from outside."""
    policy = loaded(folder)
    add_adapters(policy, dataclasses.replace(LORA, **options), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2, generator=generator)
    return policy


def with_lora(folder, rollout=None, lora=LORA, **update):
    config = config_of(Letters(), folder, rollout, **update)
    return dataclasses.replace(config, policy=PolicyConfig(path=str(folder), lora=lora))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


# ------------------------------------------------------------------ adapters and what is merged


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(folder):
    policy = loaded(folder)
    before = logits_of(policy)
    add_adapters(policy, LORA, seed=0)
    assert logits_of(policy).equal(before)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if is_adapter(name)}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    again = loaded(folder)
    add_adapters(again, LORA, seed=0)
    assert all(p.equal(q) for p, q in zip(policy.parameters(), again.parameters()))


def test_merged_weights_have_the_names_of_the_base_and_compute_the_same(folder):
    policy, base = adapted(folder), loaded(folder)
    kept = {name: p.clone() for name, p in policy.named_parameters()}
    merged = dict(merged_parameters(policy))
    assert {n: t.shape for n, t in merged.items()} == {
        n: p.shape for n, p in base.named_parameters()
    }
    assert all(kept[name].equal(p) for name, p in policy.named_parameters())
    changed = {name for name, p in base.named_parameters() if not merged[name].equal(p)}
    assert len(changed) == 14 and all("_proj.weight" in name for name in changed)
    base.load_state_dict(merged, strict=False)
    base.tie_weights()
    expected = logits_of(policy)
    assert (expected - logits_of(loaded(folder))).abs().max() > 0.1, "the adapters must matter"
    torch.testing.assert_close(logits_of(base), expected, rtol=1e-5, atol=1e-6)


def test_the_merge_is_in_fp32_under_a_half_precision_autocast(folder):
    policy = adapted(folder)
    expected = dict(merged_parameters(policy))
    with torch.autocast("cpu", torch.bfloat16):
        found = dict(full_parameters(policy))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    half = policy.bfloat16()
    assert dict(merged_parameters(half))["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_a_view_shares_the_base_and_a_copy_has_its_own_adapters(folder):
    policy = adapted(folder)
    view, copied = base_view(policy), copy_of_trained(policy)
    assert not has_adapters(view) and has_adapters(policy)
    assert logits_of(view).equal(logits_of(loaded(folder)))
    frozen = {p.data_ptr() for n, p in policy.named_parameters() if not is_adapter(n)}
    assert {p.data_ptr() for p in view.parameters()} == frozen
    for (name, mine), (_, own) in zip(copied.named_parameters(), policy.named_parameters()):
        assert (mine is own) == (not is_adapter(name))
        assert mine.equal(own)


def test_the_adapters_file_is_one_that_peft_loads(folder, tmp_path):
    from peft import PeftModel

    for targets in (None, ("q_proj", "down_proj")):
        policy = adapted(folder, target_modules=targets)
        target = tmp_path / str(targets)
        save_adapter(policy, dataclasses.replace(LORA, target_modules=targets), target)
        model = PeftModel.from_pretrained(loaded(folder), target)
        torch.testing.assert_close(logits_of(model), logits_of(policy), rtol=0, atol=0)
        config = json.loads((target / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder)


# ------------------------------------------------------------------ the loop

OPTIONS = {
    "packed-adam_mini": {},
    "dense-adamw": {"route": "dense", "optimizer": "adamw"},
    "three_phase": {"route": "three_phase", "prefix": PrefixConfig(min_bound=0, wave_tokens=20)},
    "three_phase-fused": {
        "route": "three_phase",
        "prefix": PrefixConfig(min_bound=0, verify="always"),
        "head": "fused",
    },
    "fused-pruned": {"head": "fused", "pruning": PruningConfig(0.01)},
    "two-epochs-micro": {"loss": "ppo_clip", "epochs": 2, "micro_prompts": 1},
    "kl": {"reference": ReferenceConfig(kl=0.5)},
    "reval": {
        "loss": "reval",
        "reval": RevalConfig(beta=0.5),
        "reference": ReferenceConfig(reset_every=2),
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_the_adapters_alone(option, folder):
    module, rows = train(with_lora(folder, **OPTIONS[option]), folder)
    start = loaded(folder)
    assert (
        dict(base_view(module.policy).named_parameters()).keys()
        == dict(start.named_parameters()).keys()
    )
    for name, parameter in base_view(module.policy).named_parameters():
        assert parameter.equal(start.get_parameter(name)), name
    for name, parameter in module.policy.named_parameters():
        if ".lora_B." in name:
            assert parameter.abs().max() > 0, name
    assert module.skipped_updates == 0 and module.updates_done == 3
    assert all(map(torch.isfinite, torch.tensor([row["loss"] for row in rows])))


def test_log_probs_of_the_engine_are_those_of_the_trainer(folder):
    lora = dataclasses.replace(LORA, alpha=64)
    module, rows = train(with_lora(folder, lora=lora, lr=3e-2, optimizer="adamw"), folder)
    assert max(row["mismatch/abs_dlogp_max"] for row in rows) < 2e-5
    module.engine.update_weights(full_parameters(module.policy), version=9)
    [[sample]] = module.engine.generate([Request([3, 4, 5], Sampling(max_tokens=12, seed=1))])
    ids = torch.tensor([[3, 4, 5, *sample.token_ids]])
    with torch.no_grad():
        logp = module.policy(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
        base = base_view(module.policy)(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
    chosen = torch.tensor(sample.token_ids)[:, None]
    assert (logp - base).abs().max() > 0.05, "the adapters must matter"
    found = torch.tensor(sample.logprobs)
    torch.testing.assert_close(found, logp.gather(1, chosen)[:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("targets", [None, ("o_proj",), ("gate_proj", "v_proj")])
def test_three_phases_take_the_gradient_of_the_packed_row(folder, targets):
    found = {}
    lora = dataclasses.replace(LORA, target_modules=targets)
    for route in ("packed", "three_phase", "dense"):
        options = dict(route=route, clip_norm=0.0, prefix=PrefixConfig(min_bound=0, wave_tokens=8))
        config = dataclasses.replace(with_lora(folder, lora=lora, **options), updates=1)
        keep = KeepTrained()
        train(config, folder, [keep])
        found[route] = keep.grad
    for route in ("three_phase", "dense"):
        error = (found["packed"] - found[route]).norm() / found["packed"].norm()
        assert error < 5e-6 and found["packed"].norm() > 0, route


class KeepTrained(KeepGradient):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        trained = [p for p in module.policy.parameters() if p.requires_grad]
        self.grad = torch.cat([p.grad.flatten() for p in trained])


def test_the_reference_is_the_base_until_it_is_reset(folder):
    config = with_lora(folder, reference=ReferenceConfig(kl=0.5))
    module, rows = train(config, folder)
    assert logits_of(module.reference).equal(logits_of(loaded(folder)))
    assert rows[0]["reference/k3"] == pytest.approx(0, abs=1e-9) and rows[2]["reference/k3"] > 0
    options = OPTIONS["reval"]
    module, _ = train(dataclasses.replace(with_lora(folder, **options), updates=2), folder)
    assert logits_of(module.reference).equal(logits_of(module.policy))
    assert not logits_of(module.policy).equal(logits_of(loaded(folder)))


# ------------------------------------------------------------------ runs


LORA_RUN = ["--policy.lora={r: 4, alpha: 8}"]


def test_a_run_resumes_exactly_and_leaves_policy_and_adapter(tmp_path):
    from peft import PeftModel

    recipe = write_recipe(tmp_path)
    base = ["--config", recipe, *LORA_RUN, *METHODS["reval"], "--update.pruning=null"]
    base += ["--update.trust_region=null", "--updates=8", "--rollout.dtype=float32"]
    run_here([*base, "--run_dir", "whole"], tmp_path)
    run_here([*base, "--run_dir", "parts", "--trainer.max_steps", "9"], tmp_path)
    run_here(["--resume", "parts"], tmp_path)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    whole, parts = (
        load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(whole[n].equal(parts[n]) for n in whole)

    checkpoint = tmp_path / "whole" / "checkpoints" / "update=000008.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert all(is_adapter(name) for name in stored["state_dict"])
    assert stored["trimtab"]["base"]["sha256"] == fingerprint(loaded(tmp_path / "tiny-policy"))
    sizes = {name.partition(".")[0] for name in stored["state_dict"]}
    assert sizes == {"policy", "reference"}, "the reference was reset, so it is no more the base"

    merged = loaded(tmp_path / "whole" / "policy")
    assert not has_adapters(merged)
    adapter = PeftModel.from_pretrained(
        loaded(tmp_path / "tiny-policy"), tmp_path / "whole" / "adapter"
    )
    assert (logits_of(merged) - logits_of(loaded(tmp_path / "tiny-policy"))).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(adapter), logits_of(merged), rtol=1e-5, atol=1e-6)


def test_a_changed_base_is_refused(tmp_path, capsys):
    recipe = write_recipe(tmp_path, {"updates": 4})
    run_here(
        ["--config", recipe, *LORA_RUN, "--run_dir", "run", "--trainer.max_steps", "2"], tmp_path
    )
    run_here(["eval", "run", "--problems", "2", "--samples", "1"], tmp_path)
    base = loaded(tmp_path / "tiny-policy")
    with torch.no_grad():
        base.model.norm.weight[3] += 1e-3
    base.save_pretrained(tmp_path / "tiny-policy")
    for command in (["--resume", "run"], ["eval", "run", "--problems", "2", "--samples", "1"]):
        with pytest.raises(SystemExit) as ended:
            run_here(command, tmp_path)
        assert ended.value.code == 2
        assert "expected the base that the checkpoint's adapters" in capsys.readouterr().err


def test_evaluation_of_a_checkpoint_is_that_of_the_policy(tmp_path):
    recipe = write_recipe(tmp_path, {"updates": 4, "update.lr": 3e-2})
    run_here(["--config", recipe, *LORA_RUN, "--run_dir", "run"], tmp_path)
    found = []
    for extra in ([], ["--checkpoint", "run/checkpoints/update=000004.ckpt"]):
        run_here(["eval", "run", "--problems", "6", "--samples", "4", *extra], tmp_path)
        written = sorted((tmp_path / "run").glob("eval-*.json"), key=lambda p: p.stat().st_mtime_ns)
        found.append(json.loads(written[-1].read_text())["results"])
    assert found[0] == found[1]


def test_two_processes_take_the_gradient_of_one(tmp_path):
    changes = {"rollout.dtype": "float32", "update.clip_norm": 0.0, "updates": 3}
    changes |= {"evaluation.problems": 2, "record.checkpoint_every": 2, "update.pruning": None}
    changes |= {"trainer.callbacks": [{"class_path": "workers.SaveGradients"}]}
    recipe = write_recipe(tmp_path, changes)
    base = ["--config", str(recipe), *LORA_RUN, "--update.trust_region=null"]
    base += ["--update.reference={kl: 0.1}", "--run_dir"]
    run_here([*base, "one"], tmp_path)
    stopped = [*base, "two", *TWO, "ddp", "--trainer.max_steps=2"]
    two_ranks(tmp_path, [stopped, ["--resume", "two", *TWO, "ddp"]])
    for update in range(3):
        (one,), two = (gradients_of(tmp_path / name, update) for name in ("one", "two"))
        assert len(two) == 2 and torch.equal(*two), "ranks disagree"
        assert one.norm() > 0 and (two[0] - one).norm() / one.norm() < 1e-5
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for name in ("reward", "length", "loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name
    policies = [
        load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two")
    ]
    for name, weight in policies[0].items():
        torch.testing.assert_close(policies[1][name], weight, rtol=1e-4, atol=1e-6)


def test_servers_get_merged_weights(tmp_path):
    changes = {"updates": 2, "rollout.dtype": "float32", "evaluation.problems": 2}
    recipe = write_recipe(tmp_path, changes | {"update.lr": 3e-2})
    base = ["--config", recipe, *LORA_RUN, "--run_dir"]
    run_here([*base, "here"], tmp_path)
    with serving(CompletionServer(loaded(tmp_path / "tiny-policy"))) as server:
        run_here([*base, "served", f"--rollout.servers=[{server.url}]"], tmp_path)
        assert server.asked.count("/collective_rpc") == 4
    rows = [metrics_of(tmp_path / name) for name in ("here", "served")]
    for here, served in zip(*rows, strict=True):
        for name in ("reward", "length", "loss", "grad_norm"):
            assert served[name] == pytest.approx(here[name], rel=1e-3, abs=1e-6), name
        assert served["mismatch/abs_dlogp_max"] < 1e-4


def test_going_back_after_a_bad_update_restores_the_adapters(tmp_path):
    changes = {"updates": 5, "record.checkpoint_every": 1, "evaluation.problems": 0}
    changes |= {
        "trainer.callbacks": [
            {"class_path": "workers.PoisonSomeGradients", "init_args": {"updates": [2]}}
        ]
    }
    recipe = write_recipe(tmp_path, changes)
    command = ["--config", recipe, *LORA_RUN, "--run_dir", "run"]
    run_here([*command, "--health.nonfinite=rollback"], tmp_path)
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["health/rollbacks"] == 1
    policy = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in policy.values())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, r"policy.lora.r: expected a rank >= 1, got 0"),
        ({"alpha": 0.0}, r"policy.lora.alpha: expected a number > 0, got 0.0"),
        ({"dropout": 0.1}, r"policy.lora.dropout: expected 0, so that .*, got 0.1"),
        ({"target_modules": ()}, r"policy.lora.target_modules: .* got none"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    "targets, message",
    [
        (("nothing",), "expected names of the policy's linear layers, got"),
        (("lm_head",), "expected layers below the output head, got lm_head"),
        (("embed_tokens",), "expected linear layers, model.embed_tokens is a Embedding"),
    ],
)
def test_layers_that_cannot_be_merged_exactly_are_refused(folder, targets, message):
    with pytest.raises(ValueError, match=f"policy.lora.target_modules: {message}"):
        add_adapters(loaded(folder), LoraConfig(target_modules=targets), seed=0)


def test_fsdp2_and_a_teacher_with_adapters_are_refused(folder):
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    with pytest.raises(ValueError, match=r"policy.lora: expected null under FSDP2.*; use ddp"):
        refuse_strategy(strategy, UpdateConfig(), LORA)
    policy = PolicyConfig(path=str(folder), lora=LORA)
    with pytest.raises(ValueError, match=r"teacher.lora: expected null"):
        RLConfig(Letters(), policy, policy, update=UpdateConfig(loss="imitation"))


def test_without_peft_one_line_says_what_to_install(folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "peft" else found(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ValueError, match=r"peft is not installed; pip install 'trimtab\[lora\]'"):
        add_adapters(loaded(folder), LORA, seed=0)


# Edits that must turn this file red:
# * lora._merged_weight: no autocast(enabled=False) around the product
# * lora.merged_parameters: yield the base's weight without the delta
# * lora.copy_of_trained: share the adapters too
# * loop.on_save_checkpoint: store the whole state
# * loop.refuse_base: nothing
# * loop._reset_reference: nothing
