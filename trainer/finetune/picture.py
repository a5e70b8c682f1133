"""Gain against forgetting as a picture: where each tuner ended, and how the source was kept on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

PICTURE = "gain-and-forgetting.png"

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker each, for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_LEAST_SPAN = 10  # points of accuracy
_LEAST_FACTOR = 1.6  # between iterations that are labelled
_MARKERS = "osD^vP*X<>hp"


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the picture of what results.json holds; no picture without a source or without a finished leg."""
    groups = [group for group in found["summary"] if "source_accuracy_after" in group]
    if not groups or found["source"] is None:
        return []
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        before = 100 * found["source"]["source_accuracy"]
        for number, group in enumerate(groups):
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            _end(left, group, style)
            _way(right, _rows_of(found, group), style)
        _label_ends(left, before, ", ".join(task["name"] for task in found["tasks"]))
        _label_way(right, before, found)
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(groups) + 1), frameon=False
        )
        path = folder / PICTURE
        figure.savefig(path, dpi=160)
    return [path]


def _rows_of(found: Mapping[str, Any], group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    own = (group["tuner"], group["learning_rate"])
    return [
        row for row in found["tuners"] if row["state"] == "finished" and (row["tuner"], row["learning_rate"]) == own
    ]


def _end(axes: Axes, group: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    gained, kept = group["new_accuracy"], group["source_accuracy_after"]
    axes.errorbar(
        100 * kept["mean"],
        100 * gained["mean"],
        xerr=_bars(kept),
        yerr=_bars(gained),
        capsize=2,
        linestyle="none",
        markersize=7,
        label=f"{group['tuner']}, lr {group['learning_rate']:g}",
        **style,
    )


def _bars(spread: Mapping[str, Any]) -> list[list[float]] | None:
    """One standard deviation down and up, within 0 to 100 %, as matplotlib takes them."""
    if spread["std"] is None:
        return None
    mean, std = 100 * spread["mean"], 100 * spread["std"]
    return [[min(std, mean)], [min(std, 100 - mean)]]


def _label_ends(axes: Axes, before: float, tasks: str) -> None:
    axes.axvline(before, color="#999999", linestyle=":", zorder=0, label="source before")
    axes.set(
        xlabel="source: kNN accuracy after fine-tuning, %  (left: forgotten)",
        ylabel=f"{tasks}: test accuracy, %",
        title="Gain against forgetting, at the end",
    )
    _widen(axes)
    axes.grid(alpha=0.25)


def _way(axes: Axes, rows: Sequence[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    """Mean over seeds of the source accuracy by iteration, one task after the other."""
    iterations = _running([(point["task"], point["iteration"]) for point in rows[0]["curve"]])
    values = [
        100 * sum(row["curve"][place]["source_accuracy"] for row in rows) / len(rows)
        for place in range(len(iterations))
    ]
    axes.plot(iterations, values, markersize=4, linewidth=1.3, **style)


def _running(points: Sequence[tuple[int, int]]) -> list[int]:
    """Iterations of several tasks as one count."""
    counts: list[int] = []
    offset = 0
    for place, (task, iteration) in enumerate(points):
        if place and task != points[place - 1][0]:
            offset = counts[-1]
        counts.append(offset + iteration)
    return counts


def _apart(iterations: Sequence[int]) -> list[int]:
    """Those whose labels do not run into each other on a logarithmic axis; the last one stays."""
    kept = [iterations[-1]]
    for iteration in reversed(iterations):
        if kept[-1] > _LEAST_FACTOR * iteration:
            kept.append(iteration)
    return kept


def _label_way(axes: Axes, before: float, found: Mapping[str, Any]) -> None:
    axes.axhline(before, color="#999999", linestyle=":", zorder=0)
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(
        xlabel="iteration (logarithmic from 10)",
        ylabel="source: kNN accuracy, %",
        title=f"Source on the way: {Path(found['source']['location']).name}",
    )
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)
    curve = next(row["curve"] for row in found["tuners"] if row["state"] == "finished")
    axes.set_xticks(_apart(_running([(point["task"], point["iteration"]) for point in curve])))
    axes.xaxis.set_minor_locator(NullLocator())
    _widen(axes, x=False)


def _widen(axes: Axes, *, x: bool = True) -> None:
    """At least ten points a side: a single image more or less should not look like a cliff."""
    for get, put in ((axes.get_ylim, axes.set_ylim), (axes.get_xlim, axes.set_xlim))[: 1 + x]:
        low, high = get()
        if high - low < _LEAST_SPAN:
            middle = (low + high) / 2
            put(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
