import pytest

from manifests.errors import UsageError
from trainer import recipes
from trainer.finetune.config import FinetuneConfig, resolve
from trainer.settings import differences, merge, parse_assignments
from trainer.tuners import TUNERS

LEAST = {"init": "runs/a", "tasks": ["photos"], "source": "data/pairs"}


def resolved(*assignments):
    return resolve(merge(LEAST, parse_assignments(assignments)))


@pytest.mark.parametrize("name", recipes.names("finetune"))
def test_recipes_resolve_and_come_back_from_yaml(name):
    config = resolve(merge(recipes.load(name, "finetune"), LEAST))
    assert resolve(recipes.read_yaml(config.to_yaml())) == config
    for tuner in TUNERS:
        assert config.rates.of(tuner)
        assert len(config.rates.grid_of(tuner)) > 1
        if config.rates.warmup_epochs is None:
            assert config.rates.warmup_of(tuner) < config.run.max_steps
    if config.peft != ("full",):
        assert len(config.rates.of("full")) == 2, "beside others full fine-tuning is always shown at two rates"


def test_every_scale_has_a_recipe():
    scales = {recipes.scale_of(kind, side) for kind, side in (("digits", 32), (None, 32), (None, 224))}
    assert scales <= set(recipes.names("finetune"))


def test_maes_recipe_is_its_table_9():
    config = resolve(merge(recipes.load("mae-imagenet", "finetune"), LEAST))
    images, optim = config.images, config.optim
    assert (images.mixup, images.cutmix, images.label_smoothing, images.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert images.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (optim.name, optim.betas, optim.weight_decay, optim.layer_decay) == ("adamw", (0.9, 0.999), 0.05, 0.65)
    assert config.rates.of("full") == (5e-4 * 1024 / 256,)
    assert (config.run.batch_size, config.run.epochs, config.rates.warmup_epochs) == (1024, 100, 5)
    assert config.encoder.args == {"global_pool": "avg", "drop_path_rate": 0.1}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rates.learning_rate={default: [1]}", "did you mean 'rates.learning_rates'"),
        ("rates.learning_rates={full: [1.0]}", "rates.learning_rates is {'full': (1.0,)}"),
        ("rates.grid={default: []}", "rates.grid.default is []"),
        ("rates.grid={default: [0.1, 0.1]}", "different numbers above 0"),
        ("evaluation.at=[-1]", "evaluation.at"),
        ("evaluation.k=0", "evaluation.k"),
        ("seeds=0", "seeds is 0"),
        ("peft=[]", "one or more tuners"),
        ("peft=[full, full]", "without repetitions"),
        ("tasks=[]", "one or more tasks"),
        ("adapters=two", "adapters is 'two'"),
        ("rates.warmup_epochs=-1", "rates.warmup_epochs"),
        ("images.mixup=-1", "images.mixup"),
        ("images.rand_augment=rand-m9", "images.rand_augment is 'rand-m9'"),
        ("data.max_pixels=0", "data.max_pixels"),
        ("images.std=[0.2, 0, 0.2]", "images.std"),
        ("tuner.lora_dropout=1", "tuner.lora_dropout"),
        ("tuner.lora_alpha=0", "tuner.lora_alpha"),
    ],
)
def test_wrong_settings_are_named(assignment, message):
    with pytest.raises(UsageError) as caught:
        resolved(assignment)
    assert message in str(caught.value)


def test_what_changes_nothing_that_is_learnt_may_differ():
    changed = ["data.workers=3", "checkpoint.every=7", "run.log_every=3", "run.max_steps=5"]
    before, after = resolved("run.max_steps=9"), resolved(*changed)
    found = differences(before.to_dict(), after.to_dict(), FinetuneConfig.FREE)
    assert [name for name, *_ in found] == ["run.max_steps"]


def test_rates_are_by_the_name_of_the_tuner():
    given = ["rates.learning_rates={full: [1.0, 0.1], default: [0.5]}", "rates.warmup_steps={default: 4, linear: 1}"]
    rates = resolved(*given).rates
    assert (rates.of("full"), rates.of("lora")) == ((1.0, 0.1), (0.5,))
    assert (rates.warmup_of("linear"), rates.warmup_of("lora")) == (1, 4)
