"""Every section runs in the small and gives finite figures; both sides of a comparison make the same views."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from manifests.errors import UsageError
from trainer.bench import SECTIONS, fidelity, gpu, loader, photos, resume, step_figures, suite
from trainer.bench.figures import Figure, Goal, Settings, Times, in_turns
from trainer.bench.loader import Workload
from trainer.bench.steps import StepTask
from trainer.cli import cli
from trainer.data.augmentations import AUGMENTATIONS
from trainer.data.view_plan import ViewConfig

SMALL = {"rows": 4, "batch_size": 2, "passes": 1}
SIZES = {"size": 48, "local_size": 16}
WORKLOADS = [
    Workload(name="pairs", unit="pairs/s", policy="diffmix", views=ViewConfig(augment="simclr", **SIZES), **SMALL),
    Workload(
        name="dino",
        unit="pairs/s",
        policy="diffmix",
        views=ViewConfig(augment="dino", **SIZES),
        num_local_crops=8,
        **SMALL,
    ),
    Workload(name="two", unit="images/s", policy="real", views=ViewConfig(augment="simclr", **SIZES), **SMALL),
    Workload(
        name="cifar",
        unit="images/s",
        policy="real",
        views=ViewConfig(augment="simclr-cifar", size=32),
        thumbnails=True,
        **SMALL,
    ),
]
each_workload = pytest.mark.parametrize("work", WORKLOADS, ids=lambda work: work.name)


def quiet(text):
    pass


def assert_sound(figures):
    assert figures
    for figure in figures:
        numbers = [figure.ours, figure.baseline, figure.ratio, *(figure.spread or ())]
        assert all(math.isfinite(value) and value > 0 for value in numbers if value is not None), figure
        assert figure.name in figure.text()
        json.dumps(figure.facts())


@pytest.fixture
def pairs(tmp_path, request):
    """The shard of a workload, whose images are all of one colour a side: red the real ones, blue the others."""

    def write(work):
        images = [photos._jpeg(np.full((60, 60, 3), colour, np.uint8)) for colour in ((200, 0, 0), (0, 0, 200))]
        return photos.write_pairs(tmp_path / "pairs", images[: 1 + work.variations], work.rows, work.variations)

    return write


@each_workload
def test_both_sides_make_the_same_views_of_the_same_images(work, pairs, monkeypatch):
    pytest.importorskip("webdataset")
    plain = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
    chosen = AUGMENTATIONS[work.views.augment]
    change = lambda view: view and type(view)(**{**{f: getattr(view, f) for f in view.__slots__}, **plain})  # noqa: E731
    same = type(chosen)(views=tuple(map(change, chosen.views)), local=change(chosen.local))
    monkeypatch.setitem(AUGMENTATIONS, work.views.augment, same)
    url = pairs(work)
    theirs = next(iter(loader.webdataset_batches(work, url)))
    with loader.cpu_loader(work, url) as batches:
        views = next(batches).views
    ours = [*views.crops, *([] if views.local_crops is None else views.local_crops)]
    assert len(ours) == len(theirs) == 2 + work.num_local_crops
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.03, rtol=0)  # 1.5 levels, normalised


@each_workload
def test_both_sides_normalise_to_the_same_range(work, tmp_path):
    pytest.importorskip("webdataset")
    images = photos.thumbnails(8) if work.thumbnails else photos.photographs(8)
    url = photos.write_pairs(tmp_path / "pairs", images, work.rows, work.variations)
    low, high = ((level - np.array(work.views.mean)) / work.views.std for level in (0, 1))
    theirs = next(iter(loader.webdataset_batches(work, url)))
    with loader.cpu_loader(work, url) as batches:
        crops = next(batches).views.crops
    for views in (crops[0], theirs[0]):
        for channel in range(3):
            assert low[channel] - 1e-5 <= views[:, channel].min() < views[:, channel].max() <= high[channel] + 1e-5


@each_workload
def test_host_path_hands_over_the_bytes_of_all_views(work, pairs):
    with loader.host_loader(work, pairs(work)) as batches:
        views = next(batches).views
    size = work.views.size
    assert views.crops.shape == (2, 2, size, size, 3)
    assert views.crops.dtype == torch.uint8
    assert views.crops.device.type == "cpu"
    assert abs(views.crops[0].float().mean((0, 1, 2)) - torch.tensor([200.0, 0, 0])).max() < 3
    if work.num_local_crops:
        assert views.local_crops.shape == (8, 2, 16, 16, 3)


@each_workload
def test_loader_section(work):
    pytest.importorskip("webdataset")
    images = photos.thumbnails(4) if work.thumbnails else photos.photographs(4)
    threads = torch.get_num_threads()
    figures = loader.compare(work, images, 1, quiet)
    assert_sound(figures)
    assert len(figures) == (4 if work.thumbnails else 2)
    assert torch.get_num_threads() == threads


def test_loader_section_without_webdataset(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = []
    assert loader.measure(Settings(), said.append) == []
    assert "pip install 'diffmix[bench]'" in said[0]


def test_fidelity_section_finds_what_is_wrong():
    found = photos.photographs(2)
    right = [*fidelity.colour_figures(found, 8, 64), *fidelity.crop_figures(found, 6, 64)]
    assert_sound(right)
    assert all(figure.goal.is_met(figure) for figure in right if figure.goal)
    pixels, drawn = fidelity._views(found, 8, 64), fidelity._drawn(8, fidelity.COLOURS, 64)
    wanted = fidelity.torchvision_colours(pixels, drawn)
    wrong = fidelity._level_figure("off by a level", wanted + 1 / 255, wanted, "")
    assert wrong.ours == pytest.approx(1)
    assert not wrong.goal.is_met(wrong)


def test_resume_section():
    assert_sound(resume.measure(Settings(rounds=1), quiet, rows=200)[:1])


def test_rows_of_the_large_set_show_the_images_of_the_small_one(tmp_path):
    from trainer.data.reader import Reader
    from trainer.data.rows import REAL, Rows

    photos.write_pairs(tmp_path / "small", photos.thumbnails(6), 3, 1)
    resume.write(tmp_path / "small", tmp_path / "large", 10_100)
    small, large = Rows.open(str(tmp_path / "small")), Rows.open(str(tmp_path / "large"))
    assert len(large) == 10_100
    assert {large.places.of(index, REAL).shard for index in range(10_100)} == {0, 1}
    assert len(set(large.keys(range(10_100)))) == 10_100
    one, other = Reader(small), Reader(large)
    for number in (REAL, 0):
        known = {one.image(index, number).tobytes() for index in range(3)}
        assert {other.image(index, number).tobytes() for index in range(0, 10_100, 500)} <= known
        assert len(known) == 3


def test_steps_section():
    task = StepTask(name="simclr", method="simclr", encoder="test_resnet", images=3, size=32, out_dim=16)
    assert_sound(step_figures.measure(Settings(rounds=1), quiet, [task]))


@pytest.mark.parametrize("method", ["dino", "simclr"])
def test_gpu_section_on_the_cpu(method):
    dino = {"encoder": "test_vit", "local_crops": 2}
    case = gpu.Case(
        name=method,
        method=method,
        batch_size=2,
        views=ViewConfig(augment="simclr", size=64, local_size=32),
        out_dim=16,
        steps=1,
        warm_up=1,
        rows=2,
        **(dino if method == "dino" else {"encoder": "test_resnet"}),
    )
    figures = gpu.measure_case(case, torch.device("cpu"), None, quiet)
    assert_sound(figures)
    assert "GFLOP an image" in figures[0].note
    assert "bottleneck" in figures[1].note


def test_flops_of_a_step_are_those_of_its_products():
    weight = torch.nn.Parameter(torch.ones(5, 7))
    views = gpu.Views(crops=torch.ones(3, 5))
    # Forward 3x5x7 and the weight's gradient 5x3x7, two operations each.
    assert gpu.step_flops(lambda made: (made.crops @ weight).sum().backward(), views) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA T4", None)],
)
def test_peaks_by_the_device_s_name(name, peak, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert gpu.peak_flops(torch.device("cuda")) == (None if peak is None else peak * 1e12)
    assert gpu.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("share", "late", "words"), [(1.0, 0.5, "step"), (0.5, 0.4, "threads"), (0.5, 0.0, "way to the device")]
)
def test_bottleneck_has_a_name(share, late, words):
    assert words in gpu._bottleneck(share, late)


def test_photographs_are_like_imagenet_s_and_the_same_every_time():
    found = photos.photographs(24)
    assert [image.data for image in found] == [image.data for image in photos.photographs(24)]
    assert {(image.width, image.height) for image in found} == {(500, 375), (375, 500)}
    assert 60_000 < np.mean([len(image.data) for image in found]) < 110_000
    with Image.open(io.BytesIO(found[0].data)) as image:
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    small = photos.thumbnails(24)
    assert {(image.width, image.height) for image in small} == {(32, 32)}
    assert 700 < np.mean([len(image.data) for image in small]) < 1400


def test_photographs_of_a_tar(tmp_path):
    wanted = photos.photographs(3)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number, image in enumerate(wanted):
            for name, data in ((f"{number}.jpg", image.data), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert photos.read_tar(tmp_path / "photos.tar", 2) == wanted[:2]
    assert photos.read_tar(tmp_path / "photos.tar", 9) == wanted


def test_tar_without_photographs(tmp_path):
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(UsageError, match="holds 0 JPEG files"):
        photos.read_tar(tmp_path / "none.tar", 2)
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(UsageError, match="WebDataset tar"):
        photos.read_tar(tmp_path / "text.tar", 2)


def test_speedup_is_the_median_of_the_rounds_ratios():
    ratio, spread = Times((1.0, 2.0, 4.0)).speedup(Times((3.0, 4.0, 20.0)))
    assert (ratio, spread) == (3.0, (2.0, 5.0))
    assert Times((1.0, 2.0, 4.0)).rate == 0.5


def test_times_are_per_item_and_tasks_take_turns():
    now, order = [0.0], []

    def task(name, seconds, items):
        def run():
            order.append(name)
            now[0] += seconds
            return items

        return run

    times = in_turns(2, {"a": task("a", 6, 3), "b": task("b", 8, 2)}, clock=lambda: now[0])
    assert times == {"a": Times((2.0, 2.0)), "b": Times((4.0, 4.0))}
    assert order == ["a", "b", "b", "a"]


def test_figure_says_whether_its_goal_is_met():
    figure = Figure(name="work", ours=8, unit="ms", baseline=4, baseline_name="peer", ratio=2.0, goal=Goal(bound=2.5))
    assert figure.text() == "work: 8 ms | peer: 4 ms | 2.00x | target >= 2.5x: MISSED"
    assert figure.facts()["met"] is False
    small = Figure(name="work", ours=8, unit="ms", goal=Goal(bound=9, of="ours", at_least=False))
    assert "target <= 9 ms: met" in small.text()


def test_suite_and_command_print_the_figures(monkeypatch):
    figure = Figure(name="work", ours=1.5, unit="ms")
    monkeypatch.setattr(fidelity, "measure", lambda settings, say: [figure])
    monkeypatch.setattr(gpu, "measure", lambda settings, say: [])
    text = CliRunner().invoke(cli, ["bench", "--sections", "fidelity,gpu"])
    assert "work: 1.5 ms" in text.stdout
    assert "nothing measured" in text.stdout
    facts = json.loads(CliRunner().invoke(cli, ["bench", "--sections", "fidelity", "--json"]).stdout)
    assert facts["sections"] == {"fidelity": [{"name": "work", "ours": 1.5, "unit": "ms"}]}
    assert facts["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_unknown_section_is_a_usage_error():
    result = CliRunner().invoke(cli, ["bench", "--sections", "loader,speed"])
    assert result.exit_code == 2
    assert "known: loader, fidelity, resume, steps, masked, tuning, gpu" in result.output


def test_every_section_can_be_imported():
    from importlib import import_module

    for place in SECTIONS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))
    assert suite.machine_facts()["torch_threads"] == torch.get_num_threads()
