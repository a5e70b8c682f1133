"""A checkpoint in diffusers format: where its files are, what it says it is, and a name for exactly these weights.

No code of a checkpoint is ever executed: custom pipelines and components are refused, `trust_remote_code` is never set.
Weights are safetensors where there are any. Older checkpoints hold `.bin` files; diffusers (`load_state_dict` in
`models/model_loading_utils.py`) and transformers (`load_state_dict` in `modeling_utils.py`) read those with
`torch.load(weights_only=True)`, which builds tensors and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from manifests.errors import UsageError
from pipeline.embedded import EMBEDDED, checkpoint_path
from pipeline.generators import deprecated
from pipeline.generators.base import GeneratorConfig

INDEX = "model_index.json"
DEFAULTS = "diffmix.json"  # optional: the steps, guidance scale and scheduler a checkpoint is meant to run with
_DEFAULTS: dict[str, tuple[Any, str]] = {
    "steps": (int, "a whole number"),
    "guidance_scale": (float | int, "a number"),
    "scheduler": (str, "a name"),
}
HASHED_SUFFIXES = {".json", ".safetensors", ".bin", ".txt"}
SAFETY = "safety_checker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The files of one checkpoint on this machine."""

    folder: Path
    index: dict[str, Any]  # model_index.json
    identity: dict[str, str]  # `model` as given, and `revision` (commit on the hub) or `weights` (SHA-256 of the files)
    defaults: dict[str, Any] = field(default_factory=dict)  # diffmix.json

    @property
    def pipeline(self) -> str:
        """The class name of the diffusers pipeline."""
        return str(self.index["_class_name"])

    def setting(self, given: Any, name: str, default: Any) -> Any:
        """What the user gave, else what the checkpoint is meant to run with, else `default`."""
        return self.defaults.get(name, default) if given is None else given

    def has(self, component: str) -> bool:
        """Whether the checkpoint ships this component."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None

    def component(self, name: str, cls: Any = None, **options: Any) -> Any:
        """One component, by `cls.from_pretrained`; `cls` is by default the diffusers class that the index names."""
        if not self.has(name):
            raise UsageError(f"{self.folder} has no {name!r} component ({INDEX})")
        class_name = self.index[name][1]
        cls = cls or getattr(diffusers, class_name, None)
        if cls is None:
            raise UsageError(f"{self.folder / INDEX}: {name} is a {class_name!r}, which this diffusers does not have")
        with loading(self.folder / name):
            return cls.from_pretrained(self.folder, subfolder=name, **options)


@contextmanager
def loading(what: object) -> Iterator[None]:
    """Turns what diffusers and transformers raise over missing or broken files into a `UsageError` naming `what`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot load {what}: {error}") from error


def read_index(config: GeneratorConfig) -> tuple[dict[str, Any], Path]:
    """`model_index.json` of the model and the file it was read from; from the hub's cache where it is there.

    Raises `UsageError` where there is none, where it asks for code of its own, or for a class that diffusers removed.
    """
    path = _find_index(config)
    index = read_json(path)
    if str(index.get("_class_name")) in deprecated.DEPRECATED:
        deprecated.find(index["_class_name"])  # else its components would look like code of its own
    custom = [name for name, value in index.items() if _is_custom(name, value)]
    if custom:
        raise UsageError(
            f"{config.model} brings its own code for {', '.join(custom)}; code from checkpoints is never executed. "
            f"Use a checkpoint whose {INDEX} names diffusers and transformers classes only"
        )
    return index, path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; raises `UsageError` if it holds anything but an object."""
    with loading(path):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UsageError(f"cannot load {path}: it holds {type(values).__name__}, not an object")
    return values


def fetch(config: GeneratorConfig) -> Checkpoint:
    """The checkpoint's files, downloaded where they are not here; without the components that stay unused."""
    # The run has one progress line of its own.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index, path = read_index(config)
    local = _folder(config.model)
    if local.is_dir():
        folder = local
        identity = {"model": config.model, "weights": weights_digest(folder, _components(index, config))}
    else:
        unwanted = {name: None for name in sorted(_unused(index, config)) if name in index}
        with loading(config.model):
            folder = Path(DiffusionPipeline.download(config.model, revision=path.parent.name, **unwanted))
        identity = {"model": config.model, "revision": path.parent.name}
    return Checkpoint(folder=folder, index=index, identity=identity, defaults=_read_defaults(folder))


def weights_digest(folder: Path, components: Iterable[str]) -> str:
    """SHA-256 over names and contents of the weight and config files of `components`, read in blocks."""
    digest = hashlib.sha256()
    files = [path for name in components for path in (folder / name).rglob("*") if path.suffix in HASHED_SUFFIXES]
    for path in [folder / INDEX, *sorted(files)]:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _components(index: dict[str, Any], config: GeneratorConfig) -> list[str]:
    named = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    return sorted(set(named) - _unused(index, config))


def _unused(index: dict[str, Any], config: GeneratorConfig) -> frozenset[str]:
    without_checker = frozenset({SAFETY}) if config.safety == "off" else frozenset()
    return without_checker | deprecated.unused(str(index.get("_class_name")))


def _is_custom(name: str, value: Any) -> bool:
    """Pipelines and components of a checkpoint's own code: a list as class name, or a module file of the checkpoint."""
    if name == "_class_name":
        return not isinstance(value, str)
    if not isinstance(value, list) or value[0] is None:
        return False
    return value[0] not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, str(value[0]))


def _folder(model: str) -> Path:
    return checkpoint_path() if model == EMBEDDED else Path(os.path.expanduser(model))  # noqa: PTH111  never raises


def _find_index(config: GeneratorConfig) -> Path:
    local = _folder(config.model)
    if local.is_dir():
        if not (local / INDEX).is_file():
            raise UsageError(f"{local} is no checkpoint in diffusers format: it has no {INDEX}")
        return local / INDEX
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.model):
        raise UsageError(f"{config.model!r} is neither a folder on this machine nor a hub id like owner/name")
    try:
        return Path(hf_hub_download(config.model, INDEX, revision=config.revision))
    except (OSError, ValueError, HFValidationError) as error:
        at = f" at revision {config.revision}" if config.revision else ""
        raise UsageError(
            f"{config.model}{at} is not a folder on this machine and cannot be had from the hub "
            f"({type(error).__name__}). Without a network: download it elsewhere (`hf download {config.model} "
            "--local-dir FOLDER`) and give --model FOLDER, or copy the hub's cache here and set HF_HOME"
        ) from error


def _read_defaults(folder: Path) -> dict[str, Any]:
    path = folder / DEFAULTS
    if not path.is_file():
        return {}
    defaults = read_json(path)
    unknown = set(defaults) - set(_DEFAULTS)
    if unknown:
        raise UsageError(f"{path}: unknown keys {sorted(unknown)}; known are {', '.join(_DEFAULTS)}")
    for name, value in defaults.items():
        kind, words = _DEFAULTS[name]
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {name} is {value!r}; give {words}")
    return defaults
