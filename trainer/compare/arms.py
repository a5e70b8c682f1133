"""The arms of a comparison: pre-training settings by name, all of them settled and checked before one is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manifests.catalog import Catalog
from manifests.errors import UsageError
from trainer import recipes, settle
from trainer.compare.settings import CompareConfig, Request, check_baseline
from trainer.config import PretrainConfig
from trainer.data.mixing import check_read
from trainer.data.order import batches, micro_batch_size
from trainer.methods import METHODS
from trainer.options import COMPARE_ARMS, flags_of
from trainer.parts import make_method
from trainer.settings import find, merge, parse_assignments, typed
from trainer.settle import Settled, beneath

DEFAULT_MIXES = ("real", "diffmix")

_NAME = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
# Encoders are measured afterwards, on the same images for all; for the log kNN at the start and the end suffices.
_DEFAULTS: Mapping[str, Any] = {"evaluation": {"final": False, "every": 0}}
_TAKEN = {  # settings that the comparison decides
    ("run", "max_steps"): "the budget says how long all runs are",
    ("run", "epochs"): "the budget says how long all runs are",
    ("run", "seed"): "--seed and --seeds say which seeds all arms have",
}
_PRODUCT = {
    ("mix", "policy"): "--mix says which policies are compared",
    ("method", "name"): "--method says which methods are compared",
}
_ITS_OWN = {("data", "url"): "--data, or `data` of the recipe, names the pair set; only an arm may have another"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A line of the table. `flags` are nested settings that win over `recipe`; `settled` is what they come to."""

    name: str
    recipe: str | None
    flags: Mapping[str, Any]
    settled: Settled

    def config(self, steps: int, seed: int) -> PretrainConfig:
        """The settings of one run."""
        config = self.settled.config
        return replace(config, run=replace(config.run, max_steps=steps, seed=seed))

    def request(self, steps: int, seed: int, out: str) -> settle.Request:
        """The call of `trainer pretrain` that makes one run."""
        flags = merge(self.flags, {"run": {"max_steps": steps, "seed": seed}})
        return settle.Request(recipe=self.recipe, flags=flags, out=out)

    def check_steps(self, steps: int) -> None:
        """Refuse a policy that cannot be of a run of so many steps."""
        policy = self.settled.policy
        policy.check_epochs(steps / batches(policy.num_items, self.settled.config.run.batch_size))


def open_arms(config: CompareConfig, request: Request) -> tuple[CompareConfig, tuple[Arm, ...]]:
    """The settings with all arms written out, and the arms; raises `UsageError` naming the arm that cannot be."""
    assigned = parse_assignments(request.assignments)
    _refuse(config.common, {**_TAKEN, **_ITS_OWN}, "common")
    _refuse(assigned, {**_TAKEN, **_ITS_OWN, **({} if config.arms else _PRODUCT)}, "--set")
    asked = typed(assigned, request.arm_flags, flags_of(COMPARE_ARMS))
    named = dict(config.arms) or _product(config, request)
    check_baseline(config, list(named))
    arms = tuple(_arm(name, values, config, asked) for name, values in named.items())
    _check_batches(config, arms)
    _check_alike(arms)
    for of_all in (config.common, assigned):
        check_read(of_all.get("mix"), [arm.settled.config.mix for arm in arms])
    return replace(config, arms=named), arms


def _product(config: CompareConfig, request: Request) -> dict[str, dict[str, Any]]:
    """Each method with each policy."""
    methods = list(dict.fromkeys(request.methods)) or _methods(config)
    mixes = list(dict.fromkeys(request.mixes)) or DEFAULT_MIXES
    return {
        f"{method}-{mix}": {"method": {"name": method}, "mix": {"policy": mix}} for method in methods for mix in mixes
    }


def _methods(config: CompareConfig) -> list[str]:
    """Those that have a recipe for the set's images; all where a recipe is given for them."""
    if "recipe" in config.common:
        return [settle.method_of(recipes.load(str(config.common["recipe"]))) or settle.DEFAULT_METHOD]
    scale = settle.scale(Catalog.open(config.data))
    return [method for method in METHODS if f"{method}-{scale}" in recipes.names()]


def _arm(name: str, values: Mapping[str, Any], config: CompareConfig, asked: Mapping[str, Any]) -> Arm:
    """Its recipe < common < its own settings < --set and flags."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"arm {name!r}: names are of a-z, 0-9 and . + _ -, since folders are called so")
    try:
        _refuse(values, _TAKEN, "its settings")
        recipe = values.get("recipe", config.common.get("recipe"))
        flags = _layered(_DEFAULTS, {"data": {"url": config.data}}, config.common, values, asked)
        flags.pop("recipe", None)
        steps = config.budget.max_steps
        length = {"run": {"max_steps": steps}} if steps else {}
        settled = settle.settle(settle.Request(recipe=recipe, flags=merge(flags, length), has_length=steps is not None))
        check_read(values.get("mix"), [settled.config.mix])
        method = make_method(settled.config)  # refuses encoders and settings that cannot be
        settled.policy.check_views(method.num_crops, method.num_local_crops)
        run = settled.config.run
        method.check_batch(micro_batch_size(run.batch_size, 1, run.accumulation))  # of more processes: when it is timed
    except UsageError as error:
        raise UsageError(f"arm {name}: {error}") from error
    return Arm(name=name, recipe=settled.config.recipe, flags=flags, settled=settled)


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; another encoder does not inherit the arguments of the one before, see `settle.beneath`."""
    merged: dict[str, Any] = {}
    for layer in layers:
        method = layer.get("method")
        named = {**layer, "method": {"name": method}} if isinstance(method, str) else layer
        merged = merge(beneath(merged, named), named)
    return merged


def _refuse(values: Mapping[str, Any], taken: Mapping[tuple[str, str], str], where: str) -> None:
    for (name, key), reason in taken.items():
        if find(values, f"{name}.{key}"):
            raise UsageError(f"{name}.{key} cannot be set by {where}: {reason}")


def _check_batches(config: CompareConfig, arms: Sequence[Arm]) -> None:
    """Equal steps are equal images only of equal batches."""
    batches = {arm.name: arm.settled.config.run.batch_size for arm in arms}
    if config.budget.max_steps is not None and len(set(batches.values())) > 1:
        listed = ", ".join(f"{name} {batch}" for name, batch in batches.items())
        raise UsageError(
            f"{config.budget.max_steps} steps are not an equal budget for unequal batches ({listed}): give one with "
            "--batch-size N, or an equal compute budget with --minutes M"
        )


def _check_alike(arms: Sequence[Arm]) -> None:
    kinds = {arm.settled.config.run.precision for arm in arms}
    if len(kinds) > 1:
        raise UsageError(f"arms compute in {', '.join(sorted(kinds))}: give all the same with --precision")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; the arguments of an encoder stay together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = prefix + name
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) and path != "encoder.args" else {path: value}
    return found


def differing(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """The settings in which arms differ and the value in each; None where an arm has no such setting."""
    settings = [flat(arm.settled.config.to_dict()) for arm in arms]
    names = [name for name in dict.fromkeys(name for one in settings for name in one) if name not in _UNTOLD]
    found = {name: [one.get(name) for one in settings] for name in names}
    methods = found["method.name"]
    return {name: values for name, values in found.items() if _differs(name, values, methods)}


def _differs(name: str, values: Sequence[Any], methods: Sequence[Any]) -> bool:
    """A method's own settings are compared between arms of that method."""
    if not name.startswith("method.") or name == "method.name":
        return any(value != values[0] for value in values)
    of_method = dict(zip(methods, values, strict=True))
    return any(value != of_method[method] for method, value in zip(methods, values, strict=True))


_UNTOLD = ("recipe", "run.epochs", "run.max_steps")  # of recipes, or decided by the budget
