"""`status`, `verify`, `repair`, `reproduce`, `sheet`, `plan` and `pack` on real sets with real damage."""

import json
import os
import random
import shutil

import pytest
from PIL import Image

from tests.conftest import file_bytes, rows_of


@pytest.fixture(scope="module")
def made(tiny_model, photos, tmp_path_factory):
    from pipeline.cli import run

    folder = str(tmp_path_factory.mktemp("sets") / "made")
    assert (
        run(
            [
                "generate",
                "--source",
                photos,
                "--model",
                tiny_model,
                "--out",
                folder,
                "--batch-size",
                "4",
                "--shards",
                "4",
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def damaged(made, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(made, folder)
    return folder


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0x40]))


def assert_mended(folder, reference):
    ours, theirs = file_bytes(folder), file_bytes(reference)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".tar"))
    assert rows_of(folder) == rows_of(reference)


def test_status_of_a_finished_set(made, pipeline):
    code, out, _ = pipeline("status", made, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["shards_done"], facts["shards"], facts["rows_ok"], facts["merged"]) == (4, 4, 23, True)
    assert facts["images_per_second_per_worker"] > 0
    assert facts["eta_seconds"] == 0


def test_status_of_half_a_set_and_of_no_set(damaged, pipeline, tmp_path):
    for name in ("pairs-000000.parquet", "manifest.parquet"):
        (damaged / name).unlink()
    facts = json.loads(pipeline("status", damaged, "--json")[1])
    assert (facts["shards_done"], facts["merged"], facts["workers_now"]) == (3, False, 0)
    assert facts["eta_seconds"] is None
    code, _, err = pipeline("status", tmp_path / "nothing")
    assert code == 1
    assert "plan.json" in err


def test_a_sound_set_verifies(made, pipeline):
    code, out, _ = pipeline("verify", made)
    assert code == 0
    assert "is sound" in out


def test_any_flipped_byte_is_found_named_and_mended(made, damaged, pipeline):
    draw = random.Random(1)
    for name in ("pairs-000001.tar", "pairs-000002.parquet", "manifest.parquet"):
        flip(damaged / name, draw.randrange(os.path.getsize(damaged / name)))
    code, out, _ = pipeline("verify", damaged)
    assert code == 3
    assert "pairs-000001.tar" in out
    assert "pairs-000002.parquet" in out
    code, out, err = pipeline("repair", damaged)
    assert code == 0, err
    assert pipeline("verify", damaged)[0] == 0
    assert_mended(damaged, made)


def test_hurt_rows_are_named(damaged, pipeline):
    row = next(row for row in rows_of(damaged) if row["shard"] == 1)
    flip(damaged / "pairs-000001.tar", row["synthetic"][0]["offset"] + 5)
    facts = json.loads(pipeline("verify", damaged, "--json")[1])
    assert [problem["keys"] for problem in facts["problems"]] == [[row["key"]]]


@pytest.mark.parametrize(
    "lost",
    [
        ["pairs-000000.tar"],
        ["pairs-000003.parquet"],
        ["pairs-000001.tar", "pairs-000001.parquet"],
        ["manifest.parquet"],
    ],
)
def test_lost_files_are_found_and_made_again(made, damaged, pipeline, lost):
    for name in lost:
        (damaged / name).unlink()
    assert pipeline("verify", damaged)[0] == 3
    assert pipeline("repair", damaged)[0] == 0
    assert_mended(damaged, made)


def test_truncated_files_are_found_and_made_again(made, damaged, pipeline):
    os.truncate(damaged / "pairs-000000.tar", 700)
    os.truncate(damaged / "pairs-000002.parquet", 0)
    assert pipeline("verify", damaged)[0] == 3
    assert pipeline("repair", damaged)[0] == 0
    assert_mended(damaged, made)


def test_swapped_shards_are_found_and_made_again(made, damaged, pipeline):
    for suffix in ("tar", "parquet"):
        shutil.copy(damaged / f"pairs-000000.{suffix}", damaged / f"pairs-000001.{suffix}")
    assert pipeline("verify", damaged)[0] == 3
    assert pipeline("repair", damaged)[0] == 0
    assert_mended(damaged, made)


def test_stray_shards_are_named_and_left_to_the_user(damaged, pipeline):
    shutil.copy(damaged / "pairs-000000.tar", damaged / "pairs-000009.tar")
    code, out, _ = pipeline("verify", damaged)
    assert code == 3
    assert "pairs-000009.tar: stray" in out
    assert pipeline("repair", damaged)[0] == 3
    assert (damaged / "pairs-000009.tar").exists()


def test_repair_keeps_intact_images_of_a_bad_shard_byte_for_byte(damaged, pipeline):
    """Shown by a source whose other images are gone: kept rows need no source."""
    rows = [row for row in rows_of(damaged) if row["shard"] == 1]
    flip(damaged / "pairs-000001.tar", rows[0]["synthetic"][0]["offset"] + 3)
    before = {row["key"]: row for row in rows_of(damaged)}
    source = json.loads((damaged / "plan.json").read_text())["source"]["location"]
    copy = damaged.parent / "photos"
    shutil.copytree(source, copy)
    for row in rows[1:]:
        size = os.path.getsize(copy / row["source"])
        (copy / row["source"]).write_bytes(bytes(size))
    assert pipeline("repair", damaged, "--source", copy)[0] == 0
    assert {row["key"]: row for row in rows_of(damaged)} == before


def test_repair_makes_failed_rows_once_their_image_is_mended(pipeline, tiny_model, photos, tmp_path):
    source, folder = tmp_path / "photos", tmp_path / "set"
    shutil.copytree(photos, source)
    victim = source / "cat" / "photo 1.jpg"
    good = victim.read_bytes()
    victim.write_bytes(good[:100])
    arguments = [
        "generate",
        "--source",
        source,
        "--model",
        tiny_model,
        "--out",
        folder,
        "--batch-size",
        "4",
        "--shards",
        "3",
    ]
    assert pipeline(*arguments, "--max-failures", "1")[0] == 3
    assert pipeline("repair", folder)[0] == 3, "still broken"
    victim.write_bytes(good)
    others = {row["key"]: row for row in rows_of(folder) if row["status"] == "ok"}
    code, out, err = pipeline("repair", folder)
    assert code == 0, out + err
    rows = {row["key"]: row for row in rows_of(folder)}
    assert len(rows) == 23
    assert all(row["status"] == "ok" for row in rows.values())
    same = ("status", "label", "source", "generator")
    for key, row in others.items():
        assert [row[name] for name in same] == [rows[key][name] for name in same]
        assert [image["sha256"] for image in row["synthetic"]] == [image["sha256"] for image in rows[key]["synthetic"]]
    fresh = tmp_path / "fresh"
    assert pipeline(*arguments[:5], "--out", fresh, *arguments[7:])[0] == 0
    assert [row["synthetic"] for row in rows_of(fresh)] == [row["synthetic"] for row in rows_of(folder)]
    assert pipeline("verify", folder)[0] == 0


def test_a_deleted_bad_file_stays_a_failed_row_and_hinders_no_repair(pipeline, tiny_model, photos, tmp_path):
    source, folder = tmp_path / "photos", tmp_path / "set"
    shutil.copytree(photos, source)
    (source / "cat" / "photo 1.jpg").write_bytes(b"")
    flags = ["--model", tiny_model, "--out", folder, "--batch-size", "4", "--shards", "3", "--max-failures", "1"]
    code, out, _ = pipeline("generate", "--source", source, *flags)
    assert code == 3
    assert "cat/photo 1.jpg: empty file" in out
    assert "cat/photo 1.jpg: empty file" in pipeline("status", folder)[1]
    before = {row["key"]: row for row in rows_of(folder)}
    (source / "cat" / "photo 1.jpg").unlink()
    Image.new("RGB", (9, 9)).save(source / "cat" / "new.png")
    bad = next(row for row in before.values() if row["status"] == "failed")["shard"]
    other = (bad + 1) % 3
    flip(folder / f"pairs-{other:06d}.tar", 600)
    code, out, err = pipeline("repair", folder)
    assert code == 3, err
    assert "cat/photo 1.jpg" in out
    after = {row["key"]: row for row in rows_of(folder)}
    assert after.keys() == before.keys()
    assert sum(row["status"] == "ok" for row in after.values()) == 22
    assert pipeline("verify", folder)[0] == 0
    key = next(key for key, row in after.items() if row["status"] == "ok")
    assert "the same bytes" in pipeline("reproduce", folder, key)[1]


def test_repair_refuses_another_source_or_model(damaged, pipeline, tmp_path, photos):
    (damaged / "pairs-000000.tar").unlink()
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / "cat" / "photo 1.jpg").rename(other / "cat" / "renamed.jpg")
    code, _, err = pipeline("repair", damaged, "--source", other)
    assert code == 2
    assert "--source" in err
    from pipeline.generators.random_weights import tiny_variations

    tiny_variations("32px", seed=5).save_pretrained(tmp_path / "other-model")
    code, _, err = pipeline("repair", damaged, "--model", tmp_path / "other-model")
    assert code == 2
    assert "--model" in err


def test_reproduce_gives_the_same_bytes(made, pipeline, tmp_path):
    key = rows_of(made)[7]["key"]
    code, out, _ = pipeline("reproduce", made, key, "--json", "--save", tmp_path / "again")
    assert code == 0
    facts = json.loads(out)
    assert facts["variations"] == [{"same_bytes": True, "mean_distance": 0.0, "max_distance": 0}]
    with Image.open(tmp_path / "again" / f"{key}.syn0.jpg") as picture:
        assert picture.size == (32, 32)


def test_reproduce_of_an_unknown_key(made, pipeline):
    code, _, err = pipeline("reproduce", made, "nobody")
    assert code == 3
    assert "nobody" in err


def test_sheets_show_every_asked_pair(made, pipeline, tmp_path):
    code, out, _ = pipeline("sheet", made, "--out", tmp_path / "sheet.png", "--samples", "6", "--thumbnail", "40")
    assert code == 0
    assert out.split() == [str(tmp_path / "sheet.png"), str(tmp_path / "sheet-lowest.png")]
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width >= 2 * 40
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert pipeline("sheet", made, "--out", tmp_path / "sheet.html", "--samples", "5")[0] == 0
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<figure") == 10
    assert page.count("data:image/jpeg;base64,") == 20
    assert pipeline("sheet", made, "--out", tmp_path / "sheet.gif")[0] == 2


def test_the_lowest_similarity_comes_first(made):
    from manifests.catalog import Catalog
    from pipeline.sheet import lowest_positions

    similarity = [row["synthetic"][0]["similarity"] for row in rows_of(made)]
    expected = sorted(range(23), key=lambda position: similarity[position])[:5]
    assert lowest_positions(Catalog.open(made), 5).tolist() == expected


def test_plan_counts_rounds_and_waste(pipeline, tiny_model, photos):
    arguments = ["plan", "--source", photos, "--model", tiny_model, "--shards", "6", "--rate", "0.01"]
    code, out, _ = pipeline(*arguments, "--for-workers", "1,4", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["rows"], facts["shards"], facts["images_to_make"]) == (23, 6, 23)
    assert facts["gpu_hours"] == pytest.approx(23 / 0.01 / 3600, abs=1e-3)
    one, four = facts["workers"]
    assert (one["rounds"], one["tail_waste"]) == (6, 0.0)
    assert (four["rounds"], four["tail_waste"]) == (2, 0.25)
    assert pipeline(*arguments)[0] == 0


@pytest.fixture
def generated(photos, tmp_path):
    """A folder of generated images with the same relative paths, one missing, one broken, one too many."""
    folder = tmp_path / "generated"
    for place, _, names in os.walk(photos):
        for name in names:
            if not name.endswith((".jpg", ".png")):
                continue
            path = folder / os.path.relpath(place, photos) / (os.path.splitext(name)[0] + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (len(name), 80, 90)).save(path)
    (folder / "cat" / "photo 1.png").unlink()
    (folder / "dog" / "photo 2.png").write_bytes(b"broken")
    Image.new("RGB", (8, 8)).save(folder / "cat" / "extra.png")
    return folder


def test_pack_pairs_folders_and_repairs(pipeline, photos, generated, tmp_path):
    folder = tmp_path / "set"
    arguments = [
        "pack",
        "--real",
        photos,
        "--synthetic",
        generated,
        "--out",
        folder,
        "--shards",
        "3",
        "--max-failures",
        "2",
    ]
    code, out, err = pipeline(*arguments, "--json")
    assert code == 3, err
    failed = {row["source"]: row["error"] for row in rows_of(folder) if row["status"] == "failed"}
    assert set(failed) == {"cat/photo 1.jpg", "dog/photo 2.jpg"}
    ok = [row for row in rows_of(folder) if row["status"] == "ok"]
    assert len(ok) == 21
    assert all(row["synthetic"][0]["width"] == 16 and row["synthetic"][0]["similarity"] is None for row in ok)
    assert pipeline("verify", folder)[0] == 0
    assert "nothing to do" in pipeline(*arguments)[1]
    Image.new("RGB", (16, 16)).save(generated / "cat" / "photo 1.png")
    Image.new("RGB", (16, 16)).save(generated / "dog" / "photo 2.png")
    assert pipeline("repair", folder)[0] == 0
    assert all(row["status"] == "ok" for row in rows_of(folder))


def test_pack_several_folders(pipeline, photos, tmp_path):
    code, _, err = pipeline(
        "pack", "--real", photos, "--synthetic", photos, "--synthetic", photos, "--out", tmp_path / "set"
    )
    assert code == 0, err
    assert all(len(row["synthetic"]) == 2 for row in rows_of(tmp_path / "set"))


def test_repair_refuses_another_source_even_if_no_shard_is_left(damaged, pipeline, tmp_path, photos):
    for name in os.listdir(damaged):
        if name.startswith("pairs-"):
            (damaged / name).unlink()
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / "cat" / "photo 1.jpg").rename(other / "cat" / "renamed.jpg")
    code, _, err = pipeline("repair", damaged, "--source", other)
    assert code == 2
    assert "no shard is left" in err


def test_kept_images_that_changed_meanwhile_are_not_written_again(damaged):
    """As when another repair replaces the tar between the look at its rows and the reading."""
    from manifests.catalog import Catalog
    from manifests.errors import CorruptSetError
    from manifests.shard import Sample
    from pipeline.row_reader import kept_sample

    catalog = Catalog.open(str(damaged))
    row = catalog.rows([0])[0]
    kept_sample(catalog.storage, Sample(key=row.key), row)
    flip(damaged / "pairs-000000.tar", row.synthetic[0].offset + 9)
    with pytest.raises(CorruptSetError, match="changed while"):
        kept_sample(catalog.storage, Sample(key=row.key), row)


def test_a_sheet_that_cannot_be_written_is_an_error_without_traceback(made, pipeline, tmp_path):
    code, _, err = pipeline("sheet", made, "--out", tmp_path / "nowhere" / "sheet.png", "--samples", "2")
    assert code == 1
    assert "nowhere" in err
