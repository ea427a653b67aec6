"""What a user sees: a real TensorBoard over runs of the real scripts, and the reports, in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

import slim
from detection.command import as_words, flat, parse
from detection.evaluation import evaluate_weights
from detection.flags import FinetuneFlags, PruneFlags, SparseFlags, ValFlags
from detection.pruning import prune
from tests.scripts.browser import Board, chromium, requested, screenshot, tensorboard, wait_for
from tracking import write_report
from tracking.run_folder import RunFolder

RUNS = ("cut1", "cut2", "sparse", "val")


@pytest.fixture(scope="module")
def runs(sparse_run: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse training, two rounds of cutting and an evaluation, in one folder."""
    project = tmp_path_factory.mktemp("board")
    shutil.copytree(sparse_run, project / "sparse")

    def words(name: str, **more: object) -> list[str]:
        return as_words({"project": str(project), "data": str(tiny), "img": 64, "name": name, **more})

    sparse = project / "sparse" / "weights" / "last.pt"
    first = prune(parse(PruneFlags, "", words("cut1", weights=sparse, macs=0.6)))
    second = prune(parse(PruneFlags, "", words("cut2", weights=first, macs=0.7)), 2)
    evaluate_weights(parse(ValFlags, "", words("val", weights=second)))
    return project


@pytest.fixture(scope="module")
def board(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that has read all of the runs."""
    with tensorboard(runs, tmp_path_factory.mktemp("server") / "log") as address:
        found = Board(address)
        wait_for(lambda: set(found.get("plugin/scalars/tags")) == set(RUNS))
        # A run's tags come in the order of its events; the hyper-parameters' end is the last but for cuts.
        wait_for(lambda: {"detections", "widths"} <= set(found.get("plugin/images/tags").get("cut2", {})))
        wait_for(lambda: "detections" in found.get("plugin/images/tags").get("sparse", {}))
        wait_for(lambda: "metrics/ap" in found.get("plugin/scalars/tags")["cut2"])
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def scalars(board: Board, run: str, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for _, step, value in board.get("plugin/scalars/scalars", run=run, tag=tag)]


def test_curves_are_those_of_results_csv(board: Board, runs: Path) -> None:
    with (runs / "sparse" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [column for column in rows[0] if column not in ("epoch", "seconds")]
    assert {"loss/box", "loss/obj", "loss/cls", "loss/l1", "metrics/ap", "metrics/ap50", "gates/closed_share"} <= set(
        columns
    )
    for column in columns:
        expected = [(int(row["epoch"]), pytest.approx(float(row[column]), rel=1e-5)) for row in rows if row[column]]
        assert scalars(board, "sparse", column) == expected, column
    assert scalars(board, "sparse", "gates/closed_share")[-1][1] == pytest.approx(0.5)
    costs = metrics(runs / "sparse")
    assert scalars(board, "sparse", "cost/macs") == [(0, costs["macs"])]
    assert scalars(board, "sparse", "cost/params") == [(0, costs["params"])]


def test_channels_per_layer_over_rounds(board: Board, runs: Path) -> None:
    for number, run in ((1, "cut1"), (2, "cut2")):
        found = metrics(runs / run)
        tags = [tag for tag in board.get("plugin/scalars/tags")[run] if tag.startswith("channels/")]
        assert sorted(tags) == sorted(f"channels/{layer}" for layer in found["before"]["channels"])
        for layer in ("model.1.conv", "model.9.cv2.conv", "model.24.m.0"):
            steps = [(number - 1, found["before"]["channels"][layer]), (number, found["after"]["channels"][layer])]
            assert scalars(board, run, f"channels/{layer}") == steps
        assert scalars(board, run, "cost/macs")[-1] == (number, found["macs"])
        assert scalars(board, run, "metrics/ap") == [(number, pytest.approx(found["ap"], abs=1e-7))]
    assert metrics(runs / "cut2")["before"]["channels"] == metrics(runs / "cut1")["after"]["channels"]


def test_open_channels_over_epochs(board: Board, runs: Path) -> None:
    """As channels.csv has them: all in the first epoch, and after the L1 step those whose group's gate is open."""
    counts = RunFolder(runs / "sparse").read_channels()
    gates = metrics(runs / "sparse")["gates"]["groups"]
    assert list(counts) == [0, 1] and counts[0]["model.1.conv"] == 32
    tags = {tag for tag in board.get("plugin/scalars/tags")["sparse"] if tag.startswith("channels/")}
    assert tags == {f"channels/{layer}" for layer in counts[0]}
    for group in ("model.0.conv", "model.1.conv", "model.9.cv2.conv"):
        opened = gates[group]["channels"] - gates[group]["closed"]
        assert counts[1][group] == opened < counts[0][group]
        assert scalars(board, "sparse", f"channels/{group}") == [(0, counts[0][group]), (1, opened)]


def test_a_chart_of_channels_a_stage(board: Board) -> None:
    """The layouts of all runs are one: cuts have the layers of the network that was trained."""
    categories = board.get("plugin/custom_scalars/layout")["category"]
    charts = {category["title"]: [chart["title"] for chart in category["chart"]] for category in categories}
    assert charts == {
        "channels, backbone": [
            "stride 2: model.0",
            "stride 4: model.1, model.2",
            "stride 8: model.3, model.4",
            "stride 16: model.5, model.6",
            "stride 32: model.7, model.8, model.9",
        ],
        "channels, neck": [
            "stride 32: model.10, model.21, model.23",
            "stride 16: model.13, model.14, model.18, model.20",
            "stride 8: model.17",
        ],
    }
    shown = [series["value"] for category in categories for c in category["chart"] for series in c["margin"]["series"]]
    tags = {tag for tag in board.get("plugin/scalars/tags")["sparse"] if tag.startswith("channels/")}
    assert {*shown} == tags - {f"channels/model.24.m.{k}" for k in range(3)} and len(shown) == len({*shown})


def test_gate_histograms_over_epochs(board: Board, runs: Path) -> None:
    gates = metrics(runs / "sparse")["gates"]["groups"]
    tags = set(board.get("plugin/histograms/tags")["sparse"])
    assert tags == {f"gates/{group}" for group in gates}
    for group in ("model.0.conv", "model.9.cv2.conv"):
        histograms = board.get("plugin/histograms/histograms", run="sparse", tag=f"gates/{group}")
        assert [step for _, step, _ in histograms] == [0, 1]
        for _, _, buckets in histograms:
            assert sum(count for _, _, count in buckets) == pytest.approx(gates[group]["channels"])
        closed = sum(count for left, _, count in histograms[1][2] if left < slim.CLOSED)
        assert closed == pytest.approx(gates[group]["closed"], abs=1)


def test_pictures(board: Board, runs: Path) -> None:
    tags = board.get("plugin/images/tags")
    measured = ["confusion_matrix", "detections", "f1_curve", "pr_curve", "truth"]
    assert {run: sorted(tags[run]) for run in RUNS} == {
        "sparse": sorted(["channels", *measured, "train_batch"]),
        "cut1": ["detections", "widths"],
        "cut2": ["detections", "widths"],
        "val": measured,
    }
    batch = board.picture(run="sparse", tag="train_batch")
    assert batch.size == (4 * 64, 64) and len(batch.convert("RGB").getcolors(4 * 64 * 64) or []) > 100
    assert board.picture(run="cut1", tag="detections").width == 2 * 64 + 6, "before and after, side by side"
    assert min(board.picture(run="cut1", tag="widths").size) > 300
    assert min(board.picture(run="sparse", tag="channels").size) > 300


def test_hyperparameters_stand_beside_final_metrics(board: Board, runs: Path) -> None:
    experiment = board.post("plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"]: info["differs"] for info in experiment["hparamInfos"]}
    assert {"lr", "epochs", "fraction", "criterion", "macs", "img"} <= set(names), "of all kinds of runs"
    assert names["macs"] and not names["img"]
    finals = [info["name"] for info in experiment["metricInfos"]]
    assert [metric["tag"] for metric in finals[:5]] == [
        f"Final/{key}" for key in ("ap", "ap50", "ap75", "macs", "params")
    ]
    columns = [{"hparam": name} for name in names] + [{"metric": metric} for metric in finals]
    query = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns, "startIndex": 0, "sliceSize": 99}
    groups = {group["name"]: group for group in board.post("plugin/hparams/session_groups", query)["sessionGroups"]}
    assert set(groups) == set(RUNS)
    for run in RUNS:
        config, found = RunFolder(runs / run).read_config(), metrics(runs / run)
        for name in ("img", "batch_size", "seed"):
            assert groups[run]["hparams"][name] == config[name]
        values = {metric["name"]["tag"]: metric["value"] for metric in groups[run]["metricValues"]}
        assert values["Final/ap"] == pytest.approx(found["ap"], abs=1e-7)
        assert values["Final/macs"] == found["macs"]
    assert groups["cut2"]["hparams"]["macs"] == 0.7
    assert not [p for p in (runs / "sparse").iterdir() if p.is_dir() and p.name != "weights"], "no sub-folder for them"


def text_seen(browser: webdriver.Chrome) -> str:
    """The page's text, that inside its web components too."""
    script = """
        const text = root => [...root.childNodes].map(node =>
            node.nodeType == 3 ? node.data : ["SCRIPT", "STYLE"].includes(node.tagName) ? ""
            : (node.shadowRoot ? text(node.shadowRoot) : "") + text(node)).join(" ");
        return text(document.body).replace(/\\s+/g, " ");
    """
    found: str = browser.execute_script(script)
    return found


@pytest.mark.parametrize(
    ("page", "tags"),
    [
        ("?tagFilter=channels#timeseries", ["channels", "/model.0.conv", "cut1", "sparse"]),
        ("#custom_scalars", ["channels, backbone", "stride 4: model.1, model.2", "Matches"]),
        ("#histograms", ["gates/model.0.conv", "sparse"]),
        ("#hparams", ["Final/ap", "criterion", "cut2"]),
    ],
)
def test_browser_draws_the_board(
    page: str, tags: list[str], board: Board, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    browser.set_window_size(1600, 1000)
    browser.get("about:blank")
    browser.get(board.address + page)
    text = wait_for(lambda: seen if all(tag in (seen := text_seen(browser)) for tag in tags) else None)
    assert "No dashboards are active" not in text
    wait_for(lambda: screenshot(browser, tmp_path / "board.png") > 200)


def test_every_run_has_its_report(runs: Path) -> None:
    for run in RUNS:
        page, markdown = (runs / run / "report.html").read_text(), (runs / run / "report.md").read_text()
        assert "Not shown" not in page and "Not shown" not in markdown
        assert f"{metrics(runs / run)['ap']:.4f}" in page and f"{metrics(runs / run)['ap']:.4f}" in markdown
        if run != "sparse":  # which was copied here
            assert write_report(RunFolder(runs / run)).read_text() == page, "made again, it is the same"


@pytest.mark.parametrize("run", ["sparse", "cut2"])
def test_a_report_fits_a_phone(run: str, runs: Path, browser: webdriver.Chrome, tmp_path: Path) -> None:
    """At 390 pixels no column is off the screen, and no word is broken."""
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get((runs / run / "report.html").as_uri())
        screenshot(browser, tmp_path / "phone.png")
        assert browser.execute_script("return window.innerWidth") == 390
        found = """
            const lines = x => { const r = document.createRange(); r.selectNodeContents(x); return r.getClientRects().length };
            return [...document.querySelectorAll('%s')].filter(x => %s).map(x => x.innerText)
        """
        assert browser.execute_script(found % ("table", "x.scrollWidth > x.clientWidth + 1")) == []
        assert browser.execute_script(found % ("td:first-child", "!/[ -]/.test(x.innerText) && lines(x) > 1")) == []
        assert len(browser.execute_script(found % ("td:first-child", "lines(x) == 1"))) > 50, (
            "the layers' or gates' names"
        )
        titles = "return [...document.querySelectorAll('.wide td')].map(d => d.dataset.title)"
        if run == "cut2":
            assert browser.execute_script(titles)[:3] == ["network", "AP", "change"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(
    ("run", "sections", "images"),
    [
        ("sparse", ["Summary", "Channels", "Gates", "Curves", "Classes", "Precision and recall", "Pictures"], 10),
        ("cut2", ["Summary", "Before and after", "Widths", "Classes", "Pictures"], 1),
    ],
)
def test_report_in_the_browser(
    run: str, sections: list[str], images: int, runs: Path, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    browser.set_window_size(1280, 1000)
    browser.get("about:blank")
    requested(browser)
    browser.get((runs / run / "report.html").as_uri())
    outside = [url for url in requested(browser) if not url.startswith("data:")]
    assert outside == [(runs / run / "report.html").as_uri()], "nothing but the page itself"
    assert browser.execute_script("return [...document.querySelectorAll('h2')].map(h => h.innerText)") == sections
    widths = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(widths) == images and all(widths)
    assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert screenshot(browser, tmp_path / "report.png") > 100


def test_commands_in_reports_make_the_very_flags(tiny: Path, tmp_path: Path) -> None:
    flags = [
        ("train_sparse.py", SparseFlags, {"data": str(tiny), "name": "it's $x", "strength": 0.25, "data_root": None}),
        ("finetune.py", FinetuneFlags, {"weights": "a b.pt", "keep_gates": True, "box": -1.0}),
        ("prune.py", PruneFlags, {"macs": 0.5, "overrides": ["a*=0.5", "b=8"], "ignore": ["x y"], "cost_aware": True}),
        ("val.py", ValFlags, {"weights": "w.pt", "save_json": True}),
    ]
    for script, kind, given in flags:
        made = parse(kind, "", as_words(given))
        run = RunFolder(tmp_path / f"it's {script}")
        run.write_config(flat(made), script)
        (line,) = re.findall("^python .*$", (write_report(run).parent / "report.md").read_text(), re.MULTILINE)
        told = subprocess.run(["sh", "-c", f"""set -- {line}\nprintf '%s\\0' "$@" """], capture_output=True, check=True)
        words = told.stdout.decode().split("\0")[:-1]
        assert words[:2] == ["python", script]
        assert flat(parse(kind, "", words[2:])) == flat(made)
