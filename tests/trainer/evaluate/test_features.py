"""Feature extraction: values, order, modes and counts."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import v2

from manifests.errors import DiffmixError
from trainer.evaluate.features import extract

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)


def images(count, side=32):
    return torch.tensor(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=0)


def test_features_are_those_of_torchvisions_preprocessing(resnet):
    pixels = images(5)
    prepare = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    with torch.no_grad():
        wanted = resnet.eval()(torch.stack([prepare(image.numpy()) for image in pixels]))
    features = extract(resnet, pixels.split(2), mean=MEAN, std=STD, device="cpu", expected=5)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32


def test_modes_come_back_and_statistics_stay(resnet):
    resnet.train()
    resnet.layer1.eval()  # somebody froze a part
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    modes = [module.training for module in resnet.modules()]
    extract(resnet, [images(4)], mean=MEAN, std=STD, device="cpu")
    assert [module.training for module in resnet.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(before[name], value) for name, value in resnet.state_dict().items())


def test_modes_come_back_after_an_error(resnet):
    resnet.train()
    with pytest.raises(ValueError, match=r"uint8 \[B, S, S, 3\]"):
        extract(resnet, [images(2).float()], mean=MEAN, std=STD, device="cpu")
    assert resnet.training


def test_a_head_can_be_trained_on_them(resnet):
    features = extract(resnet, [images(4)], mean=MEAN, std=STD, device="cpu")
    head = nn.Linear(features.shape[1], 2)
    head(features).sum().backward()
    assert head.weight.grad is not None and not features.requires_grad


def test_bfloat16_is_near(resnet):
    pixels = [images(4)]
    exact = extract(resnet, pixels, mean=MEAN, std=STD, device="cpu")
    rough = extract(resnet, pixels, mean=MEAN, std=STD, device="cpu", dtype=torch.bfloat16)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert nn.functional.cosine_similarity(rough, exact).min() > 0.99


def test_another_number_of_images_is_an_error(resnet):
    with pytest.raises(DiffmixError, match="features of 4 images were taken, and the set has 5"):
        extract(resnet, [images(4)], mean=MEAN, std=STD, device="cpu", expected=5)
    with pytest.raises(DiffmixError, match="no image"):
        extract(resnet, [], mean=MEAN, std=STD, device="cpu")
