"""Whole comparisons in this process: what is trained, what is not trained again, and what the table says."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from manifests.errors import DiffmixError, UsageError
from tests.trainer.compare.small import (
    ARMS,
    WILD,
    arguments,
    request,
    results,
    rows,
    run,
    summary,
    write_recipe,
)
from trainer import cli
from trainer.compare.arms import open_arms
from trainer.compare.command import describe
from trainer.compare.evaluation import open_exam
from trainer.compare.runs import ArmRun
from trainer.compare.settings import resolve
from trainer.engine.run_folder import RunFolder
from trainer.export import load_timm
from trainer.pretrain import pretrain

CPU = torch.device("cpu")


def times(out):
    """When each run's results were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/results.json")}


def test_what_comes_out(finished):
    out, _ = finished
    found = results(out)
    assert (found["state"], found["method"]) == ("finished", "compare")
    assert [row["folder"] for row in found["runs"]] == [
        f"{arm}-{n}" for n in (0, 1) for arm in ("real", "pairs", "barlow")
    ]
    assert all(row["state"] == "finished" and row["steps"] == 3 and row["images"] == 24 for row in found["runs"])
    assert {"data", "encoder", "run"} <= set(found["equal"])
    assert found["differing"]["mix.policy"] == {"real": "real", "pairs": "diffmix", "barlow": "diffmix"}
    assert {one["n"] for one in found["summary"]} == {2}
    assert found["pixels"].keys() == {"knn", "linear"}
    for one in found["summary"]:
        values = [row["knn"] for row in found["runs"] if row["arm"] == one["arm"]]
        assert one["knn"]["mean"] == pytest.approx(sum(values) / 2)


def test_every_encoder_is_measured_on_the_same_images(finished, data):
    out, recipe = finished
    asked = request(data, out, recipe)
    config, arms = open_arms(resolve(asked), asked)
    exam = open_exam(config)
    for arm in arms:
        [row] = [row for row in results(out)["runs"] if (row["arm"], row["seed"]) == (arm.name, 1)]
        found = exam.of_encoder(load_timm(out / f"{arm.name}-1" / "encoder"), arm.settled.config.views, CPU)
        assert {name: row[name] for name in found} == found


def test_before_training_arms_of_one_encoder_and_seed_are_equal(finished):
    out, _ = finished
    before = {(row["arm"], row["seed"]): row["knn_before"] for row in results(out)["runs"]}
    assert before["real", 0] == before["pairs", 0]
    metrics = (out / "real-0" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["knn"] == before["real", 0], "what the run itself measured at step 0"


def test_a_run_is_that_of_pretrain(finished, data, tmp_path):
    """Bit for bit, also after other runs in the same process."""
    out, recipe = finished
    asked = request(data, out, recipe)
    arm = open_arms(resolve(asked), asked)[1][1]
    pretrain(arm.request(3, 1, str(tmp_path / "run")))
    ours, theirs = (load_file(path / "encoder" / "model.safetensors") for path in (out / "pairs-1", tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_finished_is_not_trained_again(finished, data):
    out, recipe = finished
    before, said = times(out), results(out)
    assert run(data, out, recipe, seeds=2).state == "finished"
    assert times(out) == before
    assert results(out) == said


def test_other_queries_are_asked_without_training(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    run(data, out, recipe)
    before = times(out)
    run(data, out, recipe, evaluation={"k": 3})
    assert times(out) == before
    assert results(out)["k"] == 3


def test_more_seeds_later(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    run(data, out, recipe)
    first = times(out)
    run(data, out, recipe, seeds=2)
    assert times(out).items() > first.items()
    assert [one["n"] for one in results(out)["summary"]] == [2, 2]


def test_a_collapse_is_a_row(data, tmp_path, capsys):
    arms = {"real": ARMS["real"], "wild": {**ARMS["pairs"], **WILD}, "pairs": ARMS["pairs"]}
    out, recipe = tmp_path / "out", write_recipe(tmp_path, arms)
    assert cli.run(arguments(data, out, recipe)) == 4
    said = capsys.readouterr().out
    assert "wild-0 collapsed: " in said
    assert results(out)["state"] == "collapsed"
    found = summary(out)
    assert [(name, one["n"], one["collapsed"]) for name, one in found.items()] == [
        ("real", 1, 0),
        ("wild", 0, 1),
        ("pairs", 1, 0),
    ]
    assert "not finite" in rows(out)[1]["reason"]
    before = times(out)
    assert cli.run(arguments(data, out, recipe)) == 4, "as often as it is asked"
    assert times(out) == before


def test_a_collapse_in_another_process_meanwhile_is_a_row(data, tmp_path):
    """Between a look at the folder and its lock, the one that held it has ended."""
    out, recipe = tmp_path / "out", write_recipe(tmp_path, {"wild": {**ARMS["real"], **WILD}})
    assert run(data, out, recipe).state == "collapsed"
    asked = request(data, out, recipe)
    config, [arm] = open_arms(resolve(asked), asked)
    late = ArmRun(arm=arm, seed=0, steps=3, folder=RunFolder(out / "wild-0"), exam=open_exam(config))
    assert late._train()
    assert late.row()["state"] == "collapsed"


def test_an_encoder_that_is_lost_or_torn_is_told(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path, ("real",))
    run(data, out, recipe)
    (out / "real-0" / "evaluation.json").unlink()
    (out / "real-0" / "encoder" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DiffmixError, match=r"encoder cannot be loaded .* remove .*real-0 to train it again"):
        run(data, out, recipe)
    shutil.rmtree(out / "real-0" / "encoder")
    with pytest.raises(DiffmixError, match="encoder cannot be loaded"):
        run(data, out, recipe)


def test_a_run_of_another_process_is_passed_over_and_looked_at_again(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    with RunFolder(out / "real-0").locked():
        outcome = run(data, out, recipe)
    assert outcome.state == "unfinished"
    assert "another process is at the rest" in outcome.text()
    assert [row["state"] for row in rows(out)] == ["unfinished", "finished"]
    assert "Not finished yet: real-0." in (out / "table.md").read_text()
    assert run(data, out, recipe).state == "finished"


def test_a_run_of_other_settings_in_the_folder_is_refused_before_any_training(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    run(data, out, recipe)
    (out / "budget.json").unlink()
    with pytest.raises(UsageError, match=r"real-0 holds a run of other settings \(run.max_steps: 3 there, 4 now"):
        run(data, out, recipe, steps=4)


def test_the_product_on_the_command_line(data, tmp_path, capsys):
    given = ["compare", "--method", "simclr", "--mix", "real", "--mix", "union", "--data", data, "--max-steps", "2"]
    given += ["--batch-size", "8", "--encoder", "resnet18", "--set", "encoder.args.layers=[1,1,1,1]"]
    given += ["--set", "encoder.args.channels=[8,8,8,8]", "--set", "method.hidden_dim=16"]
    out = tmp_path / "out"
    assert cli.run([*given, "--dry-run", "--json"]) == 0
    assert [one["steps"] for one in json.loads(capsys.readouterr().out)["runs"]] == [2, 2]
    assert cli.run([*given, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["arm"] for one in found["summary"]] == ["simclr-real", "simclr-union"]
    assert [facts["epochs"] for facts in found["budget"]["arms"].values()] == [
        2 / 7,
        2 / 15,
    ]  # steps of an epoch: the last partial batch is dropped
    assert {key: found[key] for key in results(out)} == results(out)


def test_a_dry_run_says_what_would_be(data, tmp_path):
    out, recipe = tmp_path / "out", write_recipe(tmp_path)
    facts = describe(request(data, out, recipe, seeds=3))
    assert not out.exists()
    assert facts["differing"] == {"mix.policy": ["real", "diffmix"]}
    assert [(one["steps"], one["images"], one["samples"]) for one in facts["runs"]] == [(3, 24, 60)] * 2
    for said in ("mix.policy: real (real), diffmix (pairs)", "2 arms x 3 seeds = 6 runs", "bank: 5"):
        assert said in facts["text"]
    assert "by a timing" in describe(request(data, out, recipe, minutes=1))["text"]


def test_a_dry_run_without_a_folder_looks_at_none(data, tmp_path, monkeypatch):
    (tmp_path / "runs/new").mkdir(parents=True)
    (tmp_path / "runs/new/budget.json").write_text('{"max_steps": 9, "minutes": null, "arms": {}}')
    monkeypatch.chdir(tmp_path)
    facts = describe(replace(request(data, "", write_recipe(tmp_path)), out=None))
    assert [one["steps"] for one in facts["runs"]] == [3, 3]


def test_without_a_budget_the_command_says_what_to_give(data, capsys):
    assert cli.run(["compare", "--data", data]) == 2
    assert "--max-steps N" in capsys.readouterr().err
