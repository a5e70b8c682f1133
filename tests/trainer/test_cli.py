"""`trainer` exists from the first version on; what is not built yet says so."""

import pytest
from click.testing import CliRunner

from trainer.cli import cli


@pytest.mark.parametrize(
    "command", [["pretrain", "--method", "dino"], ["finetune", "--peft", "block-expansion"], ["runs"]]
)
def test_commands_say_that_they_are_not_built_yet(command):
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert f"`trainer {command[0]}` is not built yet" in result.output


def test_help_lists_what_will_come():
    assert "block" not in CliRunner().invoke(cli, ["--help"]).exception.__class__.__name__.lower()
    output = CliRunner().invoke(cli, ["--help"]).output
    assert all(name in output for name in ("pretrain", "finetune", "evaluate", "export"))
