"""Outputs of any form keep their width; models and inputs that come wrapped are seen as what they are."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import slim
from tests.slim.networks import Chain, conv, prove, randomise
from tests.slim.test_operators import Net, X, head, prunable


@dataclass
class Result:
    logits: Tensor
    extra: dict[str, Any]


@dataclass(slots=True)
class Slots:
    logits: Tensor


class Linked:
    """An object that leads back to itself."""

    def __init__(self, logits: Tensor) -> None:
        self.me, self.logits = self, logits


def one_by_one(y: Tensor) -> Iterator[Tensor]:
    yield y


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda y: Result(y[:1], {"maps": [y], "n": 3}),
    "slots": Slots,
    "cycle": Linked,
    "set": lambda y: {y},
    "frozenset": lambda y: frozenset([y]),
    "values of a dictionary": lambda y: {"a": y}.values(),
    "items of a dictionary": lambda y: {"a": y}.items(),
    "read-only mapping": lambda y: types.MappingProxyType({"a": y}),
    "deque": lambda y: deque([y]),
    "iterator": lambda y: iter([y]),
    "generator": one_by_one,
    "endless iterator": lambda y: chain([y], count()),
    "partial": lambda y: partial(print, y),
    "closure": lambda y: lambda: y,
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_form_keep_their_width(form: str) -> None:
    model = randomise(Net(lambda m, x: FORMS[form](m.head(m.a(x))), a=conv(3, 6), head=head(6)))
    graph, plan = prove(model, X)
    assert prunable(graph) == {"a.0": (6, 1)} and graph.by_name["head"].frozen_reason == "a model output"
    # The comparison sees what the form holds: without a channel of the head the outputs differ.
    wrong = slim.apply_plan(model, plan)
    wrong.head.weight.data[0] += 1  # type: ignore[union-attr, operator]
    assert slim.max_difference(slim.mask(model, plan), wrong, X) > 0.1


def test_what_is_computed_as_an_iterator_goes_on_is_followed() -> None:
    def lazily(m: Any, x: Tensor) -> Iterator[Tensor]:
        for layer in (m.b, m.c):
            x = layer(x)
            yield x

    graph, _ = prove(randomise(Net(lambda m, x: lazily(m, m.a(x)), a=conv(3, 6), b=conv(6, 4), c=conv(4, 5))), X)
    assert prunable(graph) == {"a.0": (6, 1)} and graph.unused == ()


def test_results_that_no_operator_reads_stay() -> None:
    """What is kept elsewhere, or leaves torch, may be an output."""

    def kept(m: Any, x: Tensor) -> Tensor:
        m.features = [m.b(m.a(x)).relu_()]
        return m.head(m.a(x))  # type: ignore[no-any-return]

    graph = slim.trace(Net(kept, a=conv(3, 6), b=conv(6, 5), head=head(6)), X)
    assert prunable(graph) == {"a.0": (6, 1)}
    assert graph.by_name["b.0"].frozen_reason == "no operator reads it: an output, for all that can be seen"
    numpy = Net(lambda m, x: torch.from_numpy(m.head(m.a(x)).numpy() + 1), a=conv(3, 6), head=head(6))
    assert prunable(slim.trace(numpy, X)) == {"a.0": (6, 1)}


def test_output_whose_width_follows_the_channels_past_all_operators_stays() -> None:
    def beside(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.head(m.b(y)), torch.tensor(y.tolist())

    graph = slim.trace(Net(beside, a=conv(3, 6), b=conv(6, 8), head=head(8)), X)
    assert prunable(graph) == {"b.0": (8, 1)}
    assert "an output is narrower after a cut" in (graph.by_name["a.0"].frozen_reason or "")


@pytest.mark.parametrize("nothing", [None, 3, X.argmax(1), X[:0], [], {"boxes": None}])
def test_comparing_nothing_is_no_proof(nothing: Any) -> None:
    model = Net(lambda m, x: nothing)
    with pytest.raises(slim.SlimError, match="no floating tensor with elements, so nothing could be compared"):
        slim.max_difference(model, model, X)


class Wrapped(Tensor):
    """As fastai's and torchvision's own tensors: every result is wrapped anew."""


@pytest.mark.parametrize("where", ["input", "within"])
def test_subclasses_of_tensors_are_followed(where: str) -> None:
    within = where == "within"
    model = randomise(
        Net(lambda m, x: m.head(m.a(x).as_subclass(Wrapped) if within else m.a(x)), a=conv(3, 6), head=head(6))
    )
    graph, _ = prove(model, X if within else X.as_subclass(Wrapped))
    assert graph == slim.trace(Net(lambda m, x: m.head(m.a(x)), a=conv(3, 6), head=head(6)), X)


@pytest.mark.parametrize("context", [torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_contexts_that_change_operators_are_left(context: Any) -> None:
    model = randomise(Chain())
    with context():
        x = torch.rand(1, 3, 8, 8)
        assert slim.trace(model, x) == slim.trace(Chain(), torch.rand(1, 3, 8, 8))
        assert torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", ["script", "trace", "export", "exported module", "within"])
def test_compiled_code_is_refused_in_one_line(compiled: str) -> None:
    model, x = Chain().eval(), torch.rand(1, 3, 8, 8)
    given: Any = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x),
        "export": lambda: torch.export.export(model, (x,)),
        "exported module": lambda: torch.export.export(model, (x,)).module(),
        "within": lambda: nn.Sequential(torch.jit.script(conv(3, 4)), nn.Conv2d(4, 2, 1)),
    }[compiled]()
    for act in (slim.trace, slim.cost):
        with pytest.raises(slim.SlimError, match="compiled with the numbers of channels in it; give the"):
            act(given, x)


def test_data_parallel_models_are_cut() -> None:
    model, x = randomise(Chain()), torch.rand(1, 3, 8, 8)
    graph, _ = prove(nn.DataParallel(model), x)
    assert prunable(graph) == {"module.first.0": (4, 1), "module.second.0": (6, 1)}


def test_a_distributed_model_is_cut_as_what_it_wraps(tmp_path: Path) -> None:
    model, x = randomise(Chain()), torch.rand(1, 3, 8, 8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distributed = DistributedDataParallel(model)
        graph, plan = prove(distributed, x)
        assert graph == slim.trace(model, x)
        pruned = slim.apply_plan(distributed, plan)
        assert isinstance(pruned, Chain) and slim.max_difference(slim.apply_plan(model, plan), pruned, x) == 0
        assert slim.score(distributed, graph, "l1").keys() == slim.score(model, graph, "l1").keys()
    finally:
        torch.distributed.destroy_process_group()
