"""Settings of runtimes, latencies and INT8, free of torch: a command line is read before torch is imported.

An annotated field is a command-line flag of the same name; the annotation is its help, and what values are expected,
which ``detection.command`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

Engine = Literal["torch", "onnxruntime", "openvino"]
RuntimePrecision = Literal["auto", "float32", "bfloat16"]
Int8Target = Literal["any", "vnni"]


def _refuse(message: str) -> NoReturn:
    from slim import SlimError  # which imports torch

    raise SlimError(message)


@dataclass(frozen=True)
class RuntimeSettings:
    """Runtime."""

    engine: Annotated[Engine | None, "what runs the network; else what runs files of its kind, or torch"] = None
    precision: Annotated[
        RuntimePrecision, "what the engine computes in where it is not quantised; auto is its choice"
    ] = "auto"
    num_cores: Annotated[int, "CPU threads of the network, 0 for all", "at least 0"] = 0


@dataclass(frozen=True)
class TrustSettings:
    """Trust."""

    trust: Annotated[
        bool,
        "run .torchscript files that export.py did not write, or that were changed since: such a file is a program, which can "
        "do whatever you can; give it for files of people whom you trust. Without it NAME.torchscript.sha256 must lie beside "
        "the file, which shows damage and mix-ups, but not a stranger who made both",
    ] = False


@dataclass(frozen=True)
class LatencySettings:
    """Latency as the target."""

    latency_ms: Annotated[
        float | None,
        "milliseconds an image to come down to on this CPU, which must have nothing else to do: exported candidates are "
        "measured in turns with the dense network",
        "above 0",
    ] = None
    latency_share: Annotated[
        float | None, "the same as a share of the dense network's milliseconds", "above 0 to below 1"
    ] = None
    latency_int8: Annotated[bool, "with a latency: of the networks in INT8 (the Detect head in floating point)"] = False
    engine: Annotated[Engine, "with a latency: what runs the networks"] = "openvino"
    latency_precision: Annotated[RuntimePrecision, "what is not in INT8: auto is what the engine takes by itself"] = (
        "auto"
    )
    num_cores: Annotated[int, "with a latency: CPU threads, 0 for all", "at least 0"] = 0

    def __post_init__(self) -> None:
        if self.latency_ms is not None and self.latency_share is not None:
            _refuse("--latency-ms and --latency-share: give one of them")
        if self.latency_int8 and not self.given:
            _refuse("--latency-int8: needs --latency-ms or --latency-share")
        if self.latency_int8 and self.engine == "torch":
            _refuse("--latency-int8 --engine torch: torch runs no INT8 files; use openvino or onnxruntime")

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that name a latency; none where it is not the target."""
        return tuple(f"--{name.replace('_', '-')}" for name in ("latency_ms", "latency_share") if getattr(self, name))


@dataclass(frozen=True)
class Int8Settings:
    """INT8."""

    int8: Annotated[bool, "quantise to 8 bits, calibrated on training images of --data; onnx and openvino"] = False
    calibration_images: Annotated[
        int, "with --int8: training images that choose the ranges of activations", "at least 1"
    ] = 200
    keep_float: Annotated[
        tuple[str, ...], "with --int8: modules that stay in float beside the head, as model.9.* model.0"
    ] = ()
    int8_target: Annotated[
        Int8Target,
        "with --int8 and onnx: any CPU, by weights of 7 to 8 bits whose sums fit, or vnni: all of 8 bits, which saturate in "
        "ONNX Runtime on x86 CPUs without VNNI",
    ] = "any"
    max_drop: Annotated[
        float,
        "with --int8: AP on --data's val split that may be lost; the noisiest blocks stay in float until that holds, and "
        "where half of them do not do no file is written",
        "0 to 1",
    ] = 0.02
