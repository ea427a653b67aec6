"""Reports from hand-made run folders: what they say, that they are safe, and that nothing brings them down."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from detection.candidates import Candidate, write_pareto
from slim import SlimError
from tracking import METRIC_KEYS, RunFolder, plots, summarise_gates, write_report
from tracking.journal import Journal
from tracking.report.__main__ import cli
from tracking.report.markdown import escape

NASTY = '<b>&"x"</b> |`$a$`'
METRICS: dict[str, Any] = dict.fromkeys(METRIC_KEYS, 0.5) | {
    "per_class": {NASTY: 0.25, "cat": 0.75},
    "macs": 30_000_000,
    "params": 1_500_000,
    "images": 7,
}


class Page(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def made_run(path: Path, script: str | None = "finetune.py", **files: Any) -> RunFolder:
    """A run folder of a configuration, metrics and further files by name (text, or a table's rows)."""
    run = RunFolder.create(path.parent, path.name)
    run.write_config({"img": 64, "data": "d.yaml", "weights": "", "epochs": 2, **files.pop("config", {})}, script)
    run.metrics_file.write_text(json.dumps({**METRICS, **files.pop("metrics", {})}))
    for name, content in files.items():
        (run.path / name.replace("_csv", ".csv")).write_text(content if isinstance(content, str) else as_csv(content))
    return run


def as_csv(rows: list[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)] + [",".join(str(row.get(column, "")) for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def cut_metrics(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    return {
        "before": {"params": 2_000_000, "macs": 60_000_000, "channels": dict(before)},
        "after": {"params": 1_500_000, "macs": 30_000_000, "channels": dict(after)},
    }


@dataclass(frozen=True)
class Report:
    """report.md taken apart: the text under each title, the rows of its tables by column, and what could not be shown."""

    sections: dict[str, str]

    @classmethod
    def of(cls, run: RunFolder) -> Report:
        text = (write_report(run).parent / "report.md").read_text()
        return cls(dict(part.split("\n", 1) for part in text.split("\n## ")[1:]))

    @property
    def problems(self) -> list[str]:
        return [line.removeprefix("- ") for line in self.sections.get("Not shown", "").strip().splitlines()]

    def rows(self, title: str) -> list[list[str]]:
        """The cells of a section's table, its titles first."""
        lines = [line for line in self.sections[title].splitlines() if line.startswith("| ")]
        rows = [re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]
        return [rows[0], *rows[2:]]


EPOCHS = [
    {"epoch": 0, "loss/box": 0.5, "lr": 0.01, "metrics/ap": "", "gates/closed_share": 0.0, "seconds": 2.0},
    {"epoch": 1, "loss/box": 0.25, "lr": 0.005, "metrics/ap": 0.5, "gates/closed_share": 0.5, "seconds": 3.0},
]


def test_names_are_shown_as_they_are_and_never_as_markup(tmp_path: Path) -> None:
    layers = {NASTY: 16, "model.1.conv": 32}
    gates = summarise_gates({NASTY: torch.tensor([0.0, 1.0])})
    metrics = {**cut_metrics(layers, {NASTY: 8, "model.1.conv": 24}), "gates": gates}
    epochs = [{**EPOCHS[0], 'loss/"><script>$x$': 1.0}]
    run = made_run(tmp_path / NASTY.replace("/", ""), "prune.py", metrics=metrics, results_csv=epochs)
    html = write_report(run).read_text()
    page = Page(html)
    assert not {"b", "script", "x"} & {tag for tag, _ in page.tags}
    assert page.texts.count(NASTY) == 3, "as a class, a layer and a group of gates"
    markdown = re.sub("^```.*?^```", "", (run.path / "report.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "<b>" not in markdown and "<script>" not in markdown
    escaped = r'&lt;b&gt;&amp;"x"&lt;/b&gt; \|\`\$a\$\`'
    assert f"| {escaped} | ███░░░ 50.0% | 16 | 8 |" in markdown
    assert "| model.1.conv | █████████░░░ 75.0% | 32 | 24 |" in markdown


def test_markdown_escapes_what_would_format() -> None:
    assert escape("a_b _c_ *d* [e](f)\n# g") == r"a_b \_c\_ \*d\* \[e\](f) # g"


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"round": k, "attempt": 1, "macs": 10, "ap": 0.5, "ms": 3.0, "accepted": True} for k in (0, 1)]
    gates = summarise_gates({"g": torch.linspace(0, 1, 50)})
    run = made_run(tmp_path / "r", results_csv=EPOCHS, pareto_csv=rows, metrics={"gates": gates})
    first = write_report(run).read_bytes(), (run.path / "report.md").read_bytes()
    assert (write_report(run).read_bytes(), (run.path / "report.md").read_bytes()) == first
    assert first[0].count(b"data:image/png;base64,") == 3, "candidates, gates and curves"


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a ü%b", results_csv=EPOCHS)
    Image.new("RGB", (30, 20), "red").save(run.path / "detections.png")
    page = Page(write_report(run).read_text())
    loads = [
        a.get("src") or a.get("href") or "" for tag, a in page.tags if tag in ("img", "link", "script", "iframe", "use")
    ]
    assert len([src for src in loads if src.startswith("data:image/png;base64,")]) == 2
    assert all(src.startswith(("data:", "#")) or not src for src in loads)
    assert not re.search(r"url\((?!#)|@import", "".join(page.texts) + str(page.tags))


def test_figures_of_a_cut(tmp_path: Path) -> None:
    widths = cut_metrics({"a": 16, "b": 64}, {"a": 16, "b": 32})
    metrics = {**widths, "masked_ap": 0.51, "masked_ap50": 0.6, "max_difference": 3e-7}
    run = made_run(tmp_path / "cut", "prune.py", metrics=metrics, config={"criterion": "gate"})
    report = Report.of(run)
    assert report.rows("Widths") == [
        ["layer", "channels kept", "before", "after"],
        ["a", "███ 100.0%", "16", "16"],
        ["b", "██████░░░░░░ 50.0%", "64", "32"],
        ["all layers", "60.0%", "80", "48"],
    ]
    titles, *steps = report.rows("Before and after")
    assert [row[0] for row in steps] == ["before", "masked", "this run (cut)"]
    share = titles.index("share")
    assert [row[share - 1 : share + 1] for row in steps] == [["60.0", "100.0%"], ["60.0", "100.0%"], ["30.0", "50.0%"]]
    assert "criterion gate" in report.sections["Summary"] and report.problems == []


def test_the_way_here_is_told_from_the_weights(tmp_path: Path) -> None:
    dense = made_run(tmp_path / "dense", metrics={"ap": 0.6, "per_class": {"cat": 0.9}, "macs": 60_000_000})
    cut = made_run(
        tmp_path / "cut", "prune.py", metrics=cut_metrics({"a": 8}, {"a": 4}), config={"weights": str(dense.last)}
    )
    tuned = made_run(tmp_path / "tuned", config={"weights": str(cut.path / "weights" / "pruned.pt")})
    report = Report.of(tuned)
    steps = report.rows("Before and after")[1:]
    assert [row[0] for row in steps] == ["dense (finetune)", "cut (prune)", "this run (tuned)"]
    assert [row[2] for row in steps] == ["", "-0.1000", "-0.1000"]
    assert report.rows("Widths")[1][2:] == ["8", "4"]
    assert {row[0]: row[3] for row in report.rows("Classes")[1:]} == {escape(NASTY): "", "cat": "-0.1500"}
    elsewhere = made_run(tmp_path / "test", "val.py", config={"weights": str(tuned.last), "split": "test"})
    assert "change" not in Report.of(elsewhere).rows("Before and after")[0], "APs of another split do not compare"
    made_run(tmp_path / "a", config={"weights": str(tmp_path / "b" / "weights" / "last.pt")})
    b = made_run(tmp_path / "b", config={"weights": str(tmp_path / "a" / "weights" / "last.pt")})
    assert len(Report.of(b).rows("Before and after")[1:]) == 2, "a circle is gone round once"


def loop_run(path: Path) -> RunFolder:
    """Two rounds; the second has a rejected attempt and an accepted one."""
    rows = [
        (0, 0, 1.0, 60_000_000, 2_000_000, 0.6, 0.8, "cat", 0.5, 10.0, True, "the dense network", "baseline"),
        (1, 1, 0.7, 42_000_000, 1_500_000, 0.61, 0.8, "cat", 0.5, 8.0, True, "", "round1-try1-recovery"),
        (2, 1, 0.3, 18_000_000, 900_000, 0.5, 0.7, "dog", 0.2, 5.0, False, f"{NASTY} lost", "round2-try1-cut"),
        (2, 2, 0.5, 30_000_000, 1_000_000, 0.58, 0.8, "cat", 0.5, 6.0, True, "", "round2-try2-cut"),
        (2, 0, 0.5, 30_000_000, 1_000_000, 0.59, 0.8, "cat", 0.5, 6.0, True, "", "fold"),
    ]
    dense = {"ap": 0.6, "macs": 60_000_000, "params": 2_000_000, "ms": 10.0, "channels": {"a": 16}}
    metrics = {"ap": 0.59, "ms": 6.0, "baseline": dense}
    run = made_run(path, "iterate.py", config={"macs": 0.5}, metrics=metrics)
    write_pareto([Candidate(*row) for row in rows], run.path / "pareto.csv")
    journal = Journal(run.path, {})
    made_run(path / "round1-try1-recovery", metrics={"seconds": 100.0})
    write_report(RunFolder(path / "round1-try1-recovery"))
    found = {
        "evaluation": {"channels": {"a": 8}},
        "round2-try1-evaluation": {"channels": {"a": 4}},
        "round2-try2-cut": {"pruned_ap": 0.55, "max_difference": 1e-7},
        "round2-try2-evaluation": {"channels": {"a": 8}, "ap": 0.58},
        "round1-try1-evaluation": {"channels": {"a": 12}, "ap": 0.61},
        "round1-sparse": {"ap": 0.4, "closed_share": 0.5},
        "baseline": dense,
    }
    for name, result in found.items():
        journal.phase(name, lambda work, result=result: result)
        (path / name / "seconds.txt").write_text("1.5\n")
    return run


def test_loop_shows_candidates_phases_and_channels_over_rounds(tmp_path: Path) -> None:
    report = Report.of(loop_run(tmp_path / "loop"))
    assert report.problems == []
    found = [(row[0], row[1], row[-1]) for row in report.rows("Candidates")[1:]]
    assert found == [
        ("dense", "0.6000", "baseline"),
        ("[1.1](round1-try1-recovery/report.html)", "0.6100", "accepted"),  # where the run has a report
        ("2.1", "0.5000", f"rejected: {escape(NASTY)} lost"),
        ("2.2", "0.5800", "accepted"),
        ("final", "0.5900", "accepted"),
    ]
    assert [(row[0], row[1], row[-2], row[-1]) for row in report.rows("Phases")[1:]] == [
        ("baseline", "0.6000", "–", "1.5"),
        ("round1-sparse", "0.4000", "50.0%", "1.5"),
        ("round1-try1-evaluation", "0.6100", "–", "1.5"),
        ("round2-try1-evaluation", "–", "–", "1.5"),
        ("round2-try2-cut", "0.5500", "–", "1.5"),
        ("round2-try2-evaluation", "0.5800", "–", "1.5"),
        ("evaluation", "–", "–", "1.5"),
    ]
    titles, first = report.rows("Widths")[:2]
    assert titles[2:] == ["before", "round 1", "round 2"] and first[2:] == ["16", "12", "8"]
    steps = report.rows("Before and after")[1:]
    assert [row[0] for row in steps] == ["dense", "this run (loop)"] and steps[1][2] == "-0.0100"
    assert "1.67 times as fast" in report.sections["Summary"]


def test_the_chart_of_candidates_names_each_in_both_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def draw(path: Path, inches: tuple[float, float], draw_on: Callable[[Figure], None]) -> Path:
        drawn.append(Figure(figsize=inches))
        draw_on(drawn[0])
        return path

    monkeypatch.setattr(plots, "save_figure", draw)
    write_report(loop_run(tmp_path / "loop"))
    axes = drawn[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["M MACs", "ms an image"]
    for axis in axes:
        assert [text.get_text() for text in axis.texts] == ["dense", "1.1", "2.1", "2.2", "final"]
        assert [line.get_marker() for line in axis.lines] == ["D", "o", "x", "o", "o"]
    assert [line.get_xydata().tolist()[0] for line in axes[1].lines][:3] == [[10.0, 0.6], [8.0, 0.61], [5.0, 0.5]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.json", "{", "metrics.json cannot be read"),
        ("metrics.json", "[1]", "expected a dict"),
        (
            "metrics.json",
            '{"per_class": 3, "gates": {"edges": 1}, "before": [], "ap": NaN, "macs": "x"}',
            "Gates: KeyError",
        ),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "- 1\n", "expected a dict"),
        ("results.csv", "a,b\n1,2\n", "no column epoch"),
        ("results.csv", b"\xff\xfe\x00", "results.csv cannot be read"),
        ("pareto.csv", "round,ap\n0,0.5\n", "pareto.csv cannot be read: no column macs, accepted"),
        ("detections.png", b"\x89PNG\r\n\x1a\nbroken", "detections.png cannot be shown"),
    ],
)
def test_damaged_parts_are_told_and_the_rest_is_shown(tmp_path: Path, name: str, content: Any, told: str) -> None:
    run = made_run(tmp_path / "r")
    Image.new("RGB", (30, 20), "red").save(run.path / "labels.png")
    (run.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report = Report.of(run)
    assert len(report.problems) == 1 and escape(told) in report.problems[0], report.problems
    assert {"Summary", "Pictures"} <= set(report.sections)
    assert "<h2>Not shown</h2>" in (run.path / "report.html").read_text()


def test_empty_folder_and_odd_rows(tmp_path: Path) -> None:
    assert Report.of(RunFolder.create(tmp_path, "empty")).sections == {}
    rows = "epoch,loss/box\n0,\n1,nan\nx,3\n2,0.5,surplus\n"
    report = Report.of(made_run(tmp_path / "odd", None, results_csv=rows))
    assert "3 epochs" in report.sections["Curves"] and report.problems == []
    assert "does not say which script" in report.sections["Summary"]


def test_big_runs_stay_small(tmp_path: Path) -> None:
    epochs = [{"epoch": k, "loss/box": 1 / (k + 1), "metrics/ap": k % 7 / 7} for k in range(5000)]
    run = made_run(tmp_path / "r", results_csv=epochs)
    noise = np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.path / "detections.png", compress_level=0)
    assert (run.path / "detections.png").stat().st_size > 13e6
    assert write_report(run).stat().st_size < 3e6


def test_gates_are_summarised(tmp_path: Path) -> None:
    gates = {"a": torch.tensor([0.0, -0.005, 1.0, 2.0], requires_grad=True), "b": torch.tensor([0.5])}
    found = summarise_gates(gates)
    assert found["groups"]["a"] == {"channels": 4, "closed": 2, "mean": pytest.approx(0.75125), "largest": 2.0}
    assert sum(found["counts"]) == 5 and found["counts"][0] == 2 and found["edges"][-1] == 2.0
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(SlimError, match="no gates"):
        summarise_gates({})
    report = Report.of(made_run(tmp_path / "r", "train_sparse.py", metrics={"gates": found}))
    assert report.rows("Gates")[1] == ["a", "4", "2", "██████░░░░░░ 50.0%", "0.751", "2.000"]
    assert "2 of 5 gates are closed (40.0%)" in report.sections["Gates"]


def test_precision_and_recall(tmp_path: Path) -> None:
    of_class = {NASTY: {"objects": 5, "precision": 0.75, "recall": 0.5, "f1": 0.6, "ap50": 0.625}}
    at_conf = {"precision": 0.25, "recall": 0.125, "f1": 0.5, "per_class": {**of_class, "cat": of_class[NASTY]}}
    metrics = {"suggested_conf": 0.321, "at_conf": at_conf}
    run = made_run(tmp_path / "r", "val.py", metrics=metrics)
    for name in ("pr_curve", "f1_curve", "confusion_matrix", "truth"):
        Image.new("RGB", (30, 20), "red").save(run.path / f"{name}.png")
    report = Report.of(run)
    assert report.rows("Precision and recall")[1] == ["all classes", "10", "0.2500", "0.1250", "0.5000", "0.5000"]
    assert report.rows("Precision and recall")[2] == [escape(NASTY), "5", "0.7500", "0.5000", "0.6000", "0.6250"]
    assert "At --conf 0.321, where the mean F1" in report.sections["Precision and recall"]
    assert report.sections["Precision and recall"].count("![") == 3 and "(truth.png)" in report.sections["Pictures"]
    assert ["suggested --conf", "0.321", ""] in report.rows("Summary")
    report = Report.of(made_run(tmp_path / "none", metrics={**metrics, "suggested_conf": None}))
    assert "No detection is right" in report.sections["Precision and recall"]
    assert "Precision and recall" not in Report.of(made_run(tmp_path / "older")).sections and not report.problems


def test_command_writes_reports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "r")
    assert cli([str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n" and (run.path / "report.md").is_file()
    assert cli([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "name a run folder" in error and error.count("\n") == 1
