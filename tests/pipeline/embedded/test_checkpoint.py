from __future__ import annotations

import json
import stat

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImageVariationPipeline
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from pipeline.embedded import checkpoint_path, digits, measure, views

FILES = sorted(path for path in checkpoint_path().rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipeline():
    return measure.load(checkpoint_path())


def test_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FILES) <= 6_000_000


def test_holds_what_diffusers_expects():
    names = {path.relative_to(checkpoint_path()).as_posix() for path in FILES}
    assert names == {
        "README.md",
        "diffmix.json",
        "feature_extractor/preprocessor_config.json",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_readable_by_everyone(path):
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".json"], ids=lambda path: path.parent.name)
def test_settings_name_no_machine(path):
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert "_name_or_path" not in settings
    assert not [value for value in settings.values() if isinstance(value, str) and "/" in value]


def test_loads_without_a_dtype():
    parts = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint_path()).components
    assert {parts[name].dtype for name in ("image_encoder", "unet", "vae")} == {torch.float32}


def test_one_plain_call_draws_finite_images_of_32_pixels():
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(checkpoint_path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
    drawn = pipeline(image=photo, num_inference_steps=10, guidance_scale=2.0, output_type="np").images
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert drawn.shape == (1, 32, 32, 3)
    assert np.isfinite(drawn).all()


def test_preprocessing_squashes_and_normalises_as_in_training(pipeline):
    images = digits.load("test")[0][:4]
    pixels = pipeline.feature_extractor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    assert torch.allclose(pixels, views.clip_input(views.as_grey(images)), atol=1e-5)
    wide = pipeline.feature_extractor(Image.new("RGB", (90, 40)), return_tensors="pt").pixel_values
    assert wide.shape == (1, 3, 32, 32)


def test_unconditional_embedding_is_the_mean_digit(pipeline):
    with torch.no_grad():
        images = views.as_grey(digits.load("train")[0])
        embeddings = pipeline.image_encoder(views.clip_input(images)).image_embeds
    assert embeddings.mean(dim=0).abs().max() < 0.2
    assert embeddings.std(dim=0).sub(1).abs().max() < 0.2


def test_variations_of_unseen_digits_keep_the_class_and_differ(pipeline):
    train_images, train_labels = measure.split("train")
    images, labels = (values[::9] for values in measure.split("test"))
    judge = KNeighborsClassifier(5).fit(train_images.flatten(1), train_labels)
    first, second = (measure.vary(pipeline, images, seed=seed) for seed in (0, 1))
    guesses = judge.predict(torch.cat([first, second]).flatten(1))
    assert (guesses == np.tile(labels, 2)).mean() >= 0.85
    assert measure.rms(first, second) > 0.1
    assert measure.rms(first, images) > 0.1
