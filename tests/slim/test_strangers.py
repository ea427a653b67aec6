"""Habits of other people's networks: replaced forwards, layers with more in them, modules that run twice, odd inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import slim
from tests.slim.networks import prove
from tests.slim.test_operators import Forward, Net

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def chain(*between: nn.Module, width: int = 8, first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Conv2d(3, width, 3), *between, nn.Conv2d(width, 2, 1)).eval()


def planned(model: nn.Module, x: Any = X, dry_run: bool = True) -> slim.Plan:
    graph = slim.trace(model, x, dry_run=dry_run)
    return slim.make_plan(graph, slim.score(model, graph, "l1"), channels=0.5, round_to=1, min_channels=1)


def folded_as(model: nn.Module, x: Any = X, where: Any = "activation") -> tuple[list[str], list[str]]:
    """The names of the gates that were placed, and of those that folding leaves; folded = gated is asserted."""
    gates = slim.add_gates(model.eval(), slim.trace(model, x), where=where)
    for vector in gates.values():
        nn.init.uniform_(vector, 0.2, 1.7)
    folded = slim.fold_gates(model, x)
    assert slim.max_difference(model, folded, x) < 1e-5
    return list(gates), list(slim.gate_vectors(folded))


# -- copies that run the original ---------------------------------------------------------------------------------------


class Held(nn.Module):
    """Its forward is a function that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.both = lambda x: self.b(self.a(x))

    def forward(self, x: Tensor) -> Any:
        return self.both(x)


def without_gradients() -> nn.Module:
    model = chain(nn.ReLU())
    model.forward = torch.no_grad()(model.forward)  # type: ignore[method-assign]
    return model


def doubled() -> nn.Module:
    model = chain(nn.ReLU())
    before = model.forward
    model.forward = lambda x: before(x) * 2  # type: ignore[method-assign, assignment]
    return model


@pytest.mark.parametrize("make", [without_gradients, doubled, Held])
def test_a_copy_that_would_run_the_original_is_refused(make: Callable[[], nn.Module]) -> None:
    told = r"a copy of the model runs (0|a)\.weight of the model itself in its own forward"
    with pytest.raises(slim.SlimError, match=told):
        slim.trace(make(), X)
    model = make()
    with pytest.raises(slim.SlimError, match=told):
        slim.apply_plan(model, planned(model, dry_run=False))


# -- numbers that code makes of a channel count --------------------------------------------------------------------------

BY_COUNT: dict[str, Forward] = {
    "in a tensor": lambda m, y: y * torch.tensor([y.shape[1] ** -0.5]),
    "in a new tensor": lambda m, y: y * y.new_full((len(y), 1, 1, 1), 1 / y.shape[1]),
    "in a full tensor": lambda m, y: y * torch.full((1, 1, 1, 1), 1 / y.shape[1]),
    "as a window": lambda m, y: F.max_pool2d(y, 2 * (y.shape[1] // 4) + 1, 1, y.shape[1] // 4),
    "as a border": lambda m, y: F.pad(y, (1,) * 4, value=float(y.shape[1])),
}


@pytest.mark.parametrize("name", BY_COUNT)
def test_a_number_made_of_a_channel_count_freezes(name: str) -> None:
    model = Net(lambda m, x: m.b(BY_COUNT[name](m, m.a(x))), a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 2, 1))
    reason = slim.trace(model, X).by_name["a"].frozen_reason
    assert reason is not None and "computes with a channel count as a number" in reason


def test_numbers_of_their_own_freeze_nothing() -> None:
    def forward(m: Net, x: Tensor) -> Any:
        y = F.pad(F.max_pool2d(m.a(x), 3, 1, 1), (1,) * 4, value=3.0) * torch.tensor([0.5])
        canvas = y.new_zeros(len(y), 1, 1, 1)
        canvas[:] = y.mean((1, 2, 3), keepdim=True).detach() * 0 + x.mean((1, 2, 3), keepdim=True)
        return m.b(y + canvas)

    torch.manual_seed(0)
    graph = slim.trace(Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1)), X, allow_inexact=True)
    assert graph.by_name["a"].prunable


# -- gates that fold, or stay and say so ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "inputs"),
    [
        (lambda y: y.logsumexp((2, 3)), 8),
        (lambda y: torch.cat(torch.std_mean(y, (2, 3)), 1), 16),
        (lambda y: torch.cat(torch.var_mean(y, (2, 3)), 1), 16),
    ],
)
def test_gates_before_a_summary_that_is_not_linear_stay(read: Any, inputs: int) -> None:
    model = Net(lambda m, x: m.c(read(m.b(m.a(x)))), a=nn.Conv2d(3, 8, 3), b=nn.ReLU(), c=nn.Linear(inputs, 2))
    assert folded_as(model) == (["a"], ["a"])


@pytest.mark.parametrize("shape", [(8, 8, 1, 1), (8, 5, 1, 1)])
def test_gates_fold_into_a_weight_that_is_read_transposed(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    parts = {"a": nn.Conv2d(3, 8, 3), "b": nn.ReLU(), "w": weight}
    model = Net(lambda m, x: F.conv2d(m.b(m.a(x)).abs(), m.w.transpose(0, 1)), **parts)  # type: ignore[arg-type]
    assert folded_as(model) == (["a"], [])


class ConvNorm(nn.Conv2d):
    """A convolution with its norm inside."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Any:
        return self.norm(super().forward(x))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()
        nn.init.uniform_(self.bias)

    def forward(self, x: Tensor) -> Any:
        return self.act(super().forward(x))


class NormFunction(nn.BatchNorm2d):
    """The same by a function, which nothing but its own code tells."""

    def forward(self, x: Tensor) -> Any:
        return F.silu(super().forward(x))


@pytest.mark.parametrize("where", ["activation", "norm"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: chain(nn.SiLU(), first=ConvNorm(3, 8, 3)),
        lambda: chain(NormAct(8)),
        lambda: chain(NormFunction(8)),
    ],
)
def test_layers_that_do_more_than_their_weight_get_one_gate_that_folds(make: Any, where: str) -> None:
    placed, left = folded_as(make(), where=where)
    assert placed == ["0"] and left == []


def test_a_gate_behind_a_computed_weight_stays_where_it_cannot_go_on() -> None:
    (placed,), left = folded_as(chain(nn.Tanh(), first=weight_norm(nn.Conv2d(3, 8, 3))))
    assert left == [placed]


class Twins(nn.Module):
    """One backbone for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        self.backbone, self.head = nn.Sequential(*parts), nn.Linear(8, 2)

    def forward(self, u: Tensor, v: Tensor) -> Any:
        return self.head((self.backbone(u) - self.backbone(v)).abs().mean((2, 3)))


def test_a_backbone_that_runs_twice_gets_gates() -> None:
    pair = (X, X + 1)
    prove(Twins(), pair)
    assert folded_as(Twins(), pair) == (["backbone.0", "backbone.3"], [])


@pytest.mark.parametrize("way", ["wrapper", "method"])
def test_gates_come_before_compilation(way: str) -> None:
    model = chain(nn.ReLU())
    graph = slim.trace(model, X)
    if way == "wrapper":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    else:
        model.compile(backend="eager")
    with pytest.raises(slim.SlimError, match="its code would not see the gates; place them first"):
        slim.add_gates(model, graph)


# -- what is saved, copied and counted ------------------------------------------------------------------------------------


class WithTable(nn.Module):
    """A factor for each channel in a buffer that no state dict holds, and a number that is no tensor in one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.seen = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), {"images": 7}
        self.register_buffer("table", torch.rand(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x) * self.table)

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = {**state, "loaded": True}


def grouped() -> nn.Module:
    return chain(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU())


@pytest.mark.parametrize("make", [WithTable, grouped])
def test_saved_after_two_cuts_and_loaded_twice(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    for _ in range(2):
        model = slim.apply_plan(model, planned(model))
    for name in ("first.pt", "second.pt"):
        slim.save(model, tmp_path / name, {})
        loaded = slim.load(tmp_path / name, lambda _: make())
        assert slim.max_difference(model, loaded, X) == 0 and slim.layer_widths(loaded) == slim.layer_widths(model)
        model = loaded
    assert getattr(model, "seen", {"loaded": True})["loaded"]


def test_an_optimiser_whose_state_has_other_shapes_is_refused() -> None:
    model = chain(nn.ReLU())
    optimizer = torch.optim.Adafactor(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    with pytest.raises(slim.SlimError, match=r"Adafactor keeps row_var of 0\.weight in another shape, \(8, 3, 3, 1\)"):
        slim.apply_plan(model, planned(model), optimizer=optimizer)


def test_weight_norm_by_hooks_is_cut() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
        model = chain(nn.ReLU(), old, nn.ReLU())
        model(X)
        graph, _ = prove(model, X)
        assert graph.by_name["2"].prunable


def test_ddp_gets_gates_and_is_saved_as_what_it_wraps(tmp_path: Path) -> None:
    model = chain(nn.ReLU())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert list(slim.add_gates(wrapped, slim.trace(wrapped, X))) == ["0"]
        average: Any = torch.optim.swa_utils.AveragedModel(wrapped)
        pruned, _, narrow = slim.apply_plan(wrapped, planned(wrapped), optimizer=None, ema=average)
        assert narrow is not None and narrow.module[0].weight.shape == pruned[0].weight.shape
        slim.save(wrapped, tmp_path / "wrapped.pt", {})
    finally:
        torch.distributed.destroy_process_group()
    assert slim.max_difference(model, slim.load(tmp_path / "wrapped.pt", lambda _: chain(nn.ReLU())), X) == 0


def test_inputs_that_a_network_writes_into_stay() -> None:
    model = Net(lambda m, x: m.b(m.a(x.sub_(0.5).div_(0.25)).relu()), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1))
    given = X.clone()
    prove(model, given)
    assert torch.equal(given, X)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda y: y.squeeze_(3).squeeze_(2),
        lambda y: y.flatten(1).t_().t_(),
        lambda y: y.flatten(2).transpose_(1, 2).mean(1),
        lambda y: y.flatten(1).unsqueeze_(0).squeeze_(0),
    ],
)
def test_views_in_place_are_followed(flatten: Any) -> None:
    parts = {"a": nn.Conv2d(3, 8, 3), "pool": nn.AdaptiveAvgPool2d(1), "b": nn.Linear(8, 2)}
    graph, _ = prove(Net(lambda m, x: m.b(flatten(m.pool(m.a(x)))), **parts), X)
    assert graph.by_name["a"].prunable


@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (lambda m, images: m.b(m.a(torch.stack(images))), ([X[0]] * 6,)),
        (lambda m, x: m.b(m.a(x)), X[0]),
        (lambda m, maps: m.b(m.a(maps[0]) + m.a(maps[1])), ([X, X],)),
        (lambda m, pair: (m.b(m.a(pair["x"])), pair["anchors"]), ({"anchors": torch.rand(1000, 4), "x": X},)),
    ],
)
def test_macs_are_for_one_image(forward: Any, inputs: Any) -> None:
    model = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1))
    runs = 2 if isinstance(inputs, tuple) and isinstance(inputs[0], list) and len(inputs[0]) == 2 else 1
    assert slim.cost(model, inputs).macs == (runs * 8 * 27 + 2 * 8) * 36


def test_without_macs_there_is_no_share_of_them_to_keep() -> None:
    model = Net(lambda m, x: m.b(x) * m.w, b=nn.BatchNorm2d(3), w=nn.Parameter(torch.rand(3, 1, 1)))
    graph = slim.trace(model, X)
    assert graph.macs == 0 and "0.0 M MACs" in graph.report()
    with pytest.raises(slim.SlimError):
        slim.make_plan(graph, {}, macs=0.5)
