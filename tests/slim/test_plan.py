"""Scores to plans: exact kept indices, targets, floors, JSON."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim
from slim.plan import from_runs, to_runs
from tests.slim.networks import Chain, Residual, randomise


def chain_graph() -> slim.ChannelGraph:
    return slim.trace(Chain(), torch.rand(1, 3, 8, 8))


def kept(plan: slim.Plan) -> dict[str, tuple[int, ...]]:
    return {g.name: g.keep for g in plan.groups}


SCORES = {"first.0": torch.tensor([0.9, 0.1, 0.8, 0.7]), "second.0": torch.tensor([0.5, 0.6, 0.2, 0.3, 0.05, 0.4])}


def test_lowest_channels_go_first_across_groups() -> None:
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.7, round_to=1, min_channels=1)
    assert kept(plan) == {"first.0": (0, 2, 3), "second.0": (0, 1, 3, 5)}


def test_local_scope_keeps_the_same_share_of_every_group() -> None:
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.5, round_to=1, min_channels=1, scope="local")
    assert kept(plan) == {"first.0": (0, 2), "second.0": (0, 1, 5)}


def test_widths_are_multiples_and_the_next_best_goes_instead() -> None:
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.6, round_to=2, min_channels=2)
    assert kept(plan) == {"first.0": (0, 1, 2, 3), "second.0": (0, 1)}


def test_a_floor_between_two_multiples_is_the_higher_one() -> None:
    plan = slim.make_plan(chain_graph(), SCORES, channels=0.8, round_to=2, min_channels=3)
    assert kept(plan) == {"first.0": (0, 1, 2, 3), "second.0": (0, 1, 3, 5)}


def test_ties_are_spread_over_the_groups() -> None:
    scores = {"first.0": torch.zeros(4), "second.0": torch.zeros(6)}
    plan = slim.make_plan(chain_graph(), scores, channels=0.5, round_to=1, min_channels=1)
    assert {name: len(k) for name, k in kept(plan).items()} == {"first.0": 2, "second.0": 3}


@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_target_is_met_and_costs_are_those_of_the_cut_model(target: str) -> None:
    model, x = randomise(Residual()), torch.rand(1, 3, 16, 16)
    graph = slim.trace(model, x)
    plan = slim.make_plan(graph, slim.score(model, graph, "random"), **{target: 0.6}, round_to=1, min_channels=1)  # type: ignore[arg-type]
    cost = slim.cost(slim.apply_plan(model, plan), x)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1])
    share = {
        "macs": cost.macs / graph.macs,
        "params": cost.params / graph.params,
        "channels": sum(len(g.keep) for g in plan.groups) / 28,
    }[target]
    assert 0.5 < share <= 0.6


def test_unreachable_target_says_how_far_and_names_the_floors() -> None:
    with pytest.raises(
        slim.SlimError, match=r"macs=0.1 cannot be reached.*0\.\d+ remains.*(second|first)\.0 \(4 channels\)"
    ):
        slim.make_plan(chain_graph(), SCORES, macs=0.1, round_to=4, min_channels=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one target"),
        ({"macs": 0.5, "params": 0.5}, "exactly one"),
        ({"macs": 0.0}, "above 0"),
        ({"macs": 1.5}, "at most 1"),
        ({"macs": 0.5, "scope": "x"}, "scope"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
    ],
)
def test_bad_targets_are_named(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(slim.SlimError, match=message):
        slim.make_plan(chain_graph(), SCORES, **kwargs)  # type: ignore[arg-type]


def test_nan_and_misshapen_scores_are_refused() -> None:
    with pytest.raises(slim.SlimError, match="NaN"):
        slim.make_plan(chain_graph(), {"first.0": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, macs=0.5)
    with pytest.raises(slim.SlimError, match="shape"):
        slim.make_plan(chain_graph(), {"first.0": torch.ones(3)}, macs=0.5)
    with pytest.raises(slim.SlimError, match="does not have"):
        slim.make_plan(chain_graph(), {"other": torch.ones(3)}, macs=0.5)


def test_json_round_trip_applies_to_a_fresh_copy() -> None:
    model = randomise(Residual())
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    plan = slim.make_plan(graph, slim.score(model, graph, "l1"), macs=0.5, round_to=1, min_channels=1)
    again = slim.Plan.from_json(plan.to_json())
    assert again == plan
    fresh = Residual()
    fresh.load_state_dict(model.state_dict())
    assert slim.max_difference(slim.apply_plan(model, plan), slim.apply_plan(fresh, again), torch.rand(1, 3, 8, 8)) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "groups": [{}]}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(slim.SlimError, match="plan"):
        slim.Plan.from_json(text)


def test_criteria_by_hand() -> None:
    model = Chain()
    with torch.no_grad():
        model.first[0].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]).reshape(4, 1, 1, 1).expand(4, 3, 3, 3))
        model.first[1].weight.copy_(torch.tensor([4.0, -1.0, 2.0, 1.0]))
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    assert slim.score(model, graph, "l1")["first.0"].tolist() == pytest.approx([2 / 3, 4 / 3, 2.0, 0.0])
    assert slim.score(model, graph, "bn")["first.0"].tolist() == pytest.approx([2.0, 0.5, 1.0, 0.5])
    gates = slim.add_gates(model, graph)
    with torch.no_grad():
        gates["first.0"].copy_(torch.tensor([0.1, 0.2, 0.0, 0.4]))
    assert slim.score(model, graph, "gate")["first.0"].tolist() == pytest.approx([0.1, 0.2, 0.0, 0.4])
    first, again = (slim.score(model, graph, "random", seed=3)["second.0"] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, slim.score(model, graph, "random", seed=4)["second.0"])


def test_gate_criterion_takes_the_largest_of_free_gates() -> None:
    model = Residual()
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    gates = slim.add_gates(model, graph, tie="layer")
    with torch.no_grad():
        gates["stem.0@stem.2"].fill_(0.1)
        gates["stem.0@branch.1.2"].copy_(torch.arange(8) / 10)
        gates["stem.0@depthwise.2"].fill_(0.3)
    assert slim.score(model, graph, "gate")["stem.0"].tolist() == pytest.approx(
        [0.3, 0.3, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7]
    )


def test_unknown_criterion_and_missing_gates_are_named() -> None:
    model = Chain()
    graph = chain_graph()
    with pytest.raises(slim.SlimError, match="gate, bn, l1"):
        slim.score(model, graph, "magic")
    with pytest.raises(slim.SlimError, match="no gates"):
        slim.score(model, graph, "gate")


@given(st.lists(st.integers(0, 60), max_size=40))
def test_runs_hold_any_list_of_indices(numbers: list[int]) -> None:
    assert from_runs(to_runs(numbers)) == numbers


RESIDUAL = slim.trace(Residual(), torch.zeros(1, 3, 8, 8))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.floats(0.3, 1.0), st.sampled_from(["macs", "params", "channels"]), st.sampled_from([1, 2, 4]),
    st.integers(1, 5), st.sampled_from(["global", "local"]),
)  # fmt: skip
def test_any_plan_is_within_target_rounding_and_floors(
    seed: int, keep: float, target: str, round_to: int, min_channels: int, scope: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.size, generator=generator) for g in RESIDUAL.groups if g.prunable}
    try:
        plan = slim.make_plan(
            RESIDUAL,
            scores,
            **{target: keep},
            round_to=round_to,
            min_channels=min_channels,
            scope=scope,  # type: ignore[arg-type]
        )
    except slim.SlimError as error:
        assert "cannot be reached" in str(error)
        return
    whole = {"macs": RESIDUAL.macs, "params": RESIDUAL.params, "channels": 28}[target]
    left = {"macs": plan.macs[1], "params": plan.params[1], "channels": sum(len(g.keep) for g in plan.groups)}[target]
    assert left <= keep * whole
    for g in plan.groups:
        assert len(g.keep) == g.size or (len(g.keep) % round_to == 0 and len(g.keep) >= min(min_channels, g.size))
        lowest_kept = min(float(scores[g.name][k]) for k in g.keep)
        assert all(float(scores[g.name][k]) <= lowest_kept for k in g.removed)
