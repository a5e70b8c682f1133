"""What may be said on the command line and in a configuration file, and how wrong things are refused."""

import json

import pytest


@pytest.fixture
def dry_run(pipeline, tiny_model, photos, tmp_path):
    """`pipeline generate --dry-run --json` with a configuration file of the given text."""

    def call(text, *flags):
        config = tmp_path / "run.yaml"
        config.write_text(f"source: {photos}\nmodel: {tiny_model}\n{text}\n")
        return pipeline("generate", "--config", config, "--out", tmp_path / "set", "--dry-run", "--json", *flags)

    return call


def test_a_file_takes_every_option_by_its_name_on_the_command_line(dry_run):
    code, out, err = dry_run("generator: sd-variations\nsafety: off\nguidance_scale: 3\nlimit: null\nshards: 3")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["shards"], facts["generator"]["guidance_scale"], facts["generator"]["safety"]) == (3, 3.0, "off")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("shards: [1, 2]", "[1, 2]"),
        ("shards: {a: 1}", "shards"),
        ("shards: 2.7", "2.7"),
        ("shards: true", "True"),
        ("source: [a]", "['a']"),
        ("safety: on", "'on'"),
        ("sharts: 3", "did you mean 'shards'"),
        ("config: again.yaml", "unknown option 'config'"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(dry_run, line, named):
    code, _, err = dry_run(line)
    assert code == 2
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--max-failures", "abc"], "abc"),
        (["generate", "--max-failures", "inf%"], "inf%"),
        (["generate", "--source", ""], "empty"),
        (["generate", "--source", "~nobody/photos"], "~nobody"),
        (["generate", "--model", "~nobody/model"], "~nobody"),
        (["generate", "--batch-size", "²"], "²"),
        (["generate", "--count", "9", "--limit", "3"], "--limit"),
        (["pack", "--real", "x", "--synthetic", "y", "--store-real", "tiny"], "tiny"),
        (["plan", "--for-workers", "8,0"], "8,0"),
        (["plan", "--rate", "-1"], "--rate"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(pipeline, tmp_path, arguments, named):
    code, _, err = pipeline(*arguments, "--out", tmp_path / "set")
    assert code == 2
    assert named in err
    assert not (tmp_path / "set").exists()


def test_a_path_that_the_system_refuses_is_an_error_without_traceback(pipeline, tmp_path):
    code, _, err = pipeline("generate", "--source", "/" + "a" * 5000, "--out", tmp_path / "set")
    assert code == 1
    assert "name too long" in err
