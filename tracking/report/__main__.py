"""Write the reports of run folders again: python -m tracking.report runs/sparse/exp [more folders]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slim import SlimError

from ..run_folder import RunFolder
from . import write_report


def cli(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tracking.report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="folder", help="a run folder, such as runs/sparse/exp")
    try:
        for folder in parser.parse_args(argv).folders:
            if not any((folder / name).is_file() for name in ("config.yaml", "metrics.json")):
                raise SlimError(f"{folder}: holds neither config.yaml nor metrics.json; name a run folder")
            print(write_report(RunFolder(folder)))
    except (SlimError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli())
