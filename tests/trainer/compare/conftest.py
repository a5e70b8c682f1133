import pytest

from tests.trainer.compare.small import run, write_recipe
from tests.trainer.data.builders import write_pairs


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """60 labelled pairs of three classes."""
    return write_pairs(tmp_path_factory.mktemp("compare") / "pairs", 60)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Folder of a comparison of three arms with two seeds, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, ("real", "pairs", "barlow"), baseline="real")
    assert run(data, folder / "out", recipe, seeds=2).state == "finished"
    return folder / "out", recipe
