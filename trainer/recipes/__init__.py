"""Recipes: YAML files of settings, one per published setting and small ones for CIFAR-10 and the digits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from manifests.errors import UsageError
from trainer.choices import nearest

_FOLDER = Path(__file__).parent
SMALL_SIDE = 64  # pixels; images up to it are trained as CIFAR-10 is


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but that 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None)


def read_yaml(text: str) -> Any:
    """The value of a YAML text, safely; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader


def names(kind: str = "pretrain") -> list[str]:
    """Recipes that ship with diffmix."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.yaml"))


def load(name: str, kind: str = "pretrain") -> dict[str, Any]:
    """The settings of a shipped recipe, or of a YAML file; raises `UsageError` with the nearest name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / kind / f"{name}.yaml"
    try:
        values = read_yaml(path.read_text("utf-8"))
    except FileNotFoundError as error:
        near = nearest(name, names(kind), alike=0.4)
        hint = f"did you mean {near!r}?" if near else "give a YAML file, or one of these."
        raise UsageError(f"no recipe {name!r}; {hint} Recipes: {', '.join(names(kind))}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} holds {type(values).__name__}; it must map names to settings")
    return values


def scale_of(source_kind: str | None, side: int) -> str:
    """Which scale of a method's recipes suits a pair set: by its source and its images' short side in pixels."""
    if source_kind == "digits":
        return "digits"
    return "cifar10" if side <= SMALL_SIDE else "imagenet"
