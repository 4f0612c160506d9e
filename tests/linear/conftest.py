"""Tile sizes and dtypes of products that tests of the head select."""

from __future__ import annotations

import pytest
from heads import set_tile_sizes

from spo_kernels import precision


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of so few rows and columns that small inputs take many, with smaller tiles at the ends."""
    block = {"rows": 5, "bytes": 1, "least_columns": 10, "column_multiple": 4, "cast_columns": 7}
    set_tile_sizes(monkeypatch, **block, wide_bytes=1, least_wide_rows=8)


@pytest.fixture(params=[False, True], ids=["float32_products", "native_products"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both results that the measurement of half-precision products may have."""
    monkeypatch.setattr(precision, "native_products", lambda device_type, dtype: request.param)
    return request.param
