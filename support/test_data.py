"""Images in and pictures out: the formats that people have, and what is refused."""
import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from support import data as files
from support import pictures
from support.config import Config

TRIES = settings(max_examples=int(os.environ.get("TRIES", 150)))
IMAGES = np.arange(20 * 6 * 4, dtype=np.uint16).reshape(20, 6, 4).astype(np.uint8)
LABELS = np.arange(20) % 7


def decoded(path, every=False):
    """The pixels of a PNG of this project, by the standard's own rules, and its frame count.

    every: the pixels of all frames of an animation, in a list, instead of the default image's.
    """
    body, chunks, position = path.read_bytes(), [], 8
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    while position < len(body):
        size, name = struct.unpack_from(">I4s", body, position)
        content = body[position + 8:position + 8 + size]
        assert struct.unpack_from(">I", body, position + 8 + size)[0] == zlib.crc32(name + content)
        chunks.append((name, content))
        position += 12 + size
    width, height, depth, colour = struct.unpack_from(">IIBB", dict(chunks)[b"IHDR"])
    channels = {0: 1, 2: 3}[colour]
    images = []
    for data in [dict(chunks)[b"IDAT"], *(c[4:] for n, c in chunks if n == b"fdAT" and every)]:
        rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
        assert not rows[:, 0].any()
        images.append(rows[:, 1:].reshape(height, width, channels))
    assert depth == 8 and chunks[-1] == (b"IEND", b"")
    numbers = [struct.unpack_from(">I", c)[0] for n, c in chunks if n in (b"fcTL", b"fdAT")]
    assert numbers == list(range(len(numbers)))
    pauses = [np.divide(*struct.unpack_from(">HH", c, 20)) for name, c in chunks if name == b"fcTL"]
    frames = len(pauses)
    if frames:                                  # played without end, the last frame for two seconds
        assert struct.unpack(">II", dict(chunks)[b"acTL"]) == (frames, 0)
        assert pauses == [0.1] * (frames - 1) + [2]
    return images[1:] if every else images[0], frames


def idx(array):
    return (struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            + array.astype(np.uint8).tobytes())


# ── Images in ─────────────────────────────────────────────────────────────────────────────────────

def test_idx_files_come_in_as_their_authors_publish_them(tmp_path):
    """IDX: plain and gzipped, the labels beside them, or none."""
    for name, pack in (("train-images-idx3-ubyte", bytes),
                       ("emnist-digits-train-images-idx3-ubyte.gz", gzip.compress)):
        path, beside = tmp_path / name, tmp_path / name.replace("images-idx3", "labels-idx1")
        path.write_bytes(pack(idx(IMAGES)))
        assert files.load(path)[1] is None
        beside.write_bytes(pack(idx(LABELS)))
        images, labels = files.load(path)
        assert np.array_equal(images[..., 0], IMAGES) and np.array_equal(labels, LABELS)
        assert labels.dtype == np.int64 and files.load(path, with_labels=False)[1] is None


def arrays(**changes):
    return dict(images=IMAGES, labels=LABELS) | changes


OTHER, MASKS = IMAGES[::-1].copy(), np.zeros((20, 6, 4), np.uint8)
SETS = {
    "ours": arrays(), "Keras": dict(x_test=OTHER[:5], x_train=IMAGES, y_train=LABELS,
                                    y_test=LABELS[:5]),
    "Keras, tests first": dict(x_test=OTHER, y_test=LABELS[::-1], x_train=IMAGES, y_train=LABELS),
    "MedMNIST": dict(train_images=IMAGES, train_labels=LABELS[:, None], val_images=OTHER[:4],
                     val_labels=LABELS[:4, None], test_images=OTHER, test_labels=LABELS[:, None]),
    "masks beside": arrays(masks=MASKS), "an index before": dict(index=LABELS[::-1], **arrays()),
    "gaps": arrays(labels=1500 * LABELS + 2)}


@pytest.mark.parametrize("name", SETS)
def test_arrays_are_taken_by_name(name, tmp_path):
    """.npz: images and labels, x_train and y_train, train_images and train_labels.  Labels (N, 1)
    are labels; those with gaps are numbered anew.
    """
    np.savez(tmp_path / "a.npz", **SETS[name])
    images, labels = files.load(tmp_path / "a.npz")
    assert np.array_equal(images[..., 0], IMAGES) and labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("found, says", [
    (arrays(images=IMAGES / 255, masks=MASKS), "must hold uint8 images"),
    (dict(a=IMAGES, b=LABELS), "it holds a, b: save the images as `images`"), ({}, "holds nothing"),
    (arrays(labels=np.eye(7)[LABELS]), "whole numbers, not float64 (20, 7); or leave them out"),
    (arrays(labels=LABELS == 1), "not bool"), (arrays(labels=LABELS.astype(str)), "not <U"),
    (arrays(labels=LABELS[:3]), "20 images must be 20 whole numbers"),
    (arrays(labels=-LABELS), "0 .. 9999, not -6 .. 0"), (arrays(images=IMAGES[:0]), "uint8 images"),
    (arrays(images=np.zeros((9, 8, 8, 7), np.uint8)), "must hold uint8 images"),
    (arrays(images=np.zeros((32, 32, 3), np.uint8)), "one image of (32, 32, 3)"),
    (arrays(images=np.array([Path("x")], dtype=object)), "damaged: Object arrays")])
def test_what_could_be_meant_otherwise_is_refused(found, says, tmp_path):
    """.npz: never silently other images, or other labels, or none."""
    np.savez(tmp_path / "a.npz", **found)
    with pytest.raises(ValueError, match="a.npz") as caught:
        files.load(tmp_path / "a.npz")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, body, says", [
    ("text.npy", b"no images", "not an .npy or .npz of images, or it is damaged: the magic"),
    ("short.npz", b"PK\x03\x04", "is not an .npy or .npz of images, or it is damaged: File is"),
    ("idx", idx(IMAGES)[:99], "damaged: cannot reshape array of size 83 into shape (20,6,4)"),
    ("long", idx(IMAGES) + b"x", "damaged: cannot reshape"),
    ("idx.gz", gzip.compress(idx(IMAGES))[:40], "is not an IDX, .npz or .npy file"),
    ("cat.png", b"\x89PNG", "READING.md has recipes")])
def test_what_is_no_data_set_is_named(name, body, says, tmp_path):
    """Files: cut short, too long, or of another format: one line that says what to do."""
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ValueError) as caught:
        files.load(tmp_path / name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """.npz: what unpacks to more than LARGEST is not read; nor is a folder."""
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((99, 99, 99), np.uint8))
    monkeypatch.setattr(files, "LARGEST", 400)
    for path, says in ((tmp_path, "is a folder: name the file of images in it; READING"),
                       (tmp_path / "a.npz", "too large: save the images as .npy")):
        with pytest.raises(ValueError, match=says):
            files.load(path)


def test_an_npy_may_be_larger_than_memory(tmp_path):
    """.npy: of a file of a terabyte (with holes) only what is used is read, and nothing written."""
    header = (b"\x93NUMPY\x01\x00\x76\x00"
              + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }"
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
    """Data: sorted labels are all in both parts; every image is in one part, the same each time."""
    for count in (1, 9, 43, 10_000):
        training, held_out = files.split(count)
        assert sorted([*training, *held_out]) == list(range(count))
        assert len(held_out) == count // 10 and np.array_equal(files.split(count)[1], held_out)
    labels = np.arange(10_000) // 1000
    assert np.bincount(labels[held_out]).min() > 70 and np.bincount(labels[training]).min() > 870


def test_the_embedded_digits():
    """assets/digits.npz: 10,000 digits with labels, under 2 MB."""
    images, labels = files.load()
    assert images.shape == (10000, 28, 28, 1) and np.bincount(labels).min() > 800
    assert files.DIGITS.stat().st_size < 2_000_000
    held_out, their_labels = files.held_out_images(files.DIGITS, Config(num_classes=10), 2, 7)
    rows = files.split(10000)[1][:7]
    assert np.array_equal(held_out, images[rows]) and np.array_equal(their_labels, labels[rows])


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
    (".npz", None), ("-images-idx3-ubyte", idx(IMAGES)),
    ("-images-idx3-ubyte.gz", gzip.compress(idx(IMAGES))), (".npy", None)])
@TRIES
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
                        min_size=1, max_size=4))
def test_any_bytes_are_images_or_refused(name, good, tmp_path_factory, changes):
    """Readers: good files with bytes changed, removed or put in give images, ValueError or OSError,
    and no more.
    """
    path = tmp_path_factory.getbasetemp() / f"fuzz{name}"
    if good is None:
        np.savez(path, images=IMAGES, labels=LABELS) if name == ".npz" else np.save(path, IMAGES)
        good = path.read_bytes()
    body = bytearray(good)
    for place, removed, put in changes:
        k = int(place * len(body))
        body[k:k + removed] = put
    path.write_bytes(body)
    try:
        images, labels = files.load(path)
        assert images.dtype == np.uint8 and images.ndim == 4
        assert labels is None or len(labels) == len(images)
    except (ValueError, OSError) as error:
        assert str(path) in f"{error} {getattr(error, 'filename', '')}" and "\n" not in str(error)


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
    for name, shown, count in (("a.png", frames[0], 0), ("b.png", frames[2], 3)):
        pixels, found = decoded(tmp_path / name)
        assert np.array_equal(pixels.reshape(shape), shown) and found == count
    every = decoded(tmp_path / "b.png", every=True)[0]
    assert np.array_equal(np.reshape(every, frames.shape), frames)
    page = pictures.image_grid(frames, columns=2, zoom=3, gap=1)
    assert page.shape[:2] == (2 * 16 + 1, 2 * 22 + 1)
    assert np.array_equal(page[17:32:3, 1:22:3].reshape(shape), frames[2])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Files: a failure keeps what was there, leaves nothing beside it, names the file; a link is
    replaced, and what it led to stays; what is no file is refused.
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
    gone = tmp_path / "gone" / "a"
    with pytest.raises(OSError) as caught, pictures.atomic_write(gone):
        gone.with_name(f".a{beside}").unlink()                               # by someone else
    assert caught.value.filename == str(gone)
    with pictures.atomic_write(tmp_path / "new/folder/b.txt") as file:
        file.write(b"b")
    assert (tmp_path / "new/folder/b.txt").read_bytes() == b"b"
