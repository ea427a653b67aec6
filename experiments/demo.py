"""What `make demo` has shown, and what to run next: python -m experiments.demo"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NEXT = (
    "python finetune.py --weights yolov5n.pt --download --data data.yaml --img 320 --epochs 30 --name dense",
    "python iterate.py --config recipes/slim-30.yaml --weights runs/finetune/dense/weights/last.pt --data data.yaml --img 320",
)


def verdict(folder: Path) -> str:
    """From the runs and the benchmark of the demo's folder."""
    runs = {name: folder / "by-name" / "demo" / f"{name}-seed=0-shapes" for name in ("dense", "slim")}
    found = {name: _read(run / "metrics.json") for name, run in runs.items()}
    dense, slim = found["dense"], found["slim"]
    rows = _read(max(folder.glob("benchmark*/benchmark.json"), key=lambda path: path.stat().st_mtime))["rows"]
    first, second = (row["milliseconds"] for row in rows)
    return (
        f"With {slim['macs'] / dense['macs']:.0%} of the MACs and {slim['params'] / dense['params']:.0%} of the parameters "
        f"the slim network reaches AP {slim['ap']:.3f}, the dense one trained as long {dense['ap']:.3f}, in {second:.2f} "
        f"instead of {first:.2f} ms an image (one seed of an easy task; docs/results.md has photographs).\n"
        f"Curves, classes, detections: {runs['slim'] / 'report.html'}\n"
        "Next, on your own data (README has the way step by step):\n    " + "\n    ".join(NEXT)
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    print(verdict(Path("runs/demo")))
