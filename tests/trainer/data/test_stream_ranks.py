"""The same global stream for any number of ranks: worked out in one process, and by real processes over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.builders import open_pairs
from tests.trainer.data.streams import BATCH, open_loader
from trainer.data.order import Cursor

ROWS = 40  # three steps an epoch, four rows left out


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("pairs") / "set", ROWS, variations=2, failed=[7])


def global_steps(rows, count, *, world_size=1, accumulation=1, **settings):
    """Items [B] and crops [V, B, 3, S, S] of the first global batches after the cursor, put together from all ranks."""
    loaders = [
        open_loader(rows, rank=rank, world_size=world_size, accumulation=accumulation, **settings)
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(count):
        parts = [next(loader) for _ in range(accumulation) for loader in loaders]
        assert len({(part.epoch, part.step) for part in parts}) == 1
        items = np.concatenate([part.items for part in parts])
        steps.append((items, torch.cat([part.views.crops for part in parts], 1)))
    for loader in loaders:
        loader.close()
    return steps


@settings(max_examples=10, deadline=None)
@given(
    split=st.sampled_from([(1, 3), (2, 1), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]),
    workers=st.integers(1, 2),
    start=st.integers(0, 5),
)
def test_any_ranks_go_on_with_the_stream_of_one(rows, split, workers, start):
    expected = global_steps(rows, 8)[start:]
    epoch, step = divmod(start, 3)
    cursor = Cursor(epoch, step * BATCH)
    world_size, accumulation = split
    found = global_steps(
        rows, 8 - start, world_size=world_size, accumulation=accumulation, workers=workers, cursor=cursor
    )
    for (items, crops), (other_items, other_crops) in zip(expected, found, strict=True):
        assert np.array_equal(items, other_items)
        assert torch.equal(crops, other_crops)


_RANK = """
import json, sys
import numpy as np, torch, torch.distributed as dist
from tests.trainer.data.streams import open_loader
from trainer.data.order import Cursor
from trainer.data.rows import Rows

def train(world_size, group, cursor, count, accumulation):
    loader = open_loader(Rows.open(sys.argv[1]), rank=dist.get_rank(), world_size=world_size, cursor=cursor,
                         accumulation=accumulation)
    with loader:
        for _ in range(count):
            step = [[], []]
            for _ in range(accumulation):
                part = next(loader)
                mine = (loader.keys(part.items, part.epoch), part.views.crops.double().sum((0, 2, 3, 4)).tolist())
                gathered = [None] * world_size
                dist.all_gather_object(gathered, mine, group)
                for n in range(2):
                    step[n] += [one for of_rank in gathered for one in of_rank[n]]
            steps.append(step)

dist.init_process_group("gloo")
steps = []
two = dist.new_group([0, 1])
if dist.get_rank() < 2:
    train(2, two, Cursor(), 2, 1)
dist.barrier()
train(3, None, Cursor(0, 24), 4, 2)  # over the end of the epoch
if dist.get_rank() == 0:
    print(json.dumps(steps))
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(rows, world_size=3):
    """Keys and sums of pixels of each global step, as rank 0 gathered them from real processes."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, rows.url],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size
    return json.loads(printed[0].splitlines()[-1])


def test_two_processes_gather_the_stream_of_one_and_three_resume_it(rows):
    with open_loader(rows) as loader:
        expected = [
            [loader.keys(batch.items, batch.epoch), batch.views.crops.double().sum((0, 2, 3, 4)).tolist()]
            for batch, _ in zip(loader, range(6), strict=False)
        ]
    found = run_ranks(rows)
    assert [keys for keys, _ in found] == [keys for keys, _ in expected]
    for (_, sums), (_, expected_sums) in zip(found, expected, strict=True):
        assert sums == pytest.approx(expected_sums, rel=1e-12)
    first_epoch = [key for keys, _ in found[:3] for key in keys]
    assert len(set(first_epoch)) == len(first_epoch) == 36 and "k7" not in first_epoch
