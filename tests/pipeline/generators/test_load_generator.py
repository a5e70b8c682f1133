"""Which generator a model gets, and what is said about models that get none."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_pipelines import CPU

from manifests.errors import UsageError
from pipeline.generators import GENERATORS
from pipeline.generators.base import Generator, GeneratorConfig
from pipeline.generators.checkpoint import Checkpoint, weights_digest
from pipeline.generators.load import generator_name, load_generator


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_is_there(name):
    module, class_name = GENERATORS[name].split(":")
    assert issubclass(getattr(importlib.import_module(module), class_name), Generator)


@pytest.mark.parametrize(
    ("class_name", "generator"),
    [
        ("StableDiffusionImageVariationPipeline", "sd-variations"),
        ("DDPMPipeline", "unconditional"),
        ("DDIMPipeline", "unconditional"),
        ("StableDiffusionImg2ImgPipeline", "image-pipeline"),
        ("StableUnCLIPImg2ImgPipeline", "image-pipeline"),
        ("StableDiffusionInstructPix2PixPipeline", "image-pipeline"),
        ("StableDiffusionPipeline", "image-pipeline"),
        ("StableDiffusionXLPipeline", "image-pipeline"),
        ("VersatileDiffusionPipeline", "image-pipeline"),
        ("VersatileDiffusionImageVariationPipeline", "image-pipeline"),
        ("UnCLIPImageVariationPipeline", "image-pipeline"),
    ],
)
def test_the_pipeline_class_chooses_the_generator(tmp_path, class_name, generator):
    assert generator_name(index(tmp_path, _class_name=class_name)) == generator


def index(folder, **content) -> GeneratorConfig:
    (folder / "model_index.json").write_text(json.dumps(content))
    return GeneratorConfig(model=str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_class_name": "AudioLDMPipeline"}, "AudioLDMPipeline takes no image.*DDPMPipeline"),
        ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline"),
        ({"_class_name": ["pipeline", "Mine"]}, "never executed"),
        ({"_class_name": "DDPMPipeline", "unet": ["my_unet", "MyUNet"]}, "own code for unet"),
        ({}, "_class_name"),
    ],
)
def test_models_that_cannot_run_are_usage_errors(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        load_generator(index(tmp_path, **content), CPU)


def test_missing_models_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"model_index\.json"):
        load_generator(GeneratorConfig(model=str(tmp_path)), CPU)
    with pytest.raises(UsageError, match="neither a folder"):
        load_generator(GeneratorConfig(model=str(tmp_path / "no" / "where")), CPU)

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("pipeline.generators.checkpoint.hf_hub_download", offline)
    with pytest.raises(UsageError, match=r"(?s)owner/name at revision v9.*hf download.*HF_HOME"):
        load_generator(GeneratorConfig(model="owner/name", revision="v9"), CPU)


def test_hub_models_are_named_by_their_commit(variation_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / commit
    snapshot.parent.mkdir()
    snapshot.symlink_to(variation_folder)
    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(snapshot)

    module = "pipeline.generators.checkpoint."
    monkeypatch.setattr(module + "hf_hub_download", lambda *args, **kwargs: str(snapshot / "model_index.json"))
    monkeypatch.setattr(module + "DiffusionPipeline.download", download)
    made = load_generator(GeneratorConfig(model="owner/name", revision="v2.0", steps=2), CPU)
    assert (made.spec["model"], made.spec["revision"]) == ("owner/name", commit)
    assert "weights" not in made.spec
    assert asked == {"model": "owner/name", "revision": commit, "safety_checker": None}


def test_broken_weights_name_the_component(variation_folder, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(variation_folder, folder)
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="vae"):
        load_generator(GeneratorConfig(model=str(folder)), CPU)
    weights.unlink()
    with pytest.raises(UsageError, match="vae"):
        load_generator(GeneratorConfig(model=str(folder)), CPU)


def test_a_named_generator_must_fit_the_model(variation_folder, unconditional_folder):
    with pytest.raises(UsageError, match="known: auto, sd-variations"):
        load_generator(GeneratorConfig(model=str(variation_folder)), CPU, "sd")
    with pytest.raises(UsageError, match="this generator runs"):
        load_generator(GeneratorConfig(model=str(unconditional_folder)), CPU, "sd-variations")
    with pytest.raises(UsageError, match="this generator runs"):
        load_generator(GeneratorConfig(model=str(variation_folder)), CPU, "unconditional")


def test_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    first = weights_digest(tmp_path, ["unet"])
    (tmp_path / "unet" / "README.md").write_text("not hashed")
    assert weights_digest(tmp_path, ["unet"]) == first
    (tmp_path / "unet" / "config.json").rename(tmp_path / "unet" / "other.json")
    assert weights_digest(tmp_path, ["unet"]) != first


def test_a_component_the_index_does_not_name(tmp_path):
    checkpoint = Checkpoint(folder=tmp_path, index={"_class_name": "X", "unet": [None, None]}, identity={})
    with pytest.raises(UsageError, match="unet"):
        checkpoint.component("unet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "[]"),
        ("model_index.json", '{"_class_name": "StableDiffusionImageVariationPipeline", "unet": "x"}'),
        ("image_encoder/model.safetensors", "short"),
        ("feature_extractor/preprocessor_config.json", "{"),
        ("diffmix.json", "[]"),
        ("diffmix.json", '{"steps": "many"}'),
    ],
)
def test_damaged_files_of_a_checkpoint_are_usage_errors(tiny_model, tmp_path, name, content):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=str(folder)):
        load_generator(GeneratorConfig(model=str(folder)), CPU)
