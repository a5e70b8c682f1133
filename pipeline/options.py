"""The options that `generate` and `plan` share, their presets and their configuration file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manifests.errors import UsageError
from pipeline.engines import ENGINES
from pipeline.generators import GENERATORS
from pipeline.sources import SOURCES

if TYPE_CHECKING:
    from pipeline.generate import Settings

F = TypeVar("F", bound=Callable[..., Any])

# The authors' script, generating_images/run.py of the DiffMix repository: what its two variants share.
_DIFFMIX: dict[str, Any] = {
    "dtype": "float16",
    "steps": 50,
    "guidance_scale": 3.0,
    "scheduler": "checkpoint",
    "size": 512,
    "conditioning": "squash",
    "variations": 1,
    "seed": 25,
    "safety": "off",
}

PRESETS: dict[str, dict[str, Any]] = {
    "diffmix-paper": {"model": "lambdalabs/sd-image-variations-diffusers", "revision": "v2.0", **_DIFFMIX},
    "diffmix-paper-versatile": {"model": "shi-labs/versatile-diffusion", **_DIFFMIX},
}

SD_VARIATIONS = "lambdalabs/sd-image-variations-diffusers"
SD_VARIATIONS_REVISION = "v2.0"
DIGITS = "digits"


def _defaults_from(context: click.Context, values: dict[str, Any], where: str) -> None:
    known = {flag.lstrip("-"): parameter for parameter in context.command.params for flag in parameter.opts}
    for name in ("config", "preset"):
        del known[name]
    resolved = {}
    for name, value in values.items():
        option = str(name).replace("_", "-").lstrip("-")
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
            raise click.UsageError(f"{where}: unknown option {name!r}{hint}")
        resolved[str(known[option].name)] = _as_typed(known[option], value, f"{where}: {option}")
    context.default_map = {**(context.default_map or {}), **resolved}


def _as_typed(parameter: click.Parameter, value: Any, where: str) -> Any:
    """A value of a YAML file as it would stand on the command line, where click checks it."""
    if isinstance(value, dict | list):
        raise click.UsageError(f"{where} is {value!r}; give one value")
    if isinstance(value, bool) and isinstance(parameter.type, click.Choice):
        return "on" if value else "off"  # what YAML takes for a bool
    return value if value is None or (isinstance(value, bool) and parameter.type is click.BOOL) else str(value)


def _load_preset(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    if name is not None:
        # A file given beside the preset wins, whichever stands first on the command line.
        context.default_map = {**PRESETS[name], **(context.default_map or {})}


def _load_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise click.UsageError(f"--config {path}: write one `option: value` a line, as in `shards: 512`")
    _defaults_from(context, values, f"--config {path}")


def _checked_store_real(context: click.Context, parameter: click.Parameter, text: str) -> str:
    if text == "original" or (text.isdecimal() and int(text) > 0):
        return text
    raise UsageError(f"--store-real {text!r}: give 'original' or a number of pixels for the short side")


store_real_option = click.option(
    "--store-real",
    default="original",
    show_default=True,
    metavar="original|PX",
    callback=_checked_store_real,
    help="Keep the real images as they are, or with a short side of at most PX pixels.",
)

_OPTIONS = [
    click.option(
        "--config",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        callback=_load_config,
        is_eager=True,
        expose_value=False,
        help="YAML file of the same option names; flags win.",
    ),
    click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        callback=_load_preset,
        is_eager=True,
        expose_value=False,
        help="Named settings; --config and flags win.",
    ),
    click.option(
        "--source",
        metavar="PLACE",
        help=f"Real images: a folder, WebDataset tars (also a glob or braces), Parquet or Hugging Face tables, a pair "
        f"set, or 'digits'; KIND:PLACE forces one of {', '.join(SOURCES)}.  [default: digits]",
    ),
    click.option(
        "--count", type=click.IntRange(1), help="Number of images of an unconditional model, instead of --source."
    ),
    click.option("--out", default="data/pairs", show_default=True, help="Folder or URL (s3://…) of the pair set."),
    click.option("--shards", type=click.IntRange(1), default=8, show_default=True, help="Number of output shards."),
    click.option(
        "--model",
        help="Hub id or local folder in diffusers format, or 'embedded'.  [default: "
        f"{SD_VARIATIONS} on a GPU, the embedded tiny checkpoint on a CPU]",
    ),
    click.option("--revision", help="Revision of a hub model."),
    click.option(
        "--generator",
        "generator_name",
        type=click.Choice(["auto", *GENERATORS]),
        default="auto",
        show_default=True,
        help="How the model is run; auto reads it from the checkpoint.",
    ),
    click.option("--variations", type=click.IntRange(1), default=1, show_default=True, help="Images per real image."),
    click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the generator's]"),
    click.option(
        "--guidance-scale",
        type=click.FloatRange(0),
        help="Classifier-free guidance; 1 is off.  [default: the generator's]",
    ),
    click.option("--scheduler", help="ddim, pndm, dpm++, euler, …, or 'checkpoint'.  [default: the generator's]"),
    click.option(
        "--size", type=click.IntRange(8), help="Side of the synthetic images in pixels.  [default: the model's]"
    ),
    click.option(
        "--conditioning",
        type=click.Choice(["squash", "crop"]),
        default="squash",
        show_default=True,
        help="How the real image meets the encoder: squashed to a square (the paper), or cropped keeping its aspect.",
    ),
    store_real_option,
    click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality."),
    click.option("--batch-size", default="auto", show_default=True, metavar="auto|N", help="Variations per batch."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto is bfloat16 on a GPU, float32 on a CPU.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the shards' order and every noise."),
    click.option("--limit", type=click.IntRange(1), help="Use only N images: the first in the plan's random order."),
    click.option(
        "--engine",
        type=click.Choice(["auto", *ENGINES]),
        default="auto",
        show_default=True,
        help="local: this machine's devices; ranks: torchrun, accelerate launch, srun, Slurm arrays.",
    ),
    click.option("--workers", type=click.IntRange(1), help="Processes of the local engine.  [default: one per GPU]"),
    click.option(
        "--max-failures",
        default="5%",
        show_default=True,
        metavar="N|P%",
        help="Failed rows beyond which the run stops.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(1),
        default=100_000_000,
        show_default=True,
        help="Real images with more pixels become failed rows.",
    ),
    click.option(
        "--safety",
        type=click.Choice(["off", "flag", "drop"]),
        default="off",
        show_default=True,
        help="The checkpoint's safety checker: unused, a column, or failed rows. It never blackens an image.",
    ),
]


def generation_options(command: F) -> F:
    """Add the options that decide what a pair set is and how it is made."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_of(values: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Options to settings, with notes for the user on what was chosen for them."""
    import torch

    from pipeline.generate import Settings
    from pipeline.generators.base import GeneratorConfig

    notes: list[str] = []
    gpu = torch.cuda.is_available()
    model, revision = _model(values, notes, gpu=gpu)
    if values["dtype"] == "auto":
        values["dtype"] = "bfloat16" if gpu else "float32"
    names = ("steps", "guidance_scale", "scheduler", "size", "dtype", "conditioning", "safety")
    config = GeneratorConfig(model=model, revision=revision, **{name: values[name] for name in names})
    if values["source"] is not None and values["count"] is not None:
        raise UsageError("--source and --count exclude each other: --count is for models that take no image")
    if values["source"] is None and values["count"] is None:
        notes.append("source: digits, the embedded handwritten digits (--source PLACE for your own images)")
    if values["count"] is not None and values["limit"] is not None:
        raise UsageError("--count and --limit exclude each other: --limit is for images that exist; lower --count")
    source = values["source"] if values["source"] is not None or values["count"] is not None else DIGITS
    settings = Settings(
        source=source,
        generator=config,
        store_real=values["store_real"],
        batch_size=_batch_size(values["batch_size"]),
        **{
            name: values[name]
            for name in (
                "out", "generator_name", "shards", "variations", "seed", "limit", "count", "quality", "max_pixels",
                "engine", "workers", "max_failures",
            )
        },
    )  # fmt: skip
    return settings, notes


def _model(values: dict[str, Any], notes: list[str], *, gpu: bool) -> tuple[str, str | None]:
    if values["model"] is not None:
        return str(values["model"]), values["revision"]
    from pipeline.embedded import EMBEDDED

    if gpu:
        revision = values["revision"] or SD_VARIATIONS_REVISION
        notes.append(f"model: {SD_VARIATIONS} {revision} (--model for another)")
        return SD_VARIATIONS, revision
    notes.append(
        "model: the embedded tiny checkpoint, made for digits of 32 pixels, since there is no GPU "
        f"(--model {SD_VARIATIONS} --revision {SD_VARIATIONS_REVISION} for Stable Diffusion)"
    )
    return EMBEDDED, None


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--batch-size {text!r}: give 'auto' or a number of images")
