"""OpenVINO beside signals and threads, and images of bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy import OpenVinoNetwork, export_network

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
FIRST_CALLS = """
import os, sys, threading
import torch
from deploy import open_exported

sys.setswitchinterval(1e-6)
network, images = open_exported(sys.argv[1], num_cores=2, at_once=4), torch.zeros(1, 3, 8, 8)
together = threading.Barrier(4)

def call():
    together.wait()
    network(images)

threads = [threading.Thread(target=call) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("all done")
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


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_the_first_calls_may_come_from_several_threads(tmp_path: Path, suffix: str) -> None:
    """Bindings that set themselves up at the first call hung in every second process."""
    path = tmp_path / f"net{suffix}"
    export_network(nn.Conv2d(3, 4, 3), path, torch.rand(1, 3, 8, 8))
    for _ in range(3):
        command = [sys.executable, "-c", FIRST_CALLS, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr


def test_bytes_are_the_floats_that_they_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "net.xml"
    export_network(nn.Conv2d(3, 4, 3), path, torch.rand(2, 3, 8, 8))
    network = OpenVinoNetwork(path, 1, "float32")
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    of_bytes, of_floats = network(images), network(images / 255)
    assert torch.allclose(of_bytes, of_floats, rtol=1e-6, atol=1e-6) and of_bytes.abs().max() > 0.1
    assert [[bool(layers) for layers in network.layer_times(given, 1)] for given in (images, images / 255)] == [
        [True]
    ] * 2
