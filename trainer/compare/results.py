"""results.json of a comparison: every run, each arm over its seeds, and what was equal between them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.compare.arms import Arm, differing
from trainer.compare.budget import Budget
from trainer.compare.evaluation import Exam
from trainer.compare.settings import CompareConfig
from trainer.data.order import batches

_SPREAD = ("knn", "linear", "knn_before", "feature_rank", "images_per_second", "seconds", "loss")
_SECTIONS = ("method", "mix", "data", "views", "encoder", "init", "optim", "run")


def collect(
    config: CompareConfig,
    arms: Sequence[Arm],
    budget: Budget,
    exam: Exam,
    pixels: Mapping[str, float],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """All that results.json says, accuracies as shares in 0..1."""
    return {
        "state": _state(rows),
        "method": "compare",
        "budget": {
            "max_steps": budget["max_steps"],
            "minutes": budget["minutes"],
            "clock": budget["clock"],
            "arms": {arm.name: _facts(arm, budget["arms"][arm.name]) for arm in arms},
        },
        "data": config.data,
        "bank": len(exam.bank),
        "queries": len(exam.queries),
        "queries_are": exam.note,
        "classes": len(exam.bank.labels.unique()),
        "k": exam.k,
        "temperature": exam.temperature,
        "pixels": dict(pixels),
        "seeds": list(config.all_seeds),
        "baseline": config.baseline,
        **_equality(arms),
        "runs": list(rows),
        "summary": [summarise(arm.name, rows) for arm in arms],
    }


def _state(rows: Sequence[Mapping[str, Any]]) -> str:
    states = {row["state"] for row in rows}
    if "unfinished" in states:
        return "unfinished"
    return "collapsed" if "collapsed" in states else "finished"


def _facts(arm: Arm, of_budget: Mapping[str, Any]) -> dict[str, Any]:
    """What the budget means for an arm."""
    batch, items = arm.settled.config.run.batch_size, arm.settled.policy.num_items
    images = of_budget["steps"] * batch
    seconds = of_budget["seconds_per_step"]
    return {
        "steps": of_budget["steps"],
        "batch_size": batch,
        "images": images,
        "epochs": of_budget["steps"] / batches(items, batch),
        "seconds_per_step": seconds,
        "images_per_second": batch / seconds,
        "minutes": of_budget["steps"] * seconds / 60,
    }


def _equality(arms: Sequence[Arm]) -> dict[str, Any]:
    """Sections of the settings in which all arms agree, and the settings in which they do not."""
    found = differing(arms)
    apart = {name.partition(".")[0] for name in found}
    return {
        "equal": [name for name in _SECTIONS if name not in apart],
        "differing": {
            name: {arm.name: value for arm, value in zip(arms, values, strict=True)} for name, values in found.items()
        },
    }


def summarise(arm: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of an arm that finished, `n` of them."""
    own = [row for row in rows if row["arm"] == arm]
    finished = [row for row in own if row["state"] == "finished"]
    values = {name: [row[name] for row in finished if row.get(name) is not None] for name in _SPREAD}
    return {
        "arm": arm,
        "n": len(finished),
        "collapsed": sum(row["state"] == "collapsed" for row in own),
        "unfinished": sum(row["state"] == "unfinished" for row in own),
        **{name: spread(found) for name, found in values.items() if found},
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Of one value the standard deviation is not known: None."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}


def difference(one: Mapping[str, Any], other: Mapping[str, Any] | None, name: str) -> float | None:
    """Of the means of two arms; None where one of them has none."""
    if other is None or name not in one or name not in other:
        return None
    return float(one[name]["mean"] - other[name]["mean"])
