"""kNN and probes on a set's own rows: who asks, what is measured, and the same on any number of ranks."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainer.data.builders import open_pairs
from tests.trainer.ranks import RANKS, on_ranks
from trainer.data.rows import Rows
from trainer.data.view_plan import ViewConfig
from trainer.evaluate.held_out import HeldOut, Split, is_query, split


class Mean(nn.Module):
    """Features are the mean colour, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        return images.mean((2, 3)) * self.factor


def held_out(rows, parts):
    device = torch.device("cpu")
    return HeldOut(rows=rows, split=parts, views=ViewConfig(size=8), device=device, k=20, temperature=0.07)


def parts_of(rows, bank, queries):
    of = torch.from_numpy(np.asarray(rows.label, np.int64))
    bank, queries = np.array(bank), np.array(queries)
    return Split(bank=bank, queries=queries, bank_labels=of[bank], query_labels=of[queries])


def test_a_tenth_of_the_keys_ask_and_the_others_answer(tmp_path):
    rows = open_pairs(tmp_path / "set", 60)
    found = split(rows, bank=1000, queries=1000)
    keys = rows.keys(np.arange(60))
    assert [keys[index] for index in found.queries] == [key for key in keys if is_query(key)]
    assert sorted([*found.queries, *found.bank]) == list(range(60))
    assert found.bank_labels.tolist() == [int(keys[index][1:]) % 3 for index in found.bank]
    few = split(rows, bank=4, queries=2)
    assert (len(few.bank), len(few.queries)) == (4, 2)


def test_a_tenth_of_many_keys():
    assert sum(is_query(f"key-{number}") for number in range(10_000)) == pytest.approx(1000, abs=100)


def test_images_of_no_class_neither_ask_nor_answer(tmp_path):
    rows = open_pairs(tmp_path / "set", 60, label=lambda number: number % 3 if number % 2 else -1)
    found = split(rows, bank=1000, queries=1000)
    labelled = [index for index, key in enumerate(rows.keys(np.arange(60))) if int(key[1:]) % 2]
    assert sorted([*found.queries, *found.bank]) == labelled
    assert min(found.bank_labels.min(), found.query_labels.min()) == 0


@pytest.mark.parametrize("how", [{"labelled": False}, {"real": False}, {"rows": 5}])
def test_sets_that_cannot_be_asked(tmp_path, how):
    assert split(open_pairs(tmp_path / "set", **{"rows": 60, **how}), bank=100, queries=100) is None


def test_no_linear_probe_of_a_single_class(tmp_path):
    rows = open_pairs(tmp_path / "set", 9)
    one = held_out(rows, parts_of(rows, [0, 3], [6, 1])).final(Mean())
    assert one["knn"] == 0.5
    assert not [name for name in one if "linear" in name]
    assert 0 <= held_out(rows, parts_of(rows, [0, 1, 3, 4], [6, 7])).final(Mean())["linear"] <= 1


def test_features_that_are_not_finite_are_told_apart_from_bad_use(tmp_path):
    rows = open_pairs(tmp_path / "set", 9)
    asked = held_out(rows, parts_of(rows, [0, 1, 3], [6, 7]))
    for evaluate in (asked.online, asked.final):
        with pytest.raises(FloatingPointError, match="features are not finite"):
            evaluate(Mean(float("inf")))


def _on_a_rank(url, bank, queries):
    torch.manual_seed(0)
    rows = Rows.open(url)
    return held_out(rows, parts_of(rows, bank, queries)).online(Mean())


@pytest.mark.parametrize(("bank", "queries"), [([0, 1, 3, 4, 5], [6, 7, 8]), ([0], [6])])
def test_ranks_measure_what_one_process_does_even_of_fewer_images_than_ranks(tmp_path, bank, queries):
    url = open_pairs(tmp_path / "set", 9).url
    assert on_ranks(_on_a_rank, url, bank, queries) == [_on_a_rank(url, bank, queries)] * RANKS
