"""The options of `trainer pretrain`, and the nested settings that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from trainer.methods import METHODS

F = TypeVar("F", bound=Callable[..., Any])

# Option to the setting that it stands for, as in a recipe.
_SETTINGS = {
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
POLICIES = ("real", "synthetic", "diffmix", "union", "inflate")  # of data.mixing, which is not light to import


def pretrain_options(command: F) -> F:
    """All options that settle what a pre-training run is."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option("--method", type=click.Choice(list(METHODS)), help="What to train.  [default: the recipe's, simclr]"),
    click.option("--data", help="Pair set: folder or URL.  [default: data/pairs]"),
    click.option("--mix", type=click.Choice(POLICIES), help="Which image feeds which view.  [default: diffmix]"),
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
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="auto: fp32 on CPU, bf16 on GPU."
    ),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of weights, order and augmentation.  [default: 0]"),
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as optim.lr=1e-3."
    ),
)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, nested as in a recipe."""
    settings: dict[str, Any] = {}
    for option, path in _SETTINGS.items():
        if values[option] in (None, ()):
            continue
        *sections, name = path.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = values[option]
    return settings
