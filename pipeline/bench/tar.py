"""Members a second into a tar in memory, against webdataset's `TarWriter`; hashing excluded, which it does not do."""

from __future__ import annotations

import importlib.util
import io

from manifests.shard import TarFile
from manifests.storage import PendingFile
from pipeline.bench.figures import Figure, Goal, Say, Settings, in_turns

_BYTES = 48 << 20  # per round
_SIZES = {"68 kB": 68_000, "1 kB": 1_000}
_MEMBERS = 20_000  # at most

FASTER = Goal(bound=1.4)
