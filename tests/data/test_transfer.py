"""Files over real connections: whole, broken off, changed, refused; what was asked for is counted."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import data.transfer
from data import DataError
from data.transfer import fetch
from tests.data.file_server import serve
from tests.data.scenes import ROOT

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the person who runs the tests."""
    monkeypatch.setenv("no_proxy", "*")
    for name, value in {"TIMEOUT_S": 5, "ATTEMPTS": 3, "PAUSE_S": 0.001}.items():
        monkeypatch.setattr(data.transfer, name, value)


def left(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_a_whole_transfer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve({"set.zip": CONTENT}) as server:
        assert fetch(f"{server.url}/set.zip", tmp_path / "a.zip", DIGEST, len(CONTENT)) == DIGEST
        assert (tmp_path / "a.zip").read_bytes() == CONTENT and left(tmp_path / "a.zip") == {"a.zip"}
        assert "300k/300k" in capsys.readouterr().err
        assert fetch(f"{server.url}/set.zip", tmp_path / "a.zip", DIGEST) == DIGEST
        assert server.asked == [("/set.zip", None)]


def test_a_broken_connection_goes_on_at_the_byte_where_it_broke(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, cut_after=[100_000, 50_000, 7]) as server:
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert server.asked == [("/f", r) for r in (None, "bytes=100000-", "bytes=150000-", "bytes=150007-")]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_later_run_asks_for_what_is_missing(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, cut_after=[100_000, 0, 0, 0]) as server:
        with pytest.raises(DataError) as error:
            fetch(f"{server.url}/f", tmp_path / "f")
        assert "3 times in a row; 100kB are kept; run again later" in str(error.value)
        assert left(tmp_path / "f") == {"f.part", "f.version"}
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert server.asked[-1] == ("/f", "bytes=100000-")


@pytest.mark.parametrize("manners", [{"ranges": False}, {"validators": False}])
def test_a_server_without_ranges_or_without_a_validator_sends_everything_again(
    tmp_path: Path, manners: dict[str, bool]
) -> None:
    with serve({"f": CONTENT}, cut_after=[100_000], **manners) as server:
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert [asked for _, asked in server.asked] == [None, "bytes=100000-" if "ranges" in manners else None]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_known_digest_stands_in_for_a_validator(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, cut_after=[100_000], validators=False) as server:
        fetch(f"{server.url}/f", tmp_path / "f", DIGEST)
        assert server.asked[-1] == ("/f", "bytes=100000-")


def test_a_server_that_always_breaks_and_knows_no_ranges_ends_the_attempts(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, ranges=False, cut_after=[5, 9, 4, 9, 4, 9, 4, 9, 4]) as server:
        with pytest.raises(DataError, match="3 times in a row"):
            fetch(f"{server.url}/f", tmp_path / "f")
        assert len(server.asked) == 4


@pytest.mark.parametrize(("if_range", "requests"), [(True, 1), (False, 2)])
def test_a_file_that_changed_between_attempts_starts_afresh(tmp_path: Path, if_range: bool, requests: int) -> None:
    """A server that knows If-Range sends the new file at once, another is found out by its ETag."""
    with serve({"f": OTHER}, cut_after=[100_000, 0, 0], if_range=if_range) as server:
        with pytest.raises(DataError):
            fetch(f"{server.url}/f", tmp_path / "f")
        server.files["/f"] = CONTENT
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert len(server.asked) == 3 + requests
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_change_that_no_validator_shows_is_found_by_the_digest(tmp_path: Path) -> None:
    with serve({"f": OTHER}, cut_after=[100_000, 0, 0, 0], validators=False) as server:
        with pytest.raises(DataError, match="3 times in a row"):
            fetch(f"{server.url}/f", tmp_path / "f", DIGEST)
        server.files["/f"] = CONTENT
        with pytest.raises(DataError, match="expected SHA-256"):
            fetch(f"{server.url}/f", tmp_path / "f", DIGEST)
        assert left(tmp_path / "f") == set()
        assert fetch(f"{server.url}/f", tmp_path / "f", DIGEST) == DIGEST
        assert server.asked[-2:] == [("/f", "bytes=100000-"), ("/f", None)]


def test_a_wrong_digest_says_expected_and_found_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with serve({"f": OTHER}) as server, pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f", DIGEST)
    assert f"expected SHA-256 {DIGEST}, found {hashlib.sha256(OTHER).hexdigest()}" in str(error.value)
    assert left(tmp_path / "f") == {"mine.txt"} and (tmp_path / "mine.txt").read_text() == "kept"


def test_another_size_than_described_is_refused_before_a_byte_is_kept(tmp_path: Path) -> None:
    with serve({"f": CONTENT}) as server, pytest.raises(DataError, match="holds 300000 bytes, expected 299999"):
        fetch(f"{server.url}/f", tmp_path / "f", DIGEST, 299_999)
    assert left(tmp_path / "f") == set()


def test_a_body_of_unknown_length_is_checked_against_the_described_size(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, length=False, cut_after=[100_000]) as server:
        assert fetch(f"{server.url}/f", tmp_path / "f", "", len(CONTENT)) == DIGEST
        assert server.asked == [("/f", None), ("/f", "bytes=100000-")]


def test_busy_is_tried_again_and_not_found_is_not(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, status=[503, 429]) as server:
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert len(server.asked) == 3
        with pytest.raises(DataError, match=r"/none: the server answers 404 \(Not Found\); correct the address"):
            fetch(f"{server.url}/none", tmp_path / "none")
        assert len(server.asked) == 4


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f"
    with pytest.raises(DataError, match=r"no connection .*refused.*, 3 times in a row; run again later"):
        fetch(url, tmp_path / "f")


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.transfer, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(data.transfer, "ATTEMPTS", 1)
    with serve({"f": CONTENT}, slow_s=0.6) as server, pytest.raises(DataError, match="timed out"):
        fetch(f"{server.url}/f", tmp_path / "f")


def test_too_little_room_is_said_before_the_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 200_000))
    with (
        serve({"f": CONTENT}) as server,
        pytest.raises(DataError, match=r"needs 300kB, the disk has 200kB free"),
    ):
        fetch(f"{server.url}/f", tmp_path / "f")
    assert not (tmp_path / "f.part").exists()


def test_after_a_full_disk_the_rest_can_follow(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the kernel, as it would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serve({"f": CONTENT}) as server:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                fetch(f"{server.url}/f", tmp_path / "f")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "f.part").stat().st_size == 120_000
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert server.asked == [("/f", None), ("/f", "bytes=120000-")]


def wait_for_bytes(part: Path) -> None:
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, slow_s=0.02) as server:
        code = "import sys; from pathlib import Path; from data.transfer import fetch\n"
        code += "fetch(sys.argv[1], Path(sys.argv[2]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, f"{server.url}/f", str(tmp_path / "f")], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        wait_for_bytes(tmp_path / "f.part")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        size = (tmp_path / "f.part").stat().st_size
        assert 0 < size < len(CONTENT) and not (tmp_path / "f").exists()
        server.slow_s = 0
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert server.asked == [("/f", None), ("/f", f"bytes={size}-")]


def test_ctrl_c_leaves_what_the_next_call_goes_on_from(tmp_path: Path) -> None:
    # Processes that a shell starts in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        wait_for_bytes(tmp_path / "f.part")
        os.kill(os.getpid(), signal.SIGINT)

    with serve({"f": CONTENT}, slow_s=0.02) as server:
        threading.Thread(target=press).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                fetch(f"{server.url}/f", tmp_path / "f")
        finally:
            signal.signal(signal.SIGINT, before)
        size, server.slow_s = (tmp_path / "f.part").stat().st_size, 0
        assert fetch(f"{server.url}/f", tmp_path / "f") == DIGEST
        assert server.asked == [("/f", None), ("/f", f"bytes={size}-")]


def test_a_server_that_sends_more_than_there_should_be_is_left(tmp_path: Path) -> None:
    with serve({"f": CONTENT}, length=False) as server:
        with pytest.raises(DataError, match=r"/f: sends more than 1,000 bytes, what it said or the description says"):
            fetch(f"{server.url}/f", tmp_path / "f", size=1000)
        assert len(server.asked) == 1 and not (tmp_path / "f").exists()
