"""What slim cannot follow it freezes and reports; what would break it refuses; what it is given it leaves as it was."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import slim
from slim import dry_run, ops, rules
from slim.plan import GroupPlan
from tests.slim.networks import Residual, conv, prove, randomise
from tests.slim.test_operators import Forward, Net, X, head, prunable


@torch.library.custom_op("slimtest::ripple", mutates_args=())
def ripple(x: Tensor) -> Tensor:
    """Acts on every element alone."""
    return torch.sin(x) + x


@torch.library.custom_op("slimtest::mirror", mutates_args=())
def mirror(x: Tensor) -> Tensor:
    """Reverses the channels."""
    return x.flip(1)


@pytest.fixture
def no_rules() -> Iterator[None]:
    """Rules that a test registers are gone after it."""
    kinds, registered = dict(ops.KINDS), dict(rules.REGISTERED)
    yield
    ops.KINDS.clear(), ops.KINDS.update(kinds)
    rules.REGISTERED.clear(), rules.REGISTERED.update(registered)


def through(op: Any) -> Net:
    """a -> op -> b, beside a -> c."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(m.b(op(m.a(x))) + m.c(x)), a=conv(3, 6), b=conv(6, 4), c=conv(3, 4), head=head(4))
    return randomise(model)  # type: ignore[return-value]


def test_unknown_op_freezes_what_it_touches_and_the_report_says_so() -> None:
    graph = slim.trace(through(torch.ops.slimtest.ripple), X)
    assert prunable(graph) == {"b.0": (4, 1)}
    assert graph.by_name["a.0"].frozen_reason == "slimtest::ripple in the model has no channel rule"
    assert graph.freezing_ops[0].op == "slimtest::ripple" and graph.freezing_ops[0].groups == ("a.0",)
    share = graph.macs_share([graph.by_name["a.0"]])
    assert f"slimtest::ripple in the model has no channel rule: froze {share:.1%} of the MACs (a.0)" in graph.report()
    assert 0.2 < share < 0.4
    prove(through(torch.ops.slimtest.ripple), X)


def test_unknown_op_names_the_module_that_calls_it() -> None:
    class Rippling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.slimtest.ripple(x)
            return out

    model = nn.Sequential(conv(3, 6), nn.Sequential(Rippling()), head(6))
    assert slim.trace(model, X).by_name["0.0"].frozen_reason == "slimtest::ripple in 1.0 has no channel rule"


def test_registered_kind_frees_the_channels(no_rules: None) -> None:
    slim.register_rule("slimtest::ripple", "elementwise")
    model = through(torch.ops.slimtest.ripple)
    assert prunable(slim.trace(model, X)) == {"a.0": (6, 1), "b.0": (4, 1)}
    _, plan = prove(model, X)
    assert len(plan.groups) == 2


def test_registered_function_is_followed(no_rules: None) -> None:
    def reverse(run: slim.ChannelPropagation, call: slim.Call) -> None:
        labels = run.get(call.inputs[0])
        run.put(call.outputs[0], None if labels is None else labels.flip(1))

    model = through(torch.ops.slimtest.mirror)
    assert "a.0" not in prunable(slim.trace(model, X))
    slim.register_rule(torch.ops.slimtest.mirror, reverse)
    graph, _ = prove(model, X)
    assert prunable(graph)["a.0"] == (6, 1)
    assert [m.index for m in graph.by_name["a.0"].members if m.param == "b.0.weight"] == [(5, 4, 3, 2, 1, 0)]


def test_wrong_registered_rule_is_caught_by_the_dry_run(no_rules: None) -> None:
    slim.register_rule(torch.ops.slimtest.mirror, lambda run, call: run.put(call.outputs[0], run.get(call.inputs[0])))
    model = through(torch.ops.slimtest.mirror)
    masked_wrongly = slim.trace(model, X)
    # Labels alone cannot show it; the proof on numbers does.
    assert "a.0" in prunable(masked_wrongly)
    with pytest.raises(AssertionError, match="differs from masked"):
        prove(model, X)


def test_rule_that_fails_is_named(no_rules: None) -> None:
    slim.register_rule("slimtest::mirror", lambda run, call: run.put(call.outputs[0], run.get(call.inputs[1])))
    with pytest.raises(
        slim.SlimError, match=r"the channel rule of slimtest::mirror failed in the model's own forward: IndexError"
    ):
        slim.trace(through(torch.ops.slimtest.mirror), X)


def test_unknown_kind_of_rule_is_refused() -> None:
    with pytest.raises(slim.SlimError, match=r"'elementwize'; expected one of .*elementwise"):
        slim.register_rule("slimtest::ripple", "elementwize")


def by_group_norm(m: Net, x: Tensor) -> Tensor:
    return F.group_norm(m.a(x), 4)


def by_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return y if y.shape[1] == 8 else y.flip(1)


CONSTANTS: dict[str, Forward] = {
    "view": lambda m, x: m.a(x).view(-1, 2, 4, 8, 8).sum(1).repeat(1, 2, 1, 1),
    "view that always fits": lambda m, x: m.a(x).reshape(x.shape[0], 8, -1).unflatten(2, (-1, 8)),
    "views that fit": lambda m, x: F.avg_pool1d(m.a(x).view(len(x), 8, -1), 3, 1, 1).view(len(x), -1, 8, 8),
    "slice": lambda m, x: torch.cat([m.a(x)[:, 4:], m.a(x)[:, :4]], 1),
    "split into parts of a size": lambda m, x: torch.cat(m.a(x).split(4, 1)[::-1], 1),
    "split into given sizes": lambda m, x: torch.cat(m.a(x).split([3, 5], 1)[::-1], 1),
    "index": lambda m, x: m.a(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]],
    "roll": lambda m, x: m.a(x).roll(3, 1),
    "one channel": lambda m, x: m.a(x) * m.a(x)[:, 5:6],
    "groups of a functional norm": by_group_norm,
    "branch on the width": by_width,
    "assertion": lambda m, x: m.check(m.a(x)),
    "a part treated alone": lambda m, x: torch.cat([m.a(x)[:, :3].relu(), m.a(x)[:, 3:]], 1),
    "a part written in place": lambda m, x: doubled(m.a(x)),
    "the count as a number": lambda m, x: (lambda y: y / y.shape[1] ** 0.5)(m.a(x)),
    "the count as a lone tensor": lambda m, x: (lambda y: y / torch.tensor(float(y.shape[1])))(m.a(x)),
    "unequal parts by the count": lambda m, x: torch.cat([m.a(x)[:, 1::2], m.a(x)[:, ::2]], 1),
}


def doubled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :3] *= 2
    return x


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8, "expected 8 channels"
        return x


@pytest.mark.parametrize("name", CONSTANTS)
def test_channel_counts_held_as_constants_are_found_frozen_and_reported(name: str) -> None:
    torch.manual_seed(0)
    constant = CONSTANTS[name]
    model = Net(
        lambda m, x: m.head(m.last(constant(m, x) + 0 * m.other(x).mean((1, 2, 3), keepdim=True))),
        a=conv(3, 8),
        check=Checked(),
        other=conv(3, 4),
        last=conv(8, 6),
        head=head(6),
    )
    randomise(model)
    graph = slim.trace(model, X)
    frozen = {g.name: g.frozen_reason or "" for g in graph.groups if not g.prunable}
    said = [why for key, why in frozen.items() if key.startswith("a.0")]
    assert any("after a cut" in why or "constant" in why or "count as a number" in why for why in said), said
    assert "last.0" in prunable(graph), "what has nothing to do with the constant stays prunable"
    assert any(why in graph.report() for why in frozen.values())
    prove(model, X)
    # Without the dry run the same channels would be offered for cutting.
    assert any(key.startswith("a.0") for key in prunable(slim.trace(model, X, dry_run=False)))


def test_flattening_a_pooled_map_takes_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps channels in order, so one cut tells as much as any other and no labels are followed again."""
    trials, attempt = [], dry_run.DryRun.attempt_with
    monkeypatch.setattr(dry_run.DryRun, "attempt_with", lambda *a, **k: trials.append(k) or attempt(*a, **k))
    model = Net(lambda m, x: m.head(m.a(x).mean((2, 3), keepdim=True).flatten(1)), a=conv(3, 8), head=nn.Linear(8, 4))
    assert prunable(slim.trace(randomise(model), X)) == {"a.0": (8, 1)}
    assert trials == [{"muted": True}]


@pytest.mark.parametrize("width", range(3, 13))
@pytest.mark.parametrize("by", [1, 2, 3, -1, -2])
def test_channels_that_are_rolled_by_a_constant_stay(width: int, by: int) -> None:
    """Which of them a cut keeps decides whether the roll still brings each to its reader."""
    model = Net(lambda m, x: m.head(m.a(x).roll(by, 1)), a=nn.Conv2d(3, width, 1), head=nn.Conv2d(width, 2, 1))
    assert not prunable(slim.trace(model, X))


@pytest.mark.parametrize("behind", ["output", "channels"])
def test_what_the_data_choose_behind_the_head_is_no_channel_count(behind: str) -> None:
    """A narrow network finds no box where the whole one does; that freezes only what is met behind the choice."""

    def forward(m: Net, x: Tensor) -> Tensor:
        maps = m.a(x)
        boxes = m.head(maps)
        if len((boxes > 6.5).nonzero()):
            return boxes.exp() if behind == "output" else m.head(maps.exp())
        return boxes.sin() if behind == "output" else m.head(maps.sin())

    model = Net(forward, a=nn.Conv2d(3, 8, 1, bias=False), head=nn.Conv2d(8, 2, 1, bias=False))
    with torch.no_grad():
        model.a.weight.fill_(1 / 3)
        model.head.weight.fill_(1.0)
    graph = slim.trace(model, torch.ones(1, 3, 4, 4))
    assert list(prunable(graph)) == (["a"] if behind == "output" else []), graph.report()


def test_a_number_that_is_not_filled_yet_is_no_channel_count() -> None:
    """As torch.empty leaves it: whatever was in memory, another one at each run."""
    garbage = itertools.count()

    def filled(m: Net, x: Tensor) -> Tensor:
        factor = torch.tensor(float(next(garbage)))
        factor.detach().fill_(2.0)
        return m.head(m.a(x) * factor)

    graph = slim.trace(Net(filled, a=conv(3, 8), head=nn.Conv2d(8, 2, 1)), X)
    assert list(prunable(graph)) == ["a.0"], graph.report()


def test_reused_module_keeps_its_input_and_output_alike() -> None:
    torch.manual_seed(0)
    shared = conv(6, 6, 3)
    model = Net(lambda m, x: m.head(m.twice(m.twice(m.a(x)))), a=conv(3, 6), twice=shared, head=head(6))
    graph, plan = prove(randomise(model), X)
    assert prunable(graph) == {"a.0": (6, 1)}
    assert len(plan.groups[0].keep) == 3


def test_module_that_is_reused_on_foreign_channels_is_frozen() -> None:
    model = Net(lambda m, x: m.head(m.b(x) + m.b(m.a(x))), a=conv(3, 3), b=conv(3, 6), head=head(6))
    graph = slim.trace(randomise(model), X)
    assert prunable(graph) == {"b.0": (6, 1)}
    assert "also used on channels that are not ours" in (graph.by_name["a.0"].frozen_reason or "")


def test_shared_parameter_stays_shared() -> None:
    model = Net(lambda m, x: m.head(m.a(x) + m.b(x)), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), head=head(6))
    model.b.weight = model.a.weight
    _, plan = prove(model, X)
    pruned = slim.apply_plan(model, plan)
    assert pruned.b.weight is pruned.a.weight and pruned.a.weight.shape[0] == 3


def test_write_into_a_part_of_a_tensor_freezes_what_is_written() -> None:
    def fill(m: Net, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 8, 8, 8)
        out[:, :6] = m.a(x)
        return m.head(out)  # type: ignore[no-any-return]

    graph = slim.trace(Net(fill, a=conv(3, 6), head=head(8)), X)
    assert "writes it in place into a part" in (graph.by_name["a.0"].frozen_reason or "")


def test_indices_that_depend_on_the_image_freeze() -> None:
    def pick(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y[:, x.sum((0, 2, 3)).argsort()])  # type: ignore[no-any-return]

    graph = slim.trace(Net(pick, a=conv(3, 3), head=head(3)), X)
    assert "indices that depend on the image" in (graph.by_name["a.0"].frozen_reason or "")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.mlp = conv(3, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        out: Tensor = self.mlp(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return out


def test_attention_is_frozen_with_the_reason() -> None:
    graph = slim.trace(Attention(), X)
    assert prunable(graph) == {}
    assert "multiplies activations with each other (attention)" in (graph.by_name["stem.0"].frozen_reason or "")


class SelfAttention(nn.Module):
    """Its heads' channels stay, so that what it reshapes has no labels; how wide to make it, its input says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, high, wide = x.shape
        q, k, v = self.qkv(x.flatten(2).mT).reshape(batch, high * wide, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, high * wide, width)
        return x + self.last(mixed).mT.unflatten(2, (high, wide))


def test_a_failure_is_looked_for_among_what_the_module_that_failed_has_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not among all groups of the network, half by half."""
    cuts: list[Any] = []
    narrow_twin = dry_run.narrow_twin
    monkeypatch.setattr(dry_run, "narrow_twin", lambda *given: cuts.append(given) or narrow_twin(*given))
    layers = [conv(3, 8)] + [layer for _ in range(20) for layer in (conv(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, SelfAttention(8), conv(8, 8), nn.ReLU(), conv(8, 2))
    graph = slim.trace(model, torch.rand(1, 3, 4, 4))
    frozen = [group.name for group in graph.groups if group.frozen_reason not in (None, "a model output")]
    assert frozen == ["39.0", "41.qkv"]
    assert len(cuts) <= 6
    prove(model, torch.rand(2, 3, 4, 4))


def test_several_inputs_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 6), conv(1, 6), head(6)

        def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
            return {"out": self.head(self.a(image) + self.b(depth))}

    model = randomise(Two())
    inputs = (X, torch.rand(2, 1, 8, 8))
    for given in (inputs, list(inputs), {"image": inputs[0], "depth": inputs[1]}):
        graph, _ = prove(model, given)
        assert prunable(graph) == {"a.0": (6, 1)}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_traced_and_cut(kind: torch.dtype) -> None:
    model = randomise(Residual()).to(kind)
    _, plan = prove(model, torch.rand(1, 3, 8, 8, dtype=kind), tolerance=1e-2 if kind != torch.float64 else 1e-12)
    assert all(p.dtype is kind for p in slim.apply_plan(model, plan).parameters())


def test_models_without_gradients_are_cut_alike() -> None:
    free, bound = randomise(Residual()), randomise(Residual()).requires_grad_(False)
    bound.load_state_dict(free.state_dict())
    x = torch.rand(1, 3, 8, 8)
    plans = [prove(model, x)[1] for model in (free, bound)]
    assert plans[0] == plans[1]
    assert not any(p.requires_grad for p in slim.apply_plan(bound, plans[1]).parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_a_gpu_are_cut_alike() -> None:
    model, x = randomise(Residual()), torch.rand(1, 3, 8, 8)
    _, plan = prove(model, x)
    _, again = prove(model.cuda(), x.cuda())
    assert plan == again
    assert next(slim.apply_plan(model, plan).parameters()).is_cuda


class Remembering(nn.Module):
    """Writes to itself whenever it runs, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 6), head(6)
        self.register_buffer("calls", torch.zeros(()))
        self.shapes: list[Any] = []
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        self.shapes.append(x.shape)
        self.cache = self.a(x) * random.random()
        out: Tensor = self.head(F.dropout(self.cache, 0.5, training=True))
        return out


def test_tracing_undoes_what_the_forward_writes() -> None:
    model = Remembering().train()
    model.a.eval()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    flags = [m.training for m in model.modules()]
    graph = slim.trace(model, X)
    assert prunable(graph) == {"a.0": (6, 1)}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.shapes == [] and model.cache is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_failing_forward_is_one_clear_error_and_leaves_the_model() -> None:
    model = Residual().train()
    with pytest.raises(
        slim.SlimError, match=r"does not run on the example inputs: RuntimeError in stem\.0: .*channels"
    ):
        slim.trace(model, torch.rand(1, 4, 8, 8))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(slim.SlimError, match="example_inputs is str"):
        slim.trace(model, "image")
    with pytest.raises(slim.SlimError, match=r"0\.weight has no shape yet.*run the model once"):
        slim.trace(nn.Sequential(nn.LazyConv2d(4, 1)), X)


def test_layers_that_did_not_run_are_reported() -> None:
    model = Net(
        lambda m, x: (m.head(m.a(x)), m.aux(m.a(x))) if m.training else m.head(m.a(x)),
        a=conv(3, 6),
        aux=head(6),
        head=head(6),
    )
    graph = slim.trace(model, X)
    assert graph.unused == ("aux",)
    assert "do not fit what is cut before them: aux" in graph.report()
    assert slim.trace(Residual(), X).unused == ()


def normed(channels: int = 8) -> Net:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(m.norm(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=nn.Conv2d(3, channels, 1),
        norm=nn.LayerNorm(channels),
        head=head(channels),
    )
    return randomise(model)  # type: ignore[return-value]


def test_layer_norm_freezes_unless_inexact_cuts_are_allowed() -> None:
    model = normed()
    exact = slim.trace(model, X)
    assert prunable(exact) == {}
    assert "native_layer_norm in norm mixes channels" in (exact.by_name["a"].frozen_reason or "")
    graph = slim.trace(model, X, allow_inexact=True)
    assert prunable(graph) == {"a": (8, 1)}
    assert graph.by_name["a"].inexact == "native_layer_norm in norm mixes channels"
    assert "inexact: native_layer_norm in norm mixes channels" in graph.report()
    plan = slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)
    pruned = slim.apply_plan(model, plan)
    assert pruned.norm.normalized_shape == (4,) and pruned(X).shape == (2, 3, 8, 8)


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed from its parameter each time."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_the_report_tells_of_all_macs() -> None:
    """Channels that can be cut, frozen ones, outputs: they sum to 1, and layers without a group are told of."""
    model = Net(
        lambda m, x: m.head(m.c(m.b(m.a(x)))), a=conv(3, 6), b=Standardised(6, 8, 3), c=conv(8, 4), head=head(4)
    )
    graph = slim.trace(randomise(model), X)
    shares = graph.shares()
    macs = {row.path: row.macs for row in graph.layers}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert shares["prunable"] == pytest.approx(macs["c.0"] / graph.macs)
    assert shares["frozen"] == pytest.approx((macs["a.0"] + macs["b"]) / graph.macs)
    report = graph.report()
    assert (
        f"a weight that is computed as the network runs: froze {macs['b'] / graph.macs:.1%} of the MACs (b)" in report
    )
    assert (
        f"of the MACs {shares['prunable']:.1%} make channels that can be cut, {shares['frozen']:.1%} frozen ones"
        in report
    )


def test_a_target_in_channels_that_saves_nothing_is_refused() -> None:
    model = Net(
        lambda m, x: m.head(m.b(m.b(m.a(x)))),
        a=nn.Conv2d(3, 64, 1),
        b=Standardised(64, 64, 3, padding=1),
        head=head(64),
    )
    model.a = nn.Sequential(conv(3, 4), nn.Conv2d(4, 64, 1))
    graph = slim.trace(randomise(model), X)
    with pytest.raises(
        slim.SlimError, match=r"channels=0.5 would leave 99.\d% of the MACs: the channels that can be cut make 0.\d% of"
    ):
        slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)


def test_a_target_in_channels_that_takes_cheap_ones_is_carried_out() -> None:
    """Nearly the whole network can be cut; that the lowest scores are of a layer without much work is no error."""
    x = torch.rand(1, 3, 32, 32)
    heads = nn.Sequential(nn.Conv2d(32, 60, 1), nn.Conv2d(60, 5, 1))
    model = Net(lambda m, x: m.heads(m.a(x).mean((2, 3), keepdim=True)), a=conv(3, 32), heads=heads)
    graph = slim.trace(randomise(model), x)
    scores = {g.name: torch.rand(g.size) + (g.name == "a.0") for g in graph.groups if g.prunable}
    plan = slim.make_plan(graph, scores, channels=0.9, round_to=1, min_channels=1)
    assert plan.macs[1] > 0.99 * plan.macs[0] and graph.shares()["prunable"] > 0.9
    assert slim.max_difference(slim.mask(model, plan), slim.apply_plan(model, plan), x) < 1e-5


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("einsum", [False, True])
def test_what_torch_computes_otherwise_for_one_channel_is_the_same(einsum: bool, width: int) -> None:
    """Of one channel the transposed map is contiguous, so a Linear adds its bias within the product; einsum sums nothing."""

    def forward(m: Net, x: Tensor) -> Tensor:
        rows = m.a(x).flatten(2).transpose(1, 2)
        return torch.einsum("bnc,oc->bno", rows, m.w) if einsum else m.fc(rows)  # type: ignore[no-any-return]

    last: dict[str, Any] = {"w": nn.Parameter(torch.rand(5, 4))} if einsum else {"fc": nn.Linear(4, 5)}
    _, plan = prove(randomise(Net(forward, a=conv(3, 4), **last)), X, width / 4)
    assert [len(group.keep) for group in plan.groups] == [width]


def by_hand(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def test_a_layer_norm_that_is_written_by_hand_is_inexact_too() -> None:
    model = randomise(
        Net(
            lambda m, x: m.head(by_hand(m.a(x)) * m.scale),
            a=conv(3, 6),
            head=head(6),
            scale=nn.Parameter(torch.rand(6, 1, 1)),
        )
    )
    (group,) = (g for g in slim.trace(model, X).groups if g.name == "a.0")
    assert group.frozen_reason == "mean in the model mixes channels, so no cut is exact"
    inexact = slim.trace(model, X, allow_inexact=True)
    assert prunable(inexact) == {"a.0": (6, 1)} and "inexact: mean in the model mixes channels" in inexact.report()
    plan = slim.make_plan(inexact, slim.score(model, inexact, "l1"), channels=0.5, round_to=1, min_channels=1)
    assert slim.cost(slim.apply_plan(model, plan), X).macs == plan.macs[1] < plan.macs[0]


@pytest.mark.parametrize(
    ("normed", "what"), [(spectral_norm, "computes the weight of b"), (weight_norm, "weight norm in b mixes them")]
)
def test_what_a_parametrisation_mixes_stays_until_it_is_removed(normed: Any, what: str) -> None:
    model = Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 6), b=normed(nn.Conv2d(6, 4, 1)), head=head(4))
    reason = slim.trace(randomise(model), X).by_name["a.0"].frozen_reason or ""
    assert what in reason and "call torch.nn.utils.parametrize.remove_parametrizations first" in reason
    remove_parametrizations(model.b, "weight")  # type: ignore[arg-type]
    graph, _ = prove(model, X)
    assert prunable(graph) == {"a.0": (6, 1), "b": (4, 1)}


def test_norms_without_parameters_are_saved_and_loaded(tmp_path: Any) -> None:
    def build(_: Any) -> nn.Module:
        torch.manual_seed(0)
        return Net(
            lambda m, x: m.head(m.n(m.b(m.g(m.a(x))))),
            a=nn.Conv2d(3, 12, 1),
            g=nn.GroupNorm(4, 12, affine=False),
            b=nn.Conv2d(12, 6, 1),
            n=nn.InstanceNorm2d(6),
            head=head(6),
        )

    model = build(None)
    _, plan = prove(model, X)
    pruned = slim.apply_plan(model, plan)
    assert (pruned.g.num_groups, pruned.g.num_channels, pruned.n.num_features) == (2, 6, 3)
    slim.save(pruned, tmp_path / "m.pt", {})
    loaded = slim.load(tmp_path / "m.pt", build)
    assert torch.equal(loaded.eval()(X), pruned.eval()(X))


def chained() -> Net:
    model = Net(
        lambda m, x: m.head(m.g(m.c(m.b(m.n(m.a(x)))))),
        a=nn.Conv2d(3, 6, 1),
        n=nn.BatchNorm2d(6),
        b=nn.Conv2d(6, 8, 1),
        c=nn.Conv2d(8, 12, 1, groups=2),
        g=nn.GroupNorm(4, 12),
        head=head(12),
    )
    return randomise(model)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("a.bias", r"break a: its bias has 6 entries for 3"),
        ("n.running_var", r"break n: its vectors have 3 and 6"),
        ("g.num_groups", r"break g: 6 channels do not divide into 4 groups"),
        ("b.weight", "break b: "),
        ("head.weight", "break head: "),
    ],
)
def test_plan_that_would_break_a_layer_is_refused_with_its_name(missing: str, message: str) -> None:
    model = chained()
    _, plan = prove(model, X)
    # b.weight stays a producer; what is missing is that it reads a's channels.
    groups = tuple(
        replace(
            g, members=tuple(m for m in g.members if m.param != missing or (missing == "b.weight" and m.role == "out"))
        )
        for g in plan.groups
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(slim.SlimError, match=message):
        slim.apply_plan(model, replace(plan, groups=groups))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plan_by_hand_for_one_term_of_a_sum_is_refused() -> None:
    model = Net(lambda m, x: m.head(m.a(x) + m.b(x)), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), head=head(6))
    graph = slim.trace(model, X)
    members = tuple(m for m in graph.by_name["a"].members if not m.param.startswith("b."))
    half = GroupPlan("a", 6, (0, 1, 2), members)
    plan = slim.Plan((half,), (graph.macs, graph.macs), (graph.params, graph.params), {}, graph.example)
    with pytest.raises(slim.SlimError, match=r"break the model's own forward: .*6"):
        slim.apply_plan(model, plan)


def residual_plan() -> tuple[nn.Module, slim.Plan]:
    model = randomise(Residual())
    graph = slim.trace(model, X)
    return model, slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)


SOUND = residual_plan()[1]


@pytest.mark.parametrize(
    ("number", "member"), [(n, k) for n, g in enumerate(SOUND.groups) for k in range(len(g.members))]
)
@pytest.mark.parametrize("change", ["positions", "role"])
def test_a_member_changed_by_hand_is_refused(number: int, member: int, change: str) -> None:
    """One member alone removes a channel that all others keep, or does so in another role."""
    model, plan = residual_plan()
    plain = json.loads(plan.to_json())
    group, found = plain["groups"][number], plain["groups"][number]["members"][member]
    if change == "positions":
        index = list(plan.groups[number].members[member].index)
        each = len(index) // group["size"]
        kept, gone = plan.groups[number].keep[0] * each, plan.groups[number].removed[0] * each
        index[kept], index[gone] = index[gone], index[kept]
        found["index"] = [[position, position + 1] for position in index]
    else:
        found["role"] = "scale" if found["role"] == "in" else "in"
    changed = slim.Plan.from_json(json.dumps(plain))
    for act in (slim.mask, slim.apply_plan):
        with pytest.raises(slim.SlimError, match=r"the plan (does not fit|would break)"):
            act(model, changed)
    assert slim.prove(slim.mask(model, plan), slim.apply_plan(model, slim.Plan.from_json(plan.to_json())), X)


def test_a_group_without_one_of_its_members_is_refused() -> None:
    """All that is left of it is consistent, and the bias of a norm is no longer cut."""
    model, plan = residual_plan()
    for number, group in enumerate(plan.groups):
        for m in group.members:
            if m.role != "width":
                less = replace(group, members=tuple(other for other in group.members if other is not m))
                groups = (*plan.groups[:number], less, *plan.groups[number + 1 :])
                with pytest.raises(slim.SlimError, match=r"the plan (does not fit|would break)"):
                    slim.apply_plan(model, replace(plan, groups=groups))


def test_channels_that_are_kept_may_be_chosen_by_hand() -> None:
    model, plan = residual_plan()
    groups = tuple(replace(g, keep=tuple(range(1, g.size, 2))) for g in plan.groups)
    by_hand = replace(plan, groups=groups)
    assert not by_hand.traced and slim.prove(slim.mask(model, by_hand), slim.apply_plan(model, by_hand), X)
    frozen = slim.trace(model, X).by_name["head"]
    head = GroupPlan("head", frozen.size, (0, 1), frozen.members)
    with pytest.raises(slim.SlimError, match=r"head.weight \(axis 0\), which a trace finds to be a model output"):
        slim.mask(model, replace(plan, groups=(head,)))


def test_gates_are_cut_in_the_order_of_the_trace() -> None:
    """A group whose channels are numbered otherwise would keep other gates than channels."""
    model, plan = residual_plan()
    slim.add_gates(model, slim.trace(model, X))
    group = next(g for g in plan.groups if g.name == "stem.0")
    turned = [replace(m, index=m.index[len(m.index) // 8 :] + m.index[: len(m.index) // 8]) for m in group.members]
    groups = [replace(group, members=tuple(turned))]
    with pytest.raises(slim.SlimError, match=r"channel \d of group stem.0 takes position .* of channel \d;"):
        slim.apply_plan(model, replace(plan, groups=tuple(groups)))


@pytest.mark.parametrize(
    ("few", "said"),
    [
        (lambda y: y * 2, "mul in the model in place of convolution in last"),
        (lambda y: y + 1.5, "add in the model in place of convolution in last"),
    ],
)
def test_a_plan_narrower_than_a_threshold_in_the_code_is_refused(few: Any, said: str) -> None:
    """The dry run tries halves; below them the code does something else."""
    model = Net(lambda m, x: m.last(few(y) if (y := m.a(x)).shape[1] <= 2 else y), a=conv(3, 8), last=head(8))
    randomise(model)
    graph, _ = prove(model, X)
    scores = slim.score(model, graph, "random")
    plan = slim.make_plan(graph, scores, channels=2, round_to=1, min_channels=1)
    with pytest.raises(slim.SlimError, match=f"would change what the network does: {said}.*keep more of them"):
        slim.apply_plan(model, plan)
    # Where no example tells the shapes, the proof does.
    pruned = slim.apply_plan(model, replace(plan, example=None))
    with pytest.raises(slim.SlimError, match=r"the networks differ by .*in float64"):
        slim.prove(slim.mask(model, plan), pruned, X)


def test_networks_that_read_values_are_cut_without_the_check_of_shapes() -> None:
    model = Net(lambda m, x: m.head(m.a(x)) if float(x.mean()) < 2 else m.a(x), a=conv(3, 6), head=head(6))
    _, plan = prove(randomise(model), X)
    assert len(plan.groups[0].keep) == 3


@pytest.mark.parametrize(
    "where", ["slim.surgery.check_layers", "slim.surgery.refresh_widths", "slim.surgery.cut_gates"]
)
def test_apply_plan_is_all_or_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Residual()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    ema = torch.optim.swa_utils.AveragedModel(model)
    _, plan = prove(model, X)
    before = [copy.deepcopy(thing.state_dict()) for thing in (model, ema, optimizer)]
    calls = []
    module, _, name = where.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # the model is cut by then, its average is not
            raise MemoryError("no memory left")
        real(*args)

    monkeypatch.setattr(where, fail)
    with pytest.raises(MemoryError):
        slim.apply_plan(model, plan, optimizer=optimizer, ema=ema)
    for thing, old in zip((model, ema), before, strict=False):
        assert all(torch.equal(v, old[k]) for k, v in thing.state_dict().items())
    assert model.stem[0].out_channels == 8
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(state[k]["momentum_buffer"], v["momentum_buffer"]) for k, v in before[2]["state"].items())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
