"""Rates of layers against the rule written out, timm's own groups, and steps by hand."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from manifests.errors import UsageError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import final, train
from trainer.engine.layer_decay import layer_scales
from trainer.engine.optim import OptimConfig, Schedule, make_optimiser
from trainer.tuners.base import TunerConfig, make_tuner
from trainer.tuners.spec import parse

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def vit(seed=0, **args):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{"num_classes": 0, **SMALL, **args})


class WithHead(nn.Module):
    """An encoder and a head, as a method has them."""

    def __init__(self, **args):
        super().__init__()
        self.network = vit(**args)
        self.head = nn.Linear(16, 5)


def schedule(config):
    return Schedule(config=config, batch_size=256, total_steps=10, steps_per_epoch=5)


def rates(module, config, encoder, step=0):
    """Learning rate of each trained parameter by name."""
    optimiser = make_optimiser(module, config, encoder)
    schedule(config).apply(optimiser, step)
    of_parameter = {id(one): group["lr"] for group in optimiser.param_groups for one in group["params"]}
    return {name: of_parameter[id(one)] for name, one in module.named_parameters() if one.requires_grad}


def stepped(config, steps=2):
    module = WithHead()
    optimiser = make_optimiser(module, config, module.network)
    draw = torch.Generator().manual_seed(7)
    for step in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        schedule(config).apply(optimiser, step)
        optimiser.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rates_of_a_vit_are_maes(pool):
    """`lr_decay.py` of facebookresearch/mae: layer 0, blocks from 1, all the rest layer L = depth + 1."""
    module = WithHead(global_pool=pool, reg_tokens=2)
    config = OptimConfig(lr=8.0, layer_decay=0.5, warmup_epochs=0, reference_batch=None)
    found = rates(module, config, module.network)
    embeddings = ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    assert {name: found.pop(f"network.{name}") for name in embeddings} == dict.fromkeys(embeddings, 0.5)
    for name, rate in found.items():
        place = name.split(".")
        expected = [1.0, 2.0, 4.0][int(place[2])] if place[1] == "blocks" else 8.0
        assert rate == expected, name
    assert {"head.weight", "head.bias", f"network.{'fc_' if pool == 'avg' else ''}norm.weight"} <= found.keys()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet10t", {}),
        ("convnext_atto", {}),
        ("efficientnet_lite0", {}),
        ("swin_s3_tiny_224", {}),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
    ],
)
def test_other_encoders_have_timms_layers(name, args):
    model = timm.create_model(name, num_classes=3, **args)
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.7) for p in g["params"]}
    found = layer_scales(model, 0.7)
    assert len(set(found.values())) > 4
    for parameter, value in model.named_parameters():
        if not parameter.startswith("norm."):  # timm has it in the last block
            assert found[parameter] == pytest.approx(theirs[id(value)]), parameter


def test_without_a_classifier_an_encoder_has_the_same_rates():
    with_head, without = (layer_scales(timm.create_model("resnet10t", num_classes=n), 0.7) for n in (3, 0))
    assert without == {name: scale for name, scale in with_head.items() if not name.startswith("fc.")}


def test_last_blocks_count_from_the_head():
    encoder = vit()
    tuner = make_tuner(encoder, parse("last-blocks:2"), TunerConfig())
    config = OptimConfig(lr=1.0, layer_decay=0.5, warmup_epochs=0, reference_batch=None)
    found = rates(tuner.model, config, encoder)
    assert {name.split(".")[1]: rate for name, rate in found.items()} == {"1": 0.25, "2": 0.5}


@pytest.mark.parametrize("text", ["lora:2", "block-expansion:1"])
def test_adapters_have_the_rates_of_their_blocks(text):
    encoder = vit()
    tuner = make_tuner(encoder, parse(text), TunerConfig())
    config = OptimConfig(lr=1.0, layer_decay=0.5, warmup_epochs=0, reference_batch=None)
    found = rates(tuner.model, config, encoder)
    expected = [0.125, 0.25, 0.5]
    assert found
    assert all(rate == expected[int(name.split("blocks.")[1].split(".")[0])] for name, rate in found.items())


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_a_decay_of_one_changes_nothing(name):
    settings = {"name": name, "lr": 0.1, "weight_decay": 0.1, "warmup_epochs": 0}
    plain, decayed = stepped(OptimConfig(**settings)), stepped(OptimConfig(**settings, layer_decay=1.0))
    assert all(torch.equal(plain[parameter], decayed[parameter]) for parameter in plain)


def test_an_sgd_step_by_hand():
    config = OptimConfig(
        name="sgd", lr=0.1, momentum=0.0, layer_decay=0.5, weight_decay=0.01, warmup_epochs=0, bias_lr=0.2
    )
    before, after = dict(WithHead().named_parameters()), stepped(config, steps=1)
    draw = torch.Generator().manual_seed(7)
    scales = {"network.pos_embed": 1 / 16, "network.blocks.0.mlp.fc1.weight": 1 / 8, "network.blocks.2.norm1.bias": 0.5}
    for name, start in before.items():
        gradient = torch.randn(start.shape, generator=draw)
        if name in scales:
            rate, decay = (0.2, 0.0) if name.endswith("bias") else (0.1, 0.01)
            expected = start - rate * scales[name] * (gradient + decay * start)
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)


def test_without_it_groups_are_the_two_that_they_were():
    module = WithHead()
    groups = make_optimiser(module, OptimConfig(), module.network).param_groups
    assert len(groups) == 2
    assert all("scale" not in group for group in groups)


def test_an_encoder_whose_layers_nobody_knows_is_refused():
    with pytest.raises(UsageError, match=r"optim\.layer_decay is 0\.5, and timm does not say .* Linear"):
        make_optimiser(nn.Linear(2, 2), OptimConfig(layer_decay=0.5))


@pytest.mark.parametrize("value", [0.0, 1.1, -0.5])
def test_a_decay_that_cannot_work_is_refused(value):
    with pytest.raises(UsageError, match=r"optim\.layer_decay is .*; give a number above 0 up to 1, or null"):
        OptimConfig(layer_decay=value)


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_pre_training_takes_it_too(tmp_path, method):
    outcome = train(write_pairs(tmp_path / "pairs", 24), tmp_path / "run", method, steps=2, optim__layer_decay=0.5)
    assert outcome.state == "finished"
    groups = final(tmp_path / "run").optimiser["param_groups"]
    assert {group["scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}, "stem, two blocks, and norm with head"
