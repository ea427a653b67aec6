"""Several processes as one training: those that `torchrun` starts, or a world of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from slim import SlimError

from .settings import RANK_VARIABLES

TIMEOUT = timedelta(hours=1)
"""How long ranks wait for one another; rank 0 evaluates and saves while the others do."""
FAREWELL = timedelta(seconds=20)
"""How long all others let one rank tell why the run ends; torchrun kills after 30 seconds."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that share a training. `World()` is a single one: nothing is sent and nothing changes.

    Counts, flags and plain objects travel through the CPUs (gloo), gradients and statistics where they lie (on GPUs by
    NCCL).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self  # as a part of a model's norms

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read torchrun's variables, without joining anybody; SlimError where they make no sense."""
        found = {name: environment[name] for name in RANK_VARIABLES if name in environment}
        if "WORLD_SIZE" not in found or found["WORLD_SIZE"] == "1":
            return cls()
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        if len(found) < len(RANK_VARIABLES) or not all(value.isdecimal() for value in found.values()):
            raise SlimError(
                f"environment: found {listed}, expected {', '.join(RANK_VARIABLES)}; start the run with torchrun"
            )
        rank, size, local_rank, local_size = (int(found[name]) for name in RANK_VARIABLES)
        if not (rank < size and local_rank < local_size <= size):
            raise SlimError(f"environment: {listed} contradict each other; start the run with torchrun")
        return cls(rank, size, local_rank, local_size)

    @classmethod
    def join(cls) -> World:
        """Meet the other ranks that the environment speaks of; ends with `leave`."""
        world = cls.of_environment()
        if world.size == 1:
            return world
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
            dist.init_process_group(
                backend, timeout=TIMEOUT, store=PrefixStore("group", store), rank=world.rank, world_size=world.size
            )
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise SlimError(
                f"rank {world.rank} of {world.size}: cannot join the others ({first}); start all of them with torchrun"
            ) from error
        return replace(world, store=PrefixStore("endings", store))

    def leave(self, exit_code: int, spoke: bool) -> None:
        """End the process group, or after a failure just let go: those who wait for this rank then fail, too.

        torchrun ends all ranks as soon as one is gone, so that the one that `spoke`, and said why, leaves first.
        """
        if self.store is None:
            return
        if exit_code == 0:
            dist.destroy_process_group()
            return
        with contextlib.suppress(RuntimeError):
            if spoke:
                self.store.set("spoken", "")
            else:
                self.store.wait(["spoken"], FAREWELL)

    def claim_failure(self) -> bool:
        """Whether this rank, which failed or was stopped, is the first to say so, and so tells why. To be called once."""
        try:
            return self.store is None or int(self.store.add("ended", 1)) == 1
        except RuntimeError:  # whoever kept the store is gone without a word
            return True

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """How scripts of this world are started."""
        return "python" if self.size == 1 else f"torchrun --nproc-per-node {self.local_size}"

    def share(self, batch_size: int) -> int:
        """The images of a step that are this rank's; SlimError where they cannot be shared evenly."""
        if batch_size % self.size:
            nearest = max(1, round(batch_size / self.size)) * self.size
            raise SlimError(
                f"--batch-size {batch_size}: expected a multiple of the {self.size} ranks, over which the images of a step "
                f"are shared; the nearest is {nearest}"
            )
        return batch_size // self.size

    def device(self, device: torch.device) -> torch.device:
        """What `device` means on this rank: a GPU for each, or the CPU for all."""
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index not in (None, 0) or self.local_size > torch.cuda.device_count():
            raise SlimError(
                f"--device {device}: {self.local_size} ranks need a GPU each, found {torch.cuda.device_count()}; choose which "
                "with CUDA_VISIBLE_DEVICES, as many with torchrun --nproc-per-node, or use --device cpu"
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def broadcast_from_rank0(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0 alone and give its result, which has to be picklable, to all ranks."""
        if self.size == 1:
            return act()
        box: list[Any] = [act() if self.is_first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        result: T = box[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Give the values of all ranks, in their order, to all of them."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over all ranks, in place and in one go."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors])) / self.size
        means = [mean.view_as(t) for mean, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
        torch._foreach_copy_(tensors, means)

    def mean_and_any(self, values: Mapping[str, float], wanted: bool) -> tuple[dict[str, float], bool]:
        """The means of the values over all ranks, and whether `wanted` is true on any of them; one exchange."""
        if self.size == 1:
            return dict(values), wanted
        *means, wishes = (self.sum(torch.tensor([*values.values(), wanted], dtype=torch.float64)) / self.size).tolist()
        return dict(zip(values, means, strict=True)), wishes > 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap `model` so that its gradients are means over all ranks, which take over the first one's weights.

        Statistics are left to `synchronised_norms` or `average_statistics`. With three ranks or more the first step after a
        resumption may round differently: torch lays its buckets out anew after its first step.
        """
        wrapped = DistributedDataParallel(model)
        wrapped.broadcast_buffers = False  # torch 2.15 warns of this as an argument and older ones know no other
        return wrapped
