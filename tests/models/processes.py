"""Several processes' losses in one: each runs twice, first to say its counts, then with the sums of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def over_processes(runs: Sequence[Callable[[Reduce], Any]]) -> list[Any]:
    """What each of `runs` gives when `reduce` adds up over all of them."""
    said: list[list[Tensor]] = []
    for run in runs:
        counts: list[Tensor] = []

        def listen(tensor: Tensor, counts: list[Tensor] = counts) -> Tensor:
            counts.append(tensor.clone())
            return tensor

        run(listen)
        said.append(counts)
    assert len({len(counts) for counts in said}) == 1, "a process that exchanges less than the others hangs them"
    sums = [sum(counts[1:], counts[0]) for counts in zip(*said, strict=True)]
    answers = [iter(sums) for _ in runs]
    return [run(lambda tensor, rest=rest: next(rest)) for run, rest in zip(runs, answers, strict=True)]
