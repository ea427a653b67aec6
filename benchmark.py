"""Milliseconds an image of checkpoints, measured in turn so that drift cancels."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch

import detection
import slim
from engine import EngineError, RunFolder, milliseconds_per_image
from engine.command import RunFlags, flag, run_script


@dataclass(frozen=True)
class BenchmarkFlags(RunFlags):
    """A comparison of run times."""

    project: str = flag("runs/benchmark", "folder that holds the run folders")
    weights: list[str] = flag([], "checkpoints; ratios are against the first")  # noqa: RUF009
    img: int = flag(416, "image size in pixels, a multiple of the largest stride")
    num_cores: int = flag(2, "CPU threads")
    repeats: int = flag(30, "measured runs of each network")
    warmup: int = flag(5, "runs of each network before measuring")


def measure(flags: BenchmarkFlags) -> list[dict[str, float | str]]:
    """A row a checkpoint: milliseconds (median), speed-up against the first, MACs, parameters. Gates are folded first."""
    if not flags.weights:
        raise EngineError("--weights: none given; name one or more checkpoints")
    torch.set_num_threads(flags.num_cores)
    networks = {}
    for path in flags.weights:
        network = detection.read_network(path)
        detection.check_image_size(network.model, flags.img)
        networks[path] = slim.fold_gates(network.model).eval()
    image = torch.rand(1, 3, flags.img, flags.img, generator=torch.Generator().manual_seed(flags.seed))
    times = milliseconds_per_image(networks, image, repeats=flags.repeats, warmup=flags.warmup)
    first = times[flags.weights[0]]
    rows: list[dict[str, float | str]] = []
    for path, model in networks.items():
        cost = slim.cost(model, image)
        row = {"milliseconds": times[path], "speed_up": first / times[path], "macs": cost.macs, "params": cost.params}
        rows.append({"weights": path, **row})
    return rows


def main(flags: BenchmarkFlags) -> None:
    rows = measure(flags)
    run = RunFolder.create(flags.project, flags.name)
    run.write_config(asdict(flags), "benchmark.py")
    slim.write_text_atomically(run.path / "benchmark.json", json.dumps(rows, indent=1))
    print(
        f"torch eager, float32, {flags.num_cores} CPU threads, one {flags.img}x{flags.img} image, medians of {flags.repeats}"
    )
    print("| weights | ms | speed-up | M MACs | M parameters |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['weights']} | {row['milliseconds']:.1f} | {row['speed_up']:.2f} | "
            f"{float(row['macs']) / 1e6:.1f} | {float(row['params']) / 1e6:.3f} |"
        )


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    return run_script(BenchmarkFlags, main, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(cli())
