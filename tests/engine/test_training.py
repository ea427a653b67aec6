from __future__ import annotations

import copy
import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import (
    OptimConfig,
    Precision,
    Sparsity,
    TrainConfig,
    TrainState,
    WeightAverage,
    World,
    fit,
    learning_rate_factor,
    read_training_state,
)
from engine.epoch import Epoch, _explain_out_of_memory, train_one_epoch
from engine.interruption import Interruption
from engine.state import EpochSums
from slim import SlimError
from tests.engine.tiny_detector import (
    RecordingL1,
    TinyBatch,
    TinyDetector,
    TinyLoader,
    evaluation_of,
    save,
    squared_loss,
    weight_sum,
)
from tracking import RunFolder


def tiny(seed: int = 1) -> TinyDetector:
    torch.manual_seed(seed)
    return TinyDetector()


def train(model: nn.Module, run: RunFolder, epochs: int = 4, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "config": TrainConfig(epochs=epochs),
        "evaluate": weight_sum,
        "save": save,
        "device": "cpu",
    }
    options.update(changes)
    loss_fn, loader = options.pop("loss_fn", squared_loss), options.pop("loader", TinyLoader())
    return fit(model, loss_fn, loader, run=run, **options)


def stop_at(call: int) -> Any:
    calls = []

    def evaluate(model: nn.Module) -> Any:
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt
        return weight_sum(model)

    return evaluate


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_run_is_bit_identical(tmp_path: Path, optimizer: str) -> None:
    config = TrainConfig(epochs=4, optim=OptimConfig(optimizer=optimizer))

    whole, whole_run = tiny(), RunFolder.create(tmp_path, "whole")
    whole_result = train(whole, whole_run, config=config, sparsity=Sparsity(RecordingL1(whole, 3.0), from_epoch=1))

    stopped, parts_run = tiny(), RunFolder.create(tmp_path, "parts")
    with pytest.raises(KeyboardInterrupt):
        train(
            stopped,
            parts_run,
            config=config,
            sparsity=Sparsity(RecordingL1(stopped, 3.0), from_epoch=1),
            evaluate=stop_at(2),
        )
    state = read_training_state(parts_run.last)
    assert state["progress"]["next_epoch"] == 2
    resumed = tiny(seed=9)
    result = train(
        resumed,
        parts_run,
        config=config,
        sparsity=Sparsity(RecordingL1(resumed, 3.0), from_epoch=1),
        resume_state=state,
    )

    assert_same(read_training_state(parts_run.last), read_training_state(whole_run.last))
    for name in ("last", "best"):
        parts, expected = (torch.load(getattr(run, name), weights_only=True) for run in (parts_run, whole_run))
        assert_same(parts["model"], expected["model"])
    assert_same(resumed.state_dict(), whole.state_dict())
    assert (result.best_ap, result.best_epoch, result.last_ap) == (
        whole_result.best_ap,
        whole_result.best_epoch,
        whole_result.last_ap,
    )
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in parts_run.read_rows()]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in whole_run.read_rows()]


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    first = train(tiny(), run, epochs=1)
    model, loader = tiny(seed=2), TinyLoader()
    again = train(model, run, epochs=1, resume_state=read_training_state(run.last), loader=loader)
    assert loader.dataset.epochs == []
    assert (again.best_ap, again.last_ap) == (first.best_ap, first.last_ap)
    assert len(run.read_rows()) == 1


def test_order_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    model = tiny()

    def spy(owner: Any, name: str, tag: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(tag)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    spy(torch.optim.SGD, "zero_grad", "zero_grad")
    spy(torch.amp.GradScaler, "scale", "scale")
    spy(torch.Tensor, "backward", "backward")
    spy(torch.amp.GradScaler, "unscale_", "unscale")
    spy(nn.utils, "clip_grad_norm_", "clip")
    spy(torch.amp.GradScaler, "step", "step")
    spy(torch.amp.GradScaler, "update", "update scaler")
    spy(WeightAverage, "update_parameters", "average")
    model.register_forward_pre_hook(lambda *_: calls.append("forward"))

    def loss_fn(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        calls.append("loss")
        return squared_loss(outputs, targets, images)

    config = TrainConfig(epochs=2)
    train(
        model,
        RunFolder.create(tmp_path, "run"),
        config=config,
        loader=TinyLoader(batches=1),
        loss_fn=loss_fn,
        evaluate=None,
        sparsity=Sparsity(RecordingL1(model, 0.0, calls), from_epoch=1),
    )
    factor = learning_rate_factor(config.optim, 1, 2)
    step = ["zero_grad", "forward", "loss", "scale", "backward", "unscale", "clip", "step", "update scaler"]
    assert calls == [*step, ("L1 step", 0.0), "average", *step, ("L1 step", 0.01 * factor(1)), "average"]


def test_first_step_is_plain_sgd_with_clipping(tmp_path: Path) -> None:
    model = tiny().eval()
    model.drop.p = 0.0
    expected = copy.deepcopy(model).train()
    batch = next(iter(loader_at_epoch_0()))
    images = batch.images.float() / 255
    loss, _ = squared_loss(expected(images), batch.targets, images)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()
    config = OptimConfig(clip_norm=float(norm) / 2, momentum=0.0, weight_decay=0.0)
    wanted = [p.detach() - 0.01 * learning_rate_factor(config, 1, 1)(0) * p.grad / 2 for p in expected.parameters()]
    train(
        model,
        RunFolder.create(tmp_path, "run"),
        loader=TinyLoader(batches=1),
        config=TrainConfig(epochs=1, optim=config, precision="float32", channels_last=False),
    )
    for found, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), want, rtol=1e-5, atol=1e-6)


def loader_at_epoch_0() -> TinyLoader:
    loader = TinyLoader(batches=1)
    loader.dataset.set_epoch(0)
    return loader


def test_non_finite_loss_stops_before_the_step_and_keeps_the_last_epoch(tmp_path: Path) -> None:
    model, run = tiny(), RunFolder.create(tmp_path, "run")
    before: dict[str, Tensor] = {}
    batches = []

    def spoiled(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        batches.append(1)
        loss, parts = squared_loss(outputs, targets, images)
        if len(batches) == 5:  # epoch 1, batch 1
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return loss * float("nan"), parts | {"obj": torch.tensor(float("nan"))}
        return loss, parts

    with pytest.raises(SlimError, match=r"epoch 1, batch 1: loss is nan .*obj nan; lr 0\.00.*lower --lr"):
        train(model, run, loss_fn=spoiled)
    assert_same(dict(model.named_parameters()), before)
    assert read_training_state(run.last)["progress"]["next_epoch"] == 1
    assert len(run.read_rows()) == 1


def infinite_slope(outputs: Any, targets: Tensor, images: Tensor) -> Any:
    zero = (outputs[0] - outputs[0].detach()).sum()
    return zero.abs().sqrt(), {"box": zero.detach()}  # the square root's slope at 0 is infinite


def test_non_finite_gradient_stops_before_the_step(tmp_path: Path) -> None:
    model, run = tiny(), RunFolder.create(tmp_path, "run")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    with pytest.raises(SlimError, match=r"epoch 0, batch 0: gradient norm is nan"):
        train(model, run, loss_fn=infinite_slope)
    assert_same(dict(model.named_parameters()), before)
    assert not run.last.exists()


def half_precision_epoch(model: TinyDetector, batches: int, loss_fn: Any, l1: RecordingL1) -> Any:
    """One epoch with a scaler on the CPU, where the loss decides what overflows."""
    config, device = TrainConfig(epochs=1, precision="float32"), torch.device("cpu")
    state = TrainState.create(model, config, batches, device)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    epoch = Epoch(0, config, device, "epoch 0", Interruption(), EpochSums(), Sparsity(l1))
    return state, train_one_epoch(state, loss_fn, TinyLoader(batches), epoch)


def test_half_precision_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model, calls = tiny(), []
    l1 = RecordingL1(model)
    snapshots = []

    def loss_fn(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        assert outputs[0].dtype == torch.float32
        calls.append(1)
        snapshots.append(model.head.weight.detach().clone())
        loss, parts = squared_loss(outputs, targets, images)
        return (loss + (outputs[0] - outputs[0].detach()).sum().abs().sqrt() if len(calls) == 1 else loss), parts

    state, losses = half_precision_epoch(model, 3, loss_fn, l1)
    assert torch.equal(snapshots[0], snapshots[1])
    assert not torch.equal(snapshots[1], snapshots[2])
    assert state.scaler.get_scale() == 512
    assert (len(l1.calls), state.scheduler.last_epoch, int(state.average.n_averaged)) == (2, 2, 2)
    assert losses["loss/box"] > 0


def test_half_precision_that_always_overflows_is_an_error() -> None:
    model = tiny()
    with pytest.raises(SlimError, match="epoch 0, batch 20: gradient norm is"):
        half_precision_epoch(model, 30, infinite_slope, RecordingL1(model))


def test_epochs_are_announced_and_models_for_use_are_the_average(tmp_path: Path) -> None:
    loader, run, seen = TinyLoader(), RunFolder.create(tmp_path, "run"), []

    def evaluate(average: nn.Module) -> Any:
        seen.append(copy.deepcopy(average.state_dict()))
        return evaluation_of([0.2, 0.5, 0.4][len(seen) - 1])

    result = train(tiny(), run, loader=loader, epochs=3, evaluate=evaluate)
    assert loader.dataset.epochs == [0, 1, 2]
    assert (result.best_ap, result.best_epoch, result.last_ap, result.closed_share) == (0.5, 1, 0.4, None)
    best = torch.load(run.best, weights_only=True)
    assert_same(best["model"], seen[1])
    assert "training_state" not in best
    last = torch.load(run.last, weights_only=True)
    assert_same(last["model"], seen[2])
    assert not torch.equal(last["model"]["conv.weight"], last["training_state"]["model"]["conv.weight"])
    with pytest.raises(SlimError, match="holds no training state"):
        read_training_state(run.best)


def test_patience_stops_a_run_and_its_resumption(tmp_path: Path) -> None:
    loader, run, aps = TinyLoader(), RunFolder.create(tmp_path, "run"), iter([0.2, 0.5, 0.4, 0.5, 0.6, 0.7])
    config = TrainConfig(epochs=6, patience=2)
    result = train(tiny(), run, loader=loader, config=config, evaluate=lambda _: evaluation_of(next(aps)))
    assert (result.epochs, result.best_epoch, len(run.read_rows())) == (4, 1, 4)
    again = train(tiny(), run, loader=loader, config=config, resume_state=read_training_state(run.last))
    assert again.epochs == 4 and loader.dataset.epochs == [0, 1, 2, 3]


def test_patience_ends_at_an_evaluation_and_the_result_holds_it(tmp_path: Path) -> None:
    """Patience of 3 epochs, evaluations after epochs 1, 3, 5, 7: the third one is the first that is late enough."""
    run, aps, seen = RunFolder.create(tmp_path, "run"), [0.5, 0.4, 0.3, 0.2], []

    def evaluate(model: nn.Module) -> Any:
        seen.append(copy.deepcopy(model.state_dict()))
        return evaluation_of(aps[len(seen) - 1])

    config = TrainConfig(epochs=20, eval_every=2, patience=3)
    result = train(tiny(), run, config=config, evaluate=evaluate)
    assert (result.epochs, result.best_epoch, result.last_ap) == (6, 1, 0.3)
    assert result.evaluation is not None and result.evaluation.ap == 0.3
    assert_same(torch.load(run.last, weights_only=True)["model"], seen[-1])
    again = train(tiny(), run, config=config, resume_state=read_training_state(run.last))
    assert (again.epochs, again.last_ap, again.evaluation) == (6, 0.3, None), "evaluated in another process"
    longer = train(tiny(), run, config=TrainConfig(7, eval_every=9), resume_state=read_training_state(run.last))
    assert longer.evaluation is not None and longer.evaluation.ap == longer.last_ap != 0.3


def test_closed_gates_count_as_zero_in_the_masked_ap(tmp_path: Path) -> None:
    model, run = tiny(), RunFolder.create(tmp_path, "run")
    with torch.no_grad():
        model.gate_vector[:] = torch.tensor([0.005, 1.0, 1.0, 1.0])

    def evaluate(average: nn.Module) -> Any:
        return evaluation_of(float(average.gate_vector.detach()[0]))

    train(
        model,
        run,
        config=TrainConfig(1, OptimConfig(lr=1e-9)),
        evaluate=evaluate,
        sparsity=Sparsity(RecordingL1(model)),
    )
    (row,) = run.read_rows()
    assert float(row["metrics/masked_ap"]) == 0.0
    assert float(row["metrics/ap"]) == pytest.approx(0.005, rel=1e-3)
    assert float(torch.load(run.last, weights_only=True)["model"]["gate.vectors.0"][0]) > 0


def test_state_carried_over_continues_optimiser_and_average_with_a_new_schedule(tmp_path: Path) -> None:
    first = tiny()
    train(first, RunFolder.create(tmp_path, "first"), epochs=2)
    state = read_training_state(tmp_path / "first" / "weights" / "last.pt")
    carried = {"model": state["model"], "average": state["average"], "optimizer": state["optimizer"]["state"]}
    seen: list[Any] = []

    class Spy(TinyLoader):
        def __iter__(self) -> Any:
            seen.append(copy.deepcopy(second.state_dict()))
            return super().__iter__()

    second, run = tiny(seed=5), RunFolder.create(tmp_path, "second")
    optim = OptimConfig(lr=1e-12, weight_decay=0.0)
    train(second, run, config=TrainConfig(1, optim), loader=Spy(1), warm_start_state=carried, evaluate=None)
    assert_same(seen[0], state["model"])
    after = read_training_state(run.last)
    assert int(after["average"]["n_averaged"]) == int(state["average"]["n_averaged"]) + 1
    for key, moments in state["optimizer"]["state"].items():
        before, now = moments["momentum_buffer"], after["optimizer"]["state"][key]["momentum_buffer"]
        # One step adds a gradient of at most the clipping norm to 0.937 of what was there.
        assert (now - 0.937 * before).norm() <= optim.clip_norm + 1e-3 and before.abs().sum() > 0
    assert after["optimizer"]["param_groups"][0]["initial_lr"] == 1e-12
    other = tiny()
    other.head = nn.Conv2d(4, 7, 1)
    with pytest.raises(SlimError, match="carried over does not fit"):
        train(other, run, warm_start_state=carried)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "try --batch-size 1"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "try --batch-size 1"),
        (MemoryError(), "try --batch-size 1"),
    ],
)
def test_out_of_memory_names_the_batch_size_to_try(tmp_path: Path, error: Exception, words: str) -> None:
    def loss_fn(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        raise error

    with pytest.raises(
        SlimError, match=f"epoch 0, batch 0: out of memory with 2 images of 8x8 pixels a step; {words};"
    ):
        train(tiny(), RunFolder.create(tmp_path, "run"), loss_fn=loss_fn)


def test_other_failures_of_a_step_are_not_called_out_of_memory(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes cannot be multiplied"), NotImplementedError("shapes cannot")):

        def loss_fn(outputs: Any, targets: Tensor, images: Tensor, error: Exception = error) -> Any:
            raise error

        with pytest.raises(type(error), match="shapes cannot"):
            train(tiny(), RunFolder.create(tmp_path, "run"), loss_fn=loss_fn)


def test_the_batch_size_to_try_is_that_of_all_ranks() -> None:
    batch = TinyBatch(torch.zeros(7, 3, 8, 8), torch.zeros(0, 6), [], [])
    words = "out of memory with 28 images of 8x8 pixels a step; try --batch-size 12;"
    with pytest.raises(SlimError, match=words), _explain_out_of_memory(batch, "epoch 0", World(0, 4)):
        raise torch.OutOfMemoryError("CUDA")


def test_the_loss_is_computed_in_float32_and_the_network_in_the_precision(tmp_path: Path) -> None:
    """A network that the loss runs, such as a teacher, computes like the trained one on the same images."""
    seen: dict[str, list[torch.dtype]] = {"network": [], "loss": [], "network of the loss": []}
    teacher = nn.Conv2d(3, 4, 3)
    for precision in ("float32", "bfloat16"):
        model = tiny()
        inputs: list[Tensor] = []

        def hook(module: nn.Module, args: Any, out: Tensor, inputs: list[Tensor] = inputs) -> None:
            inputs.append(args[0])
            seen["network"].append(out.dtype)

        model.conv.register_forward_hook(hook)

        def loss_fn(outputs: Any, targets: Tensor, images: Tensor, inputs: list[Tensor] = inputs) -> Any:
            seen["loss"].append(outputs[0].dtype)
            seen["network of the loss"].append(teacher(images).dtype)
            assert images is inputs[0]
            return squared_loss(outputs, targets, images)

        run = RunFolder.create(tmp_path, precision)
        config = TrainConfig(1, precision=precision)
        train(model, run, config=config, loss_fn=loss_fn, loader=TinyLoader(1), evaluate=None)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    in_precision = [torch.float32, torch.bfloat16]
    assert seen == {
        "network": in_precision,
        "loss": [torch.float32, torch.float32],
        "network of the loss": in_precision,
    }
    with pytest.raises(SlimError, match="float16 needs a GPU"):
        train(tiny(), RunFolder.create(tmp_path, "half"), config=TrainConfig(1, precision="float16"))


def test_evaluates_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    train(tiny(), run, config=TrainConfig(epochs=5, eval_every=2))
    assert [row["epoch"] for row in run.read_rows() if row["metrics/ap"]] == ["1", "3", "4"]


def test_best_of_a_sparse_run_is_sought_among_its_closed_epochs(tmp_path: Path) -> None:
    model, run, calls = tiny(), RunFolder.create(tmp_path, "run"), []
    aps, closed = [0.9, 0.3, 0.4, 0.35], [0.0, 0.5, 0.5, 0.5]

    class Closing(RecordingL1):
        def closed_share(self) -> float:
            return closed[max(0, len(calls) - 1)]

    def evaluate(average: nn.Module) -> Any:
        calls.append(1)
        return evaluation_of(aps[len(calls) - 1])

    result = train(model, run, evaluate=evaluate, sparsity=Sparsity(Closing(model)))
    assert (result.best_ap, result.best_epoch, result.closed_share) == (0.4, 2, 0.5)


def test_gates_of_the_saved_model_are_closed_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, run = tiny(), RunFolder.create(tmp_path, "run")
    with caplog.at_level(logging.INFO, logger="engine"):
        result = train(model, run, sparsity=Sparsity(RecordingL1(model, 1000.0), from_epoch=1))
    assert result.closed_share == 0.5
    saved = torch.load(run.last, weights_only=True)["model"]["gate.vectors.0"]
    assert_same(saved, model.gate_vector.detach())
    assert saved.sort().values[:2].tolist() == [0, 0]
    rows = run.read_rows()
    assert [float(row["gates/closed_share"]) for row in rows] == [0.0, 0.5, 0.5, 0.5]
    assert float(rows[0]["loss/l1"]) > 1
    assert float(rows[3]["loss/l1"]) == 0
    assert [float(row["gates/strength"]) for row in rows] == [0, 1000, 1000, 1000]
    assert rows[0]["gates/pull_over_gradient"] == ""
    assert float(rows[1]["gates/pull_over_gradient"]) > 100
    assert len(list(run.path.glob("events.out.*"))) == 1
    assert "epoch 3: box" in caplog.messages[-1]
    assert "closed 50.0%" in caplog.messages[-1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_host_waits_for_the_device_once_a_step(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    """Conversions of floating-point and boolean tensors to Python values stand for the copies that a GPU would wait for."""
    waits: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def convert(tensor: Tensor, *given: Any) -> Any:
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                waits.append(name)
            return original(tensor, *given)

        return convert

    for name in ("__float__", "__bool__", "__int__", "item", "tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, counted(name))
    model, config, device = tiny(), TrainConfig(epochs=1, precision=precision), torch.device("cpu")
    l1 = RecordingL1(model, 1.0)
    state = TrainState.create(model, config, 5, device)
    epoch = Epoch(0, config, device, "", Interruption(), EpochSums(), Sparsity(l1, from_epoch=0))
    waits.clear()
    losses = train_one_epoch(state, squared_loss, TinyLoader(5), epoch)
    # At the end of the epoch the L1 step is measured against the gradient.
    assert waits == ["tolist"] * 5 + ["__float__"]
    assert losses.keys() == {"loss/box", "loss/obj", "lr"} and epoch.so_far.steps == 5


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, "run")
    evaluations = []

    def evaluate(model: nn.Module) -> Any:
        evaluations.append(1)
        if len(evaluations) == 3:
            monkeypatch.setattr(torch, "save", full)
        return evaluation_of(0.5)

    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SlimError, match=r"last\.pt: cannot be written \(No space left on device\)"):
        train(tiny(), run, evaluate=evaluate)
    assert read_training_state(run.last)["progress"]["next_epoch"] == 2
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.pt", "last.pt"]


def test_save_that_fails_in_torch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(content: Any, path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3\nframes follow")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(SlimError, match=r"best\.pt: cannot be written \(PytorchStreamWriter failed") as caught:
        train(tiny(), RunFolder.create(tmp_path, "run"))
    assert "\n" not in str(caught.value)


def test_state_of_another_network_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    train(tiny(), run, epochs=1)
    other = tiny()
    other.head = nn.Conv2d(4, 7, 1)
    with pytest.raises(SlimError, match="does not fit this run"):
        train(other, run, epochs=2, resume_state=read_training_state(run.last))


def test_damaged_and_missing_states_are_named(tmp_path: Path) -> None:
    damaged = tmp_path / "last.pt"
    damaged.write_bytes(b"not a checkpoint")
    with pytest.raises(SlimError, match=r"last\.pt: not a readable checkpoint"):
        read_training_state(damaged)
    with pytest.raises(SlimError, match="no such file"):
        read_training_state(tmp_path / "none.pt")


def test_empty_loader_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no batch"):
        train(tiny(), RunFolder.create(tmp_path, "run"), loader=TinyLoader(batches=0))
