"""Encoders of a few thousand parameters, the same every time, and tuners of them."""

import torch

from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.tuners.base import TunerConfig, make_tuner
from trainer.tuners.spec import parse

SIZE = 32
VIT = EncoderConfig(
    name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "init_values": 0.5}
)
RESNET = EncoderConfig(name="resnet18_cifar")


def encoder(config=VIT, seed=0, **overrides):
    """With weights that `seed` draws, norms that are not trivial, in evaluation mode."""
    torch.manual_seed(seed)
    made = make_encoder(config, SIZE, **overrides)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name or "bias" in name:
                value += 0.1 * torch.randn_like(value)
    return made.eval()


def tuner(text, config=VIT, seed=0, **settings):
    """A fresh encoder with its tuner, in evaluation mode; `seed` draws the adapter, never the encoder."""
    made = encoder(config)
    torch.manual_seed(seed + 100)
    adapted = make_tuner(made, parse(text), TunerConfig(**settings))
    adapted.model.eval()
    return adapted


def images(count=3, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def features(model, pixels=None):
    return model(images() if pixels is None else pixels)


def train(adapted, steps=3, lr=0.05):
    """Some steps of AdamW on a loss of the features; evaluation mode afterwards."""
    torch.manual_seed(3)
    adapted.train()
    parameters = [value for _, value in adapted.trainable()]
    optimiser = torch.optim.AdamW(parameters, lr) if parameters else None
    for _ in range(steps):
        loss = (adapted.model(images()) - 1).square().mean()
        if optimiser is not None:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    adapted.model.eval()
    return adapted


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}
