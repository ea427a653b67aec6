"""A process that shares nothing with that of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="session")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """One for all tests, since each would import torch; spawned, so it knows of a network what a file says."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool
