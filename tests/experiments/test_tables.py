"""Tables follow from their rows: the repository's own, and small ones whose every cell is computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import tables
from experiments.comparisons import (
    BOOTSTRAP_COLUMNS,
    COLUMNS,
    PAIR_COLUMNS,
    blocks_of,
    compared_runs,
    read_rows,
    read_specs,
)
from experiments.tables import make_tables
from slim import SlimError

ROOT = Path(__file__).resolve().parents[2]
SPEC = """
tables:
  - name: small
    title: A small table
    columns: keep
    order: [dense, gate, l1, scratch]
    against: gate
    equivalent: {to: dense, margin: 0.05}
    runs: 12
"""
DOCUMENT = "before\n<!-- table small -->\nold\n<!-- end small -->\nafter\n"
SOURCE = "`python -m experiments.run experiments/grids/tiny.yaml`"


def run(method: str, keep: str, seed: int, ap: float, axes: str = "", **more: Any) -> dict[str, Any]:
    """A row of 1 GMAC, or of the share that it keeps of it, and of half an hour."""
    share = float(keep or 1)
    facts = {"grid": "tiny", "method": method, "keep": keep, "axes": axes, "seed": seed, "data": "shapes"}
    cost = {"macs": 1e9 * share, "params": 2e6 * share, "epochs": 60, "training_macs": 4e12 * share, "seconds": 1800}
    made_by = {"commit": "0123456789abcdef", "hardware": "2 cores", "versions": "torch 2.9"}
    measured = {"split": "val", "class": "", "ap": ap, "ap50": ap + 0.3, "ap75": ap, "cliff_ap": 0.1 if keep else ""}
    return {"hash": f"{method}-{keep}-{axes}-{seed}", "parent": "", **facts, **measured, **cost, **made_by, **more}


ROWS = [
    *(run("dense", "", seed, ap) for seed, ap in enumerate((0.60, 0.62, 0.64))),
    *(run("l1", "0.3", seed, ap) for seed, ap in enumerate((0.50, 0.51, 0.52))),
    *(run("gate", "0.3", seed, ap) for seed, ap in enumerate((0.58, 0.61, 0.64))),
    run("gate", "0.1", 0, 0.5),
]


def write(root: Path, rows: list[dict[str, Any]], spec: str = SPEC, document: str = DOCUMENT) -> Path:
    """A repository of one grid, its rows and one document."""
    for folder in ("docs", "experiments/grids", "experiments/results"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(root / "experiments" / "results" / "tiny.csv", index=False)
    (root / "experiments" / "grids" / "tiny.yaml").write_text(spec)
    (root / "docs" / "results.md").write_text(document)
    return root


def text_of(root: Path) -> str:
    return (root / "docs" / "results.md").read_text()


def test_the_tables_of_the_documents_are_those_of_the_rows() -> None:
    """If this fails: `make tables`."""
    make_tables(ROOT, check=True)


def test_rows_that_are_not_cut_may_come_first(tmp_path: Path) -> None:
    root = write(tmp_path, ROWS[:3])
    make_tables(root)
    assert "| dense | 0.6200 ± 0.0200 (3) |" in text_of(root)
    make_tables(root, check=True)


def test_every_cell_of_a_table(tmp_path: Path) -> None:
    """Differences l1 - gate are -0.08, -0.10, -0.12: t = -17.32, p = 0.0033; dense - gate 0.02, 0.01, 0: t = 1.73, p = 0.23."""
    root = write(tmp_path, ROWS)
    made = make_tables(root)
    assert [str(path.relative_to(root)) for path in made] == [
        "docs/results.md",
        "docs/tables/small.tex",
        "docs/plots/small.png",
    ]
    columns = "AP50 | AP right after the cut | MACs | M parameters | 10¹² MACs of training | hours, all seeds"
    head = f"| method | AP val | Δ to gate, 95 % over seeds | {columns} |\n{'| --- ' * 9}|\n"
    dense = "0.9200 | – | 1 G (100.0 %) | 2.000 | 4.0 | 1.5"
    missing = f"| scratch {'| – ' * 8}|\n"
    assert text_of(root) == (
        "before\n<!-- table small -->\n**A small table**\n\n30 % of the MACs\n\n"
        f"{head}"
        f"| dense | 0.6200 ± 0.0200 (3) | +0.0100 [-0.0148, +0.0348] | {dense} |\n"
        "| gate | 0.6100 ± 0.0300 (3) |  | 0.9100 | 0.1000 | 0.3 G (30.0 %) | 0.600 | 1.2 | 1.5 |\n"
        "| l1 | 0.5100 ± 0.0100 (3) | -0.1000 [-0.1497, -0.0503]\\* | 0.8100 | 0.1000 | 0.3 G (30.0 %) | 0.600 | 1.2 | 1.5 |\n"
        f"{missing}\n10 % of the MACs\n\n"
        f"{head}"
        f"| dense | 0.6200 ± 0.0200 (3) | +0.1000 (1) | {dense} |\n"
        "| gate | 0.5000 (1) |  | 0.8000 | 0.1000 | 0.1 G (10.0 %) | 0.200 | 0.4 | 0.5 |\n"
        f"| l1 {'| – ' * 8}|\n"
        f"{missing}\n"
        "gate - dense (30 % of the MACs): -0.0100 over 3 pairs, equivalent within ±0.05 (TOST p = 0.0101); "
        "worse by less than 0.05: p = 0.0101.\n\n"
        "gate - dense (10 % of the MACs): -0.1000 over 1 pairs.\n\n"
        "Δ: AP minus that of gate, paired by seed; \\* p < 0.05 of the paired t test, after Holm's correction for "
        f"2 comparisons.\n\n{SOURCE}; 10 runs; seeds 0, 1, 2; 2 cores; torch 2.9; commit 0123456; "
        "2 of 12 runs are missing.\n\n![AP against MACs, every seed a point](plots/small.png)\n<!-- end small -->\nafter\n"
    )
    assert make_tables(root) == []
    make_tables(root, check=True)


def test_a_brief_table_has_ap_alone(tmp_path: Path) -> None:
    root = write(tmp_path, ROWS, document="<!-- table small:brief -->\n<!-- end small:brief -->\n")
    make_tables(root)
    assert text_of(root) == (
        "<!-- table small:brief -->\n| AP val | 30 % of the MACs | 10 % of the MACs |\n| --- | --- | --- |\n"
        "| dense | 0.6200 ± 0.0200 (3) | 0.6200 ± 0.0200 (3) |\n"
        "| gate | 0.6100 ± 0.0300 (3) | 0.5000 (1) |\n"
        "| l1 | 0.5100 ± 0.0100 (3) | – |\n| scratch | – | – |\n\n"
        "Mean ± standard deviation (number of seeds).\n<!-- end small:brief -->\n"
    )
    make_tables(root, check=True)


def test_latex_is_a_booktabs_table_with_its_blocks_below_one_another(tmp_path: Path) -> None:
    root = write(tmp_path, ROWS)
    make_tables(root)
    lines = (root / "docs" / "tables" / "small.tex").read_text().splitlines()
    table = [line for line in lines if not line.startswith("%")]
    assert table[0] == r"\begin{tabular}{lrrrrrrrr}" and table[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert [line for line in table if "rule" in line or "multicolumn" in line] == [
        *(r"\toprule", r"\midrule", r"\multicolumn{9}{l}{30 \% of the MACs} \\"),
        *(r"\midrule", r"\multicolumn{9}{l}{10 \% of the MACs} \\", r"\bottomrule"),
    ]
    assert (
        r"l1 & 0.5100 $\pm$ 0.0100 (3) & $-0.1000$ [$-0.1497$, $-0.0503$]* & 0.8100 & 0.1000 & 0.3 G (30.0 \%)"
        in table[7]
    )
    assert r"10 \% of" in "".join(table) and r"scratch & -- & --" in table[8]
    assert "".join(table).isascii()


def test_a_changed_row_fails_the_check_which_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, ROWS)
    assert tables.cli(["--root", str(root)]) == 0
    assert tables.cli(["--root", str(root), "--check"]) == 0
    files = {path: path.read_bytes() for path in (root / "docs").rglob("*.*")}
    write(tmp_path, [{**ROWS[0], "ap": 0.6001}, *ROWS[1:]], document=text_of(root))
    capsys.readouterr()
    assert tables.cli(["--root", str(root), "--check"]) == 1
    told = capsys.readouterr().err
    assert "docs/results.md: small; docs/tables/small.tex; docs/plots/small.png" in told and "make tables" in told
    assert files == {path: path.read_bytes() for path in (root / "docs").rglob("*.*")}


def test_a_table_of_an_axis_and_of_the_test_split(tmp_path: Path) -> None:
    """Runs without the axis are rows by their method; numbers ascend; other splits, grids and classes are left out."""
    spec = """
tables:
  - {name: small, title: Fractions, split: test, rows: fraction, against: 0.5, where: {tie: group}}
"""
    rows = [
        run("gate", "0.3", 0, 0.1, "fraction=0.9 tie=group", split="test"),
        run("gate", "0.3", 0, 0.2, "fraction=0.25 tie=group", split="test"),
        run("gate", "0.3", 0, 0.4, "fraction=0.5 tie=group", split="test"),
        run("gate", "0.3", 0, 0.9, "fraction=0.5 tie=layer", split="test"),
        run("dense", "", 0, 0.5, split="test"),
        run("gate", "0.3", 0, 0.8, "fraction=0.5 tie=group"),
        run("gate", "0.3", 0, 0.7, "fraction=0.5 tie=group", split="test", **{"class": "disc"}),
        run("gate", "0.3", 0, 0.6, "fraction=0.5 tie=group", split="test", grid="other"),
    ]
    root = write(tmp_path, rows, spec)
    make_tables(root)
    lines = [line.split(" | ")[:3] for line in text_of(root).splitlines() if line.startswith("| ")]
    assert lines[0][:2] == ["| fraction", "AP test"]
    assert [(row[0], row[1], row[2]) for row in lines[2:]] == [
        ("| 0.25", "0.2000 (1)", "-0.2000"),
        ("| 0.5", "0.4000 (1)", ""),
        ("| 0.9", "0.1000 (1)", "-0.3000"),
        ("| dense", "0.5000 (1)", "+0.1000"),
    ]


def test_the_bootstrap_stands_beside_the_t_interval(tmp_path: Path) -> None:
    """Means over the seeds of the ends, of exactly the pairs that the table compares."""
    root = write(tmp_path, ROWS)
    results = root / "experiments" / "results"
    (spec,) = read_specs(root / "experiments" / "grids")
    pairs = compared_runs(spec, read_rows(results))
    assert list(pairs.columns) == list(PAIR_COLUMNS)
    assert [(pair["hash"], pair["against_hash"], pair["keep"]) for _, pair in pairs.iterrows()] == [
        *((f"dense---{seed}", f"gate-0.3--{seed}", "0.3") for seed in range(3)),
        *((f"l1-0.3--{seed}", f"gate-0.3--{seed}", "0.3") for seed in range(3)),
        ("dense---0", "gate-0.1--0", "0.1"),
    ]
    bootstrap = pairs[3:5].assign(difference=0.0, low=[-0.2, -0.1], high=[-0.05, 0.05], resamples=1000)
    bootstrap.to_csv(results / "bootstrap.csv", columns=list(BOOTSTRAP_COLUMNS), index=False)
    make_tables(root)
    first = [line.split(" | ") for line in text_of(root).splitlines() if line.startswith("| ")][:6]
    assert [row[3] for row in first] == [
        *("Δ to gate, 95 % over images", "---", "–", "", "[-0.1500, +0.0000]", "–"),
    ]


def test_a_grid_without_rows_says_so(tmp_path: Path) -> None:
    root = write(tmp_path, [])
    assert make_tables(root) == [root / "docs" / "results.md"]
    assert "| gate | – |" in text_of(root) and "No run has finished yet." in text_of(root)
    make_tables(root, check=True)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- table other -->\n<!-- end other -->\n", r"results\.md: table other stands in no grid .*: small"),
        (
            "<!-- table small:long -->\n<!-- end small:long -->\n",
            r"table small:long stands in no grid .*, or with :brief",
        ),
        ("<!-- table small -->\n", r"results\.md: unpaired table markers"),
        ("<!-- table small -->\n<!-- end smal -->\n", r"results\.md: unpaired table markers"),
    ],
)
def test_markers_that_cannot_be_filled(tmp_path: Path, document: str, message: str) -> None:
    with pytest.raises(SlimError, match=message):
        make_tables(write(tmp_path, ROWS, document=document), check=True)


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        ([*ROWS, ROWS[0]], SPEC, "run dense---0 of grid tiny has two rows of split val"),
        (
            [*ROWS, run("l1", "0.3", 0, 0.4, "tie=layer")],
            SPEC,
            r"row l1 at keep 0\.3 has runs l1-0\.3--0, l1-0\.3-tie=layer-0",
        ),
        (ROWS, SPEC.replace("columns: keep", "columns: keeps"), "table small: no axis 'keeps'"),
        (
            ROWS,
            SPEC.replace("against: gate", "against: gates"),
            "table small: no row gates to compare with; .* dense, gate",
        ),
        (ROWS, SPEC.replace("to: dense", "of: dense"), r"table small: equivalent: .*; expected \{to: ROW"),
        (ROWS, SPEC.replace("order:", "sort:"), r"tiny\.yaml: tables: no key sort; expected name, "),
        (ROWS, SPEC.replace("    title: A small table\n", ""), r"tiny\.yaml: tables: an entry without title"),
        (ROWS, SPEC + SPEC.replace("\ntables:\n", ""), "table small stands in grid tiny, too"),
        ([{**ROWS[0], "ap": "high"}], SPEC, r"tiny\.csv: column ap: "),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path: Path, rows: list[dict[str, Any]], spec: str, message: str) -> None:
    with pytest.raises(SlimError, match=message):
        make_tables(write(tmp_path, rows, spec))


def test_a_file_without_a_column_is_named(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).drop(columns="ap50").to_csv(tmp_path / "tiny.csv", index=False)
    with pytest.raises(SlimError, match=r"tiny\.csv: no column ap50; expected hash, grid"):
        read_rows(tmp_path)


def test_holm_is_over_all_blocks(tmp_path: Path) -> None:
    """Two tests of the same p in two blocks: each is doubled."""
    rows = [
        run(method, keep, seed, ap)
        for keep in ("0.3", "0.1")
        for method, aps in {"gate": (0.5, 0.5, 0.5), "l1": (0.4, 0.39, 0.38)}.items()
        for seed, ap in enumerate(aps)
    ]
    root = write(tmp_path, rows)
    (spec,) = read_specs(root / "experiments" / "grids")
    found = [block.contrasts["l1"] for block in blocks_of(spec, read_rows(root / "experiments" / "results"))]
    assert [of.adjusted_p for of in found] == pytest.approx([2 * float(of.difference.p or 0) for of in found])
