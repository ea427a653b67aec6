"""The sections of a report about one run, as blocks of Markdown: what it is, where it comes from, widths, gates, classes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..plots import plot_gates, plot_results
from ..run_folder import number
from .contents import Contents, channels_of, is_accepted, same_task
from .markdown import ABSENT, bar, change, code, duration, escape, share, table, written

WEIGHTS = ("slim.pt", "pruned.pt", "best.pt")  # last.pt carries the state of the training too
PICTURES = {
    "side_by_side.png": "The same images with the detections of both networks",
    "truth.png": "Labels of images of the evaluated split",
    "detections.png": "Detections of this run's network",
    "train_batch.png": "Training samples as the network sees them",
    "labels.png": "The data set's labels",
}
CURVES = {
    "pr_curve.png": "Precision against recall, with each class's AP50",
    "f1_curve.png": "F1 against the confidence, with each class's largest",
    "confusion_matrix.png": "What objects are taken for, at the suggested confidence",
}
_LABELS = {
    **{"ap": "AP", "ap50": "AP50", "ap75": "AP75", "macs": "M MACs", "params": "M parameters"},
    **{"ms": "ms an image", "closed_share": "gates closed"},
    "suggested_conf": "suggested --conf",
}
_SETTINGS = (
    *("weights", "criterion", "macs", "latency_ms", "latency_share", "unstructured", "epochs", "split", "data", "img"),
)


def summary(contents: Contents) -> list[str]:
    """What the run is, its figures, and the command that makes it again."""
    config, script = contents.config, contents.script
    blocks = []
    if script:
        known = {key: value for key in _SETTINGS if (value := config.get(key)) not in (None, "", [])}
        if "unstructured" in known:
            del known["criterion"]  # no channel is ranked
        settings = ", ".join(f"{key} {value}" for key, value in known.items())
        blocks.append(escape(f"Made by {script}{': ' if settings else ''}{settings}."))
    if rows := _figures(contents):
        blocks.append(table(("figure", ">value", ""), rows))
    if warning := contents.metrics.get("timing_warning"):
        blocks.append(escape(str(warning)))
    if script and config:
        command = ["python", *([script] if script.endswith(".py") else ["-m", script])]
        blocks += [
            "Again, from its configuration:",
            code(shlex.join([*command, "--config", str(contents.run.config_file)])),
        ]
    elif config:
        blocks.append("config.yaml does not say which script made this run.")
    return blocks


def _figures(contents: Contents) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of metrics.json."""
    metrics = contents.metrics
    rows = [(label, written(metrics, key), "") for key, label in _LABELS.items() if number(metrics, key) is not None]
    if (before := number(contents.figures_before, "ms")) and (ms := number(metrics, "ms")):
        rows.append(("speed", f"{before / ms:.2f} times as fast", "as before"))
    seconds, of_what = number(metrics, "seconds"), "of the training" if contents.rows else "of the evaluation"
    if contents.phases:
        seconds, of_what = sum(seconds for *_, seconds in contents.phases), "of all phases"
    if seconds and (images := number(metrics, "images")):
        rows.append(("time", duration(seconds), f"{of_what}, {images:.0f} images evaluated"))
    if (largest := number(metrics, "max_difference")) is not None:
        rows.append(("pruned = masked to", f"{largest:.0e}", "of the largest output"))
    return rows


@dataclass(frozen=True)
class Step:
    """One network on the way to this run's: its figures as in metrics.json, and its file."""

    name: str
    figures: Mapping[str, Any]
    file: Path | None = None


def steps_to(contents: Contents) -> list[Step]:
    """The networks that led to this run's, the dense one first, and this one last; alone where it began from nothing.

    Figures of a run on other data or at another image size are left out, since they do not compare.
    """
    steps = [Step(run.name, _comparable(run, contents), _weights(run)) for run in contents.ancestors]
    before = contents.figures_before
    costs = {key: before[key] for key in ("macs", "params") if key in before}
    if number(before, "ap") is not None or (before and not steps):
        name = "dense" if "baseline" in contents.metrics else "before"
        steps = [Step(name, before, Path(str(contents.config.get("weights"))))]
    elif before:
        steps[-1] = replace(steps[-1], figures={**steps[-1].figures, **costs})
    if contents.metrics.get("masked_ap") is not None:
        aps = {"ap": contents.metrics["masked_ap"], "ap50": contents.metrics.get("masked_ap50")}
        steps.append(Step("masked", {**aps, **costs}))
    return [*steps, Step(f"this run ({contents.path.name})", contents.metrics, _weights(contents))]


def _comparable(run: Contents, contents: Contents) -> dict[str, Any]:
    apart = set()
    if contents.metrics.get("ap") is not None and not same_task(run, contents):
        apart |= {"ap", "ap50", "ap75", "per_class"}
    if run.config.get("img") != contents.config.get("img"):
        apart |= {"macs", "ms"}
    return {key: value for key, value in run.metrics.items() if key not in apart}


def _weights(run: Contents) -> Path | None:
    return next((file for name in WEIGHTS if (file := run.path / "weights" / name).is_file()), None)


def before_after(contents: Contents) -> list[str]:
    """A row for each network that led to this one; columns without a value are left out."""
    steps = steps_to(contents)
    if len(steps) == 1:
        return []
    columns = (
        "network",
        ">AP",
        ">change",
        ">AP50",
        ">AP75",
        ">M MACs",
        ">share",
        ">M parameters",
        ">share",
        ">ms",
        ">file",
    )
    rows, start = [], {key: number(steps[0].figures, key) for key in ("ap", "macs", "params")}
    for step in steps:
        found, value = step.figures, {key: number(step.figures, key) for key in start}
        size = step.file.stat().st_size if step.file and step.file.is_file() else None
        rows.append(
            (
                *(step.name, written(found, "ap"), "" if step is steps[0] else change(value["ap"], start["ap"])),
                *(written(found, "ap50"), written(found, "ap75")),
                *(written(found, "macs"), share(value["macs"], start["macs"])),
                *(written(found, "params"), share(value["params"], start["params"])),
                *(written(found, "ms"), ABSENT if size is None else f"{size / 1e6:.2f} MB"),
            )
        )
    used = [k for k in range(len(columns)) if any(row[k] not in ("", ABSENT) for row in rows)]
    return [table([columns[k] for k in used], [[row[k] for k in used] for row in rows])]


def widths(contents: Contents) -> list[str]:
    """A row for each layer with its width before and after every cut that led here."""
    rounds = _rounds(contents)
    if rounds:
        first, after = channels_of(contents.figures_before), rounds
    else:
        cuts = [contents] if contents.metrics.get("after") else contents.ancestors
        after = {run.path.name: found for run in cuts if (found := channels_of(run.metrics.get("after")))}
        first = next((found for run in cuts if (found := channels_of(run.metrics.get("before")))), {})
    if not first or not after:
        return []
    rows, widest, stages = [], max(first.values()), [first, *after.values()]
    for layer, channels in first.items():
        counts = [stage.get(layer, 0) for stage in stages]
        rows.append((layer, bar(share(counts[-1], channels), counts[-1], channels, widest), *map(str, counts)))
    totals = [sum(stage.get(layer, 0) for layer in first) for stage in stages]
    rows.append(("all layers", share(totals[-1], totals[0]), *map(str, totals)))
    names = [">after"] if len(after) == 1 and not rounds else [f">{name}" for name in after]
    note = "Output channels of each layer: the light bar before, the dark bar after; the widest layer fills the column."
    return [note, table(("layer", "channels kept", ">before", *names), rows)]


def _rounds(contents: Contents) -> dict[str, dict[str, int]]:
    """The widths of a loop's networks after each round."""
    found, phases = {}, {name: result for name, result, _ in contents.phases}
    for row in filter(is_accepted, contents.candidates):
        channels = channels_of(phases.get(f"round{row.get('round')}-try{row.get('attempt')}-evaluation"))
        if channels:
            found[f"round {row['round']}"] = channels
    return found


def channels(contents: Contents) -> list[str]:
    """The layers against time: the epochs of a sparse training, or the rounds of a loop."""
    return contents.picture(contents.path / "channels.png", "How many channels of each layer are open, and what share")


def gates(contents: Contents) -> list[str]:
    """Histogram, share of closed gates, and a row for each group."""
    found = contents.metrics.get("gates")
    if found is None:
        return []
    groups, threshold = found["groups"], float(found["threshold"])
    total, closed = (sum(int(group[key]) for group in groups.values()) for key in ("channels", "closed"))
    rows = []
    for name, group in groups.items():
        channels, shut = int(group["channels"]), int(group["closed"])
        text = bar(share(shut, channels), shut, channels, channels)
        rows.append((str(name), str(channels), str(shut), text, f"{group['mean']:.3f}", f"{group['largest']:.3f}"))
    plot_gates(found, contents.path / "gates.png")
    return [
        f"{closed} of {total} gates are closed ({share(closed, total)}): below {threshold:g} in size.",
        *contents.picture(contents.path / "gates.png", "Histogram of gate sizes"),
        table(("group", ">channels", ">closed", "share closed", ">mean", ">largest"), rows),
    ]


def curves(contents: Contents) -> list[str]:
    """results.csv: a panel for losses, the L1 step's loss, APs, learning rate and the share of closed gates."""
    if not contents.rows:
        return []
    plot_results(contents.rows, contents.path / "results.png")
    total = sum(number(row, "seconds") or 0.0 for row in contents.rows)
    said = f"{len(contents.rows)} epochs" + (f", {duration(total)}." if total else ".")
    return [said, *contents.picture(contents.path / "results.png", "Curves of the training against the epoch")]


def classes(contents: Contents) -> list[str]:
    """AP of each class, beside that of the network before where it was measured on the same images."""
    after, whose = class_aps(contents.metrics), "before"
    before = class_aps(contents.figures_before)
    if not after:
        return []
    if not before:
        run = next((run for run in contents.ancestors if same_task(run, contents) and class_aps(run.metrics)), None)
        before, whose = ({}, "") if run is None else (class_aps(run.metrics), run.name)
    if not before:
        return [table(("class", "AP"), [(name, bar(f"{ap:.4f}", ap, 1, 1)) for name, ap in after.items()])]
    rows = []
    for name in dict.fromkeys([*after, *before]):
        old, new = before.get(name), after.get(name)
        bars = [ABSENT if ap is None else bar(f"{ap:.4f}", ap, 1, 1) for ap in (old, new)]
        rows.append((name, *bars, change(new, old)))
    drops = {name: before[name] - after[name] for name in before if name in after}
    worst = max(drops, key=lambda name: drops[name], default=None)
    said = (
        "no class lost any"
        if worst is None or drops[worst] <= 0
        else f"the largest drop is {drops[worst]:.4f}, of {worst}"
    )
    return [escape(f"AP against {whose}: {said}."), table(("class", "AP before", "AP after", ">change"), rows)]


def class_aps(metrics: Mapping[str, Any]) -> dict[str, float]:
    """AP by class name."""
    found = metrics.get("per_class")
    return {str(k): ap for k in found if (ap := number(found, k)) is not None} if isinstance(found, dict) else {}


def precision_recall(contents: Contents) -> list[str]:
    """Precision, recall and F1 of each class at the suggested confidence, their curves, and the confusion matrix."""
    found = contents.metrics.get("at_conf")
    if found is None:
        return []
    columns = ("precision", "recall", "f1", "ap50")
    means = {
        **found,
        "ap50": contents.metrics.get("ap50"),
        "objects": sum(r["objects"] for r in found["per_class"].values()),
    }
    rows = [
        (str(name), str(row["objects"]), *(written(row, key) for key in columns))
        for name, row in [("all classes", means), *found["per_class"].items()]
    ]
    conf = number(contents.metrics, "suggested_conf")
    said = "No detection is right, so there is no --conf to suggest."
    if conf is not None:
        said = f"At --conf {conf:g}, where the mean F1 of the classes is largest; "
        said += (
            "a detection is right at an IoU of 0.5 or more, by pycocotools' matches, class by class in the table and "
        )
        said += "the curves, of any class in the matrix. They stand after the suppression of val.py, which by default leaves "
        said += "more boxes that overlap than detect.py's."
    return [
        escape(said),
        table(("class", ">objects", ">precision", ">recall", ">F1", ">AP50"), rows),
        *(part for file, title in CURVES.items() for part in contents.picture(contents.path / file, title)),
    ]


def pictures(contents: Contents) -> list[str]:
    """The pictures of the run folder."""
    return [part for file, title in PICTURES.items() for part in contents.picture(contents.path / file, title)]
