"""Everything that a user of slim calls carries an example, and the examples run as printed."""

from __future__ import annotations

import doctest

import pytest
import torch

import slim
from tests.slim.test_safety import no_rules as no_rules

NAMES = [
    "trace",
    "add_gates",
    "SmallestHalfL1",
    "strength_for",
    "score",
    "make_plan",
    "Plan",
    "mask",
    "apply_plan",
    "max_difference",
    "fold_gates",
    "save",
    "load",
    "cost",
    "compose",
    "compare",
    "chart",
    "register_rule",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_as_printed(name: str, no_rules: None) -> None:
    torch.manual_seed(0)
    found = doctest.DocTestFinder(recurse=False).find(getattr(slim, name), name, globs={})
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert [r.failed for r in results] == [0] and results[0].attempted > 0
