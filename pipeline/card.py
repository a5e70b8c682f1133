"""The data card README.md of a pair set: what it is, how it was made, how to load it."""

from __future__ import annotations

import json

from manifests import layout
from manifests.catalog import Catalog
from manifests.plan import Plan
from manifests.storage import Storage
from pipeline.sheet import data_uri, draw_sheet, random_positions

_SHEET_ROWS = 12
_SHEET_THUMBNAIL = 72


def write_card(storage: Storage, plan: Plan) -> None:
    """Write or replace the card of a merged set."""
    storage.write(layout.CARD, card_text(storage, plan).encode())


def card_text(storage: Storage, plan: Plan) -> str:
    """The card as Markdown; its YAML head makes the Hub and `datasets` see each sample once."""
    catalog = Catalog.open(storage.url)
    ok = len(catalog.usable)
    return "\n".join(
        [
            _HEAD.format(size=_size_category(plan.rows)),
            f"# Pair set of {plan.rows:,} rows",
            "",
            f"Real images and {plan.variations} variation(s) of each, made by diffmix in {plan.shards} shards.",
            "",
            *_facts(plan, ok),
            "",
            *_sheet(catalog),
            *_generator(plan),
            _LICENCE.format(
                source=_printable(plan.source["location"]),
                model=_printable((plan.generator or {}).get("model", "none")),
            ),
            _LOAD,
        ]
    )


def _facts(plan: Plan, ok: int) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        f"| rows | {ok:,} ok, {plan.rows - ok:,} failed |",
        f"| source | {plan.source['kind']}: `{_printable(plan.source['location'])}` |",
        f"| real images stored | {plan.store_real or 'none'} |",
        f"| labelled | {'yes' if plan.labelled else 'no'} |",
        f"| seed | {plan.seed} |",
    ]


def _printable(path: str) -> str:
    """The last part of a path, since a card is published; on one line and in UTF-8, as file names need not be."""
    path = path.rstrip("/").rpartition("/")[2] if path.startswith(("/", "~")) else path
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in path)


def _sheet(catalog: Catalog) -> list[str]:
    rows = catalog.rows(random_positions(catalog, _SHEET_ROWS, 0).tolist())
    if not rows:
        return []
    picture = draw_sheet(catalog, rows, _SHEET_THUMBNAIL)
    return [f"![random pairs: the real image first, then its variations]({data_uri(picture)})", ""]


def _generator(plan: Plan) -> list[str]:
    if plan.generator is None:
        return ["## Generator", "", "None: the images were packed as they were found.", ""]
    spec = json.dumps(dict(plan.generator), indent=2, sort_keys=True)
    return [f"## Generator `{plan.generator_id}`", "", "```json", spec, "```", ""]


def _size_category(rows: int) -> str:
    for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")):
        if rows < limit:
            return name
    return "n>10M"


_HEAD = """---
configs:
- config_name: pairs
  default: true
  data_files: pairs-*.tar
license: other
size_categories:
- {size}
tags:
- diffmix
- webdataset
- synthetic
---
"""

_LICENCE = """## Licence

Fill in before publishing:

- real images: the terms of their source, `{source}`
- synthetic images: the terms of the generator, `{model}`
"""

_LOAD = """## How to load

`KEY.real.jpg` is the real image, `KEY.syn0.jpg` and on are its variations, `KEY.json` the facts; all rows with byte
offsets, seeds and similarities are in `manifest.parquet`.

```python
import webdataset
pairs = webdataset.WebDataset("pairs-000000.tar", shardshuffle=False).decode("pil").to_tuple("real.jpg", "syn0.jpg")
```

```python
import datasets
pairs = datasets.load_dataset(".", split="train")  # in the folder of this file
```

```sql
SELECT key, label, synthetic[1].similarity FROM 'manifest.parquet' WHERE status = 'ok' ORDER BY 3 LIMIT 10;  -- DuckDB
```
"""
