"""The budget: decided once, kept, and refused when it is another one."""

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.compare.small import ARMS, request, results, run, write_recipe
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import HEADS
from trainer.compare import timing
from trainer.compare.arms import open_arms
from trainer.compare.budget import LEAST_STEPS, known
from trainer.compare.settings import resolve
from trainer.engine.run_folder import RunFolder

MINUTES = 0.004  # a quarter of a second


def budget(out):
    return json.loads((out / "budget.json").read_text())


@pytest.fixture(scope="module")
def timed(data, tmp_path_factory):
    """A comparison by minutes, and its recipe."""
    folder = tmp_path_factory.mktemp("timed")
    recipe = write_recipe(folder)
    assert run(data, folder / "out", recipe, minutes=MINUTES).state == "finished"
    return folder / "out", recipe


def test_steps_follow_from_the_time_of_a_step(timed):
    out, _ = timed
    found = budget(out)
    assert (found["minutes"], found["max_steps"]) == (MINUTES, None)
    assert found["clock"] == timing.clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for one in found["arms"].values():
        assert one["steps"] == max(LEAST_STEPS, int(60 * MINUTES / one["seconds_per_step"]))
    for row in results(out)["runs"]:
        assert row["steps"] == found["arms"][row["arm"]]["steps"], "the schedules span exactly these"


def test_nothing_is_left_of_the_timing(timed):
    out, _ = timed
    names = {path.name for path in out.iterdir()}
    assert names == {
        *(".lock", "config.yaml", "budget.json", "pixels.json", "results.json", "table.md"),
        *("real-0", "pairs-0"),
    }


def test_later_seeds_have_the_same_budget(timed, data):
    out, recipe = timed
    before = (out / "budget.json").read_bytes()
    assert run(data, out, recipe, minutes=MINUTES, seeds=2).state == "finished"
    assert (out / "budget.json").read_bytes() == before
    steps = {(row["arm"], row["steps"]) for row in results(out)["runs"]}
    assert len(results(out)["runs"]) == 4
    assert len(steps) == 2


def test_another_budget_is_refused(timed, data):
    out, recipe = timed
    settings = (out / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"begun with 0.004 minutes of .* time a run, and 0.005 minutes"):
        run(data, out, recipe, minutes=0.005)
    with pytest.raises(UsageError, match="and 3 steps is asked for now"):
        run(data, out, recipe, steps=3)
    assert (out / "config.yaml").read_bytes() == settings


@pytest.mark.parametrize("content", ["method: {name: simclr}\n", "{"])
def test_the_folder_of_a_run_is_left_alone(data, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match="holds something else than a comparison"):
        run(data, tmp_path / "run", write_recipe(tmp_path))
    assert (tmp_path / "run" / "config.yaml").read_text() == content


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (
            {"recipe": "mixed-ae-digits", "method": HEADS["mixed-ae"], "run": {"batch_size": 6}},
            "arm late: 6 images, .* groups of 4",
        ),
        ({**ARMS["real"], "mix": {"policy": "sequential", "first_epochs": 20}}, "arm late: mix.first_epochs is 20"),
    ],
)
def test_what_only_the_timing_shows_is_told_before_any_training(data, tmp_path, arm, said):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=said):
        run(data, out, write_recipe(tmp_path, {"real": ARMS["real"], "late": arm}), minutes=MINUTES)
    assert not (out / "budget.json").exists()
    assert not (out / "real-0").exists()


def test_other_settings_of_an_arm_are_refused_by_name(timed, data, tmp_path):
    out, recipe = timed
    with pytest.raises(UsageError, match=r"arm real was begun with optim.lr 0.001 and has 0.5 now"):
        run(data, out, recipe, minutes=MINUTES, settings=["optim.lr=0.5"])
    with pytest.raises(UsageError, match="arm real was begun on another pair set"):
        run(write_pairs(tmp_path / "other", 70), out, recipe, minutes=MINUTES)


def test_what_changes_nothing_that_is_learnt_may_differ(timed, data):
    out, recipe = timed
    assert run(data, out, recipe, minutes=MINUTES, settings=["checkpoint.every=1"]).state == "finished"


def test_settings_that_an_earlier_version_did_not_have_are_their_defaults(timed, data):
    out, recipe = timed
    values = budget(out)
    del values["arms"]["real"]["settings"]["run"]["accumulation"]
    (out / "budget.json").write_text(json.dumps(values))
    assert run(data, out, recipe, minutes=MINUTES).state == "finished"
    with pytest.raises(UsageError, match=r"run.accumulation 1 and has 2 now"):
        run(data, out, recipe, minutes=MINUTES, settings=["run.accumulation=2"])


def test_an_arm_that_comes_later_is_timed_then(timed, data, tmp_path):
    out, _ = timed
    before = budget(out)["arms"]
    recipe = write_recipe(tmp_path, ("barlow", "pairs"))
    assert run(data, out, recipe, minutes=MINUTES).state == "finished"
    after = budget(out)["arms"]
    assert list(after) == ["real", "pairs", "barlow"]
    assert {name: after[name] for name in before} == before
    assert [row["arm"] for row in results(out)["runs"]] == ["barlow", "pairs"]


def test_unequal_batches_have_equal_minutes(data, tmp_path):
    recipe = write_recipe(tmp_path, {"small": ARMS["real"], "large": {**ARMS["real"], "run": {"batch_size": 32}}})
    run(data, tmp_path / "out", recipe, minutes=0.02)
    small, large = (results(tmp_path / "out")["budget"]["arms"][name] for name in ("small", "large"))
    assert small["steps"] > large["steps"]
    assert small["minutes"] == pytest.approx(large["minutes"], rel=0.2)


def test_the_measured_time_is_that_of_the_training(data, tmp_path):
    """Of this process's processor time, whatever else the machine does."""
    asked = request(data, "", write_recipe(tmp_path, ("real",)), minutes=1)
    [arm] = open_arms(resolve(asked), asked)[1]
    first, second = (timing.cost_of_steps(arm, 0).first for _ in range(2))
    assert first == pytest.approx(second, rel=0.5)
    began = time.process_time()
    assert 0 < timing.cost_of_steps(arm, 0).first < time.process_time() - began


@given(first=st.floats(0.001, 10), later=st.floats(0.001, 10), wait=st.integers(0, 300), budget=st.floats(0.001, 1000))
@settings(deadline=None)
def test_steps_of_two_costs_fill_the_budget(first, later, wait, budget):
    """The wait is at most a tenth of the run, and 20 steps, as that of a queue."""
    cost = timing.StepCost(first=first, later=later, later_from=lambda total: min(wait, total // 10) + 20)
    steps = cost.steps_within(budget)
    assert cost.seconds(steps) <= budget * (1 + 1e-9) and cost.seconds(steps + 1) > budget * (1 - 1e-9)
    before = min(min(wait, steps // 10) + 20, steps)
    assert cost.seconds(steps) == pytest.approx(sum([first] * before + [later] * (steps - before)))


def test_steps_with_a_full_queue_are_timed_too(data, tmp_path):
    """Sinkhorn over 2,000 queued images and 500 prototypes is most of such a step."""
    swav = {**ARMS["real"], "recipe": "swav-digits"}
    method = {"prototypes": 500, "queue_length": 2000, "queue_start_epochs": 1}
    asked = request(data, "", write_recipe(tmp_path, {"swav": {**swav, "method": method}}), minutes=1)
    [arm] = open_arms(resolve(asked), asked)[1]
    cost = timing.cost_of_steps(arm, 0)
    assert cost.later > 1.5 * cost.first
    batch, per_epoch = (
        arm.settled.config.run.batch_size,
        arm.settled.policy.num_items // arm.settled.config.run.batch_size,
    )
    assert cost.later_from(10_000) == per_epoch + 2000 // batch
    assert cost.later_from(50) == min(5, per_epoch) + 2000 // batch


def test_a_look_times_nothing(data, tmp_path):
    asked = request(data, "", write_recipe(tmp_path), minutes=1)
    config, arms = open_arms(resolve(asked), asked)
    assert known(RunFolder(tmp_path / "new"), config, arms, torch.device("cpu"))["arms"] == {}
    assert not (tmp_path / "new").exists()
