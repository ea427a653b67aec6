"""Where a run is kept, free of torch: a command line is read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class RunSettings:
    """Run folder."""

    project: Annotated[str, "folder that holds the run folders"] = "runs"
    name: Annotated[str, "name of the run folder; a number is added when it is taken"] = "exp"
