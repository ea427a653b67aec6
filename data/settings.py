"""Settings of data sets and their loading, free of torch: a command line is read before torch is imported.

An annotated field is a command-line flag of the same name; the annotation is its help, and what values are expected,
which ``detection.command`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

Cache = Literal["ram", "disk", "none"]
MAX_PIXELS = 178_956_970
"""Where Pillow takes an image for an attack on the memory: 512 MiB of RGB."""


@dataclass(frozen=True)
class ImageSettings:
    """Images."""

    max_pixels: Annotated[int, "an image of more pixels (height times width) is not read", "at least 1"] = MAX_PIXELS


@dataclass(frozen=True)
class DataSettings:
    """Data set."""

    data: Annotated[str | None, "data set description (a YOLOv5 data.yaml)"] = "data/bccd.yaml"
    download: Annotated[
        bool,
        "fetch first what is missing: the data set, as its yaml's download key says, and published weights (yolov5n.pt)",
    ] = False
    data_root: Annotated[str | None, "folder of data sets; else $SLIM_DATA_ROOT, else ./datasets"] = None
    classes: Annotated[
        tuple[int | str, ...], "names or numbers of the classes to look at, in their new order; else all"
    ] = ()
    single_cls: Annotated[bool, "all classes as one, named object"] = False
    images: ImageSettings = ImageSettings()


@dataclass(frozen=True)
class LoaderSettings:
    """Loading of images."""

    batch_size: Annotated[int, "images at once, of all ranks together"] = 16
    workers: Annotated[int, "loader processes, of each rank"] = 2
    cache: Annotated[Cache, "decoded images stay in memory, in .slim-cache beside the data, or not"] = "ram"


@dataclass(frozen=True)
class SamplingSettings:
    """Training batches."""

    close_mosaic: Annotated[int, "last epochs without mosaic and mixup"] = 0
    multi_scale: Annotated[bool, "each training batch at another size, 0.5 to 1.5 times --img"] = False
    image_weights: Annotated[bool, "draw training images with rare classes more often"] = False


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images.

    Names and defaults are YOLOv5's (its ``scratch-low`` recipe); 0 switches a part off. A scale of 0 and a shear of a right
    angle would leave nothing of the image.
    """

    mosaic: Annotated[float, "probability that four images make one training sample", "0 to 1"] = 1.0
    mixup: Annotated[float, "probability that a training sample is blended with a second one", "0 to 1"] = 0.0
    scale: Annotated[float, "training images are scaled by 1 - scale to 1 + scale", "0 to below 1"] = 0.5
    translate: Annotated[float, "training images are moved by at most this share of their size", "0 to 1"] = 0.1
    degrees: Annotated[float, "training images are turned by at most this many degrees", "0 to 180"] = 0.0
    shear: Annotated[
        float, "training images are sheared by at most this many degrees, along x and along y", "0 to below 90"
    ] = 0.0
    hsv_h: Annotated[float, "the hue of training images turns by at most this share of the colour circle", "0 to 1"] = (
        0.015
    )
    hsv_s: Annotated[float, "their saturation is multiplied by 1 - hsv_s to 1 + hsv_s", "0 to 1"] = 0.7
    hsv_v: Annotated[float, "their brightness is multiplied by 1 - hsv_v to 1 + hsv_v", "0 to 1"] = 0.4
    flipud: Annotated[float, "probability of an upside-down flip", "0 to 1"] = 0.0
    fliplr: Annotated[float, "probability of a left-right flip", "0 to 1"] = 0.5
