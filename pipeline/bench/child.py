"""Work in a fresh process, with the most memory it ever held: `python -m pipeline.bench.child NAME ARGUMENTS…`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from manifests.errors import DiffmixError

# name -> "module:function", which takes strings and returns JSON-able facts
WORK: dict[str, str] = {
    "draw": "pipeline.bench.manifest:draw",
    "generate": "pipeline.bench.memory:generate",
}


def call(name: str, *arguments: str) -> dict[str, Any]:
    """What the function returned, and `peak_bytes` of its process."""
    command = [sys.executable, "-m", "pipeline.bench.child", name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603  our own module
    if done.returncode:
        raise DiffmixError(f"the benchmark's child process `{name}` failed with exit code {done.returncode}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def peak_bytes() -> int:
    """The most memory that this process ever had in RAM."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: what that says of a child begins with the memory of the parent it was forked from.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(name: str, *arguments: str) -> None:
    """Print one line of JSON."""
    module, _, function = WORK[name].partition(":")
    facts = getattr(import_module(module), function)(*arguments)
    sys.stdout.write("\n" + json.dumps({**facts, "peak_bytes": peak_bytes()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
