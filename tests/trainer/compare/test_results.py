"""Means over seeds, and the table that is made of them."""

import statistics

import pytest

from tests.trainer.compare.small import results
from trainer.compare import table
from trainer.compare.results import spread, summarise


def row(arm, seed, state="finished", **values):
    return {"arm": arm, "seed": seed, "state": state, "folder": f"{arm}-{seed}", "reason": "NaN", **values}


ROWS = [
    row("a", 0, knn=0.5, linear=0.6, knn_before=0.3),
    row("b", 0, knn=0.7, linear=0.5, knn_before=0.3),
    row("a", 1, knn=0.6, linear=0.6, knn_before=0.3),
    row("b", 1, "collapsed"),
    row("c", 0, "collapsed"),
    row("c", 1, "unfinished"),
]
FACTS = {"steps": 1000, "batch_size": 8, "images": 8000, "epochs": 2.5, "images_per_second": 40.0, "minutes": 3.3}


def found(baseline=None, rows=ROWS, **budget):
    arms = ("a", "b", "c")
    return {
        "budget": {"max_steps": 1000, "minutes": None, "clock": "processor time", **budget}
        | {"arms": dict.fromkeys(arms, FACTS)},
        "data": "pairs",
        "bank": 90,
        "queries": 10,
        "queries_are": "held out",
        "classes": 4,
        "k": 20,
        "temperature": 0.07,
        "pixels": {"knn": 0.25, "linear": 0.35},
        "baseline": baseline,
        "equal": ["data", "run"],
        "differing": {"method.name": {}, "method.lr": {}, "mix.policy": {}, "optim.lr": {}, "optim.clip": {}},
        "runs": rows,
        "summary": [summarise(arm, rows) for arm in arms],
    }


def test_the_spread_over_seeds():
    assert spread([0.5, 0.6]) == {"mean": 0.55, "std": pytest.approx(statistics.stdev([0.5, 0.6])), "n": 2}
    assert spread([0.5]) == {"mean": 0.5, "std": None, "n": 1}


def test_only_finished_seeds_count():
    counts = {one["arm"]: (one["n"], one["collapsed"], one["unfinished"]) for one in found()["summary"]}
    assert counts == {"a": (2, 0, 0), "b": (1, 1, 0), "c": (0, 1, 1)}
    assert "knn" not in summarise("c", ROWS)


def test_the_table():
    header, a, b, c, pixels = table.cells(found())
    assert header[:6] == ["arm", "kNN", "linear", "kNN before", "rank", "seeds"]
    assert a[:6] == ["a", "55.0 ± 7.1", "60.0 ± 0.0", "30.0 ± 0.0", "-", "2"]
    assert b[:6] == ["b", "70.0", "50.0", "30.0", "-", "1 (+1 collapsed)"]
    assert c[:6] == ["c", "collapsed", "collapsed", "-", "-", "0 (+1 collapsed)"]
    assert a[6:10] == ["1,000", "8,000", "40", "3.30"]
    assert pixels[:3] == ["raw pixels", "25.0", "35.0"]
    assert len({len(line) for line in (header, a, b, c, pixels)}) == 1


def test_differences_to_a_baseline():
    header, a, b, c, pixels = table.cells(found("a"))
    assert header[3:5] == ["kNN vs a", "linear vs a"]
    assert [line[3:5] for line in (a, b, c, pixels)] == [["+0.0", "+0.0"], ["+15.0", "-10.0"], ["-", "-"], ["-", "-"]]


def test_text_and_markdown_say_the_same():
    text, markdown = table.text(found("a")), table.markdown(found("a"))
    for said in (
        "Budget of every run: 1,000 steps of 8 images, 8,000 images (2.5 epochs",
        "3.30 minutes of processor time (minutes and images/s by the time of a step, measured before)",
        "Equal in all arms: data, run. Not equal: method, mix (policy), optim (lr, clip).",
        "one query is 10 points, chance 25.0 %",
        "b-1 collapsed: NaN",
        "Not finished yet: c-1.",
    ):
        assert said in text
        assert said in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert {line.count("|") for line in lines} == {14}, "thirteen columns"


def test_a_budget_of_minutes_says_what_is_not_equal():
    text = table.text(found(max_steps=None, minutes=2.0))
    assert "Budget of every run: 2 minutes of processor time" in text
    assert "Steps (1,000), images and epochs (2.5) are not equal" in text


def test_on_a_gpu_speed_is_that_of_the_training():
    rows = [row("a", 0, images_per_second=80.0, seconds=90.0), *ROWS[1:2], *ROWS[4:5]]
    assert [line[8:10] for line in table.cells(found(rows=rows, clock="wall time"))[1:]] == [
        ["80", "1.50"],
        ["-", "-"],
        ["-", "-"],
        ["-", "-"],
    ]


def test_of_a_real_comparison(finished):
    out, _ = finished
    assert (out / "table.md").read_text() == table.markdown(results(out))
