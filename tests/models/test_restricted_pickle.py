"""Hostile checkpoints: nothing of them runs, and what they asked for is named."""

import io
import pathlib
import pickle
import zipfile

import pytest

import models
import slim.archive
from models.checkpoint_import import read_checkpoint
from slim.archive import Record


def write_program(path, program):
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", program)
        target.writestr("archive/version", "3\n")
    return path


def text(value):
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def global_(module, name):
    return f"c{module}\n{name}\n".encode()


def stub(module="models.common", name="Conv"):
    return global_(module, name) + b")\x81"


def hostile(tmp_path, target):
    """Programs that would create ``target`` if anything of them ran, and what is said of them."""
    command = f"touch {target}"
    run = b"(" + text(command) + b"tR"
    evaluate = b"(" + text(f"open({str(target)!r}, 'w')") + b"tR"
    nested = io.BytesIO()
    pickle.dump({"a": 1}, nested)
    planted = b"}" + text("__setstate__") + global_("os", "system") + b"sb" + text(command) + b"b"
    return {
        "call": (global_("os", "system") + run, "os.system"),
        "posix": (global_("posix", "system") + run, "posix.system"),
        "eval": (global_("builtins", "eval") + evaluate, "builtins.eval"),
        "python 2 eval": (global_("__builtin__", "eval") + evaluate, "builtins.eval"),
        "stack global": (b"\x8c\x02os\x8c\x06system\x93" + run, "SHORT_BINUNICODE"),
        "dotted": (global_("models.common", "os.system") + run, "models.common.os.system"),
        "dotted class": (global_("models.common", "Conv.mro") + run, "models.common.Conv.mro"),
        "instance": (b"(" + text(command) + b"ios\nsystem\n", "INST"),
        "old object": (b"(" + global_("os", "system") + text(command) + b"o", "OBJ"),
        "function of an allowed package": (
            global_("torch.nn.modules.utils", "_pair") + run,
            "torch.nn.modules.utils._pair",
        ),
        "nested load": (
            global_("torch.storage", "_load_from_bytes")
            + b"(C"
            + bytes([len(nested.getvalue())])
            + nested.getvalue()
            + b"tR",
            "SHORT_BINBYTES",
        ),
        "hub": (global_("torch.hub", "load") + run, "torch.hub.load"),
        "partial": (global_("functools", "partial") + run, "functools.partial"),
        "planted __setstate__": (stub() + planted, "os.system"),
        "as an argument of a stub": (
            global_("models.common", "Conv") + b"(" + global_("os", "system") + b"tR",
            "os.system",
        ),
    }


@pytest.mark.parametrize("case", hostile(pathlib.Path(), "x"))
def test_functions_are_refused_by_name(tmp_path, case):
    target = tmp_path / "touched"
    program, name = hostile(tmp_path, target)[case]
    program = b"\x80\x02" + program + b"."
    path = write_program(tmp_path / "hostile.pt", program)
    with pytest.raises(
        models.ModelError, match=rf"asks for {name}, |is damaged \(the pickle operation {name}, "
    ) as caught:
        models.import_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not target.exists()


def test_the_hostile_program_is_one(tmp_path):
    """The check above can fail: an ordinary unpickler does create the file."""
    target = tmp_path / "touched"
    program, _ = hostile(tmp_path, target)["call"]
    pickle.loads(b"\x80\x04" + program + b".")
    assert target.exists()


def test_planted_setstate_is_data(tmp_path):
    """An allowed class planted as ``__setstate__`` is kept as state; the next state still goes to the stub."""
    program = b"\x80\x02" + stub() + b"}" + text("__setstate__") + global_("models.common", "C3") + b"sb"
    program += b"}" + text("answer") + b"K\x2asb."
    content = read_checkpoint(write_program(tmp_path / "a.pt", program))
    assert isinstance(content, Record)
    assert content.state["answer"] == 42
    assert content.state["__setstate__"].qualified_name == "models.common.C3"
    assert not hasattr(content, "__dict__")


TENSOR = (
    global_("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + b"("
    + text("storage")
    + global_("torch", "FloatStorage")
    + text("0")
    + text("cpu")
    + b"K\x01tQ"
    + b"K\x00K\x01\x85K\x01\x85\x89NtR"
)


@pytest.mark.parametrize(
    "target",
    [
        global_("torch._utils", "_rebuild_tensor_v2"),
        global_("torch", "FloatStorage"),
        global_("collections", "OrderedDict"),
        global_("builtins", "set"),
        global_("models.common", "Conv"),
        TENSOR,
    ],
)
@pytest.mark.parametrize("slots", [False, True])
def test_state_for_what_has_none(tmp_path, target, slots):
    """BUILD may set attributes of nothing but stubs, be it by __dict__ or, with slots, by setattr."""
    state = b"}" + text("__call__") + stub() + b"s"
    program = b"\x80\x02" + target + (b"N" + state + b"\x86" if slots else state) + b"b."
    with pytest.raises(models.ModelError, match="damaged"):
        read_checkpoint(write_program(tmp_path / "a.pt", program))


@pytest.mark.parametrize("size", [1 << 30, -1])
def test_tensors_cannot_ask_for_more_than_is_stored(tmp_path, size):
    yaml = text("yaml") + b"}" + text("backbone") + b"]ss"
    tensor = TENSOR.replace(b"K\x01\x85K\x01\x85", b"J" + (size % 2**32).to_bytes(4, "little") + b"\x85K\x00\x85")
    state = b"}" + yaml[:-1] + b"s" + text("_parameters") + b"}" + text("w") + tensor + b"ss"
    path = write_program(tmp_path / "a.pt", b"\x80\x02" + stub() + state + b"b.")
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("archive/data/0", b"\0" * 4)
    with pytest.raises(models.ModelError, match="is damaged"):
        models.import_checkpoint(path)


def test_modules_that_contain_themselves(tmp_path):
    """A cycle in the module tree ends in an error, not in endless recursion."""
    yaml = text("yaml") + b"}" + text("backbone") + b"]s"
    program = b"\x80\x02" + stub() + b"q\x00}" + yaml + b"s" + text("_modules") + b"}" + text("me") + b"h\x00ssb."
    with pytest.raises(models.ModelError, match="an object that holds itself"):
        models.import_checkpoint(write_program(tmp_path / "a.pt", program))


def test_memo_bomb(tmp_path):
    path = write_program(tmp_path / "a.pt", b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(models.ModelError, match="holds a NoneType"):
        models.import_checkpoint(path)


def test_getattr_is_a_record_of_what_it_was_asked(tmp_path):
    """Fused networks hold their own method, segmentation networks their head's: no attribute is looked up."""
    program = b"\x80\x02" + stub() + b"q\x00}" + text("forward") + global_("__builtin__", "getattr")
    program += b"h\x00" + text("__class__") + b"\x86Rsb."
    content = read_checkpoint(write_program(tmp_path / "a.pt", program))
    found = content.state["forward"]
    assert (found.qualified_name, found.args) == ("builtins.getattr", (content, "__class__"))


SHARED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(64))  # each holds the one before twice


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"K\x01\x85" + SHARED, "shared objects that expand to more than 4,000,000"),
        (b"}K\x01\x85" + SHARED + b"K\x01s", "shared objects that expand"),
        (b")" + b"\x85" * 1_000_000, "a pickle of more than 200,000 operations"),
        (b"})" + b"\x85" * 100_000 + b"Ns", "objects nested deeper than 250"),
        (b"})" + b"\x85" * 100_000 + b"Ns)R", "objects nested deeper than 250"),  # refused by torch, but too late
        (global_("builtins", "getattr") + b"})" + b"\x85" * 100_000 + b"Ns\x85R", "objects nested deeper than 250"),
        (b"]" * 1000 + b"a" * 999, "objects nested deeper than 250"),
    ],
)
def test_what_a_small_file_would_cost_is_known_before_it_is_built(tmp_path, monkeypatch, program, said):
    """The deep key would crash Python: it hashes tuples by recursion."""
    monkeypatch.setattr(slim.archive, "MAX_OPERATIONS", 200_000)
    path = write_program(tmp_path / "a.pt", b"\x80\x02" + program + b".")
    with pytest.raises(models.ModelError, match=rf"is damaged \({said}") as caught:
        models.import_checkpoint(path)
    assert str(caught.value).count("\n") == 0


def test_a_storage_that_is_said_to_be_empty_is_not_read_again_for_each_tensor(tmp_path):
    path = write_program(tmp_path / "a.pt", b"\x80\x02" + TENSOR.replace(b"K\x01tQ", b"K\x00tQ") + b".")
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("archive/data/0", b"\0" * 4)
    with pytest.raises(models.ModelError, match=r"storage '0' of 0 elements, 4 bytes are there"):
        models.import_checkpoint(path)


def test_views_of_one_storage_are_added_up(tmp_path):
    """A thousand tensors over one kilobyte would be a thousand kilobytes once each is copied."""
    whole = TENSOR.replace(b"K\x01tQ", b"M\xe8\x03tQ").replace(b"K\x01\x85K\x01\x85", b"M\xe8\x03\x85K\x01\x85")
    path = write_program(tmp_path / "a.pt", b"\x80\x02](" + whole * 1000 + b"e.")
    with zipfile.ZipFile(path, "a") as target:
        target.writestr("archive/data/0", b"\0" * 4000)
    with pytest.raises(models.ModelError, match=r"tensors of 4,000,000 bytes in a file of"):
        models.import_checkpoint(path)
