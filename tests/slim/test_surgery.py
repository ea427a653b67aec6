"""Pruned = masked, folded = unfolded, saved = loaded, optimiser state follows."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import slim
from tests.slim.networks import Chain, Residual, randomise


def planned(model: nn.Module, macs: float = 0.5, seed: int = 0) -> slim.Plan:
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    return slim.make_plan(graph, slim.score(model, graph, "random", seed=seed), macs=macs, round_to=1, min_channels=1)


def gated(tie: str = "group") -> Residual:
    model = Residual()
    slim.add_gates(model, slim.trace(model, torch.rand(1, 3, 8, 8)), tie=tie)  # type: ignore[arg-type]
    randomise(model)
    return model


@pytest.mark.parametrize("tie", ["group", "layer"])
@pytest.mark.parametrize("macs", [0.7, 0.5, 0.3])
def test_pruned_equals_masked_before_and_after_folding(tie: str, macs: float) -> None:
    model, x = gated(tie), torch.rand(2, 3, 12, 12)
    plan = planned(model, macs)
    masked, pruned = slim.mask(model, plan), slim.apply_plan(model, plan)
    assert slim.max_difference(masked, pruned, x) < 1e-5
    assert slim.max_difference(model, masked, x) > 1e-3


def test_wrong_cut_is_noticed() -> None:
    model, x = gated(), torch.rand(2, 3, 12, 12)
    plan = planned(model)
    pruned = slim.apply_plan(model, plan)
    with torch.no_grad():
        pruned.head.weight.copy_(pruned.head.weight.roll(1, 1))
    assert slim.max_difference(slim.mask(model, plan), pruned, x) > 1e-3


def test_the_given_model_is_untouched() -> None:
    model = gated()
    before = copy.deepcopy(model.state_dict())
    plan = planned(model)
    slim.mask(model, plan), slim.apply_plan(model, plan), slim.fold_gates(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.stem[0].out_channels == 8


def test_cut_keeps_the_named_channels_and_their_values() -> None:
    model = randomise(Chain())
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    scores = {"first.0": torch.tensor([0.9, 0.1, 0.8, 0.7])}
    pruned = slim.apply_plan(model, slim.make_plan(graph, scores, channels=0.5, round_to=1, min_channels=1))
    assert torch.equal(pruned.first[0].weight, model.first[0].weight[[0, 2]])
    assert torch.equal(pruned.first[1].running_var, model.first[1].running_var[[0, 2]])  # type: ignore[index]
    assert torch.equal(pruned.second[0].weight, model.second[0].weight[:, [0, 2]])
    assert (pruned.first[0].out_channels, pruned.first[1].num_features, pruned.second[0].in_channels) == (2, 2, 2)


def test_depthwise_layers_stay_depthwise() -> None:
    pruned = slim.apply_plan(gated(), planned(gated()))
    depthwise = pruned.depthwise[0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == depthwise.weight.shape[0] < 16


def test_closed_gates_make_the_cut_free() -> None:
    model = gated()
    with torch.no_grad():
        for vector in slim.gate_vectors(model).values():
            vector[::2] = 0.0
    graph = slim.trace(model, torch.rand(1, 3, 8, 8))
    plan = slim.make_plan(graph, slim.score(model, graph, "gate"), channels=0.5, round_to=1, min_channels=1)
    assert all(k % 2 for g in plan.groups for k in g.keep)
    assert slim.max_difference(model, slim.apply_plan(model, plan), torch.rand(2, 3, 8, 8)) < 1e-6


@pytest.mark.parametrize("tie", ["group", "layer"])
def test_folding_is_exact_and_leaves_no_gate_that_commutes(tie: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = gated(tie), torch.rand(2, 3, 12, 12)
    folded = slim.fold_gates(model)
    assert slim.max_difference(model, folded, x) < 1e-5
    left = set(slim.gate_vectors(folded))
    # Free gates on the two sides of a residual sum scale its terms differently: nothing can take them up.
    assert left == (set() if tie == "group" else {"stem.0@stem.2", "stem.0@branch.1.2"})
    assert ("stays" in caplog.text) == (tie == "layer")


def test_folding_refuses_negative_gates() -> None:
    model = gated()
    with torch.no_grad():
        slim.gate_vectors(model)["side.0"][0] = -0.1
    with pytest.raises(slim.SlimError, match="negative"):
        slim.fold_gates(model)


def test_cut_twice_equals_masked_twice() -> None:
    model, x = gated(), torch.rand(2, 3, 12, 12)
    once = slim.apply_plan(model, planned(model, 0.7))
    plan = planned(once, 0.5, seed=5)
    assert slim.max_difference(slim.mask(once, plan), slim.apply_plan(once, plan), x) < 1e-5


def test_plan_for_another_network_names_the_layer() -> None:
    with pytest.raises(slim.SlimError, match=r"stem.0.weight has shape.*no such tensor"):
        slim.apply_plan(Chain(), planned(gated()))
    model = gated()
    plan = planned(model)
    with pytest.raises(
        slim.SlimError, match=r"stem.0.weight has shape .8, 3, 3, 3. in the plan, the model has shape .6"
    ):
        slim.apply_plan(slim.apply_plan(model, plan), plan)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.rand(4, 3, 8, 8, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        slim.SmallestHalfL1(model, strength=0.0).step(0.0)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_continues_smoothly_over_a_free_cut(kind: str) -> None:
    model = gated().train()
    groups = [{"params": list(model.parameters()), "lr": 0.01, "name": "all"}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True) if kind == "sgd" else torch.optim.AdamW(groups)
    with torch.no_grad():
        for vector in slim.gate_vectors(model).values():
            vector[: len(vector) // 2] = 0.0
        for member in model.modules():
            if isinstance(member, slim.Gate):
                for vector in member.vectors:
                    vector.register_hook(lambda grad: torch.where(torch.arange(len(grad)) < len(grad) // 2, 0.0, grad))
    losses(model, optimizer, 10, seed=1)
    scores = {g.name: torch.arange(g.size) for g in slim.trace(model, torch.rand(1, 3, 8, 8)).groups if g.prunable}
    plan = slim.make_plan(
        slim.trace(model, torch.rand(1, 3, 8, 8)),
        {k: v.double() for k, v in scores.items()},
        channels=0.5,
        round_to=1,
        min_channels=1,
        scope="local",
    )
    pruned, cut_optimizer, ema = slim.apply_plan(
        model, plan, optimizer=optimizer, ema=torch.optim.swa_utils.AveragedModel(model)
    )
    assert cut_optimizer is not None and ema is not None
    assert cut_optimizer.param_groups[0]["name"] == "all" and type(cut_optimizer) is type(optimizer)
    assert {id(p) for g in cut_optimizer.param_groups for p in g["params"]} == {id(p) for p in pruned.parameters()}
    assert slim.max_difference(ema.module, pruned, torch.rand(2, 3, 8, 8)) == 0
    weight = pruned.stem[0].weight
    for value in cut_optimizer.state[weight].values():
        assert value.shape in (weight.shape, torch.Size([]))
    assert losses(pruned, cut_optimizer, 10, seed=2) == pytest.approx(losses(model, optimizer, 10, seed=2), rel=1e-5)


def test_foreign_optimizer_is_refused() -> None:
    model = gated()
    with pytest.raises(slim.SlimError, match="not the model's"):
        slim.apply_plan(model, planned(model), optimizer=torch.optim.SGD(gated().parameters(), lr=0.1))


def output_of(file: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return slim.load(file, lambda build: Residual()).eval()(torch.from_numpy(images)).detach().numpy()


@pytest.mark.parametrize("tie", ["group", "layer"])
def test_saved_and_loaded_in_a_new_process_gives_the_same_output(
    tmp_path: Path, tie: str, other_process: ProcessPoolExecutor
) -> None:
    model, x = gated(tie), torch.rand(2, 3, 12, 12)
    pruned = slim.apply_plan(model, planned(model))
    slim.save(pruned, tmp_path / "m.pt", build={"any": "thing"})
    found = other_process.submit(output_of, tmp_path / "m.pt", x.numpy()).result()
    assert torch.equal(torch.from_numpy(found), pruned.eval()(x))


def test_loaded_gates_are_still_shared_and_fold(tmp_path: Path) -> None:
    model = slim.apply_plan(gated(), planned(gated()))
    slim.save(model, tmp_path / "m.pt", build={})
    loaded = slim.load(tmp_path / "m.pt", lambda build: Residual())
    assert set(slim.gate_vectors(loaded)) == {"stem.0", "branch.0.0", "side.0"}
    assert not list(slim.gate_vectors(slim.fold_gates(loaded)))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    slim.save(gated(), path, build={})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(slim.SlimError, match=r"m\.pt: not a readable checkpoint"):
        slim.load(path, lambda build: Residual())
    torch.save({"weights": 1}, path)
    with pytest.raises(slim.SlimError, match="another kind"):
        slim.load(path, lambda build: Residual())
    with pytest.raises(slim.SlimError, match="no such file"):
        slim.load(tmp_path / "none.pt", lambda build: Residual())


def test_other_builder_and_altered_widths_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    slim.save(gated(), path, build={})
    with pytest.raises(slim.SlimError, match=r"stem\.2.*no such module|does not fit"):
        slim.load(path, lambda build: Chain())
    content = slim.read(path)
    content["params"] += 1
    with pytest.raises(slim.SlimError, match="params of the rebuilt network"):
        slim.restore(content, lambda build: Residual())


@pytest.mark.parametrize(("with_gates", "version"), [(True, 1), (True, 2), (False, 0), (False, 4)])
def test_formats_that_cannot_be_read_are_named(tmp_path: Path, with_gates: bool, version: int) -> None:
    model = gated() if with_gates else Residual()
    slim.save(model, tmp_path / "m.pt", build={})
    content = slim.read(tmp_path / "m.pt")
    torch.save({**content, "format_version": version}, tmp_path / "m.pt")
    with pytest.raises(slim.SlimError, match=rf"checkpoint format {version}; this slim reads . to 3"):
        slim.load(tmp_path / "m.pt", lambda build: Residual())
    if not with_gates:
        old = {k: v for k, v in content.items() if k != "norms"}
        torch.save({**old, "format_version": 1}, tmp_path / "m.pt")
        slim.load(tmp_path / "m.pt", lambda build: Residual())


def test_saving_runs_nothing_and_copies_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated()
    ran: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: ran.append(module))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a second model is made")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    monkeypatch.setattr(nn.Module, "__init__", refuse)
    slim.save(model, tmp_path / "m.pt", build={})
    packed = slim.pack(model, {})["state_dict"]
    monkeypatch.undo()
    assert ran == []
    assert all(tensor.data_ptr() == packed[name].data_ptr() for name, tensor in model.state_dict().items())
    model(torch.rand(1, 3, 8, 8))
    assert ran, "the hooks see a forward pass"


@pytest.mark.parametrize("tie", ["group", "layer"])
def test_the_file_holds_the_macs_that_a_run_would_count(tmp_path: Path, tie: str) -> None:
    x = torch.rand(1, 3, 8, 8)
    model = gated(tie)
    stages = [model, pruned := slim.apply_plan(model, planned(model)), slim.fold_gates(pruned)]
    slim.save(pruned, tmp_path / "m.pt", build={})
    loaded = slim.load(tmp_path / "m.pt", lambda build: Residual())
    stages += [loaded, slim.apply_plan(loaded, planned(loaded, 0.7))]
    found = [slim.pack(stage, {})["macs"] for stage in stages]
    assert found == [slim.cost(stage, x).macs for stage in stages]
    assert found[0] > found[1] == found[2] == found[3] > found[4]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    slim.save(gated(), path, build={"old": True})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(slim.SlimError, match=r"m\.pt: cannot be written \(No space left.*untouched"):
        slim.save(gated(), path, build={})
    monkeypatch.undo()
    assert slim.read(path)["build"] == {"old": True} and len(list(tmp_path.iterdir())) == 1
