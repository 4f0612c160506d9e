"""Pools of gloo processes, for all tests of a session: starting them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    pool = Processes(2, tmp_path_factory.mktemp("store"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    pool = Processes(4, tmp_path_factory.mktemp("store"))
    yield pool
    pool.close()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest) -> Processes:
    """Two processes, and with the slow tests four."""
    return request.getfixturevalue("two_processes" if request.param == 2 else "four_processes")
