"""Comparisons on a few dozen small images, from an encoder of 30,000 parameters: a second or two each."""

import json

import numpy as np
from PIL import Image

from tests.trainer.engine.small_runs import train
from trainer.finetune.command import finetune
from trainer.finetune.settle import Request

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
SETTINGS = [
    "run.log_every=1",
    "data.workers=1",
    "images.augment=finetune-digits",
    "rates.learning_rates.default=[0.02]",
]
SETTINGS += ["rates.learning_rates.full=[0.02]", "rates.learning_rates.linear=[0.2]"]


def write_task(folder, count=90, classes=("red", "green", "blue"), seed=0):
    """Pictures whose colour is their class, under noise."""
    draws = np.random.default_rng(seed)
    for number in range(count):
        name = classes[number % len(classes)]
        pixels = np.clip(draws.normal(COLOURS[name], 60, (16, 16, 3)), 0, 255).astype(np.uint8)
        path = folder / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder)


def pretrained(data, out):
    """A pre-training run of two steps."""
    assert train(data, out, steps=2).state == "finished"
    return str(out)


def request(init, out, tasks, peft=("linear",), *, steps=6, at=(0, 2), seeds=1, settings=(), **more):
    """A call of `trainer finetune`; `more` are further settings."""
    flags = {"init": init, "tasks": tuple(tasks), "peft": tuple(peft), "seeds": seeds, **more}
    flags["run"] = {"max_steps": steps, "batch_size": 16, **more.get("run", {})}
    flags["evaluation"] = {"at": at}
    return Request(recipe="digits", flags=flags, assignments=[*SETTINGS, *settings], out=str(out))


def run(init, out, tasks, peft=("linear",), **how):
    """Run it in this process; the outcome."""
    return finetune(request(init, out, tasks, peft, **how))


def arguments(init, out, tasks, peft, *, steps=6, at="0,2", settings=()):
    """The same call for the command line."""
    given = ["finetune", "--init", init, "--out", out, "--recipe", "digits", "--max-steps", steps, "--batch-size", 16]
    given += ["--eval-at", at]
    for option, values in (("--task", tasks), ("--peft", peft), ("--set", [*SETTINGS, *settings])):
        for value in values:
            given += [option, value]
    return [str(one) for one in given]


def results(out):
    return json.loads((out / "results.json").read_text())
