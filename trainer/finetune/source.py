"""The source, `--source`: the labelled images whose recognition fine-tuning may cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.catalog import Catalog
from manifests.errors import DiffmixError, UsageError
from trainer.data import tasks
from trainer.data.image_set import ImageSet
from trainer.data.rows import Rows
from trainer.evaluate.held_out import split
from trainer.evaluate.retention import Part
from trainer.finetune.config import NO_SOURCE, RetentionConfig
from trainer.finetune.origin import Origin

DIGITS = "digits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where it lies, and the parts that kNN takes as bank and as queries."""

    location: str
    bank: Part
    queries: Part
    note: str = ""


def default_source(origin: Origin) -> str:
    """The pair set that the encoder saw; raises `UsageError` if nothing says which that is."""
    advice = f"give --source PATH (labelled images of the kind that it knows), or --source {NO_SOURCE}"
    if origin.data_url is None:
        raise UsageError(
            f"--init {origin.init} does not say which images the encoder was trained on, so that forgetting cannot be "
            f"measured: {advice}"
        )
    if not _is_pair_set(origin.data_url):
        raise UsageError(
            f"the encoder of {origin.init} was trained on {origin.data_url}, which is not there (seen from "
            f"{Path.cwd()}): {advice}"
        )
    return origin.data_url


def was_trained_on_digits(origin: Origin) -> bool:
    """Whether the encoder comes from the embedded digits, for which there is a built-in second domain."""
    try:
        return origin.data_url is not None and _is_of_digits(Catalog.open(origin.data_url))
    except DiffmixError:
        return False


def open_source(text: str, origin: Origin, config: RetentionConfig, *, max_pixels: int) -> Source | None:
    """Bank and queries; None for `none`. Raises `UsageError` where there are no labels.

    Of a pair set a tenth of the keys by hash are queries, unless it is of the embedded digits: those have a test split
    that neither generator nor encoder saw.
    """
    if text == NO_SOURCE:
        return None
    spec = tasks.parse(text)
    if spec.test is None and _is_pair_set(spec.location):
        return _of_pairs(spec.location, origin, config)
    try:
        task = tasks.open_task(spec, max_pixels=max_pixels)
    except UsageError as error:
        raise UsageError(f"--source {text}: {error}") from error
    return Source(
        location=text,
        bank=_part(task.train, config.bank),
        queries=_part(task.test, config.queries),
        note="bank: the training part; queries: the test part",
    )


def _is_pair_set(location: str) -> bool:
    return "://" in location or (Path(location).expanduser() / "plan.json").is_file()


def _of_pairs(url: str, origin: Origin, config: RetentionConfig) -> Source:
    rows = Rows.open(url, origin.filters if url == origin.data_url else ())
    if rows.label is None or not rows.has_real:
        raise UsageError(
            f"the source {url} has no labelled real images, so that forgetting cannot be measured on it; give another "
            f"--source PATH, or --source {NO_SOURCE}"
        )
    if _is_of_digits(rows.catalog):
        test = tasks.open_task(tasks.parse(DIGITS)).test
        note = "queries: the test split of the digits, which the encoder never saw"
        return Source(location=url, bank=_part(rows, config.bank), queries=_part(test, config.queries), note=note)
    parts = split(rows, bank=config.bank, queries=config.queries)
    if parts is None:
        raise UsageError(f"the source {url} has too few labelled images; give another --source, or --source none")
    note = "queries: a tenth of the keys by hash, which the encoder may have seen without labels"
    bank, queries = (Part(images=rows, indices=indices) for indices in (parts.bank, parts.queries))
    return Source(location=url, bank=bank, queries=queries, note=note)


def _is_of_digits(catalog: Catalog) -> bool:
    return str(catalog.plan.source.get("kind")) == DIGITS


def _part(images: ImageSet, most: int) -> Part:
    """At most so many, drawn evenly from the whole."""
    count = min(most, len(images))
    return Part(images=images, indices=np.linspace(0, len(images) - 1, count).round().astype(np.int64))
