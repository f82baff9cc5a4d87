import json

import pytest
from pages import Page, offline
from tiny_run import run_here, write_recipe

from trimtab.rl.cli import main
from trimtab.rl.families import chart_title, charts, family_of, line_name
from trimtab.rl.html_parts import number_text
from trimtab.rl.html_report import html_report, write_html_report
from trimtab.rl.html_transcripts import spread_out
from trimtab.rl.recording import read_rows
from trimtab.rl.run_record import read_run
from trimtab.rl.svg import line_chart, nice_ticks, thinned

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'"'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder, {"updates": 12})
    run_here(["--config", "recipe.yaml", "--run_dir", "out"], folder)
    return folder / "out"


def made(folder, rows=(), transcripts=(), config="updates: 5\n", **files):
    """A run's folder by hand; only what is given is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    for name, lines in (("metrics", rows), ("transcripts", transcripts)):
        if lines:
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (folder / f"{name}.jsonl").write_text(text)
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


# ---------------------------------------------------------------- a real run


def test_a_finished_run_has_its_page(finished):
    text = (finished / "report.html").read_text()
    page = Page(text)
    offline(page)
    assert page.headings("h1") == ["out - finished"] and len(text) < 300_000
    sections = page.headings()
    assert sections[:2] == ["Summary", "Training"]
    assert sections[-2:] == ["Transcripts", "Configuration"]
    families = ("Trust region", "Vocabulary pruning", "Gradient variance", "Groups", "Wall time")
    for title in (*families, "Mismatch of rollout and trainer", "Length-triggered learning rate"):
        assert title in sections, title
    summary = json.loads((finished / "summary.json").read_text())
    for when in ("before", "after"):
        assert number_text(summary[when]["sampled"]) in page.all_text()
    assert "trimtab.rl.tasks.JsonLinesTask" in page.all_text()  # the configuration
    assert "2.13" in page.all_text() or "torch" in page.all_text()  # versions
    transcript = read_rows(finished / "transcripts.jsonl")[-1]
    assert transcript["completion"] in [text for where, text in page.texts if where == "pre"]
    rows = read_rows(finished / "metrics.jsonl")
    shown = page.all_text()
    for name in ("grad_norm", "mismatch/k1 (nats)", "trust_region/mean_before", "variance/signal"):
        assert name in shown, name
    assert f"last {rows[-1]['grad_norm']:.4g}" in shown  # the tooltip of its line


def test_the_command_writes_both_again(finished, monkeypatch, capsys):
    for name in ("report.html", "report.png"):
        (finished / name).unlink()
    monkeypatch.chdir(finished.parent)
    main(["report", "out"])
    assert capsys.readouterr().out == "out/report.png\nout/report.html\n"
    assert (finished / "report.html").is_file() and (finished / "report.png").is_file()
    assert not list(finished.glob(".report*"))  # nothing half written stays


def test_a_broken_file_does_not_break_the_end_of_a_run(tmp_path):
    write_recipe(tmp_path, {"updates": 2})
    run_here(["--config", "recipe.yaml", "--run_dir", "out"], tmp_path)
    (tmp_path / "out" / "eval-by-hand.json").write_text("{")
    output = run_here(["--resume", "out", "--updates", "3"], tmp_path)
    assert "report.html is not written: " in output and "eval-by-hand.json: not JSON" in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["updates"] == 3


# ---------------------------------------------------------------- any run


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"rows": [{"update": 1, "reward": 0.5}]},
        {"rows": [{"update": 1}]},
        {"rows": [{"update": 1, "reward": None}, {"update": 2, "reward": 0.5, "length": 3.0}]},
        {"transcripts": [{"update": 1}]},
        {"summary": {"before": {"sampled": None, "by_label": {}}}},
        {"environment": {"versions": {"torch": "2.13"}}},
    ],
    ids=["config", "one row", "no metric", "gaps", "transcript", "before", "environment"],
)
def test_parts_may_be_missing(tmp_path, parts):
    page = Page(write_html_report(made(tmp_path / "run", **parts)).read_text())
    offline(page)
    done = len(parts.get("rows", ()))
    assert page.headings("h1") == [f"run - unfinished: {done} of 5 updates"]
    assert ("Training" in page.headings()) == bool(done)
    assert ("Transcripts" in page.headings()) == ("transcripts" in parts)


def test_everything_of_a_run_is_escaped(tmp_path):
    row = {"update": 1, "reward": 0.5, f"{HOSTILE}/x": 1.0, f"new/{HOSTILE}": 2.0}
    texts = {name: HOSTILE for name in ("problem", "prompt", "completion", "finish_reason")}
    label = {HOSTILE: [0.5, 0.5]}
    evaluation = {"split": HOSTILE, "update": HOSTILE, "results": {HOSTILE: {"value": HOSTILE}}}
    folder = made(
        tmp_path / "run",
        rows=[row, row | {"update": 2, "reward": 0.7, f"new/{HOSTILE}": 3.0}],
        transcripts=[{"update": i, "reward": 0.5, "tokens": HOSTILE, **texts} for i in (1, 2)],
        config=json.dumps({"updates": 5, HOSTILE: HOSTILE}),
        environment={HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}},
        summary={"before": {"sampled": 0.1, "by_label": label}, "after": {"by_label": label}},
    )
    (folder / "eval-heldout-1.json").write_text(json.dumps(evaluation))
    page = Page(html_report(read_run(folder)))
    offline(page)
    assert sum(HOSTILE in text for _, text in page.texts) > 10


def test_a_family_nobody_knows_has_its_section(tmp_path):
    rows = [{"update": i, "novel_thing/rate": i / 3, "novel_thing/flat": 2.0} for i in (1, 2, 3)]
    page = Page(html_report(read_run(made(tmp_path / "run", rows=rows))))
    assert "novel thing" in page.headings()
    assert any(where == "text" and text == "novel_thing/rate" for where, text in page.texts)
    assert "the same in every update: novel_thing/flat = 2" in page.all_text()


def test_a_long_run_stays_below_two_megabytes(tmp_path):
    names = [f"family{i % 12}/metric_{chr(97 + i // 12)}" for i in range(600)]
    rows = [
        {"update": u} | {name: (u * 7919 * (i + 1)) % 1009 / 1009 for i, name in enumerate(names)}
        for u in range(1, 1001)
    ]
    transcripts = [
        {"update": u, "problem": f"train/{i}", "prompt": "q" * 20_000, "completion": "a" * 50_000}
        | {"reward": 1.0, "tokens": 50_000}
        for u in range(1, 60, 3)
        for i in range(10)
    ]
    folder = made(tmp_path / "run", rows=rows, transcripts=transcripts)
    assert write_html_report(folder).stat().st_size < 2_000_000


def test_the_same_problem_side_by_side(tmp_path):
    transcripts = [
        {"update": u, "problem": f"train/{p}", "prompt": f"prompt {p}", "reward": u / 10}
        | {"completion": f"answer {p} of {u}", "tokens": u, "finish_reason": "length"}
        for u in (1, 4, 7, 8, 9, 10)
        for p in (0, u)
    ]
    folder = made(tmp_path / "run", transcripts=transcripts)
    page = Page(html_report(read_run(folder)))
    assert page.headings("h3") == ["The same problem across the training"]
    heads = page.headings("th")
    assert heads[:5] == ["update 1", "update 4", "update 7", "update 9", "update 10"]
    answers = [text for where, text in page.texts if where == "pre" and "answer" in text]
    assert answers[:5] == [f"answer 0 of {u}" for u in (1, 4, 7, 9, 10)]
    assert "reward 0.1, 1 tokens, cut at the limit" in page.headings("b")
    by_update = Page(html_report(read_run(made(tmp_path / "b", transcripts=transcripts[1::2]))))
    assert by_update.headings("h3") == [] and by_update.headings("th")[:2] == heads[:2]


def test_files_that_no_run_writes_are_named(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        write_html_report(tmp_path)
    for name, text, message in (
        ("config.yaml", "a: [", r"config\.yaml: not YAML"),
        ("config.yaml", "- a", r"config\.yaml: expected configuration keys"),
        ("summary.json", "{", r"summary\.json: not JSON"),
        ("summary.json", "[]", r"summary\.json: expected a JSON object"),
        ("metrics.jsonl", '{"reward": 1}\n', r"metrics\.jsonl:1: expected an object with its"),
        ("transcripts.jsonl", "3\n3\n", r"transcripts\.jsonl:1: expected an object"),
    ):
        folder = made(tmp_path / name / str(len(message)))
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            write_html_report(folder)


# ---------------------------------------------------------------- charts


def test_metrics_that_belong_together_share_a_chart():
    names = ["reward", "mismatch/k3", "mismatch/k3/p_0.1_0.5", "mismatch/k3/p_1e-4_0.1"]
    names += ["mismatch/k3/length_0_16", "new/a_mean", "new/a_max", "new/b", "time/update"]
    names += ["time/rollout", "mismatch/ratio_std"]
    found = charts(names)
    assert list(found) == ["", "time", "mismatch", "new"]
    assert found["mismatch"] == {
        "mismatch/k3": ["mismatch/k3"],
        "mismatch/k3/p": ["mismatch/k3/p_1e-4_0.1", "mismatch/k3/p_0.1_0.5"],
        "mismatch/k3/length": ["mismatch/k3/length_0_16"],
        "mismatch/ratio_std": ["mismatch/ratio_std"],
    }
    assert found["new"] == {"new/a": ["new/a_mean", "new/a_max"], "new/b": ["new/b"]}
    assert sorted(found["time"]["time"]) == ["time/rollout", "time/update"]
    assert [family_of(n) for n in ("reward", "a/b/c", "epoch_2/a/b", "epoch_2/loss")] == [
        "", "a", "a", "",
    ]  # fmt: skip
    assert charts(["loss", "epoch_2/loss"]) == {"": {"loss": ["loss", "epoch_2/loss"]}}
    assert line_name("epoch_2/loss", "loss") == "loss, epoch 2"
    assert charts(["epoch_2/mismatch/k1", "epoch_2/mismatch/k3"])["mismatch"].keys() == {
        "mismatch/k1", "mismatch/k3",
    }  # fmt: skip
    assert len(charts(["budget/rollouts_0_0.25", "budget/rollouts_none"])["budget"]) == 1
    assert line_name("mismatch/k3/p_1e-4_0.1", "mismatch/k3/p") == "1e-4 to 0.1"
    assert line_name("new/a_max", "new/a") == "max" and line_name("new/b", "new/b") == "b"
    assert chart_title("mismatch/k3", ["mismatch/k3"]) == "mismatch/k3 (nats)"
    assert chart_title("new/b", ["new/b"]) == "new/b"


def test_a_chart_has_its_points_where_they_belong():
    svg = line_chart({"a": [(0, 0.0), (1, 5.0), (2, 10.0)]}, "t <b>", zero=True)
    page = Page(svg)
    (points,) = [value for name, value in page.attributes if name == "points"]
    xy = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in xy] == pytest.approx([52, 221, 390])
    assert xy[0][1] - xy[1][1] == pytest.approx(xy[1][1] - xy[2][1], abs=0.2) and xy[0][1] == 166
    assert "t <b>" in page.headings("text") and "a: first 0, last 10" in page.all_text()


def test_gaps_spikes_and_logarithms():
    nan = float("nan")
    svg = line_chart(
        {"a": [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, nan), (5, 4.0), (6, 5.0)]}, "t"
    )
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 1
    assert line_chart({"a": [(0, None), (1, nan)]}, "t") == "" == line_chart({}, "t")
    log = line_chart({"a": [(0, 0.001), (1, 0.0), (2, 1.0), (3, 1000.0)]}, "t", log=True)
    assert log.count("<polyline") == 1 and all(f">{tick}<" in log for tick in ("0.1", "10"))
    assert line_chart({"a": [(0, -1.0), (1, -2.0)]}, "t", log=True).count("<polyline") == 1
    long = [(i, 1000.0 if i == 3333 else float(i % 7)) for i in range(10_000)]
    short = thinned(long, 100)
    assert len(short) <= 100 and (3333, 1000.0) in short and short == sorted(short)
    assert thinned(long[:50], 100) == long[:50]
    for low, high in ((0, 1), (-3e-9, 7e-9), (1e6, 1e6 + 3), (0.97, 1.01)):
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] < ticks[-1] <= high + 1e-9
    flat = line_chart({"a": [(1, 3.0)], "b": [(1, 3.0)]}, "t", marks={"m": 1.0})
    assert flat.count("<circle") == 2 and "m" in Page(flat).headings("text")


def test_numbers_for_people():
    shown = [number_text(v) for v in (None, 3, 12345, 0.12345, 1234.56, 1e-7, "x", True, 2.0)]
    assert shown == ["-", "3", "12,345", "0.1235", "1,234.6", "1e-07", "x", "True", "2"]
    assert spread_out(range(10), 4) == [0, 3, 6, 9] and spread_out([1, 2], 5) == [1, 2]


# Edits that must turn this file red:
#   rl/html_transcripts.py: escape(cut(...)) in _answer        ->  cut(...)
#   rl/html_transcripts.py: cut(text)                          ->  text          (size of the page)
#   rl/html_report.py: points=points in _families         ->  removed       (size of the page)
#   rl/svg.py: html.escape in _text                       ->  text
#   rl/svg.py: chosen in thinned                          ->  {known[0][0]} (spikes go)
#   rl/families.py: members.sort(key=_bucket)             ->  removed
#   rl/run.py: self._write_page()  # it says              ->  removed
#   rl/run.py: except ValueError in _write_page           ->  removed
