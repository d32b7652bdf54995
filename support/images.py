"""Images in, pictures out: the embedded digits, IDX and NumPy files, PNG and animated PNG.

The only place where bytes 0..255 become pixels in [-1, 1] and back.  Readers trust no file: a
size is believed only after it was checked against the bytes that are there, and nothing is ever
unpickled.

`python -m support.images` shows the first digits;
`python -m support.images PATH -n 10000 --out digits.npz` keeps a part.
"""
import contextlib
import errno
import gzip
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from support.config import DIGITS, Sampling, add_options, given
from support.console import Parser, one_line_errors

LARGEST = 4 << 30              # bytes that a file may unpack to; an .npy is memory-mapped instead


# ── Bytes and pixels ──────────────────────────────────────────────────────────────────────────────

def to_pixels(images):
    """0..255 → [-1, 1]: x/127.5 − 1, for arrays and tensors alike, on whichever device they are."""
    return images / 127.5 - 1


def to_bytes(x: np.ndarray) -> np.ndarray:
    """[-1, 1] → 0..255, rounded; what lies outside is cut off."""
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_batch(images):
    """A tensor of uint8 images (B, H, W, C) as the network takes them: (B, C, H, W) in [-1, 1]."""
    return to_pixels(images).permute(0, 3, 1, 2)


def to_pictures(x_t) -> np.ndarray:
    """And back, as an array."""
    return to_bytes(x_t.permute(0, 2, 3, 1).cpu().numpy())


# ── Images in ─────────────────────────────────────────────────────────────────────────────────────

def load(path: str | Path | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, H, W, C) uint8 and their labels (N,) int64, or None.

    path: an .npz or .npy of uint8 images N x H x W or N x H x W x C (labels: a second array of N
    whole numbers, as integers, in the .npz); an IDX file, plain or gzipped, its labels beside it
    under the authors' name; a folder that holds one such training set; or None, for the digits that
    ship.  Labels that leave out numbers are numbered anew from 0: EMNIST's letters, 1 to 26,
    become 0 to 25.
    An .npy is memory-mapped.  Raises ValueError or OSError, saying what to mend.
    """
    path = Path(path or DIGITS)
    path = training_set(path) if path.is_dir() else path
    arrays = read_numpy(path) if path.suffix in (".npz", ".npy") else read_idx(path)
    found = ", ".join(f"{a.dtype} {a.shape}" for a in arrays) or "nothing"
    images = next((a for a in arrays if a.dtype == np.uint8 and a.ndim in (3, 4) and a.size), None)
    if images is None or images.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{path} must hold uint8 images, N x H x W (x 1 or 3), and holds {found}")
    labels = next((a for a in arrays if a.ndim == 1 and a.dtype.kind in "iu"), None)
    if labels is not None:
        if len(labels) != len(images):
            raise ValueError(f"{path} holds {len(images)} images, but {len(labels)} labels")
        if not 0 <= labels.min() <= labels.max() <= 9999:
            raise ValueError(f"{path}: labels must be 0 .. 9999, not {labels.min()} .. "
                             f"{labels.max()}")
        labels = np.unique(labels, return_inverse=True)[1]
    return images.reshape(*images.shape[:3], -1), labels


def split(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part to train on and the last tenth, which is held out for evaluation."""
    cut = len(array) - len(array) // 10
    return array[:cut], array[cut:]


def fingerprint(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Tells one data set from another: the number of images, a checksum of the first and labels."""
    first = zlib.crc32(np.ascontiguousarray(images[:1000]).tobytes())
    return f"{len(images)}-{first if labels is None else zlib.crc32(labels.tobytes(), first):08x}"


def held_out_images(path: str | Path | None, config, least: int, most: int) -> tuple:
    """The first held-out images, (N, H, W, C) uint8, and their labels (N,) or None.

    Raises ValueError when there are fewer than `least`, or others than the network of `config`
    draws.  path: None for the images that it was trained on.
    """
    images, labels = load(path or config.data)
    images, labels = (None if a is None else split(a)[1][:most] for a in (images, labels))
    channels, *size = config.image_shape
    if len(images) < least or images.shape[1:] != (*size, channels):
        raise ValueError(f"{path or config.data or DIGITS} has {len(images)} held-out images of "
                         f"{images.shape[1:]}; needed are {least} of {(*size, channels)}")
    return np.array(images), labels


def training_set(folder: Path) -> Path:
    """The one training set in a folder, in IDX as MNIST's authors name it or in NumPy's formats."""
    for pattern in ("*train-images*idx3*", "*images*idx3*", "*.npz", "*.npy"):
        found = {p.name.removesuffix(".gz"): p for p in sorted(folder.glob(pattern), reverse=True)}
        if len(found) == 1:
            return found.popitem()[1]
        if found:
            raise ValueError(f"{folder} holds several sets of images: name one of "
                             f"{', '.join(sorted(found))}")
    raise ValueError(f"{folder} holds no images: no *images*idx3*, .npz or .npy file is in it")


@contextlib.contextmanager
def parsing(path: Path, kind: str):
    """Turn whatever bad bytes lead to into one ValueError: zipfile, NumPy and torch have many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:      # it is missing, not damaged
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} is not {kind}, or it is damaged: {reason}") from None


def read_idx(path: Path) -> list[np.ndarray]:
    """The images of an IDX file, and the labels that lie beside it, plain or gzipped.

    IDX: 0, 0, 8 for uint8, the number of dimensions, each as a big-endian int32, the bytes.
    """
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [path.with_name(name), path.with_name(name + ".gz")]
    arrays = []
    for part in [path, *[file for file in beside if file.exists() and file != path][:1]]:
        with open(part, "rb") as plain, parsing(part, "an IDX, .npz or .npy file"):
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file = gzip.GzipFile(fileobj=plain) if packed else plain
            start = file.read(4)
            if start[:3] != b"\0\0\x08" or start[3:] not in (b"\x01", b"\x03"):
                raise ValueError("it does not begin like an IDX file of bytes")
            shape = struct.unpack(f">{start[3]}I", file.read(4 * start[3]))
            size = math.prod(shape)
            body = bytearray(file.read(size + 1) if size <= LARGEST else b"")
            if len(body) != size:
                raise ValueError(f"it promises {size} bytes of {shape} and holds other, or is "
                                 "too large: save the images as .npy, which is read in place")
            arrays.append(np.frombuffer(body, np.uint8).reshape(shape))
    return arrays


def read_numpy(path: Path) -> list[np.ndarray]:
    """The array of an .npy, memory-mapped, or those of an .npz."""
    with open(path, "rb") as file, parsing(path, f"an {path.suffix} file"):
        if path.suffix == ".npy":
            return [np.lib.format.open_memmap(path, mode="c")]
        with zipfile.ZipFile(file) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > LARGEST:
                raise ValueError(f"it would unpack to {total} bytes: "
                                 "save the images as .npy, which is read in place")
            return [read_member(archive, name) for name in archive.namelist()]


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz.  What its header says can be neither images nor labels is not read,
    however large it is: zeros of its type and shape, which take no memory, stand for it.
    """
    with archive.open(name) as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if old
                           else np.lib.format.read_array_header_2_0)(member)
    if (dtype == np.uint8 and len(shape) in (3, 4)) or (dtype.kind in "iu" and len(shape) == 1):
        with archive.open(name) as member:
            return np.lib.format.read_array(member)
    return np.broadcast_to(np.zeros((), dtype), shape)


# ── Pictures and files out ────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def atomic_write(path: str | Path):
    """A binary file that appears at `path` complete or never: written beside, flushed, renamed.

    The name beside it is always the same, so a run replaces what a killed one left.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)    # a link is followed
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename = str(path)
        raise


FONT = np.array([list(row) for row in (                 # the ten digits, 6 x 7 pixels each
    ".###....#....###..#####....#..#####...##..#####..###...###..",
    "#...#..##...#...#....#....##..#......#........#.#...#.#...#.",
    "#...#...#.......#...#....#.#..####..#........#..#...#.#...#.",
    "#...#...#......#.....#..#..#......#.####....#....###...####.",
    "#...#...#.....#.......#.#####.....#.#...#..#....#...#.....#.",
    "#...#...#....#....#...#....#..#...#.#...#..#....#...#....#..",
    ".###...###..#####..###.....#...###...###...#.....###...##...")]) == "#"


def caption(number: int, width: int) -> np.ndarray:
    """`number` in the middle of a grey strip of 9 x width pixels, to stand above an image."""
    text = np.hstack([FONT[:, 6 * int(digit):6 * int(digit) + 6] for digit in str(number)])
    strip = np.full((9, width), 128, np.uint8)
    left = max(0, (width - text.shape[1] + 1) // 2)
    strip[1:8, left:left + text.shape[1]][text[:, :width]] = 255
    return strip


def image_grid(images: np.ndarray, columns: int, zoom: int = 2, gap: int = 2,
               captions: Sequence[int] | None = None) -> np.ndarray:
    """N images (N, H, W) or (N, H, W, C) as one picture, in rows, each pixel zoom x zoom large.

    captions: a number to stand above each image, its t for instance.
    """
    images = images.reshape(*images.shape[:3], -1)
    if captions is not None:
        strips = np.stack([caption(number, images.shape[2]) for number in captions])[..., None]
        images = np.concatenate([strips.repeat(images.shape[3], axis=3), images], axis=1)
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        page[y:y + h, x:x + w] = image
    return page


def encode_png(frames: list[np.ndarray], seconds: float = 0.1) -> bytes:
    """A PNG of one uint8 image H x W (x 1 or 3), or an animated PNG of several.  (W3C PNG, 3rd ed.)

    The last frame is what a viewer without animation shows; in an animation it stays for two
    seconds before it begins again.
    """
    def chunk(name, *parts):
        body = name + b"".join(parts)
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width = frames[0].shape[:2]
    colour = 2 if frames[0].size == 3 * height * width else 0
    packed = [zlib.compress(np.insert(frame.reshape(height, -1), 0, 0, axis=1).tobytes(), 9)
              for frame in frames]
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))]
    if len(frames) > 1:
        chunks.append(chunk(b"acTL", struct.pack(">II", len(frames), 0)))
    chunks.append(chunk(b"IDAT", packed[-1]))
    for k, pixels in enumerate(packed if len(frames) > 1 else []):
        pause = round(1000 * (seconds if k + 1 < len(frames) else 2))
        chunks.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * k, width, height, 0, 0,
                                                 pause, 1000, 0, 0)))
        chunks.append(chunk(b"fdAT", struct.pack(">I", 2 * k + 1), pixels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND")


def write_png(path: str | Path, *frames: np.ndarray):
    with atomic_write(path) as file:
        file.write(encode_png(frames))


def write_images(file, path: Path, frames: list[np.ndarray], columns: int | None = None,
                 labels: np.ndarray | None = None, times: Sequence[int] | None = None):
    """.png: a sheet of the images (N, H, W, C) of each frame; .npz: those of the last, and labels.

    columns: of the sheet; None makes it a square.  times: a t for each frame, above its images.
    """
    if path.suffix == ".png":
        n = len(frames[0])
        columns = columns or math.ceil(math.sqrt(n))
        captions = [None] * len(frames) if times is None else [[t] * n for t in times]
        return file.write(encode_png([image_grid(frame, columns, captions=above)
                                      for frame, above in zip(frames, captions)]))
    images = frames[-1][..., 0] if frames[-1].shape[3] == 1 else frames[-1]
    np.savez_compressed(file, images=images, **({} if labels is None else dict(labels=labels)))


@one_line_errors()
def main():
    first = Sampling(out="out/data.png")
    parser = Parser(description="Show images, or keep the first of them.")
    parser.add_argument("data", nargs="?", metavar="PATH",
                        help="IDX, .npz or .npy file, or a folder (the digits)")
    add_options(parser, first, "n", "out")
    first = replace(first, **given(parser.parse_args(), Sampling))
    images, labels = load(first.data)
    n, out = min(first.n or 100, len(images)), Path(first.out)
    print(f"{first.data or DIGITS}: {len(images)} images of "
          f"{'x'.join(map(str, images.shape[1:]))}, "
          f"{'no labels' if labels is None else f'labels {labels.min()} .. {labels.max()}'}")
    with atomic_write(out) as file:
        write_images(file, out, [images[:n]], None, None if labels is None else labels[:n])
    print(f"written: {out}, {n} images")


if __name__ == "__main__":
    main()
