"""Fixtures of the contract's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.plan import Plan
from manifests.storage import LocalStorage, Storage
from tests.manifests.builders import make_plan, write_set


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    """An empty local folder."""
    storage = LocalStorage(str(tmp_path / "set"))
    storage.create_folder()
    return storage


@pytest.fixture
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Storage, Plan]:
    """A whole set of two shards, one failed row among them."""
    return write_set(str(tmp_path / "set"), failed=["key_1-0"])
