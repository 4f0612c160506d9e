"""Background work: compilers and child processes that start with the test run, beside the other tests.

Tests that need a result of such work run last (`waits_for`, and pytest_collection_modifyitems in conftest.py). Work
that no selected test needs is not started.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

_FUNCTIONS: dict[str, Callable[[Path], Any]] = {}


def background(function: Callable[[Path], Any]) -> Any:
    """A fixture with the result of ``function(an empty folder)``, computed once. An exception fails every user."""
    name = function.__name__
    _FUNCTIONS[name] = function

    @pytest.fixture(scope="session", name=name)
    def result(background_work: Work) -> Any:
        return background_work.result(name)

    return result


def waits_for(item: pytest.Item) -> list[str]:
    """The background functions whose results a test takes."""
    names = [name for name in getattr(item, "fixturenames", ()) if name in _FUNCTIONS]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("backend") == "emulated_cuda":  # the fixture `backend` asks for it
        names.append("emulated_library")
    return names


class Work:
    """Runs the functions on as many threads as cores, in the order in which tests will ask for the results."""

    def __init__(self, items: Iterable[pytest.Item], folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._results: dict[str, Future[Any]] = {}
        for item in items:
            for name in waits_for(item):
                self._start(name)

    def _start(self, name: str) -> Future[Any]:
        if name not in self._results:
            self._results[name] = self._pool.submit(_FUNCTIONS[name], self._folders.mktemp(name))
        return self._results[name]

    def result(self, name: str) -> Any:
        return self._start(name).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
