"""The command line `trainer`: light, complete help, errors without traceback."""

import json

import pytest

from trainer.cli import cli, run
from trainer.data.mixing import POLICIES
from trainer.options import POLICIES as OFFERED


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help(name, capsys):
    assert run([name, "--help"]) == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_commands_of_later_issues_say_so(name, capsys):
    assert run([name, "--whatever"]) == 1
    assert "not built yet" in capsys.readouterr().err


def test_the_policies_offered_are_those_that_exist():
    assert set(OFFERED) == set(POLICIES)


def test_pretrain_without_a_pair_set_says_what_to_do(tmp_path, capsys):
    assert run(["pretrain", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "pipeline generate" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "dinno"], "'dino'"),
        (["--recipe", "simclr-cifar"], "simclr-cifar10"),
        (["--set", "optim.lrr=1"], "optim.lr"),
        (["--recipe", "dino-digits", "--method", "simclr"], "dino"),
    ],
)
def test_wrong_options_name_what_was_meant(arguments, said, capsys, tmp_path):
    assert run(["pretrain", "--recipe", "simclr-digits", "--data", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_runs_of_an_empty_folder(tmp_path, capsys):
    assert run(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_export_of_something_that_is_no_run(tmp_path, capsys):
    assert run(["export", str(tmp_path), "--out", str(tmp_path / "out")]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
