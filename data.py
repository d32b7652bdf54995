"""Images in, pictures out: the embedded digits, IDX and NumPy files, PNG and animated PNG.

The only place where bytes 0..255 become pixels in [-1, 1] and back.  Readers trust no file: a
size is believed only after it was checked against the bytes that are there, and nothing is ever
unpickled.

`python data.py` draws the first digits;
`python data.py PATH -n 10000 --out digits.npz` keeps a part.
"""
import argparse
import contextlib
import errno
import os
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).resolve().parent / "assets" / "digits.npz"
LARGEST = 4 << 30        # bytes that a compressed file may unpack to; plain files are memory-mapped


# ── Bytes and pixels ──────────────────────────────────────────────────────────────────────────────

def to_pixels(images):
    """0..255 → [-1, 1]: x/127.5 − 1, for arrays and tensors alike, on whichever device they are."""
    return images / 127.5 - 1


def to_bytes(x: np.ndarray) -> np.ndarray:
    """[-1, 1] → 0..255, rounded; what lies outside is cut off."""
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


# ── Images in ─────────────────────────────────────────────────────────────────────────────────────

def load(path: str | Path = DIGITS) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, H, W, C) uint8 and their labels (N,) int64, or None.

    path: an .npz or .npy of uint8 images N x H x W or N x H x W x C (labels: a second array of N
    whole numbers, as integers, in the .npz); an IDX file, plain or gzipped, its labels beside it
    under the authors' name; or a folder that holds one such training set.  Labels that leave out
    numbers are numbered anew from 0: those of EMNIST's letters, 1 to 26, become 0 to 25.
    Plain .npy and IDX files are memory-mapped.  Raises ValueError or OSError, saying what to mend.
    """
    path = Path(path)
    if path.is_dir():
        path = _training_set(path)
    if path.suffix == ".npz":
        arrays = _read_npz(path)
    elif path.suffix == ".npy":
        arrays = [_read_npy(path)]
    else:
        arrays = [_read_idx(path)]
        name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
        beside = [path.with_name(name), path.with_name(name + ".gz")]
        labels = next((file for file in beside if file.exists() and file != path), None)
        if labels:
            arrays.append(_read_idx(labels))

    images = next((a for a in arrays if a.dtype == np.uint8 and a.ndim in (3, 4)), None)
    if images is None:
        found = ", ".join(f"{a.dtype} {a.shape}" for a in arrays) or "nothing"
        raise ValueError(f"{path} holds no uint8 images N x H x W or N x H x W x C, but {found}")
    if images.size == 0:
        raise ValueError(f"{path} holds no images: its shape is {images.shape}")
    images = images.reshape(*images.shape[:3], -1)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images have 1 or 3 channels, "
                         f"not {images.shape[3]} {images.shape}")

    labels = next((a for a in arrays if a.ndim == 1 and a.dtype.kind in "iu"), None)
    if labels is None:
        return images, None
    if len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9999:
        raise ValueError(f"{path}: labels must be 0, 1, 2, ..., "
                         f"not {labels.min()} .. {labels.max()}")
    return images, np.unique(labels, return_inverse=True)[1]


def split(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part to train on and the last tenth, which is held out for evaluation."""
    cut = len(array) - len(array) // 10
    return array[:cut], array[cut:]


def _training_set(folder: Path) -> Path:
    """The one training set in a folder, in IDX as MNIST's authors name it or in NumPy's formats."""
    for pattern in ("*train-images*idx3*", "*images*idx3*", "*.npz", "*.npy"):
        found = sorted(folder.glob(pattern))
        plain = [p for p in found if p.suffix != ".gz" or p.with_suffix("") not in found]
        if len(plain) == 1:
            return plain[0]
        if plain:
            names = ", ".join(p.name for p in plain)
            raise ValueError(f"{folder} holds several sets of images: name one of {names}")
    raise ValueError(f"{folder} holds no images: no *images*idx3*, .npz or .npy file is in it")


@contextlib.contextmanager
def sound(path: Path, kind: str):
    """Turn whatever bad bytes lead to into one ValueError: zipfile, NumPy and torch have many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} is not {kind}, or it is damaged: {reason}") from None


def _read_idx(path: Path) -> np.ndarray:
    """IDX: 0, 0, 8 for uint8, the number of dimensions, each as a big-endian int32, the bytes."""
    with open(path, "rb") as file, sound(path, "an IDX, .npz or .npy file"):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        start = zlib.decompressobj(31).decompress(file.read(4096), 32) if packed else file.read(32)
        if len(start) < 8 or start[:3] != b"\0\0\x08" or start[3] not in (1, 3):
            raise ValueError("it does not begin like an IDX file of bytes")
        shape = struct.unpack_from(f">{start[3]}I", start, 4)
        offset, size = 4 + 4 * start[3], int(np.prod(shape, dtype=object))
        if not packed:
            there = path.stat().st_size - offset
            if there != size:
                raise ValueError(f"it promises {size} bytes of {shape} and holds {there}")
            return (np.memmap(path, np.uint8, "r", offset, shape) if size
                    else np.zeros(shape, np.uint8))
        if size > LARGEST:
            raise ValueError(f"it would unpack to {size} bytes: "
                             "unpack it on disk, and name that file")
        body = zlib.decompressobj(31).decompress(path.read_bytes(), offset + size + 1)
        if len(body) != offset + size:
            raise ValueError(f"it promises {size} bytes of {shape} and holds other")
        return np.frombuffer(body, np.uint8, offset=offset).reshape(shape)


def _read_npz(path: Path) -> list[np.ndarray]:
    """The arrays of an .npz, each checked against its own header before memory is asked for."""
    arrays = []
    with open(path, "rb") as file, sound(path, "an .npz file"), zipfile.ZipFile(file) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > LARGEST:
            raise ValueError(f"it would unpack to {total} bytes: "
                             "save the images as .npy, which is read in place")
        for member in archive.infolist():
            with archive.open(member) as part:
                arrays.append(_read_array(part, member.file_size))
    return arrays


def _read_array(file, size: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(file)
    promised = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if dtype.hasobject or promised != size - file.tell():
        raise ValueError(f"{promised} bytes of {dtype} promised, {size - file.tell()} there")
    return np.frombuffer(file.read(promised), dtype).reshape(
        shape, order="F" if fortran_order else "C")


def _read_npy(path: Path) -> np.ndarray:
    with sound(path, "an .npy file"):
        return np.lib.format.open_memmap(path, mode="r")


# ── Pictures and files out ────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def whole_file(path: str | Path):
    """A binary file that appears at `path` complete or never: written beside, flushed, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException as error:
        os.unlink(beside)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def require_writable(path: str | Path):
    """Raise OSError now, rather than after the work, if `path` cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(path))


def sheet(images: np.ndarray, columns: int, zoom: int = 2, gap: int = 2) -> np.ndarray:
    """N images (N, H, W) or (N, H, W, C) as one picture, in rows, each pixel zoom x zoom large."""
    images = images.reshape(*images.shape[:3], -1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        page[y:y + h, x:x + w] = image
    return page


def write_png(path: str | Path, *frames: np.ndarray, seconds: float = 0.1):
    """A PNG of one uint8 image H x W (x 1 or 3), or an animated PNG of several.  (W3C PNG, 3rd ed.)

    The last frame of an animation stays for two seconds before it begins again.
    """
    def chunk(name, *parts):
        body = name + b"".join(parts)
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width = frames[0].shape[:2]
    colour = 2 if frames[0].size == 3 * height * width else 0
    number = 0                                  # fcTL and fdAT chunks are counted together
    with whole_file(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)))
        if len(frames) > 1:
            file.write(chunk(b"acTL", struct.pack(">II", len(frames), 0)))
        for k, frame in enumerate(frames):
            rows = frame.reshape(height, -1)
            pixels = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes(), 9)   # filter 0 per row
            if len(frames) > 1:
                pause = round(1000 * (seconds if k + 1 < len(frames) else 2))
                file.write(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0,
                                                      pause, 1000, 0, 0)))
                number += 1
            if k == 0:
                file.write(chunk(b"IDAT", pixels))
            else:
                file.write(chunk(b"fdAT", struct.pack(">I", number), pixels))
                number += 1
        file.write(chunk(b"IEND"))


# ── What a user sees when something is wrong ──────────────────────────────────────────────────────

def refuse(message: object, status: int = 2):
    """One line on stderr, and the end."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def reported():
    """What the user can mend (ValueError, OSError) as one line; a bug keeps its trace."""
    try:
        yield
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}" if error.filename else error)
    except ValueError as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("stopped", status=130)


class Progress:
    """One line about work in progress: refreshed in a terminal, elsewhere it comes now and then."""

    def __init__(self):
        self.terminal, self.due = sys.stdout.isatty(), 0.0

    def __call__(self, line: str, last: bool = False):
        if last or time.monotonic() >= self.due:
            self.due = time.monotonic() + (0.1 if self.terminal else 15)
            start, end = ("\r", "\n" if last else "") if self.terminal else ("", "\n")
            print(f"{start}{line:<78}", end=end, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h{minutes:02}m" if hours
            else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s")


class Arguments(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        refuse(f"{message} ({self.prog} --help lists the options)")


def main():
    parser = Arguments(description="Show images, or keep the first n of them.")
    parser.add_argument("path", nargs="?", default=DIGITS,
                        help="IDX, .npz or .npy file, or a folder")
    parser.add_argument("-n", type=int, default=100, help="how many, from the first on")
    parser.add_argument("--out", default="out/data.png",
                        help="a .png to look at or an .npz to keep")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"-n must be at least 1, not {args.n}")
    if not args.out.endswith((".png", ".npz")):
        parser.error(f"--out must end in .png or .npz, not {args.out!r}")
    with reported():
        images, labels = load(args.path)
        print(f"{args.path}: {len(images)} images of {'x'.join(map(str, images.shape[1:]))}, "
              f"{'no labels' if labels is None else f'labels {labels.min()} .. {labels.max()}'}")
        kept = {"images": images[:args.n]} | ({} if labels is None else {"labels": labels[:args.n]})
        if args.out.endswith(".npz"):
            with whole_file(args.out) as file:
                np.savez_compressed(file, **kept)
        else:
            write_png(args.out, sheet(kept["images"], columns=min(10, args.n)))
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
