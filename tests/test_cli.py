import dataclasses
import json
import re
import shutil
import subprocess
import sys
import typing

import pytest
import torch
import yaml
from tiny_run import write_recipe

from trimtab.rl import RLConfig
from trimtab.rl.cli import RECIPES, main, make_parser, parse

RECIPE = ["--config", "chain_sum_cpu"]
TASK = {"class_path": "trimtab.rl.ChainSumTask", "init_args": {"shots": 1}}
TINY = {
    "task": TASK,
    "policy": {
        "warmup": {"hidden_size": 16, "heads": 2, "layers": 1, "ffn": 16}
        | {"reasoning_steps": 1, "mixture_steps": 1, "batch_documents": 1}
    },
    "rollout": {"prompts": 2, "group_size": 2, "max_tokens": 4},
    "evaluation": {"problems": 0},
    "updates": 1,
    "run_dir": "run",
    "threads": 1,
    "trainer": {"accelerator": "cpu", "devices": 1},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def refusal(here, capfd):
    """refusal(arguments) -> the one line; nothing may have been written but what stood there."""

    def refused(*arguments):
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert left.value.code == 2 and out == ""
        (line,) = err.splitlines()
        assert line.startswith("trimtab-rl: error: ") and "Traceback" not in line
        assert len(line) < 400, f"unreadable: {line}"
        assert {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()} == before
        return line.removeprefix("trimtab-rl: error: ")

    return refused


def written(here, name="recipe.yaml", **changes):
    """A recipe of TINY with changes; `a__b=1` sets a.b."""
    config = json.loads(json.dumps(TINY))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    (here / name).write_text(yaml.safe_dump(config))
    return ["--config", name]


def did_you_mean(key, near):
    return f"unknown configuration key '{key}'; did you mean '{near}'?"


UNKNOWN = [
    ("updats", "updates", 1),
    ("update.lrr", "update.lr", 1),
    ("update.group_size", "rollout.group_size", 1),  # right name, wrong place
    ("lr", "update.lr", 1),
    ("rollout.temprature", "rollout.temperature", 1),
    ("update.token_baseline.leave_on_out", "update.token_baseline.leave_one_out", True),
    ("update.pruning.rh", "update.pruning.rho", 0.1),  # inside an optional part
    ("policy.warmup.hiden_size", "policy.warmup.hidden_size", 16),
    ("policy.warmup.styles.workd", "policy.warmup.styles.worked", 0.1),
    ("task.init_args.min_term", "task.init_args.min_terms", 2),
    ("task.init_args.styles.workd", "task.init_args.styles.worked", 0.1),
    ("trainer.devces", "trainer.devices", 1),
    ("rolout.prompts", "rollout.prompts", 2),
]


@pytest.mark.parametrize(("key", "near", "value"), UNKNOWN, ids=[key for key, _, _ in UNKNOWN])
def test_unknown_key_names_the_nearest(refusal, here, key, near, value):
    assert refusal(*RECIPE, f"--{key}", str(value)) == did_you_mean(key, near)
    assert refusal(*RECIPE, f"--{key}={value}") == did_you_mean(key, near)
    in_file = written(here, **{key.replace(".", "__"): value})
    assert refusal(*in_file) == did_you_mean(key, near)


def test_unknown_key_without_a_near_one_lists_the_valid(refusal):
    line = refusal(*RECIPE, "--zzzzqq", "1")
    assert (
        line.startswith("unknown configuration key 'zzzzqq'; valid there: ") and "rollout" in line
    )


VALUES = [
    ("updates", "many", "updates: expected int, got 'many'"),
    ("updates", 0, "updates: expected a count >= 1, got 0"),
    ("update.lr", "fast", "update.lr: expected float, got 'fast'"),
    ("rollout.servers", "http://a:8", "rollout.servers: expected a list in brackets, got 'http"),
    ("update.lr", -1, "update.lr: expected a rate >= 0, got -1.0"),
    (
        "update.loss",
        "ration",
        "update.loss: expected 'ratio', 'ppo_clip', 'reinforce', 'gspo', 'cispo', 'dppo_tv', "
        "'dppo_kl', 'reval', 'imitation', got 'ration'",
    ),
    ("rollout.temperature", 0, "rollout.temperature: expected a finite number > 0, got 0.0"),
    ("rollout.quantize_bits", 5, "rollout.quantize_bits: expected 4, 8 or null, got '5'"),
    ("update.pruning", 5, "update.pruning: expected PruningConfig or null, got '5'"),
    ("update.pruning.rho", "x", "update.pruning.rho: expected float, got 'x'"),
    ("update.pruning.rho", 2, "pruning.rho: expected a ratio in (0, 1), got 2.0"),
    ("task.init_args.min_terms", "x", "task.init_args.min_terms: expected int, got 'x'"),
    ("task.init_args.min_terms", 9, "params: chain_sum refuses"),
    ("task.init_args.shots", -1, "shots: expected a count >= 0, got -1"),
    ("policy.warmup.heads", 3, "heads: expected hidden_size / heads to be even"),
    ("trainer.precision", 12, "trainer.precision: expected 64, 32, 16, "),
    ("trainer.devices", 0, "trainer: "),
    ("trainer.strategy", "dpp", "trainer: You selected an invalid strategy name"),
    ("trainer.max_time", "x", "trainer: "),
    ("rollout.reward_timeout", 0, "rollout.reward_timeout: expected seconds > 0, got 0.0"),
]


@pytest.mark.parametrize(("key", "value", "line"), VALUES, ids=[f"{k}={v}" for k, v, _ in VALUES])
def test_wrong_value(refusal, here, key, value, line):
    for arguments in (
        [*written(here), f"--{key}={value}"],
        written(here, **{key.replace(".", "__"): value}),
    ):
        assert refusal(*arguments).replace("got 5", "got '5'").startswith(line)


def test_recipe_that_cannot_be_read(refusal, here):
    assert refusal().startswith("--config: expected a recipe, a file or a packaged one (chain_sum")
    assert refusal("--config", "nowhere.yaml").startswith(
        "--config: no file and no packaged recipe 'nowhere.yaml'"
    )
    assert "--config" in refusal("--config")
    for text, line in (
        (b"", "r.yaml: expected configuration keys, got None"),
        (b"- a\n", "r.yaml: expected configuration keys, got ['a']"),
        (b"updates: 3\ntask: [\n", "r.yaml:3: not YAML: "),
        (b"a: b: c\n", "r.yaml:1: not YAML: "),
        (b"a: \xff\xfe\n", "r.yaml: not UTF-8 text"),
    ):
        (here / "r.yaml").write_bytes(text)
        assert refusal("--config", "r.yaml").startswith(line)
        assert refusal("--config=r.yaml").startswith(line)
    assert refusal(*RECIPE, "stray") == "unrecognized arguments: stray"
    (here / "r.yaml").write_text("policy: {warmup: {}}\n")
    assert "task" in refusal("--config", "r.yaml")
    assert refusal(*written(here, resume="runs/x")).startswith(
        "resume: expected on the command line"
    )


def test_task_that_cannot_be_made(refusal, here):
    gym = "trimtab.rl.ReasoningGymTask"
    task = {"class_path": gym, "init_args": {"name": "chainsum"}}
    assert "got 'chainsum'; nearest: chain_sum" in refusal(*written(here, task=task))
    task = {"class_path": "trimtab.rl.NoTask"}
    assert (
        refusal(*written(here, task=task)) == "task: module 'trimtab.rl' has no attribute 'NoTask'"
    )
    task = {"class_path": "json.JSONDecoder"}
    assert refusal(*written(here, task=task)).startswith("task: ")


def test_data_files(refusal, here):
    def recipe(path="data.jsonl", reward="reward_functions:length"):
        init = {"path": path, "reward": reward}
        return written(here, task={"class_path": "trimtab.rl.JsonLinesTask", "init_args": init})

    data = here / "data.jsonl"
    assert refusal(*recipe()) == "path: expected a JSON-lines file, data.jsonl does not exist"
    for text, line in (
        ("", "path: data.jsonl holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": \n', "data.jsonl:2: not JSON: "),
        ('{"prompt": "a"}\n\n{"promt": "a"}\n', "data.jsonl:3: expected a non-empty string"),
    ):
        data.write_text(text)
        assert refusal(*recipe()).startswith(line)
    data.write_text('{"prompt": "a"}\n')
    for reward, line in (
        ("nowhere:f", "reward: cannot import 'nowhere:f': ModuleNotFoundError: "),
        ("reward_functions:no", "reward: cannot import 'reward_functions:no': AttributeError: "),
        (
            "reward_broken:f",
            "reward: cannot import 'reward_broken:f': RuntimeError: this module is",
        ),
        ("reward_functions.length", "reward: expected package.module:function, got"),
    ):
        assert refusal(*recipe(reward=reward)).startswith(line)
    # this task has no documents to warm a policy up on
    assert refusal(*recipe()).startswith("policy.warmup: JsonLinesTask has no documents")


def test_policy(refusal, here):
    both = "policy: expected exactly one of path and warmup, got "
    assert refusal(*written(here, policy={})) == f"{both}neither"
    assert refusal(*written(here, policy__path="x")) == f"{both}['path', 'warmup']"
    policy = {"path": "nowhere"}
    assert refusal(*written(here, policy=policy)).startswith(
        "policy.path: nowhere is no model folder"
    )
    (here / "nowhere").mkdir()
    for text in ("{}", "not JSON", '{"model_type": "no such"}', '{"model_type": "llama"}'):
        (here / "nowhere" / "config.json").write_text(text)
        assert refusal(*written(here, policy=policy)).startswith(
            "policy.path: cannot load nowhere: "
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_cuda_on_a_machine_without(refusal, here, accelerator):
    line = f"trainer.accelerator: expected cpu, got '{accelerator}': no usable CUDA device here"
    assert refusal(*RECIPE, "--trainer.accelerator", accelerator) == line
    assert refusal(*written(here, trainer__accelerator=accelerator)) == line


def test_devices_and_strategies(refusal):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    line = "rollout.prompts: expected a multiple of the 2 processes, got 7"
    assert refusal(*RECIPE, *two, "--rollout.prompts=7") == line
    assert refusal(*RECIPE, *two[:1], "--trainer.strategy=fsdp").startswith("trainer: ")


def test_run_dir_that_is_taken(refusal, here):
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text("{}\n")
    line = "run_dir: run already holds files; continue that run with --resume run, or name another"
    assert refusal(*written(here)).startswith(line)
    (here / "file").write_text("")
    assert refusal(*written(here), "--run_dir=file").startswith("run_dir: file already holds files")


def resolved(*arguments):
    return parse(make_parser(), list(arguments))[3]


def test_resume(refusal, here):
    assert (
        refusal("--resume", "nowhere")
        == "--resume: nowhere is no run folder (no config.yaml in it)"
    )
    assert refusal("--resume") == "--resume: expected a run folder, got none"
    run = here / "run"
    run.mkdir()
    assert refusal(*written(here), "--resume=run").startswith("--resume: run is no run folder")
    (run / "config.yaml").write_text(resolved(*written(here)))
    for key, old, new in (
        ("update.lr", 0.0001, 0.5),
        ("rollout.prompts", 2, 4),
        ("task.init_args.shots", 1, 2),
        ("policy.warmup.hidden_size", 16, 32),
        ("trainer.devices", 1, 2),
        ("seed", 0, 1),
    ):
        line = refusal("--resume", "run", f"--{key}={new}").replace(f"'{new}'", f"{new}")
        assert line.startswith(f"--resume: {key} was {old!r} in that run, got {new!r}; "), line
    line = refusal("--resume", "run", "--update.pruning.rho=0.1")
    assert line.startswith("--resume: update.pruning") and "was" in line and "got" in line
    (run / "config.yaml").write_text("update: [\n")
    assert re.search(r"run/config\.yaml:\d: not YAML", refusal("--resume", "run"))


def test_what_may_change_on_resume(here):
    run = here / "run"
    run.mkdir()
    (run / "config.yaml").write_text(resolved(*written(here)))
    free = [
        "--trainer.devices=1",
        "--updates=9",
        "--record.transcripts=1",
        "--trainer.max_time=00:01:00:00",
    ]
    config, trainer, resume, _ = parse(make_parser(), ["--resume", "run", *free])
    assert (config.updates, config.record.transcripts, resume) == (9, 1, str(run))
    assert config.rollout.prompts == 2 and trainer["devices"] in (1, "1")


def checkpoint(here, **changes):
    """A run folder whose only checkpoint is this one."""
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "config.yaml").write_text(resolved(*written(here)))
    torch.save(changes, here / "run" / "checkpoints" / "update=000001.ckpt")


def test_checkpoint_that_does_not_fit(here, capfd):
    trimtab = {"updates_done": 1, "skipped_updates": 0}
    for saved, why in (
        ({"state_dict": {}}, "was not written by trimtab-rl"),
        ({"state_dict": {"other": torch.zeros(1)}, "trimtab": trimtab}, "does not fit: other: "),
    ):
        checkpoint(here, **saved)
        with pytest.raises(SystemExit) as left:  # not `refusal`: the warm-up's cache may be written
            main(["--resume", "run"])
        assert left.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("trimtab-rl: error: ") and why in line
        names = {path.name for path in (here / "run").rglob("*")}
        assert names == {"config.yaml", "checkpoints", "update=000001.ckpt"}
        shutil.rmtree(here / "run")


def test_report_of_what_is_no_run(refusal, here):
    assert refusal("report") == "report: expected one run folder, got []"
    assert refusal("report", "nowhere") == "nowhere is no run folder (no config.yaml in it)"
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("{}\n")
    assert refusal("report", "run") == "run/metrics.jsonl: no metrics to draw"
    (here / "run" / "metrics.jsonl").write_text('{"update": 1\n{"update": 2}\n')
    assert refusal("report", "run").startswith("run/metrics.jsonl:1: not JSON")


# ---------------------------------------------------------------- what is printed


def printed(capfd, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code in (0, None)
    return capfd.readouterr().out


def test_print_config_parses_to_the_same(here, capfd):
    text = printed(capfd, *RECIPE, "--print_config")
    (here / "again.yaml").write_text(text)
    assert printed(capfd, "--config", "again.yaml", "--print_config") == text
    assert resolved("--config", "again.yaml") == resolved(*RECIPE)
    keys = yaml.safe_load(text)
    assert {field.name for field in dataclasses.fields(RLConfig)} | {"trainer", "resume"} == set(
        keys
    )
    changed = yaml.safe_load(printed(capfd, *RECIPE, "--update.lr=0.5", "--print_config"))
    assert (
        changed["update"]["lr"] == 0.5 and changed["update"]["pruning"] == keys["update"]["pruning"]
    )


def nested(kind, prefix):
    """(prefix, dataclass) of every dataclass that a dataclass takes, itself included."""
    yield prefix, kind
    for name, hint in typing.get_type_hints(kind).items():
        for part in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(part):
                yield from nested(part, f"{prefix}{name}.")


def test_help_documents_every_field(capfd):
    texts = {"": printed(capfd, "--help")}
    for optional in (
        "update.trust_region",
        "update.pruning",
        "update.length_rate",
        "update.replay",
        "update.reference",
        "rollout.budget",
        "rollout.tree",
        "rollout.vllm",
        "rollout.paged_cache",
        "policy.warmup",
        "policy.lora",
        "teacher",
    ):
        texts[f"{optional}."] = printed(capfd, f"--{optional}.help")
    everything = "\n".join(texts.values())
    helps = dict(
        re.findall(r"^  --([\w.]+)(?: [^\n]*?)?(?:\n {10,}|  +)(.+)", everything, re.MULTILINE)
    )
    wanted = [
        f"{prefix}{field.name}"
        for prefix, kind in nested(RLConfig, "")
        for field in dataclasses.fields(kind)
        if not re.match(r"teacher\.\w", prefix)  # as in policy
    ]
    groups = {prefix.removesuffix(".") for prefix, _ in nested(RLConfig, "")}
    assert len(wanted) > 70
    for name in wanted:
        if name not in groups or name in helps:
            assert re.match(r"\S", helps[name]) and not helps[name].startswith("("), name
    for field in ("min_terms", "path", "name"):
        assert f"--task.{field} " in "".join(
            printed(capfd, "--task.help", kind)
            for kind in ("ChainSumTask", "JsonLinesTask", "ReasoningGymTask")
        )


def test_every_packaged_recipe_is_a_run():
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    assert "chain_sum_cpu" in names
    parser = make_parser()
    for name in names:
        config, trainer, resume, _ = parse(parser, ["--config", name, "--seed=3"])
        assert isinstance(config, RLConfig) and config.seed == 3 and resume is None
        assert "accelerator" in trainer


def test_console_script_in_a_process_of_its_own(here):
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.rl", *RECIPE, "--updats", "3"],
        cwd=here, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and list(here.iterdir()) == []
    assert done.stderr == f"trimtab-rl: error: {did_you_mean('updats', 'updates')}\n"


def test_a_model_without_its_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tiny-policy" / name).unlink()
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(recipe), "--run_dir", "out"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "tokenizer" in line and not (tmp_path / "out").exists()


def test_more_tokens_than_positions_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    with pytest.raises(SystemExit):
        main(["--config", str(recipe), "--rollout.max_tokens", "100000"])
    assert "rollout.max_tokens: prompt and rollout take" in capsys.readouterr().err


def test_a_run_dir_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    with pytest.raises(SystemExit):
        main(["--config", str(recipe), "--run_dir", "/proc/nowhere/run"])
    assert "run_dir: cannot write in /proc" in capsys.readouterr().err


# Edits to rl/cli.py that must turn this file red:
#   (leaf, leaves, 0.6) in _unknown_key         ->  removed        (right name, wrong place)
#   path, task = [*path, "init_args"], made     ->  path, task = path, made
#   raise SystemExit(2)                         ->  SystemExit(1)
#   _refuse_changes(stored_text, text)          ->  removed
#   return _checked(name)                       ->  return name    (no file and line of bad YAML)
