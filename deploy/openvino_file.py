"""OpenVINO's intermediate representation: written from an ONNX graph, and run by OpenVINO."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from torch import Tensor

from slim import SlimError

from .network import EngineNetwork, existing, index_of_boxes, threads_of
from .onnx_file import read_onnx
from .profiling import WARMUP, LayerTime
from .settings import RuntimePrecision

if TYPE_CHECKING:
    import onnx
    import openvino

INFO = "model_info"
"""Where OpenVINO's own tools look for what a network says of itself."""
WEIGHTS_DIGEST = "weights_sha256"


class OpenVinoNetwork(EngineNetwork):
    """An OpenVINO (``.xml`` with its ``.bin``) or ONNX file under OpenVINO, on the CPU.

    Args:
        path: the file
        num_cores: threads of the network, 0 for all
        precision: of what is not quantised; ``auto`` takes bfloat16 where the processor has it, as OpenVINO does by itself
        at_once: calls side by side, each of which gets its share of the threads; further ones wait
    """

    engine = "openvino"

    def __init__(
        self, path: str | Path, num_cores: int = 0, precision: RuntimePrecision = "auto", at_once: int = 1
    ) -> None:
        import openvino

        path = existing(path, "an OpenVINO or ONNX network")
        graph, metadata = read_openvino(path)
        if len(graph.inputs) != 1:
            raise SlimError(f"{path}: it has {len(graph.inputs)} inputs, expected one, as export.py writes")
        shapes = [_sizes(output.partial_shape) for output in graph.outputs]
        self.output = index_of_boxes(path, shapes)
        self.settings: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Several compiled networks of one thread each may all be bound to the same core; streams are not.
            "NUM_STREAMS": at_once,
            **({"ENABLE_CPU_PINNING": False} if at_once > 1 else {}),
            "INFERENCE_NUM_THREADS": threads_of(num_cores),
        }
        if precision != "auto":
            self.settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
        try:
            compiled = openvino_core().compile_model(graph, "CPU", self.settings)
        except RuntimeError as error:
            raise SlimError(f"{path}: OpenVINO cannot run it ({_last_line(error)}); export it anew") from error
        quantised = any(operator.get_type_name() == "FakeQuantize" for operator in graph.get_ops())
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        floating = {"bf16": "bfloat16", "f16": "float16"}.get(hint, "float32")
        super().__init__(
            path,
            metadata,
            _sizes(graph.inputs[0].partial_shape),
            takes_bytes=graph.inputs[0].element_type == openvino.Type.u8,
            precision="int8" if quantised else floating,
            columns=shapes[self.output][-1] if shapes[self.output] else None,
        )
        self.floating_precision = floating
        self.at_once, self.lock = at_once, Lock()
        self.requests = {torch.uint8 if self.takes_bytes else torch.float32: self._requests(compiled)}

    def as_taken(self, images: Tensor) -> Tensor:
        return images if images.dtype == torch.uint8 else super().as_taken(images)

    def run(self, images: Tensor) -> Tensor:
        with self.lock:
            if images.dtype not in self.requests:
                self.requests[images.dtype] = self._requests(self._compile(images.dtype))
        requests = self.requests[images.dtype]
        request = requests.get()
        try:
            return torch.from_numpy(np.array(request.infer([images.numpy()], share_inputs=True)[self.output]))
        finally:
            requests.put(request)

    def layer_times(self, images: Tensor, runs: int) -> list[list[LayerTime]]:
        given = self.one_batch(images)
        request = self._compile(given.dtype, NUM_STREAMS=1, PERF_COUNT=True).create_infer_request()
        found = []
        for _ in range(WARMUP + runs):
            request.infer([given.numpy()])
            found.append([_layer_time(i) for i in request.get_profiling_info() if i.status == i.Status.EXECUTED])
        return found[WARMUP:]

    def _compile(self, kind: torch.dtype, **settings: object) -> openvino.CompiledModel:
        """The network for images of a type: OpenVINO scales bytes in less time than it takes to do so before."""
        import openvino

        graph, _ = read_openvino(self.path)
        if kind == torch.uint8 and not self.takes_bytes:
            steps = openvino.preprocess.PrePostProcessor(graph)
            steps.input().tensor().set_element_type(openvino.Type.u8)
            steps.input().preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
            graph = steps.build()
        return openvino_core().compile_model(graph, "CPU", {**self.settings, **settings})

    def _requests(self, compiled: openvino.CompiledModel) -> SimpleQueue[openvino.InferRequest]:
        """One for each of the calls that may run side by side."""
        requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(self.at_once):
            requests.put(compiled.create_infer_request())
        return requests


def _sizes(shape: openvino.PartialShape) -> tuple[int | None, ...]:
    if shape.rank.is_dynamic:
        return ()
    return tuple(size.get_length() if size.is_static else None for size in shape)


def _layer_time(info: openvino.ProfilingInfo) -> LayerTime:
    precisions = {"i8": "int8", "u8": "int8", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    precision = precisions.get(info.exec_type.rsplit("_", 1)[-1].lower(), "")
    return LayerTime(info.node_name.split("/")[0], info.node_type, precision, info.real_time.total_seconds() * 1000)


@functools.cache
def openvino_core() -> openvino.Core:
    """OpenVINO itself, once for the whole process.

    Each further one would give the thread another stack for its signal handlers, and free it in the end though it may
    still be in use: with two of them, closed in the order of their opening, the next Ctrl-C or ended worker is a crash.
    """
    import openvino

    # Its bindings find NumPy when they first need it; two threads that do so at once wait for each other for ever.
    openvino.Tensor(np.zeros(1))
    return openvino.Core()


def read_openvino(path: Path) -> tuple[openvino.Model, dict[str, str]]:
    """The graph of an ``.xml`` or ``.onnx`` file and its metadata; SlimError where it is none."""
    if path.suffix == ".onnx":
        metadata = {entry.key: entry.value for entry in read_onnx(path).metadata_props}
    try:
        graph = openvino_core().read_model(path)
        if path.suffix != ".onnx":
            known = graph.get_rt_info(INFO).value if graph.has_rt_info(INFO) else {}
            metadata = metadata_beside(path) | {
                key: str(getattr(value, "value", value)) for key, value in known.items()
            }
        if WEIGHTS_DIGEST in metadata and metadata[WEIGHTS_DIGEST] != _digest(path.with_suffix(".bin")):
            raise SlimError(
                f"{path}: its weights, {path.stem}.bin, are damaged or of another network (by their SHA-256); export it anew"
            )
    except RuntimeError as error:
        raise SlimError(
            f"{path}: not a network that OpenVINO can read ({_last_line(error)}); export it anew"
        ) from error
    return graph, metadata


def metadata_beside(path: Path) -> dict[str, str]:
    """What the YAML beside an ``.xml`` says of it: of its own name, as YOLOv5 writes it, or ``metadata.yaml``."""
    for file in (path.with_suffix(".yaml"), path.with_name("metadata.yaml")):
        if file.is_file():
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
                raise SlimError(
                    f"{file}: cannot be read ({' '.join(str(error).split())}); restore or remove it"
                ) from error
            return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
    return {}


def from_onnx(proto: onnx.ModelProto) -> openvino.Model:
    """Convert an ONNX graph."""
    import onnx
    import openvino

    with TemporaryDirectory() as folder:
        made = Path(folder) / "network.onnx"
        onnx.save(proto, made)
        return openvino.convert_model(made)


def save_openvino(
    graph: openvino.Model, path: Path, metadata: Mapping[str, str], *, half_weights: bool = False
) -> None:
    """Write the ``.xml`` and its ``.bin``, in float32 or 16 bits, whose digest the ``.xml`` has."""
    import openvino

    for key, value in metadata.items():
        graph.set_rt_info(value, [INFO, key])
    openvino.save_model(graph, path, compress_to_fp16=half_weights)
    written = _digest(path.with_suffix(".bin"))
    graph.set_rt_info(written, [INFO, WEIGHTS_DIGEST])
    openvino.save_model(graph, path, compress_to_fp16=half_weights)
    assert written == _digest(path.with_suffix(".bin"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
