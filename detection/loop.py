"""The slimming loop as a journal: rounds of sparse training, cut and recovery, then fine-tuning, folding and export.

The same command continues a loop that was interrupted or killed, whatever it was doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import slim
from data import DataConfig, DetectionDataset
from deploy import files_of, parts_of
from engine import WARM_START_KEY, Evaluation, OptimConfig, World
from slim import SlimError
from slim.atomic import WRITING
from tracking import RunFolder, plot_widths
from tracking.journal import Journal
from tracking.run_folder import plain
from tracking.stages import Stages

from .candidates import (
    Candidate,
    LoopTarget,
    candidate_table,
    check_drop,
    check_max_drop,
    make_candidate,
    round_target,
    save_networks,
    smaller_cut,
    write_pareto,
    write_reports,
    write_tensorboard,
)
from .command import check_installed, flat
from .datasets import data_digest, open_data, real_images
from .evaluator import Evaluator
from .flags import IterateFlags, PruneFlags, TrainFlags
from .latency import LatencySearch, Measurer
from .loop_training import TrainJob, cut_training_state, finetune_flags, prune_flags, sparse_flags, stop, worker_loop
from .network import (
    channel_stages,
    check_classes,
    check_image_size,
    choose_device,
    example_image,
    file_digest,
    read_network,
    save_network,
)
from .pruning import PROOF_IMAGES, choose_plan, cut, open_prune_inputs, output_widths, proven
from .published import find_weights
from .training import MAY_CHANGE
from .write_file import PACKAGES_OF, SUFFIX_OF, write_file

NOT_OF_THE_RUN = {"project", "name", *MAY_CHANGE}
"""Flags that may change when a loop continues: what it finds does not depend on them."""


@dataclass(frozen=True)
class Accepted:
    """The smallest network that the loop has accepted so far; its latency is a share of the dense network's."""

    weights: Path
    macs: int
    latency: float = 1.0
    plans: tuple[slim.Plan, ...] = ()

    @property
    def carried(self) -> Path | None:
        """The checkpoint whose optimiser state and moving average the next training begins with."""
        return self.weights if self.plans else None


class Loop:
    """One run: its journal, and what its phases need."""

    def __init__(
        self,
        flags: IterateFlags,
        config: DataConfig,
        val_set: DetectionDataset,
        run: RunFolder,
        opening: Mapping[str, Any],
        world: World | None = None,
    ) -> None:
        self.flags, self.run, self.world = flags, run, world or World()
        self.world.share(flags.loading.batch_size)
        self.device = choose_device(flags.device, self.world)
        check_installed(*PACKAGES_OF.get(flags.export, ()))
        self.dense = read_network(flags.weights)
        check_image_size(self.dense.model, flags.img)
        check_classes(self.dense, config, flags.weights, str(flags.dataset.data))
        self.val_set = val_set
        self.evaluator = Evaluator(self.val_set, batch_size=flags.loading.batch_size, workers=0, device=self.device)
        self.candidates: list[Candidate] = []
        images = real_images(self.val_set, PROOF_IMAGES)
        measurer = Measurer(flags.latency, self.dense, images) if flags.latency.given else None
        self.journal = Journal(run.path, opening)  # the first file: what cannot be done was refused above
        run.write_config(flat(flags), "iterate.py")
        self.target = LoopTarget(flags, self.dense, measurer, self.journal)

    @cached_property
    def baseline(self) -> dict[str, Any]:
        """What the dense network reaches: the measure of every candidate."""

        def act(work: Path) -> dict[str, Any]:
            return self.figures(self.dense.model, self.evaluator(self.dense.model))

        return self.journal.phase("baseline", act)

    @cached_property
    def stages(self) -> Stages:
        """The dense network's layers by part and stage, as TensorBoard shows them."""
        layers = slim.cost(self.dense.model.cpu(), example_image(self.flags.img)).layers
        return channel_stages(self.dense.model, layers, self.flags.img)

    def figures(self, model: torch.nn.Module, evaluation: Evaluation) -> dict[str, Any]:
        """What an evaluation says of a network, its costs and widths."""
        cost = slim.cost(model.cpu(), example_image(self.flags.img))
        channels = output_widths(model)
        return {**evaluation.metrics(), "macs": cost.macs, "params": cost.params, "channels": channels}

    def val_set_for(self, flags: TrainFlags | PruneFlags) -> DetectionDataset | None:
        """The loop's val split for a step that evaluates on the same images at the same size."""
        same = (flags.dataset, flags.img) == (self.flags.dataset, self.flags.img)
        return self.val_set if same else None

    def train(self, name: str, flags: TrainFlags, carried: Path | None) -> Path:
        """The last checkpoint of a finished training, which continues from its own where it was interrupted."""

        def act(work: Path) -> dict[str, Any]:
            job = TrainJob.prepare(work, flags, carried)
            done = self.world.broadcast_from_rank0(lambda: job).run(self.world, self.val_set_for(flags))
            assert done.evaluation is not None
            return {"ap": done.evaluation.ap, "closed_share": done.closed_share}

        self.journal.phase(name, act)
        return self.journal.made(name, "weights/last.pt")

    def round(self, number: int, start: Accepted) -> Accepted | None:
        """One round from the network accepted last; None where no cut was accepted."""
        flags = self.flags
        reached, whole = self.target.size(start.macs, start.latency), self.target.size(self.baseline["macs"], 1.0)
        target = round_target(reached, self.target.final(self.baseline), flags.rounds - number + 1)
        # A share of the latency is about that of the MACs. The last cut may have gone further than this one is to.
        sparse = sparse_flags(flags, start.weights, min(1.0, target / reached))
        trained = self.train(f"round{number}-sparse", sparse, start.carried)
        for attempt in range(1, flags.attempts + 1):
            name = f"round{number}-try{attempt}"
            print(
                f"round {number} of {flags.rounds}, attempt {attempt}: {target / whole:.1%} of the {self.target.unit}"
            )
            plan, latency = self.plan(f"{name}-plan", trained, target, start)
            weights = self.cut(f"{name}-cut", trained, plan, sparse.training.optim)
            if flags.recovery_epochs:
                recovery = finetune_flags(flags, weights, flags.recovery_epochs)
                weights = self.train(f"{name}-recovery", recovery, weights)
            candidate = self.evaluate(f"{name}-evaluation", weights, number, attempt)
            if candidate.accepted:
                return Accepted(weights, candidate.macs, latency, (*start.plans, plan))
            target = smaller_cut(reached, target)
        return None

    def plan(self, name: str, sparse: Path, target: float, start: Accepted) -> tuple[slim.Plan, float]:
        """What the round would cut, and its latency as a share of the dense network's (1 where it was not asked for)."""
        measurer = self.target.measurer
        macs, share = (None, target) if measurer else (round(target), None)
        flags = prune_flags(self.flags, sparse, macs, share)

        def act(work: Path) -> dict[str, Any]:
            search = LatencySearch(flags.latency, measurer, work / "latency.json") if measurer else None
            planned = choose_plan(flags, open_prune_inputs(flags, self.val_set_for(flags)), search, start.latency)
            print(planned.plan)
            slim.write_text_atomically(work / "plan.json", planned.plan.to_json())
            return {"macs": planned.plan.macs, "params": planned.plan.params, **(planned.latency or {})}

        found = self.journal.phase(name, act)
        text = self.journal.made(name, "plan.json").read_text(encoding="utf-8")
        return slim.Plan.from_json(text), found.get("latency_share", 1.0)

    def cut(self, name: str, sparse: Path, plan: slim.Plan, optim: OptimConfig) -> Path:
        """The narrow network, proven, with the optimiser and moving average of its training cut alike."""
        flags = prune_flags(self.flags, sparse, None, None)

        def act(work: Path) -> dict[str, Any]:
            inputs = open_prune_inputs(flags, self.val_set_for(flags))
            before = output_widths(inputs.network.model)
            done = cut(inputs, plan, flags.recalibrate)
            carried = cut_training_state(inputs, sparse, plan, done, optim, flags.recalibrate)
            slim.save(done.model, work / "pruned.pt", inputs.network.build, {WARM_START_KEY: carried})
            plot_widths(before, output_widths(done.model), work / "widths.png")
            assert done.masked is not None and done.pruned is not None
            return {
                "max_difference": done.max_difference,
                "masked_ap": done.masked.ap,
                "pruned_ap": done.pruned.ap,
            }

        self.journal.phase(name, act)
        return self.journal.made(name, "pruned.pt")

    def evaluate(self, name: str, weights: Path, round_number: int, attempt: int) -> Candidate:
        """AP and milliseconds of a candidate, and whether it is accepted."""

        def act(work: Path) -> dict[str, Any]:
            model = read_network(weights).model
            evaluation = self.evaluator(model)
            accepted, reason = check_drop(evaluation.ap, evaluation.per_class, self.baseline, self.flags.max_drop)
            times = self.target.times(model)
            return {**self.figures(model, evaluation), **times, "accepted": accepted, "reason": reason}

        found, baseline = self.journal.phase(name, act), self.baseline
        if not self.candidates:
            self.candidates.append(make_candidate(baseline, baseline, 0, 0, found["ms"]["dense"], "baseline"))
        # Each was measured in turn with the dense network: the ratio is what one machine says twice.
        ms = self.candidates[0].ms * found["ms"]["candidate"] / found["ms"]["dense"]
        folder = weights.relative_to(self.run.path).parts[0]
        candidate = make_candidate(found, baseline, round_number, attempt, ms, folder)
        self.candidates.append(candidate)
        write_pareto(self.candidates, self.run.path / "pareto.csv")
        if candidate.accepted:
            write_tensorboard(self.run, self.journal, self.candidates, baseline, self.stages)
        verdict = "accepted" if candidate.accepted else "rejected"
        print(f"{verdict}: AP {candidate.ap:.4f} at {candidate.keep_macs:.1%} of the MACs, {candidate.reason}")
        return candidate

    def fold(self, weights: Path) -> Path:
        """The network without gates, proven equal to the one with them."""

        def act(work: Path) -> dict[str, Any]:
            network = read_network(weights)
            folded, difference = proven_fold(network.model, real_images(self.val_set, 4))
            save_network(work / "slim.pt", folded, network.build)
            return {"max_difference": difference, "gates_left": len(slim.gate_vectors(folded))}

        self.journal.phase("fold", act)
        return self.journal.made("fold", "slim.pt")

    def export(self, folded: Path) -> list[Path]:
        """The network's files for another runtime, one image at a time, proven equal to torch; none where none is wanted."""
        if self.flags.export == "none":
            return []
        name = f"slim{SUFFIX_OF[self.flags.export]}"

        def act(work: Path) -> dict[str, Any]:
            images = real_images(self.val_set, 1)
            difference = write_file(read_network(folded), work / name, images)
            return {"max_difference": difference, "bytes": sum(part.stat().st_size for part in parts_of(work / name))}

        self.journal.phase("export", act)
        return [self.journal.made("export", part.name) for part in files_of(self.journal.folder / "export" / name)]


def proven_fold(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.nn.Module, float]:
    """The model without gates, and its largest relative difference from the one with them on ``images``."""
    folded = slim.fold_gates(model, images)
    return folded, proven("folded = gated", model, folded, images, lambda wide: slim.fold_gates(wide, images.double()))


def iterate(flags: IterateFlags, world: World | None = None) -> Path:
    """Run the loop, or what is left of it; returns the file of the slim network."""
    flags = flags.resolved()
    find_weights(flags.weights, flags.dataset.download)
    if flags.teacher:
        find_weights(flags.teacher, flags.dataset.download, "--teacher")
    config = open_data(flags.dataset)
    val_set = DetectionDataset(config, "val", flags.img, cache=flags.loading.cache)
    data = {"train": data_digest(config, "train", flags.img), "val": val_set.digest()}
    run, opening = open_loop(flags, data)
    with run.held():
        loop = Loop(flags, config, val_set, run, opening, world)
        try:
            return run_loop(loop)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{str(stop) or 'left at once'}; the same command continues {run.path}") from stop


def open_loop(flags: IterateFlags, data: Mapping[str, str]) -> tuple[RunFolder, dict[str, Any]]:
    """The folder of a loop with these very settings, else a new one; and what its journal begins with.

    ``data`` are the digests of the splits.
    """
    left_out = NOT_OF_THE_RUN | (set() if flags.latency.given else flat(flags.latency).keys())
    settings = plain({name: value for name, value in flat(flags).items() if name not in left_out})
    opening = {
        "settings": settings,
        "weights": file_digest(flags.weights),
        "teacher": file_digest(flags.teacher) if flags.teacher else None,
        "data": dict(data),
    }
    number = 1
    while True:
        path = Path(flags.run.project) / (flags.run.name if number == 1 else f"{flags.run.name}{number}")
        if not path.exists():
            return RunFolder.create(flags.run.project, flags.run.name), opening
        known = Journal.opening_of(path)
        if known is None and is_empty(path):
            return RunFolder(path), opening
        is_of_name = number == 1 or RunFolder(path).asked_name in (flags.run.name, None)
        if known is not None and known.get("settings") == settings and is_of_name:
            print(f"{path}: continued")
            return RunFolder(path), opening
        number += 1


def is_empty(run: Path) -> bool:
    """Whether there is no run yet: a process killed at its very start leaves a folder without a file of its own."""
    return not any(p.is_file() and p.name != ".lock" and WRITING not in p.name for p in run.rglob("*"))


def run_loop(loop: Loop) -> Path:
    """All phases in order; finished ones give what they found."""
    flags, baseline = loop.flags, loop.baseline
    print(f"dense: AP {baseline['ap']:.4f}, {baseline['macs'] / 1e6:.1f} M MACs")
    check_max_drop(flags.max_drop, baseline["ap"], flags.weights)
    best = Accepted(Path(flags.weights), baseline["macs"])
    for number in range(1, flags.rounds + 1):
        following = loop.round(number, best)
        if following is None:
            print(
                f"round {number}: no cut was accepted; the loop stops at {best.macs / baseline['macs']:.1%} of the MACs"
            )
            break
        best = following
        if loop.target.is_met(best.latency, baseline):
            break
    if not best.plans:
        raise SlimError(
            f"{loop.run.path}: not one cut kept AP within --max-drop {flags.max_drop} (pareto.csv lists them); "
            "allow a larger drop, keep more, or train longer (--recovery-epochs)"
        )
    tuned = best.weights
    if flags.finetune_epochs:
        tuned = loop.train("finetune", finetune_flags(flags, tuned, flags.finetune_epochs), best.carried)
    folded = loop.fold(tuned)
    exported = loop.export(folded)
    loop.evaluate("evaluation", folded, len(best.plans), 0)
    return conclude(loop, [folded, *exported], best.plans)


def conclude(loop: Loop, networks: Sequence[Path], plans: Sequence[slim.Plan]) -> Path:
    """What the loop leaves, made anew from the journal each time; returns the slim network's checkpoint."""
    baseline, dense, final = loop.baseline, loop.candidates[0], loop.candidates[-1]
    out = save_networks(loop.run, networks, plans)
    found = loop.journal.result("evaluation")
    assert found is not None
    before = {"baseline": {**baseline, "ms": dense.ms}, "baseline_ap": baseline["ap"]}
    metrics = {**found, "ms": final.ms, **before, **loop.target.metrics(baseline, dense.ms, final.ms)}
    models = {"dense": loop.dense.model, "slim": read_network(out).model}
    write_reports(loop.run, metrics, models, loop.val_set, len(plans))
    print(candidate_table(loop.candidates))
    verdict = "within" if final.accepted else "MORE than"
    print(
        f"{out}: {final.keep_macs:.1%} of the MACs, {final.params / baseline['params']:.1%} of the parameters; "
        f"AP drop {baseline['ap'] - final.ap:.4f}, {verdict} --max-drop {loop.flags.max_drop}"
    )
    return out


def main(flags: IterateFlags, world: World) -> None:
    if world.is_first:
        iterate(flags, world)
        world.broadcast_from_rank0(stop)
    else:
        worker_loop(world)
