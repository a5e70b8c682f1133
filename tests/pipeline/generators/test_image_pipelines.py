"""Any image pipeline, and unconditional ones: equal to the pipeline's own call, row by row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableUnCLIPImg2ImgPipeline
from PIL import Image
from tiny_pipelines import CPU, SEEDS, photographs

from manifests.errors import UsageError
from pipeline.generators.base import GeneratorConfig, noise, step_generators
from pipeline.generators.image_pipelines import ImagePipeline
from pipeline.generators.load import load_generator
from pipeline.generators.unconditional import Unconditional


def load(folder, **settings):
    return load_generator(GeneratorConfig(model=str(folder), **{"steps": 4, **settings}), CPU)


def inputs(made) -> torch.Tensor:
    return torch.stack([made.prepare(image) for image in photographs()])


@pytest.mark.parametrize("kind", ["img2img_folder", "text_folder", "unclip_folder"])
def test_pixels_equal_the_pipelines_own(kind, request):
    folder = request.getfixturevalue(kind)
    made = load(folder, guidance_scale=2.0)
    assert isinstance(made, ImagePipeline)
    prepared = inputs(made)
    assert prepared.shape == (3, 32, 32, 3)
    cls = StableUnCLIPImg2ImgPipeline if kind == "unclip_folder" else StableDiffusionImg2ImgPipeline
    pipeline = (
        cls.from_pretrained(folder, safety_checker=None) if kind != "unclip_folder" else cls.from_pretrained(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        image=[Image.fromarray(image) for image in prepared.numpy()],
        prompt=[""] * 3,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=step_generators(SEEDS),
    ).images
    reference = np.stack([np.asarray(picture) for picture in pictures])
    result = made.vary(made.embed(prepared), SEEDS)
    assert result.finite.all()
    assert result.images.dtype == torch.uint8
    assert np.abs(result.images.numpy().astype(int) - reference).max() <= 1


@pytest.mark.parametrize("kind", ["img2img_folder", "unclip_folder", "versatile_folder", "karlo_folder"])
def test_a_row_depends_on_its_own_image_and_seed_alone(kind, request):
    made = load(request.getfixturevalue(kind))
    condition = made.embed(inputs(made))
    first = made.vary(condition, SEEDS).images
    mixed = made.vary(torch.stack([condition[2], condition[1], condition[0]]), [7, SEEDS[1], 8]).images
    assert torch.equal(first[1], mixed[1])
    assert not torch.equal(first[0], mixed[0])


@pytest.mark.parametrize("kind", ["unclip_folder", "versatile_folder", "karlo_folder"])
def test_similarity_where_there_is_an_image_encoder(kind, request):
    made = load(request.getfixturevalue(kind))
    condition = made.embed(inputs(made))
    torch.testing.assert_close(made.similarity(condition, condition), torch.ones(3), atol=1e-5, rtol=0)
    assert (made.similarity(condition, condition.roll(1, 0)) < 1).all()


def test_no_similarity_without_an_image_encoder(img2img_folder):
    without = load(img2img_folder)
    condition = without.embed(inputs(without))
    assert without.similarity(condition, condition) is None


@pytest.mark.parametrize("kind", ["img2img_folder", "versatile_folder"])
def test_non_finite_images_are_reported_and_mended(kind, request):
    made = load(request.getfixturevalue(kind), dtype="float16")
    with torch.no_grad():
        made.pipeline.vae.decoder.conv_in.weight.mul_(3e4)
    condition = made.embed(inputs(made))
    assert not made.vary(condition, SEEDS).finite.any()
    with made.full_precision():
        assert made.vary(condition, SEEDS).finite.all()
    assert made.pipeline.vae.dtype == torch.float16


def test_spec_names_the_pipeline_and_the_defaults_it_ran_with(img2img_folder, text_folder):
    spec = load(img2img_folder, steps=None, scheduler="ddim").spec
    assert json.loads(json.dumps(spec)) == spec
    assert spec["pipeline"] == "StableDiffusionImg2ImgPipeline"
    assert (spec["steps"], spec["strength"], spec["guidance_scale"]) == (50, 0.8, 7.5)
    assert (spec["scheduler"], spec["size"]) == ("DDIMScheduler", 32)
    assert load(text_folder).spec["pipeline"] == "StableDiffusionImg2ImgPipeline"


def test_crop_conditioning_takes_the_middle(img2img_folder):
    made = load(img2img_folder, conditioning="crop")
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    assert (made.prepare(image) == 200).all()


@pytest.mark.parametrize("settings", [{"safety": "flag"}, {"size": 33}, {"scheduler": "nope"}])
def test_settings_that_cannot_work_are_usage_errors(img2img_folder, settings):
    with pytest.raises(UsageError):
        load(img2img_folder, **settings)


@pytest.mark.parametrize("steps", [3, 5])
def test_unconditional_equals_the_pipelines_own(unconditional_folder, steps, monkeypatch):
    made = load(unconditional_folder, steps=steps)
    assert isinstance(made, Unconditional)
    assert not made.conditional
    pipeline = DiffusionPipeline.from_pretrained(unconditional_folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise(SEEDS, (3, 8, 8))
    module = type(pipeline).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: start)
    pictures = pipeline(batch_size=3, num_inference_steps=steps, generator=step_generators(SEEDS)).images
    reference = np.stack([np.asarray(picture) for picture in pictures])
    condition = made.embed(torch.stack([made.prepare(image) for image in photographs()]))
    assert condition.shape == (3, 0)
    for _ in range(2):
        result = made.vary(condition, SEEDS)
        assert np.abs(result.images.numpy().astype(int) - reference).max() <= 1
    mixed = made.vary(condition, [1, SEEDS[1], 2]).images
    assert torch.equal(mixed[1], result.images[1])
    assert made.similarity(condition, result.images) is None


def test_unconditional_settings(unconditional_folder):
    class_name = json.loads((unconditional_folder / "model_index.json").read_text())["_class_name"]
    spec = load(unconditional_folder, steps=None).spec
    assert spec["steps"] == {"DDPMPipeline": 1000, "DDIMPipeline": 50}[class_name]
    assert json.loads(json.dumps(spec)) == spec
    assert load(unconditional_folder, size=16).vary(torch.empty(1, 0), [1]).images.shape == (1, 16, 16, 3)
    for settings in ({"guidance_scale": 3.0}, {"safety": "drop"}, {"size": 9}):
        with pytest.raises(UsageError):
            load(unconditional_folder, **settings)
    half = load(unconditional_folder, dtype="bfloat16")
    with half.full_precision():
        assert half.vary(torch.empty(1, 0), [1]).finite.all()
    assert half.unet.dtype == torch.bfloat16
