"""The encoder that fine-tuning starts from, `--init`: a pre-training run, timm's weights, or a file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from manifests.errors import UsageError
from trainer.engine.run_folder import CONFIG, ENCODER, RESULTS, read_values
from trainer.nn.encoders import EncoderConfig, check_name, make_encoder
from trainer.nn.init import initialise
from trainer.runs import list_runs

_OF_ENCODER = ("knn", "knn_before", "feature_rank", "final")  # what results.json says of the network in encoder/
_FINAL_NORMS = ("norm", "fc_norm")  # of timm's transformers, before and after the pooling
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What to build and with which weights; images are `size` pixels, normalised by `mean` and `std` of RGB in 0..1.

    `encoder` is the network that the weights were trained in, `network` the one that is fine-tuned: it differs by
    `changes`, keywords of timm such as `global_pool`.
    """

    init: str
    encoder: EncoderConfig
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    changes: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None  # the pre-training run, where it is one

    def make(self) -> tuple[nn.Module, str]:
        """The encoder with its weights, and a line that says what was loaded."""
        trained = make_encoder(self.encoder, self.size)
        note = initialise(trained, self.init)
        if self.network == self.encoder:
            return trained, note
        encoder = make_encoder(self.network, self.size)
        return encoder, note + _take_over(encoder, trained, self.changes)

    @property
    def network(self) -> EncoderConfig:
        """What `make` makes."""
        return EncoderConfig(name=self.encoder.name, args={**self.encoder.args, **self.changes})

    @property
    def results(self) -> dict[str, Any]:
        """results.json of the pre-training run, less what it says of another network; empty where there is none."""
        if self.run is None:
            return {}
        found = read_values(self.run / RESULTS)
        if Path(self.init).absolute() in (self.run.absolute(), self.run.absolute() / ENCODER):
            return found
        return {name: value for name, value in found.items() if name not in _OF_ENCODER}

    @property
    def data_url(self) -> str | None:
        """The pair set that the encoder saw, where the run says so."""
        data = self._config.get("data")
        return data.get("url") if isinstance(data, dict) else None

    @property
    def filters(self) -> tuple[str, ...]:
        """The rows of it that the run chose."""
        data = self._config.get("data")
        return tuple(data.get("filter") or ()) if isinstance(data, dict) else ()

    @property
    def _config(self) -> dict[str, Any]:
        return read_values(self.run / CONFIG) if self.run else {}


def newest_run(root: str = "runs") -> str:
    """The newest finished pre-training run inside `root`; raises `UsageError` if there is none."""
    found = []
    if Path(root).is_dir():
        finished = [Path(run.path) for run in list_runs(root) if run.state == "finished"]
        found = [path for path in finished if (path / "encoder" / "config.json").is_file()]
    if not found:
        raise UsageError(
            f"there is no finished pre-training run in {root}/: run `trainer pretrain` first, or give "
            "--init RUN, --init timm:NAME or --init FILE"
        )
    return str(max(found, key=lambda path: (path / RESULTS).stat().st_mtime))


def open_origin(init: str, encoder: EncoderConfig | None, size: int | None = None) -> Origin:
    """What `init` names; `encoder` is the timm model of a bare file, and `size` wins over what it was trained with.

    Raises `UsageError` if there is no such thing, or a bare file comes without an encoder.
    """
    name = init.removeprefix("timm:")
    folder = Path(name.removeprefix("local-dir:"))
    if init.startswith("timm:") and not name.startswith("local-dir:"):
        return _of_timm(init, name, encoder, size)
    if folder.is_dir():
        if encoder is not None:
            raise UsageError(f"--init {init} says itself which network it is: leave out encoder.name")
        return _of_folder(folder, size)
    if encoder is None and folder.is_file():
        raise UsageError(
            f"--init {init} is a file of weights, which does not say of which network: add --set encoder.name=NAME, "
            "such as vit_base_patch16_224 (and encoder.args, images.size, images.mean, images.std where they differ)"
        )
    if encoder is None:
        hint = f"; did you mean timm:{init}?" if timm.is_model(init) else "."
        raise UsageError(f"--init {init}: there is no such file or folder{hint} Give RUN, timm:NAME or FILE")
    return _of_name(init, encoder, size)


def _of_timm(init: str, name: str, encoder: EncoderConfig | None, size: int | None) -> Origin:
    if encoder is None and name.startswith("hf-hub:"):
        raise UsageError(
            f"--init {init} does not say which network it holds: add --set encoder.name=NAME, such as "
            "vit_base_patch16_224 (and images.size, images.mean, images.std where they differ from that network's)"
        )
    if not name.startswith("hf-hub:"):
        check_name(name)
    return _of_name(init, encoder or EncoderConfig(name=name), size)


def _of_name(init: str, encoder: EncoderConfig, size: int | None) -> Origin:
    """With the images that timm says the model was trained on."""
    try:
        cfg = timm.get_pretrained_cfg(encoder.name, allow_unregistered=True)
    except RuntimeError as error:  # of a tag that the model does not have
        model = encoder.name.partition(".")[0]
        known = ", ".join(name for name in timm.list_pretrained(f"{model}.*"))
        raise UsageError(f"--init {init}: {error}; timm has {known or 'no weights of that model'}") from error
    input_size = cfg.input_size[-1] if cfg else 224
    mean, std = ((tuple(cfg.mean), tuple(cfg.std)) if cfg else _IMAGENET)  # fmt: skip
    return Origin(init=init, encoder=encoder, size=size or input_size, mean=_three(mean), std=_three(std))


def _of_folder(folder: Path, size: int | None) -> Origin:
    """A run, or an exported encoder in timm's layout."""
    inner = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    if not (inner / "config.json").is_file():
        raise UsageError(
            f"--init {folder} holds no encoder: a finished run has encoder/config.json; `trainer runs` lists the runs"
        )
    description = read_values(inner / "config.json")
    try:
        images = description["pretrained_cfg"]
        args = {key: value for key, value in description.get("model_args", {}).items() if key != "num_classes"}
        encoder = EncoderConfig(name=description["architecture"], args=args)
        trained, mean, std = images["input_size"][-1], _three(images["mean"]), _three(images["std"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UsageError(f"{inner / 'config.json'} is damaged ({error!r}); export the encoder again") from error
    if size not in (None, trained):
        args.pop("img_size", None)
    return Origin(init=str(folder), encoder=encoder, size=size or trained, mean=mean, std=std, run=_run_of(folder))


def _take_over(encoder: nn.Module, trained: nn.Module, changes: Mapping[str, Any]) -> str:
    """Give the changed network all trained weights but those of final norms that it has elsewhere; says which."""
    state, own = trained.state_dict(), encoder.state_dict()
    fresh, gone = ([name for name in one if name not in other] for one, other in ((own, state), (state, own)))
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    wrong = other + [name for name in (*fresh, *gone) if name.partition(".")[0] not in _FINAL_NORMS]
    if wrong:
        raise UsageError(
            f"encoder.args {dict(changes)} would leave trained weights without use, or others untrained: "
            f"{', '.join(wrong[:3])}. The trained network can only be given another pooling (global_pool) and dropout "
            "(drop_path_rate)"
        )
    encoder.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    new, old = (", ".join(dict.fromkeys(name.partition(".")[0] for name in names)) for names in (fresh, gone))
    return (f", {new} new and untrained" if new else "") + (f", {old} left out" if old else "")


def _run_of(folder: Path) -> Path | None:
    return next((path for path in (folder, folder.absolute().parent) if (path / CONFIG).is_file()), None)


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
