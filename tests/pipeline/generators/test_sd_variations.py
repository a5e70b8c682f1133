"""SD image variations against diffusers' own pipeline call, and what the pipeline does not promise."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from diffusers import StableDiffusionImageVariationPipeline
from PIL import Image
from tiny_pipelines import CPU, SEEDS, photographs

from manifests.errors import UsageError
from pipeline.generators.base import GeneratorConfig, noise, step_generators
from pipeline.generators.load import load_generator
from pipeline.generators.schedulers import build_scheduler
from pipeline.generators.sd_variations import CLIP_MEAN, CLIP_STD, SDVariations


def generator(folder, **settings) -> SDVariations:
    made = load_generator(GeneratorConfig(model=str(folder), **{"steps": 3, **settings}), CPU)
    assert isinstance(made, SDVariations)
    return made


def condition(made: SDVariations, images=None) -> torch.Tensor:
    return made.embed(torch.stack([made.prepare(image) for image in images or photographs()]))


def stock_images(pipeline, made, inputs, seeds, **settings) -> np.ndarray:
    edge = made.size // made.vae_factor
    pictures = pipeline(
        inputs,
        num_inference_steps=made.steps,
        guidance_scale=made.guidance_scale,
        latents=noise(seeds, (4, edge, edge)),
        generator=step_generators(seeds),
        **settings,
    ).images
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        "checkpoint",
        "pndm",
        "ddim",
        "ddpm",
        "dpm++",
        "dpm++-sde",
        "deis",
        "euler",
        "euler-a",
        "unipc",
        "lcm",
        "heun",
        "lms",
    ],
)
def test_pixels_equal_those_of_the_diffusers_pipeline(variation_folder, scheduler, guidance_scale):
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(variation_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = build_scheduler(pipeline.scheduler, scheduler)
    made = generator(variation_folder, scheduler=scheduler, guidance_scale=guidance_scale, steps=4)
    inputs = torch.stack([made.prepare(image) for image in photographs()])
    reference = stock_images(pipeline, made, inputs, SEEDS)
    for _ in range(2):  # the second batch must not see the first one's scheduler state
        result = made.vary(made.embed(inputs), SEEDS)
        assert result.finite.all()
        assert result.images.dtype == torch.uint8
        difference = np.abs(result.images.numpy().astype(int) - reference)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    assert reference.std() > 5  # pictures, not a flat grey


def test_several_variations_of_an_image_equal_the_pipelines(variation_folder):
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(variation_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    made = generator(variation_folder)
    inputs = torch.stack([made.prepare(image) for image in photographs(2)])
    seeds = [1, 2, 3, 4, 5, 6]
    reference = stock_images(pipeline, made, inputs, seeds, num_images_per_prompt=3)
    result = made.vary(made.embed(inputs).repeat_interleave(3, dim=0), seeds).images
    assert np.abs(result.numpy().astype(int) - reference).max() <= 1


@pytest.mark.parametrize("size", [40, 64])
def test_other_sizes_equal_the_pipelines(variation_pipeline, size):
    made = SDVariations.from_pipeline(variation_pipeline, GeneratorConfig(model="tiny", steps=3, size=size), CPU)
    inputs = torch.stack([made.prepare(image) for image in photographs()])
    reference = stock_images(variation_pipeline, made, inputs, SEEDS, height=size, width=size)
    result = made.vary(made.embed(inputs), SEEDS).images
    assert result.shape == (3, size, size, 3)
    assert np.abs(result.numpy().astype(int) - reference).max() <= 1


def test_squash_is_the_reference_preprocessing(variation_folder):
    made = generator(variation_folder)
    side = made.side
    chain = T.Compose(
        [
            T.ToTensor(),
            T.Resize((side, side), interpolation=T.InterpolationMode.BICUBIC, antialias=False),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    for image in photographs():
        torch.testing.assert_close(made.prepare(image), chain(Image.fromarray(image)), atol=1e-5, rtol=0)


def test_crop_keeps_the_aspect(variation_folder):
    made = generator(variation_folder, conditioning="crop")
    side = made.side
    chain = T.Compose(
        [
            T.ToTensor(),
            T.Resize(side, interpolation=T.InterpolationMode.BICUBIC, antialias=True),
            T.CenterCrop(side),
            T.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    for image in [*photographs(), photographs()[0].transpose(1, 0, 2)]:
        prepared = made.prepare(image)
        assert prepared.shape == (3, side, side)
        # torchvision rounds the offset of the crop where we round down: at most one pixel apart
        expected = chain(Image.fromarray(image))
        shifts = [
            (expected.roll(shift, dim) - prepared).abs()[:, 2:-2, 2:-2].max() for dim in (1, 2) for shift in (0, 1)
        ]
        assert min(shifts) < 1e-4


def test_crop_of_a_very_long_picture_costs_no_more_memory_than_of_a_long_one(variation_folder):
    made = generator(variation_folder, conditioning="crop")
    line = np.zeros((1, 60_000, 3), np.uint8)
    line[:, 29_000:31_000] = 255
    assert made.prepare(line).shape == (3, made.side, made.side)
    torch.testing.assert_close(made.prepare(line), made.prepare(np.full((9, 9, 3), 255, np.uint8)))


def test_read_only_images_are_prepared(variation_folder):
    image = photographs(1)[0].copy()
    image.flags.writeable = False
    assert generator(variation_folder).prepare(image).isfinite().all()


@pytest.mark.parametrize("scheduler", ["checkpoint", "euler-a"])
def test_a_row_depends_on_its_own_condition_and_seed_alone(variation_folder, scheduler):
    made = generator(variation_folder, scheduler=scheduler)
    one = condition(made)
    other = condition(made, photographs(seed=9))
    first = made.vary(one, SEEDS).images
    mixed = made.vary(torch.stack([other[0], one[1], other[2]]), [77, SEEDS[1], 78]).images
    assert torch.equal(first[1], mixed[1])
    assert not torch.equal(first[0], mixed[0])
    assert torch.equal(first, made.vary(one, SEEDS).images)


def test_noise_uses_all_63_bits():
    for bit in range(63):
        assert not torch.equal(noise([0], (2, 2)), noise([1 << bit], (2, 2))), bit


def test_step_noise_uses_all_63_bits():
    def draw(seed: int) -> torch.Tensor:
        return torch.randn(4, generator=step_generators([seed])[0])

    assert torch.equal(draw(3), draw(3))
    for bit in range(63):
        assert not torch.equal(draw(0), draw(1 << bit)), bit
    sample = torch.cat([torch.randn(500, generator=g) for g in step_generators(range(200))])
    assert abs(sample.mean()) < 0.01
    assert abs(sample.std() - 1) < 0.01
    # apart from what `noise` gives for the same seed, or the first step would add the start again
    assert abs(np.corrcoef(noise([3], (1000,))[0], torch.randn(1000, generator=step_generators([3])[0]))[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_full_precision(variation_folder, dtype):
    full = generator(variation_folder)
    half = generator(variation_folder, dtype=dtype)
    assert half.spec["dtype"] == dtype
    assert half.unet.dtype == half.image_encoder.dtype == getattr(torch, dtype)
    one, two = full.vary(condition(full), SEEDS), half.vary(condition(half), SEEDS)
    assert two.finite.all()
    assert (one.images.float() - two.images.float()).abs().mean() < 4


def test_an_overflow_is_reported_and_full_precision_mends_it(variation_pipeline):
    made = SDVariations.from_pipeline(variation_pipeline, GeneratorConfig(model="x", steps=2, dtype="float16"), CPU)
    with torch.no_grad():  # group normalisation makes up for the scale wherever the numbers are wide enough
        made.vae.decoder.conv_in.weight.mul_(3e4)
    before = made.unet.conv_in.weight.clone()
    assert not made.vary(condition(made), SEEDS).finite.any()
    with made.full_precision():
        mended = made.vary(condition(made), SEEDS)
        assert made.unet.dtype == torch.float32
    assert mended.finite.all()
    assert mended.images.float().std() > 5
    assert made.unet.dtype == torch.float16
    assert torch.equal(made.unet.conv_in.weight, before)


def test_half_precision_files_load_in_the_dtype_asked_for(variation_pipeline, tmp_path):
    import copy

    half = {name: copy.deepcopy(getattr(variation_pipeline, name)).half() for name in ("unet", "vae", "image_encoder")}
    StableDiffusionImageVariationPipeline(**{**variation_pipeline.components, **half}).save_pretrained(tmp_path)
    made = generator(tmp_path)
    assert made.unet.dtype == made.vae.dtype == made.image_encoder.dtype == torch.float32
    assert made.vary(condition(made), SEEDS).finite.all()


def test_pickled_weights_load_without_running_code(variation_pipeline, tmp_path):
    variation_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").exists()
    if not (tmp_path / "image_encoder" / "pytorch_model.bin").exists():  # transformers writes safetensors only
        torch.save(variation_pipeline.image_encoder.state_dict(), tmp_path / "image_encoder" / "pytorch_model.bin")
        (tmp_path / "image_encoder" / "model.safetensors").unlink()
    assert generator(tmp_path).vary(condition(generator(tmp_path)), SEEDS).finite.all()

    class Evil:
        def __reduce__(self):
            return (exec, ("open('/dev/null')",))

    torch.save({"x": Evil()}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="unet"):
        generator(tmp_path)


def test_similarity_is_the_cosine_of_the_embeddings(variation_folder):
    made = generator(variation_folder)
    square = np.stack([image[:40, :40] for image in photographs()])
    embeds = condition(made, list(square))
    cosine = made.similarity(embeds, torch.from_numpy(square))
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine, torch.ones(3), atol=1e-5, rtol=0)
    other = made.similarity(embeds, torch.from_numpy(square).roll(1, 0))
    expected = torch.nn.functional.cosine_similarity(embeds, embeds.roll(1, 0))
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=0)


def test_flags_are_those_of_the_diffusers_pipeline(checked_folder):
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(checked_folder)
    pipeline.set_progress_bar_config(disable=True)
    made = generator(checked_folder, safety="flag", steps=2)
    images = photographs(8, seed=4)
    inputs = torch.stack([made.prepare(image) for image in images])
    seeds = list(range(8))
    latents = noise(seeds, (4, 8, 8))
    reference = pipeline(inputs, num_inference_steps=2, guidance_scale=3.0, latents=latents)
    result = made.vary(made.embed(inputs), seeds)
    before = result.images.clone()
    flags = made.flagged(result.images)
    assert flags.dtype == torch.bool
    assert flags.tolist() == reference.nsfw_content_detected
    assert torch.equal(result.images, before)
    noisy = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    assert 0 < made.flagged(noisy).float().mean() <= 1


def test_the_safety_checker_is_not_even_loaded_when_off(checked_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checked_folder, folder)
    for path in (folder / "safety_checker").iterdir():
        path.write_bytes(b"broken")
    made = generator(folder)
    assert made.flagged(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)) is None
    with pytest.raises(UsageError, match="safety_checker"):
        generator(folder, safety="drop")


def test_spec_holds_what_changes_a_pixel(variation_folder, tmp_path):
    spec = generator(variation_folder, scheduler="dpm++-karras", size=64).spec
    assert json.loads(json.dumps(spec)) == spec
    assert spec | {"weights": "", "model": ""} == {
        "generator": "sd-variations",
        "pipeline": "StableDiffusionImageVariationPipeline",
        "model": "",
        "weights": "",
        "steps": 3,
        "guidance_scale": 3.0,
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_options": {"use_karras_sigmas": True},
        "size": 64,
        "dtype": "float32",
        "conditioning": "squash",
        "safety": "off",
        "unet": "folded",
    }
    copied = tmp_path / "copy"
    shutil.copytree(variation_folder, copied)
    assert generator(copied).spec["weights"] == spec["weights"]
    config = json.loads((copied / "scheduler" / "scheduler_config.json").read_text())
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.011}))
    assert generator(copied).spec["weights"] != spec["weights"]


def test_defaults_come_from_the_checkpoint_and_flags_win(variation_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(variation_folder, folder)
    assert generator(folder, steps=None).spec["steps"] == 50
    assert generator(folder).spec["scheduler"] == "PNDMScheduler"
    (folder / "diffmix.json").write_text('{"steps": 10, "guidance_scale": 2.0, "scheduler": "dpm++"}')
    spec = generator(folder, steps=None).spec
    assert (spec["steps"], spec["guidance_scale"], spec["scheduler"]) == (10, 2.0, "DPMSolverMultistepScheduler")
    assert generator(folder, guidance_scale=5.0, scheduler="checkpoint").spec["scheduler"] == "PNDMScheduler"
    (folder / "diffmix.json").write_text('{"step": 10}')
    with pytest.raises(UsageError, match="step"):
        generator(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 60}, "multiple of 8.*32"),
        ({"size": 0}, "multiple of 8"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 2000}, "2000 steps"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"safety": "flag"}, "safety"),
    ],
)
def test_settings_that_cannot_work_are_usage_errors(variation_folder, settings, message):
    with pytest.raises(UsageError, match=message):
        generator(variation_folder, **settings)


def test_vae_decodes_in_parts_without_changing_a_pixel(variation_folder, monkeypatch):
    made = generator(variation_folder)
    whole = made.vary(condition(made), SEEDS).images
    monkeypatch.setattr("pipeline.generators.sd_variations.DECODED_PIXELS", 2 * made.size**2)
    parts = made.vary(condition(made), SEEDS).images
    assert (whole.int() - parts.int()).abs().max() <= 1
