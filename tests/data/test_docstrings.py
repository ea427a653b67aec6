"""The examples in docstrings of data sets and images run as printed."""

from __future__ import annotations

import doctest

import pytest

import data
from data.images import letterbox, resize
from tests.data.scenes import ROOT

DOCUMENTED = [data.load_data_config, data.build_loader, data.multi_scale_sizes, letterbox, resize]


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_the_example_runs_as_printed(documented: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.DocTestFinder(recurse=False).find(documented)
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert [result.failed for result in results] == [0] and results[0].attempted > 0
