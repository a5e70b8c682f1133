"""The options of `trainer pretrain`, `finetune` and `compare`, and the nested settings that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from trainer.methods import METHODS
from trainer.tuners import TUNERS

F = TypeVar("F", bound=Callable[..., Any])

# Option to the setting that it stands for, as in a recipe.
PRETRAIN = {
    "data": "data.url",
    "filters": "data.filter",
    "mix": "mix.policy",
    "encoder": "encoder.name",
    "init": "init",
    "epochs": "run.epochs",
    "max_steps": "run.max_steps",
    "batch_size": "run.batch_size",
    "precision": "run.precision",
    "seed": "run.seed",
}
FINETUNE = {
    "init": "init",
    "peft": "peft",
    "tasks": "tasks",
    "source": "source",
    "max_steps": "run.max_steps",
    "batch_size": "run.batch_size",
    "eval_at": "evaluation.at",
    "seeds": "seeds",
    "sweep": "sweep",
    "adapters": "adapters",
    "precision": "run.precision",
    "seed": "run.seed",
}
COMPARE = {
    "data": "data",
    "test": "test",
    "max_steps": "budget.max_steps",
    "minutes": "budget.minutes",
    "seeds": "seeds",
    "seed": "seed",
}
COMPARE_ARMS = {"encoder": "encoder.name", "batch_size": "run.batch_size", "precision": "run.precision"}  # of every arm
_TYPED = {"filters": "filter", "tasks": "task"}  # options that may be repeated
POLICIES = ("real", "synthetic", "diffmix", "sequential", "union", "inflate")  # of data.mixing, not light to import


class _Steps(click.ParamType[tuple[int, ...]]):
    """Numbers of steps, separated by commas."""

    name = "STEPS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """`0,10,100` as numbers."""
        parts = str(value).split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
            self.fail(f"{value!r} is no list of steps; give whole numbers, such as 0,10,100", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


def pretrain_options(command: F) -> F:
    """All options that settle what a pre-training run is."""
    return _with(command, _PRETRAIN_OPTIONS)


def finetune_options(command: F) -> F:
    """All options that settle what a comparison of tuners is."""
    return _with(command, _FINETUNE_OPTIONS)


def compare_options(command: F) -> F:
    """All options that settle what a comparison of methods and policies is."""
    return _with(command, _COMPARE_OPTIONS)


def _with(command: F, options: Sequence[Callable[[F], F]]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


_precision = click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="auto: fp32 on CPU, bf16 on GPU."
)
_set = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as optim.lr=1e-3."
)

_PRETRAIN_OPTIONS = (
    click.option("--method", type=click.Choice(list(METHODS)), help="What to train.  [default: the recipe's, simclr]"),
    click.option("--data", help="Pair set: folder or URL.  [default: data/pairs]"),
    click.option(
        "--mix", type=click.Choice(POLICIES), help="Which image feeds which view.  [default: the recipe's, diffmix]"
    ),
    click.option("--encoder", help="timm name, resnet18_cifar or resnet50_cifar.  [default: the recipe's]"),
    click.option("--recipe", help="A recipe's name or a YAML file.  [default: by method and image size]"),
    click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Passes over the data."),
    click.option("--max-steps", type=click.IntRange(1), help="Optimiser steps; wins over --epochs."),
    click.option("--batch-size", type=click.IntRange(2), help="Images of one optimiser step over all processes."),
    click.option("--init", help="Initial encoder: timm:NAME, a run folder or a file."),
    click.option(
        "--resume",
        default="auto",
        show_default=True,
        metavar="auto|never|PATH",
        help="auto: go on with the run in --out; PATH: with that run or checkpoint.",
    ),
    click.option("--out", help="Run folder.  [default: runs/<time>-<method>]"),
    click.option("--filter", "filters", multiple=True, metavar="EXPR", help="Such as 'similarity > 0.6'; repeatable."),
    _precision,
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of weights, order and augmentation.  [default: 0]"),
    _set,
)

_FINETUNE_OPTIONS = (
    click.option("--init", help="A run, timm:NAME or a file.  [default: the newest finished run in runs/]"),
    click.option(
        "--peft",
        multiple=True,
        metavar="NAME[:SIZE]",
        help=f"Tuner to compare: {', '.join(TUNERS)}, or a PEFT method; repeatable.  "
        "[default: full, linear, lora:8, block-expansion]",
    ),
    click.option(
        "--task",
        "tasks",
        multiple=True,
        metavar="PATH[,test=PATH]",
        help="Labelled images to learn: folder, tar, Parquet, pair set, torchvision:NAME@ROOT; repeat it for a "
        "sequence.  [default: a second domain, for encoders of the digits]",
    ),
    click.option(
        "--source",
        metavar="PATH[,test=PATH]",
        help="Labelled images not to forget, or none.  [default: the pair set that the encoder saw]",
    ),
    click.option("--recipe", help="A recipe's name or a YAML file.  [default: by task and image size]"),
    click.option("--max-steps", type=click.IntRange(1), help="Optimiser steps of each task."),
    click.option("--batch-size", type=click.IntRange(2), help="Images of one optimiser step over all processes."),
    click.option("--eval-at", type=_Steps(), help="Steps to measure at, and the last one.  [default: 0,10,100]"),
    click.option("--seeds", type=click.IntRange(1), help="Repetitions of every tuner.  [default: 1]"),
    click.option("--sweep", type=click.Choice(["lr"]), help="lr: choose each tuner's rate on the validation part."),
    click.option(
        "--adapters",
        type=click.Choice(["shared", "per-task"]),
        help="Of a sequence: one adapter that goes on, or one for each task.  [default: shared]",
    ),
    click.option("--out", help="Folder; a run that stopped there goes on.  [default: runs/<time>-finetune]"),
    _precision,
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="The first of the seeds.  [default: 0]"),
    _set,
)

_COMPARE_OPTIONS = (
    click.option(
        "--method",
        "methods",
        type=click.Choice(list(METHODS)),
        multiple=True,
        help="Method to compare; repeatable.  [default: all that have a recipe for the set's images]",
    ),
    click.option(
        "--mix",
        "mixes",
        type=click.Choice(POLICIES),
        multiple=True,
        help="Policy to compare each method with; repeatable.  [default: real, diffmix]",
    ),
    click.option("--recipe", help="A recipe's name or a YAML file: arms of any settings, instead of the two above."),
    click.option("--max-steps", type=click.IntRange(1), help="Equal budget: optimiser steps of every run."),
    click.option(
        "--minutes",
        type=click.FloatRange(0, min_open=True),
        help="Equal budget: minutes of every run, of processor time on a CPU, of wall time on a GPU.",
    ),
    click.option("--data", help="Pair set: folder or URL.  [default: data/pairs]"),
    click.option(
        "--test",
        metavar="PATH",
        help="Labelled images to measure on, as of a task.  [default: a tenth of the pair set by hash]",
    ),
    click.option("--encoder", help="timm name, for every arm.  [default: each recipe's]"),
    click.option("--batch-size", type=click.IntRange(2), help="Images of one step, of every arm.  [default: recipes']"),
    click.option("--seeds", type=click.IntRange(1), help="Repetitions of every arm.  [default: 1]"),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="The first of the seeds.  [default: 0]"),
    click.option("--out", help="Folder; a comparison that stopped there goes on.  [default: runs/<time>-compare]"),
    _precision,
    _set,
)


def flags_of(options: dict[str, str]) -> dict[str, str]:
    """Settings of one of the tables above to their options as they are typed, such as `run.seed` to `--seed`."""
    return {path: f"--{_TYPED.get(option, option).replace('_', '-')}" for option, path in options.items()}


def nested(values: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    """The settings that were given, nested as in a recipe; `options` is one of the tables above."""
    settings: dict[str, Any] = {}
    for option, path in options.items():
        if values[option] in (None, ()):
            continue
        *sections, name = path.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = values[option]
    return settings
