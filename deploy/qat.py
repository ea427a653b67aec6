"""Quantisation-aware training: a network rounds as its INT8 file will, so that its weights learn to bear it.

NNCF places the quantisers and finds their ranges on real images; the ranges then stay as they are, and the weights train
through the rounding (straight-through gradients; Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from slim import SlimError

HOOKS = "__nncf_hooks."
"""The beginning of the names of all that NNCF adds to a model's state."""


def with_quantisers(
    model: nn.Module, images: Sequence[Tensor], *, head: str, keep_float: Sequence[str] = ()
) -> nn.Module:
    """Copy a network and wrap it in fake quantisers, which round weights and maps to 8 bits.

    Args:
        model: the network
        images: [B, 3, H, W] each, on which the ranges are found
        head: the path of a module whose layers stay in floating point, as does all that follows them
        keep_float: patterns of modules whose layers stay in floating point, too; SlimError where one fits no module
    """
    if not len(images):
        raise SlimError("no images to calibrate with; quantisation needs real ones, such as --data's")
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it compiles on first use, which may take minutes
    was_training = model.training
    for name in ("nncf", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf  # which takes seconds, and no other training needs it

        ignored = unquantised_operators(model, images[0][:1], head, keep_float)
        quantised: nn.Module = nncf.quantize(
            copy.deepcopy(model).eval(),
            nncf.Dataset(list(images)),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=ignored),
        )
    for name, parameter in quantised.named_parameters():
        if name.startswith(HOOKS):
            parameter.requires_grad_(False)
    return quantised.train(was_training)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network with quantisers, under the names that the network without them has."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(HOOKS)}


def unquantised_operators(model: nn.Module, images: Tensor, head: str, patterns: Sequence[str]) -> list[str]:
    """Names, in NNCF's graph, of the operators that read these modules' parameters, and of all that follow the head's."""
    from nncf.torch.function_hook import wrap_model
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    graph: Any = build_nncf_graph(wrap_model(copy.deepcopy(model).eval()), images)
    found: dict[str, None] = {}
    for pattern in (head, *patterns):
        paths = {path for path, _ in model.named_modules() if path and fnmatch(path, pattern)}
        if not paths:
            raise SlimError(f"--keep-float {pattern}: no module has such a path; expected one as model.9 or model.9.*")
        read = {f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters()}
        waiting = [node for node in graph.get_all_nodes() if node.node_name in read]
        while waiting:
            for follower in graph.get_next_nodes(waiting.pop()):
                if follower.node_name not in found:
                    found[follower.node_name] = None
                    waiting += [follower] if pattern == head else []
    return list(found)
