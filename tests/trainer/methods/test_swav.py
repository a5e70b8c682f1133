"""SwAV's loss by hand and against loops; what it does around it: prototypes, freeze, queue, multi-crop."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from manifests.errors import UsageError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import assert_same_run, final, train
from tests.trainer.methods.small import MIDWAY, START, noise_views, part, small_method
from tests.trainer.nn.test_sinkhorn import naive_sinkhorn
from trainer.engine import checkpoint
from trainer.methods.base import Progress
from trainer.methods.swav import SwAVConfig, swapped_prediction

BATCH = 4
FULL = dataclasses.replace(MIDWAY, batch_size=BATCH)


def naive_swav_loss(scores, queued, views, temperature=0.1, epsilon=0.05):
    """The authors' loop over crops: scores [V + W, B, K], queued [V, Q, K], in their dtype; images one by one."""
    images = scores.shape[1]
    total = 0.0
    for s in range(views):
        q = naive_sinkhorn(torch.cat([queued[s], scores[s].detach()]), epsilon, 3)[-images:]
        subloss = 0.0
        for v in [v for v in range(len(scores)) if v != s]:
            for wanted, row in zip(q, scores[v] / temperature, strict=True):
                log_p = row - torch.log(torch.exp(row - row.max()).sum()) - row.max()
                subloss = subloss - sum(a * b for a, b in zip(wanted, log_p, strict=True)) / images
        total = total + subloss / (len(scores) - 1)
    return total / views


def _scores(crops, images=3, prototypes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(crops, images, prototypes, generator=draw) * 2 - 1


def _swav(**settings):
    return small_method("swav", **{"local_crops": 2, "prototypes": 24} | settings)


def test_by_hand():
    # Each crop's two images mirror each other: their assignments are a softmax, 3:1 in crop 0 and 1:1 in crop 1.
    first, second = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(), torch.zeros(2, 2)
    config = SwAVConfig(temperature=1.0, epsilon=1.0)
    found = swapped_prediction(torch.stack([first, second]), torch.zeros(2, 0, 2), config)
    half_of_first = -(math.log(3 / 4) + math.log(1 / 4)) / 2  # crop 0 predicts 3:1 where crop 1 says 1:1
    assert found.loss.item() == pytest.approx((math.log(2) + half_of_first) / 2)
    entropy = 3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)
    assert found.assignment_entropy.item() == pytest.approx((entropy + math.log(2)) / 2)


@pytest.mark.parametrize("queue", [0, 4])
@pytest.mark.parametrize("crops", [2, 8])
def test_loss_and_gradient_are_the_authors(crops, queue):
    ours = _scores(crops).requires_grad_()
    theirs, queued = ours.detach().double().requires_grad_(), _scores(2, queue, seed=1)
    loss = swapped_prediction(ours, queued, SwAVConfig()).loss
    expected = naive_swav_loss(theirs, queued.double(), 2)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


def test_autocast_does_not_reach_the_loss():
    scores, queued = _scores(4), _scores(2, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = swapped_prediction(scores, queued, SwAVConfig())
    assert torch.equal(inside.loss, swapped_prediction(scores, queued, SwAVConfig()).loss)


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize("queue", [0, 8])
def test_method_is_encoder_head_prototypes_and_loss(local_crops, queue):
    method = _swav(local_crops=local_crops, queue_length=queue, head_norm="none")
    if queue:
        draw = torch.Generator().manual_seed(4)
        method.queue.copy_(F.normalize(torch.randn(method.queue.shape, generator=draw), dim=-1))
    views = noise_views(method)
    assert (views.local_crops is None) == (local_crops == 0)
    crops = [*views.crops, *([] if views.local_crops is None else views.local_crops)]
    projections = torch.stack([method.head(method.backbone(crop)) for crop in crops]).detach().double()
    embeddings = projections / projections.square().sum(-1, keepdim=True).sqrt()
    prototypes = method.prototypes.weight.detach().double()
    queued = torch.zeros(2, 0, 24) if method.queue is None else method.queue.double() @ prototypes.T
    output = method(views, FULL)
    expected = naive_swav_loss(embeddings @ prototypes.T, queued.double(), 2)
    torch.testing.assert_close(output.loss.detach().double(), expected, atol=1e-4, rtol=1e-4)
    cross_entropy = output.logs["assignment_entropy"] + output.logs["kl_divergence"]
    torch.testing.assert_close(cross_entropy, output.loss.detach())


def test_prototypes_have_norm_one_before_every_step():
    method = _swav()
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(24))
    with torch.no_grad():
        method.prototypes.weight.mul_(torch.linspace(0.5, 2, 24)[:, None])
    expected = F.normalize(method.prototypes.weight.detach(), dim=1)
    method.after_step(MIDWAY)
    torch.testing.assert_close(method.prototypes.weight.detach(), expected)


def test_frozen_prototypes_do_not_move():
    method = _swav(freeze_steps=5)
    optimiser = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9, weight_decay=0.5)
    moved = []
    for step in (0, 4, 5):
        before = method.prototypes.weight.detach().clone()
        progress = dataclasses.replace(START, step=step)
        method(noise_views(method), progress).loss.backward()
        method.before_update(progress)
        assert method.head[0].weight.grad is not None
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(progress)
        moved.append(not torch.allclose(before, method.prototypes.weight, atol=1e-6))
    assert moved == [False, False, True]


def test_freeze_takes_at_most_a_tenth_of_the_run():
    method = _swav(freeze_steps=313)
    for step, frozen in ((9, True), (10, False)):
        progress = dataclasses.replace(START, step=step)
        method(noise_views(method), progress).loss.backward()
        method.before_update(progress)
        assert (method.prototypes.weight.grad is None) == frozen


def _embeddings(method, views):
    projections = method.head(method.backbone(views.crops.flatten(0, 1)))
    return F.normalize(projections, dim=-1).unflatten(0, (2, -1)).detach()


def test_queue_holds_the_newest_batches_first():
    method = _swav(queue_length=2 * BATCH, head_norm="none")
    batches = [noise_views(method, seed=seed) for seed in range(3)]
    for views in batches:
        method(views, FULL)
        method.after_step(FULL)
    expected = torch.cat([_embeddings(method, batches[2]), _embeddings(method, batches[1])], dim=1)
    torch.testing.assert_close(method.queue, expected, atol=1e-5, rtol=1e-4)


def test_queue_counts_once_it_is_full():
    method = _swav(queue_length=2 * BATCH, head_norm="none", prototypes=7)
    without = _swav(head_norm="none", prototypes=7)
    without.load_state_dict({key: value for key, value in method.state_dict().items() if key != "queue"})
    counted = []
    for seed in range(3):
        views = noise_views(method, seed=seed)
        counted.append(not torch.equal(method(views, FULL).loss, without(views, FULL).loss))
        for one in (method, without):
            one.after_step(FULL)
    assert counted == [False, False, True]


@pytest.mark.parametrize(("step", "fills"), [(14, False), (15, True)])
def test_queue_fills_from_its_epoch_on(step, fills):
    method = _swav(queue_length=8, queue_start_epochs=3)
    progress = Progress(step=step, total_steps=1000, steps_per_epoch=5, batch_size=BATCH)
    method(noise_views(method), progress)
    method.after_step(progress)
    assert method.queue.any().item() == fills


def test_micro_batches_fill_the_queue_once_a_step():
    whole, parts = (_swav(queue_length=12, head_norm="none") for _ in range(2))
    progress = dataclasses.replace(MIDWAY, batch_size=6)
    views = noise_views(whole, images=6)
    whole(views, progress)
    for start in (0, 3):
        parts(part(views, start, start + 3), progress)
        assert not parts.queue.any(), "forward changes no state"
    for method in (whole, parts):
        method.after_step(progress)
        assert method.queue[:, :6].any(-1).all() and not method.queue[:, 6:].any()
    torch.testing.assert_close(parts.queue, whole.queue, atol=1e-6, rtol=1e-5)
    parts.after_step(progress)
    torch.testing.assert_close(parts.queue, whole.queue, atol=1e-6, rtol=1e-5)


def test_queue_is_of_whole_batches():
    method = _swav(queue_length=10, head_norm="none")
    for seed in range(3):
        method(noise_views(method, seed=seed), FULL)
        method.after_step(FULL)
    assert method.queue[:, :8].any(-1).all() and not method.queue[:, 8:].any()


def test_evaluating_the_loss_leaves_no_trace_in_the_queue():
    method = _swav(queue_length=8).eval()
    method(noise_views(method), FULL)
    method.after_step(FULL)
    assert not method.queue.any()


def test_state_holds_queue_and_prototypes():
    assert {"queue", "prototypes.weight"} < _swav(queue_length=8).state_dict().keys()
    assert "queue" not in _swav().state_dict()


def test_a_run_with_a_queue_goes_on_exactly(tmp_path):
    data = write_pairs(tmp_path / "set", 40)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    train(data, undisturbed, "swav", steps=4)
    assert final(undisturbed).method["queue"].any(-1).all()
    train(data, out, "swav", steps=4, checkpoint__every=1, checkpoint__keep=9)
    for path in checkpoint.steps_in(out / "checkpoints"):
        if path.name > checkpoint.name_of(2):
            path.unlink()
    (out / "results.json").unlink()
    train(data, out, "swav", steps=4)
    assert_same_run(out, undisturbed)


def test_logs_of_spread_and_of_equal_embeddings():
    method = _swav(head_norm="none", local_crops=0)
    used = method(noise_views(method), MIDWAY).logs["prototypes_used"].item()
    assert 1 / 8 <= used <= 1
    with torch.no_grad():
        method.head[-1].weight.zero_()  # all embeddings are the bias
    logs = method(noise_views(method), MIDWAY).logs
    assert logs["prototypes_used"].item() == 1 / 8  # one of eight crops
    assert logs["assignment_entropy"].item() == pytest.approx(math.log(24), rel=1e-4)


@pytest.mark.parametrize(
    ("entropy", "kl", "step", "told"),
    [
        (math.log(24), 0.0, 20, True),
        (math.log(24), 0.0, 19, False),  # of 100: a run that has just begun
        (math.log(24), 0.5, 50, False),
        (math.log(24) - 0.5, 0.0, 50, False),
    ],
)
def test_collapse_is_an_assignment_to_all_alike(entropy, kl, step, told):
    logs = {"assignment_entropy": entropy, "kl_divergence": kl, "feature_std": 0.5}
    reason = _swav().collapse(logs, Progress(step=step, total_steps=100, steps_per_epoch=10))
    assert (reason is not None) == told


@pytest.mark.parametrize(
    ("settings", "batch", "told"),
    [
        (
            {"freeze_steps": 313},
            64,
            ["freeze of the prototypes of 313 steps shortened to a tenth of the run, 10 steps"],
        ),
        (
            {"queue_length": 128, "queue_start_epochs": 15},
            64,
            [
                "wait for the queue of 75 steps shortened to a tenth of the run, 10 steps",
                "queue of 128 images is full after 12 steps: later ones",
            ],
        ),
        (
            {"queue_length": 100},
            32,
            ["queue of 100 images shortened to 96, whole batches of 32", "queue of 96 images is full after 3"],
        ),
        ({"queue_length": 100}, 128, ["no queue: its 100 images are less than a batch of 128"]),
        ({"queue_length": 6400}, 64, ["queue of 6400 images is full after 100 steps at the earliest"]),
        ({"queue_length": 6336}, 64, ["queue of 6336 images is full after 99 steps: later ones"]),
        ({"prototypes": 129}, 64, ["129 prototypes for 64 images (batch and queue)"]),
        ({"prototypes": 128}, 64, []),
        ({"prototypes": 129, "queue_length": 64}, 64, ["queue of 64 images is full after 1 steps"]),
    ],
)
def test_what_does_not_fit_the_run_is_said(settings, batch, told):
    method = _swav(**{"freeze_steps": 0, "queue_start_epochs": 0} | settings)
    notes = method.notes(Progress(step=0, total_steps=100, steps_per_epoch=5, batch_size=batch))
    assert len(notes) == len(told)
    assert all(note.startswith(start) for note, start in zip(notes, told, strict=True))


def test_notes_of_a_run_whose_batch_is_not_known():
    method = _swav(queue_length=64, queue_start_epochs=1, freeze_steps=0)
    assert method.notes(Progress(step=0, total_steps=100, steps_per_epoch=5)) == [
        "queue of 64 images is full after 69 steps: later ones assign them too and take longer"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prototypes", 0),
        ("local_crops", -1),
        ("temperature", 0.0),
        ("epsilon", 0.0),
        ("sinkhorn_iterations", 0),
        ("queue_length", -1),
        ("freeze_steps", -1),
        ("head_norm", 7),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UsageError, match=rf"method\.{name} is {value}; it must be"):
        SwAVConfig(**{name: value})
