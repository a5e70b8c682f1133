"""Arms: what they are by default, which settings win, and what is refused before anything is trained."""

import pytest

from manifests.errors import UsageError
from tests.trainer.compare.small import ARMS, COMMON, request, write_recipe
from tests.trainer.engine.small_runs import VIT
from trainer import recipes
from trainer.compare.arms import differing, open_arms
from trainer.compare.settings import Request, resolve
from trainer.methods import METHODS


def opened(asked):
    return open_arms(resolve(asked), asked)[1]


def product(data, methods=(), mixes=(), settings=(), **arm_flags):
    flags = {"data": str(data), "budget": {"max_steps": 3}}
    arm_flags = {"run": {"batch_size": 8}, **arm_flags}
    return Request(methods=methods, mixes=mixes, flags=flags, arm_flags=arm_flags, assignments=settings)


def test_by_default_every_method_that_has_a_recipe_and_two_policies(data):
    arms = opened(product(data))
    methods = [method for method in METHODS if f"{method}-cifar10" in recipes.names()]
    assert [arm.name for arm in arms] == [f"{method}-{mix}" for method in methods for mix in ("real", "diffmix")]
    assert all(arm.settled.config.recipe == f"{arm.settled.config.method.name}-cifar10" for arm in arms)


def test_the_product_of_methods_and_policies(data):
    arms = opened(product(data, ("simclr", "dino", "simclr"), ("union",), encoder={"name": "resnet18_cifar"}))
    assert [(arm.name, arm.settled.config.mix.policy) for arm in arms] == [
        ("simclr-union", "union"),
        ("dino-union", "union"),
    ]
    assert {arm.settled.config.encoder.name for arm in arms} == {"resnet18_cifar"}
    assert all(not arm.settled.config.encoder.args for arm in arms), "of another encoder's recipe"


def test_recipe_then_common_then_arm_then_what_was_typed(data, tmp_path):
    arm = {**ARMS["real"], "optim": {"lr": 2.0, "weight_decay": 0.2}, "run": {"accumulation": 2}}
    recipe = write_recipe(tmp_path, {"a": arm})
    [one] = opened(request(data, "", recipe))
    config = one.settled.config
    assert (config.optim.warmup_epochs, config.run.log_every) == (3, 1), "of the recipe, of common"
    assert (config.optim.lr, config.optim.weight_decay, config.run.accumulation) == (2.0, 0.2, 2)
    assert config.encoder.args == {**recipes.load("simclr-digits")["encoder"]["args"], **VIT["args"]}
    assert not config.evaluation.final
    [one] = opened(
        request(
            data,
            "",
            recipe,
            settings=["optim.lr=3.0", "evaluation.final=true"],
            arm_flags={"run": {"batch_size": 6}},
        )
    )
    config = one.settled.config
    assert (config.optim.lr, config.run.batch_size, config.evaluation.final) == (3.0, 6, True)
    with pytest.raises(UsageError, match=r"--set run.batch_size=4 and --batch-size 6 disagree"):
        opened(request(data, "", recipe, settings=["run.batch_size=4"], arm_flags={"run": {"batch_size": 6}}))


def test_an_arm_may_have_its_own_encoder_and_set(data, tmp_path):
    own = {**ARMS["real"], "encoder": {"name": "resnet18", "args": {"layers": [1, 1, 1, 1]}}}
    elsewhere = {**ARMS["real"], "data": {"url": data, "filter": ["label >= 1"]}}
    arms = opened(request(data, "", write_recipe(tmp_path, {"own": own, "elsewhere": elsewhere})))
    assert arms[0].settled.config.encoder.args == {"layers": [1, 1, 1, 1]}, "nothing of the common ViT's"
    assert [len(arm.settled.rows) for arm in arms] == [60, 40]
    assert set(differing(arms)) >= {"encoder.name", "encoder.args", "data.filter"}


def test_what_the_runs_are_made_with(data, tmp_path):
    [arm] = opened(request(data, "", write_recipe(tmp_path, ("real",))))
    asked = arm.request(7, 3, "out")
    assert (asked.recipe, asked.out, asked.flags["run"]) == (
        "simclr-digits",
        "out",
        {"batch_size": 8, "log_every": 1, "max_steps": 7, "seed": 3},
    )
    from trainer.settle import settle

    assert settle(asked).config == arm.config(7, 3)


def test_unequal_batches_are_no_equal_steps(data, tmp_path):
    recipe = write_recipe(tmp_path, {"a": ARMS["real"], "b": {**ARMS["pairs"], "run": {"batch_size": 16}}})
    with pytest.raises(UsageError, match=r"not an equal budget for unequal batches \(a 8, b 16\).*--minutes"):
        opened(request(data, "", recipe))
    assert len(opened(request(data, "", recipe, minutes=1))) == 2
    assert len(opened(request(data, "", recipe, arm_flags={"run": {"batch_size": 4}}))) == 2


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"recipe": "simclr-digit"}, "arm a: no recipe 'simclr-digit'; did you mean 'simclr-digits'"),
        ({**ARMS["real"], "optim": {"lrr": 1}}, "arm a: .*unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ({**ARMS["real"], "mixx": 1}, "arm a: .*unknown key 'mixx'; did you mean 'mix'"),
        ({**ARMS["real"], "run": {"max_steps": 3}}, "arm a: run.max_steps cannot be set .* the budget says"),
        ({**ARMS["real"], "run": {"epochs": 3}}, "arm a: run.epochs cannot be set"),
        ({**ARMS["real"], "run": {"seed": 3}}, "arm a: run.seed cannot be set .*--seeds"),
        ({**ARMS["real"], "run": {"batch_size": 100}}, "arm a: --batch-size 100 is more than the 60"),
        ({**ARMS["real"], "encoder": {"args": {"depht": 3}}}, "arm a: .*'depht'; did you mean 'depth'"),
        ({"method": "simclrr", "recipe": "simclr-digits"}, "arm a: .*simclrr"),
        ({**ARMS["real"], "mix": {"synthetic_crops": 3, "policy": "diffmix"}}, "arm a: mix.synthetic_crops is 3"),
    ],
)
def test_an_arm_that_cannot_be_is_named(data, tmp_path, arm, said):
    with pytest.raises(UsageError, match=said):
        opened(request(data, "", write_recipe(tmp_path, {"a": arm})))


def test_a_policy_is_checked_for_the_length_that_the_budget_gives(data, tmp_path):
    """Of 7 steps an epoch, whatever the recipe's epochs."""
    mix = {"policy": "sequential", "first_epochs": 100}
    recipe = write_recipe(tmp_path, {"a": {**ARMS["real"], "mix": mix}})
    with pytest.raises(UsageError, match=r"arm a: mix.first_epochs is 100 and the run has 100 epochs"):
        opened(request(data, "", recipe, steps=700))
    [arm] = opened(request(data, "", recipe, steps=701))
    with pytest.raises(UsageError, match=r"mix.first_epochs is 100 and the run has 2 epochs"):
        arm.check_steps(14)


def test_a_budget_of_minutes_says_how_long_later(data, tmp_path):
    """Not the recipe's epochs, of which there are 100."""
    arm = {**ARMS["real"], "mix": {"policy": "sequential", "first_epochs": 5000}}
    [opening] = opened(request(data, "", write_recipe(tmp_path, {"a": arm}), minutes=1))
    opening.check_steps(7 * 5001)
    with pytest.raises(UsageError, match=r"mix.first_epochs is 5000 and the run has 5000 epochs"):
        opening.check_steps(7 * 5000)


def test_settings_of_all_arms_are_read_by_one_of_them(data, tmp_path):
    mixes = {"a": {**ARMS["real"], "mix": {"policy": "inflate"}}, "b": ARMS["pairs"]}
    common = {**COMMON, "mix": {"replicas": 2}}
    arms = opened(request(data, "", write_recipe(tmp_path, mixes, common=common), settings=["mix.probability=0.5"]))
    assert [(arm.settled.config.mix.replicas, arm.settled.config.mix.probability) for arm in arms] == [(2, 0.5)] * 2
    with pytest.raises(UsageError, match=r"mix.first has no effect with --mix inflate or diffmix: .* by sequential, "):
        opened(request(data, "", write_recipe(tmp_path, mixes), settings=["mix.first=real"]))
    with pytest.raises(UsageError, match=r"mix.replicas has no effect with --mix real or diffmix"):
        opened(request(data, "", write_recipe(tmp_path, common=common)))
    own = {"a": {**ARMS["real"], "mix": {"policy": "real", "replicas": 2}}, "b": mixes["a"]}
    with pytest.raises(UsageError, match=r"arm a: mix.replicas has no effect with --mix real: it is read by inflate"):
        opened(request(data, "", write_recipe(tmp_path, own)))


@pytest.mark.parametrize("setting", ["mix.policy=union", "method.name=dino", "method=dino"])
def test_what_names_the_arms_is_not_set_for_all(data, setting):
    with pytest.raises(UsageError, match=r"(mix.policy|method.name) cannot be set by --set: --(mix|method) says which"):
        opened(product(data, ("simclr",), settings=[setting]))


@pytest.mark.parametrize("name", ["A", "a b", "..", "a/b", "", "-a", ".a"])
def test_names_that_are_no_folders(data, tmp_path, name):
    with pytest.raises(UsageError, match=r"names are of a-z"):
        opened(request(data, "", write_recipe(tmp_path, {name: ARMS["real"]})))


def test_settings_that_all_arms_would_share_with_the_comparison(data, tmp_path):
    recipe = write_recipe(tmp_path, ("real",))
    for setting, said in (("run.seed=3", "--seed"), ("data.url=x", "--data"), ("run.max_steps=1", "budget")):
        with pytest.raises(UsageError, match=f"{setting.partition('=')[0]} cannot be set by --set: .*{said}"):
            opened(request(data, "", recipe, settings=[setting]))
    recipe = write_recipe(tmp_path, ("real",), common={**COMMON, "data": {"url": "x"}})
    with pytest.raises(UsageError, match="cannot be set by common"):
        opened(request(data, "", recipe))


def test_an_unknown_baseline_names_the_nearest(data, tmp_path):
    with pytest.raises(UsageError, match=r"'reel'; did you mean 'real'"):
        opened(request(data, "", write_recipe(tmp_path, baseline="reel")))


def test_arms_of_different_precision_are_refused(data, tmp_path):
    slow = {**ARMS["real"], "run": {"precision": "fp32"}}
    with pytest.raises(UsageError, match=r"arms compute in auto, fp32.*--precision"):
        opened(request(data, "", write_recipe(tmp_path, {"a": slow, "b": ARMS["real"]})))


def test_what_differs(data, tmp_path):
    arms = opened(request(data, "", write_recipe(tmp_path, ("real", "pairs"))))
    assert differing(arms) == {"mix.policy": ["real", "diffmix"]}
    found = differing(opened(request(data, "", write_recipe(tmp_path, ("real", "barlow")))))
    assert found["method.name"] == ["simclr", "barlow-twins"]
    assert not any(name.startswith("method.") for name in set(found) - {"method.name"}), "no two arms of one method"
    hot = {**ARMS["real"], "method": {"hidden_dim": 32, "out_dim": 16, "temperature": 0.5}}
    found = differing(opened(request(data, "", write_recipe(tmp_path, {"a": ARMS["real"], "b": hot}))))
    assert found == {"method.temperature": [0.2, 0.5]}
