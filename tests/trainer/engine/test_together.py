"""An error of one rank is the error of all: none waits for one that has ended."""

import pytest
import torch.distributed as dist

from manifests.errors import CorruptSetError, DiffmixError, UsageError
from tests.trainer.ranks import on_ranks
from trainer.nn.collectives import together


def _act(failing):
    if dist.get_rank() in failing:
        raise (CorruptSetError, UsageError)[dist.get_rank()](f"cannot {dist.get_rank()}")
    return dist.get_rank()


def _outcome(*failing):
    try:
        return together(lambda: _act(failing))
    except DiffmixError as error:
        return f"{type(error).__name__}: {error}", error.exit_code, error.of_all


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ([0], ("CorruptSetError: rank 0: cannot 0", 3, True)),
        ([1], ("UsageError: rank 1: cannot 1", 2, True)),
        ([0, 1], ("CorruptSetError: cannot 0", 3, True)),
    ],
)
def test_a_ranks_error_is_raised_on_all(failing, told):
    assert on_ranks(_outcome, *failing) == [told] * 2


def _nested(failing):
    return _outcome_of(lambda: together(lambda: _act([failing])))


def _outcome_of(act):
    try:
        return together(act)
    except DiffmixError as error:
        return str(error)


def test_an_error_that_is_of_all_already_names_its_rank_once():
    assert on_ranks(_nested, 1) == ["rank 1: cannot 1"] * 2


def test_without_an_error_each_has_its_own_result():
    assert on_ranks(_outcome) == [0, 1]


def test_alone():
    assert together(lambda: 5) == 5
    with pytest.raises(KeyError, match="no error for users"):
        together(lambda: {}["no error for users"])
    with pytest.raises(UsageError, match=r"^plain$") as caught:
        together(_plain)
    assert not caught.value.of_all


def _plain():
    raise UsageError("plain")
