"""Small labelled image sets of every kind of location, of pictures that tests can tell apart."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.trainer.data.builders import picture
from trainer.data.tasks import Task, open_task, parse


def png(number: int, height: int = 12, width: int = 12) -> bytes:
    return file_bytes(Image.fromarray(picture(number, height=height, width=width)), "PNG")


def jpeg(number: int, height: int = 12, width: int = 12, **how: Any) -> bytes:
    return file_bytes(Image.fromarray(picture(number, height=height, width=width)), "JPEG", **how)


def file_bytes(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def write_folder(folder: Path, count: int = 60, classes: Iterable[str] = ("cat", "dog", "elk"), **sides: int) -> Path:
    """Picture n is CLASS/n.png with class number n % 3."""
    names = list(classes)
    for number in range(count):
        path = folder / names[number % len(names)] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, **sides))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w") as tar:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: Iterable[int], classes: int = 3, **sides: int) -> dict[str, bytes]:
    """Members of a tar: n.png and n.cls with class n % classes."""
    members = {}
    for number in numbers:
        members |= {f"{number:03d}.png": png(number, **sides), f"{number:03d}.cls": str(number % classes).encode()}
    return members


def opened(text: object) -> Task:
    return open_task(parse(str(text)))


def contents(task: Task) -> dict[str, tuple[str, bytes]]:
    """Class name and pixels of every image of the task, by key."""
    found = {}
    for part in (task.train, task.validation, task.test):
        files = part.open_files()
        for index, key in enumerate(part.keys(np.arange(len(part)))):
            assert part.label is not None
            found[key] = (task.class_names[part.label[index]], files.pixels(index, -1).tobytes())
        files.close()
    return found


def sizes(task: Task) -> tuple[int, int, int]:
    return len(task.train), len(task.validation), len(task.test)
