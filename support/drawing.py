"""Many images at once: the noise and the label of each, what is kept of them, batch after batch."""
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from support.config import Config, Sampling
from support.console import Progress
from support.images import atomic_write, held_out_images, to_batch, to_pictures, write_images

COMPLETIONS = 4             # of each image, with --keep
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


def labels_for(sampling: Sampling, num_classes: int, total: int) -> np.ndarray | None:
    """Each image's label: one class, a column per class, none, or all equally often, shuffled.

    Raises ValueError for a label that the network does not know.
    """
    label = sampling.label or ("none" if sampling.keep else "random")
    if not num_classes:
        if sampling.label or sampling.guidance not in (None, 1):
            raise ValueError("this network knows no labels: leave --label and --guidance out")
        return None
    if label == "all":
        if total % num_classes:
            raise ValueError(f"-n must be a multiple of {num_classes} for --label all, not {total}")
        return np.arange(total) % num_classes
    if label == "random":
        rounds = (np.random.default_rng((sampling.seed, i, 1)).permutation(num_classes)
                  for i in range(-(-total // num_classes)))
        return np.concatenate([*rounds])[:total]
    if label != "none" and not (label.isdecimal() and int(label) < num_classes):
        raise ValueError(f"--label must be 0 .. {num_classes - 1}, all, none or random, "
                         f"not {label!r}")
    return np.full(total, num_classes if label == "none" else int(label))


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


def even_frames(snr: np.ndarray, count: int = 40) -> list[int]:
    """Of x_T, x_{T−1}, …, x_0 at most `count` that are even in log-SNR, x_T among them, and x_0.

    snr: theirs, without that of x_0, which is infinite.  Below 1e-5 all is noise.
    """
    log_snr = np.log(np.maximum(snr, 1e-5))
    levels = np.linspace(log_snr[0], log_snr[-1], count)
    return [*np.unique(np.searchsorted(log_snr, levels)).tolist(), len(snr)]


def collect(walk: Callable[[slice], Iterator[Tensor]], total: int, batch: int, steps: int,
            shown: list[int]) -> list[np.ndarray]:
    """The images after each of the steps `shown`, (total, H, W, C) uint8, and how it goes.

    walk(part): the x_t of the images in that slice, x_T first.
    """
    progress, frames = Progress(total), {k: [] for k in shown}
    for first in range(0, total, batch):
        part = slice(first, min(first + batch, total))
        for k, x_t in enumerate(walk(part)):
            progress(first + (part.stop - first) * k / steps,
                     f"step {k} of {steps} · images {first + 1} to {part.stop} of {total}")
            if k not in frames:
                continue
            if not torch.isfinite(x_t).all():
                raise ValueError("the walk led to pixels that are no numbers: are the weights "
                                 "sound? else more --steps, or --sampler dpm")
            frames[k].append(to_pictures(x_t))
    return [np.concatenate(frame) for frame in frames.values()]


def draw_all(walk: Callable, sampling: Sampling, config: Config, device: torch.device,
             times: np.ndarray, snr: np.ndarray):
    """Draw all the images that `sampling` asks for, into its file.

    walk: generate() of sample.py, for a part of the images.  times: t of x_T, …, x_0;  snr: their
    signal-to-noise ratio, without that of x_0.
    """
    out, total = Path(sampling.out), sampling.n or (8 if sampling.keep else 100)
    sheet, known, steps = out.suffix == ".png", None, len(snr)
    columns = config.num_classes if sampling.label == "all" else None
    if sampling.keep:
        originals, _ = held_out_images(sampling.data, config, least=total, most=total)
        known = to_batch(torch.from_numpy(originals).to(device))
        kept = to_pictures(projection(sampling.keep, *known.shape[2:])(known))
        known, total = known.repeat_interleave(COMPLETIONS, 0), COMPLETIONS * total
    labels = labels_for(sampling, config.num_classes, total)
    shown = even_frames(snr) if sampling.animate else [steps]

    def part_of_walk(part):
        label = None if labels is None else torch.from_numpy(labels[part]).to(device)
        predicted = deque(maxlen=1)
        for x_t in walk(range(total)[part], label, None if known is None else known[part],
                        predicted.append):
            if sampling.animate and sheet and not sampling.keep:
                x0 = predicted[-1] if predicted else torch.zeros_like(x_t)      # grey: none as yet
                x_t = torch.cat([x_t, x0], dim=2)
            yield x_t

    with atomic_write(out) as file:
        frames = collect(part_of_walk, total, sampling.batch, steps, shown)
        if sampling.keep and sheet:
            frames = [completion_rows(originals, kept, frame) for frame in frames]
            columns = 2 + COMPLETIONS
        write_images(file, out, frames, columns, labels, times[shown] if sampling.animate else None)
    print(f"drawn: {out}")


def completion_rows(*columns: np.ndarray) -> np.ndarray:
    """A row for each of n images: what is in `columns`, each n images or n times several."""
    n, *shape = columns[0].shape
    rows = np.concatenate([images.reshape(n, -1, *shape) for images in columns], axis=1)
    return rows.reshape(-1, *shape)
