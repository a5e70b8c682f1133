"""Whole comparisons in small: what is measured, what is kept, what is refused."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from manifests.errors import UsageError
from tests.trainer.finetune.small import results, run, write_task
from trainer.export import export_run
from trainer.finetune.command import describe
from trainer.finetune.origin import open_origin
from trainer.tuners.base import TunerConfig, make_tuner
from trainer.tuners.spec import parse

PEFT = ("full", "linear", "last-blocks:1", "lora:2", "block-expansion:1")
ADAPTERS = ("lora:2", "block-expansion:1")


@pytest.fixture(scope="module")
def compared(init, colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    outcome = run(init, out, [colours], PEFT, steps=12, at=(0, 4))
    return out, outcome


def rows(out):
    return {row["tuner"]: row for row in results(out)["tuners"]}


def test_results_hold_what_the_issue_names(compared):
    out, outcome = compared
    assert outcome.state == "finished"
    found = results(out)
    assert [row["tuner"] for row in found["tuners"]] == list(PEFT), "as typed"
    for row in found["tuners"]:
        assert row["mean_accuracy"] == pytest.approx((row["new_accuracy"] + row["source_accuracy_after"]) / 2)
        assert [point["iteration"] for point in row["curve"]] == [0, 4, 12]
        assert row["curve"][-1]["new_accuracy"] == row["new_accuracy"]
        assert row["curve"][-1]["source_accuracy"] == row["source_accuracy_after"]
        assert row["curve"][0]["source_accuracy"] == row["source_accuracy_before"]
    assert found["source"]["queries"] + found["source"]["bank"] == 60
    assert found["tasks"][0]["train"] + found["tasks"][0]["validation"] + found["tasks"][0]["test"] == 90


def test_colours_are_learnt(compared):
    out, _ = compared
    assert rows(out)["full"]["new_accuracy"] > 0.8
    assert rows(out)["full"]["curve"][0]["new_accuracy"] < 0.7, "the head was not trained"


def test_the_frozen_encoder_forgets_nothing(compared):
    row = rows(compared[0])["linear"]
    assert row["source_accuracy_after"] == row["source_accuracy_before"]
    assert row["source_linear_accuracy_after"] == row["source_linear_accuracy_before"]


@pytest.mark.parametrize("tuner", ADAPTERS)
def test_without_its_adapter_the_encoder_is_what_it_was(compared, tuner):
    row = rows(compared[0])[tuner]
    assert row["source_accuracy_adapters_off"] == row["source_accuracy_before"]


def test_parameters_are_counted_by_hand(compared):
    width, hidden, classes = 32, 128, 3
    head = width * classes + classes
    block = 2 * 2 * width + width * 3 * width + 3 * width + width * width + width
    block += width * hidden + hidden + hidden * width + width
    counts = {tuner: row["trainable_parameters"] - head for tuner, row in rows(compared[0]).items()}
    assert counts["linear"] == 0
    assert counts["last-blocks:1"] == block
    assert counts["block-expansion:1"] == block
    assert counts["lora:2"] == 2 * 2 * (2 * width * 2), "q and v of two blocks, rank 2"
    embedding = 3 * 8 * 8 * width + width + width + (16 + 1) * width  # patches, class token, positions
    assert counts["full"] == embedding + 2 * block + 2 * width


@pytest.mark.parametrize("tuner", PEFT)
def test_what_was_saved_gives_the_logits_again(compared, init, colours, tuner):
    """Loaded by hand from the files, it classifies the test images as results.json says."""
    from trainer.data.plain_images import PlainImages
    from trainer.data.tasks import open_task
    from trainer.data.tasks import parse as parse_task
    from trainer.evaluate.features import normalised

    out, _ = compared
    row = rows(out)[tuner]
    folder = out / row["folder"] / "01-colours"
    origin = open_origin(init, None)
    loaded = make_tuner(origin.make()[0], parse(tuner), TunerConfig())
    loaded.load(folder / "adapter", "another")
    head = load_file(folder / "head.safetensors")
    test = open_task(parse_task(colours)).test
    right = 0
    with torch.inference_mode():
        for pixels, labels in PlainImages(test, np.arange(len(test)), size=32):
            features = loaded.model.eval()(normalised(pixels, mean=origin.mean, std=origin.std, device="cpu"))
            right += ((features @ head["weight"].T + head["bias"]).argmax(1) == labels).sum().item()
    assert right / len(test) == pytest.approx(row["new_accuracy"])
    assert not (folder / "checkpoints").exists(), "restart points of what is finished are of no use"


@pytest.mark.parametrize("tuner", ["full", "lora:2", "block-expansion:1"])
def test_the_adapted_encoder_is_a_plain_timm_model(compared, tuner):
    out, _ = compared
    plain = timm.create_model(f"local-dir:{out / rows(out)[tuner]['folder']}/encoder", pretrained=True).eval()
    assert len(plain.blocks) == (3 if tuner == "block-expansion:1" else 2)


def test_what_has_no_encoder_says_where_there_is_one(compared, init, tmp_path):
    out, _ = compared
    said = f"linear, which leaves the encoder as it was: it is that of {init}: `trainer export {init}`"
    with pytest.raises(UsageError, match=re.escape(said)):
        export_run(out / rows(out)["linear"]["folder"], tmp_path / "out", "timm")
    with pytest.raises(
        UsageError, match=r"is a comparison of tuners: .* such as `trainer export .*/block-expansion-1-lr"
    ):
        export_run(out, tmp_path / "out", "timm")
    export_run(out / rows(out)["full"]["folder"], tmp_path / "out", "timm")


def test_the_picture_is_drawn(compared):
    out, _ = compared
    [path] = results(out)["pictures"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50, "not one colour"


def test_a_finished_comparison_says_so_and_another_is_refused(compared, init, colours):
    out, first = compared
    again = run(init, out, [colours], PEFT, steps=12, at=(0, 4))
    assert again.state == "already finished"
    assert again.text().splitlines()[1:] == first.text().splitlines()[1:]
    with pytest.raises(UsageError, match=r"peft: .* there, .* now"):
        run(init, out, [colours], ("linear",), steps=12, at=(0, 4))


@pytest.fixture(scope="module", params=["shared", "per-task"])
def sequence(request, init, colours, more_colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("sequence") / "out"
    peft = ("full", "block-expansion:1", "lora:2")
    run(init, out, [colours, more_colours], peft, steps=10, adapters=request.param)
    return request.param, rows(out), out


def test_a_sequence_fills_the_accuracy_matrix(sequence):
    _, found, out = sequence
    for row in found.values():
        first, last = row["accuracy_matrix"]
        assert (len(first), len(last)) == (1, 2)
        assert row["new_accuracy"] == row["average_accuracy"] == pytest.approx(sum(last) / 2)
        assert row["backward_transfer"] == pytest.approx(last[0] - first[0])
        assert list(row["forgetting"]) == ["colours"]
        assert {point["task"] for point in row["curve"]} == {0, 1}
        assert (out / row["folder"] / "02-two" / "adapter").is_dir()
        validation = json.loads((out / row["folder"] / "02-two" / "results.json").read_text())["validation_accuracies"]
        assert len(validation) == 2, "a rate that forgets the first task is not the best one"
        assert row["validation_accuracy"] == pytest.approx(sum(validation) / 2)


def test_adapters_of_their_own_keep_earlier_tasks(sequence):
    kind, found, _ = sequence
    if kind == "per-task":
        for tuner in ADAPTERS:
            first, last = found[tuner]["accuracy_matrix"]
            assert last[0] == first[0], "the first task's adapter was not touched"
            assert found[tuner]["curve"][3]["source_accuracy"] == found[tuner]["source_accuracy_before"], "begins anew"
    points = found["full"]["curve"]
    assert points[3]["source_accuracy"] == points[2]["source_accuracy"], "full fine-tuning goes on with one network"


def test_a_sweep_chooses_on_the_validation_part(init, colours, tmp_path):
    grid = ["rates.grid.default=[0.0001, 0.05]", "rates.grid.linear=[0.0001, 0.3]"]
    run(init, tmp_path / "out", [colours], ("full", "linear"), steps=8, seeds=2, sweep="lr", settings=grid)
    found = results(tmp_path / "out")
    tried = {(one["tuner"], one["learning_rate"]): one["validation_accuracy"] for one in found["sweep"]}
    assert len(tried) == 4
    best = max((rate for tuner, rate in tried if tuner == "linear"), key=lambda rate: tried["linear", rate])
    linear = [row for row in found["tuners"] if row["tuner"] == "linear"]
    assert [(row["learning_rate"], row["seed"]) for row in linear] == [(best, 0), (best, 1)]
    assert {row["learning_rate"] for row in found["tuners"] if row["tuner"] == "full"} == {0.0001, 0.05}
    assert all(group["seeds"] == 2 for group in found["summary"])


def test_a_diverging_leg_does_not_stop_the_others(init, colours, tmp_path):
    wild = ["optim.name=sgd", "rates.learning_rates.full=[1e30]"]
    outcome = run(init, tmp_path / "out", [colours], ("full", "linear"), settings=wild)
    assert outcome.state == "diverged"
    states = {row["tuner"]: row["state"] for row in results(tmp_path / "out")["tuners"]}
    assert states == {"full": "diverged", "linear": "finished"}
    assert "full at 1e+30, seed 0, diverged: " in outcome.text()
    again = run(init, tmp_path / "out", [colours], ("full", "linear"), settings=wild)
    assert again.state == "diverged", "and so does the second call"


def test_without_a_source_only_the_gain_is_measured(init, colours, tmp_path):
    run(init, tmp_path / "out", [colours], source="none")
    found = results(tmp_path / "out")
    assert found["source"] is None
    assert found["pictures"] == []
    assert found["tuners"][0]["source_accuracy_after"] is None
    assert found["tuners"][0]["new_accuracy"] > 0


def test_a_folder_is_a_source_too(init, colours, more_colours, tmp_path):
    run(init, tmp_path / "out", [colours], source=more_colours)
    source = results(tmp_path / "out")["source"]
    assert source["location"] == more_colours
    assert 0 < source["queries"] < source["bank"] < 60


def test_a_dry_run_says_what_would_be_and_makes_nothing(init, colours, tmp_path):
    from tests.trainer.finetune.small import request

    facts = describe(request(init, tmp_path / "out", [colours], PEFT, seeds=2))
    assert len(facts["runs"]) == 2 * len(PEFT)
    assert "lora-2-lr0.02-seed1" in facts["text"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"peft": ("lorra:4",)}, "did you mean 'lora'"),
        ({"peft": ("linear:3",)}, "takes no size"),
        ({"peft": ("linear", "block-expansion:9")}, "--peft block-expansion:9: "),
        ({"settings": ["optim.lr=1"]}, "--set rates.learning_rates.default=[1e-3]"),
        ({"run": {"batch_size": 5000}}, "--batch-size 5000 is more than"),
        ({"source": "nowhere"}, "--source nowhere: "),
        ({"encoder": {"name": "resnet18"}}, "leave out encoder.name"),
        ({"settings": ["encoder.args.depth=3"]}, "would leave trained weights without use"),
        ({"settings": ["encoder.args.pool=avg"]}, "takes no argument 'pool'"),
        ({"settings": ["images.augment=simcl"]}, "did you mean 'simclr'"),
        ({"settings": ["recipe=digits"]}, "by --recipe"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(init, colours, tmp_path, how, message):
    with pytest.raises(UsageError) as caught:
        run(init, tmp_path / "out", [colours], **how)
    assert message in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_default_tuners_that_do_not_fit_are_left_out(tmp_path, colours):
    from trainer.finetune.settle import Request
    from trainer.nn.encoders import EncoderConfig, make_encoder

    torch.save(make_encoder(EncoderConfig(name="resnet18_cifar"), 32).state_dict(), tmp_path / "weights.pth")
    flags = {"init": str(tmp_path / "weights.pth"), "encoder": {"name": "resnet18_cifar"}, "tasks": (colours,)}
    facts = describe(Request(recipe="digits", flags={**flags, "source": "none"}))
    assert {leg.split("-")[0] for leg in facts["runs"]} == {"full", "linear"}
    assert "left out: --peft block-expansion: " in facts["text"]
    with pytest.raises(UsageError, match="lora:2"):
        describe(Request(recipe="digits", flags={**flags, "source": "none", "peft": ("linear", "lora:2")}))


def test_encoders_of_other_data_have_no_default_task(init, tmp_path):
    from trainer.finetune.command import finetune
    from trainer.finetune.settle import Request

    with pytest.raises(UsageError, match="--task PATH"):
        finetune(Request(flags={"init": init}, out=str(tmp_path / "out")))


def test_damaged_images_are_skipped_and_named(init, tmp_path):
    task = write_task(tmp_path / "task", 60)
    (tmp_path / "task" / "red" / "torn.png").write_bytes((tmp_path / "task" / "red" / "000.png").read_bytes()[:60])
    (tmp_path / "task" / "red" / "text.jpg").write_text("no picture")
    run(init, tmp_path / "out", [task])
    skipped = results(tmp_path / "out")["tasks"][0]["skipped"]
    assert len(skipped) == 2
    assert all(any(name in one for one in skipped) for name in ("torn", "text"))


MAE = ["encoder.args={global_pool: token, drop_path_rate: 0.2}", "optim.layer_decay=0.65", "rates.warmup_epochs=0.2"]
MAE += ["images.mixup=0.8", "images.cutmix=1", "images.label_smoothing=0.1", "images.random_erasing=0.25"]
MAE += ["images.rand_augment=rand-m9-mstd0.5-inc1"]


def test_maes_regularisers_and_pooling(init, colours, tmp_path):
    out = tmp_path / "out"
    run(init, out, [colours], ("full", "last-blocks:1", "lora:2"), steps=6, settings=MAE)
    plain = timm.create_model(f"local-dir:{out / rows(out)['full']['folder']}/encoder", pretrained=True)
    assert plain.global_pool == "token", "the run's encoder has its average"
    assert not any(getattr(module, "drop_prob", 0) for module in plain.modules()), "of the training, not the network"
    assert rows(out)["full"]["new_accuracy"] > 0.5
    found = results(out)
    assert found["tuners"][0]["source_accuracy_before"] == found["source"]["source_accuracy"]
    lines = (out / rows(out)["full"]["folder"] / "01-colours" / "metrics.jsonl").read_text().splitlines()
    assert {"loss", "train_accuracy"} <= json.loads(lines[1]).keys()
    assert run(init, out, [colours], ("full", "last-blocks:1", "lora:2"), settings=MAE).state == "already finished"


def test_training_views_alone_get_rand_augment(init, colours, tmp_path):
    measured = []
    for text in ("null", "rand-m9-inc1-p1", "rand-m9-inc1-p0"):
        out = tmp_path / text
        run(init, out, [colours], steps=1, at=(0,), settings=[f"images.rand_augment={text}"])
        [metrics] = out.glob("*/01-colours/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        measured.append((results(out)["tuners"][0]["curve"][0]["new_accuracy"], losses))
    off, on, never = measured
    assert off == never
    assert off[0] == on[0], "before the first step the same head sees the same test images"
    assert off[1] != on[1]


def test_runs_lists_comparisons(compared):
    from trainer.runs import list_runs, runs_text

    out, _ = compared
    [found] = list_runs(out)
    assert (found.state, found.method, found.step, found.total) == ("finished", "finetune", 12, 12)
    best = max(results(out)["tuners"], key=lambda row: row["mean_accuracy"])
    assert (found.new_accuracy, found.knn) == (best["new_accuracy"], best["source_accuracy_after"])
    assert f"finetune  -    {found.tuner}" in runs_text([found])
    assert json.loads((out / "environment.json").read_text())["libraries"]["torch"]
