"""Settings of the experiments' command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

RESULTS = Path(__file__).with_name("results")
"""The rows that are committed."""


@dataclass(frozen=True)
class GridFlags:
    """Options."""

    only: Annotated[tuple[str, ...], "methods and name=value of axes or seed, as patterns: runs that match"] = ()
    dry_run: Annotated[bool, "tell runs, epochs and estimated hours, and run nothing"] = False
    executor: Annotated[Literal["local", "ray", "submitit"], "where runs go"] = "local"
    at_once: Annotated[int, "local, submitit: runs at once", "at least 1"] = 2
    threads: Annotated[int, "ray, submitit: cores of a run; local runs share this machine's", "at least 1"] = 1
    address: Annotated[str | None, "ray: the cluster's address; else one of this machine is started"] = None
    cluster: Annotated[str | None, "submitit: slurm or local; else what it finds"] = None
    minutes: Annotated[int, "submitit: time limit of a job", "at least 1"] = 240
    store: Annotated[str, "folder of the runs, shared by all machines"] = "runs/experiments"
    results: Annotated[str, "folder of the rows, a CSV file a grid"] = str(RESULTS)
    weights: Annotated[str, "the checkpoint that chains start from; else the grid's"] = ""
    data_root: Annotated[str | None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets"] = None
    retry_failed: Annotated[bool, "run again what failed before"] = False
    bootstrap: Annotated[
        bool, "also compare, on resampled images, the pairs of the grid's tables whose predictions are in --store"
    ] = False

    def results_file(self, grid: str) -> Path:
        """The rows of a grid."""
        return Path(self.results) / f"{grid}.csv"
