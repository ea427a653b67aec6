"""The network: a list of layers, each reading earlier outputs by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .detect import Detect


class YOLO(nn.Module):
    """A YOLOv5 built by ``build_model``; state dict keys are those of published checkpoints (``model.0.conv.weight``).

    ``sources[i]`` are the indices of the layers whose outputs layer i reads; -1 is the image. A layer whose ``from`` is
    a list in the description takes a list (``takes_list[i]``). The last layer is the detection head.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        layers: Sequence[nn.Module],
        sources: Sequence[tuple[int, ...]],
        takes_list: Sequence[bool],
    ) -> None:
        super().__init__()
        self.description = dict(description)
        self.model = nn.Sequential(*layers)
        self.sources = tuple(sources)
        self.takes_list = tuple(takes_list)
        self._last_use = {source: i for i, indices in enumerate(self.sources) for source in indices}

    @property
    def detect(self) -> Detect:
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def num_classes(self) -> int:
        return self.detect.num_classes

    @property
    def stride_px(self) -> tuple[int, ...]:
        return self.detect.stride_px

    @property
    def anchors_px(self) -> Tensor:
        """[L, A, 2] width and height in pixels."""
        return self.detect.anchors_px

    def forward(self, images: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """[B, 3, H, W] in 0..1, sides divisible by the largest stride -> the head's output.

        Training: raw maps, one [B, A, h, w, 5 + classes] per level.
        Evaluation: (decoded [B, N, 5 + classes], raw maps); see ``Detect.decode``.
        """
        outputs: dict[int, Any] = {-1: images}
        for i, layer in enumerate(self.model):
            inputs = [outputs[source] for source in self.sources[i]]
            outputs[i] = layer(inputs if self.takes_list[i] else inputs[0])
            for source in self.sources[i]:
                if self._last_use[source] == i:
                    outputs.pop(source, None)
        result: list[Tensor] | tuple[Tensor, list[Tensor]] = outputs[len(self.model) - 1]
        return result
