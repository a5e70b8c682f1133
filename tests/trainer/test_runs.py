"""The list of runs: states, numbers, and files that are torn, empty or of another kind."""

import fcntl
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from trainer.runs import RunSummary, list_runs, runs_text

CONFIG = """
method: {name: dino, settings: {momentum: 0.99}}
mix: {policy: diffmix}
encoder: {name: vit_tiny_patch16_224, args: {patch_size: 8}}
run: {epochs: 100, max_steps: 500, batch_size: 128, seed: 0}
"""
METRICS = [
    {"step": 1, "epoch": 0, "loss": 5.0, "images_per_second": 10.0},
    {"step": 100, "epoch": 1, "knn": 0.9125, "feature_rank": 7.0},
    {"step": 120, "epoch": 1, "loss": 2.5, "images_per_second": 812.4},
]
RESULTS = {"state": "finished", "method": "dino", "mix": "real", "encoder": "resnet18", "steps": 500, "knn": 0.97,
           "loss": 1.25, "seconds": 80.0}  # fmt: skip


def make_run(folder, config=CONFIG, metrics=METRICS, results=None, tail=""):
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + tail)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def only(root):
    [run] = list_runs(root)
    return run


def test_a_stopped_run(tmp_path):
    make_run(tmp_path / "a")
    assert only(tmp_path) == RunSummary(
        name="a", path=str(tmp_path / "a"), state="stopped", method="dino", mix="diffmix",
        encoder="vit_tiny_patch16_224", step=120, total=500, knn=0.9125, loss=2.5, images_per_second=812.4,
    )  # fmt: skip


def test_the_runs_of_a_comparison(tmp_path):
    make_run(tmp_path / "compare", results={"state": "unfinished", "method": "compare"})
    (tmp_path / "compare/budget.json").write_text("{}")
    make_run(tmp_path / "compare/real-0")
    make_run(tmp_path / "compare/diffmix-0")
    assert [run.name for run in list_runs(tmp_path / "compare")] == ["diffmix-0", "real-0"]
    assert [run.method for run in list_runs(tmp_path)] == ["compare"]


def test_the_state_of_a_comparison(tmp_path):
    folder = make_run(tmp_path / "compare", results={"state": "unfinished", "method": "compare"})
    (folder / "budget.json").write_text("{}")
    make_run(folder / "real-0")
    assert only(tmp_path).state == "stopped", "a table is written after every run"
    with (folder / "real-0/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert only(tmp_path).state == "running"
    (folder / "results.json").write_text(json.dumps({"state": "finished", "method": "compare"}))
    assert only(tmp_path).state == "finished"


def test_a_finished_run_says_what_its_results_say(tmp_path):
    make_run(tmp_path / "a", results=RESULTS)
    run = only(tmp_path)
    assert (run.state, run.step, run.knn, run.loss, run.mix, run.encoder) == (
        "finished", 500, 0.97, 1.25, "real", "resnet18",
    )  # fmt: skip
    assert run.images_per_second == 812.4  # what results lack, the metrics have


@pytest.mark.parametrize("state", ["failed", "collapsed"])
def test_a_failed_run(tmp_path, state):
    make_run(tmp_path / "a", results={"state": state, "steps": 120, "loss": float("nan")})
    run = only(tmp_path)
    assert (run.state, run.step, run.loss) == ("failed", 120, None)


def test_a_locked_run_is_running_until_the_lock_goes(tmp_path):
    folder = make_run(tmp_path / "a")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert only(tmp_path).state == "running"
    assert only(tmp_path).state == "stopped"  # the lock file of a dead job holds nothing


def test_looking_leaves_the_lock_free(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / ".lock").touch()
    list_runs(tmp_path)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_order_and_what_is_no_run(tmp_path):
    for name in ("b", "a", "c"):
        make_run(tmp_path / name)
    make_run(tmp_path / ".hidden")
    (tmp_path / "data").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b", "c"]
    assert [run.name for run in list_runs(tmp_path / "b")] == ["b"]


def test_without_max_steps_the_results_or_metrics_know_the_total(tmp_path):
    config = CONFIG.replace("max_steps: 500", "max_steps: null")
    make_run(tmp_path / "a", config=config)
    make_run(tmp_path / "b", config=config, metrics=[{"step": 3, "total_steps": 90}])
    assert [run.total for run in list_runs(tmp_path)] == [None, 90]


@pytest.mark.parametrize(
    "broken",
    [
        {"config": "method: [unclosed"},
        {"config": "just text"},
        {"config": ""},
        {"config": "method: dino\nmix: 3"},
        {"config": "a: !!python/object/apply:os.system ['touch pwned']"},
    ],
)
def test_broken_settings_leave_gaps(tmp_path, broken):
    make_run(tmp_path / "a", **broken)
    run = only(tmp_path)
    assert (run.method, run.mix, run.total, run.step) == (None, None, None, 120)


def test_torn_and_odd_lines_are_passed_over(tmp_path):
    make_run(tmp_path / "a", tail='[1]\n"x"\n\xff\n{"step": "many", "loss": true}\n{"step": 130, "lo')
    run = only(tmp_path)
    assert (run.step, run.loss, run.knn) == (None, None, 0.9125)


def test_broken_results_are_none(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "results.json").write_text('{"state": "fini')
    assert only(tmp_path).state == "stopped"


def test_long_metrics_are_read_from_their_end(tmp_path):
    lines = [{"step": step, "loss": 1.0, "padding": "x" * 200} for step in range(1, 8000)]
    make_run(tmp_path / "a", metrics=[*lines, {"step": 8000, "loss": 0.5}])
    assert (tmp_path / "a" / "metrics.jsonl").stat().st_size > 2**20
    run = only(tmp_path)
    assert (run.step, run.loss) == (8000, 0.5)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_no_bytes_break_the_list(tmp_path_factory, config, metrics, results):
    root = tmp_path_factory.mktemp("runs")
    folder = make_run(root / "a")
    for name, content in (("config.yaml", config), ("metrics.jsonl", metrics), ("results.json", results)):
        (folder / name).write_bytes(content)
    run = only(root)
    assert run.state in ("finished", "stopped") and "a" in runs_text([run])


def test_the_table(tmp_path):
    make_run(tmp_path / "first", results=RESULTS)
    make_run(tmp_path / "2", config="", metrics=[])
    assert runs_text(list_runs(tmp_path)) == (
        "name   method  mix   encoder   state        step    kNN  loss  images/s\n"
        "2      -       -     -         stopped         -      -     -         -\n"
        "first  dino    real  resnet18  finished  500/500  97.0%  1.25       812"
    )


def tuned(tuner, new, kept, *iterations):
    """A line of the table of a fine-tuning, and a row of its runs."""
    source = (
        {} if kept is None else {"source_accuracy_after": {"mean": kept}, "mean_accuracy": {"mean": (new + kept) / 2}}
    )
    curve = [{"task": task, "iteration": end} for task, last in enumerate(iterations) for end in (0, last)]
    row = {"tuner": tuner, "state": "finished", "curve": curve}
    return {"tuner": tuner, "new_accuracy": {"mean": new}, **source}, row


@pytest.mark.parametrize(
    ("lines", "tuner", "new", "knn", "step"),
    [
        ([tuned("full", 0.9, 0.2, 50), tuned("lora:8", 0.8, 0.7, 50)], "lora:8", 0.8, 0.7, 50),
        ([tuned("full", 0.9, None, 50, 40), tuned("linear", 0.5, None, 50, 40)], "full", 0.9, None, 90),
        ([], None, None, None, None),
    ],
)
def test_a_fine_tuning_shows_its_best_tuner(tmp_path, lines, tuner, new, knn, step):
    tasks = ["a", "b"]
    config = f"peft: [full]\ntasks: [{', '.join(tasks)}]\nrun: {{max_steps: 50}}\n"
    found = {"method": "finetune", "encoder": "vit", "state": "finished"}
    results = {**found, "summary": [group for group, _ in lines], "tuners": [row for _, row in lines]}
    make_run(tmp_path / "tuned", config, None, results)
    run = only(tmp_path)
    assert (run.tuner, run.new_accuracy, run.knn, run.step, run.total) == (tuner, new, knn, step, 100)


def test_the_table_has_columns_of_tuners_where_there_are_some(tmp_path):
    make_run(tmp_path / "first", results=RESULTS)
    group, row = tuned("lora:8", 0.8, 0.7, 50)
    config = "peft: [full]\ntasks: [a]\nrun: {max_steps: 50}\n"
    results = {"method": "finetune", "encoder": "vit", "state": "finished", "summary": [group], "tuners": [row]}
    make_run(tmp_path / "tuned", config, None, results)
    assert runs_text(list_runs(tmp_path)) == (
        "name   method    mix   tuner   encoder   state        step  new task    kNN  loss  images/s\n"
        "first  dino      real  -       resnet18  finished  500/500         -  97.0%  1.25       812\n"
        "tuned  finetune  -     lora:8  vit       finished    50/50     80.0%  70.0%     -         -"
    )


def test_no_runs_and_no_folder(tmp_path):
    assert "trainer pretrain" in runs_text(list_runs(tmp_path))
    with pytest.raises(UsageError, match="there is no folder"):
        list_runs(tmp_path / "nowhere")
