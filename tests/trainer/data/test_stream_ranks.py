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
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig
from trainer.data.order import Cursor
from trainer.data.view_plan import ViewConfig

ROWS, BATCH = 40, 12  # three steps an epoch, four rows left out


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("pairs") / "set", ROWS, variations=2, failed=[7])


def open_loader(rows, **settings):
    views = ViewConfig(augment="dino", size=12, local_size=6)
    defaults = {"num_crops": 2, "num_local_crops": 2, "batch_size": BATCH, "seed": 3, "device": "cpu", "workers": 1}
    return Loader(rows, MixConfig(probability=0.5), views, **defaults | settings)


def global_steps(rows, count, *, world_size=1, accumulation=1, **settings):
    """Items [B] and crops [V, B, 3, S, S] of the first global batches after the cursor, put together from all ranks."""
    loaders = [
        open_loader(rows, rank=rank, world_size=world_size, accumulation=accumulation, **settings)
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(count):
        parts = [next(loader) for loader in loaders for _ in range(accumulation)]
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
import json, os, sys
import numpy as np, torch, torch.distributed as dist
from tests.trainer.data.test_stream_ranks import open_loader
from trainer.data.order import Cursor
from trainer.data.rows import Rows

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
settings = json.loads(sys.argv[2])
cursor = Cursor(*settings.pop("cursor"))
count = settings.pop("count")
accumulation = settings["accumulation"]
loader = open_loader(Rows.open(sys.argv[1]), rank=rank, world_size=world_size, cursor=cursor, **settings)
steps = []
with loader:
    for _ in range(count):
        parts = [next(loader) for _ in range(accumulation)]
        sums = torch.cat([part.views.crops.double().sum((0, 2, 3, 4)) for part in parts])
        mine = (loader.keys(np.concatenate([part.items for part in parts])), sums.tolist())
        gathered = [None] * world_size
        dist.all_gather_object(gathered, mine)
        steps.append([[one for part in gathered for one in part[n]] for n in range(2)])
if rank == 0:
    print(json.dumps(steps))
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(rows, world_size, **settings):
    """Keys and sums of pixels of each global step, as rank 0 gathered them from real processes."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _RANK, rows.url, json.dumps(settings)]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size
    return json.loads(printed[0].splitlines()[-1])


def test_processes_gather_the_stream_of_one_and_resume_on_others(rows):
    with open_loader(rows) as loader:
        expected = [
            [loader.keys(batch.items), batch.views.crops.double().sum((0, 2, 3, 4)).tolist()]
            for batch, _ in zip(loader, range(6), strict=False)
        ]
    two = run_ranks(rows, 2, cursor=(0, 0), count=2, accumulation=1)
    three = run_ranks(rows, 3, cursor=(0, 2 * BATCH), count=4, accumulation=2)  # over the end of the epoch
    for found, step in zip([*two, *three], expected, strict=True):
        assert found[0] == step[0]
        assert found[1] == pytest.approx(step[1], rel=1e-12)
    first_epoch = [key for step in [*two, *three][:3] for key in step[0]]
    assert len(set(first_epoch)) == len(first_epoch) == 36 and "k7" not in first_epoch
