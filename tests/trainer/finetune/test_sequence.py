import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.finetune import sequence

MATRIX = [[0.9], [0.7, 0.8], [0.6, 0.85, 0.5]]  # three tasks


def test_measures_of_a_sequence_by_hand():
    assert sequence.average_accuracy(MATRIX) == pytest.approx((0.6 + 0.85 + 0.5) / 3)
    assert sequence.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert sequence.forgetting(MATRIX) == pytest.approx([0.9 - 0.6, 0.8 - 0.85]), "negative: it got better"


def test_one_task_has_nothing_to_forget():
    found = sequence.summary([[0.4]], ["only"])
    assert found == {"accuracy_matrix": [[0.4]], "average_accuracy": 0.4, "backward_transfer": None, "forgetting": {}}


@given(st.integers(2, 5), st.data())
def test_forgetting_is_at_least_what_backward_transfer_says(tasks, data):
    share = st.floats(0, 1, allow_nan=False)
    matrix = [data.draw(st.lists(share, min_size=row + 1, max_size=row + 1)) for row in range(tasks)]
    lost = sequence.forgetting(matrix)
    assert len(lost) == tasks - 1
    assert sum(lost) / len(lost) >= -sequence.backward_transfer(matrix) - 1e-9
