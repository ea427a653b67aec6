"""OpenVINO's intermediate representation: written from a network of any kind, and run by OpenVINO."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import openvino
import torch
from torch import Tensor, nn

import slim
from slim import SlimError

from .network import ExportedNetwork, existing, threads_of
from .onnx_file import Proof, onnx_proto, read_onnx
from .proof import prove_equal
from .settings import Precision

INFO = "model_info"
"""Where OpenVINO's own tools look for what a network says of itself."""


class OpenVinoNetwork(ExportedNetwork):
    """An OpenVINO (``.xml`` with its ``.bin``) or ONNX file under OpenVINO, on the CPU.

    ``num_cores``: threads of the network, 0 for all. ``precision``: of what is not quantised; ``auto`` takes bfloat16
    where the processor has it, as OpenVINO does by itself. Of ``at_once`` calls side by side each gets its share of the
    threads; further ones wait.
    """

    engine = "openvino"

    def __init__(
        self,
        path: str | Path,
        num_cores: int = 0,
        precision: Precision = "auto",
        profile: bool = False,
        at_once: int = 1,
    ) -> None:
        path = existing(path, "an OpenVINO or ONNX network")
        network, metadata = read_openvino(path)
        if len(network.inputs) != 1 or len(network.outputs) != 1:
            raise SlimError(
                f"{path}: it has {len(network.inputs)} inputs and {len(network.outputs)} outputs, expected one of each, "
                "as export.py writes"
            )
        settings: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Several compiled networks of one thread each may all be bound to the same core; streams are not.
            "NUM_STREAMS": at_once,
            **({"ENABLE_CPU_PINNING": False} if at_once > 1 else {}),
            "INFERENCE_NUM_THREADS": threads_of(num_cores),
            "PERF_COUNT": profile,
        }
        if precision != "auto":
            settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
        try:
            compiled = openvino_core().compile_model(network, "CPU", settings)
        except RuntimeError as error:
            raise SlimError(f"{path}: OpenVINO cannot run it ({_first_line(error)}); export it anew") from error
        quantised = any(operator.get_type_name() == "FakeQuantize" for operator in network.get_ops())
        own = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
        floating = own.get(compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), "float32")
        super().__init__(
            path,
            metadata,
            tuple(size.get_length() if size.is_static else None for size in network.inputs[0].partial_shape),
            takes_bytes=network.inputs[0].element_type == openvino.Type.u8,
            precision="int8" if quantised else floating,
        )
        self.floating_precision = floating
        self.compiled = compiled
        self.requests = SimpleQueue[openvino.InferRequest]()
        for _ in range(at_once):
            self.requests.put(compiled.create_infer_request())

    def run(self, images: Tensor) -> Tensor:
        with self.request() as request:
            outputs = request.infer([images.numpy()], share_inputs=True)
            return torch.from_numpy(np.array(outputs[0]))

    @contextmanager
    def request(self) -> Iterator[openvino.InferRequest]:
        """One that nobody else uses, for the time of the block."""
        request = self.requests.get()
        try:
            yield request
        finally:
            self.requests.put(request)


@functools.cache
def openvino_core() -> openvino.Core:
    """OpenVINO itself, once for the whole process.

    Each further one would give the thread another stack for its signal handlers, and free it in the end though it may
    still be in use: with two of them, closed in the order of their opening, the next Ctrl-C or ended worker is a crash.
    """
    return openvino.Core()


def read_openvino(path: Path) -> tuple[openvino.Model, dict[str, str]]:
    """The graph of an ``.xml`` or ``.onnx`` file and its metadata; SlimError where it is none."""
    if path.suffix == ".onnx":
        proto = read_onnx(path)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        network = openvino_core().read_model(path)
        if path.suffix != ".onnx":
            known = network.get_rt_info(INFO).value if network.has_rt_info(INFO) else {}
            metadata = {key: str(getattr(value, "value", value)) for key, value in known.items()}
    except RuntimeError as error:
        raise SlimError(
            f"{path}: not a network that OpenVINO can read ({_first_line(error)}); export it anew"
        ) from error
    return network, metadata


def export_openvino(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    stride_px: int = 1,
    dynamic: bool = False,
    free_batch: bool = True,
    uint8_input: bool = False,
    metadata: Mapping[str, str] | None = None,
    prove: Proof = prove_equal,
) -> float:
    """As ``export_onnx``, which makes the graph; ``path`` is the ``.xml``, the weights (float32) go to a ``.bin`` beside it."""
    folded = slim.fold_gates(copy.deepcopy(model).cpu(), (images,)).eval()
    proto = onnx_proto(folded, images, stride_px if dynamic else None, free_batch, uint8_input)
    with TemporaryDirectory() as folder:
        made = Path(folder) / "network.onnx"
        onnx.save(proto, made)
        network = openvino.convert_model(made)
    differences: list[float] = []
    save_openvino(
        network,
        Path(path),
        metadata or {},
        check=lambda temporary: differences.append(
            prove(folded, OpenVinoNetwork(temporary, precision="float32"), images)
        ),
    )
    return differences[0]


def save_openvino(network: openvino.Model, path: Path, metadata: Mapping[str, str], check: object = None) -> None:
    """Write the ``.xml`` and its ``.bin``, both whole or not at all; ``check`` may refuse them first."""
    for key, value in metadata.items():
        network.set_rt_info(value, [INFO, key])
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        openvino.save_model(network, temporary, compress_to_fp16=False)
        if callable(check):
            check(temporary)
        temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
        temporary.replace(path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
