"""An encoder as files that others load: timm's own folder layout, or a torchvision state dict.

Every export is loaded again by the library it is for and must give the same features before it takes its name.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from manifests.errors import DiffmixError, UsageError
from manifests.storage import explained
from trainer import torchvision_export
from trainer.nn.encoders import EncoderConfig, resolved_args
from trainer.student import load_student, make_student_and_teacher
from trainer.tuned import why_no_encoder

_ROUNDING = 1e-4  # of the largest feature: torchvision's attention adds up in another order

WEIGHTS, CONFIG = "model.safetensors", "config.json"

Network = Literal["teacher", "student"]


class ExportError(DiffmixError):
    """The exported files do not give the features of the encoder they were made from."""


def save_encoder(
    encoder: nn.Module,
    folder: str | Path,
    *,
    config: EncoderConfig,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write `encoder` as timm's `model.safetensors` and `config.json`; an older folder of that name is replaced.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` then needs nothing of diffmix (for `resnet*_cifar` names
    `import trainer.nn.encoders` first). `config` must build the encoder's architecture; its drop rates are not kept,
    since they have no weights. `mean` and `std` are of pixels in 0..1. Raises `ExportError` if timm, loading the files,
    does not give bitwise the same features; nothing is left behind then.
    """
    bare = _plain_copy(encoder)
    with _replacing(Path(folder)) as temporary:
        _write_weights(bare.state_dict(), temporary / WEIGHTS)
        description = _description(bare, config, image_size, mean, std)
        (temporary / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        try:
            loaded = load_timm(temporary)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ExportError(f"timm cannot load what was exported as {config.name!r}: {error}") from error
        _attend_alike(bare, loaded)
        _check_equal(bare, loaded, image_size, 0)


def load_timm(folder: str | Path) -> nn.Module:
    """The encoder of an exported folder, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def export_run(
    run_folder: str | Path, out: str | Path, to: Literal["timm", "torchvision"], network: Network | None = None
) -> str:
    """Write a run's encoder to the new folder `out` for plain timm or torchvision; returns how to load it.

    Without `network` it is what `encoder/` holds: of a student and a teacher, which methods such as DINO train, the
    latter. Raises `UsageError` if the run has no encoder yet, `out` holds something, torchvision lacks the
    architecture, the method has no two networks to choose from, or the student's last checkpoint is gone.
    """
    source, target = Path(run_folder) / "encoder", Path(out)
    if not (source / WEIGHTS).is_file() or not (source / CONFIG).is_file():
        unfinished = "holds no exported encoder: let the run finish (`trainer runs` shows its state)"
        raise UsageError(f"{run_folder} {why_no_encoder(Path(run_folder)) or unfinished}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{out} exists already; choose a new --out, or remove it")
    if network == "teacher":
        make_student_and_teacher(run_folder)  # refuses methods that have none
    with _student_in_timms_layout(run_folder) if network == "student" else nullcontext(source) as folder:
        return _EXPORTS[to](folder, target, network)


@contextmanager
def _student_in_timms_layout(run_folder: str | Path) -> Iterator[Path]:
    """A temporary folder like `encoder/`."""
    student, config = load_student(run_folder)
    views = config.views
    with tempfile.TemporaryDirectory(prefix="diffmix-") as temporary:
        folder = Path(temporary) / "encoder"
        save_encoder(student, folder, config=config.encoder, image_size=views.size, mean=views.mean, std=views.std)
        yield folder


def _export_timm(source: Path, target: Path, network: Network | None) -> str:
    description = _read_description(source)
    usage = _timm_usage(target, description["architecture"])
    with _replacing(target) as temporary:
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(source / name, temporary / name)
        _check_equal(load_timm(source), load_timm(temporary), description["pretrained_cfg"]["input_size"][-1], 0)
        _write_readme(temporary, description, usage.replace(str(target), "THIS_FOLDER"), network)
    return usage


def _export_torchvision(source: Path, target: Path, network: Network | None) -> str:
    description = _read_description(source)
    name, keywords = torchvision_export.call_of(description)
    encoder = load_timm(source)
    state = encoder.state_dict()
    if name.startswith("vit"):
        state = {torchvision_export.vit_name(key): value for key, value in state.items()}
    usage = torchvision_export.usage(target / WEIGHTS, name, keywords)
    with _replacing(target) as temporary:
        _write_weights(state, temporary / WEIGHTS)
        loaded = torchvision_export.load(name, keywords, temporary / WEIGHTS, description)
        _check_equal(encoder, loaded, description["pretrained_cfg"]["input_size"][-1], _ROUNDING)
        _write_readme(temporary, description, usage.replace(str(target), "THIS_FOLDER"), network)
    return usage


_EXPORTS: dict[str, Callable[[Path, Path, Network | None], str]] = {
    "timm": _export_timm,
    "torchvision": _export_torchvision,
}


def _description(
    encoder: Any, config: EncoderConfig, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What config.json says: everything that timm needs to build the network and to prepare its images."""
    args = resolved_args(config, image_size)
    known = {
        key: encoder.pretrained_cfg.get(key) for key in ("fixed_input_size", "pool_size", "first_conv", "classifier")
    }
    return {
        "architecture": config.name.partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": {key: value for key, value in args.items() if not ("drop" in key and key.endswith("_rate"))},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, image_size, image_size],
            "interpolation": "bilinear",  # as the trainer's own reader resizes the short side and cuts the centre
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            **known,
        },
    }


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / CONFIG).read_text("utf-8"))
        description["architecture"], description["model_args"], description["pretrained_cfg"]["input_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / CONFIG} is damaged ({error!r}); export from a run whose encoder is whole"
        ) from error
    return description


def _plain_copy(encoder: nn.Module) -> nn.Module:
    """The same network in float32 on the CPU in evaluation mode, with the default memory layout."""
    bare = copy.deepcopy(getattr(encoder, "_orig_mod", encoder))
    return bare.cpu().float().to(memory_format=torch.contiguous_format).eval()


def _attend_alike(bare: nn.Module, loaded: nn.Module) -> None:
    """Fused attention where timm has it: `nn.precision` may have changed that; another order of sums is no fault."""
    kinds = dict(loaded.named_modules())
    modules: Iterator[tuple[str, Any]] = bare.named_modules()
    for name, module in modules:
        if hasattr(module, "fused_attn") and hasattr(kinds.get(name), "fused_attn"):
            module.fused_attn = kinds[name].fused_attn


def _write_weights(state: Mapping[str, Tensor], file: Path) -> None:
    with explained("write", str(file)):
        save_file({name: value.contiguous().clone() for name, value in state.items()}, file, {"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone


@torch.inference_mode()
def _check_equal(first: nn.Module, second: nn.Module, image_size: int, tolerance: float) -> None:
    """Raises `ExportError` if features of random images differ by more than `tolerance` of their largest."""
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    wanted, got = first(images), second(images)
    if wanted.shape != got.shape or not wanted.isfinite().all():
        raise ExportError(f"features {tuple(got.shape)} instead of finite {tuple(wanted.shape)}; nothing was exported")
    difference = (wanted - got).abs().max().item()
    if difference > tolerance * max(1.0, wanted.abs().max().item()):
        raise ExportError(
            f"the exported network's features differ by up to {difference:.3g} from the encoder's; nothing was "
            "exported. Its architecture was changed in a way that the encoder's config does not say"
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name, and its place, when all went well."""
    with explained("write", str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)
    try:
        yield temporary
        with explained("write", str(folder)):
            _take_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, folder: Path) -> None:
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if folder.exists():  # a folder cannot be renamed over one that holds files
        old = temporary.with_name(f"{temporary.name}-old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)


def _timm_usage(target: Path, architecture: str) -> str:
    lines = ["import timm", f'encoder = timm.create_model("local-dir:{target}", pretrained=True).eval()']
    if architecture.endswith("_cifar"):
        lines.insert(1, f"import trainer.nn.encoders  # timm has no {architecture}: diffmix adds it")
    return "\n".join(lines)


def _write_readme(folder: Path, description: Mapping[str, Any], usage: str, network: Network | None) -> None:
    pretrained, who = description["pretrained_cfg"], f"encoder of the {network}" if network else "encoder"
    (folder / "README.md").write_text(
        f"# {description['architecture']} {who}, trained with diffmix\n\n"
        f"Images: RGB in 0..1, {pretrained['input_size'][-1]} px (short side resized bilinearly, centre cut), then "
        f"normalised by mean {pretrained['mean']} and std {pretrained['std']}.\n"
        f"Features: {description['num_features']} numbers an image; there is no classifier.\n\n"
        f"```python\n{usage}\n```\n"
    )
