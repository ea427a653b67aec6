"""Criteria: exact scores on hand-set weights, their reduction and normalisation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slim
from slim.graph import ChannelGraph, ChannelGroup
from tests.slim.networks import Chain, Residual, conv

FILTERS = torch.tensor([1.0, -2.0, 3.0, 0.0])


def chain() -> tuple[Chain, ChannelGraph]:
    """A Chain whose first layer has constant filters, of 27 elements."""
    model = Chain()
    with torch.no_grad():
        model.first[0].weight.copy_(FILTERS.reshape(4, 1, 1, 1).expand(4, 3, 3, 3))
        model.first[1].weight.copy_(torch.tensor([4.0, -1.0, 2.0, 1.0]))
    return model, slim.trace(model, torch.rand(1, 3, 8, 8))


# -- built-in criteria ------------------------------------------------------------------------------------------


def test_criteria_by_hand() -> None:
    model, graph = chain()
    assert slim.score(model, graph, "l1")["first.0"].tolist() == pytest.approx([2 / 3, 4 / 3, 2.0, 0.0])
    assert slim.score(model, graph, "bn")["first.0"].tolist() == pytest.approx([2.0, 0.5, 1.0, 0.5])
    gates = slim.add_gates(model, graph)
    with torch.no_grad():
        gates["first.0"].copy_(torch.tensor([0.1, 0.2, 0.0, 0.4]))
    assert slim.score(model, graph, "gate")["first.0"].tolist() == pytest.approx([0.1, 0.2, 0.0, 0.4])
    first, again = (slim.score(model, graph, "random", seed=3)["second.0"] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, slim.score(model, graph, "random", seed=4)["second.0"])


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [27.0, 54.0, 81.0, 0.0]),
        ("l2", [27**0.5, 2 * 27**0.5, 3 * 27**0.5, 0.0]),
        ("fpgm", [6 * 27**0.5, 10 * 27**0.5, 10 * 27**0.5, 6 * 27**0.5]),
    ],
)
def test_raw_scores_are_those_of_the_papers(criterion: str, expected: list[float]) -> None:
    model, graph = chain()
    assert slim.score(model, graph, criterion, normalise="none")["first.0"].tolist() == pytest.approx(expected)


def test_scores_are_float64_on_the_cpu_and_do_not_overflow_in_half_precision() -> None:
    model, graph = chain()
    model.first[0].weight.data.mul_(20000)
    scores = slim.score(model.half(), graph, "l1", normalise="none")["first.0"]
    assert scores.dtype is torch.float64 and scores.device.type == "cpu" and not scores.requires_grad
    assert scores.tolist() == [27 * 20000.0, 27 * 40000.0, 27 * 60000.0, 0.0]


def test_gate_criterion_takes_the_largest_of_free_gates() -> None:
    model = Residual()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    gates = slim.add_gates(model, graph, tie="layer")
    with torch.no_grad():
        gates["stem.0@stem.2"].fill_(0.1)
        gates["stem.0@branch.1.2"].copy_(torch.arange(8) / 10)
        gates["stem.0@depthwise.2"].fill_(0.3)
    largest = [0.3, 0.3, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert slim.score(model, graph, "gate")["stem.0"].tolist() == pytest.approx(largest)
    total = slim.score(model, graph, "gate", reduction="sum")["stem.0"].tolist()
    assert total == pytest.approx([0.4 + k / 10 for k in range(8)])


def test_a_tied_gate_counts_once_however_often_it_is_used() -> None:
    model = Residual()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    with torch.no_grad():
        slim.add_gates(model, graph)["stem.0"].fill_(0.25)
    assert slim.score(model, graph, "gate", reduction="sum")["stem.0"].tolist() == [0.25] * 8


class Upsampled(nn.Module):
    """A transposed convolution, whose output axis is 1, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(2, 3, 2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.up(x)).mean((2, 3)))
        return out


def test_filters_of_a_transposed_convolution_lie_along_its_second_axis() -> None:
    model = Upsampled()
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor([1.0, -2.0, 4.0]).reshape(1, 3, 1, 1).expand(2, 3, 2, 2))
    graph = slim.trace(model, torch.rand(1, 2, 4, 4))
    assert slim.score(model, graph, "l1", normalise="none")["up"].tolist() == [8.0, 16.0, 32.0]
    distances = [6 * 8**0.5, 9 * 8**0.5, 9 * 8**0.5]
    assert slim.score(model, graph, "fpgm", normalise="none")["up"].tolist() == pytest.approx(distances)
    model.up.weight.data[:, 2] = 0.0
    distances = [4 * 8**0.5, 5 * 8**0.5, 3 * 8**0.5]
    assert slim.score(model, graph, "fpgm", normalise="none")["up"].tolist() == pytest.approx(distances)


class Grouped(nn.Module):
    """A grouped convolution between two others: channels 0 and 3, 1 and 4, 2 and 5 of each go together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = conv(3, 6), nn.Conv2d(6, 6, 1, groups=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.grouped(self.first(x))))
        return out


def test_a_channel_of_several_filters_is_judged_by_all_of_them() -> None:
    model = Grouped()
    with torch.no_grad():
        model.first[0].weight.copy_(
            torch.tensor([3.0, 1.0, 0.0, -4.0, 0.0, 0.0]).reshape(6, 1, 1, 1).expand(6, 3, 1, 1)
        )
    graph = slim.trace(model, torch.rand(1, 3, 4, 4))
    found = {c: slim.score(model, graph, c, normalise="none")["first.0"].tolist() for c in ("l1", "l2", "fpgm")}
    assert found["l1"] == [21.0, 3.0, 0.0]
    assert found["l2"] == pytest.approx([75**0.5, 3**0.5, 0.0])
    # Differences, each in three elements, of 3: 2 + 3 * 3 + 7 and -4: 7 + 5 + 3 * 4; of 1: 2 + 3 * 1 + 5 and 0: 3 + 1 + 4.
    assert found["fpgm"] == pytest.approx([42 * 3**0.5, 18 * 3**0.5, 16 * 3**0.5])


def test_fpgm_compares_with_filters_of_the_layer_that_other_groups_hold() -> None:
    model = Residual()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    for layer in (model.side[0], model.depthwise[0]):
        layer.weight.data.zero_()
    model.depthwise[0].weight.data[0] = 2.0
    scores = slim.score(model, graph, "fpgm", normalise="none", reduction="sum")["side.0"]
    assert scores.tolist() == pytest.approx([6.0] * 8)  # 3x3 filters of 2 and 0


# -- reduction and normalisation --------------------------------------------------------------------------------

LAYERS = {4: [[1.0, 3.0, 0.0, 4.0], [10.0, 0.0, 20.0, 10.0]], 6: [[0.0, 1.0, 2.0, 3.0, 4.0, 2.0]]}


def per_layer(group: ChannelGroup) -> list[Tensor]:
    return [torch.tensor(layer) for layer in LAYERS[group.size]]


@pytest.mark.parametrize(
    ("reduction", "normalise", "expected"),
    [
        ("mean", "mean", [0.75, 0.75, 1.0, 1.5]),
        ("max", "mean", [1.0, 1.5, 2.0, 2.0]),
        ("sum", "mean", [1.5, 1.5, 2.0, 3.0]),
        ("mean", "max", [0.375, 0.375, 0.5, 0.75]),
        ("max", "max", [0.5, 0.75, 1.0, 1.0]),
        ("sum", "max", [0.75, 0.75, 1.0, 1.5]),
        ("mean", "none", [5.5, 1.5, 10.0, 7.0]),
        ("max", "none", [10.0, 3.0, 20.0, 10.0]),
        ("sum", "none", [11.0, 3.0, 20.0, 14.0]),
        (None, None, [0.75, 0.75, 1.0, 1.5]),
    ],
)
def test_layers_are_normalised_then_reduced(reduction: Any, normalise: Any, expected: list[float]) -> None:
    model, graph = chain()
    scores = slim.score(model, graph, per_layer, reduction=reduction, normalise=normalise)
    assert list(scores) == ["first.0", "second.0"] and scores["first.0"].tolist() == expected


def test_a_function_may_score_a_group_by_one_vector_or_leave_it_whole() -> None:
    model, graph = chain()
    mine = {"first.0": torch.tensor([5, -3, 2, 4], dtype=torch.int32), "second.0": None}
    scores = slim.score(model, graph, lambda group: mine[group.name])
    assert list(scores) == ["first.0"] and scores["first.0"].dtype is torch.float64
    assert scores["first.0"].tolist() == [5.0, -3.0, 2.0, 4.0]
    scaled = slim.score(model, graph, lambda group: mine[group.name], normalise="max")
    assert scaled["first.0"].tolist() == [1.0, -0.6, 0.4, 0.8]
    assert slim.score(model, graph, lambda group: [] if group.size == 6 else per_layer(group)).keys() == {"first.0"}


def test_the_callers_vector_is_not_shared_with_the_scores() -> None:
    model, graph = chain()
    mine = torch.ones(4, dtype=torch.float64)
    slim.score(model, graph, lambda group: mine if group.size == 4 else None)["first.0"].zero_()
    assert mine.tolist() == [1.0] * 4


def test_a_layer_of_zeros_keeps_its_zeros() -> None:
    model, graph = chain()
    model.first[0].weight.data.zero_()
    for criterion in ("l1", "fpgm"):
        assert slim.score(model, graph, criterion)["first.0"].tolist() == [0.0] * 4


def test_dead_weights_score_next_to_nothing_instead_of_as_much_as_others() -> None:
    model, graph = chain()
    model.first[0].weight.data.mul_(1e-20)
    assert 0 < slim.score(model, graph, "l1")["first.0"].max() < 1e-6


# -- errors -----------------------------------------------------------------------------------------------------


def test_unknown_criterion_and_missing_gates_are_named() -> None:
    model, graph = chain()
    with pytest.raises(slim.SlimError, match="'magic'; expected one of gate, bn, l1, l2, fpgm, taylor, random or"):
        slim.score(model, graph, "magic")
    with pytest.raises(slim.SlimError, match=r"is 3; expected"):
        slim.score(model, graph, 3)  # type: ignore[arg-type]
    with pytest.raises(slim.SlimError, match="no gates"):
        slim.score(model, graph, "gate")
    with pytest.raises(slim.SlimError, match=r"'bn' finds nothing to score.*no batch norms"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        slim.score(plain, slim.trace(plain, torch.rand(1, 3, 4, 4)), "bn")


def test_unknown_reduction_and_normalisation_are_named() -> None:
    model, graph = chain()
    with pytest.raises(slim.SlimError, match="reduction is 'min'; expected one of mean, max, sum"):
        slim.score(model, graph, "l1", reduction="min")  # type: ignore[arg-type]
    with pytest.raises(slim.SlimError, match="normalise is 'sum'; expected one of mean, max, none"):
        slim.score(model, graph, "l1", normalise="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0, 3.0, 4.0], r"group first\.0 returned list; expected a real tensor"),
        ("abcd", "returned str"),
        (4.0, "returned float"),
        (torch.ones(4, dtype=torch.complex64), "real tensor"),
        (torch.ones(3), r"first\.0 returned shape \(3,\); expected \(4,\)"),
        ([torch.ones(4), torch.ones(4, 1)], r"shape \(4, 1\)"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), r"first\.0 returned NaN or infinity"),
        ([torch.ones(4), torch.full((4,), float("inf"))], "NaN or infinity"),
        ([torch.tensor([-1.0, 0.0, 0.5, 0.0])], r"first\.0: the mean of its scores is -0\.125.*normalise='none'"),
        (None, "'wrong' finds nothing to score.*None for every group"),
    ],
)
def test_what_is_no_score_is_named_with_its_group(returned: Any, message: str) -> None:
    model, graph = chain()

    def wrong(group: ChannelGroup) -> Any:
        return returned

    wrong.__qualname__ = "wrong"
    with pytest.raises(slim.SlimError, match=message):
        slim.score(model, graph, wrong)


def test_weights_that_are_not_finite_are_refused() -> None:
    model, graph = chain()
    model.second[0].weight.data[2] = float("nan")
    for criterion in ("l1", "fpgm"):
        with pytest.raises(slim.SlimError, match=rf"{criterion}' on group second\.0 returned NaN"):
            slim.score(model, graph, criterion)


def test_a_graph_of_another_model_is_refused() -> None:
    model, graph = chain()
    slim.add_gates(model, graph)
    other = slim.trace(Residual(), torch.rand(1, 3, 8, 8))
    with pytest.raises(slim.SlimError, match=r"stem\.0\.weight is not in this model; trace the model again"):
        slim.score(model, other, "l1")
    wider = Chain()
    wider.first = conv(3, 5, 3)
    wider.second = conv(5, 6)
    with pytest.raises(slim.SlimError, match=r"first\.0\.weight has 4 channels.*trace the model again"):
        slim.score(model, slim.trace(wider, torch.rand(1, 3, 8, 8)), "l2")
    with pytest.raises(slim.SlimError, match=r"gate of group first\.0 has 4 channels, the graph 5"):
        slim.score(model, slim.trace(wider, torch.rand(1, 3, 8, 8)), "gate")
    other = slim.trace(Upsampled(), torch.rand(1, 2, 4, 4))
    with pytest.raises(slim.SlimError, match=r"up\.weight is not in this model"):
        slim.score(nn.ModuleDict({"up": nn.BatchNorm2d(3)}), other, "l1")


def test_a_graph_without_prunable_groups_is_named() -> None:
    model = nn.Conv2d(3, 4, 1)
    with pytest.raises(slim.SlimError, match=r"no group.*graph\.report\(\)"):
        slim.score(model, slim.trace(model, torch.rand(1, 3, 4, 4)), "l1")
