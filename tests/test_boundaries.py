"""The arrows of the design run down: who may import whom, read from our own sources without importing them."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("manifests", "pipeline", "trainer")
FORBIDDEN = {
    "manifests": {"pipeline", "trainer"},
    "pipeline": {"trainer", "timm", "peft"},
    "trainer": {"pipeline", "diffusers"},
}
ALLOWED_IN_MANIFESTS = {"manifests", "pyarrow", "numpy", "fsspec"} | set(sys.stdlib_module_names)
_TRAINER_TOP = {
    "trainer.compare",
    "trainer.finetune",
    "trainer.pretrain",
    "trainer.settle",
    "trainer.resume",
    "trainer.config",
    "trainer.cli",
    "trainer.bench",
}
ABOVE = {  # the lower room never imports the upper one
    "pipeline.sources": {"pipeline.generators", "pipeline.engines", "pipeline.worker", "pipeline.job", "pipeline.cli"},
    "pipeline.generators": {"pipeline.sources", "pipeline.engines", "pipeline.worker", "pipeline.job", "pipeline.cli"},
    "pipeline.worker": {"pipeline.engines", "pipeline.generate", "pipeline.inspect", "pipeline.cli"},
    "pipeline.engines": {"pipeline.generate", "pipeline.inspect", "pipeline.cli"},
    "trainer.data": {"trainer.nn", "trainer.methods", "trainer.evaluate", "trainer.engine", *_TRAINER_TOP},
    "trainer.nn": {"trainer.data", "trainer.methods", "trainer.evaluate", "trainer.engine", *_TRAINER_TOP},
    "trainer.tuners": {"trainer.data", "trainer.methods", "trainer.evaluate", "trainer.engine", *_TRAINER_TOP},
    "trainer.evaluate": {"trainer.tuners", "trainer.methods", "trainer.engine", *_TRAINER_TOP},
    "trainer.methods": {"trainer.tuners", "trainer.evaluate", "trainer.engine", *_TRAINER_TOP},
    "trainer.engine": {"trainer.tuners", "trainer.evaluate", *_TRAINER_TOP},
}
LIGHT = ("pipeline", "pipeline.cli", "pipeline.options", "trainer", "trainer.cli", "trainer.options", "trainer.methods")
LIGHT += ("trainer.tuners", "trainer.tuners.spec", "trainer.finetune")
HEAVY = {"torch", "diffusers", "transformers", "pyarrow", "datasets", "numpy", "PIL", "timm", "accelerate", "numba"}
HEAVY |= {"peft", "matplotlib"}


def sources():
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_sources():
    assert len(sources()) > 30


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_packages_import_only_what_lies_below(path):
    package = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & FORBIDDEN[package]
    if package == "manifests":
        assert roots <= ALLOWED_IN_MANIFESTS


@pytest.mark.parametrize("room", ABOVE)
def test_rooms_import_only_what_lies_below(room):
    inside = [path for path in sources() if (module_name(path) + ".").startswith(room + ".")]
    assert inside
    for path in inside:
        for name in imports(path):
            assert not any((name + ".").startswith(upper + ".") for upper in ABOVE[room]), f"{path} imports {name}"


@pytest.mark.parametrize("name", LIGHT)
def test_command_lines_are_light(name):
    path = ROOT / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert not {found.partition(".")[0] for found in imports(path, top_level_only=True)} & HEAVY


def test_the_engine_knows_no_method():
    for path in (ROOT / "trainer" / "engine").rglob("*.py"):
        known = {name for name in imports(path) if name.startswith("trainer.methods.")}
        assert all(name.startswith("trainer.methods.base") for name in known), path
