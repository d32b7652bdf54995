"""Pictures and files out: sheets, PNG and animated PNG; each is written whole or not at all."""
import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np


def to_bytes(x: np.ndarray) -> np.ndarray:
    """[-1, 1] → 0..255, rounded; what lies outside is cut off."""
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_pictures(x_t) -> np.ndarray:
    """A tensor (B, C, H, W) in [-1, 1] as uint8 images (B, H, W, C)."""
    return to_bytes(x_t.permute(0, 2, 3, 1).cpu().numpy())


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """A binary file that appears at `path` complete or never: written beside, flushed, renamed.

    What lies at `path` is replaced, links too.  Raises ValueError for a folder, a pipe, a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file: name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.unlink(missing_ok=True)
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):             # in a folder that cannot be written to
            beside.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename = str(path)
        raise


def image_grid(images: np.ndarray, columns: int, zoom: int = 2, gap: int = 2) -> np.ndarray:
    """N images (N, H, W) or (N, H, W, C) as one picture, in rows, each pixel zoom x zoom large."""
    images = images.reshape(*images.shape[:3], -1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        page[y:y + h, x:x + w] = image
    return page


def encode_png(frames: list[np.ndarray]) -> bytes:
    """A PNG of one uint8 image H x W (x 1 or 3), or an animated PNG of several.  (W3C PNG, 3rd ed.)

    The last frame is what a viewer without animation shows; in an animation it stays for two
    seconds before it begins again.
    """
    def chunk(name, *parts):
        body = name + b"".join(parts)
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width = frames[0].shape[:2]
    colour = {1: 0, 3: 2}[frames[0].size // (height * width)]
    packed = [zlib.compress(np.insert(frame.reshape(height, -1), 0, 0, axis=1).tobytes(), 9)
              for frame in frames]
    body = chunk(b"IDAT", packed[-1])
    if len(frames) > 1:
        body = chunk(b"acTL", struct.pack(">II", len(frames), 0)) + body
        for k, pixels in enumerate(packed):
            pause = 100 if k + 1 < len(frames) else 2000                          # milliseconds
            body += chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * k, width, height, 0, 0, pause,
                                               1000, 0, 0))
            body += chunk(b"fdAT", struct.pack(">I", 2 * k + 1), pixels)
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + body + chunk(b"IEND")


def write_png(path: str | Path, *frames: np.ndarray):
    with atomic_write(path) as file:
        file.write(encode_png(frames))
