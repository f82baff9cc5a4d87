import json

import pytest
import yaml
from pages import Page, offline

from trimtab.rl.cli import main
from trimtab.rl.compare import comparison_page, differences, named_runs
from trimtab.rl.run_record import figures, read_run, wall_seconds


def made(folder, lr, rewards, *, before=None, after=None, seconds=0.5, extra=None):
    """A finished run: rewards of its updates, 8 rollouts of 10 tokens each in every one."""
    folder.mkdir(parents=True)
    config = {"updates": len(rewards), "run_dir": str(folder), "update": {"lr": lr} | (extra or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"update": i, "reward": reward, "length": 10.0, "rollouts": 8.0, "skipped_updates": 1}
        | {"time/rollout": seconds, "time/reward": 0.25, "time/update": 2 * seconds}
        for i, reward in enumerate(rewards, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"updates": len(rewards)}
    if before is not None:
        summary |= {"before": {"sampled": before}, "after": {"sampled": after, "greedy": 0.875}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a", 0.001, [i / 20 for i in range(12)], before=0.25, after=0.75)
    made(tmp_path / "b", 0.002, [0.5, 0.25], extra={"pruning": {"rho": 0.5}})
    return tmp_path


def printed(capsys, *arguments):
    main(["compare", *arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert stop.value.code == 2 and out == ""
    return line.removeprefix("trimtab-rl: error: ")


def cells(text, title):
    line = next(line for line in text.splitlines() if line.startswith(f"│ {title} "))
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_figures_by_hand(runs):
    found = figures(read_run("a"))
    assert found["updates"] == 12 and found["skipped updates"] == 1
    assert (found["sampled accuracy before"], found["sampled accuracy after"]) == (0.25, 0.75)
    assert (found["greedy accuracy before"], found["greedy accuracy after"]) == (None, 0.875)
    # rewards 2/20 .. 11/20 in the last ten
    assert found["mean reward, last 10 updates"] == pytest.approx(0.325)
    assert found["mean length, last 10 updates (tokens)"] == 10.0
    assert found["wall time (s)"] == pytest.approx(12 * (0.5 + 0.25 + 1.0))
    assert found["tokens"] == 12 * 80
    assert found["rollout (tokens/s)"] == 160 and found["update (tokens/s)"] == 80
    assert figures(read_run("b"))["mean reward, last 10 updates"] == pytest.approx(0.375)


def test_rollouts_made_ahead_count_by_what_was_waited_for_them():
    row = {"time/rollout": 9.0, "time/reward": 4.0, "time/update": 2.0}
    assert wall_seconds([row, row]) == {"rollout": 18.0, "reward": 8.0, "update": 4.0}
    assert wall_seconds([row | {"time/wait": 0.5}] * 2) == {"wait": 1.0, "update": 4.0}


def test_the_tables(runs, capsys):
    text = printed(capsys, "a", "b")
    assert cells(text, "state") == ["finished", "finished"]
    assert cells(text, "updates") == ["12", "2"]
    assert cells(text, "sampled accuracy after") == ["0.75", "-"]
    assert cells(text, "mean reward, last 10 updates") == ["0.325", "0.375"]
    assert cells(text, "tokens") == ["960", "160"]
    assert cells(text, "update.lr") == ["0.001", "0.002"]
    assert cells(text, "update.pruning.rho") == ["-", "0.5"]
    assert "run_dir" not in text


def test_what_differs():
    one = {"run_dir": "x", "a": {"b": 1, "c": [1, 2]}, "d": None}
    other = {"run_dir": "y", "a": {"b": 2, "c": [1, 2]}, "d": {"e": 3}}
    assert differences([one, other]) == {
        "a.b": ["1", "2"],
        "d": ["None", "-"],
        "d.e": ["-", "3"],
    }
    assert differences([one, one]) == {}


def test_runs_that_are_alike_and_names_that_are(runs, capsys):
    made(runs / "elsewhere" / "a", 0.001, [i / 20 for i in range(12)])
    text = printed(capsys, "a", "elsewhere/a/")
    assert "differences in the configuration: none" in text
    assert list(named_runs(["a", "elsewhere/a/"])) == ["a", "elsewhere/a"]
    (runs / "x[red]").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (runs / "x[red]" / name).write_text((runs / "a" / name).read_text())
    assert "x[red]" in printed(capsys, "a", "x[red]")


def test_an_unfinished_run_without_metrics(runs, capsys):
    (runs / "new").mkdir()
    (runs / "new" / "config.yaml").write_text("updates: 7")
    text = printed(capsys, "a", "new", "--output", "c.html")
    assert cells(text, "state") == ["finished", "unfinished: 0 of 7 updates"]
    assert cells(text, "tokens") == ["960", "-"]
    (runs / "old").mkdir()
    (runs / "old" / "config.yaml").write_text("updates: 7")
    line = refused(capsys, "old", "new", "--output=c.png")
    assert line == "--output: none of old, new has metrics to draw"


def test_the_page_overlays_the_curves(runs, capsys):
    out = printed(capsys, "a", "b", "--output", "c.html")
    assert out.endswith("c.html\n")
    page = Page((runs / "c.html").read_text())
    offline(page)
    headings = page.headings()
    assert headings[:3] == ["Final figures", "Differences in the configuration", "Training"]
    tips = [text for where, text in page.texts if where == "title"]
    assert "a: first 0, last 0.55" in tips and "b: first 0.5, last 0.25" in tips
    assert "seconds" in page.headings("text")
    assert {"a", "b"} <= set(page.headings("text")) and {"a", "b"} <= set(page.headings("th"))


def test_names_are_escaped(runs):
    (runs / "a").rename(runs / "<script>")
    page = Page(comparison_page(named_runs(["<script>", "b"])))
    offline(page)
    assert "<script>" in page.headings("th")


def test_the_picture(runs, capsys):
    assert printed(capsys, "a", "b", "--output=c.png").endswith("c.png\n")
    data = (runs / "c.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    assert not list(runs.glob(".c*"))


def test_bad_arguments_are_one_line(runs, capsys):
    expected = "compare: expected two or more run folders, got "
    assert refused(capsys) == f"{expected}[]"
    assert refused(capsys, "a") == f"{expected}['a']"
    assert refused(capsys, "a", "c") == "c is no run folder (no config.yaml in it)"
    assert refused(capsys, "a", "./a") == "compare: expected each run once, got a twice"
    line = "--output: expected a file.html or file.png, got c.pdf"
    assert refused(capsys, "a", "b", "--output", "c.pdf") == line
    line = "--output: expected a file in a folder that exists, got no/c.png"
    assert refused(capsys, "a", "b", "--output", "no/c.png") == line
    assert "--outptu" in refused(capsys, "a", "b", "--outptu", "c.png")


# Edits that must turn this file red:
#   rl/run_record.py: rows[-LAST:]                     ->  rows
#   rl/run_record.py: tokens: rollouts * length        ->  length
#   rl/compare.py: key != "run_dir"                    ->  removed
#   rl/compare.py: Text(name)                         ->  name       (styles are read)
#   rl/compare.py: folders.count(folder) > 1           ->  never
