"""Images in: the digits that ship, IDX files, .npz and .npy.

Bytes 0..255 become pixels in [-1, 1] here, and go back in pictures.py.  No file is trusted: a size
is believed only after it was compared with the bytes that are there, and nothing is unpickled.
"""
import contextlib
import gzip
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).resolve().parents[1] / "assets" / "digits.npz"
LARGEST = 4 << 30              # bytes that an .npz may unpack to; an .npy is read in place instead
# What the two arrays of an .npz are called, in the order of preference.
NAMES = (("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"))


def to_pixels(images):
    """0..255 → [-1, 1]: x/127.5 − 1, for arrays and tensors alike, on whichever device they are."""
    return images / 127.5 - 1


def to_batch(images):
    """A tensor of uint8 images (B, H, W, C) as the network takes them: (B, C, H, W) in [-1, 1]."""
    return to_pixels(images).permute(0, 3, 1, 2)


def load(path: str | Path | None = None, with_labels: bool = True) -> tuple:
    """Images (N, H, W, C) uint8 and their labels (N,) int64, or None.

    path: an .npz or .npy of uint8 images N x H x W or N x H x W x C; an IDX file, plain or gzipped,
    its labels beside it under the authors' name; or None, for the digits that ship.
    An .npy is memory-mapped and may be larger than memory.
    Labels with gaps are numbered anew: EMNIST's letters, 1 to 26, become 0 to 25.
    Raises ValueError or OSError, saying what to do.
    """
    path = Path(path or DIGITS)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of images in it; READING.md shows how "
                         "to make one of pictures")
    read = read_numpy if path.suffix in (".npy", ".npz") else read_idx
    images, labels = read(path)
    if not (images.dtype == np.uint8 and images.ndim in (3, 4) and images.size
            and images.shape[3:] in ((), (1,), (3,))):
        raise ValueError(f"{path} must hold uint8 images N x H x W, or N x H x W x 1 or 3, not "
                         f"{images.dtype} {images.shape}: READING.md has recipes")
    if images.ndim == 3 and images.shape[2] == 3:
        raise ValueError(f"{path} holds one image of {images.shape}, or many that are 3 pixels wide"
                         ": save it as 1 x H x W x 3 or as N x H x 3 x 1")
    if labels is not None and with_labels:
        labels = checked_labels(path, labels, len(images))
    return images.reshape(*images.shape[:3], -1), labels if with_labels else None


def checked_labels(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    """The labels as (N,) int64, numbered from 0 without gaps.  Raises ValueError for others."""
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise ValueError(f"{path}: the labels of {count} images must be {count} whole numbers, "
                         f"not {labels.dtype} {labels.shape}; or leave them out with --no-labels")
    if not 0 <= labels.min() <= labels.max() <= 9999:
        raise ValueError(f"{path}: labels must be 0 .. 9999, not {labels.min()} .. {labels.max()}")
    return np.unique(labels.reshape(-1), return_inverse=True)[1]


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the images to train on, and of the tenth that is held out for evaluation.

    A fixed permutation decides, since files are often sorted by label.
    """
    held_out = np.random.default_rng(0).permutation(count)[:count // 10]
    return np.setdiff1d(np.arange(count), held_out), np.sort(held_out)


def fingerprint(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Tells one data set from another: the number of images, a checksum of 1,000 and all labels."""
    checksum = 0 if labels is None else zlib.crc32(labels.tobytes())
    for image in images[:1000]:
        checksum = zlib.crc32(image.tobytes(), checksum)
    return f"{len(images)}-{checksum:08x}"


def held_out_images(path: str | Path | None, config, least: int, most: int) -> tuple:
    """The first held-out images, (N, H, W, C) uint8, and their labels (N,) or None.

    path: None for the data of the training.  Raises ValueError if there are fewer than `least`, or
    if the network of `config` draws images of another size or was trained on other data.
    """
    images, labels = load(path or config.data, with_labels=config.num_classes > 0)
    if path is None and fingerprint(images, labels) != config.fingerprint:
        raise ValueError(f"the network was trained on other images than {config.data or DIGITS}: "
                         "name images that it has not seen with --data")
    held_out, (channels, *size) = split(len(images))[1], config.image_shape
    if len(held_out) < least or images.shape[1:] != (*size, channels):
        raise ValueError(f"{path or config.data or DIGITS} has {len(held_out)} held-out images of "
                         f"{images.shape[1:]}; needed are {least} of {(*size, channels)}")
    held_out = held_out[:most]
    return images[held_out], None if labels is None else labels[held_out]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def parsing(path: Path, kind: str):
    """Turn whatever bad bytes lead to into one ValueError: zipfile, NumPy and JSON have many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # NumPy's, of a damaged header
            yield
    except Exception as error:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.filename:
            raise                                              # too large, or missing: not damaged
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(f"{path} is not {kind}, or it is damaged: {reason}") from None


def read_numpy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """An .npy, memory-mapped: only what is used is read; or two arrays of an .npz, by their names.
    """
    with parsing(path, "an .npy or .npz of images"):
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r"), None
        with zipfile.ZipFile(path) as archive, np.load(path) as found:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError("it is too large: save the images as .npy, which is read in place")
            for images, labels in NAMES:
                if images in found:
                    return found[images], found[labels] if labels in found else None
            raise ValueError(f"it holds {', '.join(found) or 'nothing'}: save the images as "
                             "`images` and their labels as `labels`")


def read_idx(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of an IDX file, and the labels that lie beside it, plain or gzipped."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [path.with_name(name), path.with_name(name + ".gz")]
    labels = next((idx_array(p) for p in beside if p.exists() and p != path), None)
    return idx_array(path), labels


def idx_array(path: Path) -> np.ndarray:
    """IDX: 0, 0, 8 for uint8, the number of dimensions, each as a big-endian int32, the bytes."""
    with parsing(path, "an IDX, .npz or .npy file"):
        body = path.read_bytes()
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        if body[:4] not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
            raise ValueError("it does not begin like one; READING.md has recipes for other formats")
        shape = np.frombuffer(body, ">u4", body[3], 4)
        return np.frombuffer(body, np.uint8, offset=4 + shape.nbytes).reshape(shape)
