"""The slimming loop as a journal: rounds of sparse training, cut and recovery, then fine-tuning, folding and export.

The same command continues a loop that was interrupted or killed, whatever it was doing.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import slim
from data import DataConfig, DetectionDataset
from deploy import LatencySettings, parts_of
from engine import (
    CARRIED_STATE_KEY,
    TRAINING_STATE_KEY,
    Evaluation,
    OptimConfig,
    TrainConfig,
    WeightAverage,
    World,
    build_optimizer,
    pack_carried_state,
    read_state,
    recalibrate,
)
from slim import SlimError
from slim.atomic import WRITING
from tracking import RunFolder, plot_widths, read_png, save_png, side_by_side, write_report
from tracking.journal import Journal, emptied
from tracking.run_folder import plain

from .candidates import Candidate, judged, round_target, smaller_cut, worst_of, write_pareto
from .command import flat, with_pairs
from .datasets import data_digest, open_data, real_images
from .evaluator import Evaluator, draw_networks
from .flags import FinetuneFlags, IterateFlags, NetworkSettings, PruneFlags, SparseFlags, TargetSettings, TrainFlags
from .latency import TOLERANCE, LatencySearch, Measurer
from .network import (
    check_classes,
    check_image_size,
    choose_device,
    example_image,
    file_digest,
    read_network,
    save_network,
)
from .pruning import (
    PROOF_IMAGES,
    Cut,
    Material,
    choose_plan,
    cut,
    open_material,
    output_widths,
    prove,
)
from .timing import milliseconds_per_image
from .training import MAY_CHANGE, TrainResult, train_in
from .write_file import SUFFIX_OF, write_file

NOT_OF_THE_RUN = {"project", "name", *MAY_CHANGE}
"""Flags that may change when a loop continues: what it finds does not depend on them."""


@dataclass(frozen=True)
class Accepted:
    """The smallest network that the loop has accepted so far; its latency is a share of the dense network's."""

    weights: Path
    macs: int
    latency: float = 1.0
    plans: tuple[slim.Plan, ...] = ()
    carried: Path | None = None


class Loop:
    """One run: its journal, and what its phases need."""

    def __init__(
        self,
        flags: IterateFlags,
        config: DataConfig,
        run: RunFolder,
        opening: Mapping[str, Any],
        world: World | None = None,
    ) -> None:
        self.flags, self.run, self.world = flags, run, world or World()
        self.world.share(flags.loading.batch_size)
        self.device = choose_device(flags.device, self.world)
        self.dense = read_network(flags.weights)
        check_image_size(self.dense.model, flags.img)
        check_classes(self.dense, config, flags.weights, str(flags.dataset.data))
        self.config = config
        self.val_set = DetectionDataset(config, "val", flags.img, cache=flags.loading.cache)
        self.evaluator = Evaluator(self.val_set, batch_size=flags.loading.batch_size, workers=0, device=self.device)
        self.candidates: list[Candidate] = []
        images = real_images(self.val_set, PROOF_IMAGES)
        self.measurer = Measurer(flags.latency, self.dense, images) if flags.latency.given else None
        self.journal = Journal(run.path, opening)  # the first file: what cannot be done was refused above
        run.write_config(flat(flags), "iterate.py")

    def train_config(self, epochs: int) -> TrainConfig:
        """What the trainings of the loop have in common, for one of so many epochs."""
        return TrainConfig(epochs=epochs, optim=self.flags.optim, seed=self.flags.seed)

    def sparse_flags(self, weights: Path) -> SparseFlags:
        """A round's sparse training."""
        flags = self.flags
        common = SparseFlags(
            device=flags.device,
            img=flags.img,
            network=NetworkSettings(weights=str(weights)),
            dataset=flags.dataset,
            loading=flags.loading,
            training=self.train_config(flags.sparse_epochs),
            teacher=flags.teacher,
            distill=flags.distill,
            sparsity=flags.sparsity,
        )
        return with_pairs(common, [*flags.train, *flags.sparse])

    def finetune_flags(self, weights: Path, epochs: int) -> FinetuneFlags:
        """A recovery, or the fine-tuning at the end; gates stay."""
        flags = self.flags
        common = FinetuneFlags(
            device=flags.device,
            img=flags.img,
            network=NetworkSettings(weights=str(weights)),
            dataset=flags.dataset,
            loading=flags.loading,
            training=self.train_config(epochs),
            teacher=flags.teacher,
            distill=flags.distill,
            keep_gates=True,
        )
        return with_pairs(common, [*flags.train, *flags.finetune])

    def prune_flags(self, weights: Path, target: TargetSettings, latency: LatencySettings) -> PruneFlags:
        """A round's cut."""
        flags = self.flags
        common = PruneFlags(
            device=flags.device,
            seed=flags.seed,
            weights=str(weights),
            img=flags.img,
            target=target,
            latency=latency,
            widths=flags.widths,
            recalibrate=flags.recalibrate,
            dataset=flags.dataset,
            loading=flags.loading,
        )
        return with_pairs(common, flags.prune)

    def baseline(self) -> dict[str, Any]:
        """What the dense network reaches: the measure of every candidate."""

        def act(work: Path) -> dict[str, Any]:
            return self.found(self.dense.model, self.evaluator(self.dense.model))

        return self.journal.phase("baseline", act)

    def found(self, model: torch.nn.Module, evaluation: Evaluation) -> dict[str, Any]:
        cost = slim.cost(model.cpu(), example_image(self.flags.img))
        channels = output_widths(model)
        return {**evaluation.metrics(), "macs": cost.macs, "params": cost.params, "channels": channels}

    def training(self, name: str, flags: TrainFlags, carried: Path | None) -> Path:
        """The folder of a finished training, which continues from its last checkpoint where it was interrupted."""

        def act(work: Path) -> dict[str, Any]:
            run, state = RunFolder(work), None
            try:
                state = read_state(run.last, TRAINING_STATE_KEY)
            except SlimError as error:
                if run.last.exists():
                    print(f"{error}; the phase starts again")
            if state is None:
                emptied(work)
            order = Order(work, flags, state is not None, carried)
            done = self.world.from_first(lambda: order).carry_out(self.world)
            return {"ap": done.evaluation.ap, "closed_share": done.fit.closed_share}

        self.journal.phase(name, act)
        return self.journal.folder / name

    def round(self, number: int, start: Accepted, baseline: Mapping[str, Any]) -> Accepted | None:
        """One round from the network accepted last; None where no cut was accepted."""
        flags = self.flags
        sparse_flags = self.sparse_flags(start.weights)
        sparse = RunFolder(self.training(f"round{number}-sparse", sparse_flags, start.carried)).last
        final, rounds_left = self.final_target(baseline), flags.rounds - number + 1
        # In MACs, or with a latency as a share of the dense network's.
        reached, whole = (start.latency, 1.0) if self.measurer else (start.macs, baseline["macs"])
        target = round_target(reached, final, rounds_left)
        for attempt in range(1, flags.attempts + 1):
            name = f"round{number}-try{attempt}"
            of_what = "latency" if self.measurer else "MACs"
            print(f"round {number} of {flags.rounds}, attempt {attempt}: {target / whole:.1%} of the {of_what}")
            plan, latency = self.plan(f"{name}-plan", sparse, target, start)
            weights = self.cut(f"{name}-cut", sparse, plan, sparse_flags.training.optim)
            if flags.recovery_epochs:
                recovery_flags = self.finetune_flags(weights, flags.recovery_epochs)
                weights = RunFolder(self.training(f"{name}-recovery", recovery_flags, weights)).last
            candidate = self.judge(f"{name}-evaluation", weights, baseline, (number, attempt))
            if candidate.accepted:
                return Accepted(weights, candidate.macs, latency, (*start.plans, plan), weights)
            target = smaller_cut(reached, target)
        return None

    def final_target(self, baseline: Mapping[str, Any]) -> float:
        """What the last round aims at: MACs, or with a latency a share of the dense network's."""
        wanted = self.flags.latency
        if self.measurer is None:
            assert self.flags.macs is not None
            return float(baseline["macs"] * self.flags.macs)
        dense_ms = self.dense_latency()["dense_ms"]
        if wanted.latency_share is not None:
            return wanted.latency_share
        assert wanted.latency_ms is not None
        if wanted.latency_ms >= dense_ms:
            raise SlimError(
                f"--latency-ms {wanted.latency_ms:g}: the dense network takes {dense_ms:.2f} ms, which meets it; nothing to cut"
            )
        return float(wanted.latency_ms / dense_ms)

    def dense_latency(self) -> dict[str, Any]:
        """What the dense network takes, and under what."""

        def act(work: Path) -> dict[str, Any]:
            assert self.measurer is not None
            return {"dense_ms": self.measurer.alone().median_ms, **self.measurer.setting()}

        return self.journal.phase("latency", act)

    def plan(self, name: str, sparse: Path, target: float, start: Accepted) -> tuple[slim.Plan, float]:
        """What the round would cut, and its latency as a share of the dense network's (1 where it was not asked for)."""
        macs = None if self.measurer else round(target)
        latency = self.flags.latency
        if self.measurer:
            latency = replace(latency, latency_ms=None, latency_share=target)
        flags = self.prune_flags(sparse, TargetSettings(macs=macs), latency)

        def act(work: Path) -> dict[str, Any]:
            search = LatencySearch(latency, self.measurer, work / "latency.json") if self.measurer else None
            choice = choose_plan(flags, open_material(flags), search, start.latency)
            print(choice.plan)
            slim.write_text_atomically(work / "plan.json", choice.plan.to_json())
            return {"macs": choice.plan.macs, "params": choice.plan.params, **(choice.latency or {})}

        found = self.journal.phase(name, act)
        text = (self.journal.folder / name / "plan.json").read_text(encoding="utf-8")
        return slim.Plan.from_json(text), found.get("latency_share", 1.0)

    def cut(self, name: str, sparse: Path, plan: slim.Plan, optim: OptimConfig) -> Path:
        """The narrow network, proven, with the optimiser and moving average of its training cut alike."""
        flags = self.prune_flags(sparse, TargetSettings(), LatencySettings())

        def act(work: Path) -> dict[str, Any]:
            material = open_material(flags)
            before = output_widths(material.network.model)
            done = cut(material, plan, flags.recalibrate)
            carried = self.cut_training_state(material, sparse, plan, done, optim, flags.recalibrate)
            slim.save(done.model, work / "pruned.pt", material.network.build, {CARRIED_STATE_KEY: carried})
            plot_widths(before, output_widths(done.model), work / "widths.png")
            assert done.masked is not None and done.pruned is not None
            return {
                "max_difference": done.max_difference,
                "masked_ap": done.masked.ap,
                "pruned_ap": done.pruned.ap,
            }

        self.journal.phase(name, act)
        return self.journal.folder / name / "pruned.pt"

    def cut_training_state(
        self,
        material: Material,
        sparse: Path,
        plan: slim.Plan,
        done: Cut,
        optim: OptimConfig,
        recalibration_batches: int,
    ) -> dict[str, Any]:
        """The sparse training's weights, optimiser state and moving average, as narrow as the network."""
        state, raw = read_state(sparse, TRAINING_STATE_KEY), material.network.model
        assert state is not None
        average = WeightAverage(raw, optim)
        raw.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer = build_optimizer(raw, optim)
        optimizer.load_state_dict(state["optimizer"])
        raw, optimizer, average = slim.apply_plan(raw, plan, optimizer=optimizer, ema=average)
        if recalibration_batches:
            assert material.training_images is not None
            recalibrate(raw, material.training_images(recalibration_batches), self.device)
        average.module.load_state_dict(done.model.state_dict())
        return pack_carried_state(raw.cpu(), optimizer, average)

    def judge(self, name: str, weights: Path, baseline: Mapping[str, Any], place: tuple[int, int]) -> Candidate:
        """AP and milliseconds of a candidate, and whether it is accepted."""

        def act(work: Path) -> dict[str, Any]:
            model = read_network(weights).model
            evaluation = self.evaluator(model)
            accepted, reason = judged(evaluation.ap, evaluation.per_class, baseline, self.flags.max_drop)
            times = self.milliseconds(model)
            return {**self.found(model, evaluation), "ms": times, "accepted": accepted, "reason": reason}

        found = self.journal.phase(name, act)
        if not self.candidates:
            self.candidates.append(self.candidate_of(baseline, baseline, (0, 0), found["ms"]["dense"], None))
        # Each was measured in turn with the dense network: the ratio is what one machine says twice.
        ms = self.candidates[0].ms * found["ms"]["candidate"] / found["ms"]["dense"]
        candidate = self.candidate_of(found, baseline, place, ms, weights)
        self.candidates.append(candidate)
        write_pareto(self.candidates, self.run.path / "pareto.csv")
        verdict = "accepted" if candidate.accepted else "rejected"
        print(f"{verdict}: AP {candidate.ap:.4f} at {candidate.keep_macs:.1%} of the MACs, {candidate.reason}")
        return candidate

    def milliseconds(self, model: torch.nn.Module) -> dict[str, float]:
        """One image, measured in turn with the dense network, gates folded: in torch, or as the latency is asked for."""
        if self.measurer:
            dense_ms = self.dense_latency()["dense_ms"]
            return {"dense": dense_ms, "candidate": self.measurer.against_dense(model).ratio * dense_ms}
        networks = {"dense": slim.fold_gates(self.dense.model.cpu()), "candidate": slim.fold_gates(model.cpu())}
        return milliseconds_per_image(networks, example_image(self.flags.img), repeats=15, warmup=3)

    def candidate_of(
        self,
        found: Mapping[str, Any],
        dense: Mapping[str, Any],
        place: tuple[int, int],
        ms: float,
        weights: Path | None,
    ) -> Candidate:
        worst, worst_ap = worst_of(found["per_class"])
        return Candidate(
            round=place[0],
            attempt=place[1],
            keep_macs=found["macs"] / dense["macs"],
            macs=found["macs"],
            params=found["params"],
            ap=found["ap"],
            ap50=found["ap50"],
            worst_class=worst,
            worst_class_ap=worst_ap,
            ms=ms,
            accepted=found.get("accepted", True),
            reason=found.get("reason", "the dense network"),
            folder="baseline" if weights is None else weights.relative_to(self.run.path).parts[0],
        )

    def fold(self, weights: Path) -> Path:
        """The network without gates, proven equal to the one with them."""

        def act(work: Path) -> dict[str, Any]:
            network = read_network(weights)
            folded, difference = proven_fold(network.model, real_images(self.val_set, 4))
            save_network(work / "slim.pt", folded, network.build)
            return {"max_difference": difference, "gates_left": len(slim.gate_vectors(folded))}

        self.journal.phase("fold", act)
        return self.journal.folder / "fold" / "slim.pt"

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
        return parts_of(self.journal.folder / "export" / name)


def proven_fold(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.nn.Module, float]:
    """The model without gates, and its largest relative difference from the one with them on ``images``."""
    folded = slim.fold_gates(model, images)
    return folded, prove(model, folded, images, lambda first: slim.fold_gates(first, images.double()))


def carried_state(weights: Path) -> dict[str, Any]:
    """What the training before hands on: cut along with the network, or as its last checkpoint holds it."""
    carried = read_state(weights, CARRIED_STATE_KEY)
    if carried is not None:
        return carried
    state = read_state(weights, TRAINING_STATE_KEY)
    assert state is not None
    return {"model": state["model"], "average": state["average"], "optimizer": state["optimizer"]["state"]}


@dataclass(frozen=True)
class Order:
    """A training in which all ranks take part, and what it starts from."""

    work: Path
    flags: TrainFlags
    resumed: bool
    carried: Path | None

    def carry_out(self, world: World) -> TrainResult:
        run = RunFolder(self.work)
        state = read_state(run.last, TRAINING_STATE_KEY) if self.resumed else None
        taken_over = None if self.resumed or self.carried is None else carried_state(self.carried)
        return train_in(run, self.flags, resume_state=state, carried_state=taken_over, world=world)


def follow(world: World) -> None:
    """What the other ranks do: the trainings that rank 0 comes to, until it has no more."""
    while (order := world.from_first(no_order)) is not None:
        order.carry_out(world)


def no_order() -> Order | None:
    return None


def iterate(flags: IterateFlags, world: World | None = None) -> Path:
    """Run the loop, or what is left of it; returns the file of the slim network."""
    flags = flags.resolved()
    config = open_data(flags.dataset)
    run, opening = open_loop(flags, config)
    with run.held():
        loop = Loop(flags, config, run, opening, world)
        try:
            return run_loop(loop)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{str(stop) or 'left at once'}; the same command continues {run.path}") from stop


def open_loop(flags: IterateFlags, config: DataConfig) -> tuple[RunFolder, dict[str, Any]]:
    """The folder of a loop with these very settings, else a new one; and what its journal begins with."""
    left_out = NOT_OF_THE_RUN | (set() if flags.latency.given else flat(flags.latency).keys())
    settings = plain({name: value for name, value in flat(flags).items() if name not in left_out})
    opening = {
        "settings": settings,
        "weights": file_digest(flags.weights),
        "teacher": file_digest(flags.teacher) if flags.teacher else None,
        "data": {split: data_digest(config, split, flags.img) for split in ("train", "val")},
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
        if known is not None and known["settings"] == settings and is_of_name:
            print(f"{path}: continued")
            return RunFolder.open(path), opening
        number += 1


def is_empty(run: Path) -> bool:
    """Whether there is no run yet: a process killed at its very start leaves a folder without a file of its own."""
    return not any(p.is_file() and p.name != ".lock" and WRITING not in p.name for p in run.rglob("*"))


def run_loop(loop: Loop) -> Path:
    """All phases in order; finished ones give what they found."""
    flags, baseline = loop.flags, loop.baseline()
    print(f"dense: AP {baseline['ap']:.4f}, {baseline['macs'] / 1e6:.1f} M MACs")
    best = Accepted(Path(flags.weights), baseline["macs"])
    for number in range(1, flags.rounds + 1):
        following = loop.round(number, best, baseline)
        if following is None:
            print(
                f"round {number}: no cut was accepted; the loop stops at {best.macs / baseline['macs']:.1%} of the MACs"
            )
            break
        best = following
        if loop.measurer and best.latency <= loop.final_target(baseline) * (1 + TOLERANCE):
            break  # a round whose widths fell below its target
    if not best.plans:
        raise SlimError(
            f"{loop.run.path}: not one cut kept AP within --max-drop {flags.max_drop:g} (pareto.csv lists them); "
            "allow a larger drop, keep more, or train longer (--recovery-epochs)"
        )
    tuned = best.weights
    if flags.finetune_epochs:
        tuning_flags = loop.finetune_flags(best.weights, flags.finetune_epochs)
        tuned = RunFolder(loop.training("finetune", tuning_flags, best.carried)).last
    folded = loop.fold(tuned)
    exported = loop.export(folded)
    final = loop.judge("evaluation", folded, baseline, (len(best.plans), 0))
    return conclude(loop, best, [folded, *exported], final, baseline)


def conclude(loop: Loop, best: Accepted, networks: list[Path], final: Candidate, baseline: Mapping[str, Any]) -> Path:
    """The slim network's files, plan, metrics, board and table; made anew from the journal each time."""
    run, out = loop.run, loop.run.path / "weights" / "slim.pt"
    for made in networks:
        slim.write_atomically(out.parent / made.name, functools.partial(shutil.copyfile, made))
    slim.write_text_atomically(run.path / "plan.json", functools.reduce(slim.compose, best.plans).to_json())
    found = loop.journal.result("evaluation")
    assert found is not None
    board(loop, baseline)
    show(loop, out, found, baseline)
    lines = ["| network | AP | M MACs | M parameters | ms | accepted |", "| --- | --- | --- | --- | --- | --- |"]
    for c in loop.candidates:
        name = (
            "dense" if c.round == 0 else f"round {c.round}, attempt {c.attempt}" if c.attempt else "fine-tuned, folded"
        )
        mark = "yes" if c.accepted else "no"
        lines.append(f"| {name} | {c.ap:.4f} | {c.macs / 1e6:.1f} | {c.params / 1e6:.3f} | {c.ms:.1f} | {mark} |")
    print("\n".join(lines))
    drop = baseline["ap"] - final.ap
    verdict = "within" if final.accepted else "MORE than"
    print(
        f"{out}: {final.keep_macs:.1%} of the MACs, {final.params / baseline['params']:.1%} of the parameters; "
        f"AP drop {drop:.4f}, {verdict} --max-drop {loop.flags.max_drop:g}"
    )
    return out


def show(loop: Loop, out: Path, found: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Pictures, metrics and reports, the phases' too: those were written before the phases had their names."""
    run, rounds = loop.run, len({c.round for c in loop.candidates}) - 1
    networks = {"dense": loop.dense.model, "slim": read_network(out).model}
    picture = side_by_side(draw_networks(networks, loop.val_set))
    save_png(picture, run.path / "side_by_side.png")
    run.log_picture("detections", picture, rounds)
    widths = plot_widths(baseline["channels"], found["channels"], run.path / "widths.png")
    run.log_picture("widths", read_png(widths), rounds)
    dense, ms = {**baseline, "ms": loop.candidates[0].ms}, loop.candidates[-1].ms
    metrics = {**found, "ms": ms, "baseline": dense, "baseline_ap": baseline["ap"]}
    if loop.measurer:
        target_ms = loop.final_target(baseline) * dense["ms"]
        metrics |= {**loop.dense_latency(), "target_ms": target_ms, "latency_ms": ms}
    run.write_metrics(metrics)
    run.close()
    for training in sorted(run.path.glob("*/results.csv")):
        write_report(RunFolder(training.parent))
    write_report(run)


def board(loop: Loop, baseline: Mapping[str, Any]) -> None:
    """TensorBoard's series against the round, written anew: a loop that continued shows no step twice."""
    run = loop.run
    for old in run.path.glob("events.out.*"):
        old.unlink()
    widths = {0: baseline["channels"]}
    for c in loop.candidates:
        if c.attempt and c.accepted:
            result = loop.journal.result(f"round{c.round}-try{c.attempt}-evaluation")
            assert result is not None
            widths[c.round] = result["channels"]
        if c.round == 0 or (c.attempt and c.accepted):
            scalars = {"metrics/ap": c.ap, "metrics/ap50": c.ap50, "cost/macs": c.macs, "cost/params": c.params}
            run.log_scalars(scalars, c.round)
    for number, channels in widths.items():
        run.log_channels(channels, number)
    run.close()


def main(flags: IterateFlags, world: World) -> None:
    if world.is_first:
        iterate(flags, world)
        world.from_first(no_order)
    else:
        follow(world)
