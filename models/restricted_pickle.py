"""Reading a published checkpoint, a pickle of module objects, without running anything that the file asks for.

torch's own unpickler for weights alone does the reading. Classes that YOLOv5 checkpoints are known to name are given to it
as stubs, which only remember what they were given; no name of the file is ever imported, and any other ends the reading.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .errors import ModelError

_STUBBED = re.compile(
    # Classes of networks; by convention a class starts with a capital, a function does not.
    r"(models|utils|ultralytics|torch\.nn\.modules|torch\.nn\.parallel)(\.\w+)*\.[A-Z]\w*"
    # What else their trainings left in the file. Functions too become stubs: their result is a record of the call.
    r"|builtins\.(object|dict|list|frozenset)|argparse\.Namespace|collections\.defaultdict"
    r"|datetime\.(date|datetime|timedelta)|pathlib(\._local)?\.(Path|(Pure)?PosixPath|(Pure)?WindowsPath)"
    r"|numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\.(dtype|ndarray)|torch\.dtype"
)


class Stub:
    """An object of a class that is not loaded: what it was called with and the state it was given, as data."""

    __slots__ = ("args", "state")
    qualified_name = ""
    args: tuple[Any, ...]
    state: dict[Any, Any]

    def __new__(cls, *args: Any) -> Stub:
        stub = object.__new__(cls)
        stub.args, stub.state = args, {}
        return stub

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)


def read_checkpoint(path: Path) -> Any:
    """The object pickled in a torch zip file, tensors as they are, with ``Stub`` for objects.

    Raises ModelError for a file that is missing, damaged, of another kind, or that asks for anything unknown.
    """
    _check_archive(path)
    try:
        asked = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        refused = [name for name in asked if not _STUBBED.fullmatch(name)]
        if refused:
            raise ModelError(
                f"{path}: asks for {refused[0]}, which is not part of a YOLOv5 checkpoint; nothing of the file was run, do "
                "not load it with other tools"
            )
        stubs = [type(name.rpartition(".")[2], (Stub,), {"__slots__": (), "qualified_name": name}) for name in asked]
        with safe_globals(list(zip(stubs, asked, strict=True))), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # a damaged file can fail in any way, from IndexError to MemoryError
        cause = error.__cause__ if isinstance(error.__cause__, pickle.UnpicklingError) else error
        reason = (str(cause) or type(cause).__name__).splitlines()[0][:200]
        raise ModelError(f"{path}: is damaged ({reason}); download the file again") from None


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint") from None
    except zipfile.BadZipFile:
        raise ModelError(
            f"{path}: not a zip file, expected a checkpoint saved by torch 1.6 or later; it may be truncated or of another kind: "
            "download it again, or load and save it with the tool that made it"
        ) from None
    if not any(record.filename.endswith("/data.pkl") for record in records):
        raise ModelError(f"{path}: a zip file without data.pkl, expected a checkpoint saved by torch")
    for record in records:
        # torch stores records as they are; refusing compressed ones bounds memory by the file's size.
        if record.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{path}: record {record.filename} is compressed, which torch never does")
