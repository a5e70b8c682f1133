import math

import pytest

from trainer.finetune import picture, results
from trainer.tuners.spec import parse


def row(tuner="full", rate=0.1, seed=0, new=0.8, kept=0.6, validation=0.7, state="finished"):
    return {
        "tuner": tuner,
        "seed": seed,
        "learning_rate": rate,
        "state": state,
        "reason": "the loss of step 3 is not finite",
        "trainable_parameters": 1234,
        "new_accuracy": new,
        "validation_accuracy": validation,
        "source_accuracy_before": 0.9,
        "source_accuracy_after": kept,
        "source_linear_accuracy_after": 0.55,
        "mean_accuracy": (new + kept) / 2,
        "backward_transfer": None,
        "forgetting": {},
    }


def test_summary_of_three_seeds_by_hand():
    [group] = results.summarise([row(seed=seed, new=new) for seed, new in enumerate((0.6, 0.7, 0.8))])
    assert (group["tuner"], group["learning_rate"], group["seeds"]) == ("full", 0.1, 3)
    assert group["new_accuracy"]["mean"] == pytest.approx(0.7)
    assert group["new_accuracy"]["std"] == pytest.approx(0.1)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # the 97.5 % point of Student's t with 2 degrees of freedom
    assert group["new_accuracy"]["interval"] == pytest.approx([0.7 - half, 0.7 + half])
    assert group["source_accuracy_after"]["std"] == pytest.approx(0)


def test_intervals_stay_within_what_accuracies_can_be():
    [group] = results.summarise([row(seed=0, new=0.9, kept=0.0), row(seed=1, new=1.0, kept=0.1)])
    half = 12.706204736432095 * 0.1 / 2  # the 97.5 % point of Student's t with 1 degree of freedom, std 0.1 / sqrt(2)
    assert group["new_accuracy"]["interval"] == pytest.approx([0.95 - half, 1])
    assert group["source_accuracy_after"]["interval"] == pytest.approx([0, 0.05 + half])


def test_bars_of_the_picture_end_at_0_and_100():
    assert picture._bars({"mean": 0.95, "std": 0.1}) == [[pytest.approx(10)], [pytest.approx(5)]]
    assert picture._bars({"mean": 0.04, "std": 0.1}) == [[pytest.approx(4)], [pytest.approx(10)]]
    assert picture._bars({"mean": 0.5, "std": None}) is None


def test_one_seed_has_no_spread_and_diverged_legs_no_row():
    groups = results.summarise([row(), row("lora:8", state="diverged")])
    assert [group["tuner"] for group in groups] == ["full"]
    assert groups[0]["new_accuracy"] == {"mean": 0.8, "std": None, "interval": None}


def test_the_rate_is_chosen_on_the_validation_part():
    tried = [row(rate=rate, validation=validation, new=new) for rate, validation, new in
             ((0.01, 0.5, 0.9), (0.05, 0.8, 0.1), (0.5, 0.8, 0.95))]  # fmt: skip
    assert results.chosen_rates(parse("linear"), [{**one, "tuner": "linear"} for one in tried]) == [0.05]
    assert results.chosen_rates(parse("full"), tried) == [0.05, 0.01], "full shows a second one"


def test_the_second_rate_of_full_is_the_next_one_where_the_lowest_wins():
    tried = [row(rate=rate, validation=1 - rate) for rate in (0.01, 0.05, 0.5)]
    assert results.chosen_rates(parse("full"), tried) == [0.01, 0.05]


def test_rates_that_diverged_are_not_chosen():
    tried = [row("lora:8", rate=0.01, validation=0.2), row("lora:8", rate=0.5, state="diverged")]
    assert results.chosen_rates(parse("lora:8"), tried) == [0.01]
    assert results.chosen_rates(parse("lora:8"), [row("lora:8", rate=0.5, state="diverged")]) == [0.5]


def found(rows, **more):
    return {
        "encoder": "vit",
        "init": "runs/a",
        "tuners": rows,
        "summary": results.summarise(rows),
        "source": {"location": "data/pairs", "queries": 100, "source_accuracy": 0.9, "note": "queries: some images"},
        "tasks": [{"name": "photos", "test": 50, "classes": ["a", "b", "c", "d"]}],
        "pretraining": {},
        **more,
    }


def test_the_table_is_aligned_and_says_what_was_lost():
    text = results.text(found([row(), row("block-expansion:2", new=0.75, kept=0.88)]))
    table = [line for line in text.splitlines() if line.startswith(("tuner", "full", "block"))]
    assert table[1].split() == ["full", "0.1", "1,234", "80.0", "60.0", "-30.0", "55.0", "70.0"]
    assert table[2].split() == ["block-expansion:2", "0.1", "1,234", "75.0", "88.0", "-2.0", "55.0", "81.5"]
    assert len({len(line) for line in table}) == 1
    assert "50 images (one is 2 points; chance 25.0%)" in text


def test_diverged_legs_are_told():
    assert "full at 0.1, seed 0, diverged: the loss of step 3" in results.text(found([row(state="diverged")]))


def test_no_source_no_change():
    rows = [{**row(), "source_accuracy_after": None, "mean_accuracy": None, "source_linear_accuracy_after": None}]
    line = next(line for line in results.text(found(rows, source=None)).splitlines() if line.startswith("full"))
    assert line.split() == ["full", "0.1", "1,234", "80.0", "-", "-", "-", "-"]


def test_the_way_of_the_encoder_is_told_beside_raw_pixels():
    final = {"knn": 0.95, "pixels_knn": 0.97, "knn_shift-rotate": 0.8, "pixels_knn_shift-rotate": 0.7}
    run = {"method": "simclr", "mix": "diffmix", "steps": 5, "knn_before": 0.4, "final": final}
    text = results.text(found([row()], pretraining=run))
    assert "its own kNN, of a tenth of the pairs: 40.0% -> 95.0% (raw pixels 97.0%)" in text
    assert "source: 100 images seen" in text and "data/pairs; queries: some images" in text
    assert "under shift and rotation 80.0% (raw pixels 70.0%)" in text
