"""Command lines from dataclasses: flags, ``--config`` files and one-line errors, the same for every script."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import torch

from engine.distributed import INTERRUPTED, RANK_VARIABLES, World
from slim import SlimError

Flags = TypeVar("Flags")


def flag(default: Any, description: str) -> Any:
    """A dataclass field that is a command-line flag; the description says the unit."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": description})
    return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """What every script that writes a run folder takes."""

    project: str = flag("runs", "folder that holds the run folders")
    name: str = flag("exp", "name of the run folder; a number is added when it is taken")
    seed: int = flag(0, "seed of every random generator")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes the first GPU where there is one")
    debug: bool = flag(False, "on an error, print the traceback")


def parse(kind: type[Flags], description: str, argv: Sequence[str] | None = None) -> Flags:
    """Flags from the command line and ``--config`` files; types are checked, unknown keys refused.

    Raises SlimError with one line that names the flag, the value and what was expected.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of flags, such as a run folder's config.yaml")
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if types[field.name] is bool:
            parser.add_argument(name, action="store_true", default=field.default, help=text)
            continue
        many = typing.get_origin(types[field.name]) is list
        default = field.default_factory() if callable(field.default_factory) else field.default
        extra: dict[str, Any] = {"nargs": "+"} if many else {}
        item = typing.get_args(types[field.name])[0] if many else types[field.name]
        parser.add_argument(name, type=item, default=default, help=text, **extra)
    try:
        parsed = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        text = " ".join(str(error).split())
        raise SlimError(f"command line: {text}; --help lists the flags") from error
    except TypeError as error:
        raise SlimError(f"command line: {' '.join(str(error).split())}; --help lists the flags") from error
    return kind(**{field.name: parsed[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def further_flags(kind: type[Any], pairs: Sequence[str]) -> dict[str, Any]:
    """name=value pairs as the typed values of a script's flags; SlimError for one that it does not have."""
    given = parse(kind, "", as_arguments(pairs))
    names = {pair.split("=", 1)[0].replace("-", "_") for pair in pairs}
    return {name: getattr(given, name) for name in names}


def as_arguments(pairs: Sequence[str]) -> list[str]:
    """name=value pairs as command-line arguments; a switch is name=true, a list name=a,b."""
    arguments = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SlimError(f"{pair}: expected name=value, as in lr=0.002 or rect=true")
        arguments += ["--" + name, *([] if value.lower() == "true" else value.split(","))]
    return arguments


def run_script(
    kind: type[Flags], action: Callable[[Flags], object], description: str, argv: Sequence[str] | None = None
) -> int:
    """Parse, act, and turn failures into one line on standard error; the process's exit code.

    Under torchrun the first rank does all of it, and the others have nothing to do.
    """
    if World.of_environment().is_first:
        for name in RANK_VARIABLES:  # nor is what it starts a rank
            os.environ.pop(name, None)
        code, _ = _outcome(lambda arguments: action(parse(kind, description, arguments)), argv, World())
        return code
    return 0


def run_on_all_ranks(
    kind: type[Flags], action: Callable[[Flags, World], object], description: str, argv: Sequence[str] | None = None
) -> int:
    """As `run_script`, on all ranks that torchrun starts: rank 0 prints, and of failures the first one is told."""
    try:
        world = World.join()
    except SlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as silence:
        if not world.is_first:
            silence.enter_context(contextlib.redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
        code, spoke = _outcome(lambda arguments: action(parse(kind, description, arguments), world), argv, world)
    world.leave(code, spoke)
    return code


def _outcome(act: Callable[[list[str]], object], argv: Sequence[str] | None, world: World) -> tuple[int, bool]:
    """The exit code, and whether it was this rank's to explain a bad one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for package in ("engine", "detection"):
        logging.getLogger(package).setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        act(arguments)
    except KeyboardInterrupt as stop:
        is_cause = world.ends_first()
        if is_cause:
            print(f"interrupted: {str(stop) or 'what is finished is in the run folder'}", file=sys.stderr, flush=True)
        return INTERRUPTED, is_cause
    except Exception as error:
        is_cause = world.ends_first()
        if is_cause:
            if "--debug" in arguments:
                traceback.print_exc()
            where = f"rank {world.rank}: " if world.size > 1 else ""
            print(f"error: {where}{one_line(error)}", file=sys.stderr, flush=True)
        return 1, is_cause
    return 0, True


def one_line(error: Exception) -> str:
    """The message; for what is not a user error also its kind and how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug prints the traceback)"


def choose_device(name: str, world: World | None = None) -> torch.device:
    """``auto`` or a torch device name, on several ranks a GPU for each; SlimError when it is not there."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if world is not None:
            device = world.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise SlimError(f"--device {name}: not available ({first}); use cpu or auto") from error
    return device


def existing_file(path: str, what: str) -> Path:
    """A path that must be a file."""
    if not Path(path).is_file():
        raise SlimError(f"{path}: no such file; expected {what}")
    return Path(path)
