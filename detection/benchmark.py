"""Milliseconds an image of checkpoints and exported files under any engine, measured in turns so that drift cancels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import slim
from data import DetectionDataset
from deploy import LayerTime, profile, profile_text, threads_of, torch_threads
from engine import Evaluation
from slim import SlimError
from tracking import RunFolder

from .benchmark_candidates import Candidate, Candidates, Sides, Wanted
from .benchmark_table import Row, machine_text, markdown, short_names, write
from .command import flat
from .datasets import open_data, so_many_images
from .detector import evaluate_detector
from .evaluator import Evaluator
from .flags import BenchmarkFlags
from .network import check_classes, img_of, sides_of
from .timing import Timing, Turns, rounds_for


def wanted(flags: BenchmarkFlags) -> Wanted:
    """What to measure."""
    if not flags.weights:
        raise SlimError("--weights: none given; name one or more checkpoints or exported files")
    if min(flags.batch_size, default=0) < 1:
        raise SlimError(f"--batch-size {' '.join(map(str, flags.batch_size))}: expected at least 1")
    for cores in flags.num_cores:
        threads_of(cores)
    sides = [sides_of(img) for img in flags.img]
    return Wanted(flags.weights, flags.engine, sides, flags.num_cores, flags.batch_size, flags.precision)


class Measured:
    """What a benchmark's candidates are run on, and their AP where there is data."""

    def __init__(self, flags: BenchmarkFlags) -> None:
        self.flags = flags
        self.config = None if flags.dataset.data is None else open_data(flags.dataset)
        self._data_sets: dict[int, DetectionDataset] = {}
        self._found: dict[tuple[object, ...], Evaluation] = {}

    def images(self, sides: Sides, count: int) -> Tensor:
        """Images of the split, again from the first where it is too small, or without data random ones."""
        if self.config is None:
            generator = torch.Generator().manual_seed(self.flags.seed)
            return torch.randint(0, 256, (count, 3, *sides), generator=generator).float() / 255
        return so_many_images(self._data_set(max(sides)), count, sides)

    def check_classes(self, candidates: Sequence[Candidate]) -> None:
        """Before any of them is measured."""
        if self.config is not None:
            for one in candidates:
                check_classes(one.detector, self.config, one.detector.weights, str(self.flags.dataset.data))

    def evaluation(self, candidate: Candidate) -> Evaluation | None:
        """Once for candidates that compute the same."""
        if self.config is None:
            return None
        if candidate.ap_key not in self._found:
            candidate.set_threads()
            evaluator = Evaluator(
                self._data_set(max(candidate.sides_px)),
                batch_size=16,
                workers=0,
                device=torch.device("cpu"),
                conf=self.flags.nms.conf,
                iou=self.flags.nms.iou,
                max_det=self.flags.nms.max_det,
                canvas_hw=candidate.sides_px,
            )
            self._found[candidate.ap_key] = evaluate_detector(candidate.detector, evaluator)
        return self._found[candidate.ap_key]

    def known(self, candidate: Candidate) -> Evaluation | None:
        """As ``evaluation``, without measuring it."""
        return self._found.get(candidate.ap_key)

    def _data_set(self, img: int) -> DetectionDataset:
        assert self.config is not None
        if img not in self._data_sets:
            self._data_sets[img] = DetectionDataset(self.config, self.flags.split, img)
        return self._data_sets[img]


def measure(flags: BenchmarkFlags) -> list[Row]:
    """A row for each combination; fills the run folder, when interrupted with what is measured by then."""
    combinations = wanted(flags)
    rounds = rounds_for(flags.repeats, flags.warmup)
    measured = Measured(flags)
    with Candidates(measured.images) as opened, torch_threads():
        candidates = opened.of(combinations)
        measured.check_classes(candidates)
        run = RunFolder.create(flags.run.project, flags.run.name)
        run.write_config(flat(flags), "benchmark.py")
        turns = Turns({one: one.run for one in candidates}, before=Candidate.set_threads)
        names = short_names(flags.weights)
        finished = False
        try:
            with torch.no_grad():
                take_turns(turns, rounds, names)
            for one in tqdm(candidates, desc="AP", disable=flags.dataset.data is None, leave=False):
                measured.evaluation(one)
            if flags.profile:
                write_profiles(profiled(candidates, names), run)
            finished = True
        finally:
            timings = turns.timings()
            if all(timing.runs_ms for timing in timings.values()):
                rows = rows_of(candidates, timings, names, measured)
                write(rows, machine_text(), run.path, finished=finished)
    print(f"results: {run.path}")
    return rows


def take_turns(turns: Turns[Candidate], rounds: Sequence[bool], names: dict[str, str]) -> None:
    """All rounds; the bar shows the medians of the first and of the fastest so far."""
    with tqdm(rounds, desc="rounds", unit="round") as bar:
        for counts in bar:
            turns.round(counts)
            if counts:
                median_ms = {one: timing.median_ms / len(one.images) for one, timing in turns.timings().items()}
                first, best = next(iter(median_ms)), min(median_ms, key=median_ms.__getitem__)
                bar.set_postfix_str(
                    f"first {median_ms[first]:.1f} ms, fastest {median_ms[best]:.1f} ms: "
                    f"{names[best.detector.weights]} {best.detector.engine}"
                )


def rows_of(
    candidates: Sequence[Candidate], timings: dict[Candidate, Timing], names: dict[str, str], measured: Measured
) -> list[Row]:
    """The table."""
    rows = []
    first_ms = timings[candidates[0]].median_ms / len(candidates[0].images)
    for one in candidates:
        timing, count, found = timings[one], len(one.images), measured.known(one)
        median_ms = timing.median_ms / count
        rows.append(
            Row(
                weights=one.detector.weights,
                network=names[one.detector.weights],
                engine=one.detector.engine,
                precision=one.precision_text,
                img=str(img_of(one.sides_px)),
                batch_size=count,
                num_cores=one.num_cores,
                milliseconds=median_ms,
                p10_ms=timing.percentile_ms(10) / count,
                p90_ms=timing.percentile_ms(90) / count,
                fps=1000 / median_ms,
                speed_up=first_ms / median_ms,
                ap=found and found.ap,
                ap50=found and found.ap50,
                bytes=one.detector.file_bytes,
                macs=one.facts.macs,
                params=one.facts.params,
                activation=one.facts.activation,
                runs=len(timing.runs_ms),
            )
        )
    return rows


def profiled(candidates: Sequence[Candidate], names: dict[str, str]) -> dict[str, list[LayerTime]]:
    """The operators of each candidate by its engine's own clock, printed as tables."""
    found = {}
    for one in candidates:
        one.set_threads()
        title = (
            f"{names[one.detector.weights]}, {one.detector.engine}, {one.precision_text}, "
            f"{img_of(one.sides_px)} pixels, cores: {one.num_cores or 'all'}, batch size {len(one.images)}"
        )
        found[title] = profile(one.reopened().network, one.images)
        print(f"\n{title}: the engine's own time, medians\n\n{profile_text(found[title])}")
    return found


def write_profiles(profiles: dict[str, list[LayerTime]], run: RunFolder) -> None:
    """profile.csv: an operator a line, with its share of its candidate's time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["candidate", "name", "kind", "precision", "milliseconds", "share"])
    for title, layers in profiles.items():
        total = sum(layer.milliseconds for layer in layers)
        for layer in layers:
            share = layer.milliseconds / total if total else 0.0
            writer.writerow([title, layer.name, layer.kind, layer.precision, layer.milliseconds, share])
    slim.write_text_atomically(run.path / "profile.csv", text.getvalue())


def main(flags: BenchmarkFlags) -> None:
    print(f"\n{markdown(measure(flags), machine_text())}")
