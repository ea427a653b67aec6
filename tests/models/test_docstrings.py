"""The examples in docstrings of models run as printed."""

from __future__ import annotations

import doctest

import pytest

import models
from tests.data.scenes import ROOT

DOCUMENTED = [
    models.build_model,
    models.non_max_suppression,
    models.anchor_fit,
    models.transfer_weights,
    models.DetectionLoss,
]


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_the_example_runs_as_printed(documented: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.DocTestFinder(recurse=False).find(documented)
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert [result.failed for result in results] == [0] and results[0].attempted > 0
