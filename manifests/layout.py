"""Names inside a pair set: files, tar members, temporaries. The only place where they are spelled."""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

PLAN = "plan.json"
MANIFEST = "manifest.parquet"
CARD = "README.md"

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_FILE = re.compile(r"pairs-([0-9]{6,})\.(tar|parquet)")
_LIKE_SHARD_FILE = re.compile(r"pairs-.*\.(tar|parquet)", re.DOTALL)
_TEMPORARY = re.compile(r"\.(?P<name>.+)@(?P<host>[A-Za-z0-9_-]*)\.(?P<pid>[0-9]+)\.[0-9a-f]+\.tmp")


def tar_name(shard: int) -> str:
    """File name of a shard's samples."""
    return f"pairs-{shard:06d}.tar"


def part_name(shard: int) -> str:
    """File name of a shard's rows; its presence commits the shard."""
    return f"pairs-{shard:06d}.parquet"


def shard_of(name: str, suffix: str) -> int | None:
    """Shard number of a file called `name` if it is a shard's `tar` or `parquet` file, else None."""
    match = _SHARD_FILE.fullmatch(name)
    if match is None or match[2] != suffix:
        return None
    shard = int(match[1])
    return shard if name == f"pairs-{shard:06d}.{suffix}" else None


def looks_like_shard(name: str) -> bool:
    """Whether a reader that globs `pairs-*.tar` or `pairs-*.parquet` would take the file for a shard's."""
    return _LIKE_SHARD_FILE.fullmatch(name) is not None


def real_member(key: str) -> str:
    """Tar member of a sample's real image."""
    return f"{key}.real.jpg"


def synthetic_member(key: str, index: int) -> str:
    """Tar member of a sample's variation number `index`."""
    return f"{key}.syn{index}.jpg"


def json_member(key: str) -> str:
    """Tar member of a sample's facts."""
    return f"{key}.json"


def label_member(key: str) -> str:
    """Tar member of a sample's label, as webdataset names it."""
    return f"{key}.cls"


def host() -> str:
    """Name of what gives process ids their meaning: the machine, and on Linux the PID namespace.

    Containers may share a machine's name (`--network host`) and still count processes from 1 each.
    """
    try:
        namespace = "-" + re.sub(r"[^0-9]+", "", str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        namespace = ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()) + namespace


@dataclass(frozen=True, slots=True)
class Temporary:
    """Who is writing which file: told by a temporary's name alone, so that a crashed writer needs no clean-up code."""

    target: str  # the file that will be replaced or created
    host: str
    pid: int

    def is_own(self) -> bool:
        """Whether this process writes it."""
        return self.host == host() and self.pid == os.getpid()

    def is_of_live_sibling(self) -> bool:
        """Whether another running process of this host writes it."""
        return self.host == host() and self.pid != os.getpid() and _is_running(self.pid)

    def is_dead(self) -> bool:
        """Whether its writer was a process of this host that no longer runs; of other hosts we cannot tell."""
        return self.host == host() and not _is_running(self.pid)


def temporary_name(target: str) -> str:
    """Dot-name beside `target` for this process to write before the rename, another one at every call."""
    return f".{target}@{host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def parse_temporary(name: str) -> Temporary | None:
    """What a dot-name says of its writer; None for any file that is not ours."""
    match = _TEMPORARY.fullmatch(name)
    return Temporary(match["name"], match["host"], int(match["pid"])) if match else None


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")  # Linux only
        return text.rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
