"""Many local files read by offset: each is opened once, unless that were more than the process may well hold."""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path

from manifests.storage import explained


class OpenFiles:
    """Threads may share it; raises `StorageError` for what cannot be read."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = sys.maxsize if limit == resource.RLIM_INFINITY else limit // 2
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer if the file ends before."""
        with explained("read", str(path)):
            file = self._file(path)
            if file is not None:
                return os.pread(file, size, offset)
            with path.open("rb", buffering=0) as once:
                return os.pread(once.fileno(), size, offset)

    def close(self) -> None:
        """Close all; no thread may read any more."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _file(self, path: Path) -> int | None:
        """The open file; None once as many are open as this process may well hold."""
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files and len(self._files) < self._most:
                self._files[path] = _opened(path)
            return self._files.get(path)


def _opened(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would double the bytes read
    return file
