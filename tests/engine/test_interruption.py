from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Sparsity, TrainConfig, fit, read_training_state
from engine.interruption import Interruption
from tests.engine.test_training import assert_same, tiny
from tests.engine.tiny_detector import TinyDetector, TinyLoader, budget_l1, save, squared_loss, weight_sum
from tracking import RunFolder


def train(model: TinyDetector, run: RunFolder, loss_fn: Any = squared_loss, rank_every: int = 1, **options: Any) -> Any:
    sparsity = Sparsity(budget_l1(model, 8, rank_every=rank_every), from_epoch=1)
    common: dict[str, Any] = {"config": TrainConfig(epochs=3), "evaluate": weight_sum, "save": save, "device": "cpu"}
    return fit(model, loss_fn, TinyLoader(4), run=run, sparsity=sparsity, **{**common, **options})


@pytest.mark.parametrize("rank_every", [1, 3])
@pytest.mark.parametrize(("signal_number", "at_step"), [(signal.SIGINT, 6), (signal.SIGTERM, 2), (signal.SIGINT, 12)])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_run_continues_bit_for_bit(
    tmp_path: Path, signal_number: int, at_step: int, rank_every: int
) -> None:
    whole, whole_run = tiny(), RunFolder.create(tmp_path, "whole")
    train(whole, whole_run, rank_every=rank_every)

    steps = []

    def signalled(outputs: Any, targets: Tensor, images: Tensor) -> Any:
        steps.append(1)
        if len(steps) == at_step:
            os.kill(os.getpid(), signal_number)
        return squared_loss(outputs, targets, images)

    run = RunFolder.create(tmp_path, "parts")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=f"stopped after batch {(at_step - 1) % 4 + 1} of epoch {(at_step - 1) // 4}"
    ):
        train(tiny(), run, signalled, rank_every)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(steps) == at_step
    state = read_training_state(run.last)
    progress, (epoch, batch) = state["progress"], divmod(at_step - 1, 4)
    assert (progress["next_epoch"], progress["so_far"]["batches"]) == (epoch, batch + 1)
    resumed = tiny(seed=9)
    train(resumed, run, rank_every=rank_every, resume_state=state)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(read_training_state(run.last), read_training_state(whole_run.last))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.read_rows()] for r in (run, whole_run)]
    assert rows[0] == rows[1]


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path: Path) -> None:
    whole, run = tiny(), RunFolder.create(tmp_path, "run")

    def signalled(model: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return weight_sum(model)

    config = TrainConfig(epochs=2, eval_every=9)
    with pytest.raises(KeyboardInterrupt, match="stopped after the last epoch; the state is in"):
        train(whole, run, config=config, evaluate=signalled)
    state, resumed = read_training_state(run.last), tiny(seed=9)
    assert train(resumed, run, config=config, resume_state=state).epochs == 2
    assert_same(resumed.state_dict(), whole.state_dict())


def test_the_second_signal_leaves_at_once() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_other_threads_train_without_handlers() -> None:
    seen: list[bool] = []

    def work() -> None:
        with Interruption() as interruption:
            seen.append(interruption.wanted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_importance_and_choice_travel_with_the_run(tmp_path: Path) -> None:
    model, run = tiny(), RunFolder.create(tmp_path, "run")
    train(model, run)
    state = read_training_state(run.last)["pull"]
    assert (state["strength"], state["steps"]) == (99.0, 8) and float(state["importance"]["conv"].min()) > 0
    assert torch.equal(model.gate_vector == 0, state["chosen"]) and int(state["chosen"].sum()) == 2
