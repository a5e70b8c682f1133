"""Exports, loaded by the libraries they are for: plain timm in a process of its own, and torchvision."""

import json
import os
import stat
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from manifests.errors import StorageError, UsageError
from trainer.export import ExportError, export_run, load_timm, save_encoder
from trainer.nn import precision
from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.torchvision_export import TORCHVISION, head, vit_name

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}
VIT = EncoderConfig(name="vit_tiny_patch16_224", args=TINY)


def encoder_of(config, size=32, seed=1):
    """An encoder none of whose weights and statistics are constants any more."""
    torch.manual_seed(seed)
    encoder = make_encoder(config, size)
    for tensor in [*encoder.parameters(), *encoder.buffers()]:
        if tensor.ndim == 1:  # norms, their statistics and biases, which start as constants
            tensor.data.add_(torch.rand_like(tensor) * 0.1)
    return encoder.eval()


def save(encoder, folder, config, size=32):
    save_encoder(encoder, folder, config=config, image_size=size, mean=MEAN, std=STD)


def run_of(folder, config, size=32):
    """A run folder with an exported encoder."""
    encoder = encoder_of(config, size)
    save(encoder, folder / "encoder", config, size)
    return encoder


@torch.no_grad()
def features(encoder, size=32):
    return encoder.eval()(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5)))


PLAIN_TIMM = """
import sys, timm, torch
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.save(model(images), folder + "/features.pt")
    print(type(model).__name__, model.num_features, model.pretrained_cfg["input_size"], model.pretrained_cfg["mean"])
assert not any(name.partition(".")[0] in ("trainer", "manifests", "pipeline") for name in sys.modules)
"""


def test_plain_timm_in_another_process_gives_the_same_features(tmp_path):
    encoders = {
        "vit": run_of(tmp_path / "vit", VIT),
        "resnet": run_of(tmp_path / "resnet", EncoderConfig(name="resnet18")),
    }
    folders = [tmp_path / name / "encoder" for name in encoders]
    command = [sys.executable, "-I", "-c", PLAIN_TIMM, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "VisionTransformer 32 [3, 32, 32] [0.1, 0.2, 0.3]",
        "ResNet 512 [3, 32, 32] [0.1, 0.2, 0.3]",
    ]
    for folder, encoder in zip(folders, encoders.values(), strict=True):
        assert torch.equal(torch.load(folder / "features.pt"), features(encoder))


def test_timms_preprocessing_is_the_runs(tmp_path):
    run_of(tmp_path, VIT)
    data = timm.data.resolve_model_data_config(load_timm(tmp_path / "encoder"))
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()} == {
        "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": MEAN, "std": STD,
        "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip


@pytest.mark.parametrize("config", [VIT, EncoderConfig(name="resnet10t")], ids=["vit", "resnet"])
def test_timm_adds_a_classifier_and_keeps_the_weights(tmp_path, config):
    encoder = run_of(tmp_path, config)
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=7).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_a_vit_reloads_for_other_sizes_and_without_drop_path(tmp_path):
    run_of(tmp_path, VIT)
    model = load_timm(tmp_path / "encoder")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 32)
    assert not any(isinstance(module, timm.layers.DropPath) for module in model.modules())


def test_what_the_description_holds(tmp_path):
    run_of(tmp_path, VIT)
    description = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert description["architecture"] == "vit_tiny_patch16_224"
    assert (description["num_classes"], description["num_features"]) == (0, 32)
    assert description["model_args"] == {
        "num_classes": 0, "img_size": 32, "dynamic_img_size": True,
        "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
    }  # fmt: skip
    assert description["pretrained_cfg"]["first_conv"] == "patch_embed.proj"
    assert description["pretrained_cfg"]["classifier"] == "head"


def test_small_stems_reload_under_their_own_name(tmp_path):
    encoder = run_of(tmp_path, EncoderConfig(name="resnet18_cifar"))
    assert torch.equal(features(load_timm(tmp_path / "encoder")), features(encoder))
    with pytest.raises(UsageError, match=r"torchvision has no 'resnet18_cifar'; it has resnet18, .*--to timm"):
        export_run(tmp_path, tmp_path / "out", "torchvision")
    assert "import trainer.nn.encoders" in export_run(tmp_path, tmp_path / "out", "timm")


@pytest.mark.parametrize("change", ["bfloat16", "channels last", "training"])
def test_the_run_may_hold_it_differently(tmp_path, change):
    encoder = encoder_of(EncoderConfig(name="resnet10t"))
    wanted = features(encoder)
    if change == "bfloat16":
        encoder = encoder.bfloat16()
    elif change == "channels last":
        encoder = encoder.to(memory_format=torch.channels_last)
    else:
        encoder.train()
    save(encoder, tmp_path / "encoder", EncoderConfig(name="resnet10t"))
    assert encoder.training == (change == "training")
    got = features(load_timm(tmp_path / "encoder"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.1 if change == "bfloat16" else 0)


def test_a_run_that_spelt_out_attention_is_exported(tmp_path):
    encoder = encoder_of(VIT)
    precision.prepare(encoder, precision.choose(torch.device("cpu"), "vit", "bf16"))
    assert not encoder.blocks[0].attn.fused_attn
    save(encoder, tmp_path / "encoder", VIT)
    torch.testing.assert_close(features(load_timm(tmp_path / "encoder")), features(encoder))
    assert not encoder.blocks[0].attn.fused_attn, "training goes on as it was"


def test_attention_that_timm_itself_spells_out_is_exported(tmp_path):
    """timm fuses that of Swin only if told to."""
    sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 32}
    config = EncoderConfig(name="swin_tiny_patch4_window7_224", args=sizes)
    encoder = encoder_of(config)
    save(encoder, tmp_path / "encoder", config)
    assert torch.equal(features(load_timm(tmp_path / "encoder")), features(encoder))


def test_an_older_encoder_is_replaced_and_nothing_else_is_left(tmp_path):
    run_of(tmp_path, EncoderConfig(name="resnet10t"))
    encoder = run_of(tmp_path, VIT)
    assert torch.equal(features(load_timm(tmp_path / "encoder")), features(encoder))
    assert os.listdir(tmp_path) == ["encoder"]
    assert sorted(os.listdir(tmp_path / "encoder")) == ["config.json", "model.safetensors"]
    assert stat.S_IMODE((tmp_path / "encoder" / "model.safetensors").stat().st_mode) == 0o644


def test_a_changed_network_is_not_exported_under_a_plain_name(tmp_path):
    encoder = encoder_of(EncoderConfig(name="resnet10t"))
    encoder.act1 = nn.GELU()  # no weights: only the features can tell
    with pytest.raises(ExportError, match="features differ by up to"):
        save(encoder, tmp_path / "encoder", EncoderConfig(name="resnet10t"))
    deeper = EncoderConfig(name=VIT.name, args={**TINY, "depth": 3})
    with pytest.raises(ExportError, match="timm cannot load"):
        save(encoder_of(deeper), tmp_path / "encoder", VIT)
    assert os.listdir(tmp_path) == []


def test_a_failed_export_keeps_the_older_one(tmp_path):
    encoder = run_of(tmp_path, VIT)
    with pytest.raises(ExportError):
        save(encoder, tmp_path / "encoder", EncoderConfig(name=VIT.name, args={**TINY, "depth": 3}))
    assert torch.equal(features(load_timm(tmp_path / "encoder")), features(encoder))


def test_not_a_number_is_not_exported(tmp_path):
    encoder = encoder_of(VIT)
    encoder.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="finite"):
        save(encoder, tmp_path / "encoder", VIT)


def test_a_file_in_the_way_is_explained(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="file in the way"):
        save(encoder_of(VIT), tmp_path / "run" / "encoder", VIT)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvision_resnets_as_the_readme_says(tmp_path, name):
    encoder = run_of(tmp_path / "run", EncoderConfig(name=name))
    usage = export_run(tmp_path / "run", tmp_path / "out", "torchvision")
    scope = {}
    exec(usage, scope)
    torch.testing.assert_close(features(scope["encoder"]), features(encoder), rtol=1e-4, atol=1e-4)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f'torchvision.models.get_model("{name}")' in readme and "32 px" in readme and "[0.1, 0.2, 0.3]" in readme
    plain = torchvision.models.get_model(name).state_dict().keys()
    assert plain - load_file(tmp_path / "out" / "model.safetensors").keys() == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_torchvision_vit_as_the_readme_says(tmp_path):
    config = EncoderConfig(name="vit_base_patch32_224", args={"patch_size": 32})  # said, so that 2x2 patches are taken
    encoder = run_of(tmp_path / "run", config, size=64)
    usage = export_run(tmp_path / "run", tmp_path / "out", "torchvision")
    assert '"vit_b_32", image_size=64' in usage
    scope = {}
    exec(usage, scope)
    torch.testing.assert_close(features(scope["encoder"], 64), features(encoder, 64), rtol=1e-3, atol=1e-3)


def test_a_tiny_vit_is_the_same_function_in_torchvision():
    ours = encoder_of(VIT)
    theirs = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128)
    theirs.heads = nn.Identity()
    theirs.load_state_dict({vit_name(name): value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(features(theirs), features(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "large" in name else []) for name in TORCHVISION]
)
def test_torchvision_has_the_same_tensors_under_the_new_names(name):
    """Names and shapes, without memory for weights."""
    other = TORCHVISION[name]
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=0).state_dict()
        theirs = torchvision.models.get_model(other)
    setattr(theirs, head(other), nn.Identity())
    renamed = {vit_name(key) if other.startswith("vit") else key: value.shape for key, value in ours.items()}
    assert renamed == {key: value.shape for key, value in theirs.state_dict().items()}


def test_changed_architectures_are_refused_by_torchvision(tmp_path):
    run_of(tmp_path / "run", EncoderConfig(name="resnet18", args={"stem_type": "deep", "stem_width": 32}))
    with pytest.raises(UsageError, match=r"stem_type.*plain one.*--to timm"):
        export_run(tmp_path / "run", tmp_path / "out", "torchvision")
    assert not (tmp_path / "out").exists()


def test_timm_export_loads_from_its_new_place(tmp_path):
    encoder = run_of(tmp_path / "run", VIT)
    scope = {}
    exec(export_run(tmp_path / "run", tmp_path / "shared" / "out", "timm"), scope)
    assert torch.equal(features(scope["encoder"]), features(encoder))
    assert sorted(os.listdir(tmp_path / "shared" / "out")) == ["README.md", "config.json", "model.safetensors"]


def test_refuses_runs_without_encoder_full_folders_and_damage(tmp_path):
    with pytest.raises(UsageError, match="holds no exported encoder"):
        export_run(tmp_path, tmp_path / "out", "timm")
    run_of(tmp_path / "run", VIT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists already"):
        export_run(tmp_path / "run", tmp_path / "full", "timm")
    (tmp_path / "run" / "encoder" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        export_run(tmp_path / "run", tmp_path / "out", "torchvision")
