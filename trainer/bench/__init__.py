"""`trainer bench`: speed and fidelity, as ratios against named baselines taken in the same run.

Adding a section: one file with a function `(Settings, Say) -> list[Figure]`, one line here.
"""

from __future__ import annotations

SECTIONS: dict[str, str] = {
    "loader": "trainer.bench.loader:measure",
    "fidelity": "trainer.bench.fidelity:measure",
    "resume": "trainer.bench.resume:measure",
    "steps": "trainer.bench.step_figures:measure",
    "masked": "trainer.bench.masked:measure",
    "tuning": "trainer.bench.tuning:measure",
    "gpu": "trainer.bench.gpu:measure",
}
