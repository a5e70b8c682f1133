"""`pipeline generate` end to end on real images with a real (tiny) diffusion pipeline."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from manifests.plan import Plan
from pipeline.plan import variation_seed
from tests.conftest import file_bytes, rows_of


@pytest.fixture(scope="module")
def finished(tiny_model, photos, tmp_path_factory):
    """A finished set of two variations in five shards."""
    from pipeline.cli import run

    folder = str(tmp_path_factory.mktemp("sets") / "finished")
    arguments = ["generate", "--source", photos, "--model", tiny_model, "--out", folder]
    assert run([*arguments, "--batch-size", "4", "--shards", "5", "--variations", "2"]) == 0
    return folder


def test_only_the_listed_files_are_left(finished):
    shards = [f"pairs-00000{shard}.{suffix}" for shard in range(5) for suffix in ("parquet", "tar")]
    assert sorted(os.listdir(finished)) == sorted([*shards, "README.md", "manifest.parquet", "plan.json"])


def test_every_image_is_one_row_with_every_variation(finished, photos):
    rows = rows_of(finished)
    files = [name for _, _, names in os.walk(photos) for name in names if name.endswith((".jpg", ".png"))]
    assert len(rows) == len(files) == 23
    assert len({row["key"] for row in rows}) == 23
    assert all(row["status"] == "ok" and len(row["synthetic"]) == 2 for row in rows)
    assert {(row["class_name"], row["label"]) for row in rows} == {("cat", 0), ("dog", 1)}
    assert [row["shard"] for row in rows] == sorted(row["shard"] for row in rows)


def test_offsets_sizes_hashes_and_sizes_are_those_of_the_stored_images(finished):
    for row in rows_of(finished):
        with open(f"{finished}/pairs-{row['shard']:06d}.tar", "rb") as tar:
            for image in [row["real"], *row["synthetic"]]:
                tar.seek(image["offset"])
                data = tar.read(image["size"])
                assert hashlib.sha256(data).digest() == image["sha256"]
                with Image.open(io.BytesIO(data)) as picture:
                    assert (picture.format, picture.size) == ("JPEG", (image["width"], image["height"]))
        assert all((image["width"], image["height"]) == (32, 32) for image in row["synthetic"])


def test_seeds_follow_from_seed_key_and_index(finished):
    for row in rows_of(finished):
        assert [image["seed"] for image in row["synthetic"]] == [variation_seed(0, row["key"], k) for k in range(2)]
    assert all(-1 <= image["similarity"] <= 1.001 for row in rows_of(finished) for image in row["synthetic"])


def test_members_are_contiguous_and_as_webdataset_names_them(finished):
    with tarfile.open(f"{finished}/pairs-000000.tar") as tar:
        names = tar.getnames()
    keys = list(dict.fromkeys(name.split(".")[0] for name in names))
    expected = [f"{key}.{suffix}" for key in keys for suffix in ("real.jpg", "syn0.jpg", "syn1.jpg", "json", "cls")]
    assert names == expected


def test_baseline_jpegs_are_stored_byte_for_byte(finished, photos):
    rows = [row for row in rows_of(finished) if row["source"].endswith(".jpg")]
    assert rows
    for row in rows:
        with (
            open(f"{finished}/pairs-{row['shard']:06d}.tar", "rb") as tar,
            open(f"{photos}/{row['source']}", "rb") as file,
        ):
            tar.seek(row["real"]["offset"])
            assert tar.read(row["real"]["size"]) == file.read()


def test_a_finished_set_is_left_alone(finished, generate):
    before = file_bytes(finished)
    code, out, _ = generate(finished, "--shards", "5", "--variations", "2")
    assert code == 0
    assert "nothing to do" in out
    assert file_bytes(finished) == before


def test_the_same_settings_give_the_same_bytes_elsewhere(finished, generate, tmp_path):
    assert generate(tmp_path / "again", "--shards", "5", "--variations", "2")[0] == 0
    ours, theirs = file_bytes(tmp_path / "again"), file_bytes(finished)
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".tar"))
    assert rows_of(tmp_path / "again") == rows_of(finished)


def test_a_lost_shard_is_made_again_and_nothing_else(finished, generate, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    for name in ("pairs-000003.parquet", "pairs-000001.parquet", "pairs-000001.tar", "manifest.parquet"):
        (folder / name).unlink()
    untouched = {name: os.stat(folder / name).st_mtime_ns for name in ("pairs-000000.tar", "pairs-000002.parquet")}
    assert generate(folder, "--shards", "5", "--variations", "2")[0] == 0
    assert {name: os.stat(folder / name).st_mtime_ns for name in untouched} == untouched
    assert rows_of(folder) == rows_of(finished)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "1"], "seed: 0 in the folder, 1 now"),
        (["--shards", "4"], "shards"),
        (["--steps", "3"], "generator.steps: 2 in the folder, 3 now"),
        (["--limit", "9"], "limit"),
        (["--store-real", "16"], "store_real"),
    ],
)
def test_another_plan_is_refused_naming_the_difference(finished, generate, flags, named):
    flags = flags if flags[0] == "--shards" else ["--shards", "5", *flags]
    code, _, err = generate(finished, "--variations", "2", *flags)
    assert code == 1
    assert named in err
    assert "Traceback" not in err


def test_a_moved_source_and_model_are_the_same_plan(finished, generate, tmp_path, photos, tiny_model):
    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    shutil.copytree(photos, tmp_path / "moved photos")
    shutil.copytree(tiny_model, tmp_path / "moved-model")
    places = {"source": tmp_path / "moved photos", "model": tmp_path / "moved-model"}
    assert generate(folder, "--shards", "5", "--variations", "2", **places)[0] == 0


def test_a_changed_source_is_refused(finished, generate, tmp_path, photos):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "cat" / "photo 1.jpg", tmp_path / "photos" / "cat" / "another.jpg")
    code, _, err = generate(finished, "--shards", "5", "--variations", "2", source=tmp_path / "photos")
    assert code == 1
    assert "source.fingerprint" in err


def test_a_folder_of_other_things_is_refused_untouched(generate, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    code, _, err = generate(tmp_path)
    assert code == 2
    assert "not empty" in err
    assert (tmp_path / "README.md").read_text() == "my project"
    assert os.listdir(tmp_path) == ["README.md"]


def test_overwrite_deletes_the_set_and_nothing_else(generate, tmp_path):
    folder = tmp_path / "set"
    assert generate(folder, "--shards", "2", "--limit", "4")[0] == 0
    (folder / "mine.txt").write_text("keep me")
    assert generate(folder, "--shards", "1", "--limit", "3", "--overwrite")[0] == 0
    assert (folder / "mine.txt").read_text() == "keep me"
    assert len(rows_of(folder)) == 3
    assert not (folder / "pairs-000001.tar").exists()


def test_unreadable_images_are_failed_rows_and_exit_3(generate, pipeline, tmp_path, photos):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "cat" / "text.png").write_bytes(b"this is no image")
    (source / "dog" / "gone.jpg").symlink_to(source / "nowhere.jpg")
    code, out, err = generate(tmp_path / "set", "--max-failures", "3", "--json", source=source)
    assert code == 3, err
    summary = json.loads(out)
    assert summary["rows_ok"] == 23
    assert sum(summary["rows_failed"].values()) == 3
    failed = {row["source"]: row["error"] for row in rows_of(tmp_path / "set") if row["status"] == "failed"}
    assert set(failed) == {"cat/empty.jpg", "cat/text.png", "dog/gone.jpg"}
    assert all(failed.values())
    assert pipeline("verify", tmp_path / "set")[0] == 0
    again, out, _ = generate(tmp_path / "set", "--max-failures", "3", source=source)
    assert again == 3
    assert "nothing to do" in out


def test_too_many_failures_stop_the_run_with_the_reasons(generate, tmp_path, photos):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    for number in range(6):
        (source / "cat" / f"broken{number}.jpg").write_bytes(b"")
    code, _, err = generate(tmp_path / "set", source=source)
    assert code == 1
    assert "--max-failures" in err
    assert not [name for name in os.listdir(tmp_path / "set") if name.startswith(".")]


def test_a_failing_neighbour_changes_no_other_row(generate, tmp_path, photos):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    assert generate(tmp_path / "whole", "--shards", "2", source=source)[0] == 0
    victim = rows_of(tmp_path / "whole")[2]["source"]
    size = os.path.getsize(source / victim)
    (source / victim).write_bytes(bytes(size))
    assert generate(tmp_path / "hurt", "--shards", "2", "--max-failures", "1", source=source)[0] == 3
    whole = {row["key"]: row for row in rows_of(tmp_path / "whole")}
    for row in rows_of(tmp_path / "hurt"):
        if row["source"] != victim:
            assert [image["sha256"] for image in row["synthetic"]] == [
                image["sha256"] for image in whole[row["key"]]["synthetic"]
            ]


def test_store_real_shrinks_and_never_enlarges(generate, tmp_path):
    assert generate(tmp_path / "set", "--store-real", "24")[0] == 0
    sides = [min(row["real"]["width"], row["real"]["height"]) for row in rows_of(tmp_path / "set")]
    assert max(sides) == 24


def test_limit_takes_rows_of_the_full_plan_and_more_shards_than_rows_are_clamped(generate, finished, tmp_path):
    assert generate(tmp_path / "set", "--limit", "3", "--shards", "100")[0] == 0
    assert Plan.from_bytes((tmp_path / "set" / "plan.json").read_bytes()).shards == 3
    order = [row["key"] for row in rows_of(finished)]
    assert [row["key"] for row in rows_of(tmp_path / "set")] == order[:3]


def test_batch_size_is_remembered_and_no_part_of_the_identity(finished, generate, tmp_path):
    import pyarrow.parquet as pq

    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    for name in ("pairs-000004.parquet", "manifest.parquet"):
        (folder / name).unlink()
    code, _, err = generate(folder, "--shards", "5", "--variations", "2", "--batch-size", "auto")
    assert code == 0, err
    facts = json.loads(pq.read_schema(folder / "pairs-000004.parquet").metadata[b"diffmix.shard"])
    assert facts["batch_size"] == 4
    assert rows_of(folder) == rows_of(finished)


def test_config_file_and_flags(pipeline, tiny_model, photos, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"source: {photos}\nmodel: {tiny_model}\nshards: 3\nguidance-scale: 1.0\nlimit: 6\n")
    code, out, err = pipeline("generate", "--config", config, "--shards", "2", "--dry-run", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["shards"], facts["rows"], facts["generator"]["guidance_scale"]) == (2, 6, 1.0)


def test_config_with_an_unknown_key_names_the_nearest(pipeline, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("shard: 3\n")
    code, _, err = pipeline("generate", "--config", config)
    assert code == 2
    assert "did you mean 'shards'" in err


def test_dry_run_writes_nothing(generate, tmp_path):
    code, out, _ = generate(tmp_path / "set", "--dry-run")
    assert code == 0
    assert "23 labelled images" in out
    assert not (tmp_path / "set").exists()


def test_preset_holds_the_reference_settings():
    from pipeline.options import PRESETS

    preset = PRESETS["diffmix-paper"]
    assert (preset["steps"], preset["guidance_scale"], preset["seed"], preset["size"]) == (50, 3.0, 25, 512)
    assert (preset["model"], preset["revision"]) == ("lambdalabs/sd-image-variations-diffusers", "v2.0")
    versatile = PRESETS["diffmix-paper-versatile"]
    assert versatile == {k: v for k, v in preset.items() if k != "revision"} | {"model": "shi-labs/versatile-diffusion"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--source", "/nowhere/at/all"], "/nowhere/at/all"),
        (["generate", "--shards", "0"], "--shards"),
        (["generate", "--store-real", "tiny"], "--store-real"),
        (["generate", "--batch-size", "-3"], "--batch-size"),
        (["generate", "--model", "no-such-folder"], "no-such-folder"),
        (["generate", "--source", "digits", "--count", "5"], "--count"),
        (["generate", "--bogus"], "--bogus"),
        (["nonsense"], "nonsense"),
    ],
)
def test_usage_errors_exit_2_without_traceback(pipeline, tmp_path, arguments, named):
    extra = ["--out", tmp_path / "set"] if arguments[0] == "generate" else []
    code, _, err = pipeline(*arguments, *extra)
    assert code == 2
    assert named in err
    assert "Traceback" not in err
    assert not (tmp_path / "set").exists()


def test_similarity_is_the_cosine_of_independent_embeddings(finished, tiny_model):
    """One pair through transformers' own encoder, from the stored synthetic image (JPEG, so only nearly equal)."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(tiny_model, subfolder="image_encoder").eval()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def embed(data):
        with Image.open(io.BytesIO(data)) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
        resized = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic")
        with torch.no_grad():
            return encoder((resized - mean[:, None, None]) / std[:, None, None]).image_embeds[0]

    row = next(row for row in rows_of(finished) if row["source"].endswith(".jpg"))
    with open(f"{finished}/pairs-{row['shard']:06d}.tar", "rb") as tar:
        embeds = []
        for image in [row["real"], row["synthetic"][0]]:
            tar.seek(image["offset"])
            embeds.append(embed(tar.read(image["size"])))
    cosine = torch.nn.functional.cosine_similarity(*embeds, dim=0).item()
    assert cosine == pytest.approx(row["synthetic"][0]["similarity"], abs=0.02)


def test_one_of_several_ranks_cannot_overwrite(finished, generate, monkeypatch):
    before = file_bytes(finished)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = generate(finished, "--shards", "5", "--variations", "2", "--overwrite")
    assert code == 2
    assert "each would delete what the others made" in err
    assert file_bytes(finished) == before


def test_overwriting_what_another_process_writes_is_refused(finished, generate, tmp_path):
    from manifests.layout import host

    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            (folder / f".pairs-000000.tar@{host()}.{other.pid}.ab.tmp").touch()
            before = file_bytes(folder)
            code, _, err = generate(folder, "--overwrite")
        finally:
            other.kill()
    assert code == 2
    assert f"process {other.pid}" in err
    assert file_bytes(folder) == before


def test_failures_of_another_run_count_in_the_outcome(tiny_model, photos, tmp_path):
    """The other run makes all shards, one row failed, while this one waits: as ranks do for each other."""
    from manifests.plan import claim
    from manifests.shard import Sample, ShardWriter
    from manifests.storage import open_storage
    from pipeline.generate import run
    from pipeline.job import Job, make_plan
    from pipeline.sources.folder import FolderSource

    index = FolderSource(photos).index()
    plan = make_plan(
        index=index, source={"kind": "folder", "location": photos, "fingerprint": ""}, generator=None, seed=0,
        variations=1, shards=2, limit=None, store_real="original", quality=90, max_pixels=10**8,
    )  # fmt: skip
    storage = open_storage(str(tmp_path / "set"))
    storage.create_folder()
    claim(storage, plan)

    def others(job, work, report):
        for shard in work.shards:
            writer = ShardWriter(storage, shard, generator=None, labelled=True)
            for row in work.task(shard).rows.to_pylist():
                writer.add(Sample(key=row["key"], label=row["label"], error="empty file"))
            writer.commit()

    job = Job(out=storage.url, plan=plan, source=None, generator=None, generator_name="")
    outcome = run(job, index, storage, others)
    assert outcome.failed.by_reason() == {"empty file": plan.rows}
    assert outcome.rows_ok == 0


def test_paths_that_are_no_utf8_and_hold_line_breaks(generate, pipeline, tmp_path, photos):
    source, folder = tmp_path / "ph\udcff\nos", tmp_path / "set\udcff"
    try:
        shutil.copytree(photos, source)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    code, out, err = generate(folder, "--shards", "1", "--limit", "2", "--json", source=source)
    assert code == 0, err
    assert json.loads(out)["url"] == str(folder)
    assert "ph\\udcff\\nos`" in (folder / "README.md").read_text()
    assert pipeline("sheet", folder, "--out", tmp_path / "sheet.html")[0] == 0
    assert pipeline("verify", folder, "--json")[0] == 0


def test_a_set_without_any_good_row(generate, pipeline, tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").touch()
    assert generate(tmp_path / "set", "--shards", "2", "--max-failures", "100%", source=source)[0] == 3
    assert pipeline("verify", tmp_path / "set")[0] == 0
    assert "0 ok, 3 failed" in (tmp_path / "set" / "README.md").read_text()
    code, _, err = pipeline("sheet", tmp_path / "set", "--out", tmp_path / "sheet.png")
    assert code == 2
    assert "every row failed" in err
