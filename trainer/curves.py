"""How a logged value moved during runs: points, a table, a picture, all from metrics.jsonl.

from trainer import curves
print(curves.table(["runs/mixed-ae"], ["homologous_keys", "homologous_keys_first", "homologous_keys_last"]))
curves.picture("keys.png", ["runs/mixed-ae"], ["homologous_keys"])
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from manifests.errors import UsageError
from trainer.engine.run_folder import METRICS

Points = list[tuple[int, float]]


def points(folder: str | Path, name: str) -> Points:
    """(step, value) of each logging of `name` in a run folder; torn lines and values that are not finite are left out.

    Raises `UsageError` if the run logged no such value, with those that it did.
    """
    lines = list(_lines(Path(folder) / METRICS))
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if not found:
        known = sorted({key for line in lines for key in line})
        raise UsageError(f"{folder} logged no {name!r}; it has {', '.join(known) or 'no metrics yet'}")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def table(folders: Sequence[str | Path], names: Sequence[str], *, rows: int = 10) -> str:
    """A Markdown table of the values at about `rows` steps, the first and the last among them."""
    curves = {f"{Path(folder).name} {name}": dict(points(folder, name)) for folder in folders for name in names}
    steps = sorted({step for curve in curves.values() for step in curve})
    chosen = sorted({steps[round(number * (len(steps) - 1) / max(1, rows - 1))] for number in range(rows)})
    lines = [f"| step | {' | '.join(curves)} |", "|---" * (len(curves) + 1) + "|"]
    for step in chosen:
        cells = [f"{curve[step]:.4g}" if step in curve else "" for curve in curves.values()]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(path: str | Path, folders: Sequence[str | Path], names: Sequence[str]) -> None:
    """Lines over steps, one for each run and value, as a picture of the format that the file's suffix names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        for name in names:
            axes.plot(*zip(*points(folder, name), strict=True), label=f"{Path(folder).name} {name}")
    axes.set_xlabel("step")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
