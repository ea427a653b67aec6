"""Scores to plans: exact kept indices for every option, targets, floors, and what is refused."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slim
from models import build_model, load_description
from slim.solver import Ranking, spend_leftover_budget
from slim.targets import WidthCosts, width_constraints
from tests.slim.networks import Chain, Residual, conv, randomise

ROOT = Path(__file__).resolve().parents[2]
FINE = {"round_to": 1, "min_channels": 1}


def chain_graph() -> slim.ChannelGraph:
    return slim.trace(Chain(), torch.rand(1, 3, 8, 8))


def kept(plan: slim.Plan) -> dict[str, tuple[int, ...]]:
    return {g.name: g.keep for g in plan.groups}


# A chain of a and b channels has 64 (27 a + a b + 2 b) MACs.
SCORES = {"first.0": torch.tensor([0.9, 0.1, 0.8, 0.7]), "second.0": torch.tensor([0.5, 0.6, 0.2, 0.3, 0.05, 0.4])}
ALL = {"first.0": (0, 1, 2, 3), "second.0": (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        # The lowest channels go first across groups; or the same share of every group goes.
        ({"channels": 0.7}, (0, 2, 3), (0, 1, 3, 5)),
        ({"channels": 0.5, "scope": "local"}, (0, 2), (0, 1, 5)),
        # Multiples of 2: the next best goes instead; a floor between two multiples is the higher one.
        ({"channels": 0.6, "round_to": 2, "min_channels": 2}, (0, 1, 2, 3), (0, 1)),
        ({"channels": 0.8, "round_to": 2, "min_channels": 3}, (0, 1, 2, 3), (0, 1, 3, 5)),
        # Counts: 7 channels; 74 * 64 MACs, where 73 * 64 force one more channel out; more than there are.
        ({"channels": 7}, (0, 2, 3), (0, 1, 3, 5)),
        ({"channels": 7.0}, (0, 2, 3), (0, 1, 3, 5)),
        ({"macs": 74 * 64}, (0, 2), (0, 1, 2, 3, 5)),
        ({"macs": 74 * 64 - 1}, (0, 2), (0, 1, 3, 5)),
        ({"params": 10**9}, ALL["first.0"], ALL["second.0"]),
        ({"channels": 1}, ALL["first.0"], ALL["second.0"]),
        # What rounding leaves of 0.6 * 144 widens the second group from 4 of 6, though the first keeps less of its own.
        ({"macs": 0.6, "scope": "local", "round_to": 2, "min_channels": 2}, (0, 2), ALL["second.0"]),
        # Everything at or above the threshold stays, in the scores' own precision; a rounded width is the higher one.
        ({"threshold": 0.35}, (0, 2, 3), (0, 1, 5)),
        ({"threshold": 0.7}, (0, 2, 3), (1,)),
        ({"threshold": 0.35, "round_to": 2}, ALL["first.0"], (0, 1, 3, 5)),
        ({"threshold": 0.15, "round_to": 4}, ALL["first.0"], ALL["second.0"]),
        ({"threshold": 2.0, "min_channels": 2}, (0, 2), (0, 1)),
        ({"threshold": -1}, ALL["first.0"], ALL["second.0"]),
        # A channel saves 27 + 6 or 4 + 2 times 64 MACs: per MAC the first group's are worth less, 0.9 / 33 at most.
        ({"macs": 0.5}, (0, 2), (0, 1, 3, 5)),
        ({"macs": 0.5, "cost_aware": True}, (0,), ALL["second.0"]),
        # A parameter costs as much in 29 + 6 and in 4 + 4 a channel: 3 and 1 channels, or 2 and 6, are 96 of 166.
        ({"params": 0.6}, (0, 2, 3), (1,)),
        ({"params": 0.6, "cost_aware": True}, (0, 2), ALL["second.0"]),
        # Half of 4 and of 6, up to the next multiple of 2.
        ({"channels": 0.5, "min_keep": 0.5}, (0, 2), (0, 1, 5)),
        ({"channels": 0.6, "min_keep": 0.5, "round_to": 2}, (0, 2), (0, 1, 3, 5)),
        # Overrides: a count or a ratio, past rounding and floors; the target is met by the rest.
        ({"channels": 0.6, "overrides": {"first*": 1}}, (0,), (0, 1, 2, 3, 5)),
        ({"channels": 0.6, "overrides": {"first*": 1.0}}, ALL["first.0"], (0, 1)),
        ({"channels": 1.0, "overrides": {"second.0": 0.4}, "round_to": 4, "min_channels": 4}, ALL["first.0"], (0, 1)),
        ({"channels": 1.0, "overrides": {"second.0": 0.01}}, ALL["first.0"], (1,)),
        ({"channels": 1.0, "overrides": {"second.0": 3.0, "*": 2}}, (0, 2), (0, 1, 5)),
        ({"threshold": 0.35, "overrides": {"first.0": 2}}, (0, 2), (0, 1, 5)),
    ],
)  # fmt: skip
def test_kept_channels_by_hand(options: dict[str, Any], first: tuple[int, ...], second: tuple[int, ...]) -> None:
    plan = slim.make_plan(chain_graph(), SCORES, **{**FINE, **options})
    assert kept(plan) == {"first.0": first, "second.0": second}


def test_ignored_groups_stay_whole_whatever_is_overridden() -> None:
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.6, **FINE, overrides={"*": 2}, ignore=("first.*",))
    assert kept(plan) == {"second.0": (0, 1)}
    # 10 channels have scores, the ignored 4 among them: 0.7 of them leaves 3 to the other group.
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.7, **FINE, ignore="first.0")
    assert kept(plan) == {"second.0": (0, 1, 5)}


def test_ties_are_spread_over_the_groups() -> None:
    scores = {"first.0": torch.zeros(4), "second.0": torch.zeros(6)}
    plan = slim.make_plan(chain_graph(), scores, channels=0.5, **FINE)
    assert {name: len(k) for name, k in kept(plan).items()} == {"first.0": 2, "second.0": 3}


def traced(*layers: nn.Module) -> slim.ChannelGraph:
    return slim.trace(nn.Sequential(*layers), torch.rand(1, 3, 8, 8))


def test_like_structures_are_ranked_together_and_keep_the_same_share() -> None:
    graph = traced(conv(3, 4, 3), conv(4, 4), conv(4, 8), nn.Conv2d(8, 2, 1))
    scores = {
        "0.0": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "1.0": torch.tensor([0.5, 0.51, 0.52, 0.8]),
        "2.0": torch.tensor([0.9, 1.0, 1.1, 0.55, 0.65, 0.75, 0.58, 0.7]),
    }
    # The first makes its channels with 3 x 3 kernels, the others with 1 x 1: 2 of 4 and 6 of 12 stay.
    plan = slim.make_plan(graph, scores, channels=0.5, **FINE, scope="isomorphic")
    assert kept(plan) == {"0.0": (2, 3), "1.0": (3,), "2.0": (0, 1, 2, 5, 7)}


def test_local_scope_gives_back_to_the_lowest_ratio() -> None:
    # 4, 8 and 4 of 8, 12 and 8 channels meet 21; one more step of 4 fits, and half is less than two thirds.
    scores = {g.name: torch.arange(g.size) + 10.0 * (g.size == 12) for g in RESIDUAL.groups if g.prunable}
    plan = slim.make_plan(RESIDUAL, scores, channels=0.75, round_to=4, min_channels=4, scope="local")
    assert kept(plan) == {"stem.0": tuple(range(8)), "branch.0.0": tuple(range(4, 12)), "side.0": (4, 5, 6, 7)}


def test_what_is_given_back_counts_for_the_next_turn() -> None:
    graph = traced(conv(3, 4), conv(4, 6), conv(6, 8), nn.Conv2d(8, 2, 1))
    scores = {name: torch.arange(graph.by_name[name].size).double() for name in ("0.0", "1.0", "2.0")}
    constraints = width_constraints(graph, set(scores), {}, (), round_to=1, min_channels=1, min_keep=0.0)
    ranking = Ranking(dict(enumerate(scores.values())), [[0], [1], [2]])
    # Kept ratios 1/4, 2/6, 2/8, with four channels to give: the first, the third, the second, the third again (3/8 < 1/2).
    widths = spend_leftover_budget([1, 2, 2, 2], "channels", 9, constraints, WidthCosts(graph, constraints), ranking)
    assert widths == [2, 3, 4, 2]


def test_a_channel_that_stands_for_several_counts_as_several() -> None:
    graph = traced(conv(3, 8), conv(8, 8, groups=2), nn.Conv2d(8, 2, 1))
    scores = {"0.0": torch.tensor([0.9, 0.8, 0.1, 0.2]), "1.0": torch.tensor([0.7, 0.6, 0.5, 0.4])}
    for channels in (12, 0.75):
        plan = slim.make_plan(graph, scores, channels=channels, round_to=4, min_channels=4)
        assert kept(plan) == {"0.0": (0, 1), "1.0": (0, 1, 2, 3)}
        assert [g.widths for g in plan.groups] == [(8, 4), (8, 8)]
    plan = slim.make_plan(graph, scores, channels=1.0, overrides={"0.0": 6})
    assert kept(plan) == {"0.0": (0, 1, 3), "1.0": (0, 1, 2, 3)}
    with pytest.raises(slim.SlimError, match=r"5 channels of group 0\.0; expected 1 to 8, in multiples of 2"):
        slim.make_plan(graph, scores, channels=1.0, overrides={"0.0": 5})


def test_what_a_channel_saves_is_counted_for_one_of_the_producing_layer() -> None:
    graph = traced(conv(3, 8), conv(8, 8, groups=2), conv(8, 4), nn.Conv2d(4, 2, 1))
    # 3 * 8 + 8 b / 2 + b c + 2 c, 64 times: two of b, which go together, save 16 and one of c 10: 0.9 / 8 is above 0.8 / 10.
    scores = {"1.0": torch.full((4,), 0.9), "2.0": torch.full((4,), 0.8)}
    plan = slim.make_plan(graph, scores, macs=86 * 64, **FINE, cost_aware=True)
    assert kept(plan) == {"1.0": (0, 1, 2, 3), "2.0": (0, 1, 2)}


def test_a_floor_is_the_share_itself_and_not_one_more() -> None:
    # In floating point 0.28 * 25 is just above 7.
    graph = traced(conv(3, 25), nn.Conv2d(25, 2, 1))
    plan = slim.make_plan(graph, {"0.0": torch.zeros(25)}, threshold=1.0, **FINE, min_keep=0.28)
    assert len(kept(plan)["0.0"]) == 7


class Halves(nn.Module):
    """One channel stands for two of ``wide`` (16) and one of ``narrow`` (8)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = conv(3, 16), conv(3, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.wide(x).chunk(2, 1)
        out: Tensor = self.head(first + second + self.narrow(x))
        return out


def test_every_producing_layer_is_rounded() -> None:
    graph = slim.trace(Halves(), torch.rand(1, 3, 8, 8))
    plan = slim.make_plan(graph, {"wide.0": torch.arange(8.0)}, channels=0.8, round_to=4, min_channels=4)
    assert kept(plan) == {"wide.0": (4, 5, 6, 7)}


def random_scores(graph: slim.ChannelGraph, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = sorted(g.name for g in graph.groups if g.prunable)
    return {n: torch.rand(graph.by_name[n].size, generator=generator, dtype=torch.float64) for n in names}


RESIDUAL = slim.trace(Residual(), torch.zeros(1, 3, 8, 8))
GROUPED = traced(conv(3, 12), conv(12, 8, groups=2), conv(8, 12, 3), nn.Conv2d(12, 2, 1))


@pytest.mark.parametrize(
    ("options", "stem", "branch", "side"),
    [
        ({"macs": 0.5, **FINE}, (1, 3, 5, 6, 7), (0, 1, 2, 3, 4, 5, 8, 10), (1, 2, 3, 4, 6, 7)),
        ({"params": 0.6, "round_to": 4, "min_channels": 4}, (1, 5, 6, 7), range(12), range(8)),
        ({"channels": 0.7, "round_to": 3, "min_channels": 5}, (1, 3, 4, 5, 6, 7), (0, 1, 3, 4, 5, 8), (1, 2, 3, 4, 6, 7)),
    ],
)  # fmt: skip
def test_plans_of_the_first_version_are_unchanged(
    options: dict[str, Any], stem: tuple[int, ...], branch: tuple[int, ...], side: tuple[int, ...]
) -> None:
    plan = slim.make_plan(RESIDUAL, random_scores(RESIDUAL), **options)
    assert kept(plan) == {"stem.0": stem, "branch.0.0": tuple(branch), "side.0": tuple(side)}


def test_published_yolov5_plans_are_unchanged() -> None:
    model = build_model(load_description(ROOT / "models" / "yolov5n.yaml"), 80)
    graph = slim.trace(model, torch.zeros(1, 3, 64, 64))
    digests = []
    for options in ({"macs": 0.5}, {"macs": 0.3}, {"params": 0.5}, {"channels": 0.5}):
        plan = slim.make_plan(graph, random_scores(graph), **options)  # type: ignore[arg-type]
        digests.append(zlib.crc32(repr(sorted(kept(plan).items())).encode()))
    assert digests == [1919727625, 2757006740, 759831062, 3059361509]


@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_target_is_met_and_costs_are_those_of_the_cut_model(target: str) -> None:
    model, x = randomise(Residual()), torch.rand(1, 3, 16, 16)
    graph = slim.trace(model, x)
    plan = slim.make_plan(graph, slim.score(model, graph, "random"), **{target: 0.6}, **FINE)  # type: ignore[arg-type]
    cost = slim.cost(slim.apply_plan(model, plan), x)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1])
    share = {
        "macs": cost.macs / graph.macs,
        "params": cost.params / graph.params,
        "channels": sum(len(g.keep) for g in plan.groups) / 28,
    }[target]
    assert 0.5 < share <= 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 640},
         "macs=640 cannot be reached: with every group at its floor 0.208 remains (1,920 of 9,216 MACs); the floors that bind "
         "most: first.0 (min_channels: 1 channel), second.0 (min_channels: 1 channel); 0.014 hangs on groups that cannot be cut: "
         "head (frozen: a model output); lower min_channels, or raise the target"),
        ({"macs": 0.3, "round_to": 4},
         "macs=0.3 cannot be reached: with every group at its floor 0.917 remains (8,448 of 9,216 MACs); the floors that bind "
         "most: first.0 (round_to: 4 channels), second.0 (round_to: 4 channels); 0.056 hangs on groups that cannot be cut: "
         "head (frozen: a model output); round_to=1 would do, or raise the target"),
        ({"macs": 0.3, "min_channels": 4},
         "macs=0.3 cannot be reached: with every group at its floor 0.917 remains (8,448 of 9,216 MACs); the floors that bind "
         "most: first.0 (min_channels: 4 channels), second.0 (min_channels: 4 channels); 0.056 hangs on groups that cannot be "
         "cut: head (frozen: a model output); min_channels=1 would do, or raise the target"),
        ({"channels": 0.5, "min_keep": 0.75},
         "channels=0.5 cannot be reached: with every group at its floor 0.800 remains (8 of 10 channels); the floors that "
         "bind most: second.0 (min_keep: 5 channels), first.0 (min_keep: 3 channels); min_keep=0.375 would do, or raise the "
         "target"),
        ({"channels": 2, "overrides": {"second.0": 5}, "round_to": 2},
         "channels=2 cannot be reached: with every group at its floor 0.700 remains (7 of 10 channels); the floors that bind "
         "most: second.0 (override: 5 channels), first.0 (round_to: 2 channels); lower the overrides, lower round_to, or raise "
         "the target"),
        ({"params": 0.5, "ignore": ["first.*"], "overrides": {"second.0": 6}},
         "params=0.5 cannot be reached: with every group at its floor 1.000 remains (166 of 166 parameters); the floors that "
         "bind most: first.0 (ignored: 4 channels), second.0 (override: 6 channels); 0.084 hangs on groups that cannot be "
         "cut: head (frozen: a model output); no group can be pruned; ignore fewer groups, lower the overrides, or raise the "
         "target"),
    ],
)  # fmt: skip
def test_unreachable_target_says_how_far_and_what_binds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(slim.SlimError) as error:
        slim.make_plan(chain_graph(), SCORES, **{**FINE, **options})
    assert str(error.value) == message


def test_groups_without_scores_are_named_when_they_hold_much() -> None:
    with pytest.raises(slim.SlimError, match=r"0\.125 hangs .* cut: second\.0 \(no scores\), head \(frozen"):
        slim.make_plan(chain_graph(), {"first.0": SCORES["first.0"]}, macs=0.1, **FINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one target"),
        ({"macs": 0.5, "params": 0.5}, "exactly one"),
        ({"macs": 0.5, "threshold": 0.5}, "exactly one"),
        ({"macs": 0.0}, "above 0"),
        ({"macs": -3}, "above 0"),
        ({"macs": 1.5}, "at most 1 .*or a whole number above 1"),
        ({"params": float("nan")}, "whole number"),
        ({"params": float("inf")}, "whole number"),
        ({"channels": "0.5"}, "whole number"),
        ({"channels": True}, "whole number"),
        ({"threshold": float("nan")}, "expected a score"),
        ({"macs": 0.5, "scope": "x"}, "scope is 'x'; expected one of 'global', 'local', 'isomorphic'"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0.*at least 1"),
        ({"macs": 0.5, "round_to": 2.5}, "round_to=2.5.*whole numbers"),
        ({"macs": 0.5, "min_channels": 0}, "min_channels"),
        ({"macs": 0.5, "min_keep": 1.1}, "min_keep=1.1: expected a share"),
        ({"channels": 0.5, "cost_aware": True}, "cost_aware=True needs macs= or params=: channels has no cost"),
        ({"threshold": 0.5, "cost_aware": True}, "cost_aware=True .* threshold has no cost"),
        ({"macs": 0.5, "overrides": {"secnd.0": 1}}, "overrides: no group .*'secnd.0'; near names: second.0"),
        ({"macs": 0.5, "ignore": ["zz"]}, r"ignore: no group .*'zz'; names are first.0, head, second.0"),
        ({"macs": 0.5, "overrides": {"head": 1}}, "'head' matches no group that can be cut; head is frozen: a model output"),
        ({"macs": 0.5, "overrides": {"first.0": 1.5}}, "'first.0' is 1.5; expected a keep ratio .* or a whole number"),
        ({"macs": 0.5, "overrides": {"first.0": 0.0}}, "is 0.0; expected a keep ratio"),
        ({"macs": 0.5, "overrides": {"first.0": "a"}}, "is 'a'; expected a keep ratio"),
        ({"macs": 0.5, "overrides": {"first.0": 0}}, "0 channels of group first.0; expected 1 to 4"),
        ({"macs": 0.5, "overrides": {"*": 5}}, "5 channels of group first.0; expected 1 to 4"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(slim.SlimError, match=message):
        slim.make_plan(chain_graph(), SCORES, **options)


def test_nan_and_misshapen_scores_are_refused() -> None:
    with pytest.raises(slim.SlimError, match="NaN"):
        slim.make_plan(chain_graph(), {"first.0": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, macs=0.5)
    with pytest.raises(slim.SlimError, match="shape"):
        slim.make_plan(chain_graph(), {"first.0": torch.ones(3)}, macs=0.5)
    with pytest.raises(slim.SlimError, match="does not have"):
        slim.make_plan(chain_graph(), {"other": torch.ones(3)}, macs=0.5)
    with pytest.raises(slim.SlimError, match=r"second\.0 has no scores"):
        slim.make_plan(chain_graph(), {"first.0": torch.ones(4)}, macs=0.5, overrides={"second.0": 1})


def left(graph: slim.ChannelGraph, plan: slim.Plan, kind: str) -> int:
    """What the plan leaves of the target's cost, in all."""
    if kind != "channels":
        return {"macs": plan.macs, "params": plan.params}[kind][1]
    widths = {g.name: g.widths[1] for g in plan.groups}
    return sum(widths.get(g.name, g.size * g.per_channel) for g in graph.groups if g.prunable)


def at_widths(graph: slim.ChannelGraph, plan: slim.Plan, widths: dict[str, int]) -> slim.Plan:
    """The plan with some groups at other widths."""
    overrides = {g.name: widths.get(g.name, g.widths[1]) for g in plan.groups}
    scores = {g.name: torch.zeros(g.size) for g in plan.groups}
    return slim.make_plan(graph, scores, threshold=0.0, overrides=overrides)


@settings(deadline=None, max_examples=150)
@given(
    graph=st.sampled_from([RESIDUAL, GROUPED]), seed=st.integers(0, 10**6), keep=st.floats(0.05, 1.0),
    kind=st.sampled_from(["macs", "params", "channels", "threshold"]), absolute=st.booleans(), cost_aware=st.booleans(),
    round_to=st.sampled_from([1, 2, 3, 4]), min_channels=st.integers(1, 5), min_keep=st.sampled_from([0.0, 0.3, 0.5]),
    scope=st.sampled_from(["global", "local", "isomorphic"]), override=st.none() | st.floats(0.1, 1.0), ignore=st.booleans(),
)  # fmt: skip
def test_any_plan_is_within_target_rounding_and_floors(
    graph: slim.ChannelGraph, seed: int, keep: float, kind: str, absolute: bool, cost_aware: bool, round_to: int,
    min_channels: int, min_keep: float, scope: Any, override: float | None, ignore: bool,
) -> None:  # fmt: skip
    scores = random_scores(graph, seed)
    first, second, *_ = scores
    whole = {"macs": graph.macs, "params": graph.params, "threshold": 0}.get(kind, sum_of_channels(graph))
    value = max(2, int(keep * whole)) if absolute and kind != "threshold" else keep
    budget = value if value > 1 else value * whole
    options: dict[str, Any] = {"round_to": round_to, "min_channels": min_channels, "min_keep": min_keep, "scope": scope}
    options |= {"overrides": {} if override is None else {first: override}, "ignore": [second] if ignore else []}
    floors = slim.make_plan(graph, scores, threshold=2.0, **options)
    try:
        aware = cost_aware and kind in ("macs", "params")
        plan = slim.make_plan(graph, scores, **{kind: value}, **options, cost_aware=aware)
    except slim.SlimError as error:
        assert "cannot be reached" in str(error) and left(graph, floors, kind) > budget
        return
    assert slim.Plan.from_json(plan.to_json()) == plan
    assert [g.name for g in plan.groups] == [
        g.name for g in graph.groups if g.prunable and not (ignore and g.name == second)
    ]
    assert kind == "threshold" or left(graph, plan, kind) <= budget
    for g in plan.groups:
        low = min(float(scores[g.name][k]) for k in g.keep)
        assert all(float(scores[g.name][k]) <= low for k in g.removed) and g.lowest_kept == low
        if override is not None and g.name == first:
            assert abs(len(g.keep) - override * g.size) <= 0.5 or len(g.keep) == 1
            continue
        allowed = [
            w for w in range(1, g.size + 1) if w == g.size
            or (w * g.per_channel % round_to == 0 and w * g.per_channel >= min_channels and w >= min_keep * g.size)
        ]  # fmt: skip
        assert len(g.keep) in allowed
        if kind == "threshold":
            assert len(g.keep) == min(w for w in allowed if w >= int((scores[g.name] >= keep).sum()))
        elif len(g.keep) < g.size:
            # Nothing of the budget is left over that would widen a group.
            wider = min(w for w in allowed if w > len(g.keep)) * g.per_channel
            assert left(graph, at_widths(graph, plan, {g.name: wider}), kind) > budget


def sum_of_channels(graph: slim.ChannelGraph) -> int:
    return sum(g.size * g.per_channel for g in graph.groups if g.prunable)


def test_costs_at_the_planned_widths_find_more_than_those_of_the_full_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        *(layer for width in ((3, 16), (16, 64), (64, 16), (16, 64)) for layer in (nn.Conv2d(*width, 1), nn.ReLU())),
        nn.Conv2d(64, 2, 1),
    )
    graph = slim.trace(model, torch.zeros(1, 3, 4, 4))
    gains = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        scores = {g.name: torch.rand(g.size, generator=generator) for g in graph.groups if g.prunable}
        kept = []
        for passes in (1, 4):
            monkeypatch.setattr(slim.solver, "KNAPSACK_PASSES", passes)
            plan = slim.make_plan(graph, scores, macs=0.3, cost_aware=True, **FINE)
            assert plan.macs[1] <= 0.3 * plan.macs[0]
            kept.append(sum(float(scores[g.name][list(g.keep)].sum()) for g in plan.groups))
        gains.append(kept[1] - kept[0])
    assert min(gains) >= 0 and max(gains) > 0.1
