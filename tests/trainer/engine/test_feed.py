"""What one rank cannot read waits until all ranks raise it; alone it is raised at once."""

import pytest
import torch.distributed as dist

from manifests.errors import CorruptSetError
from tests.trainer.ranks import on_ranks
from trainer.engine.feed import Feed
from trainer.nn.collectives import together


def _until(last):
    """Numbers from 0, in place of batches, of which the one after `last` is damaged."""
    yield from range(last + 1)
    raise CorruptSetError(f"cannot read {last + 1}")


def _four_steps(last, accumulation):
    """What each of them was given on this rank, whether it had failed by then, and what all raise in the end."""
    feed, given = Feed(_until(last if dist.get_rank() == 1 else 100), accumulation), []
    try:
        for _ in range(4):
            given.append((feed.next(), feed.has_failed))
        together(feed.check)
    except CorruptSetError as error:
        return given, str(error)
    return given, ""


def test_the_step_before_stands_in_for_what_cannot_be_read():
    told = "rank 1: cannot read 5"
    first, second = on_ranks(_four_steps, 4, 2)
    assert first == ([([0, 1], False), ([2, 3], False), ([4, 5], False), ([6, 7], False)], told)
    assert second == ([([0, 1], False), ([2, 3], False), ([2, 3], True), ([2, 3], True)], told)


def test_the_first_step_has_none_before_it():
    assert on_ranks(_four_steps, 0, 2) == [([], "rank 1: cannot read 1")] * 2


def test_alone_nothing_waits():
    feed = Feed(_until(1), 1)
    assert (feed.next(), feed.next()) == ([0], [1])
    with pytest.raises(CorruptSetError, match="cannot read 2"):
        feed.next()
    assert not feed.has_failed
    feed.check()
