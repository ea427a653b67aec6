"""One run's folder: configuration, journal of epochs, metrics, weights and TensorBoard events."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from slim import SlimError, write_text_atomically
from slim.atomic import WRITING

from .stages import Stages, channel_charts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRIC_KEYS = ("ap", "ap50", "ap75", "per_class", "params", "macs", "images", "seconds")
CUT_METRIC_KEYS = ("masked_ap", "pruned_ap", "max_difference", "before", "after")
_MADE_BY = "# made by "
_NO_SETTING = ("project", "name", "debug", "resume")
_OF_A_TRAINING = (
    *(
        "config.yaml",
        "data.json",
        "results.csv",
        "channels.csv",
        "confusion_matrix.csv",
        "metrics.json",
        "report.*",
        "events.out.*",
        "*.png",
        "weights/*.pt",
    ),
)
"""What a training leaves in its folder."""


class RunFolder:
    """Paths and files under `runs/<kind>/<name>`; every file is replaced as a whole or not at all.

    ``RunFolder(path)`` is a folder whose place is known. That of `create` is made, under the first free number, when its
    path is first asked for, which is when its first file is written: a command that fails before leaves nothing behind.
    """

    def __init__(self, path: str | Path) -> None:
        self._wanted = Path(path)
        self._path: Path | None = self._wanted
        self._is_held = self._exist_ok = False
        self._lock: FileLock | None = None
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    @classmethod
    def create(cls, project: str | Path, name: str, exist_ok: bool = False) -> RunFolder:
        """A run folder to come: `project/name`, or name2, name3 ... where that is taken and not ``exist_ok``.

        Raises SlimError where no folder can be made.
        """
        run = cls(Path(project) / name)
        run._path, run._exist_ok = None, exist_ok
        above = next(parent for parent in run._wanted.absolute().parents if parent.exists())
        if not above.is_dir():
            raise SlimError(f"{above}: a file is in the way of a run folder; choose another --project")
        if not os.access(above, os.W_OK):
            raise SlimError(f"{run._wanted}: cannot be made (no right to write in {above}); choose another --project")
        return run

    @classmethod
    def of(cls, path: str | Path) -> RunFolder:
        """The run to continue of a run folder or of its weights/last.pt; SlimError where there is none."""
        run = cls(Path(path).parent.parent if Path(path).suffix == ".pt" else path)
        if not run.has_checkpoint or Path(path) not in (run.path, run.last):
            raise SlimError(f"{path}: no run to resume; expected a run folder that holds weights/last.pt, or that file")
        return run

    @classmethod
    def newest(cls, project: str | Path, name: str) -> RunFolder:
        """The last run of this name that has a checkpoint to continue from: among name, name2, name3 ... the highest number.

        A numbered folder counts where its config.yaml holds this very name, so that neither run12 passes for a run of the
        name run1, nor finetune-0.35 for one of finetune-0.3. Raises SlimError where there is none.
        """
        wanted = Path(project) / name
        found = {}
        for folder in wanted.parent.glob("*/"):
            run, digits = cls(folder), folder.name.removeprefix(wanted.name)
            if not run.has_checkpoint or not folder.name.startswith(wanted.name):
                continue
            is_of_name = run.asked_name == name
            if not digits:
                found[int(is_of_name)] = run  # made for another name, such as the second of exp2's: better than none
            elif is_of_name and re.fullmatch(r"[2-9]|[1-9][0-9]+", digits):
                found[int(digits)] = run
        if not found:
            raise SlimError(f"{wanted}: no run with weights/last.pt to resume; start one without --resume")
        return found[max(found)]

    @property
    def asked_name(self) -> str | None:
        """The `--name` that the run was asked for, without the number; None where config.yaml does not tell."""
        try:
            name = self.read_config()["name"]
        except (SlimError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return None
        return str(name)

    @property
    def path(self) -> Path:
        """The folder; that of `create` is made when this is first asked for."""
        if self._path is None:
            self._path = _make_first_free(self._wanted, self._exist_ok)
            if self._is_held:
                self._acquire()
            if self.config_file.is_file() and self.read_script():  # with exist_ok, those of the run before
                for left_behind in [file for pattern in _OF_A_TRAINING for file in self._path.glob(pattern)]:
                    left_behind.unlink()
        return self._path

    def adopt(self, path: Path) -> None:
        """Take the folder that another process of the same run has made."""
        self._path = path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of this run; SlimError when one is in it. A process that dies lets go."""
        self._is_held = True
        try:
            if self._path is not None:
                self._acquire()
                for left_behind in self.path.rglob(f".*.{WRITING}*"):
                    left_behind.unlink(missing_ok=True)
            yield
        finally:
            self._is_held = False
            if self._lock is not None:
                self._lock.release()

    def _acquire(self) -> None:
        self._lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise SlimError(
                f"{self.path}: in use by another process; wait for it to end, or choose another --name"
            ) from error
        except OSError as error:
            raise SlimError(f"{self.path}: cannot be locked ({error.strerror}); choose another --project") from error

    @property
    def has_checkpoint(self) -> bool:
        """Whether weights/last.pt is there to continue from."""
        return self._path is not None and self.last.is_file()

    @property
    def last(self) -> Path:
        return self.path / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "weights" / "best.pt"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def results_file(self) -> Path:
        return self.path / "results.csv"

    @property
    def channels_file(self) -> Path:
        return self.path / "channels.csv"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    def write_config(self, config: Mapping[str, Any], script: str | None = None) -> None:
        """The resolved configuration; dataclasses, paths and tuples become plain YAML.

        ``script``, such as 'prune.py' or 'experiments.torch_pruning', is noted in a comment on the first line, since the
        file itself holds a script's flags and nothing else.
        """
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        write_text_atomically(self.config_file, text if script is None else f"{_MADE_BY}{script}\n{text}")

    def read_config(self) -> dict[str, Any]:
        if not self.config_file.is_file():
            raise SlimError(f"{self.config_file}: no such file; this run cannot be resumed, start a new one")
        config: dict[str, Any] = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        return config

    def read_script(self) -> str | None:
        """The script that config.yaml is the configuration of; None when it does not say."""
        with self.config_file.open(encoding="utf-8") as file:
            first = file.readline().strip()
        return first.removeprefix(_MADE_BY) if first.startswith(_MADE_BY) else None

    def note_data(self, digests: Mapping[str, str]) -> list[str]:
        """Keep the digests of the run's data by split; those splits whose digest is another than when the run began."""
        file = self.path / "data.json"
        if not file.is_file():
            write_text_atomically(file, json.dumps(dict(digests), indent=2) + "\n")
            return []
        known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return [split for split, digest in digests.items() if known.get(split) != digest]

    def read_rows(self, file: Path | None = None) -> list[dict[str, str]]:
        """The rows of results.csv, or of another file of a run, as text; none when there is no file yet."""
        file = file or self.results_file
        if not file.is_file():
            return []
        with file.open(newline="", encoding="utf-8") as opened:
            return list(csv.DictReader(opened))

    def read_channels(self) -> dict[int, dict[str, int]]:
        """{step: {layer: channels}} of channels.csv."""
        rows = {int(row.pop("step")): row for row in self.read_rows(self.channels_file)}
        return {step: {layer: int(count) for layer, count in row.items() if count} for step, row in rows.items()}

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add an epoch's row (it needs "epoch"); new columns are added at the right, None is left empty."""
        assert "epoch" in row
        row = {key: "" if value is None else value for key, value in row.items()}
        _write_rows([*self.read_rows(), row], self.results_file)

    def drop_rows_from(self, epoch: int) -> None:
        """Forget rows and events of `epoch`, or another step, and later: they are about to be made again."""
        for file, column in ((self.results_file, "epoch"), (self.channels_file, "step")):
            rows = self.read_rows(file)
            kept = [row for row in rows if int(row[column]) < epoch]
            if not kept:
                file.unlink(missing_ok=True)
            elif len(kept) < len(rows):
                _write_rows(kept, file)
        self._purge_step = epoch

    def write_metrics(self, metrics: Mapping[str, Any], *, after_cut: bool = False) -> None:
        """metrics.json, and the run's row in TensorBoard's HPARAMS tab where it has a configuration.

        Raises SlimError when a promised key is missing or a number is not finite.
        """
        required = METRIC_KEYS + (CUT_METRIC_KEYS if after_cut else ())
        missing = [key for key in required if key not in metrics]
        if missing:
            raise SlimError(f"{self.metrics_file}: missing {', '.join(missing)}; expected {', '.join(required)}")
        try:
            text = json.dumps(plain(metrics), indent=2, allow_nan=False)
        except ValueError as error:
            raise SlimError(f"{self.metrics_file}: a metric is not finite: {dict(metrics)}") from error
        write_text_atomically(self.metrics_file, text + "\n")
        if self.config_file.is_file():
            _log_hparams(self.writer, self.read_config(), json.loads(text))

    @property
    def writer(self) -> SummaryWriter:
        """TensorBoard's writer, made at first use."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run draws

            self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
        return self._writer

    def log_scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """TensorBoard scalars under the design's tags; None is left out."""
        for tag, value in values.items():
            if value is not None:
                self.writer.add_scalar(tag, value, step)

    def log_gates(self, gates: Mapping[str, Tensor], step: int) -> None:
        """A histogram `gates/<group>` for each."""
        for name, gate in gates.items():
            self.writer.add_histogram(f"gates/{name}", gate.detach().float().cpu(), step)

    def log_channels(self, channels: Mapping[str, int], step: int) -> None:
        """A scalar `channels/<layer path>` for each layer, and a row of channels.csv, against the epoch or the round."""
        self.log_scalars({f"channels/{layer}": count for layer, count in channels.items()}, step)
        _write_rows([*self.read_rows(self.channels_file), {"step": step, **channels}], self.channels_file)

    def log_stages(self, stages: Stages) -> None:
        """TensorBoard's custom scalars: a chart of `channels/<layer path>` for each stage."""
        self.writer._get_file_writer().add_summary(channel_charts(stages))

    def log_picture(self, tag: str, image: Tensor, step: int = 0) -> None:
        """uint8 [3, H, W]."""
        self.writer.add_image(tag, image, step)

    def close(self) -> None:
        """Flush TensorBoard's events; the folder can be used again afterwards."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._purge_step = None


def _write_rows(rows: list[Any], file: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text_atomically(file, text.getvalue())


def _log_hparams(writer: SummaryWriter, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Write the row of the HPARAMS tab into the run's own events; ``SummaryWriter.add_hparams`` would make a sub-folder.

    No run declares the columns of its board: TensorBoard would take any one run's for all of them. Left to itself it
    shows the settings of all, and those that differ first.
    """
    from torch.utils.tensorboard.summary import hparams

    kept = {name: value for name, value in config.items() if name not in _NO_SETTING and value is not None}
    settings = {
        name: value
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else " ".join(map(str, value if isinstance(value, list) else [value]))
        for name, value in kept.items()
    }
    for key in ("ap", "ap50", "ap75", "macs", "ms", "params"):
        if metrics.get(key) is not None:
            # With a capital, since TensorBoard shows the first columns of the sorted scalars unless told otherwise.
            writer.add_scalar(f"Final/{key}", float(metrics[key]), 0)
    _, start, end = hparams(settings, {})
    for summary in (start, end):
        writer._get_file_writer().add_summary(summary, 0)


def _make_first_free(wanted: Path, exist_ok: bool) -> Path:
    """Make `wanted`, unless ``exist_ok`` or with the first free number; no other process gets the same."""
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}{number}")
        try:
            path.mkdir(parents=True, exist_ok=exist_ok)
        except FileExistsError:
            continue
        except OSError as error:
            raise SlimError(f"{path}: cannot be made ({error.strerror}); choose another --project or --name") from error
        return path
    raise AssertionError


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and scalars of NumPy and torch as what YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None for anything else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
