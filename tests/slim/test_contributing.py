"""The example of a registered rule in CONTRIBUTING.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

import slim
from tests.slim.networks import conv, prove, randomise
from tests.slim.test_operators import Net, X, head, prunable
from tests.slim.test_safety import no_rules as no_rules

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@torch.library.custom_op("mylib::scaled_tanh", mutates_args=())
def scaled_tanh(x: Tensor) -> Tensor:
    return 1.7 * torch.tanh(x)


@torch.library.custom_op("mylib::interleave", mutates_args=())
def interleave(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], 2).flatten(1, 2)


def test_the_documented_rule_frees_its_channels(no_rules: None) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(torch.ops.mylib.interleave(torch.ops.mylib.scaled_tanh(m.a(x)), m.b(x))),
        a=conv(3, 6),
        b=conv(3, 6),
        head=head(12),
    )
    randomise(model)
    assert prunable(slim.trace(model, X)) == {}
    example = re.search(r"```python\n(import torch\nimport slim\n.*?)```", CONTRIBUTING.read_text(), re.S)
    assert example is not None
    exec(example[1], {})
    graph, _ = prove(model, X)
    assert prunable(graph) == {"a.0": (6, 1)}
    entered = next(m for m in graph.by_name["a.0"].members if m.param == "head.weight")
    assert entered.index == tuple(range(12)), "a and b side by side: two inputs of the head for each channel"
