"""Reading torch's ``.pt`` files, a zip of a pickle and of storages, whoever made them: damage is found, and nothing of them runs.

torch.load checks neither the sums of the zip's records, so that a flipped bit is another weight, nor what the pickle would
build: a small file may hold references that expand without end, or tuples so deep that they crash Python.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from slim.errors import SlimError

MAX_OPERATIONS = 2_000_000
"""Of a pickle; yolov5n.pt has 34 thousand."""
MAX_EXPANDED = 4_000_000
"""Objects, each counted as often as it is reached."""
MAX_DEPTH = 250
MAX_TENSOR_SHARE = 16
"""All tensors together, as so many times the file: a training state has its weights several times over one storage."""

_CONSTANTS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}
_CONSTANTS |= {"NONE", "NEWFALSE", "NEWTRUE", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ATTRIBUTE = (("__builtin__ getattr",), ("builtins getattr",))


class Record:
    """An object of a class that is not loaded: what it was called with and the state it was given, as data."""

    __slots__ = ("args", "state")
    qualified_name = ""
    args: tuple[Any, ...]
    state: dict[Any, Any]

    def __new__(cls, *args: Any) -> Record:
        record = object.__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)


def read_archive(path: Path, check_names: Callable[[list[str]], None] | None = None) -> Any:
    """The object pickled in a torch zip file, on the CPU.

    Args:
        path: the file
        check_names: given the names of all classes and functions that a file of weights alone would not have; raises for what
            is refused, the others become a ``Record`` each. Without it all are refused

    Raises:
        SlimError: the file is missing, of another kind, damaged, or would cost more than a checkpoint may.
    """
    _check_records(path)
    try:
        asked = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        if check_names is not None:
            check_names(asked)
        elif asked:
            raise SlimError(
                f"{path}: a pickle that asks for {asked[0]}, expected tensors and plain values; nothing of it was run"
            )
        made = [type(name.rpartition(".")[2], (Record,), {"__slots__": (), "qualified_name": name}) for name in asked]
        with safe_globals(list(zip(made, asked, strict=True))), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SlimError:
        raise
    except Exception as error:  # a damaged file can fail in any way, from IndexError to MemoryError
        raise _damaged(path, error) from None
    _check_tensors(path, content)
    return content


def _damaged(path: Path, found: Exception | str) -> SlimError:
    if isinstance(found, Exception):
        cause = found.__cause__ if isinstance(found.__cause__, pickle.UnpicklingError) else found
        found = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    return SlimError(f"{path}: is damaged ({found}); copy or download it again")


def _check_records(path: Path) -> None:
    """Every byte of the file's records against its sum, and what its pickle would build."""
    if not path.is_file():
        kind = "not a file" if path.exists() else "no such file"
        raise SlimError(f"{path}: {kind}; give the path of a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in records:
                raise SlimError(f"{path}: a zip file without data.pkl, expected a checkpoint saved by torch")
            if len(records) < len(archive.infolist()):
                raise _damaged(path, "two records of one name")
            for info in records.values():
                # torch stores records as they are; refusing compressed ones bounds memory by the file's size.
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise SlimError(f"{path}: record {info.filename} is compressed, which torch never does")
            if sum(info.file_size for info in records.values()) > path.stat().st_size:
                raise _damaged(path, "records that overlap")
            wrong = archive.testzip()
            if wrong is not None:
                raise _damaged(path, f"the bytes of {wrong} do not have their CRC-32")
            sizes = {name: info.file_size for name, info in records.items()}
            _check_program(archive.read(records["data.pkl"]), sizes)
    except SlimError as error:
        raise error if str(error).startswith(f"{path}: ") else _damaged(path, error) from None
    except OSError as error:
        raise SlimError(f"{path}: cannot be read ({error.strerror or error}); give the path of a checkpoint") from None
    except zipfile.BadZipFile as error:
        reason = "not a zip file" if "not a zip" in str(error) else f"a damaged zip file ({error})"
        raise SlimError(
            f"{path}: not a readable checkpoint ({reason}), expected one saved by torch 1.6 or later; it may be truncated or of "
            "another kind: copy or download it again, or load and save it with the tool that made it"
        ) from None
    except Exception as error:  # what zipfile and pickletools raise for damage has no common base
        raise _damaged(path, error) from None


def _check_program(program: bytes, sizes: Mapping[str, int]) -> None:
    """Raise SlimError for a pickle that would build too much. Nothing is built: an object is the list of what it holds."""
    done: dict[int, tuple[int, int]] = {}
    for root in _objects(program, sizes):
        # Depth first without recursion: every list is measured after all that it holds.
        open_lists: list[tuple[Any, Iterator[Any]]] = [(root, iter(root))] if isinstance(root, list) else []
        while open_lists:
            holder, rest = open_lists[-1]
            if id(holder) not in done:
                done[id(holder)] = (0, 0)  # being measured
            item = next(
                (item for item in rest if isinstance(item, list) and done.get(id(item), (0, 0)) == (0, 0)), None
            )
            if item is not None:
                if id(item) in done:
                    raise SlimError("an object that holds itself")
                open_lists.append((item, iter(item)))
                continue
            inner = [done[id(item)] for item in holder if isinstance(item, list)]
            depth = 1 + max((depth for depth, _ in inner), default=0)
            size = 1 + len(holder) - len(inner) + sum(size for _, size in inner)
            if depth > MAX_DEPTH:
                raise SlimError(f"objects nested deeper than {MAX_DEPTH}")
            if size > MAX_EXPANDED:
                raise SlimError(f"shared objects that expand to more than {MAX_EXPANDED:,}")
            done[id(holder)] = (depth, size)
            open_lists.pop()


def _objects(program: bytes, sizes: Mapping[str, int]) -> list[Any]:
    """What the pickle leaves on its stack and all else that it makes: lists of what is held, constants, names as 1-tuples."""
    stack: list[Any] = []
    outer: list[list[Any]] = []
    apart: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    for count, (operation, given, _) in enumerate(pickletools.genops(program)):
        if count >= MAX_OPERATIONS:
            raise SlimError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        name = operation.name
        if name in _CONSTANTS:
            stack.append(given)
        elif name.endswith("BINGET"):
            stack.append(memo[given])
        elif name.endswith("BINPUT"):
            memo[given] = stack[-1]
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name.startswith("EMPTY_"):
            stack.append([])
        elif name == "GLOBAL":
            stack.append((given,))
        elif name == "TUPLE":
            items = since_mark()
            stack.append(items)
        elif name in _TUPLES:
            size = _TUPLES[name]
            stack[-size:] = [stack[-size:]]
        elif name in ("APPEND", "BUILD"):
            item = stack.pop()
            _list(stack[-1]).append(item)
        elif name in ("APPENDS", "SETITEMS"):
            items = since_mark()
            _list(stack[-1]).extend(items)
        elif name == "SETITEM":
            pair = stack[-2:]
            del stack[-2:]
            _list(stack[-1]).extend(pair)
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            if function in _ATTRIBUTE:
                # A fused network holds its own method, which holds the network: a record of which nothing is ever read.
                apart.append(args)
                args = None
            stack.append([function, args])
        elif name == "BINPERSID":
            _check_storage(stack[-1], sizes)
        elif name not in ("PROTO", "STOP"):
            raise SlimError(f"the pickle operation {name}, which torch does not use")
    return [*apart, *(item for items in outer for item in items), *stack]


def _list(held: Any) -> list[Any]:
    if not isinstance(held, list):
        raise SlimError("state for what has none")
    return held


def _check_storage(given: Any, sizes: Mapping[str, int]) -> None:
    """A storage must be one of the file's records; torch reads one that is said to be empty again for each tensor."""
    if not isinstance(given, list) or len(given) != 5 or not isinstance(given[2], str) or not isinstance(given[4], int):
        raise SlimError("a storage without a name and size")
    stored = sizes.get(f"data/{given[2]}")
    if stored is None or (given[4] == 0) != (stored == 0):
        raise SlimError(f"storage {given[2][:40]!r} of {given[4]} elements, {stored or 'no'} bytes are there")


def _check_tensors(path: Path, content: Any) -> None:
    """A stride of 0 could ask for any amount of memory."""
    total, seen, stack = 0, set(), [content]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise _damaged(path, f"a {value.layout} tensor of {value.dtype} on {value.device}, expected plain ones")
            if value.nbytes > value.untyped_storage().nbytes():
                raise _damaged(path, f"a tensor of the shape {tuple(value.shape)} with more elements than are stored")
            total += value.nbytes
        elif isinstance(value, dict):
            stack.extend((*value.keys(), *value.values()))
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)
        elif isinstance(value, Record):
            stack.extend((value.args, value.state))
    if total > MAX_TENSOR_SHARE * path.stat().st_size:
        raise _damaged(path, f"tensors of {total:,} bytes in a file of {path.stat().st_size:,}")
