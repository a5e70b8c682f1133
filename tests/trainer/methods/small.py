"""Methods small enough for tests: a ViT without BatchNorm, configs whose widths are cut, views of noise."""

from dataclasses import fields

import timm
import torch

from trainer.choices import class_of
from trainer.data.batch import Views
from trainer.methods import METHODS
from trainer.methods.base import Progress

MIDWAY = Progress(step=50, total_steps=100, steps_per_epoch=5)
START = Progress(step=0, total_steps=100, steps_per_epoch=5)


def tiny_vit(**arguments):
    """Features [N, 32] of images of any multiple of 8 pixels."""
    arguments = {"drop_path_rate": 0.0} | arguments
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size | arguments)


def small_method(name, seed=0, **settings):
    """The method of that name with default settings, every width at most 32, and weights that `seed` draws."""
    method = class_of(METHODS, name)
    defaults = {field.name: _cut(field.default) for field in fields(method.Config)}
    torch.manual_seed(seed)
    return method(tiny_vit, method.Config(**defaults | settings))


def plain_method(name, seed=0):
    """A small method in which images do not meet and nothing is random: no BatchNorm, no dropped paths."""
    known = [field.name for field in fields(class_of(METHODS, name).Config)]
    plain = {"head_norm": "none", "drop_path": 0.0}
    return small_method(name, seed, **{key: value for key, value in plain.items() if key in known})


def _cut(value):
    if isinstance(value, tuple):
        return tuple(_cut(width) for width in value)
    return min(value, 32) if type(value) is int else value


def noise_views(method, images=4, seed=0, size=32, local_size=16):
    """Views of the number that the method asks for, some images brighter than others."""
    draw = torch.Generator().manual_seed(seed)
    brightness = torch.linspace(-1, 1, images).view(images, 1, 1, 1)
    crops = torch.randn(method.num_crops, images, 3, size, size, generator=draw) + brightness
    if not method.num_local_crops:
        return Views(crops=crops)
    local = torch.randn(method.num_local_crops, images, 3, local_size, local_size, generator=draw) + brightness
    return Views(crops=crops, local_crops=local)


def part(views, start, stop):
    """The views of some of the images."""
    local = None if views.local_crops is None else views.local_crops[:, start:stop]
    return Views(crops=views.crops[:, start:stop], local_crops=local)
