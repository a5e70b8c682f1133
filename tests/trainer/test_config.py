"""Settings: who wins, what is refused and how it is said, and that what is saved says it all."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from trainer import recipes
from trainer.config import PretrainConfig, resolve
from trainer.settings import differences, merge, parse_assignments

LEAST = {"method": {"name": "simclr"}, "encoder": {"name": "resnet18"}}


def resolved(*assignments, **sections):
    return resolve(merge(LEAST, sections, parse_assignments(assignments)), "settings")


def refused(*assignments, **sections):
    with pytest.raises(UsageError) as caught:
        resolved(*assignments, **sections)
    return str(caught.value)


def test_defaults():
    config = resolved()
    assert isinstance(config, PretrainConfig)
    assert (config.method.name, config.method.settings.temperature) == ("simclr", 0.1)
    assert (config.mix.policy, config.run.epochs, config.checkpoint.keep, config.init) == ("diffmix", 100, 2, None)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optimm.lr=1", "unknown key 'optimm'; did you mean 'optim'?"),
        ("optim.weight_decy=1", "unknown key 'optim.weight_decy'; did you mean 'optim.weight_decay'?"),
        ("run.batchsize=1", "unknown key 'run.batchsize'; did you mean 'run.batch_size'?"),
        ("method.temprature=1", "unknown key 'method.temprature'; did you mean 'method.temperature'?"),
        ("views.sise=1", "unknown key 'views.sise'; did you mean 'views.size'?"),
        ("mix.polcy=real", "unknown key 'mix.polcy'; did you mean 'mix.policy'?"),
        ("data.path=x", "unknown key 'data.path'; known: allow_changed, cache, filter, url, workers"),
        ("encoder.arg.depth=2", "unknown key 'encoder.arg'; did you mean 'encoder.args'?"),
        ("evaluation.evry=2", "did you mean 'evaluation.every'?"),
        ("checkpoint.kep=2", "did you mean 'checkpoint.keep'?"),
        ("xyzzy=1", "unknown key 'xyzzy'; known: checkpoint, data, encoder"),
    ],
)
def test_unknown_keys_name_the_nearest(typed, said):
    assert said in refused(typed)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("optim.lr=1e-3", 0.001),
        ("optim.lr=3", 3.0),
        ("optim.clip=null", None),
        ("optim.clip=1e0", 1.0),
        ("optim.trust_clip=true", True),
        ("optim.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("run.trackers=[wandb, mlflow]", ("wandb", "mlflow")),
        ("run.max_steps=12", 12),
        ("views.mean=[5e-1, 0.5, 0.5]", (0.5, 0.5, 0.5)),
        ("mix.variation=random", "random"),
        ("mix.variation=1", 1),
        ("init=timm:resnet18", "timm:resnet18"),
        ("encoder.args.drop_path_rate=1e-1", 0.1),
        ("encoder.args.stages=[1e1, -2.5E-1]", [10.0, -0.25]),
        ("data.url=a=b", "a=b"),
    ],
)
def test_values_have_the_type_of_their_key(typed, value):
    found = resolved(typed)
    for name in typed.partition("=")[0].split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optim.lr=fast", "optim.lr is 'fast': "),
        ("optim.lr=null", "optim.lr is None: "),
        ("optim.name=adam", "optim.name is 'adam': "),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.betas=[0.9, x]", "optim.betas.1 is 'x'"),
        ("optim=3", "optim is 3; it is a section with keys name, lr"),
        ("run.batch_size=2.5", "run.batch_size is 2.5: "),
        ("run.batch_size=0", "run.batch_size is 0; it must be 2 or more"),
        ("run.epochs=.inf", "run.epochs is inf; it must be a number above 0"),
        ("run.epochs=.nan", "run.epochs is nan"),
        ("run.max_steps=0", "run.max_steps is 0; it must be 1 or more, or null"),
        ("run.accumulation=0", "run.accumulation is 0"),
        ("run.log_every=0", "run.log_every is 0"),
        ("run.seed=-1", "run.seed is -1"),
        ("run.precision=fp8", "run.precision is 'fp8'"),
        ("run.trackers=wandb", "run.trackers is 'wandb'"),
        ("data.workers=0", "data.workers is 0"),
        ("data.filter=x > 1", "data.filter is 'x > 1'"),
        ("evaluation.every=-1", "evaluation.every is -1"),
        ("evaluation.k=0", "evaluation.k is 0"),
        ("checkpoint.keep=0", "checkpoint.keep is 0"),
        ("checkpoint.every=-5", "checkpoint.every is -5"),
        ("views.std=[0, 1, 1]", "views.std"),
        ("views.size=big", "views.size is 'big'"),
        ("method.temperature=0", "method.temperature is 0"),
        ("method.name=simsiam", "method.name is 'simsiam'; choose one of simclr, barlow-twins, dino"),
        ("method=3", "method.name is 3; choose one of"),
        ("encoder=resnet18", "encoder is 'resnet18'; it is a section with keys name, args"),
        ("encoder.name=5", "encoder.name is 5"),
        ("init=5", "init is 5"),
        ("optim.lr.x=5", "optim.lr is {'x': 5}"),
    ],
)
def test_wrong_values_name_key_and_value(typed, said):
    message = refused(typed)
    assert message.startswith("settings: ") or "; " in message
    assert said in message


@pytest.mark.parametrize("typed", ["optim.lr", "=3", ".lr=3", "optim..lr=3", "optim.=3", ""])
def test_what_is_no_assignment(typed):
    with pytest.raises(UsageError, match="give KEY=VALUE"):
        parse_assignments([typed])


def test_a_value_that_is_no_yaml():
    with pytest.raises(UsageError, match=r"--set 'optim.lr=\[1': '\[1' is not a YAML value"):
        parse_assignments(["optim.lr=[1"])


def test_settings_without_an_encoder_say_what_to_do():
    with pytest.raises(UsageError, match="no encoder; choose a recipe, or a timm model by --encoder"):
        resolve({"method": {"name": "simclr"}})
    with pytest.raises(UsageError, match=r"encoder\.name is missing"):
        resolve({"method": {"name": "simclr"}, "encoder": {}})
    with pytest.raises(UsageError, match=r"method\.name is None"):
        resolve({"encoder": {"name": "resnet18"}})


@pytest.mark.parametrize("name", recipes.names())
def test_what_is_saved_resolves_to_the_same(name):
    config = resolve({**recipes.load(name), "recipe": name})
    saved = yaml.safe_load(config.to_yaml())
    assert resolve(saved) == config
    assert differences(saved, config.to_dict(), PretrainConfig.FREE) == []


leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text("ab", max_size=2))
trees = st.dictionaries(st.sampled_from("abc"), leaves | st.dictionaries(st.sampled_from("abc"), leaves))


@given(trees, trees)
def test_the_later_layer_wins_key_by_key(first, second):
    merged = merge(first, second)
    assert merged.keys() == first.keys() | second.keys()
    for name, value in merged.items():
        one, other = first.get(name), second.get(name, first.get(name))
        assert value == ({**one, **other} if isinstance(one, dict) and isinstance(other, dict) else other)


def test_merging_changes_no_layer():
    first = {"a": {"b": 1}}
    assert merge(first, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert first == {"a": {"b": 1}}


def changed(*assignments):
    return [
        name for name, *_ in differences(resolved().to_dict(), resolved(*assignments).to_dict(), PretrainConfig.FREE)
    ]


def test_differences_are_named_and_free_ones_are_not():
    assert changed("optim.lr=1", "run.seed=3", "method.temperature=0.5", "init=x") == [
        "method.temperature",
        "init",
        "optim.lr",
        "run.seed",
    ]
    assert changed("encoder.args.depth=3") == ["encoder.args"]
    assert changed("data.url=x", "data.workers=3", "run.log_every=1", "checkpoint.keep=9", "evaluation.k=3") == []
    assert differences({"run": {"seed": 1}}, {"run": {"seed": 2}}, ()) == [("run.seed", 1, 2)]
    assert changed("method.name=dino")[:1] == ["method.name"]
