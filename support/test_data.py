"""Images in and pictures out: the formats that people have, and what is refused."""
import gzip
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from support import data as files
from support import pictures
from support.config import Config

TRIES = settings(max_examples=int(os.environ.get("TRIES", 150)))
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
                   min_size=1, max_size=4)                 # where, how much goes, what is put in
IMAGES = np.arange(20 * 6 * 4, dtype=np.uint16).reshape(20, 6, 4).astype(np.uint8)
LABELS = np.arange(20) % 7


def decoded(path):
    """The pixels of a PNG of this project, by the standard's own rules; of an animation the default
    image's, and those of all frames.
    """
    body, chunks, position = path.read_bytes(), [], 8
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    while position < len(body):
        size, name = struct.unpack_from(">I4s", body, position)
        content = body[position + 8:position + 8 + size]
        assert struct.unpack_from(">I", body, position + 8 + size)[0] == zlib.crc32(name + content)
        chunks.append((name, content))
        position += 12 + size
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[0][1])
    channels, images = {0: 1, 2: 3}[colour], []
    for data in [dict(chunks)[b"IDAT"], *(c[4:] for name, c in chunks if name == b"fdAT")]:
        rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
        assert depth == 8 and not rows[:, 0].any()
        images.append(rows[:, 1:].reshape(height, width, channels))
    frames = len(images) - 1
    assert [name for name, _ in chunks] == [b"IHDR", *[b"acTL"] * (frames > 0), b"IDAT",
                                            *[b"fcTL", b"fdAT"] * frames, b"IEND"]
    if frames:                                  # played without end, the last frame for two seconds
        assert struct.unpack(">II", dict(chunks)[b"acTL"]) == (frames, 0)
        pauses = [struct.unpack_from(">HH", c, 20) for name, c in chunks if name == b"fcTL"]
        assert [a / b for a, b in pauses] == [0.1] * (frames - 1) + [2]
        numbers = [struct.unpack_from(">I", c)[0] for n, c in chunks if n in (b"fcTL", b"fdAT")]
        assert numbers == list(range(2 * frames))
    return images[0], images[1:]


def changed(body, changes):
    for place, removed, put in changes:
        k = int(place * len(body))
        body = body[:k] + put + body[k + removed:]
    return body


def idx(array):
    return (struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            + array.astype(np.uint8).tobytes())


def gz(array):
    return gzip.compress(idx(array))


def written(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def arrays(**changes):
    return dict(images=IMAGES, labels=LABELS) | changes


# ── Images in ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name, beside, pack", [
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", idx),
    ("emnist-train-images-idx3-ubyte.gz", "emnist-train-labels-idx1-ubyte.gz", gz),
    ("t10k-images.idx3-ubyte.gz", "t10k-labels.idx1-ubyte", idx),           # unpacked by a browser
    ("images.npy", "labels.npy", lambda array: written(np.save, array))])
def test_labels_lie_beside_the_images(name, beside, pack, tmp_path):
    """IDX, .npy: the labels are under the same name, read only if they are wanted."""
    (tmp_path / name).write_bytes(pack(IMAGES))
    assert files.load(tmp_path / name)[1] is None
    (tmp_path / beside).write_bytes(b"damaged")
    assert files.load(tmp_path / name, with_labels=False)[1] is None
    with pytest.raises(OSError, match=f"cannot be read as labels.*{beside}"):
        files.load(tmp_path / name)
    (tmp_path / beside).write_bytes(pack(LABELS))
    images, labels = files.load(tmp_path / name)
    assert np.array_equal(images[..., 0], IMAGES) and np.array_equal(labels, LABELS)
    assert labels.dtype == np.int64


OTHER = IMAGES[::-1].copy()
SETS = {
    "ours": arrays(), "Keras": dict(x_test=OTHER[:5], x_train=IMAGES, y_train=LABELS,
                                    y_test=LABELS[:5]),
    "Keras, tests first": dict(x_test=OTHER, y_test=LABELS[::-1], x_train=IMAGES, y_train=LABELS),
    "MedMNIST": dict(train_images=IMAGES, train_labels=LABELS[:, None], val_images=OTHER[:4],
                     val_labels=LABELS[:4, None], test_images=OTHER, test_labels=LABELS[:, None]),
    "without names": dict(arr_0=IMAGES, arr_1=LABELS),
    "two names": dict(arr_0=OTHER, train_images=OTHER, x_train=OTHER, y_train=LABELS, **arrays()),
    "masks beside": arrays(masks=OTHER), "an index before": dict(index=LABELS[::-1], **arrays()),
    "gaps": arrays(labels=1500 * LABELS - 2)}


@pytest.mark.parametrize("name", SETS)
def test_arrays_are_taken_by_name(name, tmp_path, capsys):
    """.npz: images and labels, x_train and y_train, train_images and train_labels, arr_0 and arr_1,
    the first of these.  Labels (N, 1) are labels; those with gaps are numbered anew, which is told.
    """
    (tmp_path / "a.NPZ").write_bytes(written(np.savez, **SETS[name]))
    images, labels = files.load(tmp_path / "a.NPZ")
    assert np.array_equal(images[..., 0], IMAGES) and labels.tolist() == LABELS.tolist()
    told = "labels -2 .. 8998 become 0 .. 6, in their order\n" if name == "gaps" else ""
    assert capsys.readouterr().out == told and files.load(tmp_path / "a.NPZ", False)[1] is None


def zipped(**members):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, body in members.items():
            archive.writestr(f"{name}.npy", body)
    return file.getvalue()


LARGE, SHAPES = np.zeros((99, 99, 99), np.uint8), [
    (32, 32, 3), (20, 8), (0, 6, 4), (9, 8, 8, 2), (9, 8, 8, 4), (9, 8, 8, 7), (2, 2, 2, 2, 1)]


@pytest.mark.parametrize("name, found, says", [
    *(("a.npz", arrays(images=np.zeros(shape, np.uint8)), f"DATA.md makes them; it holds uint8 "
       f"({', '.join(map(str, shape))})") for shape in SHAPES),
    *(("a.npz", arrays(images=IMAGES.astype(kind)), f"it holds {kind} (20, 6, 4)")
      for kind in ("uint16", "bool", "float64", "int8")),
    ("a.npz", dict(a=IMAGES, b=LABELS), "save the images as `images` and their labels as `labels`; "
     "it holds a, b"), ("a.npz", {}, "it holds nothing"),
    ("a.npz", arrays(labels=np.eye(7)[LABELS]), "leaves them out), not float64 (20, 7)"),
    ("a.npz", arrays(labels=LABELS == 1), "not bool"), ("a.npz", arrays(labels=["x"] * 20), "<U1"),
    ("a.npz", arrays(labels=LABELS[:3]), "20 images must be 20 whole numbers"),
    ("a.npz", arrays(images=np.array([Path("x")], dtype=object)), "Object arrays"),
    ("a.npz", zipped(images=b"none"), "it holds |S4 ()"),
    ("a.npz", zipped(images=written(np.save, IMAGES), labels=b"none"), "not |S4 ()"),
    ("a.npz", written(np.savez_compressed, images=LARGE), "too large: save images.npy and, beside"),
    ("idx.gz", gz(LARGE)[:40], "too large"), ("idx", idx(LARGE)[:16], "too large"),
    ("text.npy", b"no images", "the magic"), ("short.npz", b"PK\x03\x04", "File is not a zip"),
    ("idx", idx(IMAGES)[:99], "cannot reshape array of size 83 into shape (20,6,4)"),
    ("long", idx(IMAGES) + b"x", "cannot reshape array of size 481"),
    ("idx.gz", gz(IMAGES)[:40], "ended before"), ("idx", b"\0\0\x08", "a part of it is missing"),
    ("cat.png", b"\x89PNG", "no IDX, .npz or .npy file; DATA.md has recipes for others")])
def test_what_could_be_meant_otherwise_is_refused(name, found, says, tmp_path, monkeypatch):
    """Files: never silently other images, or other labels, or none; and of what says in its first
    bytes that it is too large, no more is read.
    """
    monkeypatch.setattr(files, "LARGEST", 20_000)
    body = found if isinstance(found, bytes) else written(np.savez, **found)
    (tmp_path / name).write_bytes(body)
    with pytest.raises(OSError) as caught:
        files.load(tmp_path / name)
    assert says in str(caught.value) and caught.value.filename == str(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder: name a file; DATA.md makes one"):
        files.load(tmp_path)


@pytest.mark.filterwarnings("error")
def test_an_npy_may_be_larger_than_memory(tmp_path):
    """.npy: of a file of a terabyte (with holes) only what is used is read, and nothing written; a
    header of Python 2, with its 1L, is worth no warning.
    """
    header = (b"\x93NUMPY\x01\x00\x76\x00"
              + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000L, 1000, 1000), }"
              .ljust(0x75) + b"\n")
    with open(tmp_path / "large.npy", "wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + 10 ** 12)
        except OSError:
            pytest.skip("this file system has no files of a terabyte")
    images, labels = files.load(tmp_path / "large.npy")
    training, held_out = files.split(len(images))
    assert images.shape == (10 ** 6, 1000, 1000, 1) and labels is None
    assert not images[training[[0, -1]]].any() and len(held_out) == 10 ** 5
    assert not images.flags.writeable


def test_a_tenth_is_held_out_by_a_fixed_permutation():
    """Data: sorted labels are all in both parts; every image is in one part, always the same, since
    the network that ships must not have seen those that are held out.
    """
    for count in (1, 9, 43, 10_000):
        training, held_out = files.split(count)
        assert sorted([*training, *held_out]) == list(range(count))
        assert len(held_out) == count // 10 and sorted(training) == list(training)
    assert files.split(43)[1].tolist() == [40, 2, 21, 22]
    assert zlib.crc32(np.sort(held_out)) == 124494552
    labels = np.arange(10_000) // 1000
    assert np.bincount(labels[held_out]).min() > 70 and len(set(labels[held_out[:50]])) == 10
    assert np.bincount(labels[training]).min() > 870


def test_the_embedded_digits():
    """assets/digits.npz: 10,000 digits with labels, under 2 MB."""
    images, labels = files.load()
    assert images.shape == (10000, 28, 28, 1) and np.bincount(labels).min() > 800
    assert files.DIGITS.stat().st_size < 2_000_000
    held_out, their_labels = files.held_out_images(files.DIGITS, Config(num_classes=10), 2, 7)
    rows = files.split(10000)[1][:7]
    assert np.array_equal(held_out, images[rows]) and np.array_equal(their_labels, labels[rows])
    assert files.held_out_images(files.DIGITS, Config(num_classes=0), 2, 7)[1] is None


def test_the_fingerprint_tells_data_sets_apart():
    """Data: another image among the first thousand, other labels, another number of images."""
    images = np.zeros((1200, 2, 2, 1), np.uint8)
    found = {files.fingerprint(images, None), files.fingerprint(images[:-1], None),
             *(files.fingerprint(images, np.arange(1200) // k) for k in (1199, 1200))}
    for k in (0, 10, 999):
        images[k] = 1
        found.add(files.fingerprint(images, None))
    assert len(found) == 7


@pytest.mark.parametrize("name, good", [
    (".npz", written(np.savez, **arrays())), (".npy", written(np.save, IMAGES)),
    ("-images-idx3-ubyte", idx(IMAGES)), ("-images-idx3-ubyte.gz", gz(IMAGES))])
@TRIES
@given(changes=CHANGES)
def test_any_bytes_are_images_or_refused(name, good, tmp_path_factory, changes):
    """Readers: good files with bytes changed, removed or put in give images, or OSError."""
    path = tmp_path_factory.getbasetemp() / f"fuzz{name}"
    path.write_bytes(changed(good, changes))
    try:
        images, labels = files.load(path)
        assert images.dtype == np.uint8 and images.ndim == 4
        assert labels is None or len(labels) == len(images)
    except OSError as error:
        assert error.filename == str(path)


# ── Pictures out ──────────────────────────────────────────────────────────────────────────────────

def test_bytes_are_pixels_and_back():
    """0..255 ↔ [-1, 1]: exact both ways, for arrays and tensors; what lies outside is cut off, and
    what lies between is rounded; colours stay in their channels.
    """
    levels = np.arange(256, dtype=np.uint8)
    pixels = files.to_pixels(levels)
    np.testing.assert_allclose(pixels, 2 * np.arange(256) / 255 - 1, atol=1e-15)
    assert np.array_equal(pictures.to_bytes(pixels), levels)
    found = pictures.to_bytes(np.array([-7, -0.999, 0.01, 0.99, 7]))
    assert found.tolist() == [0, 0, 129, 254, 255]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    x0 = files.to_batch(torch.from_numpy(images))
    for channel in range(3):
        np.testing.assert_allclose(x0[:, channel], images[..., channel] / 127.5 - 1, atol=1e-6)
    assert np.array_equal(pictures.to_pictures(x0), images)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_holds_its_pixels(shape, tmp_path):
    """PNG: read back by the standard's rules, grey and colour, one frame and several; sheets are
    rows of images.
    """
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    pictures.write_png(tmp_path / "a.png", frames[0])
    pictures.write_png(tmp_path / "b.png", *frames)
    (one, none), (last, every) = (decoded(tmp_path / name) for name in ("a.png", "b.png"))
    assert np.array_equal(one.reshape(shape), frames[0]) and not none
    assert np.array_equal(last, every[2])
    assert np.array_equal(np.reshape(every, frames.shape), frames)
    page = pictures.image_grid(frames, columns=2, zoom=3, gap=1)
    assert page.shape[:2] == (2 * 16 + 1, 2 * 22 + 1)
    assert np.array_equal(page[17:32:3, 1:22:3].reshape(shape), frames[2])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Files: a failure keeps what was there, leaves nothing beside it, names the file, not the one
    beside it; a link is replaced, and what it led to stays; what is no file is refused.
    """
    path, link, beside = tmp_path / "a.txt", tmp_path / "link.txt", f".{os.getpid()}.part"
    path.write_bytes(b"old")
    link.symlink_to(path)
    (tmp_path / f".link.txt{beside}").symlink_to(path)                   # in a stranger's folder
    with pytest.raises(OSError) as caught, pictures.atomic_write(path) as file:
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path) and path.read_bytes() == b"old"
    with pictures.atomic_write(link) as file:
        file.write(b"new")
    assert (path.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"old", b"new", False)
    assert {*tmp_path.iterdir()} == {path, link}
    for other in (tmp_path, os.devnull):
        with pytest.raises(ValueError, match=f"{other} is no file: name another"):
            with pictures.atomic_write(other):
                pass
    with pictures.atomic_write(tmp_path / "new/folder/b.txt") as file:
        file.write(b"b")
    assert (tmp_path / "new/folder/b.txt").read_bytes() == b"b"
    read_only = OSError(30, "Read-only file system", str(path.with_name(f".a.txt{beside}")))
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=read_only))
    with pytest.raises(OSError) as caught, pictures.atomic_write(path):
        pass
    assert caught.value.filename == str(path)
