"""What was typed in vain is refused or noted, before anything is trained."""

import shutil

import pytest
import torch

from manifests.errors import UsageError
from tests.trainer.finetune.small import request
from trainer.finetune.origin import open_origin
from trainer.finetune.settle import Request, settle
from trainer.nn.encoders import EncoderConfig, make_encoder


def settled(init, tasks, peft=("linear",), **how):
    return settle(request(init, "", tasks, peft, **how))


def notes(init, tasks, peft=("linear",), **how):
    return "\n".join(settled(init, tasks, peft, **how).notes)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seeds=4", "--set seeds=4 and --seeds 1 disagree: give one of them"),
        ("run.max_steps=7", "--set run.max_steps=7 and --max-steps 6 disagree"),
        ("evaluation.at=[0, 3]", "--set evaluation.at=0,3 and --eval-at 0,2 disagree"),
        ("peft=[full]", "--set peft=full and --peft linear disagree"),
        ("tasks=[x]", "--set tasks=x and --task "),
    ],
)
def test_a_setting_and_its_flag_must_agree(init, colours, setting, said):
    with pytest.raises(UsageError, match=said):
        settled(init, [colours], settings=[setting])
    assert settled(init, [colours], settings=["evaluation.at=[0, 2]", "seeds=1"]).config.seeds == 1


def test_steps_that_no_task_comes_to(init, colours):
    with pytest.raises(UsageError, match=r"--eval-at 10, 5000: a task is trained for 6 steps.* a larger --max-steps"):
        settled(init, [colours], at=(0, 6, 10, 5000))
    how = {"init": init, "tasks": (colours,), "peft": ("linear",)}
    found = settle(Request(recipe="digits", flags={**how, "run": {"max_steps": 20, "batch_size": 16}}))
    assert found.config.evaluation.at == (0, 10)
    assert any(
        "not measured at 100, as the recipe has it: a task is trained for 20 steps" in one for one in found.notes
    )
    longer = settle(Request(recipe="digits", flags={**how, "run": {"epochs": 30.0, "batch_size": 16}}))
    assert longer.config.run.max_steps is None, "epochs that are typed win over the recipe's steps"
    assert longer.config.evaluation.at == (0, 10, 100), "4 steps an epoch"


@pytest.mark.parametrize("same", [("lora", "lora:8"), ("block-expansion", "block-expansion:1"), ("LoRA:2", "lora:2")])
def test_a_tuner_is_not_trained_twice(init, colours, same):
    with pytest.raises(UsageError, match=f"--peft {same[0]} and --peft {same[1]} are the same tuner"):
        settled(init, [colours], ("linear", *same))
    assert settled(init, [colours], ("lora:4", "lora:8", "dora:8")).config.peft == ("lora:4", "lora:8", "dora:8")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rates.learning_rates.lorra=[0.1]", "unknown tuner 'lorra'; did you mean 'lora'"),
        ("rates.grid.lora:8=[0.1, 0.2]", "rates.grid.lora:8 has no effect: .*; write rates.grid.lora"),
    ],
)
def test_rates_of_no_tuner(init, colours, setting, said):
    with pytest.raises(UsageError, match=said):
        settled(init, [colours], settings=[setting])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"settings": ["tuner.lora_alpha=4"]}, "tuner changes nothing: no --peft lora"),
        ({"settings": ["rates.grid.default=[0.1, 0.2]"]}, "rates.grid changes nothing: no --sweep lr"),
        ({"sweep": "lr"}, "rates.learning_rates changes nothing: the rates of --sweep lr are those of rates.grid"),
        (
            {"settings": ["optim.momentum=0.5"]},
            "optim.momentum changes nothing: it is of sgd and lars, and optim.name is",
        ),
        ({"adapters": "per-task"}, "adapters changes nothing: there is one task"),
    ],
)
def test_what_these_tuners_do_not_read_is_noted(init, colours, how, said):
    assert said in notes(init, [colours], **how)
    assert "changes nothing" not in notes(init, [colours], ("lora:2",), settings=["tuner.lora_alpha=4"])


def test_a_task_that_is_the_source(init, colours, more_colours, tmp_path):
    said = "is of the images of the source"
    assert said not in notes(init, [colours])
    assert said not in notes(init, [colours], source=more_colours)
    pairs = open_origin(init, None).data_url
    assert f"task pairs {said}, {pairs}: what is called forgetting" in notes(init, [pairs])
    (tmp_path / "link").symlink_to(colours)
    copied = shutil.copytree(colours, tmp_path / "copied")
    for source in (colours, f"{tmp_path}/link", str(copied)):
        assert f"task colours {said}" in notes(init, [colours, more_colours], source=source)


def test_maes_recipes_take_a_resnet(colours, tmp_path):
    """Its pooling stays, and timm says which layers it has: rates fall from stage to stage."""
    torch.save(make_encoder(EncoderConfig(name="resnet18_cifar"), 32).state_dict(), tmp_path / "weights.pth")
    flags = {"init": str(tmp_path / "weights.pth"), "encoder": {"name": "resnet18_cifar"}, "tasks": (colours,)}
    how = {"recipe": "mae-cifar10", "flags": {**flags, "source": "none"}}
    for settings in ([], ["optim.layer_decay=0.65", "encoder.args.drop_path_rate=0.1"]):
        assert settle(Request(**how, assignments=["images.size=32", *settings])).specs[0].name == "full"
    with pytest.raises(UsageError, match="'global_pool': 'token'}: Invalid pool type: token"):
        settle(Request(**how, assignments=["images.size=32", "encoder.args.global_pool=token"]))
