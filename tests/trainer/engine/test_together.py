"""An error of one rank is the error of all: none waits for one that has ended."""

import pytest
import torch.distributed as dist

from manifests.errors import DiffmixError, UsageError
from tests.trainer.ranks import on_ranks
from trainer.engine.launch import together


def _act(failing):
    if dist.get_rank() == failing:
        raise UsageError(f"rank {failing} cannot")
    return dist.get_rank()


def _outcome(failing):
    try:
        return together(lambda: _act(failing))
    except DiffmixError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_ranks_error_is_raised_on_all(failing):
    assert on_ranks(_outcome, failing) == [f"UsageError: rank {failing} cannot"] * 2


def test_without_an_error_each_has_its_own_result():
    assert on_ranks(_outcome, None) == [0, 1]


def test_alone():
    assert together(lambda: 5) == 5
    with pytest.raises(KeyError, match="no error for users"):
        together(lambda: {}["no error for users"])
