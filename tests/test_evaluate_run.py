import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
from tiny_run import run_here, write_recipe

from trimtab.rl import ChainSumTask, Problem, Sample, ScoredGroup
from trimtab.rl.answer_figures import (
    by_difficulty,
    difficulties,
    evaluation_result,
    final_answer,
)
from trimtab.rl.cli import main
from trimtab.rl.evaluate_run import Options
from trimtab.rl.pass_at_k import majority_vote, mean_over_problems, pass_at_k

# ---------------------------------------------------------------- by hand


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - 3/6
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 - 1/10
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0 and pass_at_k(5, 5, 1) == 1.0
    assert pass_at_k(10_000, 1, 5_000) == 0.5  # exact where factorials overflow


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
        else:
            with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n, got n="):
                pass_at_k(n, c, k)


def test_majority_vote_by_hand():
    assert majority_vote(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority_vote(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority_vote(["7", "8"], [True, False]) == 0.5  # one of the two, drawn
    assert majority_vote(["7", "8", "9"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_vote([None, None, "7"], [False, False, True]) == 1.0  # None does not vote
    assert majority_vote([None, None], [False, False]) == 0.0 == majority_vote([], [])
    assert majority_vote(["x", "x"], [True, False]) == 0.5  # alike, yet judged differently


def test_standard_error_by_hand():
    # variance of (0, 1, 1, 0) is 1/3; a twelfth of it is the mean's
    assert mean_over_problems([0, 1, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)), 4)
    assert mean_over_problems([0.3]) == (0.3, None, 1) and mean_over_problems([]) == (None, None, 0)


def group(number, rewards, completions=None, tokens=None, **columns):
    count = len(rewards)
    lengths = tokens or [3] * count
    return ScoredGroup(
        number,
        Problem(f"heldout/{number}", "p", columns),
        [1],
        [Sample([1] * n, [0.0] * n, "stop") for n in lengths],
        completions or [f"a#{reward}" for reward in rewards],
        list(rewards),
    )


TASK = SimpleNamespace(answer_after="#")


def test_figures_by_hand():
    groups = [
        group(0, [1.0, 0.0, 0.0, 1.0], ["#4", "#5", "#5", "#5 "], tokens=[1, 2, 3, 6]),
        group(1, [0.0, None, 0.6, 0.5], ["#1", "#2", "#2", "none"], tokens=[2, 99, 4, 6]),
        group(2, [None, None, None, None]),
    ]
    found = evaluation_result(groups, [1, 3, 4], TASK)
    results = {name: (f["value"], f["problems"]) for name, f in found["results"].items()}
    # successes: 2 of 4, and 1 of 3 (0.5 is none)
    assert results["pass@1"] == (pytest.approx((1 / 2 + 1 / 3) / 2), 2)
    assert results["pass@3"] == (pytest.approx((1 + 1) / 2), 2)
    assert results["pass@4"] == (1.0, 1)  # the second has three answers
    # 5 wins with three votes, one of them right (space around it does not count); 1 and 2 are even
    assert results["majority vote"] == (pytest.approx((1 / 3 + 1 / 2) / 2), 2)
    assert results["mean reward"] == (pytest.approx((0.5 + 1.1 / 3) / 2), 2)
    assert results["mean length (tokens)"] == (pytest.approx((3 + 4) / 2), 2)
    assert found["lost"] == 5
    error = found["results"]["pass@1"]["standard_error"]
    assert error == pytest.approx((1 / 2 - 1 / 3) / 2)  # of two: half their distance
    assert [p["lost"] for p in found["per_problem"]] == [0, 1, 4]
    assert [p["different_answers"] for p in found["per_problem"]] == [2, 2, 0]


def test_what_votes():
    assert final_answer("1+2=3;#3;#4 ", TASK) == "4"  # after the last one
    assert final_answer("no answer", TASK) is None and final_answer("3#", TASK) is None
    assert final_answer(" 42\n", object()) == "42" and final_answer("  ", object()) is None


def test_difficulty_of_real_problems():
    task = ChainSumTask(min_terms=2, max_terms=4)
    problems = [task.problem("heldout", i) for i in range(12)]
    for problem in problems:
        found = difficulties(problem.columns)
        terms = re.findall(r"\d+", problem.columns["entry"]["metadata"]["expression"])
        assert found["num_terms"] == len(terms)
    columns = [problem.columns for problem in problems]
    made = by_difficulty(columns, [{"answers": 2, "successes": 1}] * 12)
    assert list(made) == ["num_terms"]  # the number of digits is the same in all
    assert list(made["num_terms"]) == ["2", "3", "4"]
    assert sum(group["problems"] for group in made["num_terms"].values()) == 12


def test_by_difficulty_by_hand():
    columns = [{"level": level} for level in ("hard", "easy", "hard", "easy")]
    problems = [{"answers": 4, "successes": s} for s in (0, 4, 2, 3)] + [{"answers": 0}]
    found = by_difficulty([*columns, {"level": "hard"}], problems)
    assert {k: (v["value"], v["problems"]) for k, v in found["level"].items()} == {
        "easy": (0.875, 2),
        "hard": (0.25, 2),
    }
    numbers = [{"difficulty": n} for n in range(1, 13)]  # twelve of them: four ranges of three
    found = by_difficulty(numbers, [{"answers": 1, "successes": n % 2} for n in range(12)])
    assert list(found["difficulty"]) == ["1 to 3", "4 to 6", "7 to 9", "10 to 12"]
    assert [g["problems"] for g in found["difficulty"].values()] == [3, 3, 3, 3]
    assert by_difficulty([{}, {"entry": "text"}], problems[:2]) == {}


def test_the_k_of_pass_at_k():
    assert Options("r").ks() == [1, 4, 16] and Options("r", samples=5).ks() == [1, 4]
    assert Options("r", samples=8, k="8,1,1").ks() == [1, 8] == Options("r", k="[1, 8]").ks()


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder, {"updates": 6})
    run_here(["--config", "recipe.yaml", "--run_dir", "out"], folder)
    return folder


def evaluated(folder, *arguments):
    """What was printed, and what was written."""
    before = set((folder / "out").glob("eval-*.json"))
    for path in before:  # names have seconds; two evaluations of a second are one
        path.unlink()
    output = run_here(["eval", "out", *arguments], folder)
    (path,) = (folder / "out").glob("eval-*.json")
    assert output.splitlines()[-1] == str(path)
    return output, json.loads(path.read_text())


def without_time(found):
    return {k: v for k, v in found.items() if k not in ("seconds", "policy")}


def test_it_samples_what_the_run_itself_evaluated(finished):
    output, found = evaluated(finished, "--samples", "2")
    after = json.loads((finished / "out" / "summary.json").read_text())["after"]
    assert after["lost"] == found["lost"] == 0
    assert found["results"]["mean reward"]["value"] == pytest.approx(after["sampled"], abs=1e-12)
    assert found["results"]["mean length (tokens)"]["value"] == pytest.approx(after["length"])
    assert (found["update"], found["options"]["k"]) == (6, [1])
    assert found["policy"] == str(finished / "out" / "policy")
    assert f"{found['results']['mean reward']['value']:.3f}" in output
    assert "a success is a reward > 0.5" in output


def test_a_checkpoint_gives_what_the_policy_gave(finished):
    options = ["--samples", "4", "--k", "1,2,4", "--problems", "5"]
    found = evaluated(finished, *options)[1]
    (last,) = (finished / "out" / "checkpoints").glob("update=000006.ckpt")
    again = evaluated(finished, *options, "--checkpoint", f"out/checkpoints/{last.name}")[1]
    assert again["policy"] == str(last)
    found["options"].pop("checkpoint"), again["options"].pop("checkpoint")
    assert without_time(again) == without_time(found)
    assert [p["answers"] for p in found["per_problem"]] == [4] * 5
    values = [found["results"][f"pass@{k}"]["value"] for k in (1, 2, 4)]
    assert values == sorted(values)
    other = evaluated(finished, *options, "--seed", "5")[1]
    assert other["per_problem"] != found["per_problem"]
    train = evaluated(finished, *options, "--split", "train")[1]
    assert {p["id"].split("/")[0] for p in train["per_problem"]} == {"train"}


def test_an_unfinished_run_and_lost_rewards(tmp_path):
    write_recipe(
        tmp_path,
        {
            "task.init_args.reward": "reward_functions:fails_on_a",
            "record.checkpoint_every": 2,
            "trainer.max_steps": 3,
        },
    )
    run_here(["--config", "recipe.yaml", "--run_dir", "out"], tmp_path)
    assert not (tmp_path / "out" / "policy").exists()
    output, found = evaluated(tmp_path, "--samples", "8")
    assert found["update"] == 3 and found["policy"].endswith("update=000003.ckpt")
    assert found["lost"] > 0 and f"{found['lost']} answers without a reward" in output
    for problem in found["per_problem"]:
        assert problem["answers"] + problem["lost"] == 8
    assert found["lost"] == sum(p["lost"] for p in found["per_problem"])


def test_bad_arguments_are_one_line(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished)

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["eval", *arguments])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1
        return err.removeprefix("trimtab-rl: error: ").rstrip()

    assert refused() == "eval: expected a run folder, got none"
    assert refused("nowhere") == "nowhere is no run folder (no config.yaml in it)"
    for k in ("0", "17", "x", "1,,4", "-1"):
        line = f"--k: expected counts from 1 to --samples 16, as in 1,4,16, got '{k}'"
        assert refused("out", f"--k={k}") == line
    assert refused("out", "--samples=0") == "--samples: expected a count >= 1, got 0"
    assert refused("out", "--problems=-3") == "--problems: expected a count >= 1, got -3"
    assert refused("out", "--split=test") == "--split: expected heldout or train, got 'test'"
    assert "--checkpoint: expected a checkpoint's file" in refused("out", "--checkpoint=no")
    line = refused("out", "--checkpoint=recipe.yaml")
    assert line.startswith("--checkpoint: expected a checkpoint of the run, cannot read")
    assert "--smples" in refused("out", "--smples=3")
    (tmp_path / "config.yaml").write_text((finished / "out" / "config.yaml").read_text())
    line = f"eval: expected a run with a policy or a checkpoint, {tmp_path} has none"
    assert refused(str(tmp_path)) == line


# Edits that must turn this file red:
#   rl/pass_at_k.py: math.comb(n - c, k) / math.comb(n, k)   ->  (1 - c / n) ** k
#   rl/pass_at_k.py: if answer is not None                   ->  always
#   rl/pass_at_k.py: (count - 1)                             ->  count
#   rl/answer_figures.py: reward > SUCCESS                   ->  >=
#   rl/answer_figures.py: metadata.get(name, value)            ->  value
#   rl/evaluate_run.py: model.load_state_dict(weights)       ->  removed
#   rl/evaluate_run.py: stable_seed(seed, split, number)     ->  stable_seed(seed, number)
