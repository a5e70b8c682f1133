"""Two ranks with half of the batch each do what one process does with all of it."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.trainer.methods.small import MIDWAY, noise_views, part, plain_method, small_method
from tests.trainer.methods.test_barlow_twins import naive_terms
from tests.trainer.methods.test_byol import naive_byol_loss
from tests.trainer.methods.test_moco_v3 import naive_info_nce
from tests.trainer.methods.test_simclr import naive_nt_xent
from tests.trainer.methods.test_swav import naive_swav_loss
from tests.trainer.ranks import RANKS, on_ranks
from trainer.methods import METHODS
from trainer.methods.barlow_twins import barlow_terms
from trainer.methods.byol import byol_loss
from trainer.methods.moco_v3 import info_nce
from trainer.methods.simclr import nt_xent
from trainer.methods.swav import SwAVConfig, swapped_prediction
from trainer.nn.sinkhorn import sinkhorn

IMAGES = 8
QUEUED = 5  # images: not the same number on two ranks


def _projections(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, IMAGES, 4, generator=draw) + torch.randn(IMAGES, 4, generator=draw)


def _share():
    """The images of this rank: all where there is only one."""
    if not dist.is_initialized():
        return 0, IMAGES
    return dist.get_rank() * IMAGES // RANKS, (dist.get_rank() + 1) * IMAGES // RANKS


def _simclr(projections):
    return nt_xent(projections, 0.2).loss


def _barlow(projections):
    terms = barlow_terms(projections)
    return terms.on_diagonal + 0.3 * terms.off_diagonal


def _targets():
    """What another network makes of this rank's images."""
    start, stop = _share()
    return _projections(seed=1)[:, start:stop]


def _byol(projections):
    return byol_loss(projections, _targets())[0]


def _moco(projections):
    return info_nce(projections, _targets(), 0.2).loss


def _queued():
    """Scores of the queue, of which each rank has its part."""
    scores = torch.randn(2, QUEUED, 4, generator=torch.Generator().manual_seed(1)).tanh()
    return scores.tensor_split(RANKS, dim=1)[dist.get_rank()] if dist.is_initialized() else scores


def _swav(projections):
    return swapped_prediction(projections.tanh(), _queued(), SwAVConfig()).loss


def _assignments():
    start, stop = _share()
    return sinkhorn(torch.cat([_queued(), _projections()[:, start:stop].tanh()], dim=1), 0.05, 3)[:, start - stop :]


def _swav_with_queue():
    """Losses of a few steps, the last ones with a full queue, and what the steps leave."""
    method = small_method("swav", head_norm="none", local_crops=2, queue_length=2 * IMAGES, freeze_steps=0)
    model = DistributedDataParallel(method) if dist.is_initialized() else method
    progress = replace(MIDWAY, batch_size=IMAGES)
    losses = []
    for seed in range(4):
        loss = model(part(noise_views(method, IMAGES, seed), *_share()), progress).loss
        loss.backward()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        method.after_step(progress)
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "queue": method.queue, "prototypes": method.prototypes.weight.detach()}


GIVEN = {"simclr": _simclr, "barlow": _barlow, "swav": _swav, "byol": _byol, "moco": _moco}


def _loss_and_gradient(function):
    start, stop = _share()
    own = _projections()[:, start:stop].clone().requires_grad_()
    loss = function(own)
    loss.backward()
    return {"loss": loss.detach(), "gradient": own.grad}


def _micro_batches(views, parts):
    start, stop = _share()
    size = (stop - start) // parts
    return [part(views, start + size * number, start + size * (number + 1)) for number in range(parts)]


def _step(name, parts):
    """Gradients of a step of `parts` micro-batches and the buffers after it."""
    method = plain_method(name)
    model = DistributedDataParallel(method) if dist.is_initialized() else method
    losses = []
    for number, views in enumerate(_micro_batches(noise_views(method, IMAGES), parts)):
        if dist.is_initialized():
            model.require_backward_grad_sync = number == parts - 1
        output = model(views, MIDWAY)
        (output.loss / parts).backward()
        losses.append(output.loss.detach())
    method.before_update(MIDWAY)
    method.after_step(MIDWAY)
    gradients = {key: value.grad for key, value in method.named_parameters() if value.grad is not None}
    return {"loss": torch.stack(losses).mean(), "gradients": gradients, "buffers": dict(method.named_buffers())}


def _everything():
    torch.set_num_threads(1)
    return {
        **{name: _loss_and_gradient(function) for name, function in GIVEN.items()},
        "assignments": _assignments(),
        "queue": _swav_with_queue(),
        "steps": {name: _step(name, 1) for name in METHODS},
        "accumulated": _step("dino", 2),
    }


@pytest.fixture(scope="module")
def results():
    return on_ranks(_everything)


@pytest.mark.parametrize(("name", "function"), GIVEN.items(), ids=GIVEN)
def test_losses_of_given_projections(results, name, function):
    alone = _loss_and_gradient(function)
    losses = torch.stack([result[name]["loss"] for result in results])
    torch.testing.assert_close(losses.mean(), alone["loss"], atol=1e-6, rtol=1e-5)
    # A rank's gradient stands for all ranks' losses; DDP divides it by their number.
    gradient = torch.cat([result[name]["gradient"] for result in results], dim=1) / RANKS
    torch.testing.assert_close(gradient, alone["gradient"], atol=1e-6, rtol=1e-4)


def test_losses_of_given_projections_are_the_papers(results):
    projections = _projections().double()
    simclr = torch.stack([result["simclr"]["loss"] for result in results]).mean()
    torch.testing.assert_close(simclr.double(), naive_nt_xent(projections, 0.2), atol=1e-5, rtol=1e-5)
    targets = _targets().double()
    papers = {"byol": naive_byol_loss(projections, targets), "moco": naive_info_nce(projections, targets, 0.2)}
    for name, expected in papers.items():
        mean = torch.stack([result[name]["loss"] for result in results]).mean()
        torch.testing.assert_close(mean.double(), expected, atol=1e-5, rtol=1e-5)
    on, off = naive_terms(projections)
    for result in results:
        torch.testing.assert_close(result["barlow"]["loss"].double(), on + 0.3 * off, atol=1e-5, rtol=1e-5)
    swav = torch.stack([result["swav"]["loss"] for result in results]).mean()
    expected = naive_swav_loss(_projections().tanh().double(), _queued().double(), 2)
    torch.testing.assert_close(swav.double(), expected, atol=1e-5, rtol=1e-5)


def test_assignments_are_those_of_the_global_batch(results):
    found = torch.cat([result["assignments"] for result in results], dim=1)
    torch.testing.assert_close(found, _assignments(), atol=1e-6, rtol=1e-5)


def test_swav_with_a_queue_of_all_ranks(results):
    alone = _swav_with_queue()
    assert alone["queue"].any(-1).all()
    losses = torch.stack([result["queue"]["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, alone["losses"], atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0]["queue"]["queue"], results[1]["queue"]["queue"])
    for result in results:
        for name in ("queue", "prototypes"):
            torch.testing.assert_close(result["queue"][name], alone[name], atol=1e-5, rtol=1e-4)


def _check_step(steps, alone):
    losses = torch.stack([step["loss"] for step in steps])
    torch.testing.assert_close(losses.mean(), alone["loss"], atol=1e-5, rtol=1e-5)
    for step in steps:
        assert step["gradients"].keys() == alone["gradients"].keys()
        for key, gradient in alone["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(step["gradients"][key], gradient, atol=1e-4 * scale + 1e-7, rtol=1e-4)
        for key, value in alone["buffers"].items():
            torch.testing.assert_close(step["buffers"][key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_whole_steps(results, name):
    _check_step([result["steps"][name] for result in results], _step(name, 1))


def test_dino_in_micro_batches_over_ranks(results):
    # Its loss is a mean over images, so that micro-batches on ranks equal the whole batch at once.
    alone = _step("dino", 1)
    assert alone["buffers"]["center"].any()
    _check_step([result["accumulated"] for result in results], alone)
