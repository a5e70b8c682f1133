"""The README and the data card are run: their commands parse, their snippets load a real set."""

import contextlib
import io
import json
import re
import shlex
import sys
import types
from pathlib import Path

import click
import pytest

import pipeline.cli
import trainer.cli
from pipeline.cli import run
from trainer import methods, tuners
from trainer.compare.arms import differing, open_arms
from trainer.compare.settings import Request, resolve

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOADING = [snippet for snippet in SNIPPETS if "data/pairs" in snippet]
(ENCODER,) = [snippet for snippet in SNIPPETS if "local-dir:" in snippet]
(EXPANSION,) = [snippet for snippet in SNIPPETS if "BlockExpansionConfig" in snippet]
(TUNER,) = [snippet for snippet in SNIPPETS if "class Norms" in snippet]
(METHOD,) = [snippet for snippet in SNIPPETS if "class Invariance" in snippet]
ARMS, RECIPE = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(?: {4}|exec |srun |`)?(?:torchrun .*? -m )?((?:pipeline|trainer) (?:[a-z]+)(?: .*?)?)(?:\s{2,}#.*)?$",
    README.replace("\\\n", " "),  # commands that go on in the next line
    re.MULTILINE,
)
SMALL = ("--max-steps", "2", "--batch-size", "4", "--set", "evaluation.final=false")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder in which `data/pairs` is a set of real digits, made by the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        assert run(["generate", "--limit", "12", "--shards", "2", "--steps", "2", "--batch-size", "6"]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    program, name, *words = shlex.split(command)
    cli = {"pipeline": pipeline.cli.cli, "trainer": trainer.cli.cli}[program]
    with contextlib.suppress(click.exceptions.Exit):
        cli.commands[name].make_context(name, words)


def test_there_are_commands_and_snippets():
    assert len(COMMANDS) >= 14
    assert {command.split()[0] for command in COMMANDS} == {"pipeline", "trainer"}
    assert len(LOADING) == 3
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize("snippet", LOADING, ids=["webdataset", "datasets", "duckdb"])
def test_every_snippet_loads_the_set(snippet, pairs, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(pairs / "cache"))
    out = io.StringIO()
    with contextlib.chdir(pairs), contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    text = out.getvalue()
    assert "(32, 32)" in text or "JpegImageFile" in text or "similarity" in text


def test_datasets_sees_each_sample_once_with_all_members(pairs, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(pairs / "data/pairs"), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 12
    assert {"real.jpg", "syn0.jpg", "json", "cls"} <= set(loaded.column_names)
    assert len({row["key"] for row in loaded["json"]}) == 12


def test_the_arms_are_a_comparison(pairs):
    with contextlib.chdir(pairs):
        Path("arms.yaml").write_text(ARMS)
        request = Request(recipe="arms.yaml", arm_flags={"run": {"batch_size": 4}})
        _, arms = open_arms(resolve(request), request)
    assert [arm.name for arm in arms] == ["real", "pairs", "weighted"]
    assert differing(arms)["mix.weight"] == [None, None, "similarity"]


def test_webdataset_reads_every_sample(pairs):
    import webdataset

    urls = [str(path) for path in sorted((pairs / "data/pairs").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 12
    assert all({"real.jpg", "syn0.jpg", "json", "cls"} <= set(sample) for sample in samples)


def test_the_card_holds_counts_generator_and_a_picture(pairs):
    card = (pairs / "data/pairs/README.md").read_text()
    assert card.startswith("---\nconfigs:\n- config_name: pairs\n  default: true\n  data_files: pairs-*.tar\n")
    assert "12 ok, 0 failed" in card
    assert "data:image/jpeg;base64," in card
    assert '"steps": 2' in card


def test_plain_timm_loads_the_encoder_of_a_run(pairs):
    out = io.StringIO()
    with contextlib.chdir(pairs), contextlib.redirect_stdout(out):
        assert trainer.cli.run(["pretrain", "--out", "runs/cifar-diffmix", *SMALL]) == 0
        exec(compile(ENCODER, "README.md", "exec"), {})
    assert out.getvalue().endswith("64\n")


def test_a_method_is_one_file_one_line_and_one_recipe(pairs, monkeypatch):
    module = types.ModuleType("trainer.methods.invariance")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(METHOD, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(methods.METHODS, "invariance", "trainer.methods.invariance:Invariance")
    (pairs / "invariance-digits.yaml").write_text(RECIPE)
    with contextlib.chdir(pairs):
        small = ("--batch-size", "8", "--set", "run.log_every=1", "--epochs", "20")
        code = trainer.cli.run(["pretrain", "--recipe", "invariance-digits.yaml", "--out", "runs/invariance", *small])
        lines = [json.loads(line) for line in Path("runs/invariance/metrics.jsonl").read_text().splitlines()]
    spreads = [line["feature_std"] for line in lines if "loss" in line]
    assert code == 0
    assert spreads[-1] < spreads[0] / 3


def test_block_expansion_from_plain_peft_code(tmp_path):
    out, made = io.StringIO(), {}
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(out):
        exec(compile(EXPANSION, "README.md", "exec"), made)
    assert "trainable params" in out.getvalue()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert made["again"].active_adapter == "flowers"


def test_a_tuner_is_one_file_and_one_line(pairs, monkeypatch):
    module = types.ModuleType("trainer.tuners.norms")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(TUNER, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(tuners.TUNERS, "norms", "trainer.tuners.norms:Norms")
    with contextlib.chdir(pairs):
        assert trainer.cli.run(["pretrain", "--out", "runs/first", *SMALL]) == 0
        given = ["--peft", "norms", "--max-steps", "4", "--batch-size", "16", "--out", "runs/norms"]
        assert trainer.cli.run(["finetune", "--init", "runs/first", *given]) == 0
        [row] = json.loads(Path("runs/norms/results.json").read_text())["tuners"]
    head = 64 * 10 + 10
    assert row["trainable_parameters"] - head == 2 * 64 * (2 * 6 + 1), "two norms in six blocks, and the last"
