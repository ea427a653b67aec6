"""Checkpoints of published form and damaged ones."""

import argparse
import datetime
import pathlib
import random
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import models
import models.yolo
from models.blocks import Conv


class Model(nn.Module):
    """Pickled as ``models.yolo.Model``, a class that published files name and that we do not have."""


Model.__module__ = "models.yolo"


@pytest.fixture
def publish(tmp_path, monkeypatch, tiny):
    """Writes a checkpoint as the reference does: the whole module, pickled by torch, in half precision."""
    monkeypatch.setattr(models.yolo, "Model", Model, raising=False)

    def write(description=None, names=("cat", "dog"), wrap=lambda module: {"epoch": 3, "ema": None, "model": module}):
        description = description or tiny
        torch.manual_seed(0)
        built = models.build_model(description)
        published = Model()
        published.model = built.model
        published.yaml = {key: value for key, value in description.items() if "activation" not in key}
        published.names = names
        path = tmp_path / "published.pt"
        torch.save(wrap(published.half()), path)
        return path, built

    return write


def repack(path, change):
    """Rewrites data.pkl of a torch file."""
    with zipfile.ZipFile(path) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records.items():
            target.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def test_published_form(publish, tiny):
    path, built = publish(names={1: "dog", 0: "cat"})
    imported = models.import_checkpoint(path)
    assert imported.description == tiny
    assert imported.names == ["cat", "dog"]
    expected = built.state_dict()
    assert set(imported.state_dict) == set(expected)
    for name, tensor in imported.state_dict.items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int64)
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=1e-3, atol=1e-4)


def test_moving_average_is_preferred(publish):
    def wrap(module):
        average = Model()
        average.__dict__.update(module.__dict__)
        average.names = ["from", "ema"]
        return {"model": module, "ema": average}

    path, _ = publish(wrap=wrap)
    assert models.import_checkpoint(path).names == ["from", "ema"]


def test_extras_of_older_releases(publish):
    """What their training left beside the model: numpy scalars and arrays, paths, options, dates, an optimiser."""

    def wrap(module):
        return {
            "best_fitness": np.array([0.5]),
            "scalar": np.float64(0.25),
            "opt": argparse.Namespace(weights=pathlib.PurePosixPath("a/b.pt"), img=640),
            "date": datetime.datetime(2021, 5, 1),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "shapes": torch.Size([1])},
            "model": module,
        }

    path, _ = publish(wrap=wrap)
    assert models.import_checkpoint(path).names == ["cat", "dog"]


def test_derived_buffers_of_older_releases_are_left_out(publish):
    def wrap(module):
        module.model[-1].register_buffer("anchor_grid", torch.ones(2, 1, 2, 1, 1, 2))
        return {"model": module}

    path, _ = publish(wrap=wrap)
    assert not [name for name in models.import_checkpoint(path).state_dict if "anchor_grid" in name]


def test_activations_are_read_off_the_modules(publish, tiny):
    tiny["backbone"][2][2] = "BottleneckCSP"
    path, _ = publish({**tiny, "activation": "hardswish", "csp_activation": "nn.LeakyReLU(0.1)"})
    description = models.import_checkpoint(path).description
    assert (description["activation"], description["csp_activation"]) == ("Hardswish", "nn.LeakyReLU(0.1)")
    model = models.build_model(description)
    assert {type(m.act) for m in model.modules() if isinstance(m, Conv)} == {nn.Hardswish}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: Conv(3, 8).state_dict(), "plain state dict"),
        (lambda: {"model": Conv(3, 8).state_dict(), "ema": None}, "'model' is a plain state dict"),
        (lambda: {"weights": 1, "epoch": 2}, r"keys \['epoch', 'weights'\]"),
        (lambda: [1, 2], "holds a list"),
        (lambda: nn.Conv2d(3, 8, 1), "torch.nn.modules.conv.Conv2d carries no YAML"),
    ],
)
def test_other_torch_files(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content(), path)
    with pytest.raises(models.ModelError, match=message) as caught:
        models.import_checkpoint(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(models.ModelError, match="no such file"):
        models.import_checkpoint(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(models.ModelError, match="not a zip file"):
        models.import_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(models.ModelError, match="not a zip file"):
        models.import_checkpoint(path)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("readme.txt", "hello")
    with pytest.raises(models.ModelError, match=r"without data\.pkl"):
        models.import_checkpoint(path)


def test_compressed_records_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(models.ModelError, match="is compressed, which torch never does"):
        models.import_checkpoint(path)


def test_truncated_files(publish):
    path, _ = publish()
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(models.ModelError):
            models.import_checkpoint(path)


def test_missing_and_short_storages(publish):
    path, _ = publish()
    with zipfile.ZipFile(path) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    for change in ({"data/0": b""}, {"data/0": b"\0\0\0"}, {"data/0": None}):
        with zipfile.ZipFile(path, "w") as target:
            for name, content in records.items():
                content = change.get(name.partition("/")[2], content)
                if content is not None:
                    target.writestr(name, content)
        with pytest.raises(models.ModelError, match="is damaged"):
            models.import_checkpoint(path)


def test_damaged_pickles_never_escape(publish):
    """Random damage either goes unnoticed or is a ModelError; never another exception."""
    path, _ = publish()
    original = path.read_bytes()
    rng = random.Random(0)

    def damage(program):
        damaged = bytearray(program)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)

    refused = 0
    for _ in range(60):
        path.write_bytes(original)
        repack(path, damage)
        try:
            models.import_checkpoint(path)
        except models.ModelError:
            refused += 1
    assert refused > 20
