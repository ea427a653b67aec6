"""Checkpoints that YOLOv5's authors publish: where one that is missing comes from, and its download."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from data import DataError
from data.transfer import fetch
from slim import SlimError, write_text_atomically

RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
PUBLISHED = {f"yolov5{size}{levels}.pt" for size in "nsmlx" for levels in ("", "6")}
SHA256 = {"yolov5n.pt": "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3"}
"""Of the files whose digest was taken from a copy; that of any other is pinned beside it when it is first fetched."""


def find_weights(weights: str, download: bool, flag: str = "--weights") -> None:
    """See to it that the file of a flag is there: a published checkpoint that is missing is fetched with ``download``.

    Its digest is the known one, or that of ``FILE.sha256``, which the first download writes. SlimError where nothing was
    given and where a published checkpoint may not be fetched; of any other missing file its reader knows more to say.
    """
    if not weights:
        raise SlimError(
            f"{flag}: none given; name a file, such as yolov5n.pt (published by YOLOv5's authors; --download fetches it) or "
            "runs/finetune/exp/weights/best.pt"
        )
    path = Path(weights)
    if path.exists() or path.name not in PUBLISHED:
        return
    url = f"{RELEASE}/{path.name}"
    if not download:
        raise SlimError(f"{path}: no such file; --download fetches it from {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pin = path.with_name(f"{path.name}.sha256")
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = SHA256.get(path.name, "") or (
            pin.read_text(encoding="utf-8").partition(" ")[0] if pin.is_file() else ""
        )
        try:
            digest = fetch(url, path, known)
        except DataError as error:
            raise DataError(f"{error} ({pin} pins the digest)" if pin.is_file() else str(error)) from error
    print(f"{path}: fetched from {url}")
    if not known:
        write_text_atomically(pin, f"{digest}  {path.name}\n")
        print(f"{path}: no digest of it is known here; pinned in {pin}: sha256 {digest}")
