"""Models that come wrapped: what is taken out of its wrapper, and what cannot be."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from slim.errors import SlimError

Model = TypeVar("Model", bound=nn.Module)


def without_ddp(model: Model) -> Model:
    """What ``DistributedDataParallel`` wraps, whose processes are to cut alike; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


def check_open(model: Any) -> None:
    """SlimError for what is no ``nn.Module`` of Python code any more: numbers of channels are compiled into the rest."""
    compiled: Any = None if isinstance(model, nn.Module) else model
    for module in model.modules() if compiled is None else ():
        # The modules of torch.export refuse eval() by a method of their own.
        if isinstance(module, torch.jit.ScriptModule) or (isinstance(module, GraphModule) and "eval" in vars(module)):
            compiled = module
    if compiled is not None:
        raise SlimError(
            f"the model holds a {type(compiled).__name__}, whose code is compiled with the numbers of channels in it; give the "
            "nn.Module that it was made from"
        )
