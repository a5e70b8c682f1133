"""What `--peft` says: the name of a tuner and its size, as in `lora:8`."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from manifests.errors import UsageError
from trainer.choices import nearest
from trainer.tuners import TUNERS

# What the size counts, and its default; None: known once the encoder is.
_SIZES: dict[str, tuple[str, int | None]] = {
    "last-blocks": ("blocks", 3),
    "lora": ("rank", 8),
    "block-expansion": ("new blocks", None),
    "dora": ("rank", 8),
}
_WITHOUT_SIZE = ("full", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerSpec:
    """A tuner by name; `size` counts what the tuner says (rank, blocks), None where it has none or is not yet known."""

    text: str
    name: str
    size: int | None


def parse(text: str) -> TunerSpec:
    """The spec of `NAME` or `NAME:SIZE`; raises `UsageError` for an unknown name and for a size that cannot be."""
    name, colon, digits = text.strip().partition(":")
    name = name.lower().replace("_", "-")
    known = [*TUNERS, *peft_names()]
    if name not in known:
        meant = nearest(name, known, alike=0.4)
        raise UsageError(
            f"unknown tuner {name!r}{f'; did you mean {meant!r}?' if meant else '.'} Known: {', '.join(TUNERS)}, and "
            "PEFT's other methods by PEFT's names, such as dora:8, loha:8 or ia3"
        )
    if not colon:
        return TunerSpec(text=text, name=name, size=_SIZES.get(name, ("", None))[1])
    return TunerSpec(text=text, name=name, size=_size(text, name, digits))


def _size(text: str, name: str, digits: str) -> int:
    if name in _WITHOUT_SIZE:
        raise UsageError(f"--peft {text}: {name!r} takes no size; write `--peft {name}`")
    what, default = _SIZES.get(name, ("size", None))
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise UsageError(
            f"--peft {text}: the {what} after the colon must be a whole number from 1, as in {name}:{default or 4}"
        )
    return int(digits)


@cache
def peft_names() -> tuple[str, ...]:
    """PEFT's own methods that TUNERS does not name, and DoRA, as on the command line; PEFT is read, not imported."""
    found = find_spec("peft")
    if found is None or found.origin is None:
        return ()
    tree = ast.parse((Path(found.origin).parent / "utils" / "peft_types.py").read_text("utf-8"))
    kinds = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "PeftType")
    targets = [target for node in kinds.body if isinstance(node, ast.Assign) for target in node.targets]
    names = {target.id.lower().replace("_", "-") for target in targets if isinstance(target, ast.Name)}
    return ("dora", *sorted(names - TUNERS.keys()))
