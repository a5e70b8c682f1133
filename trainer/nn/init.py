"""Initial weights of an encoder: `--init timm:NAME`, a run folder, or a file of somebody's checkpoint.

Nothing is unpickled but tensors and plain containers (`torch.load(weights_only=True)`). Of a checkpoint's networks the
teacher is taken where there is one, its prefixes and heads are dropped, and positional embeddings are resampled to the
encoder's grid; every other tensor must match by name and shape.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.nn.encoders import check_name

State = dict[str, Tensor]

# Where checkpoints keep their networks, the first that is there wins: DINO's teacher, timm's average, Lightning, MAE.
_CONTAINERS = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "student", "encoder", "backbone")
# Parts of names in front of the encoder's own. Of several networks the least sum is taken: teachers (DINO, DINOv2,
# lightly) before what was trained, and that before its averages (MoCo's authors evaluate the query encoder).
_PREFIXES = {
    **dict.fromkeys(("teacher", "teacher_backbone"), -1),
    **dict.fromkeys(("module", "_orig_mod", "backbone", "encoder", "model", "base_encoder", "encoder_q"), 0),
    **dict.fromkeys(("student", "student_backbone"), 1),
    **dict.fromkeys(("momentum_encoder", "momentum_backbone", "encoder_k"), 2),
}
# What may be left over: classifiers, projectors, decoders and other parts that are no encoder.
_HEADS: tuple[str, ...] = (
    "head",
    "head_dist",
    "heads",
    "fc",
    "classifier",
    "projector",
    "predictor",
    "projection_head",
)
_HEADS += ("prediction_head", "dino_head", "ibot_head", "prototypes", "mask_token", "queue", "queue_ptr")


def initialise(encoder: nn.Module, spec: str) -> str:
    """Fill `encoder` with the weights that `spec` names; returns one line that says what was loaded.

    `spec` is `timm:NAME` (timm's pretrained weights, downloaded once; `timm:local-dir:PATH` and `timm:hf-hub:ID` too),
    a run folder or its `encoder/`, or a file: .safetensors, or .pth, .pt, .bin, .ckpt, .tar of PyTorch. Raises
    `UsageError` if there is no such thing, or naming the tensors that do not fit; the encoder is then unchanged.
    """
    state, source = _timm_state(spec[5:]) if spec.startswith("timm:") else _path_state(Path(spec))
    fitted, notes = _fitted(state, encoder, source)
    encoder.load_state_dict(fitted)
    return f"encoder initialised with {len(fitted)} tensors of {source}{''.join(f', {note}' for note in notes)}"


def _timm_state(name: str) -> tuple[State, str]:
    if not name.startswith(("local-dir:", "hf-hub:")):
        check_name(name)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"timm could not load pretrained weights of {name!r}: {_first_line(error)}. Without a network, download "
            "them elsewhere and give the file: `--init FILE.safetensors`"
        ) from error
    cfg: Any = model.pretrained_cfg
    tag = cfg.get("tag")
    return model.state_dict(), f"timm:{name}" + (f" ({tag})" if tag and not name.endswith(tag) else "")


def _path_state(path: Path) -> tuple[State, str]:
    for file in (path / "encoder" / "model.safetensors", path / "model.safetensors"):
        if file.is_file():
            return _read(file), str(path)
    if path.is_dir():
        raise UsageError(
            f"{path} holds no encoder: a finished run has encoder/model.safetensors; `trainer runs` lists the runs"
        )
    if not path.is_file():
        hint = f"; did you mean timm:{path}?" if timm.is_model(str(path)) else "."
        raise UsageError(
            f"--init {path}: there is no such file or folder{hint} Give timm:NAME, a run folder or a "
            "file (.safetensors, .pth)"
        )
    return _read(path), str(path)


def _read(file: Path) -> State:
    """The tensors of a checkpoint by name, of its teacher where it has one."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # DINO, MAE and MoCo-v3 keep their command line beside the weights: a Namespace holds values, it runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UsageError(
            f"{file} holds Python objects besides tensors{f' ({found[1]})' if found else ''}, and loading those could "
            "run code. If you trust it, save its weights alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{file} cannot be read as a checkpoint: {_first_line(error)}") from error
    return _network(content, file)


def _network(content: Any, file: Path) -> State:
    """The innermost mapping of names to tensors, going down through `_CONTAINERS`."""
    while isinstance(content, Mapping):
        inner = [content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        content = inner[0]
    found = content if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(map(str, list(found)[:8])) or type(content).__name__
        raise UsageError(f"{file} holds no weights under a known name ({', '.join(_CONTAINERS)}); it holds {keys}")
    return state


def _fitted(state: State, encoder: nn.Module, source: str) -> tuple[State, list[str]]:
    """The encoder's state taken from `state`, and what was done to it; raises `UsageError` where it does not fit."""
    own = encoder.state_dict()
    prefix = _prefix(state, own)
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    notes = [f"prefix {prefix!r} removed"] if prefix else []
    heads = sorted({_top(name) for name in inner if name not in own and _is_head(name)})
    if heads:
        notes.append(f"without {', '.join(heads)}")
    fitted = {name: value for name, value in inner.items() if name in own or not _is_head(name)}
    notes += _resample_positions(fitted, own, encoder)
    for name in own:  # checkpoints of before PyTorch 0.4 do not count batches, and nothing depends on the count
        if name.endswith("num_batches_tracked"):
            fitted.setdefault(name, own[name])
    _check_fit(fitted, own, source)
    return fitted, notes


def _prefix(state: State, own: Mapping[str, Tensor]) -> str:
    """What stands before the encoder's names: known parts only, the preferred network of several."""
    anchor = next(iter(own))
    found = {name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")}
    known = [prefix for prefix in found if all(part in _PREFIXES for part in prefix.split(".")[:-1])]
    return min(known, key=lambda prefix: (sum(_PREFIXES[part] for part in prefix.split(".")[:-1]), prefix), default="")


def _resample_positions(fitted: State, own: Mapping[str, Tensor], encoder: Any) -> list[str]:
    """Bring `pos_embed` [1, tokens, D] to the encoder's grid, in place; returns what was done."""
    old, new = fitted.get("pos_embed"), own.get("pos_embed")
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    if old is None or new is None or grid is None or old.ndim != 3 or old.shape == new.shape:
        return []
    extra = new.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, old.shape[1] - extra))
    if side < 1 or side * side != old.shape[1] - extra or old.shape[2] != new.shape[2]:
        return []
    fitted["pos_embed"] = resample_abs_pos_embed(old, list(grid), [side, side], num_prefix_tokens=extra)
    return [f"positions resampled from {side}x{side} to {grid[0]}x{grid[1]}"]


def _check_fit(fitted: State, own: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in own if name not in fitted]
    unexpected = [name for name in fitted if name not in own]
    other = [
        f"{name} {tuple(fitted[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in fitted and fitted[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
    wrong = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
    if wrong:
        raise UsageError(
            f"the weights of {source} do not fit the encoder ({len(own)} tensors): {'; '.join(wrong)}. "
            "Set --encoder and encoder.args to the architecture that they come from"
        )


def _is_head(name: str) -> bool:
    return _top(name) in _HEADS or name.startswith("decoder_")


def _top(name: str) -> str:
    return name.partition(".")[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
