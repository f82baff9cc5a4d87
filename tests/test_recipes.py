"""Every packaged recipe runs as it is, for two updates after a short warm-up."""

import json
import math

import pytest
import yaml
from tiny_run import metrics_of, run_here

from trimtab.rl.cli import RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PRETRAINED = {"smollm2", "smollm2_lora", "llm_gpu"}  # test_pretrained.py runs them
OWN = {  # metrics that only this method has
    "remax": "remax/greedy_reward",
    "reval": "replay/reval/abs_residual",
    "knapsack": "budget/rollouts_unseen",
    "treepo": "tree/decoded_fraction",
    "imitation": "imitation/kl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def test_each_method_of_the_family_has_a_recipe():
    methods = {"grpo", "dr_grpo", "rloo", "remax", "otb", "reval", "knapsack", "treepo"}
    assert methods | {"imitation", "gem_warmup", "chain_sum_cpu"} <= set(NAMES)
    for path in RECIPES.glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 40, path.name


def test_only_these_recipes_need_a_model_of_somebody_else():
    recipes = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in NAMES}
    assert {name for name, recipe in recipes.items() if "path" in recipe["policy"]} == PRETRAINED


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PRETRAINED])
def test_a_recipe_trains(folder, name):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    models = ["policy", *(["teacher"] if "teacher" in recipe else [])]
    arguments = ["--config", name, "--run_dir", name, "--updates", "2", "--threads", "1"]
    for model in models:  # its own mixture of answers, in few steps; one cache for all recipes
        arguments += [f"--{model}.warmup.reasoning_steps", "20"]
        arguments += [f"--{model}.warmup.cache_dir", "bases"]
        if recipe[model]["warmup"]["mixture_steps"]:
            arguments += [f"--{model}.warmup.mixture_steps", "5"]
    arguments += ["--rollout.max_tokens", "16", "--evaluation.problems", "4"]
    run_here(arguments, folder)
    rows = metrics_of(folder / name)
    rollouts = recipe["rollout"]["prompts"] * recipe["rollout"]["group_size"]
    assert [row["rollouts"] for row in rows] == [rollouts] * 2
    assert all(row["skipped_updates"] == 0 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if name in OWN:
        assert OWN[name] in rows[0]
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["updates"] == 2 and summary["after"]["sampled"] is not None


# Edits that must turn this file red:
# - a recipe with a name that the configuration does not know, or without its own option
# - rl/policy_update.py: no step on replayed trajectories
# - rl/loop.py: counts of the budget not passed on to the collector
