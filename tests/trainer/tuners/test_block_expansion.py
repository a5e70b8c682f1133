"""Block Expansion through PEFT's own functions, on timm's families of blocks and on transformers' models."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.optim import param_groups_layer_decay
from torch import nn

from manifests.errors import UsageError
from tests.trainer.tuners.small import encoder, features, images, state, train, tuner
from trainer.tuners.block_expansion import BlockExpansionConfig, new_block_positions, register

SMALL = {"num_classes": 0, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
FAMILIES = {
    "vit_tiny_patch16_224": {"global_pool": "avg"},
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.1},
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 2.0},
    "deit3_small_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3": {},
    "beit_base_patch16_224": {},
}
families = pytest.mark.parametrize("name", FAMILIES)


def timm_model(name, seed=0, **overrides):
    """Random everywhere, biases and scales too, so that a copy that is not the identity shows."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **SMALL | FAMILIES.get(name, {}) | overrides).eval()
    return _shaken(model)


def _shaken(model):
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    return model


def transformers_model(name, seed=0):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    extra = {"intermediate_size": 64} if name in ("ViT", "DINOv3ViT") else {"mlp_ratio": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **extra)
    torch.manual_seed(seed)
    return _shaken(getattr(transformers, f"{name}Model")(config).eval())


def expanded(model, count=2, **settings):
    return get_peft_model(model, BlockExpansionConfig(num_new_blocks=count, **settings)).eval()


def trained(model, call=lambda model: model(images()), steps=3):
    optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 0.01)
    for _ in range(steps):
        call(model).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.mark.parametrize(
    ("depth", "count", "wanted"),
    [
        (12, 4, [2, 5, 8, 11]),
        (12, 3, [3, 7, 11]),
        (12, 2, [5, 11]),
        (12, 1, [10]),
        (12, 5, [1, 3, 6, 8, 11]),
        (1, 1, [0]),
        (2, 1, [0]),
    ],
)
def test_positions_of_the_paper(depth, count, wanted):
    assert new_block_positions(depth, count) == wanted


@given(depth=st.integers(1, 60), share=st.floats(0, 1))
def test_positions_are_distinct_and_inside(depth, share):
    count = max(1, round(share * depth))
    positions = new_block_positions(depth, count)
    assert sorted(set(positions)) == positions and len(positions) == count
    assert positions[0] >= 0 and positions[-1] < depth


@pytest.mark.parametrize("count", [0, 13])
def test_more_copies_than_blocks(count):
    with pytest.raises(UsageError, match="1 to 12"):
        new_block_positions(12, count)


@families
def test_identity_then_trained_then_exactly_the_original(name):
    original = timm_model(name)
    model = expanded(timm_model(name))
    assert torch.equal(features(model), features(original))
    before = state(model)
    trained(model)
    assert not torch.equal(features(model), features(original))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (".block_expansion_blocks." not in key), key
    with model.disable_adapter():
        assert torch.equal(features(model), features(original))
    assert torch.equal(features(model.unload()), features(original))


@families
def test_saved_and_loaded_under_another_name(name, tmp_path):
    model = trained(expanded(timm_model(name)))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).num_new_blocks == 2
    loaded = PeftModel.from_pretrained(timm_model(name), tmp_path, adapter_name="other").eval()
    assert torch.equal(features(loaded), features(model))
    assert not any(value.requires_grad for value in loaded.parameters())
    further = PeftModel.from_pretrained(timm_model(name), tmp_path, is_trainable=True)
    assert sum(value.requires_grad for value in further.parameters()) > 0


@families
def test_a_plain_deeper_model(name):
    adapted = _tuner_of(timm_model(name), "block-expansion:2")
    trained(adapted.model)
    plain, changed = adapted.merged()
    assert changed == {"depth": 5}
    rebuilt = timm_model(name, seed=4, depth=5)
    rebuilt.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(features(rebuilt), features(adapted.model))
    assert torch.equal(features(plain), features(adapted.model))


def _tuner_of(model, text):
    from trainer.tuners.base import TunerConfig, make_tuner
    from trainer.tuners.spec import parse

    adapted = make_tuner(model, parse(text), TunerConfig())
    adapted.model.eval()
    return adapted


def test_only_the_zeroed_layers_get_a_gradient_at_first():
    """dL/dB of y = x + B a(x) is (dL/dy) a(x)^T; all that lies inside a(x) sees B^T dL/dy, which is zero."""
    model = expanded(encoder(), count=1)
    inputs, outputs = {}, {}
    block = model.base_model.model.blocks[2].block_expansion_blocks["default"]

    def keep(layer, given, made):
        inputs["a"] = given[0].detach()
        made.register_hook(lambda gradient: outputs.update(g=gradient))

    handle = block.mlp.fc2.register_forward_hook(keep)
    model(images()).square().mean().backward()
    handle.remove()
    moved = {name for name, value in block.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    wanted = torch.einsum("nlo,nli->oi", outputs["g"], inputs["a"])
    torch.testing.assert_close(block.mlp.fc2.weight.grad, wanted)


def test_gradients_are_those_of_the_deeper_model():
    """Of every new parameter, in the plain model with the same weights."""
    adapted = train(tuner("block-expansion:2"), steps=2)
    plain, _ = adapted.merged()
    adapted.model(images()).square().mean().backward()
    plain(images()).square().mean().backward()
    gradients = {
        f"blocks.{place}.{name}": value.grad
        for place, block in ((2, 1), (5, 3))
        for name, value in adapted.encoder.blocks[block].block_expansion_blocks["default"].named_parameters()
    }
    theirs = dict(plain.named_parameters())
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name].grad)


def test_nothing_is_kept_for_the_blocks_below_the_first_new_one():
    model = expanded(encoder(), count=1)
    needs = {}
    for number, block in enumerate(model.base_model.model.blocks):
        block.register_forward_hook(
            lambda layer, given, made, number=number: needs.update({number: made.requires_grad})
        )
    model(images())
    assert needs == {0: False, 1: False, 2: True, 3: True}


def test_number_of_parameters():
    vit = encoder()
    block = sum(value.numel() for value in vit.blocks[0].parameters())
    assert expanded(vit, 2).get_nb_trainable_parameters()[0] == 2 * block


def test_intermediate_features_and_layer_decay_see_the_old_numbers():
    model = trained(expanded(encoder()))
    vit = model.base_model.model
    with torch.no_grad():
        final, middle = vit.forward_intermediates(images())
        _, original = encoder().forward_intermediates(images())
    assert [torch.equal(ours, theirs) for ours, theirs in zip(middle, original, strict=True)] == [True] + 3 * [False]
    assert torch.equal(final[:, 0], features(model))
    names = {id(value): name for name, value in vit.named_parameters()}
    groups = param_groups_layer_decay(vit, layer_decay=0.5)
    scales = {names[id(value)].split(".")[1]: group["lr_scale"] for group in groups for value in group["params"]}
    assert scales.keys() == {"1", "3"} and scales["1"] == 0.5**2 * scales["3"]


@families
def test_gradient_checkpointing(name):
    plain = trained(expanded(timm_model(name)), steps=1)
    saving = copy.deepcopy(plain)
    saving.base_model.model.set_grad_checkpointing()
    for model in (plain, saving):
        model.train()
        model(images()).square().mean().backward()
    theirs = dict(plain.named_parameters())
    for key, value in saving.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, theirs[key].grad)


def test_several_adapters_at_once_and_deleted():
    model = trained(expanded(encoder()))
    first = features(model)
    model.add_adapter("second", BlockExpansionConfig(num_new_blocks=3))
    assert torch.equal(features(model), first)
    model.set_adapter("second")
    assert torch.equal(features(model), features(encoder()))
    trained(model)
    second = features(model)
    model.base_model.set_adapter(["default", "second"])
    both = features(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.base_model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(features(model), second)
    assert not any(".default." in key for key in model.state_dict())


def test_drop_path_of_copies_and_of_frozen_blocks():
    adapted = _tuner_of(encoder(drop_path_rate=0.5), "block-expansion:2")
    adapted.train()
    layer = adapted.encoder.blocks[3]
    assert layer.block_expansion_blocks["default"].drop_path1.training
    assert not layer.base_layer.drop_path1.training
    assert torch.equal(adapted.model(images()), features(encoder()))


def test_chosen_positions_and_names_that_only_end_alike():
    model = expanded(encoder(), positions=[0, 2])
    assert model.peft_config["default"].target_modules == ["blocks.0", "blocks.2"]
    with pytest.raises(UsageError, match="0 to 3"):
        expanded(encoder(), positions=[4])
    both = nn.ModuleDict({"student": encoder(), "teacher": encoder()})
    with pytest.raises(UsageError, match=r"student\.blocks, teacher\.blocks"):
        expanded(both)


def test_an_adapter_of_a_deeper_encoder_is_refused(tmp_path):
    expanded(encoder(), 2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"blocks\.3: VisionTransformer has .*blocks\.1, blocks\.2;"):
        PeftModel.from_pretrained(timm_model("vit_tiny_patch16_224"), tmp_path)
    with pytest.raises(UsageError, match=r"blocks\.0\.attn"):
        expanded(encoder(), target_modules=["blocks.0.attn"])


def test_merging_says_what_to_do():
    with pytest.raises(UsageError, match="trainer export"):
        expanded(encoder()).merge_and_unload()


def test_registering_twice_is_harmless():
    register()
    assert torch.equal(features(expanded(encoder())), features(encoder()))


@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock])
def test_blocks_that_cannot_be_the_identity_are_named(block):
    with pytest.raises(UsageError, match=block.__name__):
        expanded(timm.create_model("vit_tiny_patch16_224", block_fn=block, **SMALL))


@pytest.mark.parametrize(("name", "said"), [("resnet18", "BasicBlock"), ("swin_tiny_patch4_window7_224", "Swin")])
def test_other_architectures_are_named(name, said):
    with pytest.raises(UsageError, match=said):
        expanded(timm.create_model(name, num_classes=0))


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_transformers_models(name, tmp_path):
    def last(model):
        with torch.no_grad():
            return model(pixel_values=images()).last_hidden_state

    original, model = transformers_model(name), expanded(transformers_model(name))
    assert torch.equal(last(model), last(original))
    before = state(model)
    trained(model, lambda model: model(pixel_values=images()).last_hidden_state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (".block_expansion_blocks." not in key), key
    with model.disable_adapter():
        assert torch.equal(last(model), last(original))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(transformers_model(name), tmp_path, adapter_name="other").eval()
    assert torch.equal(last(loaded), last(model)) and not torch.equal(last(model), last(original))
    assert torch.equal(last(model.unload()), last(original))
