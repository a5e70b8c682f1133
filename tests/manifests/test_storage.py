from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifests import layout
from manifests.errors import StorageError
from manifests.storage import LocalStorage, RemoteStorage, explained, open_storage


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_urls_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in (
        "a/b",
        "./a/b/",
        "~/a/b",
        f"file://{tmp_path}/a/b",
        f"file://{tmp_path}/a/b/",
        f"local://{tmp_path}/a/b",
    ):
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage) and storage.url == str(tmp_path / "a/b")
    monkeypatch.chdir("/")
    assert storage.url == str(tmp_path / "a/b")
    with pytest.raises(StorageError, match=r"nobody-here-9/x.*without ~"):
        open_storage("~nobody-here-9/x")
    assert isinstance(open_storage("memory://a/b/"), RemoteStorage)
    with pytest.raises(StorageError, match="nonsense"):
        open_storage("nonsense://a")


def test_files_come_and_go(storage: LocalStorage):
    storage.write("b", b"12345")
    storage.write("a", b"1")
    storage.write("a", b"")
    assert storage.names() == ["a", "b"] and storage.exists("a") and not storage.exists("c")
    assert storage.read("a") == b"" and storage.read("b") == b"12345" and storage.size("b") == 5
    assert storage.read_range("b", 1, 2) == b"23" and storage.read_range("b", 3, 9) == b"45"
    storage.remove("a")
    storage.remove("a")
    assert storage.names() == ["b"]


def test_nothing_is_visible_before_commit(storage: LocalStorage):
    storage.write("a", b"old")
    pending = storage.begin("a")
    pending.write(b"new")
    assert storage.read("a") == b"old" and storage.being_written() == {"a"}
    pending.discard()
    assert storage.names() == ["a"] and storage.being_written() == set()
    pending = storage.begin("a")
    pending.write(b"new")
    pending.commit()
    pending.discard()
    assert storage.names() == ["a"] and storage.read("a") == b"new" and pending.is_current()
    storage.write("a", b"newer")
    assert not pending.is_current()
    storage.remove("a")
    assert not pending.is_current()


def test_two_writers_of_one_file_in_one_process(storage: LocalStorage):
    one, two = storage.begin("a"), storage.begin("a")
    one.write(b"one")
    two.write(b"two")
    two.discard()
    one.commit()
    assert storage.read("a") == b"one" and storage.names() == ["a"]


def test_create_is_exclusive(storage: LocalStorage):
    assert storage.create("a", b"1") and not storage.create("a", b"2")
    assert storage.read("a") == b"1" and storage.names() == ["a"]


def test_create_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    assert storage.create("a", b"1") and not storage.create("a", b"2")
    assert storage.read("a") == b"1" and storage.names() == ["a"]
    with file_size_limit(3), pytest.raises(StorageError, match="no space"):
        storage.create("b", b"too long")
    assert storage.names() == ["a"]


def test_what_is_not_there(tmp_path: Path):
    storage = open_storage(str(tmp_path / "none"))
    assert storage.names() == [] and not storage.exists("a")
    for call in (lambda: storage.read("a"), lambda: storage.size("a"), lambda: storage.begin("a")):
        with pytest.raises(StorageError, match="none/a: it does not exist"):
            call()


def test_a_file_in_the_way_of_the_folder(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        storage = open_storage(str(path))
        for call in (storage.create_folder, storage.names, lambda storage=storage: storage.begin("a")):
            with pytest.raises(StorageError, match="file in the way of the folder; choose another"):
                call()
        assert not storage.exists("a")


def test_other_errors_are_explained():
    for error in (BlockingIOError(errno.EAGAIN, "try again"), TimeoutError(), MemoryError(), OSError("odd")):
        with pytest.raises(StorageError, match=r"cannot read there: .+") as caught, explained("read", "there"):
            raise error
        assert caught.value.__cause__ is error
    with pytest.raises(ValueError, match="mine"), explained("read", "there"):
        raise ValueError("mine")
    inner_wins = pytest.raises(StorageError, match=r"^cannot read inner: it does not exist$")
    with inner_wins, explained("write", "outer"), explained("read", "inner"):
        raise FileNotFoundError


def test_a_full_disk_leaves_what_was_there(storage: LocalStorage):
    storage.write("a", b"old")
    with file_size_limit(100):
        with pytest.raises(StorageError, match=r"cannot write .*/a: no space left .* what is finished is kept"):
            storage.write("a", bytes(200))
        with pytest.raises(StorageError, match="no space"):
            storage.create("b", bytes(200))
    assert storage.names() == ["a"] and storage.read("a") == b"old"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_a_really_full_disk(tiny_disk: Path):
    storage = open_storage(str(tiny_disk))
    storage.write("a", bytes(30_000))
    with pytest.raises(StorageError, match="no space"):
        storage.write("a", bytes(90_000))
    assert storage.names() == ["a"] and storage.read("a") == bytes(30_000)


def test_a_really_read_only_disk(tiny_disk: Path):
    storage = open_storage(str(tiny_disk))
    storage.write("a", b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True, timeout=20)
    for call in (
        lambda: storage.write("a", b"new"),
        lambda: storage.create("b", b"new"),
        lambda: storage.remove("a"),
        lambda: open_storage(storage.url + "/deeper").create_folder(),
    ):
        with pytest.raises(StorageError, match="Read-only file system; choose another --out or make it writable"):
            call()
    assert storage.read("a") == b"old" and storage.names() == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(storage: LocalStorage):
    storage.path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied; choose another"):
            storage.write("a", b"new")
    finally:
        storage.path.chmod(0o700)


def _leave_temporary(folder: Path, name: str) -> int:
    """Have a process begin a file and die."""
    code = (
        "import sys, os; from manifests.storage import open_storage; f = open_storage(sys.argv[1]).begin(sys.argv[2])"
    )
    code += "; f.write(b'x'); f.sync(); print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(folder), name], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return int(done.stdout)


def test_sweep_takes_the_dead_alone(storage: LocalStorage):
    _leave_temporary(storage.path, "pairs-000000.tar")
    [dead] = storage.names()
    other = ".pairs-000001.tar@elsewhere.1.abcdef12.tmp"
    for name in (other, ".bashrc", "notes.tmp"):
        (storage.path / name).write_bytes(b"")
    mine = storage.begin("pairs-000002.tar")
    [own] = set(storage.names()) - {dead, other, ".bashrc", "notes.tmp"}
    assert storage.being_written() == {"pairs-000001.tar", "pairs-000002.tar"}
    storage.sweep()
    assert set(storage.names()) == {other, own, ".bashrc", "notes.tmp"}
    storage.sweep("own")
    assert set(storage.names()) == {other, ".bashrc", "notes.tmp"}
    storage.sweep("all")
    assert set(storage.names()) == {".bashrc", "notes.tmp"}
    mine.discard()


def test_small_files_survive_another_processes_sweep(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch):
    begin, calls = storage.begin, []

    def swept(name: str):
        pending = begin(name)
        if not calls:
            open_storage(storage.url).sweep("all")
        calls.append(name)
        return pending

    monkeypatch.setattr(storage, "begin", swept)
    storage.write("a", b"1")
    assert storage.read("a") == b"1" and len(calls) == 2


def test_uploads_wait_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = open_storage("memory://uploads")
    pending = storage.begin("a")
    pending.write(bytes(100))
    assert layout.parse_temporary(os.listdir(tmp_path)[0]).is_own() and not storage.exists("a")
    with file_size_limit(100), pytest.raises(StorageError, match="local copy of memory://uploads/a; TMPDIR"):
        pending.write(bytes(200))
        pending.sync()
    pending.discard()
    _leave_temporary(tmp_path, "pairs-000000.tar")
    storage.sweep()
    assert os.listdir(tmp_path) == []
