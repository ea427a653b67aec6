"""A signal handler still runs after networks under OpenVINO were closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from deploy import export_network

ROOT = Path(__file__).resolve().parents[2]
CLOSED_IN_ORDER = """
import gc, os, signal, sys
from deploy import OpenVinoNetwork

first, second = OpenVinoNetwork(sys.argv[1], 1), OpenVinoNetwork(sys.argv[1], 1)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_the_networks_are_closed(tmp_path: Path) -> None:
    export_network(nn.Conv2d(3, 4, 3), tmp_path / "net.xml", torch.rand(1, 3, 8, 8))
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_IN_ORDER, str(tmp_path / "net.xml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
