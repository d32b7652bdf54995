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

from support import data as files, pictures
from support.config import Config

TRIES = settings(max_examples=int(os.environ.get("TRIES", 150)))
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
                   min_size=1, max_size=4)                 # where, how much goes, what is put in
IMAGES = np.arange(20 * 6 * 4, dtype=np.uint16).reshape(20, 6, 4).astype(np.uint8)
LABELS = np.arange(20) % 7


def decoded(path):
    """The pixels of a PNG of ours, by the standard's own rules; and those of all its frames."""
    file, chunks = io.BytesIO(path.read_bytes()), []
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    while head := file.read(8):
        size, name = struct.unpack(">I4s", head)
        chunks.append((name, file.read(size)))
        assert struct.unpack(">I", file.read(4))[0] == zlib.crc32(b"".join(chunks[-1]))
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


def written(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def npz(**changes):
    """An .npz of the images and labels, changed."""
    return written(np.savez, **dict(images=IMAGES, labels=LABELS) | changes)


def zipped(**members):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, body in members.items():
            archive.writestr(f"{name}.npy", body)
    return file.getvalue()


# ── Images in ─────────────────────────────────────────────────────────────────────────────────────

OTHER = IMAGES[::-1].copy()
SETS = {
    "MNIST": {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS)},
    "EMNIST": {"emnist-train-images-idx3-ubyte.gz": gzip.compress(idx(IMAGES)),
               "emnist-train-labels-idx1-ubyte.gz": gzip.compress(idx(LABELS))},
    "unpacked by a browser": {"t10k-images.idx3-ubyte.gz": idx(IMAGES),
                              "t10k-labels.idx1-ubyte": idx(LABELS)},
    "npy": {"images.npy": written(np.save, IMAGES), "labels.npy": written(np.save, LABELS)},
    "ours": {"a.NPZ": npz()}, "masks beside": {"a.npz": npz(masks=OTHER)},
    "an index before": {"a.npz": written(np.savez, index=OTHER, images=IMAGES, labels=LABELS)},
    "Keras": {"a.npz": written(np.savez, x_test=OTHER, y_test=LABELS[::-1], x_train=IMAGES,
                               y_train=LABELS)},
    "MedMNIST": {"a.npz": written(np.savez, train_images=IMAGES, train_labels=LABELS[:, None],
                                  val_images=OTHER[:4], val_labels=LABELS[:4, None])},
    "without names": {"a.npz": written(np.savez, IMAGES, LABELS)},
    "two names": {"a.npz": npz(arr_0=OTHER, train_images=OTHER, x_train=OTHER, y_train=-LABELS)},
    "gaps": {"a.npz": npz(labels=1500 * LABELS - 2)}}


@pytest.mark.parametrize("name", SETS)
def test_images_are_found_with_their_labels(name, tmp_path, capsys):
    """IDX, .npy: labels lie beside the images, read only if wanted.  .npz: the first pair of names
    counts.  Labels (N, 1) are labels; those with gaps are numbered anew, which is told.
    """
    for file, body in SETS[name].items():
        (tmp_path / file).write_bytes(body)
    path, *beside = map(tmp_path.joinpath, SETS[name])
    images, labels = files.load(path)
    assert np.array_equal(images[..., 0], IMAGES)
    assert labels.tolist() == LABELS.tolist() and labels.dtype == np.int64
    told = "labels -2 .. 8998 become 0 .. 6, in their order\n" if name == "gaps" else ""
    assert capsys.readouterr().out == told and files.load(path, with_labels=False)[1] is None
    for labels in beside:
        labels.write_bytes(b"damaged")
        assert files.load(path, with_labels=False)[1] is None
        with pytest.raises(OSError, match=f"cannot be read as labels.*{labels.name}"):
            files.load(path)
        labels.unlink()
        assert files.load(path)[1] is None


LARGE, SHAPES = np.zeros((99, 99, 99), np.uint8), [
    (32, 32, 3), (20, 8), (0, 6, 4), (9, 8, 8, 2), (9, 8, 8, 4), (9, 8, 8, 7), (2, 2, 2, 2, 1)]
REFUSED = {
    "a.npz": [
        *((npz(images=np.zeros(shape, np.uint8)), f"DATA.md makes them; it holds uint8 {shape}")
          for shape in SHAPES),
        *((npz(images=IMAGES.astype(kind)), f"it holds {kind} (20, 6, 4)")
          for kind in ("uint16", "bool", "float64", "int8")),
        (npz(labels=np.eye(7)[LABELS]), "(--no-labels leaves them out), not float64 (20, 7)"),
        (npz(labels=LABELS == 1), "not bool"), (npz(labels=["x"] * 20), "<U1"),
        (npz(labels=LABELS[:3]), "20 images must be 20 whole numbers"),
        (npz(images=np.array([Path("x")], dtype=object)), "Object arrays"),
        (written(np.savez, a=IMAGES, b=LABELS), "save the images as `images` and their labels as "
         "`labels`; it holds a, b"), (zipped(), "it holds nothing"),
        (zipped(images=b"none"), "it holds |S4 ()"),
        (zipped(images=written(np.save, IMAGES), labels=b"none"), "not |S4 ()"),
        (written(np.savez_compressed, images=LARGE), "too large: save images.npy and, beside it"),
        (b"PK\x03\x04", "File is not a zip")],
    "idx": [
        (idx(IMAGES)[:99], "cannot reshape array of size 83 into shape (20,6,4)"),
        (idx(IMAGES) + b"x", "cannot reshape array of size 481"), (idx(LARGE)[:16], "too large"),
        (gzip.compress(idx(IMAGES))[:40], "ended before"), (b"\0\0\x08", "a part of it is missing"),
        (gzip.compress(idx(LARGE))[:40], "too large"),
        (b"\x89PNG", "no IDX, .npz or .npy file; DATA.md has recipes for others")],
    "a.npy": [(b"no images", "the magic")]}


@pytest.mark.parametrize("name, body, says", [
    (name, *row) for name, rows in REFUSED.items() for row in rows])
def test_what_could_be_meant_otherwise_is_refused(name, body, says, tmp_path, monkeypatch):
    """Files: never other images, or labels; of what says that it is too large no more is read."""
    monkeypatch.setattr(files, "LARGEST", 20_000)
    (tmp_path / name).write_bytes(body)
    with pytest.raises(OSError) as caught:
        files.load(tmp_path / name)
    assert says in str(caught.value) and caught.value.filename == str(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder: name a file; DATA.md makes one"):
        files.load(tmp_path)


@pytest.mark.filterwarnings("error")
def test_an_npy_may_be_larger_than_memory(tmp_path):
    """.npy: of a terabyte only what is used is read; a header of Python 2, with its 1L, is fine."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000L, 1000, 1000), }"
    with open(tmp_path / "large.npy", "wb") as file:
        file.write(b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(0x75) + b"\n")
        try:
            file.truncate(file.tell() + 10 ** 12)
        except OSError:
            pytest.skip("this file system has no files of a terabyte")
    images, labels = files.load(tmp_path / "large.npy")
    training, held_out = files.split(len(images))
    assert images.shape == (10 ** 6, 1000, 1000, 1) and labels is None
    assert not images[training[[0, -1]]].any() and len(held_out) == 10 ** 5
    assert not images.flags.writeable


def test_a_tenth_is_held_out_by_a_fixed_permutation():
    """Data: always the same tenth, which the network that ships must not have seen."""
    for count in (1, 9, 43, 10_000):
        training, held_out = files.split(count)
        assert sorted([*training, *held_out]) == list(range(count))
        assert len(held_out) == count // 10 and sorted(training) == list(training)
    assert files.split(43)[1].tolist() == [40, 2, 21, 22]
    assert zlib.crc32(np.sort(held_out)) == 124494552
    labels = np.arange(10_000) // 1000
    assert np.bincount(labels[held_out]).min() > 70 and len(set(labels[held_out[:50]])) == 10


def test_the_embedded_digits():
    """assets/digits.npz: 10,000 with labels, under 2 MB; of one's own a tenth is held out."""
    (images, labels), rows = files.load(), files.split(10000)[1]
    assert images.shape == (10000, 28, 28, 1) and np.bincount(labels).min() > 800
    assert files.DIGITS.stat().st_size < 2_000_000
    for known, count in ((files.fingerprint(images, None), 1000), ("none", 2000)):
        config = Config(num_classes=10, fingerprint=known)
        found, theirs = files.held_out_images(files.DIGITS, config, 2, 2000)
        assert np.array_equal(found[:1000], images[rows]) and len(found) == count
        assert np.array_equal(theirs[:1000], labels[rows])
    assert files.held_out_images(files.DIGITS, Config(num_classes=0), 2, 7)[1] is None


def test_the_images_of_the_training_are_known():
    """Data: by one changed among the first thousand, and by their number; whatever their labels,
    which a run that goes on tells apart.
    """
    images, labels = np.zeros((1200, 2, 2, 1), np.uint8), np.arange(1200)
    others = [images[1:], *(images + (np.arange(1200) == k).reshape(1200, 1, 1, 1).astype(np.uint8)
                            for k in (0, 10, 999))]
    known = {files.fingerprint(images, theirs) for theirs in (labels, labels[::-1], None)}
    assert len(known) == 3
    for config in (Config(fingerprint=each) for each in known):
        assert files.trained_on(config, images)
        assert not any(files.trained_on(config, other) for other in others)


@pytest.mark.parametrize("name, good", [
    (".npz", npz()), (".npy", written(np.save, IMAGES)), ("-images-idx3-ubyte", idx(IMAGES)),
    ("-images-idx3-ubyte.gz", gzip.compress(idx(IMAGES)))])
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
    """0..255 ↔ [-1, 1]: exact both ways; rounded and cut off; colours stay in their channels."""
    levels = np.arange(256, dtype=np.uint8)
    pixels = files.to_pixels(levels)
    np.testing.assert_allclose(pixels, 2 * np.arange(256) / 255 - 1, atol=1e-15)
    assert np.array_equal(pictures.to_bytes(pixels), levels)
    found = pictures.to_bytes(np.array([-7, -0.999, 0.01, 0.99, 7]))
    assert found.tolist() == [0, 0, 129, 254, 255]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    x0 = files.to_batch(torch.from_numpy(images))
    np.testing.assert_allclose(np.moveaxis(x0.numpy(), 1, 3), images / 127.5 - 1, atol=1e-6)
    assert np.array_equal(pictures.to_pictures(x0), images)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_holds_its_pixels(shape, tmp_path):
    """PNG: read back by the standard's rules, one frame and several; sheets are rows of images."""
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    for count in (1, 3):
        pictures.write_png(tmp_path / "a.png", *frames[:count])
        shown, every = decoded(tmp_path / "a.png")
        assert np.array_equal(shown.reshape(shape), frames[count - 1])
        assert np.array_equal(np.reshape(every, (-1, *shape)), frames[:count * (count > 1)])
    page = pictures.image_grid(frames, columns=2, zoom=3, gap=1)
    assert page.shape[:2] == (2 * 16 + 1, 2 * 22 + 1)
    assert np.array_equal(page[17:32:3, 1:22:3].reshape(shape), frames[2])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Files: a failure leaves what was there, and names the file; links are not followed; all of it
    is on the disk before it appears.
    """
    path, link, beside = tmp_path / "a.txt", tmp_path / "link.txt", f".{os.getpid()}.part"
    path.write_bytes(b"old")
    link.symlink_to(path)
    (tmp_path / f".link.txt{beside}").symlink_to(path)                   # in a stranger's folder
    with pytest.raises(OSError) as caught, pictures.atomic_write(path) as file:
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append(os.fstat(file).st_size))
    for new in (link, tmp_path / "new/folder/b.txt"):
        with pictures.atomic_write(new) as file:
            file.write(b"new")
        assert (path.read_bytes(), new.read_bytes(), new.is_symlink()) == (b"old", b"new", False)
    assert {*tmp_path.iterdir()} == {path, link, tmp_path / "new"} and on_disk == [3, 3]
    for other in (tmp_path, os.devnull):
        with pytest.raises(ValueError, match=f"{other} is no file: name another"):
            with pictures.atomic_write(other):
                pass
    read_only = OSError(30, "Read-only file system", str(path.with_name(f".a.txt{beside}")))
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=read_only))
    with pytest.raises(OSError) as caught, pictures.atomic_write(path):
        pass
    assert caught.value.filename == str(path)
