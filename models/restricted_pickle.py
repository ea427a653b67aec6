"""Reading a torch zip checkpoint without running anything that the file asks for.

A pickle is a small program: it names callables and has them called. Here no name of the file is ever imported. Each
name is looked up in the tables below; what they give is inert: containers, or stubs that only remember what they were
given. A name outside the tables ends the reading with an error that states it. Tensors stay descriptions of stored
bytes until ``StoredTensor.load`` is asked for one.

Nothing handed to the file has an instance dict or a ``__setstate__`` that does more than keep data, because the BUILD
opcode would write into the first and call the second.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError

# Modules whose classes become stubs; by convention a class starts with a capital, a function does not.
_STUB_PREFIXES = ("models.", "utils.", "ultralytics.", "torch.nn.modules.", "torch.nn.parallel.")
# Other names seen in published files. All become stubs, functions too: their result is a record of the call.
_STUB_NAMES = frozenset(
    {
        ("__builtin__", "object"),
        ("builtins", "object"),
        ("_codecs", "encode"),
        ("argparse", "Namespace"),
        ("collections", "Counter"),
        ("collections", "defaultdict"),
        ("datetime", "date"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "PureWindowsPath"),
        ("pathlib", "WindowsPath"),
        ("torch", "device"),
        ("torch", "dtype"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("torch", "float16"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
    }
)
_STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """An object of a class that is not loaded: what it was called with and the state it was given, as data."""

    __slots__ = ("args", "items", "state")
    qualified_name = ""
    args: tuple[Any, ...]
    items: list[Any]
    state: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        stub = object.__new__(cls)
        stub.args = args
        stub.items = []
        stub.state = {}
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class _Ordered(dict[Any, Any]):
    """Stands for collections.OrderedDict; attributes of the instance (``_metadata`` of state dicts) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Inert:
    """Base of what is neither container nor stub: a file can set no attribute of it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for something that has none")


class _Storage(_Inert):
    __slots__ = ("archive", "dtype", "key")

    def __init__(self, archive: _Archive, key: str, dtype: torch.dtype) -> None:
        self.archive = archive
        self.key = key
        self.dtype = dtype


class StoredTensor(_Inert):
    """Where a tensor's values lie in the file; ``offset``, ``size`` and ``stride`` count elements."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride

    def load(self) -> Tensor:
        """The tensor, with its own memory. Raises ModelError when the file does not hold it."""
        storage = self.storage
        content = storage.archive.read(f"data/{storage.key}")
        try:
            # frombuffer refuses an empty buffer.
            values = torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
            # A stride of 0 could ask for any amount of memory.
            if math.prod(self.size) > values.numel():
                raise ValueError("more elements than stored")
            return values.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)
        except (RuntimeError, ValueError, OverflowError, TypeError):
            raise ModelError(
                f"{storage.archive.path}: a tensor of shape {self.size} does not fit record data/{storage.key};"
                " download the file again"
            ) from None


class _Archive:
    """The records of a torch zip file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint") from None
        except zipfile.BadZipFile:
            raise ModelError(
                f"{path}: not a zip file, expected a checkpoint saved by torch 1.6 or later; it may be truncated or of"
                " another kind: download it again, or load and save it with the tool that made it"
            ) from None
        pickles = [name for name in self._zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ModelError(f"{path}: a zip file without data.pkl, expected a checkpoint saved by torch")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._zip.namelist() and self.read("byteorder") != sys.byteorder.encode():
            raise ModelError(f"{path}: saved on a machine of the other byte order; save it again on one like this")

    def read(self, name: str) -> bytearray:
        try:
            info = self._zip.getinfo(self._root + name)
            # torch stores records as they are; refusing compressed ones bounds memory by the file's size.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{self.path}: record {name} is compressed, which torch never does")
            return bytearray(self._zip.read(info))
        except (KeyError, zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError):
            raise ModelError(f"{self.path}: record {name} is missing or damaged; download the file again") from None


class _StorageType(_Inert):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _RebuildTensor(_Inert):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> StoredTensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("malformed tensor")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))


class _RebuildParameter(_Inert):
    __slots__ = ()

    def __call__(self, tensor: Any, *ignored: Any) -> Any:
        return tensor


class _Reconstruct(_Inert):
    """copyreg's way of making an object of a class without calling the class."""

    __slots__ = ()

    def __call__(self, cls: Any, *ignored: Any) -> Stub:
        if not (isinstance(cls, type) and issubclass(cls, Stub)):
            raise pickle.UnpicklingError("copyreg asks for an object of something that is no stub")
        return cls()


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
    ("torch", "Size"): tuple,
    ("copyreg", "_reconstructor"): _Reconstruct(),
    ("copy_reg", "_reconstructor"): _Reconstruct(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, list)},
    **{(module, "dict"): _Ordered for module in ("builtins", "__builtin__")},
}


def _is_stubbed(module: str, name: str) -> bool:
    if (module, name) in _STUB_NAMES:
        return True
    return name.isidentifier() and name[0].isupper() and module.startswith(_STUB_PREFIXES)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: _Archive, program: bytearray) -> None:
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._archive = archive
        self._stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in _KNOWN:
            known: Callable[..., Any] = _KNOWN[module, name]
            return known
        if not _is_stubbed(module, name):
            raise ModelError(
                f"{self._archive.path}: asks for {module}.{name}, which is not part of a YOLOv5 checkpoint;"
                " nothing of the file was run, do not load it with other tools"
            )
        qualified = f"{module}.{name}"
        if qualified not in self._stubs:
            self._stubs[qualified] = type(name, (Stub,), {"__slots__": (), "qualified_name": qualified})
        return self._stubs[qualified]

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, kind, key, _, _ = pid
            if isinstance(kind, _StorageType) and isinstance(key, str):
                return _Storage(self._archive, key, kind.dtype)
        raise pickle.UnpicklingError("malformed storage")


def _check_memo(program: bytearray) -> None:
    """The memo is an array as long as the largest index in the file, so a damaged index would ask for any memory."""
    for opcode, argument, _ in pickletools.genops(bytes(program)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(program):
            raise pickle.UnpicklingError(f"memo index {argument}")


def read_checkpoint(path: Path) -> Any:
    """The object pickled in a torch zip file, with stubs for objects and ``StoredTensor`` for tensors.

    Raises ModelError for a file that is missing, damaged, of another kind, or that asks for anything unknown.
    """
    archive = _Archive(path)
    program = archive.read("data.pkl")
    try:
        _check_memo(program)
        return _Unpickler(archive, program).load()
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle program can fail in any way, from IndexError to MemoryError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: data.pkl is damaged ({reason}); download the file again") from None
