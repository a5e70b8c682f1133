"""What was typed and would change nothing: refused where it is plainly a mistake, else noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifests.errors import UsageError
from trainer.data.image_set import ImageSet, Subset
from trainer.data.labelled import paths
from trainer.data.tasks import Task, parse
from trainer.finetune.config import SET_BY_RATES, FinetuneConfig
from trainer.finetune.source import Source
from trainer.settings import find
from trainer.settle import of_optimiser
from trainer.tuners import spec


def check_rates(asked: Mapping[str, Any]) -> None:
    """Refuse settings of the optimiser that each leg replaces by its own, and rates of what is no tuner's name."""
    for name in SET_BY_RATES:
        if find(asked, f"optim.{name}"):
            key = "rates.warmup_steps" if "warmup" in name else "rates.learning_rates"
            raise UsageError(
                f"optim.{name} has no effect here: every tuner has rates of its own, by its name or for all others by "
                f"default, such as --set {key}.default={'[1e-3]' if key.endswith('rates') else '50'}"
            )
    for key in ("learning_rates", "grid", "warmup_steps"):
        for given in find(asked, f"rates.{key}"):
            for tuner in given if isinstance(given, Mapping) else ():
                _check_tuner(f"rates.{key}", str(tuner))


def _check_tuner(key: str, tuner: str) -> None:
    if tuner == "default":
        return
    name = spec.parse(tuner).name
    if name != tuner:
        raise UsageError(f"{key}.{tuner} has no effect: rates are by the tuner's name alone; write {key}.{name}")


def unused(config: FinetuneConfig, asked: Mapping[str, Any]) -> list[str]:
    """Notes on settings that were typed and that these tuners and tasks, or this optimiser, do not read."""
    names = {spec.parse(text).name for text in config.peft}
    reasons = {
        **({} if "lora" in names else {"tuner": "no --peft lora"}),
        **({} if config.sweep else {"rates.grid": "no --sweep lr"}),
        **({"rates.learning_rates": "the rates of --sweep lr are those of rates.grid"} if config.sweep else {}),
        **({} if len(config.tasks) > 1 or config.adapters == "shared" else {"adapters": "there is one task"}),
    }
    notes = [f"{path} changes nothing: {reason}" for path, reason in reasons.items() if find(asked, path)]
    return notes + of_optimiser(config.optim.name, asked)


def of_the_source(tasks: Sequence[Task], config: FinetuneConfig, source: Source | None) -> list[str]:
    """Notes on tasks that are made of the images of the source."""
    if source is None:
        return []
    place = paths.local(parse(config.source).location)
    images = {_whole(part.images).fingerprint for part in (source.bank, source.queries)}
    return [
        f"task {task.name} is of the images of the source, {source.location}: what is called forgetting is then of the "
        "very task that is learnt. Give other images by --source PATH, or --source none"
        for task in tasks
        if paths.local(task.location) == place
        or images & {_whole(part).fingerprint for part in (task.train, task.test)}
    ]


def _whole(images: ImageSet) -> ImageSet:
    return _whole(images.whole) if isinstance(images, Subset) else images
