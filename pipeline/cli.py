"""The command line `pipeline`. Heavy modules are imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from manifests.errors import DiffmixError
from pipeline.bench import DEFAULT_SECTIONS, SECTIONS
from pipeline.options import generation_options, settings_of, store_real_option
from pipeline.signals import RESUMABLE, Stopped, stoppable

FAILED_ITEMS = 3

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
_source_option = click.option("--source", help="Where the real images are now, if they were moved.")
_model_option = click.option("--model", help="Where the model is now, if it was moved.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.version_option(package_name="diffmix")
def cli(debug: bool) -> None:
    """Real images to real/synthetic pairs: generate, check and mend sharded pair sets.

    \b
    pipeline generate                                  # embedded digits, on any machine
    pipeline generate --source IMAGENET/train --out /data/pairs --shards 512
    pipeline status /data/pairs

    Exit codes: 0 ok, 1 error, 2 usage, 3 finished with failed or bad items, 75 stopped by a signal (run it again).
    """


@cli.command()
@generation_options
@click.option("--dry-run", is_flag=True, help="Say what would be made, and stop.")
@click.option("--overwrite", is_flag=True, help="Delete the pair set in --out first.")
@_json_option
def generate(dry_run: bool, overwrite: bool, as_json: bool, **values: Any) -> int:
    """Make variations of real images and write the pair set; run it again to resume.

    A killed run loses at most the shards in progress. A finished set is left alone; failed rows are for
    `pipeline repair`.

    \b
    pipeline generate --source photos --out data/pairs --variations 4
    torchrun --nproc-per-node 8 -m pipeline generate --source IMAGENET/train --shards 512
    pipeline generate --model google/ddpm-cifar10-32 --count 50000 --out data/inflation
    """
    from dataclasses import replace

    from pipeline.generate import generate as run

    settings, notes = settings_of(values)
    for note in notes:
        click.echo(note, err=True)
    if dry_run:
        return _show_plan(settings, as_json, rate=None, workers=())
    click.echo("reading the source, loading the model …", err=True)
    outcome = run(replace(settings, overwrite=overwrite))
    summary = outcome.summary()
    _print(summary, as_json, outcome.text())
    return FAILED_ITEMS if outcome.failed else 0


@cli.command()
@generation_options
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Images/s of one worker, as `pipeline bench` measures it."
)
@click.option("--for-workers", "for_workers", default="1,8,64", show_default=True, help="Worker counts to compare.")
@_json_option
def plan(rate: float | None, for_workers: str, as_json: bool, **values: Any) -> int:
    """Say what a generation would make and cost: rows, shards, disk, GPU-hours, waste at the end. Makes nothing."""
    settings, notes = settings_of(values)
    for note in notes:
        click.echo(note, err=True)
    if not re.fullmatch(r"0*[1-9][0-9]*(,0*[1-9][0-9]*)*", for_workers):
        raise click.UsageError(f"--for-workers {for_workers!r}: give numbers such as 1,8,64")
    workers = tuple(map(int, for_workers.split(",")))
    return _show_plan(settings, as_json, rate=rate, workers=workers)


def _show_plan(settings: Any, as_json: bool, rate: float | None, workers: tuple[int, ...]) -> int:
    from pipeline.estimate import estimate, estimate_text

    facts = estimate(settings, rate=rate, workers=workers)
    _print(facts, as_json, estimate_text(facts))
    return 0


@cli.command()
@click.option("--real", required=True, help="Folder of real images.")
@click.option("--synthetic", required=True, multiple=True, help="Folder of generated ones; repeat for more variations.")
@click.option("--out", default="data/pairs", show_default=True, help="Folder or URL of the pair set.")
@click.option("--shards", type=click.IntRange(1), default=8, show_default=True, help="Number of output shards.")
@store_real_option
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality, where one is made."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the rows.")
@click.option("--limit", type=click.IntRange(1), help="Use only N images, the first in that order.")
@click.option("--max-failures", default="5%", show_default=True, metavar="N|P%", help="Failed rows that stop the run.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=100_000_000,
    show_default=True,
    help="Larger images become failed rows.",
)
@click.option("--overwrite", is_flag=True, help="Delete the pair set in --out first.")
@_json_option
def pack(as_json: bool, **values: Any) -> int:
    """Pair real images with generated ones that exist already (same relative paths, any suffix); no model is run.

    \b
    pipeline pack --real IMAGENET/train --synthetic generated/train --out data/pairs --shards 512
    """
    from pipeline.generate import pack as run

    outcome = run(**values)
    _print(outcome.summary(), as_json, outcome.text())
    return FAILED_ITEMS if outcome.failed else 0


@cli.command()
@click.argument("folder", metavar="DIR")
@_json_option
def status(folder: str, as_json: bool) -> int:
    """Say how far a pair set is: shards, rows, failures by reason, images/s, time to go."""
    from pipeline.inspect import status as look
    from pipeline.inspect import status_text

    facts = look(folder)
    _print(facts, as_json, status_text(facts))
    return 0


@cli.command()
@click.argument("folder", metavar="DIR")
@_json_option
def verify(folder: str, as_json: bool) -> int:
    """Compare every byte of a pair set with its checksums. Exit 0: sound (recorded failed rows are); 3: not."""
    from pipeline.inspect import verify_set, verify_text

    facts = verify_set(folder)
    _print(facts, as_json, verify_text(facts))
    return FAILED_ITEMS if facts["problems"] else 0


@cli.command()
@click.argument("folder", metavar="DIR")
@_source_option
@_model_option
@_json_option
def repair(folder: str, source: str | None, model: str | None, as_json: bool) -> int:
    """Make bad shards and failed rows again, and nothing else. Exit 3 if rows still fail."""
    from pipeline.inspect import repair as mend
    from pipeline.inspect import repair_text

    facts = mend(folder, source=source, model=model)
    _print(facts, as_json, repair_text(facts))
    return FAILED_ITEMS if facts["rows_failed"] or facts["problems"] else 0


@cli.command()
@click.argument("folder", metavar="DIR")
@click.argument("key")
@_source_option
@_model_option
@click.option("--save", type=click.Path(path_type=Path, file_okay=False), help="Folder for the images made again.")
@_json_option
def reproduce(folder: str, key: str, source: str | None, model: str | None, save: Path | None, as_json: bool) -> int:
    """Make one sample again from its row and report how far its pixels are from the stored ones."""
    from pipeline.inspect import reproduce as again
    from pipeline.inspect import reproduce_text

    facts = again(folder, key, source=source, model=model, save=save)
    _print(facts, as_json, reproduce_text(facts))
    return 0


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="sheet.png",
    show_default=True,
    help="PNG or HTML file.",
)
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Rows per page.")
@click.option("--thumbnail", type=click.IntRange(16), default=112, show_default=True, help="Side in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows.")
@_json_option
def sheet(folder: str, out: Path, samples: int, thumbnail: int, seed: int, as_json: bool) -> int:
    """Draw a contact sheet (PNG or HTML): real images beside their variations, and the least similar pairs."""
    from pipeline.sheet import write_sheet

    files = [str(path) for path in write_sheet(folder, out, samples=samples, thumbnail=thumbnail, seed=seed)]
    _print({"files": files}, as_json, "\n".join(files))
    return 0


@cli.command()
@click.option("--sections", default=",".join(DEFAULT_SECTIONS), show_default=True, help=f"Of {', '.join(SECTIONS)}.")
@click.option("--model", help="Compare this image-variation model: hub id or local folder in diffusers format.")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--random-weights", is_flag=True, help="Compare Stable Diffusion's architecture with random weights.")
@click.option("--images", type=click.IntRange(2), help="Images of one run.  [default: by model]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the model's]")
@click.option("--guidance-scale", type=float, help="Guidance of both sides.  [default: the model's]")
@click.option("--size", type=click.IntRange(8), help="Side of the images in pixels.  [default: the model's]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Of the plain loop.")
@click.option("--rounds", type=click.IntRange(1), help="Repetitions; medians are shown.  [default: by section]")
@click.option("--manifest-rows", type=click.IntRange(1), help="Rows of the manifest.  [default: 10000000]")
@click.option("--memory-images", type=click.IntRange(10), help="Add the section memory, over N tiny images.")
@click.option("--quick", is_flag=True, help="A minute of small runs: for a look, not for a table.")
@_json_option
def bench(sections: str, as_json: bool, **values: Any) -> int:
    """Measure images/s, host work, tar and manifest as ratios against named baselines, in one run.

    On an idle machine; with a GPU, --random-weights or --model measure it, the small default models stay on the CPU.

    \b
    pipeline bench
    pipeline bench --sections generation --random-weights    # images/s and TFLOP/s of Stable Diffusion, no download
    """
    from pipeline.bench.figures import Settings
    from pipeline.bench.suite import bench as measure

    names = sections.split(",") + (["memory"] if values["memory_images"] else [])
    if unknown := sorted(set(names) - set(SECTIONS)):
        raise click.UsageError(f"--sections: unknown {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    if values["model"] and values["random_weights"]:
        raise click.UsageError("--model and --random-weights exclude each other")
    facts = measure(Settings(**values), list(dict.fromkeys(names)), lambda text: click.echo(text, err=True))
    text = facts.pop("text")
    _print(facts, as_json, text)
    return 0


def _print(facts: Any, as_json: bool, text: str) -> None:
    # ASCII, so that paths that are no UTF-8 and terminals that know none can do no harm.
    try:
        click.echo(json.dumps(facts, indent=2) if as_json else text)
    except BrokenPipeError:  # `pipeline … | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Console entry point: runs the command and turns errors into messages and exit codes."""
    # OpenMP's threads spin while they wait for each other: on cores that another program uses too, generation took ten
    # times as long. They still spin for some microseconds. Read once, when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are no UTF-8
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one call; never raises for what a user can cause."""
    try:
        with stoppable():
            return int(cli.main(arguments, prog_name="pipeline", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Stopped as stopped:
        click.echo(
            f"\nstopped by {stopped.signal_name}; committed shards are kept: run the same command again", err=True
        )
        return RESUMABLE
    except DiffmixError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except OSError as error:  # a path that the user gave and that the system refuses
        if "--debug" in arguments:
            raise
        click.echo(f"error: {error}", err=True)
        return 1
