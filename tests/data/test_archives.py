"""Archives as strangers could make them: what is unpacked, and what is refused with nothing left behind."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import DataError
from data.archives import unpack


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, *members: tuple[str, bytes | tuple[bytes, str]], mode: str = "w") -> Path:
    """Members (name, content) or (name, (type, link target))."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_every_format_by_its_content_whatever_its_name(tmp_path: Path, mode: str) -> None:
    content = {"set/a.txt": b"a" * 5000, "set/deep/b.txt": b""}
    path = tmp_path / "archive.bin"
    zipped(path, content) if mode == "zip" else tarred(path, *content.items(), mode=mode)
    unpack(path, tmp_path / "out")
    assert unpacked(tmp_path / "out") == content


def test_folders_are_kept_and_what_macos_adds_is_not(tmp_path: Path) -> None:
    members = {"images/": b"", "a.jpg": b"1", "__MACOSX/._a.jpg": b"2", "images/.DS_Store": b"3"}
    unpack(zipped(tmp_path / "a.zip", members), tmp_path / "out")
    assert unpacked(tmp_path / "out") == {"a.jpg": b"1"} and (tmp_path / "out" / "images").is_dir()


def test_links_within_a_tar_stay_within(tmp_path: Path) -> None:
    archive = tarred(
        tmp_path / "a.tar",
        ("x/real", b"content"),
        ("x/hard", (tarfile.LNKTYPE, "x/real")),
        ("x/y/soft", (tarfile.SYMTYPE, "../real")),
        ("x/twice", (tarfile.SYMTYPE, "y/soft")),
    )
    unpack(archive, tmp_path / "out")
    assert unpacked(tmp_path / "out") == dict.fromkeys(("x/real", "x/hard", "x/y/soft", "x/twice"), b"content")
    links = [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert len(links) == 2 and all(path.resolve() == tmp_path / "out" / "x" / "real" for path in links)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tar, dots": (lambda p: tarred(p, ("good", b""), ("../evil", b"x")), "'../evil' would be extracted to "),
    "tar, symlink up": (
        lambda p: tarred(p, ("d/s", (tarfile.SYMTYPE, "../../evil"))),
        "'d/s' would link to ",
    ),
    "tar, symlink absolute": (
        lambda p: tarred(p, ("s", (tarfile.SYMTYPE, "/etc"))),
        "'s' is a link to an absolute path",
    ),
    "tar, symlink to a folder, written through": (
        lambda p: tarred(p, ("s", (tarfile.SYMTYPE, "/tmp")), ("s/evil", b"x")),
        "'s' is a link to an absolute path",
    ),
    "tar, hard link": (
        lambda p: tarred(p, ("h", (tarfile.LNKTYPE, "../../etc/passwd"))),
        "'h' would link to ",
    ),
    "tar, device": (lambda p: tarred(p, ("dev", (tarfile.CHRTYPE, ""))), "'dev' is a special file"),
    "tar, pipe": (lambda p: tarred(p, ("pipe", (tarfile.FIFOTYPE, ""))), "'pipe' is a special file"),
    "tar, a file as a folder": (lambda p: tarred(p, ("a", b"x"), ("a/b", b"x")), "cannot be unpacked"),
}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_names_in_a_zip_that_lead_outside_stay_inside(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", {"good": b"", name: b"x"})
    unpack(archive, tmp_path / "in" / "out")
    assert sorted(unpacked(tmp_path / "in" / "out").values()) == [b"", b"x"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "in"} and len(list((tmp_path / "in").iterdir())) == 1
    assert not Path("/evil").exists()


def test_an_absolute_name_in_a_tar_stays_inside(tmp_path: Path) -> None:
    unpack(tarred(tmp_path / "a.tar", ("/evil", b"x")), tmp_path / "out")
    assert unpacked(tmp_path / "out") == {"evil": b"x"} and not Path("/evil").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_leaves_the_folder_is_refused_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    (tmp_path / "in").mkdir()
    archive = make(tmp_path / "in" / "a.bin")
    with pytest.raises(DataError) as error:
        unpack(archive, tmp_path / "in" / "out")
    assert message in str(error.value) and str(archive) in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in tmp_path.rglob("*")} == {"in", "a.bin"}


def test_damage_is_one_line(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.zip", {"a": bytes(range(256)) * 40}, zipfile.ZIP_STORED).read_bytes()
    damaged = {
        "cut.zip": whole[:-30],
        "flipped.zip": whole[:500] + b"\xff" + whole[501:],
        "page.zip": b"<!DOCTYPE html><title>404</title>",
        "cut.tgz": tarred(tmp_path / "b.tgz", ("a", bytes(10**5)), mode="w:gz").read_bytes()[:90],
        "cut.tbz": tarred(tmp_path / "b.tbz", ("a", bytes(range(256)) * 400), mode="w:bz2").read_bytes()[:-20],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            unpack(tmp_path / name, tmp_path / "out")
        assert name in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="<!DOCTYPE html>"):
        unpack(tmp_path / "page.zip", tmp_path / "out")


def test_an_archive_of_links_is_refused_before_each_is_looked_for(tmp_path: Path) -> None:
    links = [(f"{i}", (tarfile.LNKTYPE, "a")) for i in range(1001)]
    archive = tarred(tmp_path / "links.tar", ("a", b"x"), *links)
    with pytest.raises(DataError, match=r"links\.tar: cannot be unpacked \(more than 1000 links\)"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_more_than_the_disk_has_free_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    content = b"0" * 5000
    archive = (
        zipped(tmp_path / "a.zip", {"a": content}) if kind == "zip" else tarred(tmp_path / "a.tar", ("a", content))
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4999))
    with pytest.raises(DataError, match="it holds more than the disk has free"):
        unpack(archive, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5000))
    unpack(archive, tmp_path / "out")
    assert unpacked(tmp_path / "out") == {"a": content}
