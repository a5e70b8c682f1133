"""From what was typed to settings: flags, --set > recipe > defaults, the recipe by the set, the batch by its size."""

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


def test_flags_and_set_win_over_recipe(data, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: {name: simclr}\nencoder: {name: resnet18}\nrun: {seed: 1, epochs: 2, log_every: 3}\n")
    found = settled(data, "run.epochs=5", flags={"run": {"seed": 6}}, recipe=str(recipe)).config
    assert (found.run.seed, found.run.epochs, found.run.log_every, found.run.accumulation) == (6, 5, 3, 1)
    assert found.recipe == str(recipe)


@pytest.mark.parametrize(
    ("setting", "how", "said"),
    [
        ("run.seed=4", {"flags": {"run": {"seed": 6}}}, "--set run.seed=4 and --seed 6 disagree: give one of them"),
        ("run.max_steps=null", {"flags": {"run": {"max_steps": 6}}}, "--set run.max_steps=None and --max-steps 6"),
        ("run=4", {"flags": {"run": {"seed": 6}}}, "--set run.epochs=4|--set run.seed=4 and --seed 6"),
        ("data.filter=[label == 1]", {"flags": {"data": {"filter": ("label == 2",)}}}, "and --filter label == 2"),
        ("mix.policy=real", {"flags": {"mix": {"policy": "union"}}}, "--set mix.policy=real and --mix union"),
        ("method.name=dino", {"method": "simclr"}, "--set method.name=dino and --method simclr disagree"),
        ("method=dino", {"method": "simclr"}, "--set method.name=dino and --method simclr disagree"),
    ],
)
def test_a_setting_and_its_flag_must_agree(data, setting, how, said):
    with pytest.raises(UsageError, match=said):
        settle(Request(assignments=[setting], **how))


def test_a_setting_and_its_flag_may_be_equal(data):
    flags = {"run": {"seed": 6, "epochs": 5.0}, "mix": {"policy": "real"}}
    found = settled(data, "run.seed=6", "run.epochs=5", "mix.policy=real", "method=dino", method="dino", flags=flags)
    assert (found.config.run.seed, found.config.method.name) == (6, "dino")


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (
            {"replicas": 5},
            "mix.replicas has no effect with --mix diffmix: it is read by inflate, and diffmix reads weight",
        ),
        (
            {"policy": "real", "probability": 0.5},
            "mix.probability has no effect with --mix real: .* by diffmix, and real",
        ),
        ({"policy": "union", "first": "real"}, "mix.first has no effect with --mix union: it is read by sequential"),
        ({"weight_power": 2}, "mix.weight_power is read with mix.weight only: leave it out, or add"),
        ({"policy": "real", "variation": 0}, "mix.variation is read with mix.weight only"),
    ],
)
def test_settings_of_another_policy_are_refused(data, mix, said):
    with pytest.raises(UsageError, match=said):
        settled(data, *(f"mix.{name}={value}" for name, value in mix.items()), recipe="simclr-digits")


def test_settings_of_a_recipe_for_another_policy_stay(data):
    found = settled(data, recipe="simclr-adainf-cifar10", flags={"mix": {"policy": "diffmix"}}).config
    assert (found.mix.policy, found.mix.replicas) == ("diffmix", 10)
    weighted = settled(data, "mix.policy=real", "mix.weight=similarity", "mix.weight_power=2", "mix.variation=0")
    assert weighted.config.mix.weight_power == 2


@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        (
            "simclr-digits",
            "mix.synthetic_local_crops=1",
            "mix.synthetic_local_crops changes nothing: simclr takes no small",
        ),
        ("simclr-digits", "views.local_size=16", "views.local_size changes nothing: simclr takes no small crops"),
        (
            "mae-digits",
            "mix.synthetic_view=first",
            "mix.synthetic_view changes nothing: mae takes one view of an image",
        ),
        ("simclr-digits", "optim.trust=0.1", "optim.trust changes nothing: it is of lars, and optim.name is adamw"),
        ("barlow-twins-cifar10", "optim.trust=0.1", None),
        ("dino-cifar10", "mix.synthetic_local_crops=1", None),
        ("simclr-digits", "mix.synthetic_view=first", None),
    ],
)
def test_what_the_method_does_not_read_is_noted(data, recipe, setting, said):
    notes = settled(data, setting, recipe=recipe, flags={"mix": {"policy": "diffmix"}}).notes
    assert any(said in note for note in notes) if said else not any("changes nothing" in note for note in notes)


def test_typed_epochs_are_not_overruled_by_steps_of_the_recipe(data):
    run = settled(data, "run.epochs=3", "optim.warmup_epochs=1", recipe="simclr-adainf-cifar10").config
    assert (run.run.epochs, run.run.max_steps) == (3, None)
    assert (run.optim.warmup_epochs, run.optim.warmup_steps) == (1, None)
    both = settled(data, "run.epochs=3", flags={"run": {"max_steps": 7}}, recipe="simclr-adainf-cifar10").config
    assert (both.run.max_steps, both.optim.warmup_steps) == (7, 1000)


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
