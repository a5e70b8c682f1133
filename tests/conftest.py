"""A real, tiny checkpoint on disk, image folders, and the command line in this process."""

import json
import os

# Tiny networks are faster on one thread, and far faster where something else uses the machine's other cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a 32 px image-variation checkpoint with random weights, set to two steps."""
    from pipeline.generators.random_weights import tiny_variations

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_variations("32px").save_pretrained(folder)
    (folder / "diffmix.json").write_text(json.dumps({"steps": 2, "guidance_scale": 2.0, "scheduler": "ddim"}))
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folder of 23 small pictures of different sizes in two classes, and two files that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(23):
        place = folder / ("cat" if number % 2 else "dog")
        place.mkdir(exist_ok=True)
        side = int(draw.integers(20, 60))
        pixels = np.kron(draw.integers(0, 255, (4, 5, 3)), np.ones((side // 4, side // 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"photo {number}.{'jpg' if number % 3 else 'png'}")
    (folder / "notes.txt").write_text("not an image")
    (folder / "cat" / "labels.csv").write_text("not an image")
    return str(folder)


@pytest.fixture
def pipeline(capsys):
    """The command line in this process: `code, stdout, stderr = pipeline("generate", ...)`."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def generate(pipeline, tiny_model, photos):
    """`pipeline generate` on the photos with the tiny model; keyword `source` and further flags may differ."""

    def call(out, *flags, source=photos, model=tiny_model):
        return pipeline("generate", "--source", source, "--model", model, "--out", out, "--batch-size", "4", *flags)

    return call


def rows_of(folder):
    """All rows of a merged set as plain dicts, in manifest order."""
    import pyarrow.parquet as pq

    return pq.read_table(os.path.join(folder, "manifest.parquet")).to_pylist()


def file_bytes(folder):
    """Name to bytes of everything in a folder."""
    found = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = file.read()
    return found
