"""Two gloo ranks, each a process of its own, started once and kept for all tests that need them."""

import atexit
import functools
import io
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

RANKS = 2


def on_ranks(function, *arguments):
    """What `function(*arguments)`, importable and of tensors, numbers and containers, returned on each rank."""
    answers = [rank.submit(_call, function, arguments) for rank in _ranks()]
    return [torch.load(io.BytesIO(answer.result(timeout=240))) for answer in answers]


@functools.cache
def _ranks():
    folder = tempfile.mkdtemp()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "pytest"])  # both ranks fork from one process that has paid for the imports
    ranks = [
        ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, folder)) for rank in range(RANKS)
    ]
    atexit.register(_stop, ranks, folder)
    return ranks


def _join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)


def _call(function, arguments):
    answer = io.BytesIO()
    torch.save(function(*arguments), answer)
    return answer.getvalue()


def _stop(ranks, folder):
    for rank in ranks:
        rank.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
