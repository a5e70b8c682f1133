"""Every recipe that ships is one that trains, and is found by those who mistype it."""

import pytest
import torch

from manifests.errors import UsageError
from trainer import recipes
from trainer.choices import class_of
from trainer.config import resolve
from trainer.data.batch import Views
from trainer.engine.optim import make_optimiser
from trainer.methods import METHODS
from trainer.methods.base import Progress
from trainer.nn.encoders import make_encoder
from trainer.parts import make_schedule

PICTURES = {"cifar10": 50_000, "imagenet": 1_281_167}  # of the sets that the recipes are for
SOLO_LEARN = [f"{method}-cifar10" for method in ("barlow-twins", "byol", "moco-v3", "swav")]
ADAINF = [
    f"{method}-{arm}-cifar10" for method in ("simclr", "barlow-twins") for arm in ("adainf", "inflate", "real", "weak")
]
TORCHVISION = ["swav-imagenet", "swav-imagenet-256", "simclr-diffmix", *SOLO_LEARN, *ADAINF, "byol-adainf-cifar10"]
SMALL = [name for name in recipes.names() if name.endswith(("digits", "cifar10"))]


def test_each_method_has_one_for_each_scale():
    assert {f"{method}-{scale}" for method in METHODS for scale in ("digits", "cifar10", "imagenet")} <= set(
        recipes.names()
    )


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_resolve_and_say_what_they_are(name):
    values = recipes.load(name)
    config = resolve(values, name)
    assert config.method.name in values["about"].lower().replace(" ", "-") or name.startswith(config.method.name)
    assert len(values["about"]) > 20
    if "imagenet" in name or "cifar10" in name:
        assert "github.com" in values["reference"]["source"] or "solo-learn" in values["reference"]["source"]


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_take_a_step(name):
    config = resolve(recipes.load(name), name)
    torch.manual_seed(0)
    method = class_of(METHODS, config.method.name)(
        lambda **overrides: make_encoder(config.encoder, config.views.size, **overrides), config.method.settings
    )
    optimiser = make_optimiser(method, config.optim)
    images = 4  # what one group of MixedAE takes
    local = torch.randn(method.num_local_crops, images, 3, config.views.local_size, config.views.local_size)
    views = Views(
        crops=torch.randn(method.num_crops, images, 3, config.views.size, config.views.size),
        local_crops=local if method.num_local_crops else None,
    )
    loss = method(views, Progress(step=50, total_steps=100, steps_per_epoch=1)).loss
    loss.backward()
    missing = [name for name, value in method.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == [], "DDP would wait for these"
    optimiser.step()
    assert loss.isfinite()
    assert method.encoder(views.crops[0]).shape == (images, method.encoder.num_features)


def loaded(name):
    return resolve(recipes.load(name), name)


@pytest.mark.parametrize("name", [name for name in recipes.names() if not name.endswith("digits")])
def test_a_published_warmup_is_not_shortened(name):
    config = loaded(name)
    pictures = PICTURES["cifar10" if name.endswith("cifar10") else "imagenet"]
    steps = pictures // config.run.batch_size
    schedule = make_schedule(config, steps * (2 if config.mix.policy == "union" else 1))
    assert schedule.warmup_steps == schedule.asked_warmup_steps
    settings = config.method.settings
    if config.method.name == "dino" and settings.teacher_temperature != settings.final_teacher_temperature:
        assert settings.teacher_temperature_epochs <= config.run.epochs / 10


@pytest.mark.parametrize("name", TORCHVISION)
def test_residual_branches_begin_as_those_of_torchvision(name):
    """torchvision's ResNets begin with scales of 1 in the last BatchNorm of a block, timm's with 0."""
    config = loaded(name)
    block = make_encoder(config.encoder, config.views.size).layer1[0]
    last = block.bn3 if hasattr(block, "bn3") else block.bn2
    assert last.weight.eq(1).all()


@pytest.mark.parametrize("name", ["moco-v3-imagenet", "mae-cifar10", "mixed-ae-cifar10"])
def test_all_weights_decay_where_the_authors_exempt_none(name):
    assert not loaded(name).optim.exempt_biases


def test_views_are_encoded_one_after_the_other_as_in_the_references():
    for name in ("barlow-twins-imagenet", "barlow-twins-cifar10", *ADAINF):
        assert not loaded(name).method.settings.joint_batch


def test_heads_of_solo_learn():
    for name in ("barlow-twins-cifar10", *ADAINF[4:]):
        assert loaded(name).method.settings.projector == (2048, 2048, 2048)
    for name in ADAINF[:4]:
        assert loaded(name).method.settings.head_norm == "none"


def test_augmentations_of_solo_learn():
    names = ("barlow-twins-cifar10", "swav-cifar10", "simclr-real-cifar10", "simclr-adainf-cifar10")
    found = [loaded(name).views.augment for name in names]
    assert found == ["barlow-twins-cifar", "symmetric", "symmetric", "weak"]


def test_dino_of_small_pictures_is_that_of_its_reference():
    config = loaded("dino-cifar10")
    encoder = make_encoder(config.encoder, 32)
    assert sum(weights.numel() for weights in encoder.parameters()) == pytest.approx(2.7e6, rel=0.01)
    schedule = make_schedule(config, 50_000 // 512)
    assert schedule.lr(schedule.warmup_steps) == pytest.approx(1e-4)
    assert schedule.warmup_steps == 30 * (50_000 // 512)
    assert config.method.settings.drop_path == 0.1


@pytest.mark.parametrize("typed", ["simclr-cifar", "dino-digit", "barlow-imagenet"])
def test_unknown_recipes_name_the_nearest(typed):
    listed = "Recipes: barlow-twins-.*, simclr-cifar10, "
    with pytest.raises(UsageError, match=f"no recipe '{typed}'; did you mean '.*'.*{listed}"):
        recipes.load(typed)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: {name: dino}\nencoder: {name: resnet18}\noptim: {lr: 1e-3}\n")
    assert resolve(recipes.load(str(path))).optim.lr == 0.001


@pytest.mark.parametrize("content", [b"- 1\n", b"", b"{", b"\xff\xfe\x00", b"x"])
def test_files_that_are_no_recipes(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="recipe"):
        recipes.load(str(path))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UsageError, match="no recipe"):
        recipes.load(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("kind", "side", "scale"), [("digits", 8, "digits"), ("cifar10", 32, "cifar10"), ("folder", 64, "cifar10")]
)
def test_scales_of_small_images(kind, side, scale):
    assert recipes.scale_of(kind, side) == scale


def test_scales_of_large_images():
    assert recipes.scale_of("folder", 65) == recipes.scale_of(None, 500) == "imagenet"
