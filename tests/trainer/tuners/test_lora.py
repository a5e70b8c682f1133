"""LoRA of query and value, against the product written out; which layers are adapted; what other PEFT users see."""

import pytest
import timm
import torch
from peft import PeftModel

from manifests.errors import DiffmixError, UsageError
from tests.trainer.tuners.small import RESNET, VIT, encoder, features, images, train, tuner
from trainer.nn.encoders import EncoderConfig
from trainer.tuners.base import TunerConfig, make_tuner
from trainer.tuners.spec import parse

EVA = EncoderConfig(
    name="eva02_tiny_patch14_224",
    args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg"},
)
EVA_APART = EncoderConfig(name=EVA.name, args={**EVA.args, "qkv_fused": False})
BEIT = EncoderConfig(
    name="beit_base_patch16_224", args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
)
SWIN = EncoderConfig(
    name="swin_tiny_patch4_window7_224",
    args={"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 32},
)


def test_parameters_are_counted_as_in_the_paper():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    vit = vit.to_empty(device="cpu")
    assert make_tuner(vit, parse("lora:4"), TunerConfig()).num_trainable == 147_456


@pytest.mark.parametrize("config", [VIT, EVA, BEIT, SWIN], ids=lambda config: config.name)
def test_features_are_those_of_dense_weights(config):
    """W + alpha/r * B A for the rows of query and value, computed in float64 from the tensors of the adapter."""
    rank, alpha = 3, 6.0
    adapted = train(tuner(f"lora:{rank}", config, lora_alpha=alpha), steps=2)
    dense = encoder(config).double()
    for name, layer in adapted.encoder.named_modules():
        if name.endswith(".qkv"):
            down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            width = len(up) // 2
            weight = dense.get_submodule(name).weight.data
            weight[:width] += alpha / rank * up[:width] @ down[:rank]
            weight[-width:] += alpha / rank * up[width:] @ down[rank:]
    wanted = features(dense, images().double())
    assert (wanted - features(encoder(config))).abs().max() > 1e-3
    torch.testing.assert_close(features(adapted.model).double(), wanted, atol=1e-5, rtol=1e-5)
    plain, changed = adapted.merged()
    torch.testing.assert_close(features(plain).double(), wanted, atol=1e-5, rtol=1e-5)
    assert changed == {}


@pytest.mark.parametrize("config", [EVA, BEIT], ids=lambda config: config.name)
def test_attention_that_never_calls_its_layer(config):
    adapted = train(tuner("lora:2", config))
    assert not torch.equal(features(adapted.model), features(encoder(config)))
    with adapted.disabled():
        assert torch.equal(features(adapted.model), features(encoder(config)))
    with pytest.raises(UsageError, match=r"without calling.*lora_targets=qv"):
        tuner("lora:2", config, lora_targets="all")


def test_query_and_value_with_layers_of_their_own():
    adapted = tuner("lora:2", EVA_APART)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.trainable()}
    assert names == {"q_proj", "v_proj"}
    assert adapted.num_trainable == 2 * 4 * 2 * 32


def test_plain_peft_loads_what_was_saved(tmp_path):
    adapted = train(tuner("lora:4"))
    adapted.save(tmp_path)
    loaded = PeftModel.from_pretrained(encoder(), tmp_path).eval()
    torch.testing.assert_close(features(loaded), features(adapted.model), atol=1e-5, rtol=1e-5)


def test_adapter_that_changes_the_key_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted = tuner("lora:4")
    adapted.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value + 1 if "lora_B" in key else value for key, value in load_file(file).items()}, file)
    with pytest.raises(DiffmixError, match="key"):
        adapted.load(tmp_path)


def test_all_linear_layers_of_the_blocks():
    adapted = tuner("lora:2", lora_targets="all")
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in adapted.trainable()}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == {f"blocks.{number}.{part}" for number in range(4) for part in parts}


def test_convnet():
    with pytest.raises(UsageError, match=r"no attention.*lora_targets=all"):
        tuner("lora:2", RESNET)
    adapted = train(tuner("lora:2", RESNET, lora_targets="all"), steps=1, lr=1e-3)
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in adapted.trainable()}
    convolutions = {name for name, module in encoder(RESNET).named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert layers == convolutions - {"conv1"}
    wanted = features(adapted.model)
    plain, _ = adapted.merged()
    torch.testing.assert_close(features(plain), wanted, atol=1e-4, rtol=1e-4)


def test_scale_and_dropout():
    adapted = tuner("lora:4", lora_alpha=8.0, lora_dropout=0.5)
    layer = adapted.encoder.blocks[0].attn.qkv
    assert layer.scaling["default"] == 2.0
    adapted.train()
    assert layer.lora_dropout["default"].training and not layer.base_layer.training
    train(adapted)
    assert not torch.equal(features(adapted.model), features(encoder()))


def test_another_scale_is_refused(tmp_path):
    tuner("lora:4", lora_alpha=8.0).save(tmp_path)
    with pytest.raises(DiffmixError, match="lora_alpha"):
        tuner("lora:4").load(tmp_path)


@pytest.mark.parametrize("text", ["prompt-tuning", "prefix-tuning", "adaption-prompt", "cpt", "trainable-tokens"])
def test_methods_of_language_models_are_refused(text):
    with pytest.raises(UsageError, match="language model"):
        tuner(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("adalora", "schedule"), ("xlora", "trained before"), ("poly", "number of a task"), ("ia3:4", "no rank")],
)
def test_methods_that_cannot_be_used_as_asked(text, said):
    with pytest.raises(UsageError, match=said):
        tuner(text)
