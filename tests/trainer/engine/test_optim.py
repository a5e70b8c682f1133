"""Optimisers against the papers' formulas and the authors' code, schedules at hand-computed steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manifests.errors import UsageError
from trainer.engine.optim import OptimConfig, Schedule, clip_gradients, make_optimiser


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    layers[3].weight.requires_grad_(seed != 1)
    return layers


def gradients(module, scale=1.0):
    draw = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw) * scale
    return [parameter.grad.clone() for parameter in module.parameters()]


def schedule(total=100, per_epoch=10, batch=256, **config):
    return Schedule(config=OptimConfig(**config), batch_size=batch, total_steps=total, steps_per_epoch=per_epoch)


def stepped(config, steps=1, **how):
    """Parameters before and after, and their gradients."""
    module = network()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimiser = make_optimiser(module, config)
    plan = schedule(**how)
    plan = Schedule(config=config, batch_size=256, total_steps=plan.total_steps, steps_per_epoch=10)
    for step in range(steps):
        given_ = gradients(module)
        plan.apply(optimiser, step)
        optimiser.step()
    return before, given_, [parameter.detach() for parameter in module.parameters()]


def test_groups_are_weights_and_the_rest():
    module = network()
    weights, others = make_optimiser(module, OptimConfig(weight_decay=0.1)).param_groups
    assert {id(one) for one in weights["params"]} == {id(module[0].weight), id(module[3].weight)}
    assert {id(one) for one in others["params"]} == {
        id(module[0].bias),
        id(module[1].weight),
        id(module[1].bias),
        id(module[3].bias),
    }
    assert (weights["decays"], others["decays"]) == (True, False)


def test_biases_of_more_dimensions_do_not_decay_either():
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(1, 3))
    module.table = nn.Parameter(torch.zeros(2, 3))
    weights, others = make_optimiser(module, OptimConfig()).param_groups
    assert weights["params"] == [module.table]
    assert others["params"] == [module.bias]


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_frozen_parameters_are_in_no_group(name):
    module = network(seed=1)
    groups = make_optimiser(module, OptimConfig(name=name)).param_groups
    assert id(module[3].weight) not in {id(one) for group in groups for one in group["params"]}
    assert sum(len(group["params"]) for group in groups) == 5


def test_apply_sets_decay_only_for_weights_and_the_bias_rate():
    plan = schedule(lr=0.2, bias_lr=0.0048, final_lr=0.001, weight_decay=0.3, final_weight_decay=0.5, warmup_epochs=0)
    optimiser = make_optimiser(network(), plan.config)
    plan.apply(optimiser, 50)
    weights, others = optimiser.param_groups
    assert weights["lr"] == pytest.approx((0.2 + 0.001) / 2)
    assert others["lr"] == pytest.approx((0.0048 + 0.001 * 0.0048 / 0.2) / 2), "Barlow Twins scales all rates alike"
    assert weights["weight_decay"] == pytest.approx(0.4)
    assert others["weight_decay"] == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_is_you_et_al(weight_decay):
    """Algorithm 1 of arXiv:1708.03888, with the rate outside of the momentum as in the code of Barlow Twins."""
    config = OptimConfig(name="lars", lr=0.3, trust=0.02, momentum=0.9, weight_decay=weight_decay, warmup_epochs=0)
    module = network()
    reference = [parameter.detach().double() for parameter in module.parameters()]
    optimiser = make_optimiser(module, config)
    velocity = [torch.zeros_like(weight) for weight in reference]
    plan = Schedule(config=config, batch_size=256, total_steps=10, steps_per_epoch=5)
    for step in range(3):
        of_step = gradients(module)
        plan.apply(optimiser, step)
        optimiser.step()
        rate = 0.15 * (1 + math.cos(math.pi * step / 10))
        for number, (weight, gradient) in enumerate(zip(reference, of_step, strict=True)):
            change = gradient.double()
            if weight.ndim > 1:
                norms = weight.norm(), change.norm()
                change = change + weight_decay * weight
                change = change * 0.02 * norms[0] / (norms[1] + weight_decay * norms[0])
            velocity[number] = 0.9 * velocity[number] + change
            weight -= rate * velocity[number]
    for ours, theirs in zip(module.parameters(), reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def larc_step(weights, gradients_, momenta, *, trust, rate, momentum, weight_decay):
    """`LARC.step` of NVIDIA/apex with clip off, over torch's SGD, as SwAV's authors call it."""
    for number, (weight, gradient) in enumerate(zip(weights, gradients_, strict=True)):
        norm, of_gradient = weight.norm(), gradient.norm()
        if norm != 0 and of_gradient != 0:
            gradient = (gradient + weight_decay * weight) * trust * norm / (of_gradient + norm * weight_decay + 1e-8)
        momenta[number] = gradient if momenta[number] is None else momentum * momenta[number] + gradient
        weight -= rate * momenta[number]


def test_lars_without_exempt_biases_is_swavs_larc():
    config = OptimConfig(name="lars", lr=0.6, weight_decay=0.01, warmup_epochs=0, exempt_biases=False)
    module = network()
    nn.init.zeros_(module[1].bias)  # as BatchNorm starts: no trust ratio then
    reference = [parameter.detach().double() for parameter in module.parameters()]
    momenta = [None] * len(reference)
    optimiser = make_optimiser(module, config)
    plan = Schedule(config=config, batch_size=256, total_steps=10, steps_per_epoch=5)
    for step in range(3):
        of_step = [gradient.double() for gradient in gradients(module)]
        plan.apply(optimiser, step)
        optimiser.step()
        rate = 0.3 * (1 + math.cos(math.pi * step / 10))
        larc_step(reference, of_step, momenta, trust=0.001, rate=rate, momentum=0.9, weight_decay=0.01)
    for ours, theirs in zip(module.parameters(), reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_without_exempt_biases_all_decay_at_one_rate():
    plan = schedule(lr=0.2, weight_decay=0.3, warmup_epochs=0, exempt_biases=False)
    optimiser = make_optimiser(network(), plan.config)
    plan.apply(optimiser, 50)
    assert [(group["lr"], group["weight_decay"]) for group in optimiser.param_groups] == [(pytest.approx(0.1), 0.3)] * 2
    with pytest.raises(UsageError, match=r"optim\.bias_lr is 0\.1; give null where exempt_biases is false"):
        OptimConfig(exempt_biases=False, bias_lr=0.1)


def test_lars_with_clipped_trust_never_steps_further_than_sgd():
    settings = {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.01, "warmup_epochs": 0}
    before, _, lars = stepped(OptimConfig(name="lars", trust=1e3, trust_clip=True, **settings))
    _, given_, _ = stepped(OptimConfig(name="sgd", **settings))
    for start, gradient, end in zip(before, given_, lars, strict=True):
        decay = 0.01 if start.ndim > 1 else 0.0
        # timm clips trust * lr, LARC's way, at the learning rate
        assert torch.all((start - end).abs() <= 0.3 * (gradient + decay * start).abs() + 1e-6)


def test_adamw_by_hand():
    config = OptimConfig(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), warmup_epochs=0)
    module = network()
    reference = [parameter.detach().double() for parameter in module.parameters()]
    optimiser = make_optimiser(module, config)
    plan = Schedule(config=config, batch_size=512, total_steps=10, steps_per_epoch=5)
    first = [torch.zeros_like(weight) for weight in reference]
    second = [torch.zeros_like(weight) for weight in reference]
    for step in range(2):
        of_step = gradients(module)
        plan.apply(optimiser, step)
        optimiser.step()
        rate = 0.01 * (1 + math.cos(math.pi * step / 10))  # twice 0.01 at the top, since 512 = 2 * 256
        for number, (weight, gradient) in enumerate(zip(reference, of_step, strict=True)):
            weight -= rate * (0.1 if weight.ndim > 1 else 0.0) * weight
            first[number] = 0.8 * first[number] + 0.2 * gradient
            second[number] = 0.95 * second[number] + 0.05 * gradient.double() ** 2
            mean, square = first[number] / (1 - 0.8 ** (step + 1)), second[number] / (1 - 0.95 ** (step + 1))
            weight -= rate * mean / (square.sqrt() + 1e-8)
    for ours, theirs in zip(module.parameters(), reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_rates_of_a_run_by_hand():
    plan = schedule(total=400, per_epoch=4, batch=1024, lr=0.5, final_lr=0.1, warmup_epochs=10)
    assert plan.warmup_steps == 40
    assert [plan.lr(step) for step in (0, 10, 40, 220, 400)] == pytest.approx([0, 0.5, 2.0, 1.05, 0.1])


def test_rates_as_they_stand_without_a_reference_batch():
    assert schedule(batch=1024, lr=0.5, warmup_epochs=0, reference_batch=None).lr(0) == 0.5


def test_warmup_takes_at_most_a_tenth():
    plan = schedule(total=100, per_epoch=10, lr=1.0, warmup_epochs=5)
    assert (plan.asked_warmup_steps, plan.warmup_steps) == (50, 10)
    assert plan.lr(10) == 1.0


def test_warmup_takes_as_much_as_it_may():
    plan = schedule(total=300, per_epoch=1, lr=1.0, warmup_epochs=40, warmup_share=0.15)
    assert plan.warmup_steps == 40
    assert schedule(total=30, per_epoch=1, lr=1.0, warmup_epochs=40, warmup_share=0.15).warmup_steps == 4


def test_warmup_in_steps_wins_over_epochs():
    plan = schedule(total=100, per_epoch=10, lr=1.0, warmup_epochs=5, warmup_steps=4)
    assert plan.warmup_steps == 4
    assert [plan.lr(step) for step in (0, 2, 4)] == [0.0, 0.5, 1.0]


def test_warmup_from_a_rate_above_zero():
    swav = {"lr": 0.3, "warmup_lr": 0.3, "final_lr": 0.0048, "warmup_epochs": 10}
    plan = schedule(total=1000, per_epoch=10, batch=4096, **swav)
    assert [plan.lr(step) for step in (0, 50, 100, 1000)] == pytest.approx([0.3, 2.55, 4.8, 0.0048])
    small = schedule(total=1000, per_epoch=10, batch=64, **swav)
    assert [small.lr(step) for step in (0, 50, 100)] == pytest.approx([0.075] * 3), "never above the peak"
    slow = schedule(lr=0.2, bias_lr=0.1, warmup_lr=0.02, warmup_epochs=1, reference_batch=None)
    assert (slow.lr(0), slow.lr(0, bias=True)) == pytest.approx((0.02, 0.01))


def test_weight_decay_follows_a_cosine():
    plan = schedule(total=200, weight_decay=0.04, final_weight_decay=0.4)
    assert [plan.weight_decay(step) for step in (0, 100, 200)] == pytest.approx([0.04, 0.22, 0.4])
    assert schedule(weight_decay=0.04).weight_decay(77) == 0.04


@given(lr=st.floats(0, 10), final=st.floats(0, 10), step=st.integers(0, 99), batch=st.integers(1, 4096))
def test_rates_never_rise_above_the_peak(lr, final, step, batch):
    assert 0 <= schedule(batch=batch, lr=lr, final_lr=final).lr(step) <= lr * batch / 256 * (1 + 1e-9)


def dino_clip(parameters, clip):
    """`utils.clip_gradients` of facebookresearch/dino."""
    for parameter in parameters:
        if parameter.grad is not None:
            coefficient = clip / (parameter.grad.norm(2) + 1e-6)
            if coefficient < 1:
                parameter.grad.mul_(coefficient)


@given(clip=st.floats(0.01, 50), scale=st.floats(1e-3, 1e3))
def test_clip_by_parameter_is_dinos(clip, scale):
    ours, theirs = network(), network()
    total = torch.cat([one.flatten() for one in gradients(ours, scale)]).norm()
    gradients(theirs, scale)
    norm = clip_gradients(ours.parameters(), OptimConfig(clip=clip, clip_by="parameter"))
    dino_clip(theirs.parameters(), clip)
    assert norm.item() == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@given(clip=st.floats(0.01, 50), scale=st.floats(1e-3, 1e3))
def test_clip_by_all_is_torchs(clip, scale):
    ours, theirs = network(), network()
    gradients(ours, scale)
    gradients(theirs, scale)
    norm = clip_gradients(ours.parameters(), OptimConfig(clip=clip))
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_nothing_is_clipped_where_nothing_was_asked():
    module = network()
    before = gradients(module)
    assert clip_gradients(module.parameters(), OptimConfig()) is None
    assert all(torch.equal(one.grad, other) for one, other in zip(module.parameters(), before, strict=True))
    assert clip_gradients(network().parameters(), OptimConfig(clip=1.0)) is None, "no gradients at all"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("bias_lr", -1.0),
        ("weight_decay", -0.1),
        ("final_weight_decay", math.nan),
        ("warmup_epochs", -1.0),
        ("warmup_lr", -0.1),
        ("warmup_share", 1.1),
        ("clip", 0.0),
        ("reference_batch", 0),
        ("momentum", 1.0),
        ("betas", (0.9, 1.0)),
        ("trust", 0.0),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(setting, value):
    with pytest.raises(UsageError, match=rf"optim\.{setting} is .*; give "):
        OptimConfig(**{setting: value})
