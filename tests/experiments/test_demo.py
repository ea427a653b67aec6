"""What the demo says at its end: figures of its own runs, and commands that README and a recipe have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.demo import NEXT, verdict

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_demo_says_what_it_showed(tmp_path: Path) -> None:
    found = {"dense": (1000, 500, 0.9), "slim": (400, 50, 0.85)}
    for name, (macs, params, ap) in found.items():
        write(tmp_path / f"by-name/demo/{name}-seed=0-shapes/metrics.json", {"macs": macs, "params": params, "ap": ap})
    write(tmp_path / "benchmark/benchmark.json", {"rows": [{"milliseconds": 4.04}, {"milliseconds": 2.5}]})
    first, report, *_ = verdict(tmp_path).splitlines()
    assert first.startswith(
        "With 40% of the MACs and 10% of the parameters the slim network reaches AP 0.850, the dense one trained as long 0.900, "
        "in 2.50 instead of 4.04 ms an image"
    )
    assert report == f"Curves, classes, detections: {tmp_path}/by-name/demo/slim-seed=0-shapes/report.html"


def test_what_it_names_next_stands_in_the_documents() -> None:
    readme, recipe = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/slim-30.yaml"))
    assert NEXT[0] in readme and NEXT[1] in " ".join(recipe.replace("\\\n#", "").split())
