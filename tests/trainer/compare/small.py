"""Comparisons of encoders of 30,000 parameters on a few dozen small images: some seconds each."""

import json

import yaml

from tests.trainer.engine.small_runs import HEADS, VIT
from trainer.compare.command import compare
from trainer.compare.settings import Request

COMMON = {
    "encoder": VIT,
    "run": {"batch_size": 8, "log_every": 1},
    "data": {"workers": 1},
    "optim": {"lr": 1e-3},
}
ARMS = {
    "real": {"recipe": "simclr-digits", "method": HEADS["simclr"], "mix": {"policy": "real"}},
    "pairs": {"recipe": "simclr-digits", "method": HEADS["simclr"], "mix": {"policy": "diffmix"}},
    "barlow": {"recipe": "barlow-twins-digits", "method": HEADS["barlow-twins"]},
}
WILD = {"optim": {"name": "sgd", "lr": 1e30, "warmup_epochs": 0}}  # not finite after a step


def write_recipe(folder, arms=("real", "pairs"), **sections):
    """A recipe of these of `ARMS`, or of other ones; its file."""
    chosen = arms if isinstance(arms, dict) else {name: ARMS[name] for name in arms}
    path = folder / "arms.yaml"
    path.write_text(yaml.safe_dump({"common": COMMON, "arms": chosen, **sections}, sort_keys=False))
    return str(path)


def request(data, out, recipe, *, steps=3, minutes=None, seeds=1, settings=(), arm_flags=None, **flags):
    """A call of `trainer compare`; `flags` are further settings of it."""
    budget = {"max_steps": steps} if minutes is None else {"minutes": minutes}
    given = {"data": str(data), "budget": budget, "seeds": seeds, **flags}
    return Request(recipe=recipe, flags=given, arm_flags=arm_flags or {}, assignments=settings, out=str(out))


def run(data, out, recipe, **how):
    """Run it in this process; the outcome."""
    return compare(request(data, out, recipe, **how))


def arguments(data, out, recipe, *, steps=3, seeds=1, settings=()):
    """The same call for the command line."""
    given = ["compare", "--data", data, "--out", out, "--recipe", recipe, "--max-steps", steps, "--seeds", seeds]
    for setting in settings:
        given += ["--set", setting]
    return [str(one) for one in given]


def results(out):
    return json.loads((out / "results.json").read_text())


CLOCKED = ("seconds", "images_per_second")


def rows(out):
    """What results.json says of the runs, without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in results(out)["runs"]]


def summary(out):
    return {one["arm"]: one for one in results(out)["summary"]}
