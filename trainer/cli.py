"""The command line `trainer`. Its commands arrive with stage two; until then each says so."""

from __future__ import annotations

import click

_COMMANDS = {
    "pretrain": "self-supervised pre-training on a pair set",
    "finetune": "continual fine-tuning, measuring what was gained and what was forgotten",
    "compare": "several methods or policies with equal budget in one table",
    "evaluate": "kNN, linear probe, shifts, corruptions, transfer",
    "report": "one page comparing runs",
    "export": "the encoder for plain timm or torchvision",
    "runs": "list of runs and their headline numbers",
    "bench": "loader and step speed against named baselines",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffmix")
def cli() -> None:
    """Self-supervised training on pair sets. Not built yet: this version of diffmix makes the pairs (`pipeline`)."""


def _add(name: str, summary: str) -> None:
    @cli.command(
        name,
        help=f"{summary[0].upper()}{summary[1:]} (not built yet).",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def command() -> None:
        raise click.ClickException(
            f"`trainer {name}` is not built yet; this version of diffmix has stage one, `pipeline`"
        )


for _name, _summary in _COMMANDS.items():
    _add(_name, _summary)


def main() -> None:
    """Console entry point."""
    cli(prog_name="trainer")


if __name__ == "__main__":
    main()
