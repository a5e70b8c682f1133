"""From what was typed and the pair set to a run's settings: defaults < recipe < `--set` < flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from manifests.catalog import Catalog
from manifests.errors import UsageError
from trainer import recipes
from trainer.config import DataConfig, PretrainConfig, RunConfig, resolve
from trainer.data.mixing import Policy, make
from trainer.data.order import batches, largest_batch
from trainer.data.rows import Rows
from trainer.methods import METHODS
from trainer.settings import merge, parse_assignments

DEFAULT_METHOD = "simclr"
_SMALLEST_BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `trainer pretrain`. `flags` are nested settings, as in a recipe."""

    method: str | None = None
    recipe: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()
    out: str | None = None
    resume: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The settings, the rows they choose, and what the user should know of how they came about."""

    config: PretrainConfig
    rows: Rows
    policy: Policy
    notes: tuple[str, ...]


def settle(request: Request) -> Settled:
    """Raises `UsageError` for settings that cannot work on this set."""
    asked = _asked(request)
    name, notes = _recipe_name(request, asked)
    recipe = recipes.load(name)
    for method in (request.method, method_of(asked)):
        _check_method(method, recipe, name)
    config = resolve(merge(for_encoder(recipe, asked), {"recipe": name}, asked), f"recipe {name} with your settings")
    rows = Rows.open(config.data.url, config.data.filter)
    policy = make(config.mix, rows)
    config, more = _fit_batch(config, policy.num_items, given="batch_size" in (asked.get("run") or {}))
    policy.check_epochs(_epochs(config.run, policy.num_items))
    return Settled(config=config, rows=rows, policy=policy, notes=(*notes, *more))


def _epochs(run: RunConfig, items: int) -> float:
    return run.max_steps / batches(items, run.batch_size) if run.max_steps else run.epochs


def _asked(request: Request) -> dict[str, Any]:
    """What was typed, as nested settings."""
    asked = merge(parse_assignments(request.assignments), request.flags)
    if isinstance(asked.get("method"), str):  # as in --method
        asked["method"] = {"name": asked["method"]}
    if "recipe" in asked:
        raise UsageError(f"--set recipe={asked['recipe']}: a recipe is chosen by --recipe")
    return asked


def for_encoder(recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, without the arguments of its encoder where another one is asked for."""
    own, other = (layer.get("encoder") for layer in (recipe, asked))
    if not isinstance(own, Mapping) or not isinstance(other, Mapping) or other.get("name") in (None, own.get("name")):
        return recipe
    return {**recipe, "encoder": {"name": own.get("name")}}


def _recipe_name(request: Request, asked: Mapping[str, Any]) -> tuple[str, list[str]]:
    if request.recipe is not None:
        return request.recipe, []
    method = request.method or method_of(asked) or DEFAULT_METHOD
    if method not in METHODS:
        raise UsageError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    data = asked.get("data")
    url = str(data["url"]) if isinstance(data, Mapping) and "url" in data else DataConfig().url
    name = f"{method}-{scale(Catalog.open(url))}"
    return name, [f"recipe {name} (by the method and the set's images; --recipe takes another)"]


def method_of(asked: Mapping[str, Any]) -> str | None:
    """The method that nested settings name, if any."""
    section = asked.get("method")
    return section.get("name") if isinstance(section, Mapping) else section


def scale(catalog: Catalog) -> str:
    """Scale of the recipes that suit the first rows' images."""
    positions = catalog.usable[:64]
    if not len(positions):
        raise UsageError(f"{catalog.storage.url} has no usable row; `pipeline status` says why")
    rows = catalog.rows(positions.tolist())
    images = [row.real or row.synthetic[0] for row in rows]
    side = int(np.median([min(image.width, image.height) for image in images]))
    return recipes.scale_of(str(catalog.plan.source.get("kind")), side)


def _check_method(method: str | None, recipe: Mapping[str, Any], name: str) -> None:
    own = method_of(recipe)
    if method is not None and own is not None and method != own:
        raise UsageError(f"--method {method} and --recipe {name}, which is of {own}: give one, or two that agree")


def _fit_batch(config: PretrainConfig, items: int, *, given: bool) -> tuple[PretrainConfig, list[str]]:
    batch = config.run.batch_size
    if items < _SMALLEST_BATCH:
        raise UsageError(
            f"a batch needs at least {_SMALLEST_BATCH} images and there is {items} usable sample; take a larger set or "
            "a milder --filter"
        )
    if items >= batch:
        return config, []
    if given:
        raise UsageError(
            f"--batch-size {batch} is more than the {items} usable samples; give {items} or less, or a larger set"
        )
    lowered = largest_batch(items, config.run.accumulation)
    note = f"batch size {batch} of the recipe lowered to {lowered}: the set has {items} usable samples"
    return replace(config, run=replace(config.run, batch_size=lowered)), [note]
