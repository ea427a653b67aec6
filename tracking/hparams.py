"""A run's row in TensorBoard's HPARAMS tab: its settings beside its final metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_NO_SETTING = ("project", "name", "debug", "resume")
# With a capital, since TensorBoard shows the first columns of the sorted scalars unless told otherwise.
FINAL_TAGS = {key: f"Final/{key}" for key in ("ap", "ap50", "ap75", "macs", "ms", "params")}


def log_hparams(writer: SummaryWriter, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Write the row into the run's own events, the metrics as scalars; ``SummaryWriter.add_hparams`` would make a
    sub-folder of each run.

    No run declares the columns of its board: TensorBoard would take any one run's for all of them. Left to itself it
    shows the settings of all, and those that differ first.
    """
    from torch.utils.tensorboard.summary import hparams

    settings = {
        name: _setting(value) for name, value in config.items() if name not in _NO_SETTING and value is not None
    }
    for key, tag in FINAL_TAGS.items():
        if metrics.get(key) is not None:
            writer.add_scalar(tag, float(metrics[key]), 0)
    _, start, end = hparams(settings, {})
    for summary in (start, end):
        writer._get_file_writer().add_summary(summary, 0)


def _setting(value: Any) -> float | str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
