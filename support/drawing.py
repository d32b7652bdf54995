"""What a drawing begins with: the label of each image, and what is kept of it."""
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from support.config import Sampling
from support.data import parsing, read

QUARTERS = {"left": (0, 4, 0, 2), "right": (0, 4, 2, 4), "top": (0, 2, 0, 4),
            "bottom": (2, 4, 0, 4), "centre": (1, 3, 1, 3)}        # rows from, to; columns from, to


def labels_for(sampling: Sampling, num_classes: int) -> np.ndarray | None:
    """The label of each image: 0, 1, … in turn, or all the same; num_classes stands for none.

    Raises ValueError for a label that the network does not know.
    """
    label = sampling.label
    if label == "each" and (sampling.keep or sampling.start):
        label = "none"
    if not num_classes:
        if label not in ("each", "none") or sampling.guidance != 1:
            raise ValueError("this network knows no labels: leave --label and --guidance out")
        return None
    if label == "each":
        return np.arange(sampling.n) % num_classes
    if label != "none" and not (label.isdecimal() and int(label) < num_classes):
        raise ValueError(f"--label must be 0 .. {num_classes - 1}, each or none, not {label!r}")
    return np.full(sampling.n, num_classes if label == "none" else int(label))


def columns_for(sampling: Sampling, num_classes: int) -> int:
    """A column for each held-out image, or for each label, or as many as rows."""
    if sampling.keep or sampling.start:
        return sampling.n
    if num_classes and sampling.label == "each":
        return num_classes
    return math.ceil(sampling.n ** 0.5)


def projection(keep: str, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """P, with P P = P: a half or the centre (inpainting, outpainting), "coarse", the means over
    4 x 4 pixels (super-resolution), or where the array in the file `keep` is 1.
    """
    if keep == "coarse":
        if height % 4 or width % 4:
            raise ValueError("--keep coarse needs images whose sides are multiples of 4")
        return lambda x: F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    mask = torch.zeros(height, width)
    if keep in QUARTERS:
        top, bottom, left, right = QUARTERS[keep]
        mask[height * top // 4:height * bottom // 4, width * left // 4:width * right // 4] = 1
    else:
        with parsing(Path(keep), "a mask"):
            found, _ = read(Path(keep), with_labels=False)
        if found.shape != (height, width) or not np.isin(found, (0, 1)).all():
            raise ValueError(f"{keep} must be an array of {height} x {width} zeros and ones, 1 "
                             f"where the image is kept, not {found.dtype} {found.shape}")
        mask += torch.from_numpy(found.astype(np.float32))
    return lambda x: mask.to(x) * x
