"""The command line `trainer`. Heavy modules are imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from manifests.errors import DiffmixError
from trainer.bench import SECTIONS
from trainer.engine.ending import explanation, is_one_of_several, is_told, leave
from trainer.engine.signals import RESUMABLE
from trainer.options import (
    COMPARE,
    COMPARE_ARMS,
    FINETUNE,
    PRETRAIN,
    compare_options,
    finetune_options,
    nested,
    pretrain_options,
)

_LATER = {
    "evaluate": "kNN, linear probe, shifts, corruptions, transfer",
    "report": "one page comparing runs",
}

_EXIT_CODES = {"stopped": RESUMABLE, "collapsed": 4, "diverged": 4}  # by how a command ended; 4 as of CollapsedError
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.version_option(package_name="diffmix")
def cli(debug: bool) -> None:
    """Self-supervised training on pair sets: streams real/synthetic pairs into eight methods.

    \b
    trainer pretrain --method dino                       # on data/pairs, in runs/<time>-dino
    torchrun --nproc-per-node 8 -m trainer pretrain --method dino --data /data/pairs --out runs/dino
    trainer runs

    Exit codes: 0 ok, 1 error, 2 usage, 3 bad files, 4 collapsed or diverged, 75 stopped by a signal (run it again).
    """


@cli.command()
@pretrain_options
@click.option("--dry-run", is_flag=True, help="Print the settings, steps and sample counts, and stop.")
@_json_option
def pretrain(dry_run: bool, as_json: bool, **values: Any) -> int:
    """Train an encoder on a pair set without labels; run it again with the same --out to go on after a stop.

    Settings come from a recipe, --set and the other options win; the result is printed and kept in config.yaml.

    \b
    trainer pretrain --method dino --data data/pairs --out runs/dino
    trainer pretrain --recipe simclr-cifar10 --mix real --set optim.lr=0.3
    trainer pretrain --method simclr --filter 'similarity > 0.6' --filter 'fraction 0.1'
    """
    from trainer.pretrain import describe
    from trainer.pretrain import pretrain as run
    from trainer.settle import Request

    request = Request(
        method=values["method"],
        recipe=values["recipe"],
        flags=nested(values, PRETRAIN),
        assignments=values["assignments"],
        out=values["out"],
        resume=values["resume"],
    )
    return _dry_run(describe(request), as_json) if dry_run else _conclude(run(request), as_json)


@cli.command()
@finetune_options
@click.option("--dry-run", is_flag=True, help="Print the settings, parts and runs, and stop.")
@_json_option
def finetune(dry_run: bool, as_json: bool, **values: Any) -> int:
    """Fine-tune an encoder on new tasks with several tuners, and measure what is gained and what is forgotten.

    Every tuner starts from the same encoder. At the end one table, one picture, results.json, and for each tuner its
    adapter and heads. Run it again with the same --out to go on after a stop.

    \b
    trainer finetune                                     # the newest run, full, linear, LoRA and block expansion
    trainer finetune --init runs/dino --task photos/ --peft block-expansion:3 --peft lora:8 --seeds 3
    trainer finetune --init timm:vit_base_patch16_224.dino --task torchvision:CIFAR100@data --source IMAGENET
    """
    from trainer.finetune.command import describe
    from trainer.finetune.command import finetune as run
    from trainer.finetune.settle import Request

    request = Request(
        recipe=values["recipe"],
        flags=nested(values, FINETUNE),
        assignments=values["assignments"],
        out=values["out"],
    )
    return _dry_run(describe(request), as_json) if dry_run else _conclude(run(request), as_json)


@cli.command()
@compare_options
@click.option("--dry-run", is_flag=True, help="Print the arms, what differs, steps and counts, and stop.")
@_json_option
def compare(dry_run: bool, as_json: bool, **values: Any) -> int:
    """Train several methods or policies with an equal budget, and measure all encoders alike: one table.

    Every run is one of `trainer pretrain`, in a folder of its own. Run it again with the same --out to go on after a
    stop, or at the same time as another job to share the runs.

    \b
    trainer compare --method simclr --method dino --mix real --mix diffmix --max-steps 400 --seeds 2
    trainer compare --recipe digits --out runs/digits
    trainer compare --recipe arms.yaml --minutes 10 --test cifar10/test.tar
    """
    from trainer.compare.command import compare as run
    from trainer.compare.command import describe
    from trainer.compare.settings import Request

    request = Request(
        recipe=values["recipe"],
        methods=values["methods"],
        mixes=values["mixes"],
        flags=nested(values, COMPARE),
        arm_flags=nested(values, COMPARE_ARMS),
        assignments=values["assignments"],
        out=values["out"],
    )
    return _dry_run(describe(request), as_json) if dry_run else _conclude(run(request), as_json)


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["timm", "torchvision"]), default="timm", show_default=True, help="For which library."
)
@click.option(
    "--network",
    type=click.Choice(["teacher", "student"]),
    help="Of DINO, BYOL or MoCo v3.  [default: what RUN/encoder holds, the teacher]",
)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="New folder.")
@_json_option
def export(run: Path, to: Any, network: Any, out: Path, as_json: bool) -> int:
    """Write a run's encoder for plain timm or torchvision, and check that it gives the same features there.

    Papers on BYOL and MoCo v3 evaluate the student. It comes out of the last step's checkpoint.

    \b
    trainer export runs/dino --to torchvision --out dino-torchvision
    trainer export runs/byol --network student --out runs/byol/student
    """
    from trainer.export import export_run

    usage = export_run(run, out, to, network)
    facts = {"folder": str(out), "to": to, "network": network, "usage": usage}
    _print(facts, as_json, f"{out}: the same features as the {network or 'encoder'} of {run}\n\n{usage}")
    return 0


@cli.command()
@click.argument("root", metavar="[DIR]", default="runs", type=click.Path(path_type=Path))
@_json_option
def runs(root: Path, as_json: bool) -> int:
    """List the runs of a folder: state, steps, kNN, loss, images/s."""
    from dataclasses import asdict

    from trainer.runs import list_runs, runs_text

    found = list_runs(root)
    _print({"runs": [asdict(run) for run in found]}, as_json, runs_text(found))
    return 0


@cli.command()
@click.option("--sections", default=",".join(SECTIONS), show_default=True, help="Which, separated by commas.")
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="WebDataset tar of JPEG photographs to read.  [default: made from two of scikit-learn's]",
)
@click.option("--rounds", type=click.IntRange(1), help="Repetitions; medians are shown.  [default: by section]")
@click.option("--quick", is_flag=True, help="A minute or two of small runs: for a look, not for a table.")
@_json_option
def bench(sections: str, as_json: bool, **values: Any) -> int:
    """Measure loader, fidelity, resuming and steps as ratios against named baselines, in one run.

    On an idle machine: others' work slows the baselines more than ours. Section gpu needs a GPU, loader webdataset.

    \b
    trainer bench
    trainer bench --sections loader --images photos.tar
    """
    from trainer.bench.figures import Settings
    from trainer.bench.suite import bench as measure

    names = list(dict.fromkeys(sections.split(",")))
    if unknown := sorted(set(names) - set(SECTIONS)):
        raise click.UsageError(f"--sections: unknown {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    facts = measure(Settings(**values), names, lambda text: click.echo(text, err=True))
    text = facts.pop("text")
    _print(facts, as_json, text)
    return 0


def _add(name: str, summary: str) -> None:
    @cli.command(
        name,
        help=f"Not built yet: {summary}.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def command() -> None:
        raise click.ClickException(
            f"`trainer {name}` is not built yet; this version of diffmix pre-trains, compares and fine-tunes"
        )


for _name, _summary in _LATER.items():
    _add(_name, _summary)


def _dry_run(facts: dict[str, Any], as_json: bool) -> int:
    _print(facts, as_json, facts.pop("text"))
    return 0


def _conclude(outcome: Any, as_json: bool) -> int:
    """Print how a command ended; its exit code."""
    if outcome.is_main:
        facts = {**outcome.results, "state": outcome.state, "folder": str(outcome.folder)}
        _print(facts, as_json, outcome.text())
    return _EXIT_CODES.get(outcome.state, 0)


def _print(facts: Any, as_json: bool, text: str) -> None:
    try:
        click.echo(json.dumps(facts, indent=2, default=str) if as_json else text)
    except BrokenPipeError:  # `trainer … | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Console entry point: runs the command and turns errors into messages and exit codes."""
    # As in `pipeline`: OpenMP's threads would spin on cores that another program uses too. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are no UTF-8
    try:
        code = run(sys.argv[1:])
    except Exception:
        if not is_one_of_several():
            raise
        traceback.print_exc()
        code = 1
    leave(code)


def run(arguments: list[str]) -> int:
    """The exit code of one call; never raises for what a user can cause."""
    try:
        return int(cli.main(arguments, prog_name="trainer", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted; run the same command again to go on from the newest checkpoint", err=True)
        return RESUMABLE
    except (DiffmixError, OSError) as error:  # an OSError: a path that the user gave and that the system refuses
        if "--debug" in arguments:
            raise
        if not is_told(error):
            click.echo(f"error: {error}", err=True)
        return getattr(error, "exit_code", 1)
    except RuntimeError as error:
        reason = explanation(error)
        if reason is None or "--debug" in arguments:
            raise
        click.echo(f"error: {reason}", err=True)
        return 1


if __name__ == "__main__":
    main()
