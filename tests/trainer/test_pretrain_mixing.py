"""Whole runs under the policies of AdaInf and DiffMix's baselines: what is trained on, and going on is exact."""

import shutil

import numpy as np
import pytest
import torch

from manifests.errors import UsageError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import assert_same_run, final, metrics, request, results, train
from trainer.data.view_maker import ViewMaker
from trainer.engine import checkpoint
from trainer.pretrain import describe

BATCH = 8
MIXES = {
    # 2 x 40 real images and 2 x 9 generated ones are 12 steps an epoch
    "inflate": ({"mix__policy": "inflate", "mix__replicas": 2}, 14),
    "sequential": ({"mix__policy": "sequential", "mix__first_epochs": 1}, 8),
    "union": ({"mix__policy": "union", "mix__weight": "similarity"}, 14),
    "diffmix": ({"mix__weight": "similarity", "mix__weight_power": 2}, 8),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """40 pairs, and what an unconditional generator makes: images of another size without labels."""
    folder = tmp_path_factory.mktemp("sets")
    generated = write_pairs(folder / "generated", 9, variations=2, real=False, labelled=False, uneven=True)
    return write_pairs(folder / "pairs", 40), generated


def mix_of(name, sets):
    mix, steps = MIXES[name]
    return (mix | {"mix__generated": sets[1]} if name == "inflate" else mix), steps


def rewind(out, step):
    """The folder as a kill right after that step's checkpoint would leave it."""
    for path in checkpoint.steps_in(out / "checkpoints"):
        if path.name > checkpoint.name_of(step):
            path.unlink()
    (out / "results.json").unlink()


@pytest.mark.parametrize("name", MIXES)
def test_going_on_is_exact(name, sets, tmp_path):
    mix, steps = mix_of(name, sets)
    how = {"steps": steps, "checkpoint__every": 1, "checkpoint__keep": 99}
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(sets[0], out, **how, **mix)
    shutil.copytree(out, whole)
    for step in (3, steps - 2):  # in the first epoch; at its end, or in the second one
        rewind(out, step)
        train(sets[0], out, **how, **mix)
        assert_same_run(out, whole)
    assert results(out)["mix"] == name


def test_inflated_runs_show_all_images_and_ask_the_labelled_ones(sets, tmp_path, monkeypatch):
    shown = []
    cut = ViewMaker.cut

    def noted(self, items, epoch, outs):
        shown.append(self.policy.assign(items, epoch, self.seed, 2, 0))
        return cut(self, items, epoch, outs)

    monkeypatch.setattr(ViewMaker, "cut", noted)
    mix, _ = mix_of("inflate", sets)
    found = describe(request(sets[0], None, steps=12, **mix))
    assert (found["samples"], found["steps_per_epoch"]) == (2 * 40 + 2 * 9, 12)
    train(sets[0], tmp_path / "run", steps=12, data__cache=0, **mix)
    epoch = shown[: 12 * BATCH // len(shown[0].rows)]
    rows, of_set, images = (
        np.concatenate([getattr(one, name) for one in epoch], -1) for name in ("rows", "set", "images")
    )
    assert np.bincount(rows[of_set == 0]).max() == 2 and (images[:, of_set == 0] == -1).all()
    assert (of_set == 0).sum() >= 2 * 40 - 2  # but for the images of the last partial batch
    generated = list(zip(rows[of_set == 1].tolist(), images[0, of_set == 1].tolist(), strict=True))
    assert len(set(generated)) == len(generated) >= 2 * 9 - 2
    assert 0 <= results(tmp_path / "run")["knn"] <= 1
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics(tmp_path / "run")[1:-1])


def test_another_generated_set_is_another_run(sets, tmp_path):
    mix, _ = mix_of("inflate", sets)
    train(sets[0], tmp_path / "run", steps=4, checkpoint__every=2, **mix)
    assert "+" in final(tmp_path / "run").data
    other = write_pairs(tmp_path / "other", 9, variations=2, real=False, labelled=False)
    with pytest.raises(UsageError, match=r"mix.generated: .* there, .* now"):
        train(sets[0], tmp_path / "run", steps=4, **mix | {"mix__generated": other})


def test_sequential_needs_epochs_for_both_sides(sets):
    with pytest.raises(UsageError, match="first_epochs is 2 and the run has 2 epochs"):
        describe(request(sets[0], None, steps=10, mix__policy="sequential", mix__first_epochs=2))
    with pytest.raises(UsageError, match=r"needs the number of epochs"):
        describe(request(sets[0], None, steps=10, mix__policy="sequential"))


def test_union_has_longer_epochs(sets):
    for policy, samples in (("real", 40), ("union", 80)):
        assert describe(request(sets[0], None, mix__policy=policy))["samples"] == samples
