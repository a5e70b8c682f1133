"""`--init`: every source, the layouts of others' checkpoints, resampled positions, and what is refused."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from manifests.errors import UsageError
from trainer.export import save_encoder
from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.nn.init import initialise

VIT = EncoderConfig(name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})
RESNET = EncoderConfig(name="resnet10t")


def encoder_of(config=VIT, size=32, seed=0):
    torch.manual_seed(seed)
    return make_encoder(config, size)


@pytest.fixture
def source():
    return encoder_of(seed=1)


def state_of(model, prefix=""):
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def heads(*names):
    return {f"{name}.weight": torch.ones(3, 3) for name in names}


def test_a_run_folder_its_encoder_and_its_file(tmp_path, source):
    save_encoder(source, tmp_path / "run" / "encoder", config=VIT, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    for spec in ("run", "run/encoder", "run/encoder/model.safetensors"):
        encoder = encoder_of()
        line = initialise(encoder, str(tmp_path / spec))
        assert same(encoder, source) and str(tmp_path / spec) in line and f"{len(source.state_dict())} tensors" in line


def test_timm_by_a_local_folder(tmp_path, source):
    save_encoder(source, tmp_path / "encoder", config=VIT, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = encoder_of()
    assert "timm:local-dir:" in initialise(encoder, f"timm:local-dir:{tmp_path / 'encoder'}")
    assert same(encoder, source)


def test_timm_by_name_takes_timms_pretrained_weights(tmp_path, monkeypatch):
    """timm's own way of loading by name, its download replaced by a local file."""
    pretrained = timm.create_model("resnet10t", num_classes=1000)
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    plain = timm.create_model

    def offline(name, **keywords):
        return plain(name, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}, **keywords)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder = encoder_of(RESNET)
    initialise(encoder, "timm:resnet10t")
    assert all(torch.equal(value, pretrained.state_dict()[name]) for name, value in encoder.state_dict().items())


# How public repositories save: the keys of their checkpoints around the encoder's own names.
LAYOUTS = {
    "timm with a classifier": lambda right, wrong: {**state_of(right), **heads("head", "fc")},
    "torch.nn.DataParallel": lambda right, wrong: state_of(right, "module."),
    "torch.compile": lambda right, wrong: state_of(right, "_orig_mod."),
    "DINO, whole": lambda right, wrong: {
        "student": state_of(wrong, "module.backbone.") | heads("module.head.mlp"),
        "teacher": state_of(right, "backbone.") | heads("head.last_layer"),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
    },
    "DINOv2 teacher": lambda right, wrong: {
        "teacher": state_of(right, "backbone.") | {"backbone.mask_token": torch.ones(1, 8)} | heads("dino_head.mlp")
    },
    "MoCo v2": lambda right, wrong: {
        "epoch": 3,
        "arch": "vit",
        "state_dict": state_of(right, "module.encoder_q.")
        | state_of(wrong, "module.encoder_k.")
        | heads("module.encoder_q.fc")
        | {"module.queue": torch.ones(4, 4)},
    },
    "MoCo v3": lambda right, wrong: {
        "state_dict": state_of(wrong, "module.momentum_encoder.")
        | state_of(right, "module.base_encoder.")
        | heads("module.base_encoder.head.0", "module.predictor.0")
    },
    "lightly DINO": lambda right, wrong: {
        "state_dict": state_of(wrong, "student_backbone.")
        | state_of(right, "teacher_backbone.")
        | heads("teacher_head")
    },
    "lightly SimCLR": lambda right, wrong: {
        "state_dict": state_of(right, "backbone.") | heads("projection_head.layers.0"),
        "hyper_parameters": {},
    },
    "solo-learn": lambda right, wrong: {
        "state_dict": state_of(right, "backbone.") | state_of(wrong, "momentum_backbone.") | heads("classifier")
    },
    "MAE": lambda right, wrong: {
        "model": state_of(right) | heads("decoder_blocks.0", "decoder_pred") | {"mask_token": torch.ones(1, 8)}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_layouts_of_others(tmp_path, layout, config):
    right, wrong, encoder = (encoder_of(config, seed=seed) for seed in (1, 2, 3))
    torch.save(LAYOUTS[layout](right, wrong), tmp_path / "checkpoint.pth")
    initialise(encoder, str(tmp_path / "checkpoint.pth"))
    assert same(encoder, right)


def test_the_line_says_what_was_left_out(tmp_path, source):
    save_file(state_of(source, "backbone.") | heads("backbone.head"), tmp_path / "weights.safetensors")
    line = initialise(encoder_of(), str(tmp_path / "weights.safetensors"))
    assert "prefix 'backbone.' removed" in line and "without head" in line and "\n" not in line


def test_batch_norms_without_counters(tmp_path):
    right, encoder = encoder_of(RESNET, seed=1), encoder_of(RESNET, seed=2)
    old = {name: value for name, value in state_of(right).items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "old.pt")
    initialise(encoder, str(tmp_path / "old.pt"))
    assert same(encoder, right)


@pytest.mark.parametrize(("old", "new"), [(32, 64), (64, 32)])
def test_positions_are_resampled_as_timm_does(tmp_path, old, new):
    source, encoder = encoder_of(size=old, seed=1), encoder_of(size=new, seed=2)
    save_file(state_of(source), tmp_path / "weights.safetensors")
    line = initialise(encoder, str(tmp_path / "weights.safetensors"))
    wanted = checkpoint_filter_fn(state_of(source), encoder)
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.state_dict().items())
    assert encoder.pos_embed.shape[1] == 1 + (new // 8) ** 2
    assert f"positions resampled from {old // 8}x{old // 8} to {new // 8}x{new // 8}" in line


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    deeper = EncoderConfig(name=VIT.name, args={**VIT.args, "depth": 3, "num_heads": 4, "mlp_ratio": 2})
    save_file(state_of(encoder_of(deeper)), tmp_path / "weights.safetensors")
    encoder = encoder_of()
    before = state_of(encoder)
    with pytest.raises(UsageError) as caught:
        initialise(encoder, str(tmp_path / "weights.safetensors"))
    message = str(caught.value)
    assert "12 unexpected: blocks.2.attn.proj.bias, " in message
    assert "6 of another shape: blocks.0.mlp.fc1.weight (64, 32) instead of (128, 32)" in message
    assert "--encoder" in message and "missing" not in message
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in before.items())


def test_weights_of_another_network_are_missing(tmp_path):
    torch.save(state_of(encoder_of(RESNET)), tmp_path / "resnet.pth")
    with pytest.raises(UsageError, match=r"30 missing: cls_token, pos_embed, patch_embed\.proj\.weight, \.\.\."):
        initialise(encoder_of(), str(tmp_path / "resnet.pth"))


def test_a_patch_of_another_size_is_not_resampled(tmp_path):
    other = EncoderConfig(name=VIT.name, args={**VIT.args, "patch_size": 4})
    torch.save(state_of(encoder_of(other, size=16)), tmp_path / "other.pth")  # 4x4 patches too, of 4 px
    with pytest.raises(UsageError, match=r"1 of another shape: patch_embed\.proj\.weight"):
        initialise(encoder_of(), str(tmp_path / "other.pth"))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_checkpoint_runs(tmp_path, source, legacy):
    content = {"state_dict": state_of(source), "bomb": Bomb()}
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match="could run code"):
        initialise(encoder_of(), str(tmp_path / "bomb.pth"))


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "bomb.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(UsageError, match=r"code|cannot be read"):
        initialise(encoder_of(), str(tmp_path / "bomb.bin"))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nowhere", "no such file or folder"),
        ("resnet18", "did you mean timm:resnet18"),
        ("timm:resnet_18", "did you mean"),
        ("timm:resnet18_cifar", "could not load pretrained weights"),
        ("empty", "holds no encoder"),
        ("broken.safetensors", "cannot be read as a checkpoint"),
        ("broken.pth", "cannot be read as a checkpoint|could run code"),
        ("nothing.pth", "it holds epoch, note"),
    ],
)
def test_errors_say_what_to_do(tmp_path, monkeypatch, spec, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "broken.pth").write_bytes(b"nothing of the kind")
    torch.save({"epoch": 1, "note": "no weights"}, tmp_path / "nothing.pth")
    with pytest.raises(UsageError, match=match):
        initialise(encoder_of(), spec)
