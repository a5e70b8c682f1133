"""RandAugment (arXiv 1909.13719) as timm has it: a few random operations on a view in bytes, of a random strength.

The operations are timm's. What is drawn is not: timm draws from global generators, which threads share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP

from manifests.errors import UsageError

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
_MOST = 10.0  # magnitude
_TURNED_BY = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}  # at most
_ENHANCED = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
_SECTION = re.compile(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)")
_DRAWS = 5  # of an operation: which, whether, two for its magnitude, sign

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandAugment:
    """What is done to every view: `num_operations`, chosen evenly from `OPERATIONS`, each with `probability`.

    The magnitude is normal around `magnitude`, limited to 0 to 10. Pixels that come from outside are of colour `fill`;
    what moves pixels interpolates by bicubic, as in MAE's fine-tuning.
    """

    magnitude: int
    magnitude_std: float
    num_operations: int
    probability: float
    fill: tuple[int, int, int]

    @classmethod
    def parse(cls, text: str, mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Self:
        """Of timm's notation, such as `rand-m9-mstd0.5-inc1`, filled with the colour `mean`, RGB in [0, 1].

        Raises `UsageError` for what is not timm's or not known here: `inc1` is needed; `mmax` and `t` are not known.
        """
        policy, *sections = text.split("-")
        found = [_SECTION.fullmatch(section) for section in sections]
        given = {match[1]: float(match[2]) for match in found if match}
        known = policy == "rand" and None not in found and len(given) == len(sections)
        if not known or given.pop("inc", 0) != 1:
            raise _unknown(text)
        values = {"m": _MOST, "mstd": 0.0, "n": 2.0, "p": 0.5} | given
        whole = values["m"].is_integer() and values["n"].is_integer() and values["n"] >= 1
        if not (whole and values["m"] <= _MOST and values["mstd"] <= _MOST and values["p"] <= 1):
            raise _unknown(text)
        return cls(
            magnitude=int(values["m"]),
            magnitude_std=values["mstd"],
            num_operations=int(values["n"]),
            probability=values["p"],
            fill=_colour(mean),
        )

    @property
    def num_draws(self) -> int:
        """Uniform numbers that a view takes."""
        return _DRAWS * self.num_operations

    def apply(self, view: Pixels, u: NDArray[np.float64]) -> None:
        """Change the view [S, S, 3] in place, as the uniforms [num_draws] in [0, 1) say."""
        operations = self.operations(u)
        if operations:
            image = Image.fromarray(view)
            for name, magnitude, sign in operations:
                image = self.changed(image, name, magnitude, sign)
            view[:] = np.asarray(image)

    def operations(self, u: NDArray[np.float64]) -> list[tuple[str, float, float]]:
        """Name, magnitude and sign (1 or -1) of what the uniforms [num_draws] ask for, in order."""
        return [
            (OPERATIONS[int(which * len(OPERATIONS))], self._magnitude(radius, angle), 1.0 if sign < 0.5 else -1.0)
            for which, whether, radius, angle, sign in u.reshape(-1, _DRAWS).tolist()
            if whether < self.probability
        ]

    def changed(self, image: Image.Image, name: str, magnitude: float, sign: float) -> Image.Image:
        """The operation `name` with a magnitude of 0 to 10; those that go either way follow `sign`."""
        arguments = _arguments(name, magnitude, sign)
        if name == "PosterizeIncreasing" and arguments[0] < 1:  # no bit is kept; newer Pillows refuse to do it
            return Image.new(image.mode, image.size)
        operation: Any = NAME_TO_OP[name]
        done: Image.Image = operation(image, *arguments, fillcolor=self.fill, resample=Image.Resampling.BICUBIC)
        return done

    def _magnitude(self, radius: float, angle: float) -> float:
        """Normal, by Box and Muller (1958)."""
        normal = math.sqrt(-2.0 * math.log(1.0 - radius)) * math.cos(2.0 * math.pi * angle)
        return max(0.0, min(self.magnitude + self.magnitude_std * normal, _MOST))


def _arguments(name: str, magnitude: float, sign: float) -> tuple[float, ...]:
    """What timm's operation takes; where timm's own function would draw the sign, it is computed here."""
    level = magnitude / _MOST
    if name in _TURNED_BY:
        return (sign * (level * _TURNED_BY[name]),)
    if name in _ENHANCED:
        return (max(0.1, 1.0 + sign * (level * 0.9)),)
    argument_of = LEVEL_TO_ARG[name]
    return () if argument_of is None else tuple(argument_of(magnitude, {}))


def _colour(mean: Sequence[float]) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(round(255 * value), 255)) for value in mean)
    return red, green, blue


def _unknown(text: str) -> UsageError:
    return UsageError(
        f"images.rand_augment is {text!r}; it must be as timm writes it, such as rand-m9-mstd0.5-inc1: inc1 (what "
        "grows with the magnitude, nothing else is known) and, unless the defaults do, m (magnitude, 0 to 10), mstd "
        "(its standard deviation, 0 to 10), n (operations for each image, 1 or more), p (probability of each, 0 to 1)"
    )
