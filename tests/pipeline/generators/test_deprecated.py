"""Versatile Diffusion and unCLIP image variations: equal to diffusers' own, complete pair sets, clear refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_pipelines import CPU, SEEDS, photographs
from torchvision import transforms

from manifests.errors import UsageError
from pipeline.generators import deprecated
from pipeline.generators.base import GeneratorConfig, step_generators
from pipeline.generators.image_pipelines import ImagePipeline
from pipeline.generators.load import load_generator

BOTH = pytest.mark.parametrize("kind", ["versatile_folder", "karlo_folder"])


def load(folder, **settings) -> ImagePipeline:
    made = load_generator(GeneratorConfig(model=str(folder), **{"steps": 4, **settings}), CPU)
    assert isinstance(made, ImagePipeline)
    return made


def conditions(made) -> torch.Tensor:
    return made.embed(torch.stack([made.prepare(image) for image in photographs()]))


def own(folder, name, condition, **inputs) -> np.ndarray:
    """What diffusers' class `name` itself makes of the conditions: uint8 [B, H, W, 3]."""
    pipeline = deprecated.find(name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(image=[Image.fromarray(image) for image in condition.numpy()], **inputs).images
    return np.stack([np.asarray(picture) for picture in pictures])


def drawn(generators, shape) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def largest_difference(images: torch.Tensor, reference: np.ndarray) -> int:
    return int(np.abs(images.numpy().astype(int) - reference).max())


@pytest.mark.parametrize("size", [32, 48])
def test_versatile_equals_the_pipelines_own(versatile_folder, size):
    made = load(versatile_folder, guidance_scale=2.0, size=size)
    condition = conditions(made)
    side = size // made.pipeline.vae_scale_factor
    reference = own(
        versatile_folder,
        "VersatileDiffusionPipeline",
        condition,
        latents=drawn(step_generators(SEEDS), (4, side, side)),
        num_inference_steps=4,
        guidance_scale=2.0,
        height=size,
        width=size,
    )
    result = made.vary(condition, SEEDS)
    assert result.finite.all()
    assert result.images.shape == (3, size, size, 3)
    assert largest_difference(result.images, reference) <= 1


def test_unclip_equals_the_pipelines_own(karlo_folder):
    made = load(karlo_folder, guidance_scale=2.0)
    condition = conditions(made)
    generators = step_generators(SEEDS)
    reference = own(
        karlo_folder,
        "UnCLIPImageVariationPipeline",
        condition,
        decoder_latents=drawn(generators, (3, 16, 16)),
        generator=generators,  # goes on with the noise of the decoder's steps and of super-resolution
        decoder_num_inference_steps=4,
        decoder_guidance_scale=2.0,
    )
    result = made.vary(condition, SEEDS)
    assert result.finite.all()
    assert result.images.shape == (3, 32, 32, 3)
    assert largest_difference(result.images, reference) <= 1


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("versatile_folder", None), ("versatile_folder", "euler-a"), ("karlo_folder", None)]
)
def test_noise_is_a_function_of_each_seed_alone(kind, scheduler, request):
    made = load(request.getfixturevalue(kind), scheduler=scheduler)
    condition = conditions(made)
    images = made.vary(condition, SEEDS).images
    torch.manual_seed(99)
    assert torch.equal(made.vary(condition, SEEDS).images, images)
    for row in range(3):
        alone = made.vary(condition[row : row + 1], SEEDS[row : row + 1]).images
        assert largest_difference(alone[0], images[row].numpy()) <= 1
    same = made.vary(condition[:1].expand(3, -1, -1, -1), [SEEDS[0], SEEDS[0], SEEDS[1]]).images
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_spec_names_what_changes_a_pixel(versatile_folder, karlo_folder):
    versatile = load(versatile_folder, steps=None, scheduler="dpm++").spec
    assert versatile["pipeline"] == "VersatileDiffusionImageVariationPipeline"
    assert (versatile["steps"], versatile["guidance_scale"], versatile["eta"]) == (50, 7.5, 0.0)
    assert (versatile["scheduler"], versatile["size"]) == ("DPMSolverMultistepScheduler", 32)
    karlo = load(karlo_folder, steps=None).spec
    assert (karlo["steps"], karlo["super_res_num_inference_steps"], karlo["guidance_scale"]) == (25, 7, 8.0)
    assert (karlo["scheduler"], karlo["size"]) == ("UnCLIPScheduler", 32)
    assert json.loads(json.dumps([versatile, karlo])) == [versatile, karlo]


@BOTH
def test_settings_change_the_images(kind, request):
    folder = request.getfixturevalue(kind)
    plain = load(folder)
    condition = conditions(plain)
    images = plain.vary(condition, SEEDS).images
    for settings in ({"steps": 6}, {"guidance_scale": 1.5}):
        assert not torch.equal(load(folder, **settings).vary(condition, SEEDS).images, images)


def test_versatile_is_conditioned_as_the_reference_does(versatile_folder):
    made = load(versatile_folder, size=48)
    squash = [transforms.ToTensor(), transforms.Resize((48, 48), transforms.InterpolationMode.BICUBIC, antialias=False)]
    for image in photographs():
        resized = transforms.Compose(squash)(Image.fromarray(image))
        expected = (resized.clamp(0, 1) * 255).byte().permute(1, 2, 0)
        assert (made.prepare(image) - expected.int()).abs().max() <= 1
        assert (made.prepare(image) == expected).float().mean() > 0.99  # a rounding may fall to the other side
    edge = np.zeros((96, 96, 3), np.uint8)
    edge[:, 48:] = 255
    assert made.prepare(edge)[:, :20].max() == 0  # overshoot is clamped, not wrapped to white


def test_crop_conditioning_takes_the_middle(versatile_folder):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    assert (load(versatile_folder, conditioning="crop").prepare(image) == 200).all()


@BOTH
def test_full_precision_and_back(kind, request):
    made = load(request.getfixturevalue(kind))
    condition = conditions(made)
    made.pipeline.to(torch.bfloat16)
    made.dtype = torch.bfloat16
    with made.full_precision():
        assert made.vary(condition, SEEDS).finite.all()
    assert {part.dtype for part in made.pipeline.components.values() if isinstance(part, torch.nn.Module)} == {
        torch.bfloat16
    }


def test_non_finite_images_are_reported(karlo_folder):
    made = load(karlo_folder)
    with torch.no_grad():
        made.pipeline.decoder.conv_in.weight.mul_(1e38)
    assert not made.vary(conditions(made), SEEDS).finite.any()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("karlo_folder", {"size": 64}, "32 pixels"),
        ("karlo_folder", {"scheduler": "ddim"}, "schedulers of its checkpoint"),
        ("karlo_folder", {"steps": 1}, "cannot take 1 steps"),
        ("karlo_folder", {"dtype": "bfloat16"}, "on a CPU in float32 only"),
        ("versatile_folder", {"size": 33}, "multiple of 8"),
        ("versatile_folder", {"steps": 5000}, "cannot take 5000 steps"),
        ("versatile_folder", {"scheduler": "nope"}, "unknown scheduler"),
        ("versatile_folder", {"safety": "drop"}, "--safety drop"),
    ],
)
def test_settings_that_cannot_work_are_usage_errors(kind, settings, message, request):
    with pytest.raises(UsageError, match=message):
        load(request.getfixturevalue(kind), **settings)


def test_settings_that_say_what_is_so_anyway(karlo_folder):
    assert load(karlo_folder, size=32, scheduler="UnCLIPScheduler").spec == load(karlo_folder).spec


@BOTH
def test_components_are_found_in_the_deprecated_folder(kind, request, monkeypatch):
    """As in a fresh process, where diffusers knows neither folder by the name that checkpoints use."""
    folder = request.getfixturevalue(kind)
    index = json.loads((folder / "model_index.json").read_text())
    name = deprecated.DEPRECATED[index["_class_name"]].folder
    assert name in {entry[0] for entry in index.values() if isinstance(entry, list)}
    assert name in vars(diffusers.pipelines)
    monkeypatch.delattr(diffusers.pipelines, name)
    load(folder)


@BOTH
def test_a_diffusers_without_the_class_says_which_have_it(kind, request, img2img_folder, monkeypatch):
    folder = request.getfixturevalue(kind)
    for place in ("", ".deprecated"):
        for name in ("unclip", "versatile_diffusion"):
            monkeypatch.setitem(sys.modules, f"diffusers.pipelines{place}.{name}", None)
    with pytest.raises(UsageError, match=r"(?s)has no \w+VariationPipeline.*0\.36 to 0\.42.*pip install"):
        load(folder)
    assert load(img2img_folder).spec["pipeline"] == "StableDiffusionImg2ImgPipeline"


def test_only_what_variations_need_is_read(versatile_folder, tmp_path):
    folder = tmp_path / "versatile"
    shutil.copytree(versatile_folder, folder)
    for name in ("text_unet", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    assert load(folder).spec["weights"] == load(versatile_folder).spec["weights"]


def test_only_what_variations_need_is_downloaded(versatile_folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir()
    snapshot.symlink_to(versatile_folder)
    asked = {}
    module = "pipeline.generators.checkpoint."
    monkeypatch.setattr(module + "hf_hub_download", lambda *args, **kwargs: str(snapshot / "model_index.json"))
    monkeypatch.setattr(
        module + "DiffusionPipeline.download", lambda model, **options: asked.update(options) or str(snapshot)
    )
    load("owner/versatile")
    assert asked == {"revision": snapshot.name, "text_unet": None, "text_encoder": None, "tokenizer": None}


@BOTH
def test_pair_set_from_the_command_line(kind, request, pipeline, photos, tmp_path):
    folder, out = request.getfixturevalue(kind), tmp_path / "set"
    flags = ("--shards", 2, "--limit", 5, "--batch-size", 2, "--steps", 3, "--variations", 2)
    code, _, err = pipeline("generate", "--source", photos, "--model", folder, "--out", out, *flags)
    assert code == 0, err
    assert pipeline("verify", out)[0] == 0
    rows = pq.read_table(Path(out) / "manifest.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 5
    made = [image for row in rows for image in row["synthetic"]]
    assert all(-1 <= image["similarity"] <= 1 for image in made)
    assert {(image["width"], image["height"]) for image in made} == {(32, 32)}
    assert len({image["sha256"] for image in made}) == 10
    code, text, err = pipeline("reproduce", out, rows[0]["key"], "--json")
    assert code == 0, err
    facts = json.loads(text)["variations"]
    assert facts == [{"same_bytes": True, "mean_distance": 0.0, "max_distance": 0}] * 2
