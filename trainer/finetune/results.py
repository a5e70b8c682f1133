"""results.json of a comparison, and the same for people: one table, and how the encoder came about."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from manifests.errors import DiffmixError
from trainer.data.rows import Rows
from trainer.finetune.origin import Origin
from trainer.finetune.settle import Settled
from trainer.text_table import aligned, percent
from trainer.tuners.spec import TunerSpec

_CONFIDENCE = 0.95
_SPREAD = ("new_accuracy", "source_accuracy_after", "source_linear_accuracy_after", "mean_accuracy")


def collect(
    settled: Settled, before: Mapping[str, float], rows: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that results.json says, accuracies as shares in 0..1."""
    source = settled.source
    return {
        "state": "diverged" if any(row["state"] == "diverged" for row in rows) else "finished",
        "method": "finetune",
        "encoder": settled.origin.encoder.name,
        "init": settled.config.init,
        "adapters": settled.config.adapters,
        "tuners": list(rows),
        "summary": summarise(rows),
        "sweep": _sweep(rows, tried),
        "source": None
        if source is None
        else {
            "location": source.location,
            "bank": len(source.bank),
            "queries": len(source.queries),
            "note": source.note,
            "k": settled.config.evaluation.k,
            "temperature": settled.config.evaluation.temperature,
            **before,
        },
        "tasks": [
            {
                "name": task.name,
                "location": task.location,
                "classes": list(task.class_names),
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
                "skipped": list(task.skipped),
            }
            for task in settled.tasks
        ],
        "pretraining": _pretraining(settled.origin),
    }


def _pretraining(origin: Origin) -> dict[str, Any]:
    """What the run says that made the encoder, and how many pairs it saw; empty where no run made it."""
    run = origin.results
    found: dict[str, Any] = {
        name: run[name] for name in ("method", "mix", "steps", "knn_before", "final") if name in run
    }
    if not found or origin.data_url is None:
        return found
    with contextlib.suppress(DiffmixError):  # the set may be gone by now
        found |= {"data": origin.data_url, "pairs": len(Rows.open(origin.data_url, origin.filters))}
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and 95 % interval over the seeds of each tuner and learning rate, in order."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == "finished":
            groups.setdefault((row["tuner"], row["learning_rate"]), []).append(row)
    return [
        {
            "tuner": tuner,
            "learning_rate": rate,
            "seeds": len(group),
            "trainable_parameters": group[0]["trainable_parameters"],
            **{name: _spread([row[name] for row in group]) for name in _SPREAD if group[0].get(name) is not None},
        }
        for (tuner, rate), group in groups.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Of few seeds: Student's interval of the mean, within 0..1; None for one seed, of which nothing is known."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "interval": None}
    from scipy.stats import t

    std = statistics.stdev(values)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "interval": [max(0.0, mean - half), min(1.0, mean + half)]}


def chosen_rates(spec: TunerSpec, tried: Sequence[Mapping[str, Any]]) -> list[float]:
    """The rate that is best on the validation part; of full fine-tuning also its neighbour, the next lower one.

    Of equals the lowest: it forgets least. Where all rates diverged, the lowest.
    """
    own = [row for row in tried if row["tuner"] == spec.text]
    rates = sorted(row["learning_rate"] for row in own)
    finished = [row for row in own if row["state"] == "finished"]
    if not finished:
        return rates[:1]
    best = max(finished, key=lambda row: (row["validation_accuracy"], -row["learning_rate"]))["learning_rate"]
    if spec.name != "full" or len(rates) < 2:
        return [best]
    place = rates.index(best)
    return [best, rates[place - 1] if place else rates[1]]


def _sweep(rows: Sequence[Mapping[str, Any]], tried: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = {(row["tuner"], row["learning_rate"]) for row in rows}
    return [
        {
            "tuner": row["tuner"],
            "learning_rate": row["learning_rate"],
            "state": row["state"],
            "validation_accuracy": row.get("validation_accuracy"),
            "shown": (row["tuner"], row["learning_rate"]) in shown,
        }
        for row in tried
    ]


def leg_line(row: Mapping[str, Any]) -> str:
    """One line that says how a leg ended."""
    if row["state"] != "finished":
        return f"{row['state']}: {row.get('reason')}"
    kept = row["source_accuracy_after"]
    source = "" if kept is None else f", source {row['source_accuracy_before']:.1%} -> {kept:.1%}"
    return (
        f"new {row['new_accuracy']:.1%} (validation {row['validation_accuracy']:.1%}){source}, "
        f"{row['trainable_parameters']:,} trained parameters"
    )


_COLUMNS = ("tuner", "learning rate", "trained", "new task", "source kNN", "change", "source probe", "mean")


def text(found: Mapping[str, Any]) -> str:
    """The table, what it means, and where the pictures are."""
    source, tasks = found["source"], found["tasks"]
    rows = [_COLUMNS, *(_cells(group, source) for group in found["summary"])]
    lines = [*_history(found), "", *aligned(rows), ""]
    lines += [
        f"{row['tuner']} at {row['learning_rate']:g}, seed {row['seed']}, diverged: {row['reason']}"
        for row in found["tuners"]
        if row["state"] == "diverged"
    ]
    lines += _footnotes(tasks, source)
    if any(group["seeds"] > 1 for group in found["summary"]):
        lines.append("± is the standard deviation over seeds; their 95 % intervals are in results.json")
    lines += _of_sequence(found)
    lines += [f"picture: {path}" for path in found.get("pictures", ())]
    return "\n".join(lines)


def _footnotes(tasks: Sequence[Mapping[str, Any]], source: Mapping[str, Any] | None) -> list[str]:
    """What the columns are, and how fine and how far above chance their numbers can be."""
    test = sum(task["test"] for task in tasks)
    names = ", ".join(task["name"] for task in tasks)
    chance = statistics.fmean(1 / max(1, len(task["classes"])) for task in tasks)
    lines = [f"new task: test accuracy on {names}, {test} images (one is {100 / test:.2g} points; chance {chance:.1%})"]
    if source is not None:
        probe = source.get("source_linear_accuracy")
        linear = "" if probe is None else f"; a linear probe fitted before, {probe:.1%} then"
        lines += [
            f"source: {source['queries']} images seen by the adapted encoder, kNN {source['source_accuracy']:.1%} "
            f"before, change in points{linear}",
            f"  {source['location']}; {source['note']}",
            "mean: of new task and source kNN",
        ]
    return lines


def _history(found: Mapping[str, Any]) -> list[str]:
    """How the encoder came about, where a pre-training run tells."""
    run = found["pretraining"]
    final = run.get("final") or {}
    if "knn" not in final:
        return [f"encoder: {found['encoder']} of {found['init']}"]
    before = f"{run['knn_before']:.1%} -> " if run.get("knn_before") is not None else ""
    lines = [f"{run['pairs']} pairs of {run['data']}"] if "pairs" in run else []
    lines += [
        f"encoder: {found['encoder']} of {found['init']}, {run.get('method')} with --mix {run.get('mix')}, "
        f"{run.get('steps')} steps",
        f"  its own kNN, of a tenth of the pairs: {before}{final['knn']:.1%} (raw pixels {final['pixels_knn']:.1%})",
    ]
    if "knn_shift-rotate" in final:
        moved, pixels = final["knn_shift-rotate"], final["pixels_knn_shift-rotate"]
        lines.append(f"  kNN under shift and rotation {moved:.1%} (raw pixels {pixels:.1%})")
    return lines


def _cells(group: Mapping[str, Any], source: Mapping[str, Any] | None) -> tuple[str, ...]:
    kept = group.get("source_accuracy_after")
    change = "-" if kept is None or source is None else f"{100 * (kept['mean'] - source['source_accuracy']):+.1f}"
    return (
        group["tuner"],
        f"{group['learning_rate']:g}",
        f"{group['trainable_parameters']:,}",
        percent(group.get("new_accuracy")),
        percent(kept),
        change,
        percent(group.get("source_linear_accuracy_after")),
        percent(group.get("mean_accuracy")),
    )


def _of_sequence(found: Mapping[str, Any]) -> list[str]:
    """Backward transfer and forgetting of the earlier tasks, means over seeds."""
    lines = []
    for group in found["summary"]:
        rows = [
            row
            for row in found["tuners"]
            if row["state"] == "finished"
            and (row["tuner"], row["learning_rate"]) == (group["tuner"], group["learning_rate"])
        ]
        if rows[0]["backward_transfer"] is None:
            continue
        transfer = statistics.fmean(row["backward_transfer"] for row in rows)
        lost = ", ".join(
            f"{name} {100 * statistics.fmean(row['forgetting'][name] for row in rows):.1f}"
            for name in rows[0]["forgetting"]
        )
        lines.append(
            f"{group['tuner']} at {group['learning_rate']:g}: backward transfer {100 * transfer:+.1f} points, "
            f"forgetting {lost}"
        )
    return lines
