"""The tiny image-variation checkpoint that ships with diffmix, and the script that trains it."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"  # the checkpoint's name as a model: the same on every machine


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint, in diffusers format."""
    return Path(__file__).with_name("checkpoint")
