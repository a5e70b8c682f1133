"""The command line as a user meets it: help at once, clear words, exit codes."""

import json
import subprocess
import sys

import click
import pytest

from pipeline.cli import cli, run

HEAVY = ("torch", "pyarrow", "diffusers", "numpy", "PIL")
LIGHT = f"import sys, pipeline.cli, trainer.cli; print([name for name in {HEAVY} if name in sys.modules])"


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help_that_teaches(command, pipeline):
    code, out, _ = pipeline(command, "--help")
    assert code == 0
    assert len(out.splitlines()) > 6
    options = [option for option in cli.commands[command].params if isinstance(option, click.Option)]
    undocumented = [option.name for option in options if option.help is None]
    assert not undocumented


def test_commands_of_the_design_are_there():
    expected = {"generate", "pack", "plan", "status", "verify", "repair", "reproduce", "sheet", "bench"}
    assert expected <= set(cli.commands)


@pytest.mark.parametrize("command", ["status", "verify", "repair", "sheet"])
def test_a_folder_without_a_set_is_a_clear_error(command, pipeline, tmp_path):
    code, _, err = pipeline(command, tmp_path)
    assert code in (1, 2)
    assert "plan.json" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"schema_version": 99}', "[1]", '{"schema_version": 1}'])
@pytest.mark.parametrize("command", ["status", "verify", "generate"])
def test_a_broken_plan_is_a_clear_error(command, text, pipeline, tmp_path, photos, tiny_model):
    (tmp_path / "plan.json").write_text(text)
    flags = ["--out", tmp_path, "--source", photos, "--model", tiny_model] if command == "generate" else [tmp_path]
    code, _, err = pipeline(command, *flags)
    assert code in (1, 3)
    assert "plan.json" in err
    assert "Traceback" not in err
    if "99" in text:
        assert "newer diffmix" in err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match=r"plan\.json"):
        run(["--debug", "status", str(tmp_path)])


def test_json_is_one_object_on_stdout(generate, tmp_path):
    code, out, _ = generate(tmp_path / "set", "--json", "--limit", "4", "--shards", "2")
    assert code == 0
    assert json.loads(out)["rows_ok"] == 4
