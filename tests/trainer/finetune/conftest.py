import pytest

from tests.trainer.data.builders import write_pairs
from tests.trainer.finetune.small import pretrained, write_task


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A task of three colours, 90 images."""
    return write_task(tmp_path_factory.mktemp("task") / "colours")


@pytest.fixture(scope="session")
def more_colours(tmp_path_factory):
    """A second task, of two colours."""
    return write_task(tmp_path_factory.mktemp("task") / "two", 60, ("blue", "red"), seed=1)


@pytest.fixture(scope="session")
def init(tmp_path_factory):
    """A pre-training run on a labelled pair set of 60 rows."""
    folder = tmp_path_factory.mktemp("pretrained")
    return pretrained(write_pairs(folder / "pairs", 60), folder / "run")
