from __future__ import annotations

import json
import stat

import pytest
import torch
from click.testing import CliRunner

from pipeline.embedded import measure, models, train, views

ACCURACIES = {"preserved", "judge_accuracy"}


def test_whole_script_at_a_tiny_scale(tmp_path):
    result = CliRunner().invoke(train.main, ["--out", str(tmp_path / "out"), "--scale", "0.001"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert all(0 <= report[name] <= 1 for name in ACCURACIES)
    drawn = measure.vary(measure.load(tmp_path / "out"), torch.rand(2, 1, 32, 32), seed=0, steps=2)
    assert drawn.shape == (2, 1, 32, 32)
    weights = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(weights) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in weights)
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_contrast_against_a_hand_written_softmax():
    embeddings = torch.randn(6, 5)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    terms = []
    for row in range(6):
        similar = torch.exp(unit[row] @ unit.T / 0.5)
        terms.append(-torch.log(similar[(row + 3) % 6] / (similar.sum() - similar[row])))
    assert torch.allclose(train.contrast(embeddings, 0.5), torch.stack(terms).mean(), atol=1e-5)


def test_centred_embeddings_have_mean_zero_and_deviation_one():
    torch.manual_seed(0)
    encoder, images = models.image_encoder().requires_grad_(False), torch.rand(256, 1, 32, 32)
    train.centre_embeddings(encoder, images)
    embeddings = encoder(views.clip_input(views.mild(images))).image_embeds
    assert embeddings.mean(dim=0).abs().max() < 0.3
    assert embeddings.std(dim=0).sub(1).abs().max() < 0.3


@pytest.mark.parametrize("view", [views.mild, views.strong])
def test_views_stay_images(view):
    torch.manual_seed(0)
    images = torch.rand(16, 1, 32, 32)
    drawn = view(images)
    assert drawn.shape == images.shape
    assert drawn.min() >= 0
    assert drawn.max() <= 1 + 1e-5
    assert not torch.equal(drawn, images)


def test_affine_without_limits_is_the_identity():
    images = torch.rand(4, 1, 32, 32)
    still = views.affine(images, views.Affine(degrees=0, zoom=0, shear=0, shift=0))
    assert torch.allclose(still, images, atol=1e-5)


def test_condition_comes_from_another_view():
    numbers = torch.arange(12.0).view(3, 4)
    cache = train.Cache(latents=numbers.view(3, 4, 1, 1, 1), embeddings=numbers.view(3, 4, 1))
    latents, condition = train._other_views(cache, 200)
    view, other = latents.flatten(), condition.flatten()
    assert (view // 4 == other // 4).all()
    assert (view != other).all()
