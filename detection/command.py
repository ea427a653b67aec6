"""Command lines from dataclasses: flat flags over nested settings, ``--config`` files and one-line errors.

An annotated field, ``lr: Annotated[float, "learning rate", "above 0"] = 0.01``, is the flag ``--lr`` with that help; a
further annotation is the range of its values. A field that is itself such a dataclass gives its flags, under the first
line of its docstring in ``--help``; an annotation of it is what their names begin with. A field without an annotation is
no flag.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import yaml

from engine.settings import RANK_VARIABLES

if TYPE_CHECKING:
    from engine import World as World

Flags = TypeVar("Flags")

ALIASES = {
    "imgsz": "img",
    "img_size": "img",
    "image_size": "img",
    "batch": "batch_size",
    "conf_thres": "conf",
    "iou_thres": "iou",
    "lr0": "lr",
    "lrf": "final_lr_ratio",
    "cos_lr": "schedule=cosine",
    "noval": "eval_every=0",
    "task": "split",
    "pull_from": "sparse_from",
    "data": "names",
}
"""Other spellings of flags, YOLOv5's above all."""
BARE = {"cache": "ram", "resume": "newest"}
"""What a flag means that is given without its value."""
OF_THE_COMMAND_LINE_ALONE = ("debug", "resume", "exist_ok")
"""Keys that older config.yaml files hold, and that say nothing about what to do again."""
GONE = {"closed_share": None, "cost_aware": False}
"""Flags that are no more, or not of every script: older config.yaml files may hold them with these values, their defaults."""
EXTRAS = dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino", "nncf"), "deploy") | {
    "av": "video",
    "ray": "ray",
    "submitit": "slurm",
    "torch_pruning": "bench",
}
"""Which extra of the installation has a package that not every script needs; all others are in ``train``."""
INTERRUPTED = 130
"""Exit code of a run that was interrupted."""


def check_installed(*packages: str) -> None:
    """ModuleNotFoundError for a package that is missing: before there is a run folder, or hours of work that end with it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


class CommandError(ValueError):
    """A command line or a ``--config`` file that cannot be meant; one line."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: its type, help, value where it is not given, the settings that it belongs to, and the range of its values."""

    kind: Any
    help: str
    default: Any
    group: str
    expected: str = ""


def flags_of(settings: Any, prefix: str = "") -> dict[str, Flag]:
    """The flags of a dataclass and of those inside of it by their flat names, with the values in ``settings``."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(type(settings), include_extras=True)
    group = (type(settings).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    for field in dataclasses.fields(settings):
        hint, value = hints[field.name], getattr(settings, field.name)
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        new = {}
        if dataclasses.is_dataclass(value):
            new = flags_of(value, prefix + "".join(notes))
        elif notes:
            new = {prefix + field.name: Flag(kind, notes[0], value, group, *notes[1:])}
        assert not found.keys() & new.keys(), f"two flags of one name: {sorted(found.keys() & new.keys())}"
        found |= new
    return found


def flat(settings: Any) -> dict[str, Any]:
    """The values of a script's settings by their flags' names: what its config.yaml holds."""
    return {name: flag.default for name, flag in flags_of(settings).items()}


def with_values(settings: Flags, values: Mapping[str, Any], prefix: str = "") -> Flags:
    """A copy of settings with other values of the flags that ``values`` names."""
    changed: dict[str, Any] = {}
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        old, name = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(old):
            changed[field.name] = with_values(old, values, prefix + "".join(typing.get_args(hints[field.name])[1:]))
        elif name in values and typing.get_origin(hints[field.name]) is Annotated:
            changed[field.name] = values[name]
    return dataclasses.replace(settings, **changed)  # type: ignore[type-var]


def parse(kind: type[Flags], description: str, argv: Sequence[str] | None = None) -> Flags:
    """A script's settings, see ``read``."""
    return read(kind(), sys.argv[1:] if argv is None else argv, description)


def read(defaults: Flags, words: Sequence[str], description: str = "") -> Flags:
    """Settings from ``--config`` files, ``--hyp`` (a YOLOv5 hyper-parameter file) and the command line, which wins.

    ``defaults`` hold where nothing is said. A field ``given`` is filled with the names of the flags of which something is.
    Raises CommandError with one line that names the flag, the value and what was expected.
    """
    flags = flags_of(defaults)
    parser = _parser(flags, description)
    configs, hyp, rest = _files(words, flags)
    found = argparse.Namespace()
    for file in [*configs, *([hyp] if hyp else [])]:
        content = _content(file)
        if file == hyp:
            unused = [name for name in content if ALIASES.get(name, name) not in flags]
            if unused and os.environ.get("RANK", "0") == "0":
                print(f"{file}: not used: {', '.join(unused)}")
        else:
            gone = [name for name, value in GONE.items() if name not in flags and content.get(name) == value]
            unused = [*OF_THE_COMMAND_LINE_ALONE, *gone]
        try:
            used = {name: value for name, value in content.items() if name not in unused}
            parser.parse_args(_spelled(as_words(used), flags), found)
        except CommandError as error:
            raise CommandError(f"{file}: {str(error).removeprefix('command line: ')}") from error
    parser.parse_args(_spelled(rest, flags), found)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}
    done = with_values(defaults, values)
    return dataclasses.replace(done, given=frozenset(values) & flags.keys()) if hasattr(done, "given") else done  # type: ignore[type-var]


def with_pairs(settings: Flags, pairs: Sequence[str]) -> Flags:
    """Settings with further flags from name=value pairs; CommandError for one that there is not."""
    return read(settings, as_arguments(pairs))


def as_arguments(pairs: Sequence[str]) -> list[str]:
    """name=value pairs as command-line arguments; a switch is name=true or name=false, a list name=a,b."""
    content: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"{pair}: expected name=value, as in lr=0.002 or rect=true")
        switch = {"true": True, "false": False}.get(value.lower())
        content[name] = (value.split(",") if "," in value else value) if switch is None else switch
    return as_words(content)


def as_words(content: Mapping[str, Any]) -> list[str]:
    """Names and plain values as command-line arguments."""
    words: list[str] = []
    for name, value in content.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={'null' if value is None else value}")
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument ([^/:]+)[^:]*: ", r"\1 ", message)
        raise CommandError(f"command line: {text}; --help lists the flags")


def _parser(flags: Mapping[str, Flag], description: str) -> argparse.ArgumentParser:
    """Of flags that are absent from what it finds unless they are given."""
    parser = _Parser(
        usage="%(prog)s [--flag value ...]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags, such as a run folder's config.yaml")
    if _takes_hyp(flags):
        parser.add_argument(
            "--hyp", metavar="FILE", help="YOLOv5 hyper-parameter file; flags that are given win over it"
        )
    parser.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    groups: dict[str, Any] = {}
    for name, flag in flags.items():
        group = groups.get(flag.group) or groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        many = typing.get_origin(flag.kind) is tuple
        item = typing.get_args(flag.kind)[0] if many else flag.kind
        shown = " ".join(map(str, flag.default)) if many else flag.default
        text = (flag.help if shown in (None, "", False) else f"{flag.help} (default: {shown})").replace("%", "%%")
        extra: dict[str, Any] = {"type": _reader(item, flag.expected), "metavar": _metavar(item)}
        if flag.kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif many:
            extra["nargs"] = "*"
        elif name in BARE:
            extra |= {"nargs": "?", "const": BARE[name]}
        group.add_argument("--" + name.replace("_", "-"), help=text, **extra)
    return parser


def _takes_hyp(flags: Mapping[str, Flag]) -> bool:
    return {"final_lr_ratio", "mosaic"} <= flags.keys()


def _options(kind: Any) -> tuple[Any, ...]:
    """What a union allows, None first."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if is_union else (kind,)
    return tuple(sorted(options, key=lambda option: option is not types.NoneType))


def _metavar(kind: Any) -> str:
    known = {int: "N", float: "X", str: "TEXT"}
    options = [option for option in _options(kind) if option is not types.NoneType]
    return "|".join(known.get(option) or "|".join(typing.get_args(option)) for option in options)


def _reader(kind: Any, expected: str = "") -> Callable[[str], Any]:
    """From a word of the command line to a value of a type, within a range such as 'above 0 to below 1'."""

    def read_word(word: str) -> Any:
        wanted: list[str] = []
        for option in _options(kind):
            if option is types.NoneType:
                if word.lower() in ("null", "none"):
                    return None
            elif typing.get_origin(option) is Literal:
                wanted += typing.get_args(option)
                if word.lower() in typing.get_args(option):
                    return word.lower()
            else:
                wanted.append({int: "a whole number", float: "a number"}.get(option, "text"))
                with contextlib.suppress(ValueError):
                    value = option(word)
                    if not expected or _is_within(value, expected):
                        return value
                    wanted = [expected]
        raise argparse.ArgumentTypeError(f"{word}: expected {' or '.join(wanted)}{_percent_hint(word, expected)}")

    return read_word


def _percent_hint(word: str, expected: str) -> str:
    """What a percentage is as the share that was expected, where it can be meant; else ""."""
    with contextlib.suppress(ValueError):
        percent = float(word.removesuffix("%"))
        if re.search("to (below )?1$", expected) and percent >= 2 and _is_within(percent / 100, expected):
            return f"; {percent:g} % is {percent / 100:g}"
    return ""


def _is_within(value: float, expected: str) -> bool:
    """Whether a number is 'at least 1', 'above 0', '0 to 1' or 'above 0 to below 1'; finite unless 'to inf' is said."""
    limits = re.fullmatch(r"(above )?(?:at least )?(\S+)(?: to (below )?(\S+))?", expected)
    assert limits is not None, expected
    above, low, below, high = limits[1], float(limits[2]), limits[3] or not limits[4], float(limits[4] or "inf")
    return (low < value if above else low <= value) and (value < high if below else value <= high)


def _spelled(words: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """Flags by their own names; CommandError for one that there is not, with the one that may be meant."""
    known = {*flags, "config", "debug", "help", *(["hyp"] if _takes_hyp(flags) else [])}
    spellings = {alias: meant for alias, meant in ALIASES.items() if meant.partition("=")[0] in flags} | dict(
        zip(known, known, strict=True)
    )
    spelled = []
    for word in words:
        if not word.startswith("--"):
            spelled.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        negated = key not in spellings and key.startswith("no_")
        key = key.removeprefix("no_") if negated else key
        if key not in spellings:
            near = [k for k in spellings if k.startswith(key)] or difflib.get_close_matches(key, spellings, 1)
            hint = f"did you mean --{min(near, key=len).replace('_', '-')}" if near else "--help lists the flags"
            raise CommandError(f"--{name}: unknown flag; {hint}")
        meant, implied, setting = spellings[key].partition("=")
        if not (implied and negated):
            spelled.append(
                ("--no-" if negated else "--") + meant.replace("_", "-") + (implied or equals) + (setting or value)
            )
    return spelled


def _files(words: Sequence[str], flags: Mapping[str, Flag]) -> tuple[list[str], str | None, list[str]]:
    """The files of --config, the one of --hyp, and the other words."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    if _takes_hyp(flags):
        parser.add_argument("--hyp")
    found, rest = parser.parse_known_args(words)
    return found.config, getattr(found, "hyp", None), rest


def _content(file: str) -> dict[str, Any]:
    """A YAML file of names and plain values."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise CommandError(f"{file}: it has aliases (*name), which can expand without end; write out their values")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CommandError(f"{file}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict):
        raise CommandError(f"{file}: expected a YAML file of names and values, such as a run folder's config.yaml")
    return content


def run_script(
    kind: type[Flags], action: Callable[[Flags], object], description: str, argv: Sequence[str] | None = None
) -> int:
    """Parse, act, and turn failures into one line on standard error; the process's exit code.

    Under torchrun the first rank does all of it, and the others have nothing to do.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return 0
    for name in RANK_VARIABLES:  # nor is what it starts a rank
        os.environ.pop(name, None)
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _outcome(lambda: action(parse(kind, description, arguments)), arguments)[0]


def run_on_all_ranks(
    kind: type[Flags], action: Callable[[Flags, World], object], description: str, argv: Sequence[str] | None = None
) -> int:
    """``run_script`` on all ranks that torchrun starts: rank 0 prints, and of failures the first one is told."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        flags = parse(kind, description, arguments)
        from engine import World  # and with it torch

        world = World.join()
    except Exception as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, CommandError):
            _explain(error, arguments)
        return 1
    with contextlib.ExitStack() as silence:
        if not world.is_first:
            silence.enter_context(contextlib.redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
        code, spoke = _outcome(lambda: action(flags, world), arguments, world)
    world.leave(code, spoke)
    return code


def _outcome(act: Callable[[], object], arguments: Sequence[str], world: World | None = None) -> tuple[int, bool]:
    """The exit code, and whether it was this rank's to explain a bad one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for package in ("engine", "detection"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        act()
    except KeyboardInterrupt as stop:
        is_cause = world is None or world.claim_failure()
        if is_cause:
            print(f"interrupted: {str(stop) or 'what is finished is in the run folder'}", file=sys.stderr, flush=True)
        return INTERRUPTED, is_cause
    except Exception as error:
        is_cause = world is None or world.claim_failure()
        if is_cause:
            _explain(error, arguments, f"rank {world.rank}: " if world is not None and world.size > 1 else "")
        return 1, is_cause
    return 0, True


def _explain(error: Exception, arguments: Sequence[str], where: str = "") -> None:
    """Print one line on standard error; after --debug the traceback before it."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    print(f"error: {where}{one_line(error)}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The message of a user's mistake, and of anything else that it is a defect of this program."""
    text = " ".join(str(error).split())
    if isinstance(error, CommandError) or (isinstance(error, OSError) and error.filename is not None):
        return text
    if isinstance(error, ModuleNotFoundError) and (missing := (error.name or "").partition(".")[0]) in EXTRAS:
        extra = EXTRAS[missing]
        return f"{missing} is not installed; pip install -e '.[{extra}]' has it (of a wheel: 'channel-slim[{extra}]')"
    from slim import SlimError

    if isinstance(error, SlimError):
        return text
    return f"a defect of this program, please report: {type(error).__name__}: {text}; --debug prints the traceback"
