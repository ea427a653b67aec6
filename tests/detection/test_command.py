"""Command lines: what scripts take, how it is read, and what is said of mistakes.

``python -m tests.detection.test_command`` writes command_lines.txt anew.
"""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

from detection.command import CommandError, as_words, flags_of, flat, one_line, parse, run_script, with_pairs
from detection.flags import (
    BenchmarkFlags,
    DetectFlags,
    ExportFlags,
    FinetuneFlags,
    IterateFlags,
    PruneFlags,
    SparseFlags,
    TrainFlags,
    ValFlags,
)
from models import LossGains
from slim import SlimError

ROOT = Path(__file__).resolve().parents[2]
LINES = Path(__file__).with_name("command_lines.txt")
SCRIPTS = {
    "train_sparse": SparseFlags,
    "prune": PruneFlags,
    "finetune": FinetuneFlags,
    "iterate": IterateFlags,
    "val": ValFlags,
    "export": ExportFlags,
    "detect": DetectFlags,
    "benchmark": BenchmarkFlags,
}


def command_lines() -> str:
    """Each script's flags with their types and defaults."""
    text = []
    for script, kind in SCRIPTS.items():
        text.append(f"{script}.py")
        for name, flag in sorted(flags_of(kind()).items()):
            told = flag.kind.__name__ if isinstance(flag.kind, type) else str(flag.kind).replace("typing.", "")
            text.append(f"    --{name.replace('_', '-')}  {told}  {flag.default!r}")
    return "\n".join(text) + "\n"


def test_no_flag_type_or_default_changes_by_accident() -> None:
    assert command_lines() == LINES.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--help"], ["--nonsense", "3"]])
def test_a_command_line_is_read_before_torch_is_imported(script: str, words: list[str]) -> None:
    code = (
        "import importlib, sys\n"
        "try:\n"
        f"    code = importlib.import_module({script!r}).cli({words!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "heavy = {'torch', 'numpy', 'torchvision', 'slim'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if words == ["--help"] else 1), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    if words == ["--help"]:
        assert "Run folder:" in done.stdout and "--project" in done.stdout
    else:
        assert done.stderr == "error: --nonsense: unknown flag; --help lists the flags\n"


def test_help_is_grouped_under_what_is_configured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(SparseFlags, "What it does.", ["--help"])
    text = capsys.readouterr().out
    titles = [
        "Network:",
        "Data set:",
        "Optimiser and learning rate:",
        "Loss:",
        "Distillation:",
        "Gates and the L1 step:",
    ]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    section = text[text.index("\nOptimiser and learning rate:\n") : text.index("\nLoss:\n")]
    assert "--lr X" in section and "learning rate after the warm-up (default: 0.01)" in section
    assert "--box" not in section and "%" not in section


@dataclass(frozen=True)
class Inner:
    """Inner."""

    size: Annotated[int, "a size"] = 1
    mode: Annotated[Literal["auto"] | float, "auto or a number"] = "auto"
    hidden: int = 5


@dataclass(frozen=True)
class Outer:
    """Outer."""

    switch: Annotated[bool, "a switch"] = False
    many: Annotated[tuple[int | str, ...], "some"] = (1,)
    inner: Inner = Inner(size=2)
    second: Annotated[Inner, "second_"] = Inner()


def test_nested_settings_are_flat_flags() -> None:
    assert list(flags_of(Outer())) == ["switch", "many", "size", "mode", "second_size", "second_mode"]
    assert parse(Outer, "", []) == Outer()
    words = ["--switch", "--many", "3", "a", "--size", "4", "--mode", "0.5", "--second-mode", "AUTO", "--second-size=7"]
    assert parse(Outer, "", words) == Outer(True, (3, "a"), Inner(4, 0.5), Inner(7))
    assert parse(Outer, "", as_words(flat(parse(Outer, "", words)))) == parse(Outer, "", words)


def test_two_flags_of_one_name_are_a_defect() -> None:
    @dataclass(frozen=True)
    class Clash:
        """Clash."""

        first: Inner = Inner()
        second: Inner = Inner()

    with pytest.raises(AssertionError, match="size"):
        flags_of(Clash())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imgz", "64"], "--imgz: unknown flag; did you mean --imgsz"),
        (["--epo", "3"], "--epo: unknown flag; did you mean --epochs"),
        (["--learning-rte", "3"], "--learning-rte: unknown flag; --help lists the flags"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--epochs", "1.5"], "--epochs 1.5: expected a whole number"),
        (["--strength", "big"], "--strength big: expected a number or auto"),
        (["--tie", "all"], "--tie all: expected group or layer"),
        (["--select", "half"], "--select half: expected budget or vector or all;"),
        (["--keep-macs", "0"], "--keep-macs 0: expected above 0 to 1;"),
        (["--fraction", "1.5"], "--fraction 1.5: expected 0 to 1; --help"),
        (["--keep-macs", "30"], "--keep-macs 30: expected above 0 to 1; 30 % is 0.3; --help"),
        (["--keep-macs", "12.5%"], "--keep-macs 12.5%: expected a number; 12.5 % is 0.125; --help"),
        (["--keep-macs", "300"], "--keep-macs 300: expected above 0 to 1; --help"),
        (["--min-keep", "25"], "--min-keep 25: expected 0 to 1; 25 % is 0.25;"),
        (["--epochs", "0"], "--epochs 0: expected at least 1; --help"),
        (["--degrees", "300"], "--degrees 300: expected 0 to 180; --help"),
        (["--travel", "0"], "--travel 0: expected above 0;"),
        (["--sparse-from", "-1"], "--sparse-from -1: expected at least 0;"),
        (["--lr"], "--lr expected one argument"),
        (["--lr", "0"], "--lr 0: expected above 0;"),
        (["--lr", "inf"], "--lr inf: expected above 0;"),
        (["--momentum", "1"], "--momentum 1: expected 0 to below 1;"),
        (["--final-lr-ratio", "2"], "--final-lr-ratio 2: expected 0 to 1;"),
        (["--weight-decay", "-1"], "--weight-decay -1: expected at least 0;"),
        (["--clip-norm", "0"], "--clip-norm 0: expected above 0 to inf;"),
        (["--epochs", "0"], "--epochs 0: expected at least 1;"),
        (["--optimizer", "lion"], "--optimizer lion: expected sgd or adamw"),
        (["--schedule", "step"], "--schedule step: expected linear or cosine"),
        (["--precision", "int8"], "--precision int8: expected auto or float32"),
        (["--fliplr", "1.5"], "--fliplr 1.5: expected 0 to 1;"),
        (["--scale", "1"], "--scale 1: expected 0 to below 1;"),
        (["--shear", "90"], "--shear 90: expected 0 to below 90;"),
        (["--degrees", "-3"], "--degrees -3: expected 0 to 180;"),
        (["--mosaic", "nan"], "--mosaic nan: expected 0 to 1;"),
        (["--label-smoothing", "2"], "--label-smoothing 2: expected 0 to 1;"),
        *((["--distill-cls", value], f"--distill-cls {value}: expected at least 0;") for value in ("-1", "nan", "inf")),
        (["64"], "unrecognized arguments: 64"),
        (["--config", "none.yaml"], "none.yaml: cannot be read as YAML (No such file or directory)"),
    ],
)
def test_mistakes_name_the_flag_the_value_and_what_was_expected(words: list[str], message: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse(SparseFlags, "", words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_limits_of_ranges_are_taken_where_they_belong_to_them() -> None:
    words = ["--clip-norm", "inf", "--momentum", "0", "--final-lr-ratio", "1", "--degrees", "180", "--epochs", "1"]
    found = parse(SparseFlags, "", [*words, "--sparse-from", "0", "--strength", "auto"])
    optim = found.training.optim
    assert (optim.clip_norm, optim.momentum, optim.final_lr_ratio) == (float("inf"), 0.0, 1.0)
    assert found.augment.degrees == 180 and found.training.epochs == 1


def test_mistakes_in_files_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for content, message in (
        ("epochz: 3", "--epochz: unknown flag; did you mean --epochs"),
        ("lr: fast", "--lr fast: expected a number"),
        ("lr: -0.5", "--lr -0.5: expected above 0"),
        ("- 3", "expected a YAML file of names and values"),
        ("a: [", "cannot be read as YAML"),
        ("a: &a [1, 2]\nb: *a", "it has aliases"),
        ("[" * 5000, "cannot be read as YAML"),
    ):
        file.write_text(content)
        with pytest.raises(CommandError) as caught:
            parse(TrainFlags, "", ["--config", str(file)])
        assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)


def test_the_command_line_wins_over_files_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 0.2\nepochs: 7\nrect: true\nnoautoanchor: true\nfreeze: [3, model.1.*]\n")
    words = ["--lr", "0.5", "--config", str(tmp_path / "c.yaml"), "--no-rect"]
    found = parse(TrainFlags, "", words)
    assert found.training.optim.lr == 0.5 and found.training.epochs == 7
    assert found.rect is False and found.network.noautoanchor is True and found.network.freeze == ("3", "model.1.*")
    assert parse(TrainFlags, "", ["--config", str(tmp_path / "c.yaml")]).rect is True
    assert found.given == {"lr", "epochs", "rect", "noautoanchor", "freeze"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_config_yaml_holds_makes_the_same_settings(script: str, tmp_path: Path) -> None:
    kind = SCRIPTS[script]
    for flag in [name for name, flag in flags_of(kind()).items() if flag.kind is bool]:
        assert flat(parse(kind, "", [f"--{flag.replace('_', '-')}", f"--no-{flag.replace('_', '-')}"]))[flag] is False
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(as_plain(flat(kind()))))
    assert flat(parse(kind, "", ["--config", str(file)])) == flat(kind())


def as_plain(values: dict[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def test_keys_of_older_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pull_from: 2\nresume: true\ndebug: true\nfraction: 0.5\nclosed_share: null\n")
    found = parse(SparseFlags, "", ["--config", str(tmp_path / "c.yaml")])
    assert found.sparsity.sparse_from == 2 and found.resume == ""
    assert not found.sparsity.has_budget, "such a run shrank the smallest half"
    (tmp_path / "c.yaml").write_text("closed_share: 0.3\n")
    with pytest.raises(CommandError, match="--closed-share: unknown flag"):
        parse(SparseFlags, "", ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("cost_aware: false\nrounds: 2\n")
    assert parse(IterateFlags, "", ["--config", str(tmp_path / "c.yaml")]).rounds == 2
    (tmp_path / "c.yaml").write_text("cost_aware: true\n")
    assert parse(PruneFlags, "", ["--config", str(tmp_path / "c.yaml")]).score.cost_aware
    with pytest.raises(CommandError, match="--cost-aware: unknown flag"):
        parse(IterateFlags, "", ["--config", str(tmp_path / "c.yaml")])


def test_spellings_of_yolov5_are_taken() -> None:
    assert parse(FinetuneFlags, "", ["--noval", "--save-period", "-1"]).training.eval_every == 0
    assert parse(FinetuneFlags, "", ["--resume", "--save-period", "5"]).resume == "newest"
    assert parse(SparseFlags, "", ["--resume", "runs/sparse/exp"]).resume == "runs/sparse/exp"
    words = [
        "--imgsz",
        "64",
        "--batch",
        "4",
        "--lr0",
        "0.1",
        "--lrf",
        "0.2",
        "--cos-lr",
        "--optimizer",
        "AdamW",
        "--cache",
    ]
    found = parse(SparseFlags, "", [*words, "--pull-from", "5", "--device", "0"])
    optim = found.training.optim
    assert (found.img, found.loading.batch_size, found.loading.cache, found.device) == (64, 4, "ram", "0")
    assert (optim.lr, optim.final_lr_ratio, optim.schedule, optim.optimizer) == (0.1, 0.2, "cosine", "adamw")
    assert found.sparsity.sparse_from == 5
    assert parse(FinetuneFlags, "", ["--img-size", "96", "--optimizer", "SGD"]).img == 96
    val = parse(ValFlags, "", ["--conf-thres", "0.1", "--iou-thres", "0.2", "--task", "test", "--max-det", "9"])
    assert (val.nms.conf, val.nms.iou, val.nms.max_det, val.split) == (0.1, 0.2, 9, "test")
    detect = parse(DetectFlags, "", ["--agnostic-nms", "--save-txt", "--max-det", "7"])
    assert detect.agnostic_nms and detect.text.save_txt and detect.nms.max_det == 7


HYP = """
lr0: 0.02
lrf: 0.1
momentum: 0.9
warmup_bias_lr: 0.1
box: 0.04
cls_pw: 0.8
anchor_t: 3.5
hsv_h: 0.02
fliplr: 0.25
copy_paste: 0.0
"""


def test_a_hyp_file_of_yolov5_is_translated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hyp.yaml"
    file.write_text(HYP)
    found = parse(FinetuneFlags, "", ["--momentum", "0.8", "--hyp", str(file)])
    optim = found.training.optim
    assert (optim.lr, optim.final_lr_ratio, optim.momentum) == (0.02, 0.1, 0.8), "the command line wins"
    assert found.gains == LossGains(box=0.04, cls_pw=0.8, anchor_t=3.5)
    assert found.augment.hsv_h == 0.02 and found.augment.fliplr == 0.25
    assert capsys.readouterr().out == f"{file}: not used: warmup_bias_lr, copy_paste\n"
    assert "hyp" not in flat(found) and flat(found)["lr"] == 0.02
    assert with_pairs(FinetuneFlags(), [f"hyp={file}", "box=0.1"]).gains.box == 0.1
    with pytest.raises(CommandError, match="--hyp: unknown flag"):
        parse(PruneFlags, "", ["--hyp", str(file)])


def test_pairs() -> None:
    found = with_pairs(TrainFlags(), ["lr=0.5", "rect=true", "freeze=1,2", "cos-lr=true"])
    assert found.training.optim.lr == 0.5 and found.rect and found.network.freeze == ("1", "2")
    assert found.training.optim.schedule == "cosine"
    assert with_pairs(found, ["rect=false"]).rect is False
    for pair, message in (("lr", "lr: expected name=value"), ("lrr=1", "unknown flag; did you mean --lr")):
        with pytest.raises(CommandError, match=message):
            with_pairs(TrainFlags(), [pair])


def test_only_the_user_s_mistakes_pass_for_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(SlimError("model.yaml: no such\nfile")) == "model.yaml: no such file"
    assert one_line(FileNotFoundError(2, "No such file", "a.txt")) == "[Errno 2] No such file: 'a.txt'"

    def act(flags: ValFlags) -> None:
        list(zip([1], [1, 2], strict=True))

    assert run_script(ValFlags, act, "", []) == 1
    told = capsys.readouterr().err
    assert told == (
        "error: a defect of this program, please report: ValueError: zip() argument 2 is longer than argument 1; "
        "--debug prints the traceback\n"
    )
    assert run_script(ValFlags, act, "", ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_script_is_thin_and_has_a_description() -> None:
    for script in SCRIPTS:
        assert importlib.import_module(script).__doc__


if __name__ == "__main__":
    LINES.write_text(command_lines(), encoding="utf-8")
