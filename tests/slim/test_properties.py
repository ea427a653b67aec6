"""What must hold for every network and every plan, on random small networks out of every operator that slim knows."""

from __future__ import annotations

import copy
import logging
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import slim
from tests.slim.random_networks import OPS, RECIPE_BYTES, Network, Recipe, Step, build, example_inputs, recipe_of

TOLERANCE = 1e-8
"""Of double precision, in which rounding hides nothing; slim promises 1e-4 in single."""
UNHURRIED = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Of gates that stay there is a warning each."""
    caplog.set_level(logging.ERROR, "slim")


@dataclass(frozen=True)
class Cut:
    """How a plan is drawn: ``keep`` from 0 (one channel of each group) to 1 (nearly everything)."""

    keep: float
    scope: str = "local"
    seed: int = 0
    override: bool = False


def cut_of(data: bytes) -> Cut:
    """The cut of four random bytes."""
    return Cut(data[0] / 255, ("local", "global", "isomorphic")[data[1] % 3], data[2], data[3] % 3 == 1)


# Out of one string of bytes: from several values Hypothesis would mix ever the same networks.
CASES = st.binary(min_size=RECIPE_BYTES + 4, max_size=RECIPE_BYTES + 4).map(
    lambda data: (recipe_of(data[:RECIPE_BYTES]), cut_of(data[RECIPE_BYTES:]))
)


def draw_plan(model: nn.Module, graph: slim.ChannelGraph, cut: Cut) -> slim.Plan | None:
    """A random plan; None where no channel can go."""
    free = [group for group in graph.groups if group.prunable]
    if not any(group.size > 1 for group in free):
        return None
    scores = slim.score(model, graph, "random", seed=cut.seed)
    options: dict[str, Any] = {"round_to": 1, "min_channels": 1, "scope": cut.scope}
    if cut.override:
        # A threshold is never out of reach, whatever the override does.
        chosen = free[cut.seed % len(free)].name
        return slim.make_plan(graph, scores, threshold=1 - cut.keep, overrides={chosen: 0.3}, **options)
    least, whole = sum(g.per_channel for g in free), sum(g.per_channel * g.size for g in free)
    keep = (least + (whole - least) * min(cut.keep, 0.9)) / whole
    if graph.shares()["prunable"] < 0.1:  # such a share of the channels could save nothing, which is refused
        return slim.make_plan(graph, scores, threshold=1 - cut.keep, **options)
    return slim.make_plan(graph, scores, channels=min(1.0, keep + 1e-9), **options)


# -- the properties -------------------------------------------------------------------------------------------------


def check(recipe: Recipe, cut: Cut) -> Counter[str]:
    """Every property of one network and one plan; what it could be tried on."""
    model = build(recipe)
    inputs, fresh = example_inputs(recipe, 1 + recipe.seed % 2, 0), example_inputs(recipe, 2, recipe.seed + 1)
    chance = random.Random(recipe.seed)
    for module in model.modules():
        module.training = chance.random() < 0.3
    before = snapshot(model)
    graph = slim.trace(model, inputs)
    plan = draw_plan(model, graph, cut)
    done = Counter(networks=1, cut=plan is not None and any(group.removed for group in plan.groups))
    if plan is None:
        assert_untouched(model, before)
        return done
    masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
    assert_untouched(model, before)
    assert_close(masked, pruned, fresh, "masked and pruned")
    check_cost(pruned, plan, inputs)
    check_json(recipe, pruned, plan)
    check_checkpoint(recipe, pruned, fresh)
    done += check_rounds(model, pruned, plan, cut, inputs, fresh)
    done += check_gates(model, graph, plan, ("group", "layer")[cut.seed % 2], inputs, fresh)
    return done


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that trace, mask and apply_plan must leave alone."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        repr(model),
        torch.get_rng_state().tolist(),
        random.getstate(),
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert_same_state(before[0], after[0], "the model")
    assert before[1:] == after[1:], "parameters' identity, training flags, attributes or random state changed"


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor], what: str) -> None:
    assert list(first) == list(second), f"{what}: other entries"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{what}: {name} differs"


def assert_close(first: nn.Module, second: nn.Module, inputs: Any, what: str) -> None:
    difference = slim.max_difference(first, second, inputs)
    assert difference <= TOLERANCE, f"{what}: differ by {difference}"


def check_cost(pruned: Network, plan: slim.Plan, inputs: tuple[Tensor, ...]) -> None:
    if any(name.endswith("matrix") and p.shape[1] == 1 for name, p in pruned.named_parameters()):
        return  # torch.einsum multiplies by a matrix of one column without a sum, which is no MAC
    cost = slim.cost(pruned, inputs)
    assert (cost.macs, cost.params) == (plan.macs[1], plan.params[1]), "the plan's cost is not the pruned model's"


def check_json(recipe: Recipe, pruned: Network, plan: slim.Plan) -> None:
    again = slim.Plan.from_json(plan.to_json())
    assert again == plan
    assert_same_state(pruned.state_dict(), slim.apply_plan(build(recipe), again).state_dict(), "a plan out of its JSON")


def check_checkpoint(recipe: Recipe, pruned: Network, fresh: tuple[Tensor, ...]) -> None:
    single = copy.deepcopy(pruned).float()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.pt"
        slim.save(single, path, {"recipe": recipe.plain()})
        loaded = slim.load(path, lambda found: build(Recipe.of(found["recipe"])).float())
    assert slim.max_difference(single, loaded, tuple(x.float() for x in fresh)) == 0.0, "saved and loaded differ"


def check_rounds(
    model: Network, pruned: Network, first: slim.Plan, cut: Cut, inputs: tuple[Tensor, ...], fresh: tuple[Tensor, ...]
) -> Counter[str]:
    """Two cuts in turn are the cut by the two plans' composition."""
    later = draw_plan(pruned, slim.trace(pruned, inputs), Cut(cut.keep, cut.scope, cut.seed + 1))
    if later is None:
        return Counter()
    twice = slim.apply_plan(pruned, later)
    assert_close(slim.mask(pruned, later), twice, fresh, "masked and pruned in the second round")
    if depthwise_layers(pruned) != depthwise_layers(model):
        # Cut to one channel for each group: the later plan may then cut groups apart that the first one's network ties.
        return Counter()
    once = slim.apply_plan(model, slim.compose(first, later))
    assert_same_state(twice.state_dict(), once.state_dict(), "two plans composed")
    assert repr(twice) == repr(once), "two plans composed: other attributes"
    return Counter(composed=1)


def depthwise_layers(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels
    ]


def check_gates(
    model: Network,
    graph: slim.ChannelGraph,
    plan: slim.Plan,
    tie: str,
    inputs: tuple[Tensor, ...],
    fresh: tuple[Tensor, ...],
) -> Counter[str]:
    gated = copy.deepcopy(model)
    try:
        gates = slim.add_gates(gated, graph, tie=tie)  # type: ignore[arg-type]
    except slim.SlimError as error:
        assert "no gate could be placed" in str(error)
        return Counter()
    if model.overwrites and slim.max_difference(model, gated, fresh) > TOLERANCE:
        return Counter()  # KNOWN: a gate behind an activation that works in place parts memory that others read
    assert_close(model, gated, fresh, f"gates of 1, tie={tie}")
    generator = torch.Generator().manual_seed(len(gates))
    with torch.no_grad():
        for vector in gates.values():
            vector.uniform_(0, 1.5, generator=generator)
            vector[torch.rand(vector.shape, generator=generator) < 0.2] = 0.0
    through = slim.trace(gated, inputs)
    assert [(g.name, g.size, g.prunable) for g in through.groups] == [
        (g.name, g.size, g.prunable) for g in graph.groups
    ]
    masked, pruned = slim.mask(gated, plan), slim.apply_plan(gated, plan)
    assert_close(masked, pruned, fresh, f"masked and pruned with gates, tie={tie}")
    folded = slim.fold_gates(pruned, inputs)
    assert_close(pruned, folded, fresh, f"pruned and folded, tie={tie}")
    return Counter(gated=1, folded=not slim.gate_vectors(folded))


# -- on what they are tried ----------------------------------------------------------------------------------------------


def try_many(most: settings) -> Counter[str]:
    """Draw networks and plans and check each; a failure shows the shortest recipe."""
    total: Counter[str] = Counter()

    @most
    @given(CASES)
    def every_property(case: tuple[Recipe, Cut]) -> None:
        total.update(check(*case))

    every_property()
    return total


def assert_told_something(total: Counter[str]) -> None:
    """Most networks really lose channels, and the further properties are tried on many."""
    shares = {what: total[what] / total["networks"] for what in ("cut", "composed", "gated", "folded")}
    least = {"cut": 0.6, "composed": 0.3, "gated": 0.5, "folded": 0.1}
    assert all(shares[what] >= share for what, share in least.items()), shares


@pytest.mark.slow
def test_random_networks() -> None:
    total = try_many(settings(UNHURRIED, max_examples=40, derandomize=True))
    assert total["networks"] >= 40
    assert_told_something(total)


@pytest.mark.zoo
def test_many_random_networks() -> None:
    total = try_many(settings(UNHURRIED, max_examples=500))
    assert total["networks"] >= 500
    assert_told_something(total)


@pytest.mark.parametrize("name", list(OPS))
def test_every_operator(name: str) -> None:
    """Between two convolutions, on a map and on a vector."""
    variant = 7 * list(OPS).index(name)
    around = Step("conv", width=8), Step("global pooling"), Step(name, other=1, width=6, variant=variant)
    recipe = Recipe(2, (3,), (*around, Step("conv", width=4)))
    check(recipe, Cut(0.4))


def test_recipes_hold_every_operator() -> None:
    drawn: Counter[Any] = Counter()

    @settings(UNHURRIED, max_examples=300, derandomize=True, phases=[Phase.generate])
    @given(CASES)
    def draw(case: tuple[Recipe, Cut]) -> None:
        recipe, _ = case
        drawn.update([("dims", recipe.dims), ("inputs", len(recipe.inputs)), ("steps", len(recipe.steps))])
        drawn.update({step.op for step in recipe.steps})
        assert Recipe.of(recipe.plain()) == recipe

    draw()
    few = [name for name in OPS if drawn[name] < 5]
    assert not few and all(drawn["dims", n] >= 30 for n in (1, 2, 3)) and drawn["inputs", 2] >= 30, (few, drawn)
    assert any(drawn["steps", n] for n in (8, 9, 10))


def test_outputs_depend_on_every_layer() -> None:
    """Otherwise a wrong cut would change nothing; what feeds no output at all is there on purpose."""
    seen: Counter[bool] = Counter()
    generator = torch.Generator().manual_seed(0)

    @settings(UNHURRIED, max_examples=60, derandomize=True, phases=[Phase.generate])
    @given(CASES)
    def disturb(case: tuple[Recipe, Cut]) -> None:
        recipe, _ = case
        model = build(recipe)
        fresh = example_inputs(recipe, 2, 1)
        for path, module in model.named_modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not is_parametrized(module):
                other = copy.deepcopy(model)
                with torch.no_grad():
                    weight = other.get_parameter(f"{path}.weight")
                    weight.add_(torch.randn(weight.shape, generator=generator), alpha=float(weight.std(correction=0)))
                seen[slim.max_difference(model, other, fresh) > 1e-3] += 1

    disturb()
    assert seen[True] >= 0.9 * seen.total(), seen


def test_a_wrong_cut_is_noticed() -> None:
    """Each weight that reads cut channels, turned by one channel, breaks pruned = masked."""
    steps = (
        Step("conv", width=6),
        Step("residual", width=5),
        Step("depthwise conv"),
        Step("concatenation", other=1),
        Step("linear on the last axis", width=5),
        Step("flatten", width=6),
    )
    recipe = Recipe(2, (3,), steps)
    model, fresh = build(recipe), example_inputs(recipe, 2, 1)
    plan = draw_plan(model, slim.trace(model, fresh), Cut(0.5))
    assert plan is not None
    readers = {(m.param, m.axis) for g in plan.groups if 1 < len(g.keep) < g.size for m in g.members if m.role == "in"}
    assert len(readers) >= 5
    assert_close(slim.mask(model, plan), slim.apply_plan(model, plan), fresh, "masked and pruned")
    for param, axis in readers:
        wrong = slim.apply_plan(model, plan)
        with torch.no_grad():
            weight = wrong.get_parameter(param)
            weight.copy_(weight.roll(1, axis))
        assert slim.max_difference(slim.mask(model, plan), wrong, fresh) > 1e-3, param
        with pytest.raises(AssertionError, match="masked and pruned"):
            assert_close(slim.mask(model, plan), wrong, fresh, "masked and pruned")
