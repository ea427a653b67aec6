"""Numbers of channels that modules hold as attributes (``self.width``, a list of ``splits``), found where a dry run fails.

An attribute counts the channels of a tensor that its module's own code meets when it equals that tensor's width and a dry run
that cuts it along no longer fails there. It is then a member of the groups of those channels, as a norm's count is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim.channels import ChannelPropagation, Record
from slim.propagate import varying_axes

NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or one entry of a list or tuple of integers."""

    name: str
    entry: int
    value: int

    def record(self, path: str, labels: Tensor) -> Record:
        """Under a module's path, as counting the channels of these labels."""
        return Record(f"{path}.{self.name}".lstrip("."), self.entry, "width", labels)


def attributes_of(module: nn.Module) -> list[Attribute]:
    """The attributes of a module that could count channels; those of torch's own layers are known otherwise."""
    if type(module).__module__.startswith("torch."):
        return []
    found = []
    for name, value in vars(module).items():
        entries: Any = value if isinstance(value, (list, tuple)) else [value]
        if not name.startswith("_") and all(type(entry) is int for entry in entries):
            found += [Attribute(name, n, entry) for n, entry in enumerate(entries) if entry > 1]
    return found


def sequences_at(run: ChannelPropagation, path: str, roots: Tensor) -> list[Tensor]:
    """The channels that a module's own code met: labels along an axis, each sequence once."""
    found: dict[tuple[int, ...], Tensor] = {}
    for step in run.steps:
        if step.path == path:
            for labels in (*step.inputs, *step.labels):
                if labels is not None and len(varying_axes(labels)) == 1:
                    found.setdefault(tuple(roots[labels.flatten()].tolist()), labels.flatten())
    return list(found.values())


def proposals(run: ChannelPropagation, path: str) -> Iterator[list[Record]]:
    """What the attributes of the module at a path, and of all modules of its kind, could count: all that fit, then each alone."""
    kind = type(run.model.get_submodule(path))
    alike = [other for other, module in run.model.named_modules() if type(module) is kind]
    roots = run.classes.roots()
    fitting = {other: fits(run, other, roots) for other in alike}
    names = list(dict.fromkeys((a.name, a.entry) for a, _ in fitting[path]))
    for chosen in [names, *([name] for name in names)] if len(names) > 1 else [names]:
        records = [
            attribute.record(other, labels)
            for other, pairs in fitting.items()
            for attribute, labels in pairs
            if (attribute.name, attribute.entry) in chosen
        ]
        if records:
            yield records


def fits(run: ChannelPropagation, path: str, roots: Tensor) -> list[tuple[Attribute, Tensor]]:
    """The attributes of a module that equal the width of something that its code met, each with what it may count; ``roots``
    represent each label's class.

    The entries of a list count different things in the order in which the code met them, as the sizes of a split do.
    """
    known = {(record.param, record.axis): record.labels for record in run.counts}
    sequences = [x for x in sequences_at(run, path, roots) if bool((x != 0).all())]
    pairs: list[tuple[Attribute, Tensor]] = []
    for attribute in attributes_of(run.model.get_submodule(path)):
        param = attribute.record(path, NOTHING).param
        taken = [x for (name, _), x in known.items() if name == param]
        taken += [x for other, x in pairs if other.name == attribute.name]
        equal = [x for x in sequences if len(x) == attribute.value]
        free = [x for x in equal if not any(x is other for other in taken)]
        if equal and (param, attribute.entry) not in known:
            pairs.append((attribute, (free or equal)[0]))
    return pairs
