"""The scripts as commands, ``slim-train`` and so on, which a wheel holds as the package ``slim_commands``.

There ``scripts`` beside this file has the scripts and the packages that they import; in a checkout they are in its root.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def _command(script: str) -> Callable[[], int]:
    def run() -> int:
        installed = Path(__file__).with_name("scripts")
        sys.path.insert(0, str(installed if installed.is_dir() else Path(__file__).resolve().parents[2]))
        try:
            cli: Callable[[], int] = importlib.import_module(script).cli
        except ModuleNotFoundError as error:
            print(f"error: {error.name} is not installed; pip install 'channel-slim[train]' has it", file=sys.stderr)
            return 1
        return cli()

    return run


train = _command("train_sparse")
prune = _command("prune")
finetune = _command("finetune")
iterate = _command("iterate")
val = _command("val")
export = _command("export")
detect = _command("detect")
benchmark = _command("benchmark")
