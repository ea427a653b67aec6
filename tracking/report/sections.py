"""The sections of one run: what it is, where it comes from, widths, classes, curves and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from . import charts, wording
from .blocks import Block, Cell, Chart, Command, Facts, Picture, Section, Table, Text
from .contents import PARETO_FILE, Contents, channels_of, class_aps, is_accepted, number, same_task

_WEIGHTS = ("slim.pt", "pruned.pt", "best.pt")  # last.pt carries the state of the training too
_MOST_PICTURE_BYTES, _MOST_PICTURE_PX = 400_000, 1600
_WHAT = {
    "train_sparse.py": "Sparse training: {epochs} epochs on {data} at {img} pixels with gates behind the activations; "
    "from epoch {pull_from} on the smallest {fraction:.0%} of each gate vector are pulled towards 0.",
    "finetune.py": "Training without the pull: {epochs} epochs on {data} at {img} pixels.",
    "prune.py": "A cut of {weights}: channels ranked by the criterion {criterion}, pruned and masked network compared "
    "on images before anything was saved.",
    "val.py": "Evaluation of {weights} on the {split} split of {data} at {img} pixels.",
    "iterate.py": "The slimming loop on {weights}: rounds of sparse training and cutting on {data} at {img} pixels, then "
    "fine-tuning, down to {target}.",
    "experiments.slimming": "A comparison on {data} at {img} pixels: dense for {dense_epochs} epochs against sparse training "
    "for {sparse_epochs}, a cut and {finetune_epochs} epochs of fine-tuning.",
}


def headline(contents: Contents) -> Section | None:
    """What the run is, its figures, and the commands that make it again."""
    metrics, config, script = contents.metrics, contents.config, contents.script
    blocks: list[Block] = []
    if script is not None:
        sentence = _WHAT.get(script, "A run of {script}.")
        if script == "prune.py" and config.get("unstructured") is not None:
            sentence = (
                "{weights} with {unstructured:.0%} of its convolutions' weights set to zero, and all of its channels."
            )
        try:
            blocks.append(Text(sentence.format(**{"script": script, "target": _target(config), **config})))
        except (KeyError, ValueError, TypeError):
            blocks.append(Text(f"A run of {script}."))
    if metrics:
        blocks.append(Facts(_facts(contents)))
    if script is not None and config:
        blocks.append(Command("Again, from its configuration:", _from_config(contents, script)))
        blocks.append(Command("The same with every flag:", wording.command_line(script, config)))
    elif config:
        blocks.append(Text(f"{contents.run.config_file.name} does not say which script made this run."))
    return Section("Summary", tuple(blocks)) if blocks else None


def _target(config: Mapping[str, Any]) -> str:
    """What a loop aims at."""
    if config.get("latency_ms") is not None:
        return f"{config['latency_ms']:g} ms an image in {config['engine']}"
    if config.get("latency_share") is not None:
        return f"{config['latency_share']:g} of the dense network's milliseconds in {config['engine']}"
    return f"{config.get('macs')} of the MACs"


def _from_config(contents: Contents, script: str) -> str:
    return wording.config_command(script, str(contents.run.config_file))


def _facts(contents: Contents) -> tuple[tuple[str, str, str], ...]:
    metrics, first_step = contents.metrics, steps_to(contents)[0]
    before = {} if first_step.figures is metrics else first_step.figures
    items = []
    ap, first = number(metrics, "ap"), number(before, "ap")
    if ap is not None:
        against = "" if first is None else f"{wording.change(ap, first)} against {first_step.name}"
        items.append(("AP", wording.ap(ap), against))
    for key, label in (("ap50", "AP50"), ("ap75", "AP75")):
        if (value := number(metrics, key)) is not None:
            items.append((label, wording.ap(value), ""))
    for key, label, digits in (("macs", "M MACs", 1), ("params", "M parameters", 3)):
        if (value := number(metrics, key)) is not None:
            of_before = wording.share(value, number(before, key))
            items.append(
                (label, wording.millions(value, digits), f"{of_before} of {first_step.name}" if of_before else "")
            )
    if (ms := number(metrics, "ms")) is not None:
        items.append(("ms an image", wording.milliseconds(ms), _times_faster(number(before, "ms"), ms)))
    if (closed := number(metrics, "closed_share")) is not None:
        items.append(("gates closed", f"{closed:.1%}", ""))
    seconds, of_what = number(metrics, "seconds"), "of the training" if contents.rows else "of the evaluation"
    if contents.phases:
        seconds, of_what = sum(phase.seconds or 0.0 for phase in contents.phases), "of all phases"
    if seconds and (images := number(metrics, "images")):
        items.append(("time", wording.duration(seconds), f"{of_what}, {images:.0f} images evaluated"))
    if (difference := number(metrics, "max_difference")) is not None:
        items.append(("pruned = masked to", f"{difference:.0e}", "of the largest output"))
    return tuple(items)


def _times_faster(before: float | None, after: float) -> str:
    return "" if before is None or not after else f"{before / after:.2f} times as fast"


@dataclass(frozen=True)
class Step:
    """One network on the way to this run's: its figures as in metrics.json and its file's size."""

    name: str
    figures: Mapping[str, Any]
    size_bytes: int | None


def steps_to(contents: Contents) -> list[Step]:
    """The networks that led to this run's, the dense one first, and this one last; alone where it began from nothing.

    Figures of a run on other data or at another image size are left out, since they do not compare.
    """
    steps = [Step(_name(run), _comparable(run, contents), _weights_bytes(run.path)) for run in contents.ancestors]
    before = contents.figures_before
    if number(before, "ap") is not None or (before and not steps):
        steps = [
            Step(
                "dense" if contents.table(PARETO_FILE) else "before",
                before,
                _file_bytes(contents.config.get("weights")),
            )
        ]
    elif before:
        steps[-1] = replace(steps[-1], figures={**steps[-1].figures, **_costs(before)})
    if contents.metrics.get("masked_ap") is not None:
        aps = {"ap": contents.metrics["masked_ap"], "ap50": contents.metrics.get("masked_ap50")}
        steps.append(Step("masked", {**aps, **_costs(before)}, None))
    return [*steps, Step(f"this run ({contents.path.name})", contents.metrics, _weights_bytes(contents.path))]


def _comparable(run: Contents, contents: Contents) -> dict[str, Any]:
    apart = set()
    if contents.metrics.get("ap") is not None and not same_task(run, contents):
        apart |= {"ap", "ap50", "ap75", "per_class"}
    if run.config.get("img") != contents.config.get("img"):
        apart |= {"macs", "ms"}
    return {key: value for key, value in run.metrics.items() if key not in apart}


_STEP_COLUMNS = (
    *("network", ">AP", ">change", ">AP50", ">AP75"),
    *(">M MACs", ">share", ">M parameters", ">share", ">ms", ">file"),
)


def before_after(contents: Contents) -> Section | None:
    """A row for each network that led to this one; columns without a value are left out."""
    steps = steps_to(contents)
    if len(steps) == 1:
        return None
    rows = [_step_row(step, steps[0]) for step in steps]
    used = [k for k in range(len(_STEP_COLUMNS)) if any(row[k] not in ("", wording.ABSENT) for row in rows)]
    kept = tuple(tuple(row[k] for k in used) for row in rows)
    return Section("Before and after", (Table(tuple(_STEP_COLUMNS[k] for k in used), kept),))


def _step_row(step: Step, first: Step) -> tuple[Cell, ...]:
    value, start = (
        {key: number(figures, key) for key in ("ap", "ap50", "ap75", "macs", "params", "ms")}
        for figures in (step.figures, first.figures)
    )
    return (
        step.name,
        wording.ap(value["ap"]),
        "" if step is first else wording.change(value["ap"], start["ap"]),
        wording.ap(value["ap50"]),
        wording.ap(value["ap75"]),
        wording.millions(value["macs"]),
        wording.share(value["macs"], start["macs"]),
        wording.millions(value["params"], 3),
        wording.share(value["params"], start["params"]),
        wording.milliseconds(value["ms"]),
        wording.file_size(step.size_bytes),
    )


def _costs(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("macs", "params") if key in figures}


def _name(run: Contents) -> str:
    kind = f" ({run.script.removesuffix('.py')})" if run.script else ""
    return f"{run.path.name}{kind}"


def _weights_bytes(folder: Path) -> int | None:
    sizes = [_file_bytes(str(folder / "weights" / name)) for name in _WEIGHTS]
    return next((size for size in sizes if size is not None), None)


def _file_bytes(path: Any) -> int | None:
    return Path(path).stat().st_size if isinstance(path, str) and path and Path(path).is_file() else None


def widths(contents: Contents) -> Section | None:
    """A row for each layer with its width before and after every cut that led here."""
    names, stages = widths_over_rounds(contents) if contents.phases else _widths_of_cuts(contents)
    return width_table(stages, names) if len(stages) > 1 else None


def _widths_of_cuts(contents: Contents) -> tuple[list[str], list[dict[str, int]]]:
    """This run's cut, else those of the runs that led here; the widths before the first come first."""
    own = contents.widths[1]
    cuts = [contents] if own else [run for run in contents.ancestors if run.widths[1]]
    return [cut.path.name for cut in cuts], [*(cut.widths[0] for cut in cuts[:1]), *(cut.widths[1] for cut in cuts)]


def widths_over_rounds(contents: Contents) -> tuple[list[str], list[dict[str, int]]]:
    """A loop's dense network and what each of its accepted rounds left."""
    found = {phase.name: channels_of(phase.found) for phase in contents.phases}
    names, stages = list[str](), [found.get("baseline", {})]
    for row in contents.table(PARETO_FILE)[1:]:
        channels = found.get(f"round{row.get('round')}-try{row.get('attempt')}-evaluation")
        if is_accepted(row) and channels:
            names.append(f"round {row['round']}")
            stages.append(channels)
    return names, stages


def width_table(stages: list[dict[str, int]], names: list[str]) -> Section:
    """``stages``: {layer: output channels} before the first cut and after each of the named ones."""
    first, rows = stages[0], list[tuple[Cell, ...]]()
    widest = max(first.values(), default=1)
    for layer, channels in first.items():
        counts = [channels, *(stage.get(layer, 0) for stage in stages[1:])]
        text = wording.share(counts[-1], channels)
        rows.append((layer, wording.bar(text, *counts, full=widest), *map(str, counts)))
    totals = [sum(stage.get(layer, 0) for layer in first) for stage in stages]
    rows.append(("all layers", wording.share(totals[-1], totals[0]), *map(str, totals)))
    after = [">after"] if len(names) == 1 else [f">{name}" for name in names]
    note = "Output channels of each layer: the light bar before, the dark bar after; the widest layer fills the column."
    return Section("Widths", (Text(note), Table(("layer", "channels kept", ">before", *after), tuple(rows))))


def classes(contents: Contents) -> Section | None:
    """AP of each class, beside that of the network before where it was measured on the same images."""
    after = class_aps(contents.metrics)
    if not after:
        return None
    before, whose = class_aps(contents.figures_before), "before"
    if not before:
        run = next((run for run in contents.ancestors if same_task(run, contents) and class_aps(run.metrics)), None)
        before, whose = ({}, "") if run is None else (class_aps(run.metrics), _name(run))
    names = list(dict.fromkeys([*after, *before]))
    if not before:
        rows: list[tuple[Cell, ...]] = [
            (name, wording.gauge(wording.ap(after[name]), after[name], full=1.0)) for name in names
        ]
        return Section("Classes", (Table(("class", "AP"), tuple(rows)),))
    drops = {name: before[name] - after[name] for name in names if name in before and name in after}
    rows = [
        (
            name,
            wording.gauge(wording.ap(before.get(name)), before.get(name), full=1.0),
            wording.gauge(wording.ap(after.get(name)), after.get(name), full=1.0),
            wording.change(after.get(name), before.get(name)),
        )
        for name in names
    ]
    blocks: list[Block] = []
    if drops:
        worst = max(drops, key=lambda name: drops[name])
        lost = f"the largest drop is {drops[worst]:.4f}, of {worst}" if drops[worst] > 0 else "no class lost any"
        blocks.append(Text(f"AP against {whose}: {lost}."))
    return Section("Classes", (*blocks, Table(("class", "AP before", "AP after", ">change"), tuple(rows))))


_PANELS = {
    "loss/l1": "L1 of the pulled gates",
    "lr": "learning rate",
    "metrics": "AP",
    "gates/closed_share": "share of closed gates",
}


def training_curves(contents: Contents) -> Section | None:
    """results.csv: a panel for losses, the pull's loss, APs, learning rate and the share of closed gates."""
    rows = contents.rows
    if not rows:
        return None
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        if column in ("epoch", "seconds"):
            continue
        points = [(float(row["epoch"]), y) for row in rows if (y := number(row, column)) is not None]
        prefix = column.split("/")[0]
        title = _PANELS.get(column, _PANELS.get(prefix, prefix))
        if points:
            panels.setdefault(title, {})[column] = points
    if not panels:
        return None
    total = sum(number(row, "seconds") or 0.0 for row in rows)
    said = Text(f"{len(rows)} epochs" + (f", {wording.duration(total)}." if total else "."))
    return Section("Curves", (said, Chart("Curves of the training against the epoch", charts.curves(panels))))


PICTURES = {
    "side_by_side.png": "The same images with the detections of both networks",
    "detections.png": "Detections of this run's network",
    "train_batch.png": "Training samples as the network sees them",
    "labels.png": "The data set's labels",
}


def pictures(contents: Contents) -> Section | None:
    """The pictures of the run folder."""
    found = [(contents.path / name, title) for name, title in PICTURES.items()]
    blocks = [block for file, title in found if (block := read_picture(contents, file, title)) is not None]
    return Section("Pictures", tuple(blocks)) if blocks else None


def read_picture(contents: Contents, file: Path, title: str) -> Picture | None:
    """A picture with its content; one of many bytes is scaled down and written as JPEG."""
    if not file.is_file():
        return None
    try:
        content, kind = file.read_bytes(), "png"
        with Image.open(file) as image:
            image.load()
            width, height = image.size
            if len(content) > _MOST_PICTURE_BYTES:
                smaller = image.convert("RGB")
                smaller.thumbnail((_MOST_PICTURE_PX, _MOST_PICTURE_PX))
                packed = io.BytesIO()
                smaller.save(packed, "jpeg", quality=85)
                content, kind, (width, height) = packed.getvalue(), "jpeg", smaller.size
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for a damaged file
        contents.problems.append(f"{file.name} cannot be shown: {type(error).__name__}")
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    try:
        shown = file.relative_to(contents.path).as_posix()
    except ValueError:
        shown = file.name
    return Picture(title, shown, uri, width, height)
