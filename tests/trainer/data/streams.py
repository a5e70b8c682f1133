"""The stream that tests in one process and in several must find equal."""

from __future__ import annotations

from typing import Any

from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig, make
from trainer.data.rows import Rows
from trainer.data.view_plan import ViewConfig

BATCH = 12


def open_loader(rows: Rows, **settings: Any) -> Loader:
    views = ViewConfig(augment="dino", size=12, local_size=6)
    defaults: dict[str, Any] = {"num_crops": 2, "num_local_crops": 2, "batch_size": BATCH, "seed": 3, "device": "cpu"}
    return Loader(make(MixConfig(probability=0.5), rows), views, **defaults | {"workers": 1} | settings)
