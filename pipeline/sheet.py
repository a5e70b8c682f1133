"""Contact sheets: each real image beside its variations, drawn from the set as any reader would see it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from manifests.catalog import Catalog
from manifests.errors import UsageError
from manifests.schema import PairRow

_GAP = 4
_CAPTION = 12
_BACKGROUND = (250, 250, 250)
_INK = (60, 60, 60)
_SIMILARITY = "similarity "


def write_sheet(url: str, out: Path, *, samples: int, thumbnail: int, seed: int) -> list[Path]:
    """Draw `samples` random rows, and the rows of lowest similarity if the set has any.

    `out` ends in `.png` (a second file `NAME-lowest.png` for the lowest similarity) or `.html` (one page).
    Returns the files written.
    """
    if out.suffix not in (".png", ".html"):
        raise UsageError(f"--out {out}: give a file that ends in .png or .html")
    catalog = Catalog.open(url)
    pages = {"random": catalog.rows(random_positions(catalog, samples, seed).tolist())}
    lowest = lowest_positions(catalog, samples)
    if len(lowest):
        pages["lowest"] = catalog.rows(lowest.tolist())
    if not pages["random"]:
        raise UsageError(f"{url} has no row with images: every row failed")
    if out.suffix == ".html":
        out.write_text(_page(catalog, pages, thumbnail), encoding="utf-8", errors="backslashreplace")
        return [out]
    written = []
    for name, rows in pages.items():
        path = out if name == "random" else out.with_stem(f"{out.stem}-{name}")
        draw_sheet(catalog, rows, thumbnail).save(path)
        written.append(path)
    return written


def random_positions(catalog: Catalog, count: int, seed: int) -> NDArray[np.int64]:
    """Positions of at most `count` usable rows, the same for the same seed."""
    usable = catalog.usable
    return np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))


def lowest_positions(catalog: Catalog, count: int) -> NDArray[np.int64]:
    """Positions of the usable rows whose worst variation is least similar to its real image, worst first."""
    table = catalog.columns("synthetic.list.element.similarity")
    lists = table["synthetic"].combine_chunks()
    values = pc.struct_field(lists.flatten(), "similarity").to_numpy(zero_copy_only=False).astype(np.float64)
    parents = pc.list_parent_indices(lists).to_numpy()
    if not len(values) or np.isnan(values).all():
        return np.empty(0, np.int64)
    worst = np.full(len(lists), np.inf)
    np.minimum.at(worst, parents, np.nan_to_num(values, nan=np.inf))
    order = np.argsort(worst, kind="stable")[:count]
    return order[np.isfinite(worst[order])]


def draw_sheet(catalog: Catalog, rows: Sequence[PairRow], thumbnail: int, columns: int | None = None) -> Image.Image:
    """One picture of all rows: real image first, then its variations, the similarity under each."""
    cells = [_cells(catalog, row, thumbnail) for row in rows]
    width_of_row = max(len(cell) for cell in cells) * (thumbnail + _GAP) + 2 * _GAP
    across = columns or max(1, min(len(cells), 900 // width_of_row))
    down = -(-len(cells) // across)
    height_of_row = thumbnail + _CAPTION + _GAP
    sheet = Image.new("RGB", (across * width_of_row, down * height_of_row + _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left = (number % across) * width_of_row + _GAP
        top = (number // across) * height_of_row + _GAP
        for picture, caption in cell:
            sheet.paste(picture, (left, top))
            pen.text((left, top + thumbnail), caption, fill=_INK)
            left += thumbnail + _GAP
    return sheet


def _cells(catalog: Catalog, row: PairRow, thumbnail: int) -> list[tuple[Image.Image, str]]:
    cells = []
    if row.real is not None:
        cells.append((_thumbnail(catalog.image(row, row.real), thumbnail), "real"))
    for image in row.synthetic:
        caption = "" if image.similarity is None else f"{_SIMILARITY if thumbnail >= 80 else ''}{image.similarity:.2f}"
        cells.append((_thumbnail(catalog.image(row, image), thumbnail), caption))
    return cells


def _thumbnail(data: bytes, side: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        small = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (side, side), _BACKGROUND)
    canvas.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return canvas


def data_uri(picture: Image.Image, quality: int = 85) -> str:
    """A picture as text for a page that must be one file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_TITLES = {"random": "Random pairs", "lowest": "Lowest similarity"}


def _page(catalog: Catalog, pages: dict[str, list[PairRow]], thumbnail: int) -> str:
    sections = []
    for name, rows in pages.items():
        figures = "".join(_figure(catalog, row, thumbnail) for row in rows)
        sections.append(f"<h2>{_TITLES[name]}</h2><div class=pairs>{figures}</div>")
    title = html.escape(catalog.storage.url)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>"
        "body{font:14px system-ui,sans-serif;margin:2em;background:#fafafa;color:#333}"
        ".pairs{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;background:#fff;padding:.5em;border:1px solid #ddd}"
        "figcaption{font-size:12px;margin-top:.3em;overflow-wrap:anywhere}"
        f"</style><h1>{title}</h1><p>{len(catalog):,} rows; in each box the real image first, then its variations "
        f"with the similarity of their embeddings.</p>{''.join(sections)}</html>"
    )


def _figure(catalog: Catalog, row: PairRow, thumbnail: int) -> str:
    cells = _cells(catalog, row, thumbnail)
    images = "".join(f'<img src="{data_uri(picture)}" alt="{caption}"> ' for picture, caption in cells)
    facts = [row.key, row.class_name or ("" if row.label is None else f"label {row.label}")]
    facts += [caption for _, caption in cells if caption not in ("", "real")]
    caption = html.escape(" · ".join(fact for fact in facts if fact))
    width = len(cells) * (thumbnail + 8)
    return f'<figure style="max-width:{width}px">{images}<figcaption>{caption}</figcaption></figure>'
