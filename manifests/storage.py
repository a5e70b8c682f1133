"""Files of a pair set through one interface: a local folder or any fsspec URL.

A file appears under its name complete or not at all: locally by temporary, fsync and rename, on an object store by one
upload. Nothing else in diffmix opens a file of a pair set for writing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import fsspec

from manifests import layout
from manifests.errors import DiffmixError, StorageError

Owned = Literal["dead", "own", "all"]

_ATTEMPTS = 4
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci")


class PendingFile(ABC):
    """A file being written: `write` takes the bytes, then `commit` makes it visible or `discard` forgets it."""

    file: IO[bytes]  # readable and seekable too, for writers that patch what they wrote
    where: str

    def write(self, data: bytes | memoryview) -> None:
        """Append; raises `StorageError` when the disk is full."""
        with explained("write", self.where):
            self.file.write(data)

    def sync(self) -> None:
        """Force what was written to disk, so that a full one is noticed before anything is replaced."""
        with explained("write", self.where):
            self.file.flush()
            os.fsync(self.file.fileno())

    @abstractmethod
    def commit(self) -> None:
        """Make the file durable and visible under its name, replacing what was there."""

    @abstractmethod
    def discard(self) -> None:
        """Remove every trace of an uncommitted file; harmless after `commit`."""

    @abstractmethod
    def is_current(self) -> bool:
        """After `commit`: whether the name surely still holds this file and not another process's."""


class Storage(ABC):
    """One folder of a pair set. Names are plain file names; every failure is a `StorageError` that says what to do."""

    url: str

    @abstractmethod
    def create_folder(self) -> None:
        """Make the folder, and its parents, if missing."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all that is in the folder, hidden files included, sorted; empty if the folder does not exist."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the file is there now, past any cached listing."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """The file for reading, seekable."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Length in bytes."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless the name is taken; False if it was. Exactly one of several callers gets True."""

    @abstractmethod
    def begin(self, name: str) -> PendingFile:
        """Start writing a file that will appear, or replace the old one, at its `commit`."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the file; harmless if it is missing."""

    @abstractmethod
    def sweep(self, owned: Owned = "dead") -> None:
        """Remove temporaries of this host's dead processes, of this process, or all, once all shards are committed.

        "all" spares those of this host's running processes, which remove their own: they may be finishing the same set.
        """

    def being_written(self) -> set[str]:
        """Names that some process is writing now, as far as temporaries tell: those of other hosts count as alive."""
        temporaries = filter(None, map(layout.parse_temporary, self.names()))
        return {temporary.target for temporary in temporaries if not temporary.is_dead()}

    def read(self, name: str) -> bytes:
        """The whole file."""
        with self.open(name) as file, explained("read", f"{self.url}/{name}"):
            return file.read()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer if the file ends before."""
        with self.open(name) as file, explained("read", f"{self.url}/{name}"):
            file.seek(offset)
            return file.read(size)

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file."""
        for _ in range(_ATTEMPTS - 1):
            # Processes of other hosts that finish the same set remove every temporary, this one perhaps among them.
            with contextlib.suppress(StorageError):
                return self._write_once(name, data)
        return self._write_once(name, data)

    def _write_once(self, name: str, data: bytes) -> None:
        pending = self.begin(name)
        try:
            pending.write(data)
            pending.commit()
        finally:
            pending.discard()


def open_storage(url: str) -> Storage:
    """The storage for a local path or an fsspec URL such as `s3://bucket/folder`."""
    protocol, separator, path = url.partition("://")
    if not separator:
        return LocalStorage(url)
    return LocalStorage(path) if protocol in ("file", "local") else RemoteStorage(url)


@contextlib.contextmanager
def explained(action: str, where: str, errors: tuple[type[Exception], ...] = (OSError, MemoryError)) -> Iterator[None]:
    """Turn the system's errors into a `StorageError` that says what to do next."""
    try:
        yield
    except DiffmixError:
        raise
    except errors as error:
        raise StorageError(f"cannot {action} {where}: {_reason(error, action)}") from error


def _reason(error: BaseException, action: str) -> str:
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no space left (or over quota); free some and run the same command again, what is finished is kept"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{os.strerror(code)}; choose another --out or make it writable, then run the same command again"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return "there is a file in the way of the folder; choose another path"
    if code == errno.ENOENT and action == "create":
        return "no folder can be made there; choose another path"
    if code == errno.ENOENT or isinstance(error, FileNotFoundError):
        return "it does not exist"
    return str(error) or type(error).__name__


class LocalStorage(Storage):
    """A folder of the local (or network) file system."""

    def __init__(self, path: str) -> None:
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise StorageError(f"cannot open {path}: {error} Give the folder without ~.") from error
        self.url = str(self.path)

    def create_folder(self) -> None:
        with explained("create", self.url):
            self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        with explained("list", self.url):
            try:
                return sorted(path.name for path in self.path.iterdir())
            except FileNotFoundError:
                return []

    def exists(self, name: str) -> bool:
        with explained("read", f"{self.url}/{name}"):
            return (self.path / name).exists()

    def open(self, name: str) -> IO[bytes]:
        with explained("read", f"{self.url}/{name}"):
            return (self.path / name).open("rb")

    def size(self, name: str) -> int:
        with explained("read", f"{self.url}/{name}"):
            return (self.path / name).stat().st_size

    def create(self, name: str, data: bytes) -> bool:
        target, temporary = self.path / name, self.path / layout.temporary_name(name)
        with explained("write", f"{self.url}/{name}"):
            try:
                _create_durably(temporary, data)
                _link(temporary, target, data)
                _sync_folder(self.path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def begin(self, name: str) -> PendingFile:
        return _LocalPendingFile(self.path, name)

    def remove(self, name: str) -> None:
        with explained("remove", f"{self.url}/{name}"):
            (self.path / name).unlink(missing_ok=True)
            _sync_folder(self.path)

    def sweep(self, owned: Owned = "dead") -> None:
        _sweep(self.path, self.names(), owned)


class _LocalPendingFile(PendingFile):
    def __init__(self, folder: Path, name: str) -> None:
        self._target = folder / name
        self._temporary = folder / layout.temporary_name(name)
        self.where = str(self._target)
        with explained("write", self.where):
            self.file = self._temporary.open("xb+", buffering=1 << 20)
        self._identity = os.fstat(self.file.fileno())

    def commit(self) -> None:
        self.sync()
        with explained("write", self.where):
            self.file.close()
            self._temporary.replace(self._target)
            _sync_folder(self._target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def is_current(self) -> bool:
        try:
            return os.path.samestat(self._target.stat(), self._identity)
        except OSError:
            return False


class RemoteStorage(Storage):
    """A folder of an object store, through fsspec; files are written to a local temporary and uploaded whole."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {url}: {error} (for s3:// install diffmix[s3])") from error
        self._root = root.rstrip("/")

    def _fresh(self, name: str = "") -> str:
        """The path in the store, after forgetting what a listing said of it: other processes write there too."""
        path = f"{self._root}/{name}" if name else self._root
        self._fs.invalidate_cache(path)
        return path

    def create_folder(self) -> None:
        # Asking an object store for a folder would create the bucket: a typing error would become a bucket.
        if self.url.partition("://")[0] not in _OBJECT_STORES:
            with _explained("create", self.url):
                self._fs.makedirs(self._fresh(), exist_ok=True)

    def names(self) -> list[str]:
        with _explained("list", self.url):
            try:
                paths = self._fs.ls(self._fresh(), detail=False)
            except FileNotFoundError:
                return []
        inside = (path.removeprefix(f"{self._root}/").rstrip("/") for path in paths if path != self._root)
        return sorted(filter(None, inside))

    def exists(self, name: str) -> bool:
        with _explained("read", f"{self.url}/{name}"):
            return bool(self._fs.exists(self._fresh(name)))

    def open(self, name: str) -> IO[bytes]:
        with _explained("read", f"{self.url}/{name}"):
            file: IO[bytes] = self._fs.open(self._fresh(name), "rb")
            return file

    def read(self, name: str) -> bytes:
        with _explained("read", f"{self.url}/{name}"):
            data: bytes = self._fs.cat_file(self._fresh(name))
            return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        with _explained("read", f"{self.url}/{name}"):
            data: bytes = self._fs.cat_file(self._fresh(name), start=offset, end=offset + size)
            return data

    def size(self, name: str) -> int:
        with _explained("read", f"{self.url}/{name}"):
            return int(self._fs.size(self._fresh(name)))

    def create(self, name: str, data: bytes) -> bool:
        with _explained("write", f"{self.url}/{name}"):
            try:
                self._fs.pipe_file(self._fresh(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def begin(self, name: str) -> PendingFile:
        return _RemotePendingFile(self._fs, self._fresh(name), name, f"{self.url}/{name}")

    def remove(self, name: str) -> None:
        with _explained("remove", f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._fresh(name))

    def being_written(self) -> set[str]:
        return set()  # nothing temporary is ever uploaded: who writes cannot be told, and asking would cost a listing

    def sweep(self, owned: Owned = "dead") -> None:
        # What a killed process left lies in this machine's temporary folder.
        folder = Path(tempfile.gettempdir())
        _sweep(folder, [path.name for path in folder.iterdir()], "own" if owned == "own" else "dead")


class _RemotePendingFile(PendingFile):
    def __init__(self, fs: Any, path: str, name: str, where: str) -> None:
        self._fs, self._path, self._url = fs, path, where
        self._temporary = Path(tempfile.gettempdir()) / layout.temporary_name(name)
        self.where = f"{self._temporary} (the local copy of {where}; TMPDIR chooses the folder)"
        with explained("write", self.where):
            self.file = self._temporary.open("xb+", buffering=1 << 20)

    def commit(self) -> None:
        with explained("write", self.where):
            self.file.close()
        with _explained("write", self._url):
            self._fs.put_file(str(self._temporary), self._path)
        self.discard()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def is_current(self) -> bool:
        return True  # an upload has no identity to compare; see the README on several writers to one bucket


def _explained(action: str, where: str) -> contextlib.AbstractContextManager[None]:
    # Each kind of store has errors of its own, and few of them are OSErrors.
    return explained(action, where, (Exception,))


def _create_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink()
            raise


def _link(temporary: Path, target: Path, data: bytes) -> None:
    """Give a complete file its name if that is free, else raise `FileExistsError`."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # FAT, SMB and most FUSE mounts have no links; here the name is there a moment before all of its bytes.
        _create_durably(target, data)


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder is; some network file systems refuse to sync one.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, names: list[str], owned: Owned) -> None:
    for name in names:
        temporary = layout.parse_temporary(name)
        if temporary is not None and _is_swept(temporary, owned):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _is_swept(temporary: layout.Temporary, owned: Owned) -> bool:
    match owned:
        case "own":
            return temporary.is_own()
        case "dead":
            return temporary.is_dead()
        case "all":
            return not temporary.is_of_live_sibling()
