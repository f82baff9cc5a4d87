import os
import pickle
import subprocess
import sys
import time

import pytest
import reward_functions

from trimtab.rl import ReasoningGymTask, RewardWorker
from trimtab.rl.rewards import import_function, reasoning_gym_reward


@pytest.fixture
def obeying():
    """A worker that does what completions say; long enough that a busy machine answers in time."""
    worker = RewardWorker(reward_functions.obey, timeout=2.0)
    yield worker
    worker.close()


def score(worker, orders):
    n = len(orders)
    return worker.score(["p"] * n, orders, [[1]] * n, [{}] * n)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_order_is_kept_and_arguments_arrive():
    worker = RewardWorker(reward_functions.length)
    texts = ["a" * n for n in (5, 0, 3, 1)]
    assert worker.score("abcd", texts, [[1]] * 4, [{}] * 4).rewards == [5.0, 0.0, 3.0, 1.0]
    assert worker.score([], [], [], []).rewards == []
    worker.close()
    worker = RewardWorker(reward_functions.tokens)
    assert worker.score("ab", ["", ""], [(1, 2), (3,)], [{}] * 2).rewards == [3.0, 3.0]
    worker.close()
    worker = RewardWorker(reward_functions.matches)
    columns = [{"target": "x", "other": [1]}, {"target": "y", "other": None}]
    assert worker.score("ab", ["x", "x"], [[1]] * 2, columns) == ([1.0, 0.0], 0, 0)
    with pytest.raises(ValueError):
        worker.score(["p"], ["a", "b"], [[1]] * 2, [{}] * 2)
    worker.close()


@pytest.mark.parametrize(
    ("order", "errors", "timeouts"),
    [
        ("raise", 1, 0),
        ("long message", 1, 0),
        ("nan", 1, 0),
        ("infinite", 1, 0),
        ("long", 1, 0),  # two rewards for one rollout
        ("short", 1, 0),
        ("number", 1, 0),
        ("text", 1, 0),
        ("exit", 1, 0),
        ("sys.exit", 1, 0),
        ("segfault", 1, 0),
        ("kill", 1, 0),
        ("kill the supervisor", 1, 0),
        ("interrupt", 1, 0),
        ("no memory", 1, 0),
        ("garbage", 1, 0),
        ("long text", 1, 0),
        ("long number", 1, 0),  # infinite
        ("endless", 1, 0),
        ("ignore and hang", 0, 1),
        ("spin", 0, 1),
        ("print to both", 0, None),
        ("closed output", 0, None),
        ("hang", 0, 1),
        ("none", 0, 0),  # the function itself excludes the rollout: no error
    ],
)
def test_a_bad_answer_costs_one_rollout(obeying, order, errors, timeouts):
    scored = score(obeying, ["score", order, "score", "score"])
    if timeouts is None:  # it does no harm at all
        assert scored == ([1.0, 1.0, 1.0, 1.0], 0, 0)
    else:
        assert scored == ([1.0, None, 1.0, 1.0], errors, timeouts)


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ("exit", "died (exit code 3)"),
        ("sys.exit", "died (exit code 3)"),
        ("segfault", "died (SIGSEGV)"),
        ("kill", "died (SIGKILL)"),
        ("kill the supervisor", "supervisor died"),
        ("garbage", "too many values"),
        ("long text", "expected a list of one number or None, got '1111"),
        ("no memory", "MemoryError"),
    ],
)
def test_the_log_says_how_it_was_lost(obeying, caplog, order, why):
    score(obeying, [order])
    (record,) = caplog.records
    assert why in record.getMessage() and len(record.getMessage()) < 1000


def test_of_a_flood_a_little_reaches_the_terminal_once(obeying, capfd):
    score(obeying, ["print", "exit", "print to both", "raise", "print"])
    shown = capfd.readouterr()
    assert 1000 < len(shown.err) < 20_000 and shown.out == ""
    assert shown.err.count("prints more; the rest is dropped") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the orphans")
@pytest.mark.parametrize("then", ["exit", "hang", "go-on"])
def test_what_a_worker_has_started_ends_with_it(obeying, tmp_path, then):
    """A child, which holds the worker's pipes, and one with a session of its own."""
    scored = score(obeying, ["score", f"fork {then} {tmp_path}"])
    assert (
        scored
        == {
            "exit": ([1.0, None], 1, 0),
            "hang": ([1.0, None], 0, 1),
            "go-on": ([1.0, 1.0], 0, 0),
        }[then]
    )
    pids = [(tmp_path / name).read_text() for name in ("child", "session")]
    assert [alive(pid) for pid in pids] == [then == "go-on"] * 2
    obeying.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the orphans")
def test_a_killed_trainer_leaves_no_process(tmp_path):
    """Also none of a reward function that hangs."""
    program = (
        "import reward_functions, sys\n"
        "from trimtab.rl import RewardWorker\n"
        "if __name__ == '__main__':\n"
        "    worker = RewardWorker(reward_functions.obey, timeout=60)\n"
        f"    worker.score(['p'], ['fork hang {tmp_path}'], [[1]], [{{}}])\n"
    )
    (tmp_path / "trainer.py").write_text(program)
    paths = os.pathsep.join([os.path.dirname(reward_functions.__file__), *sys.path])
    process = subprocess.Popen(
        [sys.executable, tmp_path / "trainer.py"], env=os.environ | {"PYTHONPATH": paths}
    )
    notes = [tmp_path / name for name in ("child", "session")]
    while not all(note.exists() and note.read_text() for note in notes):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    while any(alive(note.read_text()) for note in notes):  # a hang is the failure
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits it")
def test_memory_is_limited_and_a_leak_costs_one_rollout():
    worker = RewardWorker(reward_functions.obey, memory_mb=1000)
    scored = score(worker, ["pid", "allocate", "allocate", "allocate", "score", "pid"])
    assert scored.rewards[1:5] == [1.0, 1.0, None, 1.0] and scored.errors == 1
    assert scored.rewards[0] != scored.rewards[5]  # what it held went with its process
    worker.close()
    for wrong in (0, -5):
        with pytest.raises(ValueError, match="reward_memory_mb: expected MiB > 0 or null"):
            RewardWorker(reward_functions.obey, memory_mb=wrong)


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "vanishing_rewards.py").write_text("def one(**_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    worker = RewardWorker(import_function("vanishing_rewards:one"))
    (tmp_path / "vanishing_rewards.py").write_text("raise RuntimeError('gone')")
    with pytest.raises(RuntimeError, match=r"did not start: .*vanishing_rewards.py:1.*gone"):
        worker.score(["p"], ["a"], [[1]], [{}])
    assert worker._process is None


def test_counts_add_up_and_the_log_says_it_once(obeying, caplog, capfd):
    orders = ["print", "raise", "exit", "nan", "none", "raise", "score"]
    with caplog.at_level("WARNING"):
        assert score(obeying, orders) == ([1.0, None, None, None, None, None, 1.0], 4, 0)
        assert score(obeying, ["raise"]) == ([None], 1, 0)
    (record,) = caplog.records
    assert "RuntimeError: no" in record.getMessage()
    assert "Traceback" not in capfd.readouterr().err


def test_a_hung_worker_is_killed_and_replaced(obeying):
    (first,) = score(obeying, ["pid"]).rewards
    assert alive(first) and first != os.getpid()
    scored = score(obeying, ["hang", "pid"])
    assert scored.timeouts == 1 and scored.rewards[1] not in (None, first)
    assert not alive(first) and alive(scored.rewards[1])


def test_one_process_serves_all_and_close_ends_it(obeying):
    pids = set(score(obeying, ["pid", "raise", "pid"]).rewards) | set(
        score(obeying, ["pid"]).rewards
    )
    (pid,) = pids - {None}
    for _ in range(2):
        obeying.close()
        assert not alive(pid)
    assert score(obeying, ["score"]).rewards == [1.0]  # starts again when needed


def test_asynchronous_functions_are_refused_per_rollout():
    worker = RewardWorker(reward_functions.asynchronous)
    assert worker.score(["p"], ["a"], [[1]], [{}]) == ([None], 1, 0)
    worker.close()


def test_worker_refuses_what_cannot_work():
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="reward_timeout"):
            RewardWorker(reward_functions.length, timeout)
    with pytest.raises(ValueError, match=r"reward: .* cannot reach its process"):
        RewardWorker(reward_functions.unpicklable)
    RewardWorker(reward_functions.length).close()  # never started


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("reward_functions", "expected package.module:function"),
        ("reward_functions:", "expected package.module:function"),
        (":length", "expected package.module:function"),
        ("no_such_module:f", "cannot import .*No module named 'no_such_module'"),
        ("reward_functions:no_such", "cannot import .*no attribute 'no_such'"),
        ("reward_broken:f", "cannot import .*RuntimeError: this module"),
        ("reward_functions:NOT_A_FUNCTION", "is a str, not a function"),
    ],
)
def test_import_function_refusals(name, why):
    with pytest.raises(ValueError, match=f"(?s)reward: .*{why}"):
        import_function(name)


def test_import_function_finds_modules_of_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def one(**_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    worker = RewardWorker(import_function("my_own_rewards:one"))
    assert worker.score(["p"], ["a"], [[1]], [{}]).rewards == [1.0]  # the child finds it too
    worker.close()
    assert import_function("reward_functions:length") is reward_functions.length


def test_reasoning_gym_reward_in_the_worker():
    task = ReasoningGymTask("basic_arithmetic", {"operators": ["+", "-"]}, answer_after="=")
    function = task.reward_function()
    assert pickle.loads(pickle.dumps(function)).args == function.args
    problems = [task.problem("train", i) for i in range(3)]
    texts = [f"= {problem.columns['entry']['answer']}" for problem in problems]
    worker = RewardWorker(function)
    columns = [problem.columns for problem in problems]
    prompts = [problem.prompt for problem in problems]
    scored = worker.score(prompts, [*texts[:2], "= none"], [[1]] * 3, columns)
    assert scored == ([1.0, 1.0, 0.0], 0, 0)
    worker.close()


def test_thresholds():
    entry = ReasoningGymTask("chain_sum").problem("train", 0).columns["entry"]

    def reward(text, answer_after, threshold):
        function = reasoning_gym_reward("chain_sum", {}, answer_after, threshold)
        return function(prompts=[""], completions=[text], completion_ids=[[]], entry=[entry])[0]

    right = entry["answer"]
    assert reward(right, "", 0.99) == 1.0 and reward(f" {right}\n", "", None) == 1.0
    assert reward(f"x#{right}", "#", 0.99) == 1.0 and reward(right, "#", 0.99) == 0.0
    assert 0 < reward(f"{right}?", "", None) < 1 and reward(f"{right}?", "", 0.99) == 0.0


# Edits to rl/rewards.py that must turn this file red:
#   repr(params), params in reasoning_gym_reward                   ->  hash of the params' items
#   math.isfinite(value := float(reward))                          ->  True
#   self.close() in the branch of `died`                           ->  removed
#   if kind in ("error", "timeout") and not self._complained       ->  without the flag
# Edits to rl/reward_process.py:
#   without prctl(SET_CHILD_SUBREAPER, 1)
#   wait: without `if self.death in ready`
#   wait: without `if self.pipe.fileno() in ready`                 (hangs)
#   start: without `if self.output in ready: self.swallow()`       (a flood is a timeout)
#   answer: without `if kind == "out of memory"`
#   start: self.room = _PRINTED, so that each worker prints anew
#   _work: without setrlimit
