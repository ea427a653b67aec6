"""Two plans in turn as one: exact positions, regrouped channels, random networks, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slim
from slim.graph import Member
from slim.plan import GroupPlan
from tests.slim.networks import conv, randomise


class Joined(nn.Module):
    """Two layers of 4 channels concatenated before a head: the second's positions there come after the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.a(x), self.b(x)], 1))
        return out


def rounds(model: nn.Module, scores: list[dict[str, list[float]]]) -> list[slim.Plan]:
    """A plan a round, each on the network that the ones before leave; channels with scores below 0.5 go."""
    plans, x = [], torch.rand(1, 3, 4, 4)
    for judged in scores:
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in judged.items()}
        plans.append(slim.make_plan(slim.trace(model, x), tensors, threshold=0.5, round_to=1, min_channels=1))
        model = slim.apply_plan(model, plans[-1])
    return plans


def same(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    equal = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    return states[0].keys() == states[1].keys() and equal and repr(one) == repr(two)


SCORES = [{"a": [0.9, 0.1, 2.0, 0.2]}, {"a": [0.3, 0.6], "b": [0.1, 0.7, 0.8, 0.2]}]
"""The first round keeps channels 0 and 2 of a and does not judge b; the later keeps 1 and 2 of b, and the second of a."""


def test_later_positions_are_carried_back_to_the_first_network() -> None:
    model = Joined()
    first, later = rounds(model, SCORES)
    assert [m.index for g in later.groups for m in g.members if m.param == "head.weight"] == [(0, 1), (2, 3, 4, 5)]
    both = slim.compose(first, later)
    assert [(g.name, g.size, g.keep) for g in both.groups] == [("a", 4, (2,)), ("b", 4, (1, 2))]
    assert [m.index for g in both.groups for m in g.members if m.param == "head.weight"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert (both.macs, both.params) == ((first.macs[0], later.macs[1]), (first.params[0], later.params[1]))
    assert both.shapes == {n: tuple(p.shape) for n, p in model.named_parameters() if n != "head.bias"}
    edges = [(g.score_range, g.highest_removed, g.lowest_kept) for g in both.groups]
    assert edges == [((0.3, 0.6), 0.3, 0.6), ((0.1, 0.8), 0.2, 0.7)]
    assert same(slim.apply_plan(model, both), slim.apply_plan(slim.apply_plan(model, first), later))
    assert slim.Plan.from_json(both.to_json()) == both


def test_a_group_that_the_later_plan_leaves_out_keeps_its_first_scores() -> None:
    first, later = rounds(Joined(), SCORES)
    both = slim.compose(first, replace(later, groups=later.groups[1:]))
    assert both.groups[0] == first.groups[0]


def split(plan: slim.Plan, number: int) -> slim.Plan:
    """The plan with a group's channels in two groups of half the size."""
    group, halves = plan.groups[number], []
    for name, part in ((group.name, range(group.size // 2)), (group.name + "'", range(group.size // 2, group.size))):
        members = tuple(replace(m, index=tuple(m.positions(list(part), group.size))) for m in group.members)
        keep = tuple(k - part[0] for k in group.keep if k in part)
        halves.append(GroupPlan(name, len(part), keep, members, group.score_range))
    return replace(plan, groups=(*plan.groups[:number], *halves, *plan.groups[number + 1 :]))


def test_groups_may_be_split_or_merged_in_between() -> None:
    model = Joined()
    # Only the later plan knows b, in two pieces; then a in one piece at first and in two later; then the other way round.
    first, later = rounds(model, [{"a": [0.9, 0.1, 0.9, 0.1]}, {"b": [0.1, 0.7, 0.8, 0.2]}])
    first_whole, later_whole = rounds(model, [{"a": [0.9] * 4}, {"a": [0.1, 0.9, 0.8, 0.1]}])
    first_both, later_both = rounds(
        model, [{"a": [0.9, 0.8, 0.1, 0.9], "b": [0.9, 0.1, 0.9, 0.9]}, {"a": [0.1, 0.9, 0.8], "b": [0.7, 0.1, 0.3]}]
    )
    for one, two, expected in (
        (first, split(later, 0), {"a": (0, 2), "b": (1,), "b'": (0,)}),
        (first_whole, split(later_whole, 0), {"a": (1, 2)}),
        (split(first_both, 0), later_both, {"a": (1,), "a'": (1,), "b": (0,)}),
    ):  # fmt: skip
        both = slim.compose(one, two)
        assert {g.name: g.keep for g in both.groups} == expected
        assert same(slim.apply_plan(model, both), slim.apply_plan(slim.apply_plan(model, one), two))


def test_two_judges_of_one_group_give_it_the_scores_of_both() -> None:
    first, later = rounds(Joined(), [{"a": [0.9] * 4}, {"a": [0.1, 0.9, 0.8, 0.2]}])
    low, high = split(later, 0).groups
    low = replace(low, score_range=(0.1, 0.9), lowest_kept=0.9, highest_removed=0.1)
    high = replace(high, score_range=(0.2, 0.8), lowest_kept=0.8, highest_removed=0.2)
    assert slim.compose(first, replace(later, groups=(low, high))).groups == later.groups


def test_a_name_that_now_means_other_channels_is_numbered() -> None:
    first, later = rounds(Joined(), [{"a": [0.9, 0.1, 0.9, 0.1]}, {"b": [0.1, 0.7, 0.8, 0.2]}])
    renamed = replace(later, groups=(replace(later.groups[0], name="a"),))
    assert [(g.name, g.keep) for g in slim.compose(first, renamed).groups] == [("a", (0, 2)), ("a#2", (1, 2))]


def test_a_later_plan_that_does_not_fit_is_refused_by_parameter() -> None:
    first, later = rounds(Joined(), [{"a": [0.9, 0.1, 0.9, 0.9]}, {"a": [0.3, 0.6, 0.6], "b": [0.1, 0.7, 0.8, 0.2]}])
    with pytest.raises(
        slim.SlimError, match=r"its network's a.weight has shape \(4, 3, 1, 1\), the first plan leaves \(3, 3, 1, 1\)"
    ):
        slim.compose(first, first)
    for costs, message in (
        ({"params": (9, 5)}, "9 parameters, the first plan"),
        ({"macs": (9, 5)}, "9 MACs, the first plan leaves"),
    ):
        with pytest.raises(slim.SlimError, match=message):
            slim.compose(first, replace(later, **costs))
    a, b = later.groups
    fewer = replace(a, members=tuple(m for m in a.members if m.param != "a.bias"))
    more = replace(a, members=(*a.members, Member("other.weight", 0, "in", (0, 1, 2))))
    for changed, param in ((fewer, "a.bias"), (more, "other.weight")):
        with pytest.raises(slim.SlimError, match=rf"removes other positions of {param} \(axis 0\)"):
            slim.compose(first, replace(later, groups=(changed, b)))
    # Channels that the first plan ties can only go together.
    tied = tuple(replace(m, index=tuple(sorted(m.index, key=lambda p: p % 2))) for m in later.groups[1].members)
    with pytest.raises(slim.SlimError, match=r"removes other positions of b.weight"):
        whole = replace(first, groups=(*first.groups, GroupPlan("b", 2, (0, 1), tied_to(first, tied))))
        slim.compose(whole, replace(later, groups=(a, replace(b, keep=(1, 2, 3)))))
    with pytest.raises(slim.SlimError, match="leaves no channel of group a"):
        slim.compose(first, replace(later, groups=(replace(a, keep=()), b)))


def tied_to(first: slim.Plan, members: tuple[Member, ...]) -> tuple[Member, ...]:
    """Members of the later network's b where they are in the first's: one further on in the head."""
    return tuple(replace(m, index=tuple(i + (m.param == "head.weight") for i in m.index)) for m in members)


class Mixed(nn.Module):
    """A random stack of residual, concatenated, depthwise and grouped layers."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds, self.stem, width = kinds, conv(3, 8, 3), 8
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for kind in kinds:
            depth = {"residual": width, "joined": 6, "depthwise": width, "grouped": 12}[kind]
            groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
            inner = conv(width, 10) if kind == "residual" else nn.Identity()
            self.layers.append(nn.Sequential(inner, conv(10 if kind == "residual" else width, depth, 3, groups=groups)))
            width = width + depth if kind == "joined" else depth
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            x = x + y if kind == "residual" else torch.cat([y, x], 1) if kind == "joined" else y
        out: Tensor = self.head(x)
        return out


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["residual", "joined", "depthwise", "grouped"]), min_size=1, max_size=4),
    st.integers(0, 10**6), st.integers(2, 3), st.booleans(),
)  # fmt: skip
def test_rounds_in_turn_equal_one_plan(kinds: list[str], seed: int, number: int, gated: bool) -> None:
    model, x = Mixed(kinds), torch.rand(1, 3, 4, 4)
    generator = torch.Generator().manual_seed(seed)
    if gated:
        slim.add_gates(model, slim.trace(model, x))
    randomise(model, seed)
    plans, cut = [], model
    for _ in range(number):
        graph = slim.trace(cut, x)
        names = [g.name for g in graph.groups if g.prunable and torch.rand((), generator=generator) < 0.7]
        scores = {n: torch.rand(graph.by_name[n].size, generator=generator) for n in names}
        # At least two channels in each part of a grouped convolution: with one it would become a depthwise one.
        plans.append(slim.make_plan(graph, scores, threshold=0.3, round_to=1, min_channels=4))
        cut = slim.apply_plan(cut, plans[-1])
    both = slim.compose(plans[0], plans[1])
    together = both if number == 2 else slim.compose(both, plans[2])
    assert same(slim.apply_plan(model, together), cut)
    assert slim.max_difference(slim.mask(model, together), cut, x) < 1e-4
    if number == 3:
        other = slim.compose(plans[0], slim.compose(plans[1], plans[2]))
        assert same(slim.apply_plan(model, other), cut)
    assert slim.Plan.from_json(together.to_json()) == together
