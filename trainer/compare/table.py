"""The results of a comparison for people: what was equal, then one table, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.compare.results import difference
from trainer.text_table import aligned, percent

_MOST_NAMES = 6  # settings of a section that a line lists
_NONE = "-"


def text(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n".join([*_above(found), "", *aligned(cells(found)), *_below(found)])


def markdown(found: Mapping[str, Any]) -> str:
    """table.md."""
    header, *rows = cells(found)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n\n".join([*_above(found), "\n".join(table), *_below(found)]) + "\n"


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The header and a row for each arm, in the order given, then raw pixels."""
    baseline = next((one for one in found["summary"] if one["arm"] == found["baseline"]), None)
    extra = [] if baseline is None else [f"kNN vs {found['baseline']}", f"linear vs {found['baseline']}"]
    header = ["arm", "kNN", "linear", *extra, "kNN before", "rank", "seeds", "steps", "images seen", "images/s"]
    header += ["minutes", "loss"]
    rows = [_row(one, found["budget"], baseline) for one in found["summary"]]
    pixels = ["raw pixels", *(percent(_exact(found["pixels"].get(name))) for name in ("knn", "linear"))]
    return [header, *rows, pixels + [_NONE] * (len(header) - 3)]


def _row(one: Mapping[str, Any], budget: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[str]:
    facts = budget["arms"][one["arm"]]
    gone = "collapsed" if one["collapsed"] and not one["n"] else _NONE
    gains = [] if baseline is None else [_points(difference(one, baseline, name)) for name in ("knn", "linear")]
    rate, minutes = _speed(one, facts, budget["clock"])
    return [
        one["arm"],
        percent(one.get("knn"), gone),
        percent(one.get("linear"), gone),
        *gains,
        percent(one.get("knn_before")),
        _number(one.get("feature_rank"), ".1f"),
        str(one["n"]) + (f" (+{one['collapsed']} collapsed)" if one["collapsed"] else ""),
        f"{facts['steps']:,}",
        f"{facts['images']:,}",
        _NONE if rate is None else f"{rate:.0f}",
        _NONE if minutes is None else f"{minutes:.2f}",
        _number(one.get("loss"), ".3g"),
    ]


def _speed(one: Mapping[str, Any], facts: Mapping[str, Any], clock: str) -> tuple[float | None, float | None]:
    """Images/s and minutes of training; on a CPU by the steps that were timed, whatever else the machine did."""
    if clock == "processor time":
        return facts["images_per_second"], facts["minutes"]
    if "seconds" not in one:
        return None, None
    return one["images_per_second"]["mean"], one["seconds"]["mean"] / 60


def _above(found: Mapping[str, Any]) -> list[str]:
    queries, classes = found["queries"], found["classes"]
    return [
        _budget(found["budget"]),
        f"Trained on {found['data']}. Bank: {found['bank']} labelled real images of it; {queries} queries of "
        f"{classes} classes: {found['queries_are']}. Weighted kNN, k = {found['k']}, T = {found['temperature']:g}; "
        f"one query is {100 / queries:.2g} points, chance {100 / classes:.1f} %.",
        f"Equal in all arms: {', '.join(found['equal']) or 'no section of the settings'}. "
        f"Not equal: {_unequal(found['differing']) or 'nothing'}.",
    ]


def _budget(budget: Mapping[str, Any]) -> str:
    arms, clock = budget["arms"].values(), budget["clock"]
    steps, epochs = ([facts[name] for facts in arms] for name in ("steps", "epochs"))
    minutes = [facts["minutes"] for facts in arms]
    if budget["minutes"] is None:
        first = next(iter(arms))
        return (
            f"Budget of every run: {first['steps']:,} steps of {first['batch_size']} images, {first['images']:,} "
            f"images ({_range(epochs, '.3g')} epochs of an arm's samples), {_range(minutes, '.2f')} minutes of {clock}"
            f"{_by_timing(clock)}."
        )
    return (
        f"Budget of every run: {budget['minutes']:g} minutes of {clock}"
        f"{_by_timing(clock)}. Steps ({_range(steps, ',')}), images and epochs ({_range(epochs, '.3g')}) are not equal."
    )


def _by_timing(clock: str) -> str:
    """On a CPU runs are not measured but steps before them, whatever else the machine did meanwhile."""
    return " (minutes and images/s by the time of a step, measured before)" if clock == "processor time" else ""


def _unequal(differing: Mapping[str, Any]) -> str:
    """`method, mix (policy), optim (lr, clip)`."""
    if "method.name" in differing:  # of different methods no setting means the same
        differing = {"method": None, **{name: None for name in differing if not name.startswith("method.")}}
    sections: dict[str, list[str]] = {}
    for path in differing:
        section, _, name = path.partition(".")
        sections.setdefault(section, []).extend([name] if name else [])
    return ", ".join(section + _listed(names) for section, names in sections.items())


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return f" ({', '.join([*names[:_MOST_NAMES], *more])})" if names else ""


def _below(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{row['folder']} collapsed: {row['reason']}" for row in found["runs"] if row["state"] == "collapsed"]
    open_runs = [row["folder"] for row in found["runs"] if row["state"] == "unfinished"]
    if open_runs:
        lines.append(f"Not finished yet: {', '.join(open_runs)}.")
    if any(one["n"] > 1 for one in found["summary"]):
        lines.append("± is the standard deviation over seeds.")
    return lines


def _exact(value: float | None) -> dict[str, float | None] | None:
    return None if value is None else {"mean": value, "std": None}


def _points(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:+.1f}"


def _number(spread: Mapping[str, Any] | None, form: str) -> str:
    return format(spread["mean"], form) if spread else _NONE


def _range(values: Iterable[float], form: str) -> str:
    found = list(values)
    low, high = format(min(found), form), format(max(found), form)
    return low if low == high else f"{low} to {high}"
