"""What settings of any command are made of: nested plain values, checked against dataclasses, layered and compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from manifests.errors import UsageError
from trainer.choices import nearest
from trainer.recipes import read_yaml

T = TypeVar("T")

BESIDE: Mapping[str, bool] = {"beside": True}  # metadata of a field: its keys are saved beside its siblings'


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises `UsageError` unless a setting is as it must be."""
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {allowed}")


def section(owner: type, name: str, value: Any, where: str) -> Any:
    """The field `name` of the dataclass `owner` from a plain value: a section of settings, or one setting."""
    hint = get_type_hints(owner)[name]
    if not is_dataclass(hint):
        return checked(hint, value, where, name)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: {name} is {value!r}; it is a section with keys {', '.join(_names(hint))}")
    check_keys(hint, value, where, f"{name}.")
    return build(hint, value, where, f"{name}.")  # type: ignore[arg-type]  # a dataclass, as checked


def build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """An instance of a dataclass from plain values, types checked; `UsageError` names the first that is wrong."""
    built: T = checked(cls, dict(values), where, prefix.removesuffix("."))
    return built


def checked(hint: Any, value: Any, where: str, name: str) -> Any:
    """A plain value as what the type hint says; `UsageError` names the key, what arrived and what is wrong."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (name, *first["loc"]))).lstrip(".")
        if first["type"] == "missing":
            raise UsageError(f"{where}: {key} is missing") from error
        raise UsageError(f"{where}: {key} is {first['input']!r}: {first['msg'].lower()}") from error


def _names(cls: Any) -> list[str]:
    return [item.name for item in fields(cls)]


def check_keys(cls: Any, values: Mapping[str, Any], where: str, prefix: str) -> None:
    """Refuse keys that are no fields of the dataclass, with the nearest one."""
    known = _names(cls)
    for name in values:
        if name not in known:
            raise UsageError(f"{where}: unknown key {prefix + str(name)!r}{_meant(prefix, str(name), known)}")


def _meant(prefix: str, name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"; did you mean {prefix + near!r}?" if near else f"; known: {', '.join(sorted(known))}"


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later layers winning key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            old = merged.get(name)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[name] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3"]` as nested settings; values are YAML."""
    layers = []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not all(path.split(".")):
            raise UsageError(f"--set {assignment!r}: give KEY=VALUE, such as optim.lr=1e-3")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {assignment!r}: {text!r} is not a YAML value") from error
        for name in reversed(path.split(".")):
            value = {name: value}
        layers.append(value)
    return merge(*layers)


def typed(assigned: Mapping[str, Any], flags: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """All that was typed, by `--set` and by flags, as nested settings.

    `names` maps settings to their flags, as in `options.flags_of`. Raises `UsageError` where a setting is given in both
    ways with different values.
    """
    for path, flag in names.items():
        for given, other in zip(find(flags, path), find(assigned, path), strict=False):
            if plain(given) != plain(other):
                raise UsageError(f"--set {path}={_shown(other)} and {flag} {_shown(given)} disagree: give one of them")
    return merge(assigned, flags)


def find(values: Any, path: str) -> list[Any]:
    """The value of a setting, in a list, or what stands where its section should; empty if it is not given."""
    for name in path.split("."):
        if not isinstance(values, Mapping):
            break
        if name not in values:
            return []
        values = values[name]
    return [values]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Keys, old and new values of what differs between a run and its continuation; `free` keys may."""
    found: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*old, *new]):
        path, before, after = prefix + name, old.get(name), new.get(name)
        if path in free or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and path != "encoder.args":
            found += differences(before, after, free, f"{path}.")
        else:
            found.append((path, before, after))
    return found


def completed(old: Mapping[str, Any], new: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Settings that an earlier version saved, with the defaults of those of `new` that it did not have yet.

    `config` is the dataclass that `new` is of.
    """
    done = dict(old)
    for item in fields(config):
        name, value = item.name, getattr(config, item.name)
        before, now = done.get(name), new.get(name)
        if item.metadata == BESIDE:
            done = completed(done, new, value)
        elif is_dataclass(value) and isinstance(before, Mapping) and isinstance(now, Mapping):
            done[name] = completed(before, now, value)
        elif name in new and name not in done and (default := _default(item)) is not MISSING:
            done[name] = default
    return done


def _default(item: Field[Any]) -> Any:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return plain(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else plain(value)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Settings as they are saved and printed, a section a line."""
    return "".join(f"{name}: {_in_flow(value)}\n" for name, value in values.items())


def _in_flow(value: Any) -> str:
    """A section as YAML on as few lines as it needs."""
    return (
        yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=116)
        .split("\n...")[0]
        .rstrip()
    )


def plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, which YAML and JSON know."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
