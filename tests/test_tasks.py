import json
import pickle
import random
import re
import subprocess
import sys

import pytest
import reasoning_gym

from trimtab.rl import ChainSumTask, JsonLinesTask, ReasoningGymTask, Styles
from trimtab.rl.chain_sum import CHARACTERS, answer_text, question_text

ALL_STYLES = ("direct", "worked", "checked")
GOOD_ROW = {"prompt": "say hi", "target": "hi", "level": 3}


def score(task, problem, completion):
    columns = {name: [value] for name, value in problem.columns.items()}
    (reward,) = task.reward_function()(
        prompts=[problem.prompt], completions=[completion], completion_ids=[[1]], **columns
    )
    return reward


# ---------------------------------------------------------------- reasoning-gym by name


# plain; entries prepared at once; draws from the global generator; parameters that are lists
GENERATORS = [
    ("chain_sum", {"max_terms": 3}),
    ("gsm_symbolic", {}),
    ("list_functions", {}),
    ("basic_arithmetic", {"operators": ["+", "-"]}),
    ("spell_backward", {}),
]
each_generator = pytest.mark.parametrize(
    ("name", "params"), GENERATORS, ids=[n for n, _ in GENERATORS]
)


@each_generator
def test_generator_by_name(name, params):
    one, two = ReasoningGymTask(name, params), ReasoningGymTask(name, params)
    there = [one.problem("train", i) for i in range(5)]
    random.seed(1)
    drawn = random.random()
    random.seed(1)
    assert [two.problem("train", i) for i in reversed(range(5))] == there[::-1]
    assert random.random() == drawn  # the caller's random numbers are untouched
    assert [one.problem("heldout", i).prompt for i in range(5)] != [p.prompt for p in there]
    assert len({p.id for p in there}) == 5
    assert one.problem("train", 10**6) == two.problem("train", 10**6)
    assert json.loads(json.dumps(there[0].columns["entry"]["answer"])) is not None
    for problem in there:
        assert score(one, problem, problem.columns["entry"]["answer"]) == 1.0
        assert score(one, problem, "no such answer") == 0.0
    assert ReasoningGymTask(name, params, seed=5).problem("train", 0) != there[0]


def test_template_answer_after_threshold():
    task = ReasoningGymTask("chain_sum", template="<{question}>", answer_after="####", stop="\n")
    problem = task.problem("train", 0)
    answer = problem.columns["entry"]["answer"]
    assert problem.prompt == f"<{problem.columns['entry']['question']}>" and task.stop == "\n"
    assert score(task, problem, f"thinking #### {answer} ") == 1.0
    assert score(task, problem, f"#### 0 no, #### {answer}") == 1.0  # the last one counts
    assert score(task, problem, f"#### {answer} no, #### 123456") == 0.0
    assert score(task, problem, answer) == 0.0  # without the mark there is no answer
    assert score(task, problem, "####") == score(task, problem, "") == 0.0
    # a right answer inside a longer text: reasoning-gym consoles with less than 1
    scores = {
        threshold: score(ReasoningGymTask("chain_sum", threshold=threshold), problem, f"{answer} .")
        for threshold in (None, 0.99, 0.01)
    }
    assert 0.0 < scores[None] < 1.0 and scores[0.99] == 0.0 and scores[0.01] == 1.0


def test_reasoning_gym_refusals():
    with pytest.raises(ValueError, match=r"got 'chainsum'; nearest: chain_sum"):
        ReasoningGymTask("chainsum")
    with pytest.raises(ValueError, match=r"got 'qqqqqq'; nearest: none"):
        ReasoningGymTask("qqqqqq")
    for params in ({"min_terms": 5, "max_terms": 2}, {"no_such": 1}, {"size": 3}, {"seed": 3}):
        with pytest.raises(ValueError, match="params: chain_sum refuses"):
            ReasoningGymTask("chain_sum", params)
    with pytest.raises(ValueError, match=r"template: expected a text with \{question\}"):
        ReasoningGymTask("chain_sum", template="question")


# ---------------------------------------------------------------- JSON lines


def written(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_json_lines_columns_reach_the_reward(tmp_path):
    rows = [GOOD_ROW | {"prompt": f"p{i}", "target": f"t{i}"} for i in range(20)]
    path = written(tmp_path / "a.jsonl", *map(json.dumps, rows), "", "  ")
    task = JsonLinesTask(path, "reward_functions:matches")
    problem = task.problem("train", 3)
    assert problem.prompt == "p3" and problem.columns == {"target": "t3", "level": 3}
    assert score(task, problem, "t3") == 1.0 and score(task, problem, "t4") == 0.0
    held = [task.problem("heldout", i).prompt for i in range(2)]
    assert held == ["p9", "p19"]  # every tenth, and never trained on
    assert not {task.problem("train", i).prompt for i in range(40)} & set(held)
    assert task.problem("train", 18) == task.problem("train", 0)  # starts over
    pickle.loads(pickle.dumps(task.reward_function()))


def test_json_lines_heldout_file(tmp_path):
    train = written(tmp_path / "a.jsonl", *[json.dumps({"prompt": f"p{i}"}) for i in range(12)])
    held = written(tmp_path / "b.jsonl", json.dumps({"prompt": "held"}))
    task = JsonLinesTask(train, "reward_functions:length", heldout_path=held, stop=".")
    assert task.problem("heldout", 7).prompt == "held" and task.stop == "."
    assert len({task.problem("train", i).prompt for i in range(12)}) == 12
    few = JsonLinesTask(held, "reward_functions:length")  # too few to hold any out
    assert few.problem("heldout", 0).prompt == few.problem("train", 0).prompt == "held"


PROMPT = "expected a non-empty string or messages with role and content under 'prompt'"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[1]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ('{"promt": "a"}', f"{PROMPT}, got None"),
        ('{"prompt": 3}', f"{PROMPT}, got 3"),
        ('{"prompt": ""}', f"{PROMPT}, got ''"),
        ('{"prompt": [{"role": "user"}]}', "expected a non-empty string or messages with role"),
        ('{"prompt": []}', "expected a non-empty string or messages with role"),
        ('{"prompt": "a", "completions": 1}', "the key 'completions' is reserved"),
        ('{"prompt": "a", "completion_ids": 1}', "the key 'completion_ids' is reserved"),
        ('{"prompt": "a", "prompts": 1}', "the key 'prompts' is reserved"),
    ],
)
def test_malformed_line_is_named_with_file_and_line(tmp_path, line, why):
    path = written(tmp_path / "a.jsonl", json.dumps(GOOD_ROW), "", line)
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {why}")):
        JsonLinesTask(path, "reward_functions:length")
    good = written(tmp_path / "b.jsonl", json.dumps(GOOD_ROW))
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {why}")):
        JsonLinesTask(good, "reward_functions:length", heldout_path=path)


def test_missing_empty_and_binary_files(tmp_path):
    good = written(tmp_path / "good.jsonl", json.dumps(GOOD_ROW))
    empty = written(tmp_path / "empty.jsonl", "", " ")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    for path, why in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "does not exist"),
        (empty, "holds no prompt"),
        (binary, "is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{why}"):
            JsonLinesTask(str(path), "reward_functions:length")
        with pytest.raises(ValueError, match=why):
            JsonLinesTask(good, "reward_functions:length", heldout_path=str(path))


# ---------------------------------------------------------------- chain_sum


def arithmetic_is_right(expression, answer, style):
    """Every step of an answer, checked by adding the numbers up here."""
    terms = [int(t) for t in re.findall(r"[+-]?\d+", expression.replace(" ", ""))]
    steps, _, result = answer.removesuffix("\n").rpartition("#")
    assert int(result) == sum(terms)
    if style == "direct":
        return steps == ""
    totals = [terms[0]]
    for step in steps.split(";"):
        left, _, right = step.partition("=")
        numbers = [int(n) for n in re.findall(r"(?:^-|[+-])?\d+", left)]
        assert len(numbers) == 2 and sum(numbers) == int(right)
        assert numbers[0] == totals[-1]
        totals.append(int(right))
    n = len(terms)
    partial = [sum(terms[: k + 1]) for k in range(n)]
    return totals == (partial if style == "worked" else partial + partial[-2::-1])


@pytest.mark.parametrize("style", ALL_STYLES)
def test_answers_are_right_and_score_one(style):
    task = ChainSumTask()
    label = "direct" if style == "direct" else "worked"
    for i in range(300):
        problem = task.problem("train", i)
        entry = problem.columns["entry"]
        answer = answer_text(entry, style)
        assert answer.endswith("\n") and answer.count("\n") == 1  # stop text: once, at the end
        assert arithmetic_is_right(entry["metadata"]["expression"], answer, style)
        assert score(task, problem, answer.removesuffix(task.stop)) == 1.0
        assert task.label(answer) == label
    wrong = answer_text(entry, style).replace("#", "#1")
    assert score(task, problem, wrong) == 0.0


def test_reasoning_gym_itself_scores_the_entry():
    entry = ChainSumTask().problem("heldout", 4).columns["entry"]
    scorer = reasoning_gym.create_dataset("chain_sum", seed=0, size=1)
    assert (
        scorer.score_answer(answer_text(entry, "checked").rpartition("#")[2].strip(), entry) == 1.0
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompt_is_answered_examples_and_an_open_question(split):
    task = ChainSumTask()
    lengths = []
    for i in range(100):
        problem = task.problem(split, i)
        examples = re.findall(r"Q:([-+\d]+)=\nA:(.*\n)", problem.prompt)
        assert len(examples) == task.shots
        for expression, answer in examples:
            steps = answer.count("=")
            worked = "worked" if steps < len(re.findall(r"\d", expression)) else "checked"
            assert arithmetic_is_right(expression, answer, worked if steps else "direct")
        assert problem.prompt.endswith(question_text(problem.columns["entry"]))
        assert problem.prompt.endswith("=\nA:") and set(problem.prompt) <= set(CHARACTERS)
        lengths.append(len(problem.prompt))  # one token per character
    assert 150 < sum(lengths) / len(lengths) < 220


def test_questions_examples_and_documents_come_from_streams_of_their_own():
    """reasoning-gym makes entry i from seed + i, so a stream is the range of its seeds."""
    streams = {}
    for seed in (0, 1):
        task = ChainSumTask(seed=seed)
        for split in ("train", "heldout"):
            streams[seed, split] = task._sets[split].seed
        for name, examples in task._examples.items():
            streams[seed, "examples", name] = examples._sets["train"].seed
    starts = sorted(streams.values())
    assert len(set(starts)) == 10
    assert min(b - a for a, b in zip(starts, starts[1:])) > 2_000_000


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_shots_stand_before_the_question_and_never_ask_it():
    texts = {"template": "Q {question}\nA ", "shot": "Q {question}\nA {answer}\n"}
    task = ReasoningGymTask("chain_sum", SUMS, **texts, shots=5)
    plain = ReasoningGymTask("chain_sum", SUMS, **texts)
    prompts = {s: [task.problem(s, i) for i in range(300)] for s in ("train", "heldout")}
    for split, problems in prompts.items():
        for i, problem in enumerate(problems):
            bare = plain.problem(split, i)
            assert problem.prompt.endswith(bare.prompt) and problem.columns == bare.columns
            shots = problem.prompt.removesuffix(bare.prompt).splitlines()
            assert len(shots) == 10
            for question, answer in zip(shots[::2], shots[1::2]):
                left, sign, right = question.removesuffix(" =").split()[-3:]
                total = int(left) + int(right) * (1 if sign == "+" else -1)
                assert answer == f"A {total}"
            assert bare.prompt.splitlines()[0] not in shots
    first = [
        problem.prompt.splitlines()[0] for problems in prompts.values() for problem in problems
    ]
    assert len(set(first)) > 100, "drawn for each problem"
    assert task.problem("train", 7) == task.problem("train", 7)


def test_shots_come_from_streams_of_their_own():
    tasks = [ReasoningGymTask("chain_sum", SUMS, shots=2, seed=seed) for seed in (0, 1)]
    starts = sorted(entries.seed for task in tasks for entries in task._sets.values())
    assert len(starts) == 8 and min(b - a for a, b in zip(starts, starts[1:])) > 1_000_000
    many = {"min_terms": 4, "max_terms": 4, "min_digits": 3, "max_digits": 3}
    task = ReasoningGymTask("chain_sum", many, template="{question}\n", shots=3)
    texts = [[task.problem(split, i).prompt for i in range(50)] for split in ("train", "heldout")]
    shown = [{line for text in split for line in text.splitlines()[:-2:2]} for split in texts]
    asked = {task.entry(split, i)["question"] for split in ("train", "heldout") for i in range(300)}
    assert [len(split) for split in shown] == [150, 150] and not shown[0] & shown[1]
    assert not asked & (shown[0] | shown[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": -1}, r"shots: expected a count >= 0, got -1"),
        ({"shot": "{question}"}, r"shot: expected a text with \{question\} and \{answer\}, got"),
    ],
)
def test_shots_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGymTask("chain_sum", SUMS, **options)


def test_documents_follow_their_styles():
    task = ChainSumTask(shots=3)
    documents = [task.document(i, Styles(worked=0.5, checked=0.25)) for i in range(200)]
    assert all(len(document) == task.shots + 1 for document in documents)
    answers = [answer for document in documents for _, answer in document]
    direct = sum("=" not in answer for answer in answers) / len(answers)
    assert 0.2 < direct < 0.3
    only = [a for i in range(20) for _, a in task.document(i, Styles(worked=0.0, checked=0.0))]
    assert all(a.startswith("#") for a in only)


def test_same_problems_in_another_process():
    code = (
        "from trimtab.rl import ChainSumTask, Styles; t = ChainSumTask(seed=3); "
        "print([t.problem('heldout', 5), t.problem('train', 123456), t.document(7, Styles())])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    task = ChainSumTask(seed=3)
    here = [task.problem("heldout", 5), task.problem("train", 123456), task.document(7, Styles())]
    assert there.stdout.strip() == repr(here)
    assert ChainSumTask(seed=4).problem("heldout", 5) != here[0]


def test_chain_sum_refusals():
    with pytest.raises(ValueError, match="shots"):
        ChainSumTask(shots=-1)
    with pytest.raises(ValueError, match="params: chain_sum refuses"):
        ChainSumTask(min_terms=4, max_terms=3)
    for shares in ({"worked": -0.1}, {"worked": 0.8, "checked": 0.3}):
        with pytest.raises(ValueError, match="styles"):
            Styles(**shares)
    assert ChainSumTask(shots=0).problem("train", 0).prompt.count("Q:") == 1


# Edits that must turn this file red:
#   rl/tasks.py: random.seed(...) in ReasoningGymTask.entry                      ->  removed
#   rl/rewards.py: completion.rpartition(answer_after)[2]                        ->  partition
#   rl/chain_sum.py: reversed(terms[1:])                                         ->  terms[1:]
#   rl/tasks.py: seed * SEED_STRIDE                                              ->  seed
#   rl/tasks.py: if i % 10 != 9                                                  ->  always
