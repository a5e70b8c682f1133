"""Kernels run whether or not there is a place to keep them."""

import numba
import pytest

from trainer.data.kernels import kernel


def double(value: int) -> int:
    return 2 * value


def test_a_kernel_is_compiled_and_kept():
    compiled = kernel(double)
    assert compiled(21) == 42
    assert compiled.stats.cache_path  # raises nothing and names a folder


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numba.core.caching._CacheLocator, "ensure_cache_path", unwritable)
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    assert kernel(double)(21) == 42


def unwritable(self: object) -> None:
    raise OSError("read-only file system")
