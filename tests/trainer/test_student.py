"""The student that a run's checkpoints hold: exported, compared with the teacher, gone on with, and refused."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from manifests.errors import UsageError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import VIT, final, request, results, train
from tests.trainer.finetune.small import run as fine_tune
from tests.trainer.finetune.small import write_task
from trainer.cli import run
from trainer.config import resolve
from trainer.data.rows import Rows
from trainer.engine import checkpoint
from trainer.export import export_run, load_timm
from trainer.finetune.origin import open_origin
from trainer.nn.encoders import make_encoder
from trainer.nn.init import initialise
from trainer.parts import make_held_out
from trainer.pretrain import pretrain
from trainer.recipes import read_yaml

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
LAST = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 60)


@pytest.fixture(scope="module")
def byol(data, tmp_path_factory):
    """A finished run with its final evaluation, and the checkpoints of its last two steps."""
    out = tmp_path_factory.mktemp("byol") / "run"
    train(data, out, "byol", steps=LAST, checkpoint__every=1, evaluation__final=True)
    return out


@pytest.fixture
def copy(byol, tmp_path):
    return shutil.copytree(byol, tmp_path / "copy")


def settings(out):
    return resolve(read_yaml((out / "config.yaml").read_text()))


@torch.no_grad()
def features(encoder):
    return encoder.eval()(IMAGES)


def by_hand(out, network):
    """Features by plain timm with what the last checkpoint holds under that name."""
    state, config = final(out).method, settings(out).encoder
    size = {"img_size": 32} if config.name.startswith("vit") else {}
    encoder = timm.create_model(config.name, num_classes=0, **size, **config.args)
    encoder.load_state_dict(
        {key.removeprefix(f"{network}."): value for key, value in state.items() if key.startswith(f"{network}.")}
    )
    return features(encoder)


@pytest.mark.parametrize("method", ["dino", "byol", "moco-v3"])
def test_the_student_is_that_of_the_last_step(data, tmp_path, method):
    out = tmp_path / "run"
    train(data, out, method, steps=LAST, checkpoint__every=1)
    scope = {}
    exec(export_run(out, tmp_path / "student", "timm", "student"), scope)
    student, teacher = (by_hand(out, name) for name in ("student", "teacher"))
    assert torch.equal(features(scope["encoder"]), student)
    assert not torch.allclose(student, teacher, atol=1e-4)
    assert torch.equal(features(load_timm(out / "encoder")), teacher)
    assert (tmp_path / "student" / "config.json").read_text() == (out / "encoder" / "config.json").read_text()


def test_the_teacher_by_its_name_is_what_encoder_holds(byol, tmp_path):
    export_run(byol, tmp_path / "teacher", "timm", "teacher")
    export_run(byol, tmp_path / "encoder", "timm")
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "teacher", tmp_path / "encoder")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert (tmp_path / "teacher" / "README.md").read_text().startswith(f"# {VIT['name']} encoder of the teacher, ")


def test_torchvision_takes_the_student_of_a_resnet(data, tmp_path):
    out = tmp_path / "run"
    asked = request(data, out, "byol", steps=2)
    pretrain(replace(asked, flags={**asked.flags, "encoder": {"name": "resnet18"}}))
    export_run(out, tmp_path / "student", "torchvision", "student")
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    encoder.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
    student, teacher = (by_hand(out, name) for name in ("student", "teacher"))
    torch.testing.assert_close(features(encoder), student, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(student, teacher, rtol=1e-3, atol=1e-3)


def test_the_command_says_which_network_it_wrote(byol, tmp_path, capsys):
    command = ["export", str(byol), "--network", "student", "--out", str(tmp_path / "student")]
    assert run(command) == 0
    assert f"the same features as the student of {byol}" in capsys.readouterr().out
    assert run([*command, "--json"]) == 2
    shutil.rmtree(tmp_path / "student")
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"] == "student"
    assert (tmp_path / "student" / "README.md").read_text().startswith(f"# {VIT['name']} encoder of the student, ")


def test_the_final_evaluation_is_also_of_the_student(byol, tmp_path):
    export_run(byol, tmp_path / "student", "timm", "student")
    config = settings(byol)
    held_out = make_held_out(config, Rows.open(config.data.url), torch.device("cpu"))
    found = results(byol)["final"]
    for folder, prefix in ((tmp_path / "student", "student_"), (byol / "encoder", "")):
        expected = held_out.final(load_timm(folder))
        assert (found[f"{prefix}knn"], found[f"{prefix}linear"]) == (expected["knn"], expected["linear"])


def test_the_students_accuracies_are_shown_where_there_is_one(byol, data, tmp_path):
    text = train(data, byol, "byol", steps=LAST, checkpoint__every=1, evaluation__final=True).text()
    lines = [line.split() for line in text.splitlines()]
    found = results(byol)["final"]
    for name in ("knn", "linear"):
        assert ["student's", name, f"{found[f'student_{name}']:.1%}"] in lines
    out = tmp_path / "simclr"
    assert "student's" not in train(data, out, steps=1, evaluation__final=True).text()
    assert not [name for name in results(out)["final"] if "student" in name]


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_methods_of_one_network_have_neither(data, tmp_path, method, network):
    train(data, tmp_path / "run", method, steps=1)
    with pytest.raises(UsageError, match=f"is of {method}, which has one network.*leave out --network"):
        export_run(tmp_path / "run", tmp_path / "out", "timm", network)
    assert not (tmp_path / "out").exists()


def refusal(out, target):
    with pytest.raises(UsageError) as caught:
        export_run(out, target, "timm", "student")
    assert not target.exists()
    return str(caught.value)


def test_a_run_without_its_last_checkpoint_is_refused(copy, tmp_path):
    last = copy / "checkpoints" / checkpoint.name_of(LAST)
    last.write_bytes(last.read_bytes()[:-200])
    said = refusal(copy, tmp_path / "out")
    assert "lacks that of the last step, 3: the newest whole one is of step 2 (step-000000003.pt damaged)" in said
    assert said.endswith("trains from step 2 on")
    last.unlink()
    assert "the newest whole one is of step 2. Put it back" in refusal(copy, tmp_path / "out")
    shutil.rmtree(copy / "checkpoints")
    assert "it holds no whole one" in (said := refusal(copy, tmp_path / "out"))
    assert said.endswith("trains anew")
    export_run(copy, tmp_path / "out", "timm")


def test_what_a_refusal_advises_brings_the_student_back(data, byol, copy, tmp_path):
    (copy / "checkpoints" / checkpoint.name_of(LAST)).unlink()
    (copy / "results.json").unlink()
    train(data, copy, "byol", steps=LAST, checkpoint__every=1, evaluation__final=True)
    targets = {byol: tmp_path / "first", copy: tmp_path / "again"}
    for out, target in targets.items():
        export_run(out, target, "timm", "student")
    weights = [load_file(target / "model.safetensors") for target in targets.values()]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_unfinished_and_undescribed_runs_are_refused(copy, tmp_path):
    (copy / "results.json").unlink()
    assert "is not finished: run the same command again" in refusal(copy, tmp_path / "out")
    (copy / "config.yaml").unlink()
    assert "leave out --network" in refusal(copy, tmp_path / "out")
    shutil.rmtree(copy / "encoder")
    assert "holds no exported encoder" in refusal(copy, tmp_path / "out")


def test_training_goes_on_with_an_exported_student(copy, tmp_path):
    export_run(copy, copy / "student", "timm", "student")
    student = by_hand(copy, "student")
    encoder = make_encoder(settings(copy).encoder, 32)
    initialise(encoder, str(copy / "student"))
    assert torch.equal(features(encoder), student)
    outcome = fine_tune(str(copy / "student"), tmp_path / "tuned", [write_task(tmp_path / "colours")], steps=2)
    assert outcome.state == "finished"
    assert outcome.results["pretraining"].items() >= {"method": "byol", "steps": LAST, "pairs": 60}.items()


def test_fine_tuning_knows_the_run_of_a_student_but_not_the_teachers_figures(copy):
    export_run(copy, copy / "student", "timm", "student")
    teacher, student = open_origin(str(copy), None), open_origin(str(copy / "student"), None)
    assert open_origin(str(copy / "encoder"), None).results == teacher.results
    assert teacher.results["final"]["knn"] >= 0
    assert (student.data_url, student.results["method"]) == (teacher.data_url, "byol")
    assert not {"final", "knn", "knn_before"} & student.results.keys()
    assert torch.equal(features(student.make()[0]), by_hand(copy, "student"))
