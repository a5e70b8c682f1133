"""From what was typed and the pair set to a run's settings: defaults < recipe < `--set` and flags, which must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from manifests.catalog import Catalog
from manifests.errors import UsageError
from trainer import recipes
from trainer.choices import class_of
from trainer.config import DataConfig, PretrainConfig, RunConfig, resolve
from trainer.data.mixing import Policy, check_read, make
from trainer.data.order import batches, largest_batch
from trainer.data.rows import Rows
from trainer.methods import METHODS
from trainer.options import PRETRAIN, flags_of
from trainer.settings import find, merge, parse_assignments, typed

DEFAULT_METHOD = "simclr"
_SMALLEST_BATCH = 2
_FLAGS = {**flags_of(PRETRAIN), "method.name": "--method"}
_OF_OPTIMISERS = {"betas": ("adamw",), "momentum": ("sgd", "lars"), "trust": ("lars",), "trust_clip": ("lars",)}
_REPLACE = (  # typed without the second, the first counts, though the second wins where a recipe has both
    ("run", "epochs", "max_steps"),
    ("optim", "warmup_epochs", "warmup_steps"),
    ("rates", "warmup_steps", "warmup_epochs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `trainer pretrain`. `flags` are nested settings, as in a recipe.

    `has_length` False says that the run's length is decided later: settings are not held against it.
    """

    method: str | None = None
    recipe: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()
    out: str | None = None
    resume: str = "auto"
    has_length: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The settings, the rows they choose, and what the user should know of how they came about."""

    config: PretrainConfig
    rows: Rows
    policy: Policy
    notes: tuple[str, ...]


def settle(request: Request) -> Settled:
    """Raises `UsageError` for settings that cannot work on this set."""
    assigned = _assigned(request)
    asked = _asked(request, assigned)
    name, notes = _recipe_name(request, asked)
    recipe = recipes.load(name)
    _check_method(method_of(asked), recipe, name)
    config = resolve(merge(beneath(recipe, asked), {"recipe": name}, asked), f"recipe {name} with your settings")
    check_read(assigned.get("mix"), [config.mix])
    rows = Rows.open(config.data.url, config.data.filter)
    policy = make(config.mix, rows)
    config, more = _fit_batch(config, policy.num_items, given="batch_size" in (asked.get("run") or {}))
    if request.has_length:
        policy.check_epochs(_epochs(config.run, policy.num_items))
    return Settled(config=config, rows=rows, policy=policy, notes=(*notes, *more, *_unused(config, assigned)))


def _epochs(run: RunConfig, items: int) -> float:
    return run.max_steps / batches(items, run.batch_size) if run.max_steps else run.epochs


def _assigned(request: Request) -> dict[str, Any]:
    """What was typed by `--set`, as nested settings."""
    assigned = parse_assignments(request.assignments)
    if isinstance(assigned.get("method"), str):  # as in --method
        assigned["method"] = {"name": assigned["method"]}
    return assigned


def _asked(request: Request, assigned: Mapping[str, Any]) -> dict[str, Any]:
    """All that was typed, as nested settings."""
    method = {} if request.method is None else {"method": {"name": request.method}}
    asked = typed(assigned, merge(request.flags, method), _FLAGS)
    if isinstance(asked.get("method"), str):
        asked["method"] = {"name": asked["method"]}
    if "recipe" in asked:
        raise UsageError(f"--set recipe={asked['recipe']}: a recipe is chosen by --recipe")
    return asked


def beneath(recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, without what does not fit, or would win over, the settings above it."""
    return yielding(_for_encoder(recipe, asked), asked)


def yielding(recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, without what would win over the settings above it, such as its steps over epochs that were typed."""
    below = dict(recipe)
    for name, first, second in _REPLACE:
        own = below.get(name)
        if isinstance(own, Mapping) and find(asked, f"{name}.{first}") and not find(asked, f"{name}.{second}"):
            below[name] = {key: value for key, value in own.items() if key != second}
    return below


def _for_encoder(recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, without the arguments of its encoder where another one is asked for."""
    own, other = (layer.get("encoder") for layer in (recipe, asked))
    if not isinstance(own, Mapping) or not isinstance(other, Mapping) or other.get("name") in (None, own.get("name")):
        return recipe
    return {**recipe, "encoder": {"name": own.get("name")}}


def _recipe_name(request: Request, asked: Mapping[str, Any]) -> tuple[str, list[str]]:
    if request.recipe is not None:
        return request.recipe, []
    method = method_of(asked) or DEFAULT_METHOD
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


def _unused(config: PretrainConfig, assigned: Mapping[str, Any]) -> list[str]:
    """Notes on what was typed and changes nothing with this method's views, or this optimiser."""
    method, settings = class_of(METHODS, config.method.name), config.method.settings
    local_crops = getattr(settings, "local_crops", method.num_local_crops)
    of_local = [] if local_crops else ["mix.synthetic_local_crops", "views.local_size", "views.local_scale"]
    of_several = [] if method.num_crops > 1 else ["mix.synthetic_view", "mix.same_variation"]
    reasons = {**dict.fromkeys(of_local, "no small crops"), **dict.fromkeys(of_several, "one view of an image only")}
    of_views = [
        f"{path} changes nothing: {config.method.name} takes {reason}"
        for path, reason in reasons.items()
        if find(assigned, path)
    ]
    return of_views + of_optimiser(config.optim.name, assigned)


def of_optimiser(name: str, asked: Mapping[str, Any]) -> list[str]:
    """Notes on settings of other optimisers than the chosen one."""
    return [
        f"optim.{setting} changes nothing: it is of {' and '.join(owners)}, and optim.name is {name}"
        for setting, owners in _OF_OPTIMISERS.items()
        if name not in owners and find(asked, f"optim.{setting}")
    ]


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
