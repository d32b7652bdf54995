"""Images in: the digits that ship, IDX files, .npz and .npy.

Bytes 0..255 become pixels in [-1, 1] here, and go back in pictures.py.  No file is trusted: nothing
is read that is larger than LARGEST, and nothing is unpickled.
"""
import contextlib
import gzip
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from support.console import one_line

DIGITS = Path(__file__).resolve().parents[1] / "assets" / "digits.npz"
LARGEST = 4 << 30              # bytes that are read into memory
# What the two arrays of an .npz are called, in the order of preference.
NAMES = (("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"),
         ("arr_0", "arr_1"))
TOO_LARGE = "too large: save images.npy and, beside it, labels.npy, which are read in place"


def to_pixels(images):
    """0..255 → [-1, 1]: x/127.5 − 1, for arrays and tensors alike, on whichever device they are."""
    return images / 127.5 - 1


def to_batch(images):
    """A tensor of uint8 images (B, H, W, C) as the network takes them: (B, C, H, W) in [-1, 1]."""
    return to_pixels(images).permute(0, 3, 1, 2)


def load(path: str | Path | None = None, with_labels: bool = True) -> tuple:
    """Images (N, H, W, C) uint8 and their labels (N,) int64, or None.

    path: an .npz or .npy of uint8 images N x H x W or N x H x W x C, or an IDX file, plain or
    gzipped; or None, for the digits that ship.  Labels lie in an .npz, or beside the others under
    the same name with "labels" for "images".  An .npy may be larger than memory.
    Labels are numbered from 0 without gaps, which is told: EMNIST's letters 1 .. 26 become 0 .. 25.
    Raises ValueError or OSError, saying what to do.
    """
    path = Path(path or DIGITS)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file; DATA.md makes one of pictures")
    with parsing(path, "images"):
        images, labels = read(path, with_labels)
        if not (images.dtype == np.uint8 and images.ndim in (3, 4) and images.size
                and images.shape[3:] in ((), (1,), (3,)) and images.shape[2:] != (3,)):
            raise ValueError("needed are uint8 images, N x H x W (W not 3) or N x H x W x 1 or 3: "
                             f"DATA.md makes them; it holds {images.dtype} {images.shape}")
        images, n = images.reshape(*images.shape[:3], -1), len(images)
        if labels is None:
            return images, None
        if labels.dtype.kind not in "iu" or labels.shape not in ((n,), (n, 1)):
            raise ValueError(f"the labels of {n} images must be {n} whole numbers (--no-labels "
                             f"leaves them out), not {labels.dtype} {labels.shape}")
    theirs, labels = np.unique(labels, return_inverse=True)
    if (theirs[0], theirs[-1]) != (0, len(theirs) - 1):
        print(f"labels {theirs[0]} .. {theirs[-1]} become 0 .. {len(theirs) - 1}, in their order")
    return images, labels.reshape(-1)


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the images to train on, and of the tenth that is held out for evaluation.

    A fixed permutation decides, since files are often sorted by label, and the tenth stays in its
    order: the first few of them are of all labels too.
    """
    held_out = np.random.default_rng(0).permutation(count)[:count // 10]
    return np.setdiff1d(np.arange(count), held_out), held_out


def fingerprint(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Tells data sets apart: the number of images, a checksum of 1,000, and one of all labels."""
    checksum, of_labels = 0, 0 if labels is None else zlib.crc32(labels.tobytes())
    for image in images[:1000]:
        checksum = zlib.crc32(image.tobytes(), checksum)
    return f"{len(images)}-{checksum:08x}-{of_labels:08x}"


def trained_on(config, images: np.ndarray) -> bool:
    """Whether these are the images of the network's training, whatever labels lie beside them."""
    return fingerprint(images, None).split("-")[:2] == config.fingerprint.split("-")[:2]


def held_out_images(path: str | Path | None, config, least: int, most: int,
                    loaded: tuple | None = None) -> tuple:
    """Images that the network has not seen, (N, H, W, C) uint8, and their labels (N,) or None.

    path: None for the data of the training, of which a tenth is held out; of other images all are
    unseen.  loaded: what lies there.  Raises ValueError for fewer than `least`, another size, or
    other images at None.
    """
    images, labels = loaded or load(path or config.data, with_labels=config.num_classes > 0)
    seen = trained_on(config, images)
    if path is None and not seen:
        raise ValueError(f"the network was trained on other images than {config.data or DIGITS}: "
                         "name images that it has not seen with --data")
    unseen = split(len(images))[1] if seen else np.random.default_rng(0).permutation(len(images))
    size = (*config.image_shape[1:], config.image_shape[0])
    if len(unseen) < least or images.shape[1:] != size:
        raise ValueError(f"{path or config.data or DIGITS} has {len(unseen)} images of "
                         f"{images.shape[1:]} that it has not seen; needed are {least} of {size}")
    return images[unseen[:most]], None if labels is None else labels[unseen[:most]]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def parsing(path: Path, kind: str):
    """Turn whatever bad bytes lead to into one OSError: zipfile, NumPy and JSON have many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # NumPy's, of a damaged header
            yield
    except Exception as error:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.filename:
            raise                                              # too large, missing, or told already
        if isinstance(error, (LookupError, TypeError, AttributeError)):
            error = f"a part of it is missing or of another type: {error}"
        raise OSError(0, f"cannot be read as {kind}: {one_line(error, 180)}", str(path)) from None


def read(path: Path, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a file, and the labels in it, by their names, or beside it."""
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as archive, np.load(path) as found:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError(TOO_LARGE)
            for pair in NAMES:
                if pair[0] in found:               # a member that is no array comes as its bytes
                    names = pair if with_labels and pair[1] in found else pair[:1]
                    return (*(np.asarray(found[name]) for name in names), None)[:2]
            raise ValueError("save the images as `images` and their labels as `labels`; it holds "
                             f"{', '.join(found) or 'nothing'}")
    images, name = read_array(path), path.name.replace("images", "labels").replace("idx3", "idx1")
    for labels in map(path.with_name, (name.removesuffix(".gz"), name, name + ".gz")):
        if with_labels and name != path.name and labels.exists():
            with parsing(labels, "labels"):
                return images, read_array(labels)
    return images, None


def read_array(path: Path) -> np.ndarray:
    """An .npy, memory-mapped: only what is used is read; or an IDX file, plain or gzipped.

    IDX: 0, 0, 8 for uint8, the number of dimensions, each as a big-endian int32, the bytes.
    """
    if path.suffix.lower() == ".npy":
        return np.lib.format.open_memmap(path, mode="r")
    with open(path, "rb") as file:
        file = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        if file.read(3) != b"\0\0\x08":
            raise ValueError("it is no IDX, .npz or .npy file; DATA.md has recipes for others")
        shape = np.frombuffer(file.read(4 * file.read(1)[0]), ">u4")
        if (size := np.prod(shape, dtype=object)) > LARGEST:
            raise ValueError(TOO_LARGE)
        return np.frombuffer(file.read(size + 1), np.uint8).reshape(shape)
