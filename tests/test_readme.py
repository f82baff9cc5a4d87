"""What README shows runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_run import make_policy, run_here

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]
YAML = [code for language, code in BLOCKS if language == "yaml"]


SNIPPETS = ["plain-torch", "stability", "shared-prefix", "fused-head", "generate", "lightning"]


@pytest.mark.parametrize("code", PYTHON[:-1], ids=SNIPPETS)
def test_python_snippets_run(code, tmp_path, monkeypatch):
    """In this process: to import everything takes longer than all of them."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_own_prompts_and_reward_train(tmp_path):
    """The recipe of README on a tiny policy, for two updates."""
    (tmp_path / "my_rewards.py").write_text(PYTHON[-1])
    make_policy(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab", "answer": "1"}\n' * 4)
    recipe = yaml.safe_load(YAML[0])
    recipe["policy"]["path"] = "policy"
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--updates", "2", "--evaluation.problems", "2", "--threads", "1"]
    output = run_here(["--config", "my_run.yaml", "--run_dir", "out", *small], tmp_path)
    assert "run folder: out" in output


def test_commands_name_what_exists():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [
        words
        for block in SHELL
        for line in block.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]
    assert all(c[1] in targets for c in commands if c[0] == "make")
    from trimtab.rl.cli import make_parser, parse

    for command in commands:
        if command[0] == "trimtab-rl":
            parse(make_parser(), command[1:])


def test_pictures_and_files_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)]+)\)", text) + ["CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]:
        assert (ROOT / name).exists(), name
