"""From what was typed to the settings, encoder, tasks and source of one comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from manifests.errors import UsageError
from trainer import recipes
from trainer.config import RunConfig
from trainer.data import tasks
from trainer.data.order import batches, largest_batch
from trainer.data.rand_augment import RandAugment
from trainer.data.tasks import Task
from trainer.data.view_plan import ViewConfig
from trainer.engine.layer_decay import layer_scales
from trainer.finetune.config import EncoderChange, FinetuneConfig, resolve
from trainer.finetune.origin import Origin, newest_run, open_origin
from trainer.finetune.source import Source, default_source, open_source, was_trained_on_digits
from trainer.finetune.unused import check_rates, of_the_source, unused
from trainer.nn.encoders import EncoderConfig
from trainer.options import FINETUNE, flags_of
from trainer.parts import total_steps
from trainer.settings import find, merge, parse_assignments, section, typed
from trainer.settle import yielding
from trainer.tuners.base import make_tuner
from trainer.tuners.spec import TunerSpec, parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `trainer finetune`. `flags` are nested settings, as in a recipe."""

    recipe: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The settings, what they stand for, and what the user should know of how they came about."""

    config: FinetuneConfig
    origin: Origin
    encoder: nn.Module  # untouched, on the CPU
    tasks: tuple[Task, ...]
    source: Source | None
    notes: tuple[str, ...]

    @property
    def specs(self) -> list[TunerSpec]:
        """The tuners, in the order typed."""
        return [parse(text) for text in self.config.peft]

    @property
    def views(self) -> ViewConfig:
        """What the encoder is shown."""
        images, origin = self.config.images, self.origin
        return ViewConfig(
            augment=images.augment,
            size=origin.size,
            interpolation=images.interpolation,
            mean=images.mean or origin.mean,
            std=images.std or origin.std,
        )

    @property
    def rand_augment(self) -> RandAugment | None:
        """What is done to the training views besides."""
        text = self.config.images.rand_augment
        return None if text is None else RandAugment.parse(text, self.views.mean)


def settle(request: Request) -> Settled:
    """Raises `UsageError` for settings that cannot work with this encoder and these images."""
    asked = typed(parse_assignments(request.assignments), request.flags, flags_of(FINETUNE))
    if "recipe" in asked:
        raise UsageError(f"--set recipe={asked['recipe']}: a recipe is chosen by --recipe")
    for text in asked.get("peft") or ():
        parse(str(text))  # a typing error is told before anything is read
    check_rates(asked)
    origin = _origin(asked)
    typed_tasks = tuple(asked.get("tasks") or _default_tasks(origin))
    name, notes = _recipe(request, origin, typed_tasks)
    source = asked.get("source") or default_source(origin)
    found = {"init": origin.init, "tasks": typed_tasks, "source": source, "recipe": name}
    recipe = yielding(recipes.load(name, "finetune"), asked)
    config = resolve(merge(recipe, found, asked), f"recipe {name} with your settings")
    opened = tuple(tasks.open_task(tasks.parse(text), max_pixels=config.data.max_pixels) for text in config.tasks)
    config, more = _fit_batch(config, opened, given="batch_size" in (asked.get("run") or {}))
    config, beyond = _fit_steps(config, opened, given=bool(find(asked, "evaluation.at")))
    origin = replace(origin, changes=config.encoder.args if config.encoder else {})
    encoder, note = origin.make()
    if config.optim.layer_decay is not None:
        layer_scales(encoder, config.optim.layer_decay)  # refuses an encoder that has no known layers
    config, unfit = _fit_tuners(encoder, config, given="peft" in asked)
    source_images = open_source(config.source, origin, config.evaluation, max_pixels=config.data.max_pixels)
    unread = [*unused(config, asked), *of_the_source(opened, config, source_images)]
    return Settled(
        config=config,
        origin=origin,
        encoder=encoder,
        tasks=_named_apart(opened),
        source=source_images,
        notes=(*notes, note, *unfit, *more, *beyond, *unread, *_skipped(opened)),
    )


def _origin(asked: Mapping[str, Any]) -> Origin:
    given = asked.get("encoder")
    change: EncoderChange | None = section(FinetuneConfig, "encoder", given, "your settings")
    named = EncoderConfig(name=change.name, args=change.args) if change is not None and change.name else None
    images = asked.get("images")
    size = images.get("size") if isinstance(images, Mapping) else None
    return open_origin(str(asked.get("init") or newest_run()), named, size)


def _default_tasks(origin: Origin) -> tuple[str, ...]:
    if was_trained_on_digits(origin):
        return (tasks.BUILT_IN,)
    raise UsageError(
        f"no task to fine-tune {origin.init} on: give --task PATH, such as --task photos/ (a folder for each class), "
        "--task signs-train.tar,test=signs-test.tar or --task torchvision:CIFAR100@data; repeat it for a sequence"
    )


def _recipe(request: Request, origin: Origin, typed_tasks: Sequence[str]) -> tuple[str, list[str]]:
    if request.recipe is not None:
        return request.recipe, []
    built_in = set(typed_tasks) == {tasks.BUILT_IN}
    name = recipes.scale_of("digits" if built_in else None, origin.size)
    return name, [f"recipe {name} (by the task and the encoder's images; --recipe takes another)"]


def _fit_tuners(encoder: nn.Module, config: FinetuneConfig, *, given: bool) -> tuple[FinetuneConfig, list[str]]:
    """A tuner that does not fit the encoder is told before any is trained; one that nobody asked for is left out."""
    fitting: list[str] = []
    texts: dict[tuple[str, int | None], str] = {}
    notes: list[str] = []
    for text in config.peft:
        try:
            spec = make_tuner(copy.deepcopy(encoder), parse(text), config.tuner).spec
            fitting.append(text)
        except UsageError as error:
            prefix = f"--peft {text}: "
            told = prefix + str(error).removeprefix(prefix)
            if given:
                raise UsageError(told) from error
            notes.append(f"left out: {told}")
            continue
        same = texts.setdefault((spec.name, spec.size), text)
        if same != text:
            raise UsageError(f"--peft {same} and --peft {text} are the same tuner of this encoder: give one of them")
    return replace(config, peft=tuple(fitting)), notes


def _fit_batch(config: FinetuneConfig, opened: Sequence[Task], *, given: bool) -> tuple[FinetuneConfig, list[str]]:
    batch, smallest = config.run.batch_size, min(len(task.train) for task in opened)
    if smallest >= batch:
        return config, []
    if given:
        raise UsageError(
            f"--batch-size {batch} is more than the {smallest} training images of the smallest task; give {smallest} "
            "or less"
        )
    lowered = largest_batch(smallest, config.run.accumulation)
    if lowered < 2:
        raise UsageError(f"the smallest task has {smallest} training images; 2 are the least that a batch can have")
    run: RunConfig = replace(config.run, batch_size=lowered)
    note = f"batch size {batch} of the recipe lowered to {lowered}: the smallest task has {smallest} training images"
    return replace(config, run=run), [note]


def _fit_steps(config: FinetuneConfig, opened: Sequence[Task], *, given: bool) -> tuple[FinetuneConfig, list[str]]:
    """Steps to measure at that no task comes to."""
    batch = config.run.batch_size
    last = max(total_steps(config.run, batches(len(task.train), batch)) for task in opened)
    beyond = ", ".join(str(step) for step in config.evaluation.at if step > last)
    if not beyond:
        return config, []
    told = f"a task is trained for {last} steps, the last of which is always measured"
    if given:
        raise UsageError(f"--eval-at {beyond}: {told}; give steps up to {last}, or a larger --max-steps")
    at = tuple(step for step in config.evaluation.at if step <= last)
    note = f"not measured at {beyond}, as the recipe has it: {told}"
    return replace(config, evaluation=replace(config.evaluation, at=at)), [note]


def _named_apart(opened: Sequence[Task]) -> tuple[Task, ...]:
    """Tasks whose names differ: folders are named after them."""
    names = [task.name for task in opened]
    return tuple(
        replace(task, name=f"{task.name}-{number}") if names.count(task.name) > 1 else task
        for number, task in enumerate(opened, start=1)
    )


def _skipped(opened: Sequence[Task]) -> list[str]:
    notes = []
    for task in opened:
        notes += [f"task {task.name}: {note}" for note in task.notes]
        if task.skipped:
            shown = "; ".join(task.skipped[:3])
            more = f" and {len(task.skipped) - 3} more" if len(task.skipped) > 3 else ""
            notes.append(f"task {task.name}: {len(task.skipped)} left out: {shown}{more} (all in results.json)")
    return notes
