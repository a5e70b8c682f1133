"""From what was typed to settings: flags > --set > recipe > defaults, the recipe by the set, the batch by its size."""

import pytest

from manifests.errors import DiffmixError, UsageError
from tests.trainer.data.builders import write_pairs
from trainer.settle import Request, settle


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 20)


def settled(data, *assignments, **how):
    flags = {"data": {"url": data}, **how.pop("flags", {})}
    return settle(Request(flags=flags, assignments=assignments, **how))


def test_flags_win_over_set_over_recipe(data, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: {name: simclr}\nencoder: {name: resnet18}\nrun: {seed: 1, epochs: 2, log_every: 3}\n")
    found = settled(data, "run.seed=4", "run.epochs=5", flags={"run": {"seed": 6}}, recipe=str(recipe)).config
    assert (found.run.seed, found.run.epochs, found.run.log_every, found.run.accumulation) == (6, 5, 3, 1)
    assert found.recipe == str(recipe)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "simclr-cifar10"),
        ({"method": "dino"}, "dino-cifar10"),
        ({"assignments": ["method.name=barlow-twins"]}, "barlow-twins-cifar10"),
        ({"assignments": ["method=dino"]}, "dino-cifar10"),
    ],
)
def test_the_recipe_follows_method_and_images(data, how, name):
    found = settle(Request(flags={"data": {"url": data}}, **how))
    assert found.config.recipe == name
    assert found.config.method.name == name.removesuffix("-cifar10")
    assert any(f"recipe {name} (by the method and the set's images" in note for note in found.notes)


def test_a_set_without_real_images_is_judged_by_the_others(tmp_path):
    url = write_pairs(tmp_path / "set", 4, real=False)
    assert (
        settle(Request(flags={"data": {"url": url}, "mix": {"policy": "synthetic"}})).config.recipe == "simclr-cifar10"
    )


def test_another_encoder_does_not_take_the_arguments_of_the_recipes(data):
    other = settled(data, recipe="simclr-digits", flags={"encoder": {"name": "resnet18"}}).config
    assert (other.encoder.name, dict(other.encoder.args)) == ("resnet18", {})
    own = settled(data, "encoder.args.depth=2", recipe="simclr-digits").config
    assert (own.encoder.args["depth"], own.encoder.args["patch_size"]) == (2, 8)


def test_a_saved_configuration_is_a_recipe(data, tmp_path):
    first = settled(data, "optim.lr=0.25", recipe="dino-digits").config
    path = tmp_path / "config.yaml"
    path.write_text(first.to_yaml())
    second = settle(Request(recipe=str(path))).config
    assert second.optim == first.optim
    assert second.method == first.method
    assert second.recipe == str(path)


@pytest.mark.parametrize("how", [{"method": "dino"}, {"assignments": ["method=dino"]}])
def test_method_and_recipe_must_agree(data, how):
    with pytest.raises(UsageError, match="--method dino and --recipe simclr-digits, which is of simclr"):
        settle(Request(flags={"data": {"url": data}}, recipe="simclr-digits", **how))


def test_a_recipe_is_not_set(data):
    with pytest.raises(UsageError, match="a recipe is chosen by --recipe"):
        settled(data, "recipe=dino-digits")


def test_an_unknown_method_is_refused(data):
    with pytest.raises(UsageError, match="method 'simsiam' is not known; choose one of simclr, barlow-twins, dino"):
        settled(data, "method.name=simsiam")


def test_errors_name_recipe_and_key(data):
    with pytest.raises(UsageError, match=r"recipe simclr-digits with your settings: unknown key 'run.epoch'"):
        settled(data, "run.epoch=3", recipe="simclr-digits")


@pytest.mark.parametrize("assignment", ["data=3", "run=3", "run=null"])
def test_sections_that_are_none(data, assignment):
    with pytest.raises(UsageError, match="it is a section with keys"):
        settle(Request(assignments=[assignment], recipe="simclr-digits"))


def test_no_set_says_which(tmp_path):
    for recipe in (None, "simclr-digits"):
        with pytest.raises(DiffmixError, match="nowhere"):
            settle(Request(flags={"data": {"url": str(tmp_path / "nowhere")}}, recipe=recipe))


def test_a_set_without_usable_rows_says_so(tmp_path):
    url = write_pairs(tmp_path / "set", 3, failed=range(3))
    with pytest.raises(DiffmixError, match="no usable row"):
        settle(Request(flags={"data": {"url": url}}))


@pytest.mark.parametrize(
    ("rows", "accumulation", "lowered"), [(20, 1, 16), (20, 2, 16), (20, 3, 18), (7, 1, 7), (7, 2, 6), (7, 8, 7)]
)
def test_the_recipes_batch_is_lowered_to_what_can_be_cut(tmp_path, rows, accumulation, lowered):
    url = write_pairs(tmp_path / "set", rows)
    found = settled(url, f"run.accumulation={accumulation}", recipe="simclr-digits")
    assert found.config.run.batch_size == lowered
    assert any(
        f"batch size 128 of the recipe lowered to {lowered}: the set has {rows} usable" in one for one in found.notes
    )


def test_a_batch_that_was_asked_for_is_not_lowered(data):
    for how in ({"flags": {"run": {"batch_size": 64}}}, {"assignments": ["run.batch_size=64"]}):
        how = {"flags": {}, "assignments": (), **how}
        with pytest.raises(UsageError, match="--batch-size 64 is more than the 20 usable samples"):
            settled(data, *how["assignments"], flags=how["flags"], recipe="simclr-digits")


def test_filters_count(data):
    found = settled(data, flags={"data": {"url": data, "filter": ["label == 1"]}}, recipe="simclr-digits")
    assert len(found.rows) == 7
    assert found.config.run.batch_size == 7


def test_a_single_sample_is_no_batch(data):
    with pytest.raises(UsageError, match="at least 2 images and there is 1 usable sample"):
        settled(data, flags={"data": {"url": data, "filter": ["key == k3"]}}, recipe="simclr-digits")
