"""What a drawing begins with: the noise and the label of each image, and what is kept of it."""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from support.config import Sampling

QUARTERS = {"left": (0, 4, 0, 2), "right": (0, 4, 2, 4), "top": (0, 2, 0, 4),
            "bottom": (2, 4, 0, 4), "centre": (1, 3, 1, 3)}        # rows from, to; columns from, to


def image_noise(seed: int, indices: range, shape: tuple, device) -> Callable[[], Tensor]:
    """noise() → z ~ N(0, I), (len(indices), *shape).

    Each image has a stream of its own: its noise is the same in any batch and on any device.
    """
    streams = [np.random.default_rng((seed, i)) for i in indices]

    def noise():
        z = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
        return torch.from_numpy(z).to(device)
    return noise


def labels_for(sampling: Sampling, num_classes: int) -> np.ndarray | None:
    """The label of each image: 0, 1, … in turn, or all the same; num_classes stands for none.

    Raises ValueError for a label that the network does not know.
    """
    label = "none" if sampling.label == "each" and sampling.keep else sampling.label
    if not num_classes:
        if label not in ("each", "none") or sampling.guidance != 1:
            raise ValueError("this network knows no labels: leave --label and --guidance out")
        return None
    if label == "each":
        return np.arange(sampling.n) % num_classes
    if label != "none" and not (label.isdecimal() and int(label) < num_classes):
        raise ValueError(f"--label must be 0 .. {num_classes - 1}, each or none, not {label!r}")
    return np.full(sampling.n, num_classes if label == "none" else int(label))


def projection(keep: str, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """P, with P P = P: a half or the centre (inpainting, outpainting), or "coarse", the means over
    4 x 4 pixels (super-resolution).
    """
    if keep == "coarse":
        if height % 4 or width % 4:
            raise ValueError("--keep coarse needs images whose sides are multiples of 4")
        return lambda x: F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    top, bottom, left, right = QUARTERS[keep]
    mask = torch.zeros(height, width)
    mask[height * top // 4:height * bottom // 4, width * left // 4:width * right // 4] = 1
    return lambda x: mask.to(x) * x
