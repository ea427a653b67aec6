"""The slimming loop in this process: its files, its decisions, and what it says when it cannot continue."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iterate
import slim
from data import DetectionDataset
from deploy import OnnxNetwork, open_exported
from detection import candidates, loop_training
from detection import loop as loop_module
from detection.command import flat, parse
from detection.flags import IterateFlags
from detection.loop import proven_fold
from detection.network import build_network, read_network
from tests.scripts.conftest import accepting_any_ap, without_plots
from tests.scripts.runs import SMALL, Runner, one_round
from tests.scripts.test_failures import fails
from tracking import RunFolder
from tracking.journal import Journal

pytestmark = pytest.mark.usefixtures("any_ap")
ONE_ROUND = one_round()


def arguments(weights: Path, data: Path, project: Path, *more: Any) -> list[Any]:
    given = ["--weights", weights, "--data", data, *SMALL, "--recalibrate", 1, "--project", project, "--name", "loop"]
    return [*given, *more]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "pareto.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def loop(small_run: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds with recovery and fine-tuning; everything is accepted."""
    project = tmp_path_factory.mktemp("loops")
    steps = ["--rounds", 2, "--macs", 0.5, "--sparse-epochs", 2, "--recovery-epochs", 1, "--finetune-epochs", 1]
    given = arguments(small_run / "weights" / "best.pt", tiny, project, *steps, "--max-drop", 1)
    with without_plots(), accepting_any_ap():
        assert iterate.cli([str(a) for a in given]) == 0
    return project / "loop"


def test_the_loop_ends_at_the_target_with_gates_folded(loop: Path, small_run: Path) -> None:
    network = read_network(loop / "weights" / "slim.pt")
    found = slim.cost(network.model, torch.zeros(1, 3, 64, 64)).macs
    dense = slim.cost(build_network(network.build), torch.zeros(1, 3, 64, 64)).macs
    assert 0.45 * dense < found <= 0.5 * dense and not slim.gate_vectors(network.model)
    metrics = json.loads((loop / "metrics.json").read_text())
    assert metrics["macs"] == found and metrics["baseline"]["macs"] == dense
    whole = slim.Plan.from_json((loop / "plan.json").read_text())
    from_dense = slim.apply_plan(read_network(small_run / "weights" / "best.pt").model, whole)
    assert slim.layer_widths(from_dense) == slim.layer_widths(network.model), "the rounds' plans make one plan"
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = network.model.eval()(images)[0]
    assert torch.allclose(OnnxNetwork(loop / "weights" / "slim.onnx")(images), wanted, rtol=1e-4, atol=1e-3)


def test_rounding_of_folded_weights_is_no_wrong_fold(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored in float32, folded weights are rounded; in float64 they are folded anew."""
    model = read_network(small_run / "weights" / "best.pt").model
    monkeypatch.setattr(slim, "prove", functools.partial(slim.prove, tolerance=-1))
    folded, _ = proven_fold(model, torch.rand(1, 3, 64, 64))
    assert not slim.gate_vectors(folded) and "which is rounding: in float64 to" in capsys.readouterr().out


def test_every_phase_is_a_folder_and_every_candidate_a_row(loop: Path) -> None:
    per_round = ["sparse", "try1-plan", "try1-cut", "try1-recovery", "try1-evaluation"]
    phases = {f"round{number}-{phase}" for number in (1, 2) for phase in per_round}
    phases |= {"baseline", "finetune", "fold", "export", "evaluation"}
    assert {p.name for p in loop.iterdir() if (p / "phase.json").is_file()} == phases
    assert not list(loop.glob(".*.unfinished"))
    assert [(row["round"], row["attempt"]) for row in rows(loop)] == [("0", "0"), ("1", "1"), ("2", "1"), ("2", "0")]
    shares = [float(row["keep_macs"]) for row in rows(loop)]
    assert shares[0] == 1 and 0.5**0.5 - 0.05 < shares[1] <= 0.5**0.5 and 0.45 < shares[2] == shares[3] <= 0.5
    assert all(float(row["ms"]) > 0 for row in rows(loop))


def test_the_budget_of_a_round_is_what_its_cut_aims_at(loop: Path) -> None:
    dense, first, *_ = (float(row["macs"]) for row in rows(loop))
    budgets = [RunFolder(loop / f"round{number}-sparse").read_config() for number in (1, 2)]
    assert budgets[0]["keep_macs"] == pytest.approx(0.5**0.5)
    assert budgets[1]["keep_macs"] * first == pytest.approx(0.5 * dense)
    assert {config["fraction"] for config in budgets} == {None}


def test_a_loop_that_is_there_already_keeps_what_it_has(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path
) -> None:
    """The first cut, to multiples of 16, goes further than the last one is to."""
    steps = ["--rounds", 2, "--macs", 0.97, "--round-to", 16, "--sparse-epochs", 2, "--recovery-epochs", 0]
    steps += ["--finetune-epochs", 0, "--export", "none", "--max-drop", 1]
    done = script("iterate", *arguments(small_run / "weights" / "best.pt", tiny, tmp_path, *steps))
    assert done.code == 0, done.err
    _, first, second, _ = (float(row["keep_macs"]) for row in rows(tmp_path / "loop"))
    assert first == second < 0.97
    assert RunFolder(tmp_path / "loop" / "round2-sparse").read_config()["keep_macs"] == 1


def test_the_board_shows_widths_over_rounds(loop: Path) -> None:
    board = EventAccumulator(str(loop))
    board.Reload()
    assert [e.step for e in board.Scalars("channels/model.1.conv")] == [0, 1, 2]
    assert [e.step for e in board.Scalars("metrics/ap")] == [0, 1, 2]
    assert {"channels", "detections", "widths"} <= set(board.Tags()["images"])
    assert "custom_scalars__config__" in board.Tags()["tensors"]
    rounds = [json.loads((loop / f"round{k}-try1-evaluation" / "phase.json").read_text())["channels"] for k in (1, 2)]
    counts = RunFolder(loop).read_channels()
    assert list(counts) == [0, 1, 2] and [counts[1], counts[2]] == rounds
    layer = next(layer for layer in counts[0] if counts[2][layer] < counts[0][layer])
    assert [e.value for e in board.Scalars(f"channels/{layer}")] == [counts[k][layer] for k in (0, 1, 2)]
    final = json.loads((loop / "metrics.json").read_text())
    assert board.Scalars("Final/ap")[0].value == pytest.approx(final["ap"], abs=1e-7)
    assert board.Scalars("Final/ms")[0].value == pytest.approx(final["ms"])


def test_the_board_shows_each_round_as_soon_as_it_is_accepted(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    given = arguments(small_run / "weights" / "best.pt", tiny, tmp_path, *ONE_ROUND, "--max-drop", 1)
    with monkeypatch.context() as patched:
        patched.setattr(loop_module.Loop, "fold", stop)
        assert script("iterate", *given).code == 130
    for is_whole in (False, True):
        if is_whole:
            assert script("iterate", *given).code == 0
        board = EventAccumulator(str(tmp_path / "loop"))
        board.Reload()
        for tag in ("channels/model.1.conv", "metrics/ap", "cost/macs"):
            assert [e.step for e in board.Scalars(tag)] == [0, 1], "no step twice when it continued"
        assert ("Final/ap" in board.Tags()["scalars"]) == is_whole


def test_the_report_tells_of_candidates_phases_and_rounds(loop: Path) -> None:
    page = (loop / "report.html").read_text()
    titles = ["Summary", "Before and after", "Candidates", "Phases", "Widths", "Channels", "Classes", "Pictures"]
    assert re.findall("<h2>(.*)</h2>", page) == titles
    assert [f"round {number}" in page for number in (1, 2, 3)] == [True, True, False]
    assert 'href="round1-sparse/report.html"' in page and "unfinished" not in page
    inner = (loop / "round1-sparse" / "report.html").read_text()
    assert "train_sparse: round1-sparse" in inner and "unfinished" not in inner
    seconds = [float((loop / name / "seconds.txt").read_text()) for name in ("baseline", "finetune")]
    assert all(second > 0 for second in seconds)


def test_optimiser_and_average_continue_across_cuts(loop: Path) -> None:
    """Two batches an epoch: 2 sparse epochs, 1 of recovery, again, then 1 of fine-tuning."""
    taken = []
    for phase in ("round1-sparse", "round1-try1-recovery", "round2-sparse", "round2-try1-recovery", "finetune"):
        state = torch.load(loop / phase / "weights" / "last.pt", weights_only=True)["training_state"]
        taken.append(int(state["average"]["n_averaged"]))
    assert taken == [4, 6, 10, 12, 14]
    cut = torch.load(loop / "round1-try1-cut" / "pruned.pt", weights_only=True)
    weights, carried = cut["state_dict"], cut["carried_state"]
    assert all(weights[name].shape == tensor.shape for name, tensor in carried["model"].items())
    moments = [state["momentum_buffer"] for state in carried["optimizer"].values()]
    parameters = list(read_network(loop / "round1-try1-cut" / "pruned.pt").model.parameters())
    assert sorted(m.shape for m in moments) == sorted(p.shape for p in parameters)
    assert all(m.abs().sum() > 0 for m in moments if m.ndim == 4)


def test_a_finished_loop_is_only_read(
    loop: Path, small_run: Path, tiny: Path, script: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished phase ran again")

    monkeypatch.setattr(loop_training, "train_in", refuse)
    monkeypatch.setattr(loop_module, "choose_plan", refuse)
    before = {p: p.read_bytes() for p in (loop / "weights" / "slim.pt", loop / "plan.json", loop / "pareto.csv")}
    steps = ["--rounds", 2, "--macs", 0.5, "--sparse-epochs", 2, "--recovery-epochs", 1, "--finetune-epochs", 1]
    done = script("iterate", *arguments(small_run / "weights" / "best.pt", tiny, loop.parent, *steps, "--max-drop", 1))
    assert done.code == 0, done.err
    assert all(p.read_bytes() == content for p, content in before.items())
    assert f"{loop}: continued" in done.out


def test_a_rejected_cut_is_rolled_back_and_tried_half_as_far(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 1: the first cut fails, the second passes; round 2: all fail, so the loop stops at round 1's network."""
    calls: list[int] = []

    def check_drop(*_: Any) -> tuple[bool, str]:
        calls.append(1)
        return len(calls) in (2, 5), "said so"

    opened, plain_init = [], DetectionDataset.__init__

    def counting_init(self: DetectionDataset, config: Any, split: str, *more: Any, **named: Any) -> None:
        opened.append(split)
        plain_init(self, config, split, *more, **named)

    monkeypatch.setattr(DetectionDataset, "__init__", counting_init)
    monkeypatch.setattr(loop_module, "check_drop", check_drop)
    steps = ["--rounds", 2, "--macs", 0.4, "--sparse-epochs", 2, "--recovery-epochs", 0, "--finetune-epochs", 0]
    steps += ["--attempts", 2, "--export", "none"]
    done = script("iterate", *arguments(small_run / "weights" / "best.pt", tiny, tmp_path, *steps))
    assert done.code == 0, done.err
    found = rows(tmp_path / "loop")
    assert [(row["round"], row["attempt"], row["accepted"]) for row in found] == [
        ("0", "0", "True"),
        ("1", "1", "False"),
        ("1", "2", "True"),
        ("2", "1", "False"),
        ("2", "2", "False"),
        ("1", "0", "True"),
    ]
    shares = [float(row["keep_macs"]) for row in found]
    assert shares[1] == pytest.approx(0.4**0.5, abs=0.03) and shares[2] == pytest.approx(0.4**0.25, abs=0.03)
    assert shares[3] == pytest.approx(0.4, abs=0.03) and shares[4] == pytest.approx((shares[2] * 0.4) ** 0.5, abs=0.03)
    assert shares[5] == shares[2]
    assert "no cut was accepted; the loop stops at" in done.out
    assert opened.count("val") == 1, "two trainings and four cuts evaluate on it"
    kept = slim.cost(read_network(tmp_path / "loop" / "weights" / "slim.pt").model, torch.zeros(1, 3, 64, 64)).macs
    assert kept == int(found[2]["macs"])


def test_a_loop_without_an_accepted_cut_fails_in_one_line_and_keeps_its_candidates(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "check_drop", lambda *_: (False, "too bad"))
    given = arguments(small_run / "weights" / "best.pt", tiny, tmp_path, *ONE_ROUND, "--attempts", 1)
    done = script("iterate", *given)
    assert done.code == 1 and done.err.count("\n") == 1 and "not one cut kept AP within --max-drop 0.02" in done.err
    assert [row["accepted"] for row in rows(tmp_path / "loop")] == ["True", "False"]


@pytest.fixture
def begun(small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A loop on a data set of its own that failed after its sparse training; its data.yaml lies beside it."""
    data = tmp_path / "data"
    shutil.copytree(tiny.parent / "tiny", data)
    text = tiny.read_text().replace(str(tiny.parent / "tiny"), str(data))
    (tmp_path / "own.yaml").write_text(text)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "choose_plan", stop)
        done = script(
            "iterate", *arguments(small_run / "weights" / "best.pt", tmp_path / "own.yaml", tmp_path, *ONE_ROUND)
        )
    assert done.code == 130 and "the same command continues" in done.err
    assert (tmp_path / "loop" / "round1-sparse").is_dir()
    return tmp_path


def again(begun: Path, small_run: Path, script: Runner, *more: Any) -> Any:
    weights = small_run / "weights" / "best.pt"
    return script("iterate", *arguments(weights, begun / "own.yaml", begun, *ONE_ROUND, "--max-drop", 1, *more))


def test_labels_that_changed_between_two_starts_are_named(begun: Path, small_run: Path, script: Runner) -> None:
    label = next((begun / "data" / "labels" / "val").glob("*.txt"))
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    weights = small_run / "weights" / "best.pt"
    done = script("iterate", *arguments(weights, begun / "own.yaml", begun, *ONE_ROUND))
    assert done.code == 1 and done.err.count("\n") == 1
    assert "begun with other settings or data (data:" in done.err and "choose another --name" in done.err
    assert (begun / "loop" / "round1-sparse" / "phase.json").is_file()


def test_other_settings_begin_another_loop(begun: Path, small_run: Path, script: Runner) -> None:
    done = again(begun, small_run, script, "--seed", 1, "--export", "openvino")
    assert done.code == 0, done.err
    assert open_exported(begun / "loop2" / "weights" / "slim.xml").engine == "openvino"
    assert (begun / "loop2" / "weights" / "slim.pt").is_file() and not (begun / "loop" / "pareto.csv").exists()


def test_a_loop_of_another_name_is_not_continued(tmp_path: Path) -> None:
    """a12 may be the twelfth folder of a loop a1, or the first of a loop a12."""
    (tmp_path / "w.pt").write_bytes(b"")

    def opened(name: str, seed: int) -> RunFolder:
        words = ["--weights", tmp_path / "w.pt", "--project", tmp_path / "runs", "--name", name, "--seed", seed]
        flags = parse(IterateFlags, "", [str(word) for word in words])
        run, opening = loop_module.open_loop(flags, {"train": "x", "val": "y"})
        Journal(run.path, opening)
        run.write_config(flat(flags))
        return run

    assert [opened("a1", 0).path.name, opened("a12", 1).path.name] == ["a1", "a12"]
    assert opened("a1", 1).path.name == "a13"
    assert [opened("a1", 1).path.name, opened("a1", 0).path.name, opened("a12", 1).path.name] == ["a13", "a1", "a12"]


def test_a_second_process_on_the_same_run_is_refused(begun: Path, small_run: Path, script: Runner) -> None:
    with RunFolder(begun / "loop").held():
        weights = small_run / "weights" / "best.pt"
        done = script("iterate", *arguments(weights, begun / "own.yaml", begun, *ONE_ROUND))
    assert done.code == 1 and done.err.count("\n") == 1 and "in use by another process" in done.err


def test_a_damaged_phase_is_named_with_its_remedy(begun: Path, small_run: Path, script: Runner) -> None:
    result = begun / "loop" / "round1-sparse" / "phase.json"
    result.write_text("{half")
    weights = small_run / "weights" / "best.pt"
    done = script("iterate", *arguments(weights, begun / "own.yaml", begun, *ONE_ROUND))
    assert done.code == 1 and f"remove the folder {result.parent} to run it again" in done.err


def test_a_damaged_network_is_not_copied_over_the_good_one(
    loop: Path, small_run: Path, tiny: Path, script: Runner
) -> None:
    good, made = loop / "weights" / "slim.pt", loop / "fold" / "slim.pt"
    whole = made.read_bytes()
    assert good.read_bytes() == whole
    made.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    steps = ["--rounds", 2, "--macs", 0.5, "--sparse-epochs", 2, "--recovery-epochs", 1, "--finetune-epochs", 1]
    weights = small_run / "weights" / "best.pt"
    done = script("iterate", *arguments(weights, tiny, loop.parent, *steps, "--max-drop", 1))
    made.write_bytes(whole)
    assert done.code == 1 and done.err.count("\n") == 1 and f"{made}: is not what the phase wrote" in done.err, done.err
    assert good.read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", 0], "--rounds 0: expected at least 1"),
        (["--macs", 0], "--macs 0: expected above 0 to 1"),
        (["--attempts", 0], "--attempts 0: expected at least 1"),
        (
            ["--max-drop", "5"],
            "--max-drop 5.0: expected an AP from 0 to 1 such as 0.02, or a share of the dense AP such as 5%",
        ),
        (["--max-drop", "100%"], "--max-drop 100%: expected an AP from 0 to 1"),
        (["--max-drop", "little"], "--max-drop little: expected an AP from 0 to 1"),
        (["--keep-macs", 0.5], "--keep-macs: each round's follows from --macs"),
        (["--train", "learning-rate=1"], "learning-rate"),
        (["--train", "lr"], "lr: expected name=value"),
    ],
)
def test_impossible_settings_are_refused(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, flags: list[Any], words: str
) -> None:
    done = script("iterate", *arguments(small_run / "weights" / "best.pt", tiny, tmp_path, *ONE_ROUND, *flags))
    assert done.code == 1 and done.err.count("\n") == 1 and words in done.err


def test_a_drop_to_nothing_is_refused_before_the_first_training(
    small_run: Path, tiny: Path, script: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = small_run / "weights" / "best.pt"
    monkeypatch.setattr(candidates, "LEAST_AP", 0.01)
    given = arguments(weights, tiny, tmp_path, *ONE_ROUND)
    fails(script("iterate", *given), f"{weights}: AP 0.", "expected at least 0.01: nothing to slim; train it")
    monkeypatch.setattr(candidates, "LEAST_AP", 0.0)
    done = script("iterate", *given, "--max-drop", 0.5)
    fails(done, "--max-drop 0.5: the dense network's AP is 0.", "a share of that AP such as 5%")
    assert not list(tmp_path.glob("*/round1-sparse"))
