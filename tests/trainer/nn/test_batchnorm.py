"""SyncBatchNorm in the place of timm's BatchNorms, activations and all."""

import timm
import torch
from torch import nn

from trainer.nn.batchnorm import synchronised


def test_features_stay_although_the_norms_hold_activations():
    torch.manual_seed(0)
    encoder = timm.create_model("test_efficientnet", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    expected, names = encoder(images), list(encoder.state_dict())
    converted = synchronised(encoder)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert list(converted.state_dict()) == names
    torch.testing.assert_close(converted(images), expected, rtol=0, atol=0)
