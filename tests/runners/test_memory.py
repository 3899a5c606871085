"""Rows in pages of their own: right in content, and given back."""

from __future__ import annotations

import numpy as np
import pytest

from esm_packed.runners.system.memory import RowBuffers, page_rows


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1000, 96)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_page_rows_are_writable_zeros(shape: tuple[int, int], dtype: str) -> None:
    rows = page_rows(shape, dtype)
    assert rows.shape == shape
    assert rows.dtype == dtype
    assert not rows.any()
    rows += 1
    assert rows.all()


def test_buffers_are_reused_where_they_fit() -> None:
    buffers = RowBuffers()
    first = buffers.rows(6, (100, 8), "float32")
    first[:] = 1
    second = buffers.rows(6, (40, 8), "float32")
    assert np.shares_memory(first, second)
    assert second.shape == (40, 8)
    for changed in (
        buffers.rows(6, (101, 8), "float32"),
        buffers.rows(6, (100, 9), "float32"),
        buffers.rows(6, (100, 9), "float16"),
        buffers.rows(5, (100, 9), "float16"),
    ):
        assert not np.shares_memory(second, changed)
