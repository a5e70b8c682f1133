"""What `pipeline bench` says and compares, at sizes that say nothing about speed."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from manifests import layout
from manifests.catalog import Catalog
from manifests.storage import open_storage
from pipeline.bench import DEFAULT_SECTIONS, SECTIONS
from pipeline.bench.figures import Figure, Goal, Settings, Times, in_turns
from pipeline.generators.base import GeneratorConfig
from pipeline.generators.random_weights import tiny_variations
from pipeline.generators.sd_variations import SDVariations


def silent(text):
    pass


@pytest.fixture(scope="module")
def variations():
    return tiny_variations("32px")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_model_against_the_plain_loop(pipeline, tiny_model):
    code, out, err = pipeline(
        "bench", "--sections", "generation", "--model", tiny_model, "--images", "6", "--batch-size", "2",
        "--rounds", "2", "--json",
    )  # fmt: skip
    assert code == 0
    facts = json.loads(out)
    assert facts["machine"]["cores"] > 0
    automatic, equal, difference, busy = facts["sections"]["generation"]
    assert automatic["name"] == "model, batch 3 (automatic)"  # two shards of three images
    assert equal["name"] == "model, batch 2"
    for figure in (automatic, equal):
        assert figure["unit"] == "images/s"
        assert figure["baseline_name"] == "plain diffusers loop, batch 2"
        assert figure["ours"] > 0
        assert figure["ratio_range"][0] <= figure["ratio"] <= figure["ratio_range"][1]
    assert difference["ours"] <= 1
    assert difference["met"]
    assert 0 < busy["ours"] <= 100
    assert "round 2 of 2" in err


def test_random_weights_in_three_settings_with_arithmetic(variations):
    from pipeline.bench.generation import measure_case, random_cases

    cases = list(random_cases(variations, Settings(images=2, rounds=1, steps=None), torch.device("cpu")))
    assert [(case.generator.size, case.generator.steps) for case in cases] == [(32, 50), (32, 25), (16, 50)]
    (case,) = random_cases(variations, Settings(images=4, rounds=1, steps=2, size=16), torch.device("cpu"))
    figures = measure_case(case, Settings(batch_size=2), silent)
    assert case.name == "random weights, 16 px, 2 steps, guidance 3, float32"
    assert figures[-1].unit == "TFLOP/s"
    assert figures[-1].baseline > 0


def test_without_webdataset_the_tar_section_is_skipped(monkeypatch):
    from pipeline.bench import tar

    said = []
    monkeypatch.setattr(tar.importlib.util, "find_spec", lambda name: None)
    assert tar.measure(Settings(), said.append) == []
    assert "webdataset is not installed" in said[0]


def test_the_plain_loop_makes_one_jpeg_per_file(variations, tmp_path):
    from PIL import Image

    from pipeline.bench.pictures import write_pictures
    from pipeline.bench.plain_loop import PlainLoop

    write_pictures(tmp_path / "real", 3, 40)
    files = sorted((tmp_path / "real").iterdir())
    assert {Image.open(file).size for file in files} == {(40, 30), (30, 40)}
    generator = SDVariations.from_pipeline(variations, GeneratorConfig(model="", steps=1), torch.device("cpu"))
    loop = PlainLoop(variations, generator, 2)
    loop.run(files, tmp_path / "made")
    made = sorted((tmp_path / "made").iterdir())
    assert [file.stem for file in made] == [file.stem for file in files]
    assert {Image.open(file).size for file in made} == {(32, 32)}


def test_the_plain_loop_sees_what_our_generator_sees(variations, tmp_path):
    from pipeline.bench.pictures import write_pictures
    from pipeline.bench.plain_loop import PlainLoop
    from pipeline.sources.images import decode

    write_pictures(tmp_path / "real", 2, 60)
    files = sorted((tmp_path / "real").iterdir())
    generator = SDVariations.from_pipeline(variations, GeneratorConfig(model="", steps=1), torch.device("cpu"))
    ours = torch.stack([generator.prepare(decode(file.read_bytes(), max_pixels=10_000)) for file in files])
    torch.testing.assert_close(PlainLoop(variations, generator, 2).inputs(files), ours)


def test_flops_are_those_of_the_matrix_products():
    from pipeline.bench.flops import flops_per_image

    def flops(steps):
        config = GeneratorConfig(model="", steps=steps, scheduler="ddim", guidance_scale=1.0)
        return flops_per_image(SDVariations.from_pipeline(tiny_variations("32px"), config, torch.device("cpu")))

    once, twice, thrice = flops(1), flops(2), flops(3)
    assert once > 0
    assert thrice - twice == twice - once > 0


def test_host_work(pipeline):
    code, out, _ = pipeline("bench", "--sections", "host", "--size", "32", "--quick", "--rounds", "1")
    assert code == 0
    assert out.count("host work per 32 px image") == 2
    assert "target >= 3.5x" in out
    assert "target >= 6x" in out


def test_both_tars_hold_the_same_members():
    pytest.importorskip("webdataset")
    from pipeline.bench.tar import write_ours, write_webdataset

    contents = []
    for data in (write_ours(["a", "b"], b"x" * 700), write_webdataset(["a", "b"], b"x" * 700)):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            contents.append([(member.name, tar.extractfile(member).read()) for member in tar])
    assert contents[0] == contents[1] == [("a.jpg", b"x" * 700), ("b.jpg", b"x" * 700)]


def test_tar_section(pipeline):
    pytest.importorskip("webdataset")
    code, out, _ = pipeline("bench", "--sections", "tar", "--quick", "--rounds", "1")
    assert code == 0
    assert "68 kB" in out
    assert "1 kB" in out


def test_made_up_manifest_is_a_real_one(tmp_path, monkeypatch):
    from pipeline.bench import manifest

    monkeypatch.setattr(manifest, "_SHARD_ROWS", 40)
    manifest.write(open_storage(str(tmp_path)), 100)
    catalog = Catalog.open(str(tmp_path))
    assert sorted(catalog.permutation(1)) == list(range(100))
    rows = catalog.rows(range(100))
    assert len({row.key for row in rows}) == 100
    assert [row.shard for row in rows] == [0] * 40 + [1] * 40 + [2] * 20
    assert all(len(row.synthetic) == 1 and len(row.real.sha256) == 32 for row in rows)
    assert rows[40].real.offset < rows[41].real.offset < rows[41].synthetic[0].offset


def test_manifest_section_measures_in_a_fresh_process():
    from pipeline.bench.manifest import measure

    size, seconds, memory = measure(Settings(manifest_rows=3000, rounds=1), silent)
    assert 80 < size.ours < 200
    assert seconds.ours > 0
    assert 0.01 < memory.ours < 10


def test_manifest_rows_come_in_row_groups(tmp_path, monkeypatch):
    from pipeline.bench import manifest

    monkeypatch.setattr(manifest.catalog, "ROW_GROUP", 30)
    manifest.write(open_storage(str(tmp_path)), 100)
    assert pq.ParquetFile(tmp_path / layout.MANIFEST).num_row_groups == 4


@pytest.mark.slow
def test_memory_of_two_whole_runs():
    from pipeline.bench.memory import measure

    peak, growth = measure(Settings(memory_images=20), silent)
    assert "over 20 images" in peak.name
    assert "over 2 images" in peak.baseline_name
    assert peak.ours > 50
    assert growth.baseline > 0


def test_peak_memory_of_a_child_leaves_its_parent_out(tmp_path):
    from pipeline.bench import manifest
    from pipeline.bench.child import call, peak_bytes

    held = np.ones(500 << 20, np.uint8)
    manifest.write(open_storage(str(tmp_path)), 100)
    facts = call("draw", str(tmp_path))
    assert facts["rows"] == 100
    assert facts["peak_bytes"] < held.nbytes < peak_bytes()


def test_sections_are_there():
    from importlib import import_module

    assert set(DEFAULT_SECTIONS) < set(SECTIONS)
    for place in SECTIONS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))


def test_unknown_section_is_a_usage_error(pipeline):
    code, _, err = pipeline("bench", "--sections", "hosts")
    assert code == 2
    assert "hosts" in err
    assert "generation" in err


def test_turns_are_taken_and_turned():
    order = []
    times = in_turns(3, {name: lambda name=name: order.append(name) for name in "abc"})
    assert order == list("abcbcacab")
    assert all(len(time.seconds) == 3 for time in times.values())


def test_speedup_is_the_median_of_the_rounds_ratios():
    ratio, spread = Times((1.0, 2.0, 4.0)).speedup(Times((2.0, 2.0, 12.0)))
    assert ratio == 2
    assert spread == (1, 3)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal(bound=1.3), True),
        (Goal(bound=1.5), False),
        (Goal(bound=10, of="ours", at_least=False), True),
        (Goal(bound=11, of="ours"), False),
    ],
)
def test_goals(goal, met):
    figure = Figure(name="speed", ours=10, unit="m/s", baseline=7, baseline_name="theirs", ratio=1.43, goal=goal)
    assert figure.facts()["met"] is met
    assert ("MISSED" in figure.text()) is not met
    assert "theirs: 7 m/s" in figure.text()
