"""Settings of `mix` that nothing reads: each policy has its own, and one that was typed in vain is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifests.errors import UsageError
from trainer.choices import class_of
from trainer.data.mixing.config import POLICIES, MixConfig
from trainer.data.mixing.policy import Policy


def check_read(section: Any, configs: Sequence[MixConfig]) -> None:
    """Raises `UsageError` for a setting of a section `mix` that no policy of `configs` reads; None has none."""
    for name in section if isinstance(section, Mapping) else ():
        if name != "policy" and not any(name in settings_of(config) for config in configs):
            raise UsageError(_told(name, configs))


def settings_of(config: MixConfig) -> tuple[str, ...]:
    """The settings that the policy reads, with `weight` or without."""
    policy = _class(config.policy)
    return (*policy.reads, *(policy.reads_weighted if config.weight is not None else ()))


def _told(name: str, configs: Sequence[MixConfig]) -> str:
    if any(name in _class(config.policy).reads_weighted for config in configs):
        return f"mix.{name} is read with mix.weight only: leave it out, or add --set mix.weight=similarity"
    readers = [policy for policy in POLICIES if name in _class(policy).reads]
    chosen = {config.policy: settings_of(config) for config in configs}
    listed = "; ".join(f"{policy} reads {', '.join(read)}" for policy, read in chosen.items())
    return (
        f"mix.{name} has no effect with --mix {' or '.join(chosen)}: it is read by {', '.join(readers)}, and {listed}; "
        "leave it out, or choose another policy"
    )


def _class(policy: str) -> type[Policy]:
    found: type[Policy] = class_of(POLICIES, policy)
    return found
