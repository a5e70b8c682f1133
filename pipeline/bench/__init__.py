"""`pipeline bench`: speed and memory, as ratios against named baselines taken in the same run.

Adding a section: one file with a function `(Settings, Say) -> list[Figure]`, one line here.
"""

from __future__ import annotations

SECTIONS: dict[str, str] = {
    "generation": "pipeline.bench.generation:measure",
    "host": "pipeline.bench.host:measure",
    "tar": "pipeline.bench.tar:measure",
    "manifest": "pipeline.bench.manifest:measure",
    "memory": "pipeline.bench.memory:measure",
}
DEFAULT_SECTIONS = ("generation", "host", "tar", "manifest")  # memory takes minutes and is asked for
