"""Plans as data: JSON, what is refused, and how they print."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim
from slim.plan import to_runs
from tests.slim.networks import Chain, Residual, randomise

FINE = {"round_to": 1, "min_channels": 1}
SCORES = {"first.0": torch.tensor([0.9, 0.1, 0.8, 0.7]), "second.0": torch.tensor([0.5, 0.6, 0.2, 0.3, 0.05, 0.4])}
CHAIN = slim.trace(Chain(), torch.rand(1, 3, 8, 8))


def chain_plan(channels: float = 0.7) -> slim.Plan:
    scores = {name: values.double().round(decimals=2) for name, values in SCORES.items()}
    return slim.make_plan(CHAIN, scores, channels=channels, **FINE)  # type: ignore[arg-type]


def test_json_round_trip_applies_to_a_fresh_copy() -> None:
    model = randomise(Residual())
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    plan = slim.make_plan(graph, slim.score(model, graph, "l1"), macs=0.5, **FINE)  # type: ignore[arg-type]
    again = slim.Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    fresh = Residual()
    fresh.load_state_dict(model.state_dict())
    assert slim.max_difference(slim.apply_plan(model, plan), slim.apply_plan(fresh, again), torch.rand(1, 3, 8, 8)) == 0


def test_a_plan_records_the_shapes_that_it_touches_and_the_scores_at_the_edge() -> None:
    plan = chain_plan()
    assert plan.shapes == {name: shape for name, shape in CHAIN.shapes.items() if name != "head.bias"}
    assert plan.shapes["second.0.weight"] == (6, 4, 1, 1)
    edges = [(g.score_range, g.highest_removed, g.lowest_kept) for g in plan.groups]
    assert edges == [((0.1, 0.9), 0.1, 0.7), ((0.05, 0.6), 0.2, 0.3)]
    assert chain_plan(1.0).groups[0].highest_removed is None


MALFORMED: list[tuple[list[Any], Any, str]] = [
    (["version"], 1, r"version 1, which did not record .* make it again with prune\.py"),
    (["version"], 3, "its version is 3; this slim reads version 2"),
    (["version"], True, "its version is True"),
    (["version"], 2.0, "its version is 2.0"),
    (["macs"], 5, "the plan.macs is 5; expected a list"),
    (["macs"], [1, 2, 3], "macs is .*; expected 2 values"),
    (["macs"], [5, 6], r"macs is \[5, 6\]; expected at most as many after as before"),
    (["params"], [-5, -6], r"params\[0\] is -5; expected an integer of at least 0"),
    (["params"], [5.0, 4], r"params\[0\] is 5.0; expected an integer"),
    (["shapes"], [], r"shapes is \[\]; expected an object"),
    (["shapes", "first.0.weight"], [4, "3"], r"shapes\['first.0.weight'\]\[1\] is '3'; expected an integer"),
    (["groups"], {}, "groups is {}; expected a list"),
    (["groups", 0], None, r"groups\[0\] is None; expected an object"),
    (["groups", 0, "name"], "", r"groups\[0\].name is ''; expected a name"),
    (["groups", 1, "name"], "first.0", "names is .*; expected each name once"),
    (["groups", 0, "size"], 0, "group first.0: size is 0; expected 1 to"),
    (["groups", 0, "size"], True, "size is True"),
    (["groups", 0, "size"], 3, "group first.0: keep is .*; expected ascending channels below 3"),
    (["groups", 0, "size"], 5, "index of first.0.weight is .*; expected positions below 4, equally many for each of 5 channels"),
    (["groups", 0, "keep"], [], r"groups\[0\].keep is .*; expected runs of integers"),
    (["groups", 0, "keep"], [[0, 2], [1, 3]], "keep is .*; expected some integers, each once"),
    (["groups", 0, "keep"], [[2, 4], [0, 1]], "keep is .*; expected ascending"),
    (["groups", 0, "keep"], [[-1, 2]], r"keep\[0\]\[0\] is -1; expected an integer of at least 0"),
    (["groups", 0, "keep"], [[3, 10**12]], r"keep is \[\[3, 10{12}\]\]; expected runs of integers"),
    (["groups", 0, "keep"], [[2, 2]], r"keep is \[\[2, 2\]\]; expected runs of integers, \[first, last \+ 1\]"),
    (["groups", 0, "keep"], [3], r"keep\[0\] is 3; expected a list"),
    (["groups", 0, "keep"], [[1]], r"keep\[0\] is \[1\]; expected 2 values"),
    (["groups", 0, "members"], [], "members is .*; expected at least one"),
    (["groups", 0, "members", 0, "param"], 7, r"members\[0\].param is 7; expected a name"),
    (["groups", 0, "members", 0, "axis"], -1, r"members\[0\].axis is -1; expected an integer of at least 0"),
    (["groups", 0, "members", 0, "axis"], 4, "the axis of first.0.weight is 4; expected below 4"),
    (["groups", 0, "members", 0, "role"], "inn", "role is 'inn'; expected one of out, in, depthwise, scale, width"),
    (["groups", 0, "members", 0, "role"], [], "role is .*; expected one of"),
    (["groups", 0, "members", 0, "index"], [[0, 5]], "index of first.0.weight is .*; expected positions below 4"),
    (["groups", 0, "members", 0, "index"], [[0, 2], [0, 2]], "index is .*; expected some integers, each once"),
    (["groups", 0, "members", 0, "index"], [[0, 3]], "index of first.0.weight is .* equally many for each of 4 channels"),
    (["groups", 0, "score_range"], [1.0], "score_range is .*; expected 2 values"),
    (["groups", 0, "score_range"], [1.0, 0.5], "score_range is .*; expected the lowest and the highest"),
    (["groups", 0, "score_range"], ["a", "b"], r"score_range\[0\] is 'a'; expected a number"),
    (["groups", 0, "lowest_kept"], float("nan"), "lowest_kept is nan; expected a number"),
    (["groups", 0, "extra"], 1, r"groups\[0\] is an object with the unknown extra; expected name, size"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED)
def test_a_spoilt_plan_is_refused_by_what_and_where(path: list[Any], value: Any, message: str) -> None:
    plain = json.loads(chain_plan().to_json())
    place = plain
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(slim.SlimError, match=message):
        slim.Plan.from_json(json.dumps(plain))


def test_a_small_file_cannot_ask_for_much_memory() -> None:
    plain = json.loads(chain_plan().to_json())
    plain["shapes"]["first.0.weight"] = [10**9] * 4
    plain["groups"][0]["members"][0]["index"] = [[n << 22, n + 1 << 22] for n in range(100)]
    with pytest.raises(slim.SlimError, match=r"lists 4194304.. channels and positions, expected at most 4194304"):
        slim.Plan.from_json(json.dumps(plain))
    plain["groups"][0]["members"][0]["index"] = [[0, 3], [10**9 - 1, 10**9]]
    with pytest.raises(slim.SlimError, match=r"index of first.0.weight is .*expected positions below 4194304"):
        slim.Plan.from_json(json.dumps(plain))


def test_one_position_belongs_to_one_channel_of_one_group() -> None:
    plain = json.loads(chain_plan().to_json())
    plain["groups"][1]["members"].append({"param": "first.1.weight", "axis": 0, "role": "in", "index": [[2, 3]]})
    plain["groups"][1].update(size=1, keep=[[0, 1]])
    for member in plain["groups"][1]["members"][:-1]:
        member["index"] = [[0, 1]]
    with pytest.raises(
        slim.SlimError, match=r"position 2 of first.1.weight .* channel 2 of group first.0 and to channel 0"
    ):
        slim.Plan.from_json(json.dumps(plain))
    plain = json.loads(chain_plan().to_json())
    twin = dict(plain["groups"][0]["members"][0], role="in", index=[[1, 4], [0, 1]])
    plain["groups"][0]["members"].append(twin)
    with pytest.raises(
        slim.SlimError, match=r"position 1 of first\.0\.weight .* channel 1 of group first.0 and to channel 0"
    ):
        slim.Plan.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", "[" * 10**5, '{"version": 2}', "9" * 5000])
def test_what_is_no_plan_is_refused(text: str) -> None:  # fmt: skip
    with pytest.raises(slim.SlimError, match="not a plan"):
        slim.Plan.from_json(text)


def test_a_field_that_stands_twice_is_refused() -> None:
    text = chain_plan().to_json().replace('"size": 4,', '"size": 4, "size": 4,')
    with pytest.raises(slim.SlimError, match="'size' stands twice"):
        slim.Plan.from_json(text)


def test_a_truncated_plan_is_refused() -> None:
    text = chain_plan().to_json()
    for end in range(0, len(text), 7):
        with pytest.raises(slim.SlimError, match="not a plan"):
            slim.Plan.from_json(text[:end])


def leaves(plain: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree of dicts and lists."""
    steps = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return [path] * bool(path) + [leaf for step, value in steps for leaf in leaves(value, (*path, step))]


LEAVES = leaves(json.loads(chain_plan().to_json()))


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(LEAVES), st.booleans(),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(-2, 9), max_size=2),
)  # fmt: skip
def test_any_spoilt_value_is_refused_or_makes_a_sound_plan(path: tuple[Any, ...], delete: bool, value: Any) -> None:
    plain = json.loads(chain_plan().to_json())
    place = plain
    for step in path[:-1]:
        place = place[step]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    try:
        plan = slim.Plan.from_json(json.dumps(plain))
    except slim.SlimError as error:
        assert str(error)
        return
    assert slim.Plan.from_json(plan.to_json()) == plan
    assert slim.compare(plan, plan).count("\n") == str(plan).count("\n") + 1


@given(st.lists(st.integers(0, 60), max_size=40))
def test_runs_hold_any_list_of_indices(numbers: list[int]) -> None:
    runs = to_runs(numbers)
    assert [n for first, end in runs for n in range(first, end)] == numbers
    assert all(one[1] != two[0] for one, two in pairwise(runs))


def test_table_shows_widths_shares_and_scores() -> None:
    assert str(chain_plan()).splitlines() == [
        "group     before  after   kept  scores                highest out    lowest in",
        "first.0        4      3  75.0%  0.1 .. 0.9                    0.1          0.7",
        "second.0       6      4  66.7%  0.05 .. 0.6                   0.2          0.3",
        "MACs 0.0 M -> 0.0 M (70.1%), parameters 0.000 M -> 0.000 M (70.5%), channels 10 -> 7 (70.0%)",
    ]


def test_chart_draws_before_and_after_to_one_scale() -> None:
    assert slim.chart(chain_plan(), width=12).splitlines() == [
        "first.0   ██████░░          4 ->     3   75.0%",
        "second.0  ████████░░░░      6 ->     4   66.7%",
    ]
    with pytest.raises(slim.SlimError, match="width=0"):
        slim.chart(chain_plan(), width=0)


def test_comparison_shows_what_both_keep() -> None:
    plan, other = chain_plan(), chain_plan(0.5)
    alone = replace(other, groups=other.groups[1:])
    assert slim.compare(plan, other).splitlines() == [
        "group     before  first  second  both  overlap",
        "first.0        4      3       3     3    1.000",
        "second.0       6      4       2     2    0.500",
        "MACs 0.0 M -> 0.0 M (70.1%) and 0.0 M (63.2%)",
        "parameters 0.000 M -> 0.000 M (70.5%) and 0.000 M (62.0%)",
    ]
    assert slim.compare(plan, alone).splitlines()[1] == "first.0        4      3       -  only in the first"
    assert slim.compare(alone, plan).splitlines()[2] == "first.0        4      -       3  only in the second"


def test_plans_of_different_networks_do_not_compare() -> None:
    plan = chain_plan()
    wider = replace(plan, shapes={**plan.shapes, "second.0.weight": (6, 5, 1, 1)})
    moved = replace(plan.groups[0], members=plan.groups[0].members[1:])
    for other, message in (
        (wider, r"second.0.weight has shape \(6, 4, 1, 1\) in the first, \(6, 5, 1, 1\) in the second"),
        (replace(plan, params=(9, 3)), "of 166 and 9 parameters"),
        (replace(plan, groups=(moved, plan.groups[1])), "group first.0 of 4 channels and of 4 does not occupy"),
    ):
        with pytest.raises(slim.SlimError, match=message):
            slim.compare(plan, other)
