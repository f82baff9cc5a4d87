import json
import logging

import pytest
import torch

from trimtab.optim import LengthDetector, LengthTriggeredLR
from trimtab.rl.cli import main
from trimtab.rl.length_trigger import describe, replay

SMALL = dict(warmup=5, ratio=1.5, smoothing=0.5, period_factor=1.0)


def length_at(step):
    return 100.0 if step < 20 else 100.0 + 20 * (step - 20)


def log_of_a_run(steps, *, triggered):
    """Rows as our loop writes them: the rate of the update, and after it the factor."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8)
    base = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)
    schedule = LengthTriggeredLR(optimizer, base, **SMALL) if triggered else base
    rows = []
    for step in range(steps):
        row = {"update": step + 1, "length": length_at(step), "lr": optimizer.param_groups[0]["lr"]}
        optimizer.step()
        if triggered:
            schedule.observe(length_at(step))
            row["length_rate/factor"] = schedule.factor
            row["length_rate/triggered"] = float(schedule.triggered_at is not None)
        schedule.step()
        rows.append(row)
    return rows


def test_the_replay_of_a_run_is_what_the_run_did():
    ran = log_of_a_run(90, triggered=True)
    assert min(row["length_rate/factor"] for row in ran) <= 0.25
    for rows in (log_of_a_run(90, triggered=False), ran):  # its own factor is divided out first
        found = replay(rows, LengthDetector(**SMALL))
        assert found.replayed == pytest.approx([row["lr"] for row in ran], rel=1e-12)
        assert found.triggered_at == next(r["update"] for r in ran if r["length_rate/triggered"])
        assert found.baseline == 100.0


@pytest.mark.parametrize(
    "row",
    [
        lambda s, n: {"step": s, "data": {"response_length/mean": n, "actor/lr": 0.1}},  # verl
        lambda s, n: {"step": s, "completions/mean_length": n, "learning_rate": 0.1},  # TRL
        lambda s, n: {"training/global_step": s, "x": {"y": {"mean_length": n}}, "lr": 0.1},
    ],
)
def test_logs_of_others_are_read(row):
    rows = [row(s + 1, length_at(s)) for s in range(60)]
    rows.insert(3, {"note": "a row without a length", "evaluation": None})
    found = replay(rows, LengthDetector(**SMALL))
    expected = replay(log_of_a_run(60, triggered=False), LengthDetector(**SMALL))
    assert found.triggered_at == expected.triggered_at and found.lengths == expected.lengths


def test_periods_count_in_steps_where_only_every_tenth_was_logged():
    rows = [{"step": 10 * i, "length": length_at(i), "lr": 1.0} for i in range(90)]
    found = replay(rows, LengthDetector(**SMALL))
    s = found.triggered_at
    falls = [
        step for step, a, b in zip(found.steps[1:], found.replayed, found.replayed[1:]) if b < a
    ]
    assert falls[:2] == [2 * s, 3 * s]


def test_the_command_says_when_and_draws(tmp_path, capsys, caplog):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in log_of_a_run(90, triggered=False)))
    options = [f"--detector.{name}={value}" for name, value in SMALL.items()]
    with caplog.at_level(logging.WARNING):
        main(["length-trigger", str(log), *options])
    out = capsys.readouterr().out
    assert "would have fired at step 25: smoothed length 161.2 tokens" in out
    assert "the rate falls every 24 steps from there" in out
    assert "step 49: learning rate 0.4 in place of 0.8 (factor 0.5)" in out
    assert "lr = lr" in out and not caplog.records
    picture = tmp_path / "metrics.length_trigger.png"
    assert str(picture) in out and picture.read_bytes()[:4] == b"\x89PNG"
    main(["length-trigger", str(log), "--plot", str(tmp_path / "p.png"), "--detector.ratio=99"])
    out = capsys.readouterr().out
    assert "would not have fired" in out and (tmp_path / "p.png").is_file()
    main(["length-trigger", str(log), *options, "--detector.mode=alert"])
    assert "mode alert" in capsys.readouterr().out


def test_joint_numbers_come_from_the_log():
    rows = log_of_a_run(90, triggered=False)
    for row in rows:
        row["grad_norm"] = 1.0 if row["update"] < 60 else 3.0
    alone = replay(rows, LengthDetector(**SMALL))
    joint = replay(rows, LengthDetector(**SMALL, joint={"grad_norm": 2.0}))
    assert alone.triggered_at == 25 and joint.triggered_at == 61
    assert joint.keys["grad_norm"] == "grad_norm"
    with pytest.raises(ValueError, match=r"--mismatch_key: expected one of mismatch/k3"):
        replay(rows, LengthDetector(**SMALL, joint={"mismatch": 2.0}))


def test_what_is_logged_now_and_then_is_held_in_between():
    """A number that is not there has not risen."""
    rows = log_of_a_run(90, triggered=False)
    for row in rows[::10]:
        row["mismatch/k3"] = 1e-4
    detector = LengthDetector(**SMALL, joint={"mismatch": 1.5})
    found = replay(rows, detector)
    assert found.triggered_at is None
    said = describe(found, LengthDetector(**SMALL, joint={"mismatch": 1.5}))
    assert "the length surged at step 25, but mismatch had not risen with it" in said


def test_numbers_in_rows_of_their_own_are_held():
    rows = []
    for row in log_of_a_run(60, triggered=False):
        rows += [
            {"step": row["update"], "length": row["length"]},
            {"step": row["update"], "lr": 0.5},
        ]
        rows.append({"grad_norm": 1.0 if row["update"] < 30 else 9.0})
    found = replay(rows, LengthDetector(**SMALL, joint={"grad_norm": 2.0}))
    assert found.rates == [0.5] * 60 and found.triggered_at == 31
    for row in rows:
        if "grad_norm" in row:
            row["grad_norm"] = None
    with pytest.raises(ValueError, match="--grad_norm_key: expected numbers under grad_norm"):
        replay(rows, LengthDetector(**SMALL, joint={"grad_norm": 2.0}))


def test_steps_that_only_some_rows_have_do_not_count():
    rows = log_of_a_run(60, triggered=False)
    for row in rows:
        step = row.pop("update")
        if step % 10 == 0:
            row["global_step"] = 1000 + step
    found = replay(rows, LengthDetector(**SMALL))
    assert found.steps == list(range(60)) and found.skipped == 0 and "step" not in found.keys
    assert "no fall within this log" in describe(
        replay(rows[:30], LengthDetector(**SMALL)), LengthDetector(**SMALL)
    )


def test_rows_that_a_resumed_run_wrote_again_are_passed_over():
    whole = log_of_a_run(90, triggered=False)
    abandoned = [row | {"length": 9e3} for row in whole[20:40]]
    found = replay(whole[:20] + abandoned + whole[20:], LengthDetector(**SMALL))
    expected = replay(whole, LengthDetector(**SMALL))
    assert found.skipped == 20 and found._replace(skipped=0) == expected
    assert "(20 rows passed over: " in describe(found, LengthDetector(**SMALL))


def test_a_critics_rate_and_a_timers_step_are_not_taken_for_the_policys():
    rows = [
        {
            "data": {
                "timing_s/step": 30.5,
                "critic/lr": 1e-5,
                "critic/grad_norm": 7.0,
                "actor/lr": 1e-6,
                "actor/grad_norm": 0.3,
                "response_length/mean": length_at(i),
            }
        }
        for i in range(60)
    ]
    found = replay(rows, LengthDetector(**SMALL))
    assert found.rates == [1e-6] * 60 and found.steps == list(range(60))
    assert found.keys["grad_norm"] == "data/actor/grad_norm" and "step" not in found.keys


def test_rows_without_a_finite_length_are_counted_and_strings_of_numbers_read():
    rows = log_of_a_run(60, triggered=False)
    expected = replay(rows, LengthDetector(**SMALL))
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    rows.insert(2, {"update": 2.5, "length": float("nan"), "lr": 1.0})
    found = replay(rows, LengthDetector(**SMALL))
    assert found.skipped == 1 and found.triggered_at == expected.triggered_at


def test_our_own_factor_is_divided_out_where_others_put_it():
    ran = log_of_a_run(60, triggered=True)
    nested = [{"train": row, "update": row["update"]} for row in ran]
    found = replay(nested, LengthDetector(**SMALL))
    assert found.rates == pytest.approx(replay(ran, LengthDetector(**SMALL)).rates)


def test_truncated_responses_are_read():
    rows = log_of_a_run(20, triggered=False)
    for row in rows[10:]:
        row["truncated"] = 1.0
    assert replay(rows, LengthDetector(**SMALL)).triggered_at == 15  # 1 - 0.5^5 of all


def test_a_log_shorter_than_the_warm_up_and_one_of_zeros():
    rows = [{"step": i, "length": 0.0, "lr": 1.0} for i in range(1, 4)]
    assert "shorter than the warm-up" in describe(replay(rows, LengthDetector()), LengthDetector())
    rows = [{"step": i, "length": 0.0, "lr": 1.0} for i in range(1, 10)]
    found = replay(rows, LengthDetector(**SMALL))
    assert "baseline is 0 tokens" in describe(found, LengthDetector(**SMALL))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('{"step": 1, "length": 5}\n', [], "lr: expected a learning rate in every row"),
        ('{"step": 1, "lr": 5}\n', [], "--length_key: expected one of response_length/mean"),
        ('{"length": "long", "lr": 1}\n', [], "length: expected a number in the log, got 'long'"),
        ('{"a/lr": 1, "b/lr": 2, "length": 3}\n', [], "--lr_key: expected one key, the log has a/"),
        ('{"step": NaN, "length": 5, "lr": 1}\n', [], "step: expected finite numbers under 'step'"),
        ('{"length": 5, "lr": 1}\n', ["--length_key=size"], "--length_key: expected one of size"),
        ("[1, 2]\n", [], "expected a JSON object in each line"),
        ("{\n{}\n", [], "m.jsonl:1: not JSON"),
        ("", [], "--length_key"),
        ('{"length": 5, "lr": 1}\n', ["--detector.ratio=0.5"], "ratio: expected"),
        (
            '{"length": 5, "lr": 1}\n',
            ["--plot=no/where.png"],
            "--plot: expected a file in a folder",
        ),
        (None, [], "expected a metric log"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, text, arguments, message):
    log = tmp_path / "m.jsonl"
    if text is not None:
        log.write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["length-trigger", str(log), *arguments])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ([] if text is None else ["m.jsonl"])


# Edits to rl/length_trigger.py that must turn this file red:
#   first = 1 if steps[:1] == [1] else 0  ->  0
#   rate / factor  ->  rate
#   name.endswith(f"/{key}")  ->  False
#   step=step,  ->  step=len(factors) - 1
