"""What the files of a fine-tuning say to those who list its runs, or ask for its encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.engine.run_folder import CONFIG, ENCODER, RESULTS, read_values


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of results.json: the best `tuner`, its `steps` over all tasks, `new_accuracy` and, of the source, `knn`.

    The best is that of the highest mean of new task and source, else of new task. Empty for what is no fine-tuning, or
    has no tuner that finished.
    """
    if results.get("method") != "finetune":
        return {}
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):  # of files that are not ours
        best = max(results["summary"], key=lambda group: group.get("mean_accuracy", group["new_accuracy"])["mean"])
        curve = next(row["curve"] for row in _finished(results) if row["tuner"] == best["tuner"])
        return {
            "tuner": best["tuner"],
            "steps": sum({point["task"]: point["iteration"] for point in curve}.values()),
            "new_accuracy": best["new_accuracy"]["mean"],
            "knn": best.get("source_accuracy_after", {}).get("mean"),
        }
    return {}


def _finished(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in results["tuners"] if row["state"] == "finished"]


def why_no_encoder(folder: Path) -> str | None:
    """Why a folder of a fine-tuning has no encoder of its own, and where there is one; None for other folders."""
    results = read_values(folder / RESULTS)
    inside = sorted(path.parent.parent for path in folder.glob(f"*/{ENCODER}/config.json"))
    if results.get("method") == "finetune":
        found = f", such as `trainer export {inside[0]}`" if inside else ""
        return f"is a comparison of tuners: export one of its runs{found}"
    if results.get("state") != "finished" or not isinstance(results.get("tuner"), str):
        return None
    if results["tuner"] != "linear":
        return f"has no encoder, since there is no plain timm model of one tuned by {results['tuner']}: use its adapter"
    init = read_values(folder.parent / CONFIG).get("init")
    advice = f": `trainer export {init}`" if isinstance(init, str) and (Path(init) / ENCODER).is_dir() else ""
    return f"was tuned by linear, which leaves the encoder as it was: it is that of {init or '--init'}{advice}"
