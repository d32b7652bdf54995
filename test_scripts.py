"""The scripts, as a user runs them: train, stop, resume, sample, and everything that can go wrong.

`KILLS=100 pytest -k killed test_scripts.py` kills a run a hundred times instead of twice.
"""
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import ddpm
import posterior
import sample
import train
from unet import UNet

ROOT = Path(__file__).resolve().parent
TINY = ["--batch", "16", "--T", "20", "--beta-T", "0.5", "--device", "cpu"]


def run(*command, cwd, code=0, env=None, **options):
    """Run a script to its end in a process of its own; the exit status must be `code`."""
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
                          cwd=cwd, text=True, capture_output=True, timeout=120,
                          env=os.environ | (env or {}), **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a script's main() in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def main(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            module.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return (status, *capsys.readouterr())
    yield main
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """200 images of 8x8 in two classes: a bright left or a bright right half, with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    images = rng.integers(0, 60, (200, 8, 8))
    images[labels == 0, :, :4] += 180
    images[labels == 1, :, 4:] += 180
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez_compressed(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A finished run of 100 steps on the tiny images, and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    done = run("train.py", "--data", tiny, "--steps", 100, "--out", out, *TINY, cwd=out)
    return out, done


def decoded(path):
    """The pixels of a PNG of this project, by the standard's own rules, and its frame count."""
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
    rows = np.frombuffer(zlib.decompress(dict(chunks)[b"IDAT"]), np.uint8).reshape(
        height, 1 + width * channels)
    assert depth == 8 and not rows[:, 0].any() and chunks[-1] == (b"IEND", b"")
    numbers = [struct.unpack_from(">I", c)[0] for n, c in chunks if n in (b"fcTL", b"fdAT")]
    assert numbers == list(range(len(numbers)))
    frames = sum(name == b"fcTL" for name, _ in chunks)
    if frames:
        assert struct.unpack(">II", dict(chunks)[b"acTL"])[0] == frames
    return rows[:, 1:].reshape(height, width, channels), frames


def same(a, b):
    """Equal to the last bit, through dictionaries, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ── The commands ──────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("script, picture, says", [
    ("ddpm.py", "out/letter.png", "1000    1.260  -0.997     10.765"),
    ("posterior.py", "out/posterior.png", "0.388707"),
    ("data.py", "out/data.png", "10000 images of 28x28x1")])
def test_the_demonstrations(script, picture, says, tmp_path):
    """V, its two notebooks: each script alone draws its picture and prints its figures in 5 s."""
    start = time.monotonic()
    done = run(script, cwd=tmp_path)
    assert time.monotonic() - start < 5
    assert says in done.stdout and not done.stderr
    pixels, _ = decoded(tmp_path / picture)
    assert pixels.std() > 30


def test_training_says_what_it_does_and_the_loss_falls(trained):
    """Algorithm 1: what to expect, one line now and then, a chart, the next command;
    checkpoint, log, pictures.
    """
    out, done = trained
    for text in ("device    cpu", "180 of 8x8x1 to train on, 20 held out, 2 labels", "L_T = ",
                 "1 knows nothing", "step 100 of 100 · loss", "images/s", "loss └",
                 "python sample.py --weights"):
        assert text in done.stdout
    assert not done.stderr and "\r" not in done.stdout
    rows = (out / "log.csv").read_text().split()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert (rows[0] == "step,loss"
            and [row.split(",")[0] for row in rows[1:]] == ["50", "100"])
    assert losses[1] < losses[0] < 1.2 and losses[1] < 0.5
    for name in ("samples.png", "step-000050.png"):
        assert decoded(out / name)[0].shape == (10 * 18 + 2, 10 * 18 + 2, 1)


def test_sampling_draws_what_was_learned(trained, call):
    """Algorithm 2: the sheet's images have a bright half, and labels choose which."""
    status, text, errors = call(
        sample, "--weights", trained[0] / "checkpoint.pt", "--sampler", "dpm", "--steps", 10,
        "--label", "all", "--guidance", 3, "-n", 40, "--out", "new/folder/s.npz")
    assert status == 0 and "images/s" in text and not errors
    found = np.load("new/folder/s.npz")
    images, labels = found["images"].astype(int), found["labels"]
    assert (images.shape == (40, 8, 8) and found["images"].dtype == np.uint8
            and labels.tolist() == [0] * 20 + [1] * 20)
    brighter_left = images[:, :, :4].mean((1, 2)) > images[:, :, 4:].mean((1, 2))
    assert (brighter_left == (labels == 0)).mean() > 0.8


@pytest.mark.parametrize("options", [
    ["--sampler", "ddpm", "--steps", 12, "--variance", "beta_tilde"],
    ["--sampler", "ddim", "--steps", 4, "--eta", 0.5],
    ["--sampler", "dpm", "--steps", 4, "--guidance", 2, "--label", 1]])
def test_the_same_pictures_whatever_the_batch(options, trained, call):
    """Determinism: same seed, same images; -n 12 is -n 12 --batch 5; another seed is not."""
    weights = ["--weights", trained[0] / "checkpoint.pt", "-n", 12, *options, "--device", "cpu"]
    for name, extra in (("a", []), ("b", []), ("c", ["--batch", 5]), ("d", ["--seed", 1])):
        assert call(sample, *weights, "--out", f"{name}.npz", *extra)[0] == 0
    a, b, c, d = (np.load(f"{name}.npz") for name in "abcd")
    assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["labels"], b["labels"])
    assert np.array_equal(a["images"], c["images"]) and np.array_equal(a["labels"], c["labels"])
    assert not np.array_equal(a["images"], d["images"])


def test_pictures_of_all_kinds(trained, tiny, call):
    """A sheet, an animation x_T to x_0, a row per class, completions whose known half is exact."""
    weights = ["--weights", trained[0] / "checkpoint.pt", "--sampler", "ddim", "--steps", 3,
               "--device", "cpu"]
    assert call(sample, *weights, "-n", 5)[0] == 0
    assert decoded(Path("out/samples.png"))[0].shape == (2 * 18 + 2, 3 * 18 + 2, 1)
    assert call(sample, *weights, "-n", 4, "--animate", "--out", "walk.png")[0] == 0
    assert decoded(Path("walk.png"))[1] == 4
    assert call(sample, *weights, "-n", 6, "--label", "all", "--out", "rows.png")[0] == 0
    assert decoded(Path("rows.png"))[0].shape == (2 * 18 + 2, 3 * 18 + 2, 1)
    assert call(sample, *weights, "-n", 2, "--keep", "top", "--data", tiny, "--resample", 2,
                "--out", "k.png")[0] == 0
    assert decoded(Path("k.png"))[0].shape == (2 * 18 + 2, 6 * 18 + 2, 1)
    assert call(sample, *weights, "-n", 2, "--keep", "top", "--data", tiny,
                "--out", "k.npz")[0] == 0
    original, completed = (data.load(tiny)[0][180:182, :, :, 0],
                           np.load("k.npz")["images"].reshape(2, 4, 8, 8))
    assert np.array_equal(completed[:, :, :4], np.broadcast_to(original[:, None, :4], (2, 4, 4, 8)))
    assert not np.array_equal(completed[0, 0], completed[0, 1])


def test_the_bound_is_printed(trained, tiny, call):
    """Ho (5): --evaluate prints the three terms, for both variances, and leaves the run alone."""
    before = (trained[0] / "checkpoint.pt").read_bytes()
    status, text, errors = call(train, "--evaluate", "--out", trained[0], "--data", tiny,
                                "--device", "cpu")
    assert status == 0 and not errors and text.count("the bound: t = 20 of 20") == 1
    for line in text.splitlines():
        if line.startswith("beta"):
            values = [float(word) for word in line.replace("±", " ").split()[1:]]
            assert (values[6] == pytest.approx(values[0] + values[2] + values[4], abs=1e-3)
                    and 0 < values[6] < 200)
            x0 = data.to_pixels(data.split(data.load(tiny)[0])[1].astype(float))
            exact = posterior.bits_per_dim(posterior.L_T(x0, ddpm.linear(20, 1e-4, 0.5)))
            assert values[0] == pytest.approx(exact, abs=1e-5)
    assert "beta_tilde" in text and (trained[0] / "checkpoint.pt").read_bytes() == before


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────

def idx(array):
    return (struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            + array.astype(np.uint8).tobytes())


def test_images_come_in_as_their_authors_publish_them(tmp_path):
    """IDX, plain and gzipped, alone, in pairs and in a folder; .npz and .npy, grey and colour."""
    rng = np.random.default_rng(0)
    images, labels = (rng.integers(0, 256, (20, 6, 4)).astype(np.uint8),
                      rng.permutation(20).astype(np.uint8) % 10)
    colour = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir(), packed.mkdir()
    (plain / "train-images-idx3-ubyte").write_bytes(idx(images))
    (plain / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (plain / "t10k-images-idx3-ubyte").write_bytes(idx(images[:5]))
    (packed / "emnist-digits-train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (packed / "emnist-digits-train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    for path in (plain, packed, plain / "train-images-idx3-ubyte",
                 packed / "emnist-digits-train-images-idx3-ubyte.gz"):
        found, classes = data.load(path)
        assert (np.array_equal(found[..., 0], images) and np.array_equal(classes, labels)
                and classes.dtype == np.int64)
    assert data.load(plain / "t10k-images-idx3-ubyte")[1] is None
    np.savez(tmp_path / "c.npz", x=colour, y=labels.astype(np.int32))
    np.savez_compressed(tmp_path / "f.npz", x=np.asfortranarray(colour))
    np.save(tmp_path / "c.npy", colour)
    for name in ("c.npz", "f.npz", "c.npy"):
        found, classes = data.load(tmp_path / name)
        assert (np.array_equal(found, colour)
                and (name != "c.npz" or np.array_equal(classes, labels)))
    (packed / "emnist-digits-train-labels-idx1-ubyte.gz").unlink()       # one packed, one not
    (packed / "emnist-digits-train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert np.array_equal(data.load(packed)[1], labels)
    np.savez(tmp_path / "gaps.npz", x=colour, y=labels * 2 + 1)           # 1, 3, … become 0, 1, …
    assert np.array_equal(data.load(tmp_path / "gaps.npz")[1], labels)
    assert isinstance(data.load(tmp_path / "c.npy")[0], np.memmap)
    assert isinstance(data.load(plain)[0].base, np.memmap)


def test_the_embedded_digits():
    """assets/digits.npz: 10,000 digits with labels, under 2 MB; the last tenth is held out."""
    images, labels = data.load()
    assert images.shape == (10000, 28, 28, 1) and np.bincount(labels).min() > 800
    assert data.DIGITS.stat().st_size < 2_000_000
    kept, held_out = data.split(images)
    assert len(kept) == 9000 and np.array_equal(held_out, images[9000:])


@given(st.integers(0, 255))
def test_bytes_are_pixels_and_back(level):
    """0..255 ↔ [-1, 1]: exact both ways, for arrays and tensors; what lies outside is cut off."""
    array = np.full((2, 2), level, np.uint8)
    pixels = data.to_pixels(array)
    assert (pixels.min() >= -1 and pixels.max() <= 1
            and pixels[0, 0] == pytest.approx(2 * level / 255 - 1))
    assert np.array_equal(data.to_bytes(pixels), array)
    assert np.allclose(data.to_pixels(torch.from_numpy(array)).numpy(), pixels, atol=1e-7)
    assert data.to_bytes(np.array([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_holds_its_pixels(shape, tmp_path):
    """PNG: read back by the standard's rules, grey and colour, one frame and several;
    sheets are rows of images.
    """
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    data.write_png(tmp_path / "a.png", frames[0])
    data.write_png(tmp_path / "b.png", *frames)
    for name, count in (("a.png", 0), ("b.png", 3)):
        pixels, found = decoded(tmp_path / name)
        assert np.array_equal(pixels.reshape(shape), frames[0]) and found == count
    page = data.sheet(frames, columns=2, zoom=3, gap=1)
    assert page.shape[:2] == (2 * 16 + 1, 2 * 22 + 1)
    assert np.array_equal(page[17:32:3, 1:22:3].reshape(shape), frames[2])


# ── Stop and go on ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_exactly(number, code, tiny, trained, call, tmp_path):
    """Resume: stopped somewhere and resumed, 100 steps end in the same weights, average,
    optimizer and log.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--data", str(tiny),
                                "--steps", "100", "--out", "run", *TINY],
                               cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert any("step 50 of 100" in line for line in process.stdout)
    time.sleep(random.Random(code).random() / 4)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == code and "to go on: python train.py --resume --out run" in text
    stopped = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert 50 <= stopped["step"] < 100
    assert call(train, "--resume", "--out", "run", "--device", "cpu")[0] == 0
    resumed, straight = (torch.load(folder / "checkpoint.pt", weights_only=True)
                         for folder in (tmp_path / "run", trained[0]))
    for key in straight:
        assert same(resumed[key], straight[key]), key
    for name in ("log.csv", "samples.png"):
        assert (tmp_path / "run" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_killed_run_leaves_a_whole_checkpoint(tiny, tmp_path):
    """SIGKILL at any instant: the checkpoint is absent or sound, and the run goes on from it."""
    path, chance, steps = tmp_path / "run/checkpoint.pt", random.Random(0), [0]
    for attempt in range(int(os.environ.get("KILLS", 2))):
        resume = ["--resume"] if path.exists() else []
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--data", str(tiny),
                                    "--steps", "499", "--out", "run", *TINY, *resume],
                                   cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert any(line.startswith("step") for line in process.stdout)       # it does go on
        time.sleep(chance.random())
        process.kill()
        process.communicate()
        steps.append(sample.read_checkpoint(path)["step"] if path.exists() else 0)
        assert steps[-1] >= steps[-2] and steps[-1] in (*range(0, 499, 50), 499)
        if steps[-1] > 400:
            path.unlink()
            steps = [0]
    assert max(steps) >= 50


def test_what_would_change_the_run_is_refused_on_resume(trained, tiny, call, tmp_path):
    """Resume: other settings, other data, a finished run, a network without a run:
    one line, nothing changed.
    """
    before = (trained[0] / "checkpoint.pt").read_bytes()
    resume = ["--resume", "--out", trained[0], "--device", "cpu"]
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((200, 8, 8), np.uint8), labels=np.arange(200) % 2)
    bare, shared = tmp_path / "bare.npz", tmp_path / "shared"
    np.savez(bare, images=data.load(tiny)[0])                        # the same images, no labels
    shared.mkdir()
    (shared / "checkpoint.pt").write_bytes((trained[0] / "network.pt").read_bytes())
    for extra, says in ((["--steps", 300, "--lr", 0.5, "--T", 10], "--lr was 0."),
                        (["--steps", 300, "--data", other], "other images"),
                        ([], "is complete at step 100"),
                        (["--steps", 300, "--data", bare], "other images"),
                        (["--out", tmp_path], "start without --resume"),
                        (["--out", shared], "no training run")):
        status, _, errors = call(train, *resume, *extra)
        assert status == 2 and says in errors and errors.count("\n") == 1
    assert (trained[0] / "checkpoint.pt").read_bytes() == before
    status, _, errors = call(train, "--out", trained[0], "--data", tiny)
    assert (status == 2 and "--resume" in errors
            and (trained[0] / "checkpoint.pt").read_bytes() == before)
    status, _, errors = call(train, "--evaluate", "--out", trained[0], "--data", bare)
    assert status == 2 and "trained with labels 0 .. 1" in errors


def test_any_schedule_resumes(tiny, call, tmp_path):
    """Resume: a cosine run goes on too, and further than it was first told."""
    cosine = ["--data", tiny, "--schedule", "cosine", "--T", 5, "--batch", 4, "--device", "cpu"]
    assert call(train, *cosine, "--steps", 2, "--out", tmp_path / "c")[0] == 0
    status, text, errors = call(train, "--resume", "--steps", 4, "--out", tmp_path / "c")
    assert status == 0 and "step 4 of 4" in text and not errors


def test_a_second_signal_ends_at_once(call, monkeypatch):
    """SIGINT: the first asks for an orderly stop, the second does not wait for it."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    asked = train.stop_signals()
    signal.raise_signal(signal.SIGINT)
    assert asked == [signal.SIGINT] and not ended
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_a_signal_in_the_last_step_changes_nothing(tiny, call, monkeypatch, tmp_path):
    """SIGINT: a run that has no step left is complete, with all that belongs to it."""
    monkeypatch.setattr(train, "stop_signals", lambda: [signal.SIGINT])
    status, text, errors = call(train, "--data", tiny, "--steps", 1, "--out", "run", *TINY)
    assert status == 0 and "drawn: run/samples.png" in text and not errors
    assert Path("run/network.pt").exists()


def test_the_data_script_writes_only_what_it_names(call):
    """data.py: --out images.npy would put a picture in the place of the images."""
    status, _, errors = call(data, "--out", "images.npy")
    assert status == 2 and "must end in .png or .npz" in errors and not Path("images.npy").exists()
    assert call(data, "-n", 3, "--out", "few.npz")[0] == 0
    assert np.load("few.npz")["images"].shape == (3, 28, 28, 1)


def test_two_runs_in_one_folder_are_refused(tiny, call, tmp_path):
    """The second run in a folder ends at once, in words."""
    held = train.lock(tmp_path)
    status, _, errors = call(train, "--out", tmp_path, "--data", tiny, "--steps", 5, *TINY)
    assert status == 2 and "another run is writing" in errors and errors.count("\n") == 1
    held.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_full_disk_keeps_the_last_good_checkpoint(trained, call, tmp_path):
    """Disk full while saving: the path is named, the run ends, the last checkpoint stays whole."""
    import resource
    before = (trained[0] / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status, _, errors = call(train, "--resume", "--steps", 150, "--out", ".", "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status == 2 and "checkpoint.pt could not be written" in errors
            and "step 100" in errors and errors.count("\n") == 1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(Path().glob(".*.part"))


def test_a_loss_that_is_no_number_stops_the_run(trained, call, tmp_path):
    """NaN: the step and the last good checkpoint are named, and that one is not overwritten."""
    checkpoint = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    checkpoint["net"]["conv_in.weight"][:] = float("inf")
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    status, _, errors = call(train, "--resume", "--steps", 300, "--out", tmp_path,
                             "--device", "cpu")
    assert (status == 2 and "the loss is nan at step 150" in errors
            and "last good checkpoint, of step 100" in errors)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_two_processes_are_one(tiny, call, tmp_path):
    """Many devices: two processes with half the batch each end in the weights of one with all."""
    common = ["--data", tiny, "--steps", 20, *TINY, "--T", 20, "--float32", "--out"]
    assert call(train, *common, "one")[0] == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           str(ROOT / "train.py"), *map(str, common), "two"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("device    cpu, float32, 2 processes") == 1
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                for name in ("one", "two"))
    for name in one["net"]:
        assert torch.allclose(one["net"][name], two["net"][name], rtol=1e-3, atol=2e-4), name
    assert one["log"][0][1] == pytest.approx(two["log"][0][1], rel=1e-4)


def test_published_networks_are_read(tmp_path):
    """Published weights: diffusers' names, old and new, give the same network; t counts from 0."""
    torch.manual_seed(0)
    net = UNet(8, 3, 8, (1, 2), 1, (4,), 0.0, 0, 4).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = {"conv_in": "conv_in", "time_embedding.linear_1": "time.0",
            "time_embedding.linear_2": "time.2", "down_blocks.0.resnets.0": "down.0",
            "down_blocks.0.downsamplers.0.conv": "down.1.conv", "down_blocks.1.resnets.0": "down.2",
            "down_blocks.1.attentions.0": "down.2.attention", "mid_block.resnets.0": "middle.0",
            "mid_block.attentions.0": "middle.0.attention", "mid_block.resnets.1": "middle.1",
            "up_blocks.0.resnets.0": "up.0", "up_blocks.0.attentions.0": "up.0.attention",
            "up_blocks.0.resnets.1": "up.1", "up_blocks.0.attentions.1": "up.1.attention",
            "up_blocks.0.upsamplers.0.conv": "up.2.conv", "up_blocks.1.resnets.0": "up.3",
            "up_blocks.1.resnets.1": "up.4", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
    blocks = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "time", "norm2": "norm2",
              "conv2": "conv2", "conv_shortcut": "shortcut"}
    tensors, (old, new) = net.state_dict(), (
        dict(q="query", k="key", v="value", out="proj_attn"),
        dict(q="to_q", k="to_k", v="to_v", out="to_out.0"))
    config = dict(sample_size=8, in_channels=3, block_out_channels=[8, 16], layers_per_block=1,
                  norm_num_groups=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    for attention in (old, new):
        theirs = {}
        for stem, our_stem in ours.items():
            for kind in ("weight", "bias"):
                if "resnets" in stem:
                    for part, our_part in blocks.items():
                        if f"{our_stem}.{our_part}.{kind}" in tensors:
                            tensor = tensors[f"{our_stem}.{our_part}.{kind}"]
                            theirs[f"{stem}.{part}.{kind}"] = tensor
                elif "attentions" in stem:
                    qkv = tensors[f"{our_stem}.qkv.{kind}"].chunk(3)
                    theirs |= {f"{stem}.{attention[k]}.{kind}": part for k, part in zip("qkv", qkv)}
                    theirs[f"{stem}.{attention['out']}.{kind}"] = tensors[f"{our_stem}.proj.{kind}"]
                    theirs[f"{stem}.group_norm.{kind}"] = tensors[f"{our_stem}.norm.{kind}"]
                else:
                    theirs[f"{stem}.{kind}"] = tensors[f"{our_stem}.{kind}"]
        torch.save(theirs, tmp_path / "diffusion_pytorch_model.bin")
        for path in (tmp_path, tmp_path / "diffusion_pytorch_model.bin"):
            loaded, settings_ = sample.load_network(path, torch.device("cpu"))
            assert same(dict(loaded.state_dict()), dict(tensors)) and settings_["first_t"] == 0
    extra = {"extra.weight": torch.ones(1)}
    for wrong, says in ((theirs | extra, "1 tensors do not fit; extra.weight"),
                        ({k: v for k, v in theirs.items() if "to_k.bias" not in k}, "qkv.bias"),
                        ({k: v for k, v in theirs.items() if k != "conv_in.bias"}, "is missing")):
        torch.save(wrong, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(ValueError, match=says):
            sample.load_network(tmp_path, torch.device("cpu"))


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("argv, says", [
    (["--T", 0], "T must be 1"), (["--T", "x"], "invalid int"),
    (["--beta-1", 0], "beta must lie inside"), (["--beta-T", 1], "beta must lie inside"),
    (["--beta-T", "nan"], "beta must lie inside"), (["--steps", 0], "--steps must be at least 1"),
    (["--batch", -1], "--batch must be at least 1"), (["--lr", 0], "--lr must be above 0"),
    (["--lr", "nan"], "--lr must"), (["--seed", -1], "--seed"), (["--seed", 2**63], "--seed"),
    (["--device", "nonsense"], "no device 'nonsense'"), (["--device", "cuda:99"], "no device"),
    (["--schedule", "cosine", "--beta-1", 0.1], "belong to --schedule linear"),
    (["--nonsense"], "unrecognized arguments"), (["--out", "file/out"], "file"),
    (["--data", "missing"], "missing: No such file"), (["--data", "empty.npz"], "empty.npz"),
    (["--data", "text.npy"], "text.npy"), (["--data", "floats.npz"], "holds no uint8 images"),
    (["--data", "odd.npz"], "cannot halve"), (["--data", "none.npz"], "holds no images"),
    (["--data", "short.npz"], "short.npz"), (["--data", "deep.npz"], "1 or 3 channels"),
    (["--data", "idx"], "promises"), (["--data", "idx.gz"], "damaged"),
    (["--data", "folder"], "holds no images"),
    (["--data", "labels.npz"], "200 images but 3 labels"),
    (["--data", "negative.npz"], "labels must be"), (["--data", "object.npz"], "object.npz"),
    (["--data", "bomb.npz"], "would unpack to"), (["--data", "liar.npz"], "promised"),
    (["--resume"], "start without --resume"), (["--evaluate"], "is not there")])
def test_train_refuses_bad_input_in_one_line(argv, says, call, tiny):
    """Errors: one line on stderr that names the thing, status 2, no traceback, nothing written."""
    images = np.zeros((200, 8, 8), np.uint8)
    Path("file").write_text("no folder"), Path("folder").mkdir()
    Path("empty.npz").write_bytes(b""), Path("text.npy").write_text("these are no images")
    (np.savez("floats.npz", images / 2), np.savez("odd.npz", np.zeros((9, 7, 8), np.uint8)),
     np.savez("none.npz", images[:0]))
    (np.savez("deep.npz", np.zeros((9, 8, 8, 7), np.uint8)),
     np.savez("labels.npz", images, np.arange(3)))
    (np.savez("negative.npz", images, -np.ones(200, int)),
     np.savez("object.npz", np.array([Path("x")], dtype=object)))
    Path("short.npz").write_bytes(tiny.read_bytes()[:900])
    (Path("idx").write_bytes(idx(images)[:999]),
     Path("idx.gz").write_bytes(gzip.compress(idx(images)[:999])))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, dict(descr="|u1", fortran_order=False, shape=(10**9, 1000, 1000)))
    with zipfile.ZipFile("liar.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    Path("bomb.npz").write_bytes(Path("liar.npz").read_bytes().replace(
        struct.pack("<I", len(header.getvalue())) * 2,
        struct.pack("<I", len(header.getvalue())) + b"\xfe\xff\xff\xff"))
    if says == "would unpack to":
        data.LARGEST, largest = 1 << 30, data.LARGEST
    status, text, errors = call(train, *argv)
    if says == "would unpack to":
        data.LARGEST = largest
    assert (status == 2 and errors.count("\n") == 1 and errors.startswith("train.py: ")
            and says in errors)
    assert not Path("out/checkpoint.pt").exists()


@pytest.mark.parametrize("argv, says", [
    (["-n", 0], "-n must be at least 1"), (["--batch", 0], "--batch"),
    (["--steps", 0], "--steps must be 1 .. 20"), (["--steps", 21], "--steps must be 1 .. 20"),
    (["--device", "tpu"], "no device 'tpu'"), (["--seed", -1], "--seed"),
    (["--label", 2], "--label must be 0 .. 1 or all"), (["--label", "seven"], "--label"),
    (["--label", "all", "-n", 3], "multiple of 2"), (["--guidance", "inf"], "--guidance"),
    (["--eta", 0.5], "--eta belongs to"), (["--sampler", "ddim", "--eta", 2], "--eta belongs to"),
    (["--sampler", "dpm", "--variance", "beta"], "--variance belongs to"),
    (["--out", "x.jpg"], "must end in .png or .npz"), (["--out", "file/x.png"], "file"),
    (["--animate", "--out", "x.npz"], "--animate"), (["--resample", 0], "--resample"),
    (["--keep", "left"], "held-out images of (28, 28, 1)"),
    (["--keep", "left", "--guidance", 2], "needs a --label"),
    (["--weights", "missing.pt"], "missing.pt: No such file"),
    (["--weights", "text.pt"], "is not a checkpoint"),
    (["--weights", "short.pt"], "is not a checkpoint"), (["--weights", "flipped.pt"], "damaged"),
    (["--weights", "code.pt"], "is not a checkpoint"),
    (["--weights", "list.pt"], "is not a checkpoint"),
    (["--weights", "less.pt"], "1 tensors do not fit; conv_in.bias is missing"),
    (["--weights", "more.pt"], "the network has none of that name"),
    (["--weights", "shape.pt"], "tensors do not fit"),
    (["--weights", "nan.pt"], "pixels that are no numbers"),
    (["--weights", "huge.pt"], "a network that can be built"),
    (["--weights", "endless.pt"], "a network that can be built")])
def test_sample_refuses_bad_input_in_one_line(argv, says, call, trained):
    """Errors: one line, status 2, no code run, nothing half-written; no checkpoint is believed."""
    body = (trained[0] / "checkpoint.pt").read_bytes()
    (Path("file").write_text("no folder"), Path("text.pt").write_text("no checkpoint"),
     Path("short.pt").write_bytes(body[:-500]))
    flipped = bytearray(body)
    flipped[len(body) // 2] ^= 1
    Path("flipped.pt").write_bytes(flipped)

    class Code:
        def __reduce__(self):
            return os.mkdir, ("code was run",)
    torch.save(dict(config={}, step=1, ema=Code()), "code.pt"), torch.save([1, 2, 3], "list.pt")
    good = torch.load(trained[0] / "checkpoint.pt", weights_only=True)

    def write(name, ema={}, without=None, **unet):
        tensors = {key: value for key, value in (good["ema"] | ema).items() if key != without}
        torch.save(dict(config=good["config"] | dict(unet=good["config"]["unet"] | unet), step=1,
                        ema=tensors), name)
    write("less.pt", without="conv_in.bias"), write("more.pt", ema={"more": torch.ones(1)})
    write("shape.pt", ema={"conv_in.bias": torch.ones(5)})
    write("nan.pt", ema={"conv_out.bias": good["ema"]["conv_out.bias"] * math.nan})
    write("huge.pt", width=2**40), write("endless.pt", blocks=10**9)
    weights = [] if "--weights" in argv else ["--weights", trained[0] / "checkpoint.pt"]
    status, text, errors = call(sample, *weights, *argv)
    assert (status == 2 and errors.count("\n") == 1 and errors.startswith("sample.py: ")
            and says in errors)
    assert (not Path("code was run").exists() and not Path("out/samples.png").exists()
            and not list(Path().glob("x.*")))


TRIES = settings(max_examples=int(os.environ.get("TRIES", 150)))


@st.composite
def mutated(draw, body):
    """A good file with some bytes changed, removed or put in."""
    body = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(body)))
        body[position:position + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(body)


def good_files():
    images, labels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4), np.array([0, 1, 1])
    packed, plain, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    (np.savez_compressed(packed, images=images, labels=labels), np.savez(plain, images=images),
     np.save(npy, images))
    return {".npz": packed.getvalue(), "2.npz": plain.getvalue(), ".npy": npy.getvalue(),
            "-images-idx3-ubyte": idx(images), "-images-idx3-ubyte.gz": gzip.compress(idx(images))}


@TRIES
@given(st.data())
def test_any_bytes_are_images_or_refused(tmp_path_factory, data_):
    """Readers: random bytes, and good files with bytes changed, give images, ValueError or OSError,
    and no more.
    """
    name, good = data_.draw(st.sampled_from(sorted(good_files().items())))
    path = tmp_path_factory.getbasetemp() / f"fuzz{name}"
    path.write_bytes(data_.draw(mutated(good) | st.binary(max_size=200)))
    try:
        images, labels = data.load(path)
        assert (images.dtype == np.uint8 and images.ndim == 4
                and (labels is None or len(labels) == len(images)))
    except (ValueError, OSError):
        pass


def tiny_checkpoint():
    unet = dict(size=4, channels=1, width=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0,
                labels=2, groups=4, patch=1)
    config = dict(unet=unet, shape=[1, 4, 4], float32=True,
                  schedule=dict(kind="linear", T=3, beta_1=0.1, beta_T=0.2))
    return dict(config=config, step=1, ema=UNet(**unet).state_dict())


anything = st.one_of(st.none(), st.integers(-9, 9), st.sampled_from([10**9, 2**62]), st.floats(),
                     st.text(max_size=3), st.lists(st.integers(-1, 5), max_size=3),
                     st.just({}), st.builds(torch.zeros, st.integers(0, 3)))


@TRIES
@given(st.data())
def test_any_bytes_are_a_checkpoint_or_refused(tmp_path_factory, data_):
    """Readers: the same for checkpoints, their bytes changed, or their values changed or removed:
    only ValueError or OSError comes out, no code is run, and what is accepted draws an image.
    """
    checkpoint, buffer = tiny_checkpoint(), io.BytesIO()
    place = data_.draw(st.sampled_from([
        checkpoint, checkpoint["config"], checkpoint["config"]["unet"], checkpoint["ema"],
        checkpoint["config"]["schedule"]]))
    if data_.draw(st.booleans()):
        name = data_.draw(st.sampled_from(sorted(place)))
        del place[name]
        if data_.draw(st.booleans()):
            place[name] = data_.draw(anything)
    torch.save(checkpoint, buffer)
    path, good = tmp_path_factory.getbasetemp() / "fuzz.pt", buffer.getvalue()
    path.write_bytes(data_.draw(st.just(good) | mutated(good) | st.binary(max_size=200)
                                | st.builds(pickle.dumps, st.text())))
    try:
        net, config = sample.load_network(path, torch.device("cpu"))
    except (ValueError, OSError):
        return
    label = torch.zeros(1, dtype=torch.long) if net.labels else None
    assert len(list(sample.generate(net, config, range(1), steps=1, label=label))) == 2


# ── The README ────────────────────────────────────────────────────────────────────────────────────

README = (ROOT / "README.md").read_text()
QUICK_START = re.search(r"```sh\n(.*?)```", README, re.S)[1].splitlines()


def test_the_readme_names_only_what_exists():
    """README: every link leads to the line of its function; every test, file and flag is there."""
    links = re.findall(r"\[`(\w+\.py): (\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 30
    for shown, name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert shown == file and re.match(rf"(def|class) {name}\b", line), (file, name)
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert name in ("test_math", "test_scripts") or f"def {name}(" in code, name
    files = re.findall(r"`((?:assets/)?[\w-]+\.(?:py|npz|pt|txt))`|\]\((assets/[\w./-]+)\)", README)
    for name in map("".join, files):
        assert (ROOT / name).exists() or name in ("checkpoint.pt", "network.pt"), name
    flags = set(re.findall(r'"(--?[\w-]+)"', code)) | {"--hypothesis-profile", "--nproc_per_node"}
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", README):
        assert flag in flags, flag


def test_the_readme_s_commands_are_understood(monkeypatch):
    """README: every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python ((?:train|sample)\.py[^`\n]*)", README)
    assert len(commands) > 10
    for command in commands:
        script, *argv = shlex.split(command)
        {"train.py": train, "sample.py": sample}[script].arguments().parse_args(argv)


@pytest.mark.parametrize("line", QUICK_START)
def test_the_quick_start_runs(line, tmp_path):
    """README: each line of the quick start, made short where it takes long."""
    if line == "pip install -r requirements.txt":
        names = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
        assert names == ["numpy", "torch", "pytest", "hypothesis"]
    elif line == "pytest":
        done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", str(ROOT)],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "test_posterior_is_bayes_rule" in done.stdout
    else:
        program, script, *argv = shlex.split(line)
        short = ["-n", 4] if script == "sample.py" else ["--batch", 2, "--T", 2, "--beta-T", 0.9]
        assert program == "python"
        run(script, *argv, "--steps", 2, *short, cwd=tmp_path)
        assert decoded(tmp_path / "out/samples.png")[0].std() > 10
