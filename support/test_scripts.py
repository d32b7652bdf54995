"""The scripts, as a user runs them: train, stop, resume, sample, and everything that can go wrong.

`KILLS=100 TRIES=5000 pytest support` kills a run a hundred times instead of once, and tries 5,000
damaged files of each kind instead of 150.
"""
import ast
import contextlib
import gzip
import inspect
import io
import json
import math
import os
import pickle
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import ddpm
import evaluate
import posterior
import sample
import support.run
import train
from support import config, console, devices
from support import images as files
from support.checkpoint import PUBLISHED, load_network, read
from support.config import PRESETS, Config, Sampling, Session
from support.drawing import even_frames
from unet import UNet

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--batch", "16", "--T", "20", "--beta-T", "0.5", "--model-channels", "16",
        "--dropout", "0.1", "--device", "cpu"]
CPU = torch.device("cpu")


def run(script, *arguments, cwd, code=0):
    """Run a script to its end in a process of its own; the exit status must be `code`."""
    start = ["-m", script] if not script.endswith(".py") else [str(ROOT / script)]
    done = subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def in_process(module, *argv):
    """Run a script's main() in this process: (exit status, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), \
            contextlib.redirect_stdout(io.StringIO()) as text, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        warnings.simplefilter("error")                      # a user would see it as another line
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            module.main()
            status = 0
        except SystemExit as end:
            status = end.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    return status, text.getvalue(), errors.getvalue()


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The same, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return in_process


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
    status, *printed = in_process(train, "--data", tiny, "--steps", 100, "--out", out, *TINY)
    assert status == 0
    return out, *printed


@pytest.fixture
def short(monkeypatch):
    """Training looks at its loss, saves and draws every second step, four images in one step of
    the sampler: enough to differ when the weights do.
    """
    monkeypatch.setattr(train, "LOOK", 2)
    monkeypatch.setattr(train, "generate", lambda net, config, sampling, indices, label:
                        sample.generate(net, config, replace(sampling, steps=1), range(4),
                                        None if label is None else label[:4]))


@pytest.fixture
def saved(trained, tmp_path):
    """A copy of that run's checkpoint, alone in a folder."""
    (tmp_path / "checkpoint.pt").write_bytes((trained[0] / "checkpoint.pt").read_bytes())
    return tmp_path / "checkpoint.pt"


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
    frames = sum(name == b"fcTL" for name, _ in chunks)
    if frames:
        assert struct.unpack(">II", dict(chunks)[b"acTL"])[0] == frames == len(numbers) / 2
    return images[1:] if every else images[0], frames


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
    ("ddpm.py", "out/letter.png", "1000    0.965  -0.977     10.607     -0.010   0.002      0.999"),
    ("posterior.py", "out/posterior.png", "0.388707"),
    ("support.images", "out/data.png", "10000 images of 28x28x1")])
def test_the_demonstrations(script, picture, says, tmp_path):
    """V, its two notebooks: each script alone draws its picture and prints its figures in 5 s."""
    before = os.times().children_user
    done = run(script, cwd=tmp_path)
    assert os.times().children_user - before < 5        # of one processor: others may use it too
    assert says in done.stdout and not done.stderr
    pixels, _ = decoded(tmp_path / picture)
    assert pixels.std() > 30
    if script == "posterior.py":       # t above, 0 at last; the perfect network copies, ours not
        assert np.array_equal(pixels[2:20:2, -58:-2:2, 0], files.caption(0, 28))
        perfect, ours = (np.array(line.split()[1:], float) for line in done.stdout.splitlines()
                         if line.startswith(("perfect", "ours")))
        assert len(perfect) == 10 and not perfect.any() and ours.min() > 0.1
        page = decoded(tmp_path / "out/perfect.png")[0]
        drawn, copied, new = (page[2 + 58 * row:58 * row + 58] for row in range(3))
        assert np.array_equal(drawn, copied) and not np.array_equal(drawn, new)


def test_training_says_what_it_does_and_the_loss_falls(trained, tiny):
    """Algorithm 1: what to expect, one line now and then, a chart, the next command;
    checkpoint, log, pictures; the loss by quarter of t beside the least possible.
    """
    out, printed, errors = trained
    for text in ("device    cpu", "180 of 8x8x1 to train on, 20 held out, 2 labels", "L_T = ",
                 "1 knows nothing", "step 100 of 100 · loss", "images/s", "loss └",
                 "python sample.py --weights"):
        assert text in printed
    assert not errors and "\r" not in printed
    rows = (out / "log.csv").read_text().split()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert rows[0] == "step,loss,loss_t1,loss_t2,loss_t3,loss_t4"
    quarters = np.array([row.split(",")[2:] for row in rows[1:]], float)
    np.testing.assert_allclose(quarters.mean(1), losses, rtol=1e-5)    # four of 16 t are in each
    settings_ = Config(**torch.load(out / "checkpoint.pt")["config"])
    images, labels = (files.split(array)[0] for array in files.load(tiny))
    least = evaluate.least_loss(images, labels, settings_)
    assert f"{least.mean():.4f} is the least possible" in printed
    told = ", ".join(f"{loss:.4f} ({floor:.4f})" for loss, floor in zip(quarters[-1], least))
    assert f"loss by quarter of t (least): {told}\n" in printed
    assert quarters[-1, 0] > 2 * quarters[-1, 3] and np.all(quarters[-1] > least)
    assert [row.split(",")[0] for row in rows[1:]] == [str(10 * k) for k in range(1, 11)]
    assert losses[-1] < losses[0] < 1.2 and losses[-1] < 0.5
    for k in (20, 40, 60, 80, 100):
        assert decoded(out / f"step-{k:06}.png")[0].shape == (10 * 18 + 2, 10 * 18 + 2, 1)


def test_sampling_draws_what_was_learned(trained, call):
    """Algorithm 2: the sheet's images have a bright half, and labels choose which."""
    status, text, errors = call(
        sample, "--weights", trained[0] / "checkpoint.pt", "--sampler", "dpm", "--steps", 10,
        "--label", "all", "--guidance", 3, "-n", 40, "--out", "new/folder/s.npz")
    assert status == 0 and "images/s" in text and not errors
    found = np.load("new/folder/s.npz")
    images, labels = found["images"].astype(int), found["labels"]
    assert (images.shape == (40, 8, 8) and found["images"].dtype == np.uint8
            and labels.tolist() == [0, 1] * 20)
    brighter_left = images[:, :, :4].mean((1, 2)) > images[:, :, 4:].mean((1, 2))
    assert (brighter_left == (labels == 0)).mean() > 0.8


@pytest.mark.parametrize("options", [
    ["--sampler", "ddpm", "--steps", 12, "--variance", "beta_tilde"],
    ["--sampler", "ddim", "--steps", 4, "--eta", 0.5],
    ["--sampler", "dpm", "--steps", 4, "--guidance", 2, "--label", 1]])
def test_the_same_pictures_whatever_the_batch(options, trained, call, monkeypatch):
    """Determinism: same seed, same images; -n 12 is -n 12 --batch 5 to within the rounding of sums
    in another order; another seed is not.
    """
    monkeypatch.setattr(devices, "precision", lambda device, float32: "float32")
    weights = ["--weights", trained[0] / "checkpoint.pt", "-n", 12, *options, "--device", "cpu"]
    for name, extra in (("a", []), ("b", []), ("c", ["--batch", 5]), ("d", ["--seed", 1])):
        assert call(sample, *weights, "--out", f"{name}.npz", *extra)[0] == 0
    a, b, c, d = (np.load(f"{name}.npz") for name in "abcd")
    assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["labels"], b["labels"])
    assert np.array_equal(a["labels"], c["labels"])
    assert np.abs(a["images"].astype(int) - c["images"]).max() <= 1
    assert np.abs(a["images"].astype(int) - d["images"]).max() > 20
    if "--label" not in options:                                # each equally often, shuffled
        assert np.bincount(a["labels"]).tolist() == [6, 6] and a["labels"].tolist() != [0, 1] * 6


@pytest.mark.parametrize("extra, size, frames", [
    (["-n", 5], (2 * 18, 3), 0), (["-n", 4, "--animate"], (2 * 52, 2), 4),
    (["-n", 6, "--label", "all"], (3 * 18, 2), 0),
    (["-n", 2, "--keep", "top", "--resample", 2], (2 * 18, 6), 0),
    (["-n", 2, "--keep", "top", "--animate"], (2 * 36, 6), 4),
    (["-n", 3, "--keep", "coarse"], (3 * 18, 6), 0)])
def test_pictures_of_all_kinds(extra, size, frames, trained, call):
    """A sheet, a column per class, rows of original, kept, completions; animations from x_T to x_0
    have t above, and x̂_0 below.
    """
    assert call(sample, "--weights", trained[0] / "checkpoint.pt", "--sampler", "ddim",
                "--steps", 3, "--device", "cpu", *extra)[0] == 0
    pixels, found = decoded(Path("out/samples.png"))
    assert pixels.shape == (size[0] + 2, size[1] * 18 + 2, 1) and found == frames


def test_completions_keep_what_they_say(trained, tiny, call):
    """--keep top: the known half of each held-out image, exact, in four different completions; the
    picture shows the original and what is kept of it beside them.
    """
    keep = ["--weights", trained[0] / "checkpoint.pt", "--sampler", "dpm", "--steps", 3, "-n", 2,
            "--keep", "top", "--device", "cpu", "--out"]
    assert call(sample, *keep, "k.npz")[0] == call(sample, *keep, "k.png")[0] == 0
    original = files.load(tiny)[0][180:182, :, :, 0]
    completed = np.load("k.npz")["images"].reshape(2, 4, 8, 8)
    assert np.array_equal(completed[:, :, :4], np.broadcast_to(original[:, None, :4], (2, 4, 4, 8)))
    assert not np.array_equal(completed[0, 0], completed[0, 1])
    page = decoded(Path("k.png"))[0][..., 0]
    shown = [page[2 + 18 * row:18 * row + 18:2, 2 + 18 * k:18 * k + 18:2]
             for row in range(2) for k in range(6)]
    assert np.array_equal(shown[0], original[0]) and np.array_equal(shown[11], completed[1, 3])
    assert np.array_equal(shown[7][:4], original[1, :4]) and np.all(shown[7][4:] == 128)


def test_the_frames_of_an_animation_run_from_noise_to_the_image(trained, call):
    """--animate: x_T and nothing predicted yet; then each x_t with its t, above the x̂_0 that led
    there; at last the image twice.  A viewer without animation shows that last frame.
    """
    both = ["--weights", trained[0] / "checkpoint.pt", "--sampler", "ddim", "--steps", 3, "-n", 5,
            "--device", "cpu", "--batch", 2, "--out"]
    assert call(sample, *both, "walk.png", "--animate")[0] == 0
    assert call(sample, *both, "x0.npz")[0] == 0
    frames = decoded(Path("walk.png"), every=True)[0]
    cells = [np.array([frame[2 + 52 * (i // 3):][:50:2, 2 + 18 * (i % 3):][:, :16:2, 0]
                       for i in range(5)]) for frame in frames]
    for cell, t in zip(cells, ddpm.times(20, 3)[::-1]):
        assert np.array_equal(cell[0, :9], files.caption(t, 8))
    x_t, predicted = [[cell[:, rows] for cell in cells] for rows in (slice(9, 17), slice(17, 25))]
    assert np.all(predicted[0] == 128) and x_t[0].std() > 80
    assert np.array_equal(x_t[-1], np.load("x0.npz")["images"])
    assert np.array_equal(predicted[-1], x_t[-1]) and not np.array_equal(predicted[1], x_t[1])
    assert np.array_equal(decoded(Path("walk.png"))[0], frames[-1])


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 20), (1, 1), (100_000, 1000)])
def test_frames_are_even_in_log_snr(T, steps):
    """--animate: from x_T to x_0 in order, at most 41 frames, none far from its even place."""
    schedule, tau = ddpm.linear(T), ddpm.times(T, steps)[::-1]
    snr = ddpm.snr(tau[:-1], schedule)
    shown = even_frames(snr)
    assert shown[-1] == steps and len(shown) <= 41 and np.all(np.diff(shown) > 0)
    log_snr = np.log(np.maximum(snr, 1e-5))
    even = (log_snr[-1] - log_snr[0]) / 39
    gaps, needed = np.diff(log_snr[shown[:-1]]), np.diff(log_snr).max(initial=0)
    assert np.all(gaps <= even + needed + 1e-9) and (steps < 1000 or len(shown) > 20)


def test_the_bound_is_printed(trained, tiny, call):
    """Ho (5): evaluate.py prints the three terms, for both variances, and leaves the run alone;
    `train.py --evaluate` is the same.
    """
    before = (trained[0] / "checkpoint.pt").read_bytes()
    status, text, errors = call(evaluate, "--weights", trained[0] / "checkpoint.pt", "--device",
                                "cpu")
    assert status == 0 and not errors and text.count("the bound: t = 20 of 20") == 1
    for line in text.splitlines():
        if line.startswith("beta"):
            values = [float(word) for word in line.replace("±", " ").split()[1:]]
            assert (values[6] == pytest.approx(values[0] + values[2] + values[4], abs=1e-3)
                    and 0 < values[6] < 200)
            x0 = files.to_pixels(files.split(files.load(tiny)[0])[1].astype(float))
            exact = posterior.bits_per_dim(posterior.L_T(x0, ddpm.linear(20, 1e-4, 0.5)))
            assert values[0] == pytest.approx(exact, abs=1e-5)
    *_, held_out, drawn = (line.split() for line in text.splitlines())
    training, unseen = files.split(files.load(tiny)[0])
    distance = evaluate.nearest(unseen, training)[0]
    assert held_out[:3] == ["20", "held-out", "images"] and drawn[:3] == ["20", "drawn", "images"]
    assert held_out[3:] == [f"{distance.min():.4f}", f"{np.median(distance):.4f}"]
    assert 0 < float(drawn[3]) < float(drawn[4]) < 1
    assert "beta_tilde" in text and (trained[0] / "checkpoint.pt").read_bytes() == before
    shared = ["--weights", trained[0] / "network.pt", "--device", "cpu"]
    status, _, errors = call(evaluate, *shared)
    assert status == 2 and "name images that it has not seen" in errors
    again = call(train, "--evaluate", "--out", trained[0], "--data", tiny, "--device", "cpu")
    assert again[0] == 0 and again[1].splitlines()[-4:] == text.splitlines()[-4:]


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2
                    or torch.accelerator.is_available(), reason="one process runs all tests here")
def test_the_tests_that_several_processes_run_are_told_by_one(tmp_path):
    """Tests: each runs once, whoever runs it; what fails is told, and so is a process that dies; -x
    stops all.
    """
    path = tmp_path / "test_many.py"
    path.write_text("""
import os, time
import pytest
FIRST = os.getpid()
@pytest.mark.parametrize("i", range(100))
def test(i):
    time.sleep(0.005)
    print("other" if os.getpid() != FIRST else "first")
    assert i % 50
    assert os.getpid() == FIRST or "DIE" not in os.environ or os._exit(0)
""")
    running = [subprocess.Popen(
        [sys.executable, "-m", "pytest", "-rA", "-p", "support.parallel", path, *options],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), **more})
        for options, more in (([], {}), ([], {"DIE": "1"}), (["-x"], {}))]
    (whole, _), (died, _), (first, _) = (process.communicate(timeout=60) for process in running)
    assert [process.returncode for process in running] == [1, 2, 1]
    assert "2 failed, 98 passed" in whole and "first\n" in whole and "other\n" in whole
    assert sorted(re.findall(r"^(?:PASSED|FAILED) .*\[(\d+)\]", whole, re.M), key=int) == [
        str(i) for i in range(100)]
    assert "a process that ran a part of the tests died" in died
    assert "1 failed" in first and "stopping after 1 failures" in first


# ── Whatever its output and its surroundings ──────────────────────────────────────────────────────

def nobody():
    """A stream that cannot say ε, into a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="ascii")


@pytest.mark.parametrize("script, argv, written", [
    ("ddpm.py", [], "out/letter.png"), ("unet.py", [], "."),
    ("support/images.py", ["-n", 3], "out/data.png"),
    ("sample.py", ["--weights", "W", "-n", 1, "--steps", 1, "--device", "cpu"], "out/samples.png"),
    ("evaluate.py", ["--weights", "W", "--device", "cpu"], "."),
    ("train.py", ["--data", "D", "--steps", 1, "--T", 3, "--beta-T", 0.9], "out/checkpoint.pt")])
def test_no_script_dies_of_its_output(script, argv, written, trained, tiny, call, monkeypatch):
    """Output: in an encoding that lacks its letters, and to nobody, each script does its work."""
    argv = [{"W": trained[0] / "checkpoint.pt", "D": tiny}.get(word, word) for word in argv]
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    with nobody() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            assert not end.code
    assert Path(written).exists()


def test_output_is_replaced_or_lost(call, monkeypatch):
    """Output: what an encoding lacks is a "?"; without stdout and stderr the status still tells."""
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with console.one_line_errors():
            print("ε × é")
    assert stream.buffer.getvalue() == "? × é\n".encode("latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None), patch.setattr(sys, "stderr", None)
        with pytest.raises(SystemExit) as end, console.one_line_errors():
            print("nowhere")
            raise ValueError("told to nobody")
    assert end.value.code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="its shell has other words")
def test_a_reader_that_leaves_and_closed_streams(tmp_path):
    """Output: `| head -1`, and no stdin, stdout or stderr at all, in processes of their own; then
    a file does not get their numbers, to which a library may write.
    """
    closed = ("import sys, support.images as images, support.console as console\n"
              "sys.argv = ['images.py', '-n', '3']\nwith console.one_line_errors():\n"
              "    images.main()\n    raise SystemExit(open('file', 'w').fileno() <= 2)")
    for command, lines in (
            ([ROOT / "support/images.py", "-n 3 2>&1 | head -1; echo ${PIPESTATUS[0]}"], 2),
            (["-c", shlex.quote(closed), ">&- 2>&- <&-; echo $?"], 1)):
        done = subprocess.run(["bash", "-c", " ".join(map(str, [sys.executable, *command]))],
                              cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env=os.environ | dict(PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT)))
        assert done.stdout.splitlines()[-1] == "0" and not done.stderr
        assert done.stdout.count("\n") == lines
        decoded(tmp_path / "out/data.png")
        (tmp_path / "out/data.png").unlink()


@pytest.mark.parametrize("error, says", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate "
                  "memory: you tried to allocate 68719476736 bytes. Error code 12"),
     "not enough memory for 68719476736 bytes more"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\na"),
     "not enough memory for 20.00 GiB more"),
    (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
     "not enough memory for 7.45 GiB more"), (MemoryError(), "not enough memory: a smaller")])
def test_too_little_memory_is_one_line(error, says, call, monkeypatch):
    """Memory: whatever it is that asks for too much, one line, and no trace."""
    def load_network(*_):
        raise error
    monkeypatch.setattr(sample, "load_network", load_network)
    status, _, errors = call(sample)
    assert status == 2 and says in errors and errors.count("\n") == 1 and "--batch" in errors


def test_a_bug_keeps_its_trace(call, monkeypatch):
    """Errors: what the user cannot mend is not hidden, a RuntimeError of another kind included."""
    for error in (RuntimeError("unsupported memory format"), RecursionError("too deep"),
                  NotImplementedError("Storage"), TypeError("no"), KeyError("x")):
        with pytest.raises(type(error)), console.one_line_errors():
            raise error


@pytest.mark.parametrize("columns", [20, 79, 200])
def test_progress_never_wraps(columns, monkeypatch):
    """Progress: in a terminal one line, refreshed, and cut to its width."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = console.Progress(3, images=64)
    progress(0, "step 0 of 3 · images 1 to 100 of 100,000")
    progress(3, "step 3 of 3 · images 1 to 100 of 100,000")
    shown = re.split("[\r\n]", stream.getvalue())
    assert [len(line) for line in shown] == [0, columns - 1, columns - 1, 0]
    assert "images/s" not in shown[1] and ("images/s" in shown[2] or columns < 200)


def test_a_wait_of_ages_is_no_overflow(capsys, monkeypatch):
    """Progress: steps that would take longer than there are dates."""
    monkeypatch.setattr(console.time, "monotonic", iter([0.0, 1e6]).__next__)
    console.Progress(10**9)(1e-6, "step 0")
    assert "? left" in capsys.readouterr().out


def test_a_folder_that_goes_is_made_again(tiny, call, short, monkeypatch):
    """Files: the folder removed during a run is made anew; where that fails, the file is named."""
    def remove(run, name, draw=train.draw_samples):
        shutil.rmtree("run")
        draw(run, name)
    monkeypatch.setattr(train, "draw_samples", remove)
    assert call(train, "--data", tiny, "--steps", 4, "--out", "run", *TINY)[0] == 0
    assert read(Path("run/checkpoint.pt"), "a checkpoint")["step"] == 4
    for cause in (lambda: shutil.rmtree("there"), lambda: Path("there/.a.npz.part").unlink()):
        with pytest.raises(OSError) as caught, files.atomic_write("there/a.npz"):
            cause()
        assert caught.value.filename == str(Path("there/a.npz"))


def test_bfloat16_is_not_used_where_the_library_may_not(monkeypatch):
    """Precision: a processor with bfloat16, and oneDNN held back to what has none."""
    for capability, isa, expected in [
            ("avx512_bf16", "ALL", "bfloat16"), ("amx_bf16", "avx512_core_amx", "bfloat16"),
            ("avx512_bf16", "AVX2", "float32"), ("avx512_bf16", "AVX512_CORE", "float32"),
            ("avx512_bf16", "AVX512_CORE_BF16", "bfloat16"), ("avx2", "ALL", "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        assert devices.precision(CPU, False) == expected, (capability, isa)
        assert devices.precision(CPU, True) == "float32"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the malloc of Linux")
def test_what_is_freed_stays_for_the_next_step(monkeypatch):
    """Memory: 32 MB used over and over are new pages at most twice; elsewhere there is no harm."""
    resource = pytest.importorskip("resource")

    def pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            blocks = [np.ones(1 << 20, np.float32) for _ in range(8)]
            del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    devices.choose_device("cpu")
    assert pages() * resource.getpagesize() < 2 * (32 << 20)
    for other in (TypeError, OSError, AttributeError):
        monkeypatch.setattr(devices.ctypes, "CDLL", Mock(side_effect=other))
        devices.keep_memory()


# ── The settings ──────────────────────────────────────────────────────────────────────────────────

def options():
    """Every option that is a setting: (its class, its name, another value than the default)."""
    for settings_ in (Config, Sampling):
        for setting in (f for f in fields(settings_) if f.metadata["help"]):
            rule, default, name = setting.metadata, setting.default, setting.name
            value = dict(int=7, float=0.5, str="x")[rule["kind"].__name__] \
                if rule["kind"] is not bool else not default
            value = next((c for c in rule["choices"] or () if c != default), value)
            yield settings_, name, (value, 4) if isinstance(default, tuple) else value


@pytest.mark.parametrize("settings_, name, value", list(options()))
def test_every_option_changes_its_setting_and_nothing_else(settings_, name, value):
    """The command line: each setting by its name, of its type, and no other with it.  The help has
    its default, if it has one.
    """
    parser = console.Parser()
    config.add_options(parser, settings_)
    default, told = getattr(settings_(), name), " ".join(parser.format_help().split())
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    assert "(None)" not in told and (shown is None or f"({shown})" in told)
    parts = value if isinstance(value, tuple) else (value,)
    flag = config.flag(name)
    argv = [flag, *map(str, parts)]
    if isinstance(value, bool):
        argv = [flag if value else flag.replace("--", "--no-")]
    assert config.given(parser.parse_args(argv), settings_) == {name: value}
    assert config.given(parser.parse_args([]), settings_) == {}


@pytest.mark.parametrize("settings_", [Config, Sampling, Session])
def test_no_setting_changes_later(settings_):
    """Settings: what was checked stays as it was."""
    with pytest.raises(FrozenInstanceError):
        settings_().device = "cpu"


@pytest.mark.parametrize("settings_", [Config, Sampling])
def test_every_setting_refuses_what_it_is_not(settings_):
    """Settings: values of another type, not a number, outside the range: one line with the name."""
    for setting in fields(settings_):
        rule, several = setting.metadata, isinstance(setting.default, tuple)
        wrong = [[], {}, b"x", 1j, math.nan, math.inf, -1, 10**30, "", "y" * 5000, (), (1,) * 99,
                 (1.5,), True, False, None, "nonsense"]
        for value in wrong:
            try:
                made = replace(settings_(), **{setting.name: value})
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 200
                continue
            parts = value if several else (value,)
            assert value is None and setting.default is None or all(
                type(part) is rule["kind"] for part in parts), (setting.name, value)
            assert getattr(made, setting.name) is value and value not in (math.inf, 10**30)


def test_the_preset_of_the_paper_is_the_paper_s():
    """Ho appendix B, CIFAR10: the figures there, one by one; no labels."""
    paper = PRESETS["cifar10"]
    assert (paper.T, paper.beta_1, paper.beta_T, paper.schedule) == (1000, 1e-4, 0.02, "linear")
    assert (paper.lr, paper.batch, paper.ema_decay, paper.dropout) == (2e-4, 128, 0.9999, 0.1)
    assert paper.muon_lr == 0
    assert (paper.steps, paper.flip, paper.labels, paper.decay) == (800_000, True, False, False)
    assert (paper.attention_resolutions, paper.num_res_blocks) == ((16,), 2)
    assert (paper.warmup, paper.beta2, paper.grad_clip, paper.patch_size) == (5000, 0.999, 1.0, 1)


def test_a_preset_and_what_is_named_beside_it(tiny, call, short):
    """--preset: its settings, and over them those that are named; on resume it must be the same."""
    argv = ["--preset", "cifar10", "--data", tiny, "--steps", 2, "--model-channels", 32, "--batch",
            4, "--T", 5, "--no-flip", "--attention-resolutions", 4, 2, "--num-res-blocks", 1,
            "--channel-mult", 1, 2, "--device", "cpu"]
    assert call(train, *argv)[0] == 0
    found = Config(**torch.load("out/checkpoint.pt", weights_only=True)["config"])
    expected = replace(PRESETS["cifar10"], data=str(tiny), steps=2, model_channels=32, batch=4, T=5,
                       flip=False, attention_resolutions=(4, 2), image_shape=(1, 8, 8),
                       num_res_blocks=1, channel_mult=(1, 2),
                       fingerprint=found.fingerprint)
    assert found == expected
    assert call(train, *argv[:4], *argv[6:], "--steps", 3, "--resume")[0] == 0
    status, _, errors = call(train, "--preset", "digits", "--steps", 4, "--resume")
    assert status == 2 and "--preset was cifar10, now digits" in errors and errors.count("\n") == 1


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
        found, classes = files.load(path)
        assert (np.array_equal(found[..., 0], images) and np.array_equal(classes, labels)
                and classes.dtype == np.int64)
    assert files.load(plain / "t10k-images-idx3-ubyte")[1] is None
    np.savez(tmp_path / "c.npz", x=colour, y=labels.astype(np.int32))
    np.savez_compressed(tmp_path / "f.npz", x=np.asfortranarray(colour))
    np.save(tmp_path / "c.npy", colour)
    for name in ("c.npz", "f.npz", "c.npy"):
        found, classes = files.load(tmp_path / name)
        assert (np.array_equal(found, colour)
                and (name != "c.npz" or np.array_equal(classes, labels)))
    (packed / "emnist-digits-train-labels-idx1-ubyte.gz").unlink()       # one packed, one not
    (packed / "emnist-digits-train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert np.array_equal(files.load(packed)[1], labels)
    np.savez(tmp_path / "gaps.npz", x=colour, y=labels * 2 + 1)           # 1, 3, … become 0, 1, …
    assert np.array_equal(files.load(tmp_path / "gaps.npz")[1], labels)
    mapped = files.load(tmp_path / "c.npy")[0]
    mapped[:] = 0                                              # a copy on write: the file stays
    assert isinstance(mapped, np.memmap) and np.array_equal(np.load(tmp_path / "c.npy"), colour)


def test_what_cannot_be_images_is_not_read(tmp_path, monkeypatch):
    """.npz: an array of another type or shape is refused by its header, its pixels unread."""
    np.savez(tmp_path / "floats.npz", np.zeros((200, 50, 50)), np.zeros((9, 9), np.uint8))
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(ValueError, match=r"holds float64 \(200, 50, 50\), uint8 \(9, 9\)"):
        files.load(tmp_path / "floats.npz")


def test_the_embedded_digits():
    """assets/digits.npz: 10,000 digits with labels, under 2 MB; the last tenth is held out."""
    images, labels = files.load()
    assert images.shape == (10000, 28, 28, 1) and np.bincount(labels).min() > 800
    assert config.DIGITS.stat().st_size < 2_000_000
    kept, held_out = files.split(images)
    assert len(kept) == 9000 and np.array_equal(held_out, images[9000:])


@given(st.integers(0, 255))
def test_bytes_are_pixels_and_back(level):
    """0..255 ↔ [-1, 1]: exact both ways, for arrays and tensors; what lies outside is cut off."""
    array = np.full((2, 2), level, np.uint8)
    pixels = files.to_pixels(array)
    assert (pixels.min() >= -1 and pixels.max() <= 1
            and pixels[0, 0] == pytest.approx(2 * level / 255 - 1))
    assert np.array_equal(files.to_bytes(pixels), array)
    assert np.allclose(files.to_pixels(torch.from_numpy(array)).numpy(), pixels, atol=1e-7)
    assert files.to_bytes(np.array([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_png_holds_its_pixels(shape, tmp_path):
    """PNG: read back by the standard's rules, grey and colour, one frame and several;
    sheets are rows of images.
    """
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    files.write_png(tmp_path / "a.png", frames[0])
    files.write_png(tmp_path / "b.png", *frames)
    for name, shown, count in (("a.png", frames[0], 0), ("b.png", frames[2], 3)):
        pixels, found = decoded(tmp_path / name)
        assert np.array_equal(pixels.reshape(shape), shown) and found == count
    assert np.array_equal(np.reshape(decoded(tmp_path / "b.png", every=True)[0], frames.shape),
                          frames)
    page = files.image_grid(frames, columns=2, zoom=3, gap=1)
    assert page.shape[:2] == (2 * 16 + 1, 2 * 22 + 1)
    assert np.array_equal(page[17:32:3, 1:22:3].reshape(shape), frames[2])


def test_a_number_stands_above_each_image():
    """Captions: every digit is legible, no two are the same, and the images are as without."""
    images = np.zeros((3, 28, 28, 3), np.uint8)
    page = files.image_grid(images, columns=3, zoom=1, gap=0, captions=[0, 1000, 462])
    plain = files.image_grid(images, columns=3, zoom=1, gap=0)
    assert page.shape == (37, 84, 3) and np.array_equal(page[9:], plain)
    digits = [files.caption(digit, 6)[1:8] == 255 for digit in range(10)]
    for number, strip in zip("0 1000 462".split(), np.split(page[:9, :, 0], 3, axis=1)):
        shown, found = strip[1:8] == 255, []
        for x in range(23):
            found += [str(d) for d in range(10) if np.array_equal(shown[:, x:x + 6], digits[d])]
        assert "".join(found) == number
    assert files.caption(123456789, 10).shape == (9, 10)             # cut off, no error


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Files: a failure keeps what was there, leaves nothing beside it, and names the file; a link
    is followed; what a killed run left is replaced.
    """
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_bytes(b"old")
    link.symlink_to(path)
    (tmp_path / ".a.txt.part").write_bytes(b"of a killed run")
    with pytest.raises(OSError) as caught, files.atomic_write(path) as file:
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path) and path.read_bytes() == b"old"
    with files.atomic_write(link) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(IsADirectoryError), files.atomic_write(tmp_path):
        pass


# ── Stop and go on ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 1))))
def test_a_stopped_run_goes_on_exactly(seed, tiny, call, short, monkeypatch):
    """Resume: stopped at any step by either signal and resumed, twice, a run ends in the same
    files: weights, average, optimizer, random numbers, log and sheets.
    """
    argv = ["--data", tiny, "--steps", 12, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    chance = random.Random(seed)
    for last, number in ((chance.randrange(1, 6), signal.SIGINT),
                         (chance.randrange(6, 11), signal.SIGTERM)):
        def gradient_step(loss, net, optimizers, step, settings_, descend=train.gradient_step):
            if step == last:
                signal.raise_signal(number)
            descend(loss, net, optimizers, step, settings_)
        with monkeypatch.context() as patch:
            patch.setattr(train, "gradient_step", gradient_step)
            resume = ["--resume"] if Path("run").exists() else []
            status, text, _ = call(train, *argv, "run", *resume)
        assert (status == 128 + number
                and f"stopped and saved at step {last + last % 2}; to go on: python train.py "
                    "--resume --out run" in text)
    assert call(train, "--resume", "--out", "run", "--device", "cpu")[0] == 0
    resumed, straight = (torch.load(f"{name}/checkpoint.pt") for name in ("run", "straight"))
    for key in straight:
        assert same(resumed[key], straight[key]), key
    for path in Path("run").glob("*.[!p]*"):
        assert path.read_bytes() == Path("straight", path.name).read_bytes(), path
    assert Path("run/step-000012.png").read_bytes() == Path("straight/step-000012.png").read_bytes()


def test_a_killed_run_leaves_a_whole_checkpoint(tiny, call, tmp_path):
    """SIGKILL at any instant: the checkpoint is absent or sound, the run goes on from it, and what
    is left half-written is replaced.
    """
    path, chance, steps = tmp_path / "run/checkpoint.pt", random.Random(0), [0]
    for attempt in range(int(os.environ.get("KILLS", 1))):
        resume = ["--resume"] if path.exists() else []
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--data", str(tiny),
                                    "--steps", "199", "--out", "run", *TINY, *resume],
                                   cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                                   env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert any(line.startswith("step") for line in process.stdout)       # it does go on
        while "KILLS" not in os.environ and process.poll() is None and not path.exists():
            time.sleep(0.01)
        time.sleep(chance.random())
        process.kill()
        process.communicate()
        steps.append(read(path, "a checkpoint")["step"] if path.exists() else 0)
        assert steps[-1] >= steps[-2] and steps[-1] in (*range(0, 199, 30), 199)
        if steps[-1] > 150:
            path.unlink()
            steps.append(0)
    assert max(steps) >= 30 or "KILLS" in os.environ
    half_written = path.with_name(".checkpoint.pt.part")        # what a kill can leave
    half_written.write_bytes(b"half")
    resume, last = (["--resume"], steps[-1] + 1) if path.exists() else ([], 1)
    more = ["--data", tiny, "--steps", last, "--out", path.parent, *resume]
    assert call(train, *more, *TINY)[0] == 0
    assert not half_written.exists() and read(path, "a checkpoint")["step"] == last


@pytest.mark.parametrize("extra, says", [
    (["--steps", 300, "--lr", 0.5, "--T", 10], "--lr was 0."),
    (["--steps", 300, "--data", "other.npz"], "other images"),
    (["--steps", 300, "--data", "bare.npz"], "other images"),
    (["--steps", 300, "--preset", "cifar10"], "--preset was digits, now cifar10"),
    ([], "is complete at step 100"), (["--out", "empty"], "start without --resume"),
    (["--out", "shared"], "no training run")])
def test_what_would_change_the_run_is_refused_on_resume(extra, says, trained, tiny, call):
    """Resume: other settings, other data, a finished run, a network without a run:
    one line, nothing changed.
    """
    before = (trained[0] / "checkpoint.pt").read_bytes()
    np.savez("other.npz", images=np.zeros((200, 8, 8), np.uint8), labels=np.arange(200) % 2)
    np.savez("bare.npz", images=files.load(tiny)[0])                # the same images, no labels
    Path("shared").mkdir()
    Path("shared/checkpoint.pt").write_bytes((trained[0] / "network.pt").read_bytes())
    status, _, errors = call(train, "--resume", "--out", trained[0], "--device", "cpu", *extra)
    assert status == 2 and says in errors and errors.count("\n") == 1
    assert (trained[0] / "checkpoint.pt").read_bytes() == before


def test_a_folder_with_a_run_is_no_place_for_another(trained, tiny, call):
    """Nothing lost: a new run does not begin where a checkpoint lies."""
    before = (trained[0] / "checkpoint.pt").read_bytes()
    status, _, errors = call(train, "--out", trained[0], "--data", tiny)
    assert status == 2 and "--resume" in errors and errors.count("\n") == 1
    assert (trained[0] / "checkpoint.pt").read_bytes() == before


def test_a_run_cut_off_at_any_file_goes_on(tiny, call, short, monkeypatch):
    """Resume: cut off at any of the nine files that 4 steps write, the run is what it was at its
    last checkpoint; gone on with, it ends in the files of a run that was left alone.
    """
    argv = ["--data", tiny, "--steps", 4, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    straight = {path.name: path.read_bytes() for path in Path("straight").iterdir()}
    assert len(straight) == 5
    for cut in (1, 4, 5, 6, 8, 9):
        with monkeypatch.context() as patch:
            count = iter(range(1, 100))

            def atomic_write(path, write=files.atomic_write):
                if next(count) == cut:
                    raise KeyboardInterrupt
                return write(path)
            for module in (files, support.run):
                patch.setattr(module, "atomic_write", atomic_write)
            assert call(train, *argv, f"cut{cut}")[0] == 130
        out = Path(f"cut{cut}")
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        assert bool(resume) == (cut > 5) and call(train, *argv, out, *resume)[0] == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == straight, cut


def test_any_schedule_resumes(tiny, call, short):
    """Resume: a cosine run goes on too, and further than it was first told; with its own T."""
    cosine = ["--data", tiny, "--schedule", "cosine", "--T", 5, "--batch", 4, "--device", "cpu"]
    status, text, _ = call(train, *cosine, "--steps", 2, "--out", "c")
    x0 = files.to_pixels(files.split(files.load(tiny)[0])[0].astype(float))
    l_T = posterior.bits_per_dim(posterior.L_T(x0, ddpm.cosine(5)))
    assert status == 0 and f"cosine, T = 5: L_T = {l_T:.3g} bits/dim" in text
    status, text, errors = call(train, "--resume", "--steps", 4, "--out", "c")
    assert status == 0 and "step 4 of 4" in text and not errors


def test_a_second_signal_ends_at_once(call, monkeypatch):
    """SIGINT: the first asks for an orderly stop, the second does not wait for it."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    asked = console.stop_signals()
    signal.raise_signal(signal.SIGINT)
    assert asked == [signal.SIGINT] and not ended
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_a_signal_in_the_last_step_changes_nothing(tiny, call, monkeypatch, tmp_path):
    """SIGINT: a run that has no step left is complete, with all that belongs to it."""
    monkeypatch.setattr(train, "stop_signals", lambda: [signal.SIGINT])
    status, text, errors = call(train, "--data", tiny, "--steps", 1, "--out", "run", *TINY)
    assert status == 0 and "drawn: run/step-000001.png" in text and not errors
    assert Path("run/network.pt").exists()


def test_the_data_script_writes_only_what_it_names(call):
    """data.py: --out images.npy would put a picture in the place of the images."""
    status, _, errors = call(files, "--out", "images.npy")
    assert status == 2 and "must end in .png or .npz" in errors and not Path("images.npy").exists()
    assert call(files, "-n", 3, "--out", "few.npz")[0] == 0
    assert np.load("few.npz")["images"].shape == (3, 28, 28)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_full_disk_keeps_the_last_good_checkpoint(saved, call):
    """Disk full while saving: the path is named, the run ends, the last checkpoint stays whole."""
    import resource
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status, _, errors = call(train, "--resume", "--steps", 150, "--out", ".", "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status == 2 and "network.pt could not be written" in errors
            and "step 100" in errors and errors.count("\n") == 1)
    assert saved.read_bytes() == before and not list(Path().glob(".*.part"))


def test_a_loss_that_is_no_number_stops_the_run(saved, call):
    """NaN: the step and the last good checkpoint are named, and that one is not overwritten."""
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["net"]["conv_in.weight"][:] = float("inf")
    torch.save(checkpoint, saved)
    before = saved.read_bytes()
    status, _, errors = call(train, "--resume", "--steps", 300, "--out", saved.parent,
                             "--device", "cpu")
    assert (status == 2 and "the loss is nan at step 110" in errors
            and "last good checkpoint, of step 100" in errors)
    assert saved.read_bytes() == before


def test_two_processes_are_one(tiny, call, tmp_path):
    """Many devices: two processes with half the batch each end in the weights of one with all.

    With Adam alone: Muon's rounds magnify the rounding of a sum in another order.
    """
    common = ["--data", tiny, "--steps", 10, *TINY, "--float32", "--muon-lr", 0,
              "--dropout", 0, "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [subprocess.Popen(                                      # as torchrun does
        [sys.executable, str(ROOT / "train.py"), *map(str, common), "two"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | dict(
            OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for rank in range(2)]
    assert call(train, *common, "one")[0] == 0
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "device    cpu, float32, 2 processes" in printed[0] and "device" not in printed[1]
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                for name in ("one", "two"))
    for name in one["net"]:
        assert torch.allclose(one["net"][name], two["net"][name], rtol=1e-3, atol=2e-4), name
    assert one["log"][0][1] == pytest.approx(two["log"][0][1], rel=1e-4)


# ── Published networks ────────────────────────────────────────────────────────────────────────────

def published(net, blocks, attention):
    """The network's tensors under diffusers' names, of its first version or of today's."""
    ours = {"conv_in": "conv_in", "time_embedding.linear_1": "time.0",
            "time_embedding.linear_2": "time.2", "down_blocks.0.resnets.0": "down.0",
            "down_blocks.0.downsamplers.0.conv": "down.1.conv", "down_blocks.1.resnets.0": "down.2",
            "down_blocks.1.attentions.0": "down.2.attention", "mid_block.resnets.0": "middle.0",
            "mid_block.attentions.0": "middle.0.attention", "mid_block.resnets.1": "middle.1",
            "up_blocks.0.resnets.0": "up.0", "up_blocks.0.attentions.0": "up.0.attention",
            "up_blocks.0.resnets.1": "up.1", "up_blocks.0.attentions.1": "up.1.attention",
            "up_blocks.0.upsamplers.0.conv": "up.2.conv", "up_blocks.1.resnets.0": "up.3",
            "up_blocks.1.resnets.1": "up.4", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
    parts = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "time", "norm2": "norm2",
             "conv2": "conv2", "conv_shortcut": "shortcut"}
    tensors, theirs = net.state_dict(), {}
    for stem, our_stem in ours.items():
        for kind in ("weight", "bias"):
            if "resnets" in stem:
                theirs |= {f"{stem}.{part}.{kind}": tensors[f"{our_stem}.{our_part}.{kind}"]
                           for part, our_part in parts.items()
                           if f"{our_stem}.{our_part}.{kind}" in tensors}
            elif "attentions" in stem:
                qkv = tensors[f"{our_stem}.qkv.{kind}"].chunk(3)
                theirs |= {f"{stem}.{attention[k]}.{kind}": part for k, part in zip("qkv", qkv)}
                theirs[f"{stem}.{attention['out']}.{kind}"] = tensors[f"{our_stem}.proj.{kind}"]
                theirs[f"{stem}.group_norm.{kind}"] = tensors[f"{our_stem}.norm.{kind}"]
            else:
                theirs[f"{stem}.{kind}"] = tensors[f"{our_stem}.{kind}"]
    return theirs


OLD = dict(q="query", k="key", v="value", out="proj_attn")
NEW = dict(q="to_q", k="to_k", v="to_v", out="to_out.0")


@pytest.fixture
def folder(tmp_path):
    """A published network: its folder, the network, its tensors under today's names."""
    torch.manual_seed(0)
    net = UNet(Config(image_shape=(3, 8, 8), model_channels=8, attention_resolutions=(4,),
                      patch_size=1)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    (tmp_path / "config.json").write_text(json.dumps(dict(
        sample_size=8, in_channels=3, block_out_channels=[8, 16], layers_per_block=1,
        norm_num_groups=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"], freq_shift=1,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, norm_eps=1e-6)))
    theirs = published(net, 1, NEW)
    torch.save(theirs, tmp_path / PUBLISHED)
    return tmp_path, net, theirs


@pytest.mark.parametrize("names", [OLD, NEW])
def test_published_networks_are_read(names, folder):
    """Published weights: diffusers' names, old and new, give the same network; t counts from 0."""
    path, net, _ = folder
    torch.save(published(net, 1, names), path / PUBLISHED)
    for place in (path, path / PUBLISHED):
        loaded, found = load_network(place, CPU)
        assert same(dict(loaded.state_dict()), dict(net.state_dict()))
        assert found.first_t == 0 and found.image_shape == (3, 8, 8) and found.num_groups == 4


NO_BIAS = "conv_in.bias is no tensor of (8,)"


@pytest.mark.parametrize("change, says", [
    (lambda w: w | {"extra.weight": torch.ones(1)}, "extra.weight is left over"),
    (lambda w: {k: v for k, v in w.items() if "to_k.bias" not in k}, "to_k.bias is missing"),
    (lambda w: w | {"conv_in.bias": torch.ones(9)}, NO_BIAS),
    (lambda w: w | {"conv_in.bias": torch.ones(1).expand(8)}, NO_BIAS),
    (lambda w: w | {"conv_in.bias": torch.ones(8, dtype=torch.complex64)}, "it names"),
    (lambda w: w | {"conv_in.bias": torch.ones(8).to_sparse()}, "it names"),
    (lambda w: w | {"conv_in.bias": torch.nested.nested_tensor([torch.ones(8)])},
     "it names"),
    (lambda w: w | {"conv_in.bias": torch.ones(8, device="meta")}, "it names"),
    (lambda w: w | {"conv_in.bias": [1.0] * 8}, NO_BIAS),
    (lambda w: tuple(w.items()), "it holds a tuple")])
def test_a_published_network_is_believed_tensor_by_tensor(change, says, folder, call):
    """Published weights: what differs from the described network is refused by its name."""
    path, _, theirs = folder
    torch.save(change(theirs), path / PUBLISHED)
    status, _, errors = call(sample, "--weights", path, "--steps", 1, "-n", 1, "--device", "cpu")
    assert status == 2 and errors.count("\n") == 1 and says in errors


@pytest.mark.parametrize("setting", [
    dict(freq_shift=0), dict(flip_sin_to_cos=True), dict(attention_head_dim=8),
    dict(layers_per_block=2), dict(sample_size=-8),
    dict(norm_num_groups=3), dict(block_out_channels=[8, 24]), dict(block_out_channels=[]),
    dict(down_block_types=None), dict(dropout=2.0), dict(norm_eps=1e-5)])
def test_settings_of_another_network_are_refused(setting, folder, call):
    """Published weights: a description that unet.py does not follow, or that is none."""
    path, _, _ = folder
    theirs = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(theirs | setting))
    status, _, errors = call(sample, "--weights", path, "--steps", 1, "-n", 1, "--device", "cpu")
    assert status == 2 and errors.count("\n") == 1


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="session")
def bad_folder(tiny, trained, tmp_path_factory):
    """A folder of files that are no images, and no checkpoints, or that lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bad"))
        write_bad_images(tiny)
        write_bad_checkpoints(trained)
        return Path.cwd()


@pytest.fixture
def bad_files(bad_folder, monkeypatch):
    monkeypatch.chdir(bad_folder)


def write_bad_images(tiny):
    zeros = np.zeros((200, 8, 8), np.uint8)
    arrays = {"floats": [zeros / 2], "odd": [np.zeros((9, 7, 8), np.uint8)], "none": [zeros[:0]],
              "deep": [np.zeros((9, 8, 8, 7), np.uint8)], "labels": [zeros, np.arange(3)],
              "negative": [zeros, -np.ones(200, int)],
              "object": [np.array([Path("x")], dtype=object)]}
    for name, parts in arrays.items():
        np.savez(f"{name}.npz", *parts)
    header = io.BytesIO()
    promised = dict(descr="|u1", fortran_order=False, shape=(10**9, 10**3, 10**3))
    np.lib.format.write_array_header_1_0(header, promised)
    with zipfile.ZipFile("liar.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    size = struct.pack("<I", len(header.getvalue()))
    Path("bomb.npz").write_bytes(Path("liar.npz").read_bytes().replace(
        2 * size, size + b"\xfe\xff\xff\xff"))
    for name, content in {"file": b"no folder", "text.npy": b"these are no images",
                          "empty.npz": b"", "short.npz": tiny.read_bytes()[:900],
                          "idx": idx(zeros)[:999],
                          "idx.gz": gzip.compress(idx(zeros)[:999]),
                          "cut.gz": gzip.compress(idx(zeros))[:40]}.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    np.lib.format.open_memmap("large.npy", "w+", np.uint8, (1, 8192, 8192))


@pytest.mark.parametrize("argv, says", [
    (["--T", 0], "--T must be a whole number, 1 .. 1000000, not 0"),
    (["--T", "1_0"], "--T must be a whole number, 1 .. 1000000, not '1_0'"),
    (["--beta-T", 1], "--beta-T must be a number, 1e-09 .. 0.9999, not 1.0"),
    (["--device", "nonsense"], "no device 'nonsense'"),
    (["--device", ""], "text of length 1 .. 64"), (["--device", "cpu:7"], "no device 'cpu:7'"),
    (["--device", "cuda:99"], "no device"), (["--device", "meta"], "no device"),
    (["--schedule", "cosine", "--beta-1", 0.1], "belong to --schedule linear"),
    (["--model-channels", 7], "7 model channels are no even multiple of 1 groups"),
    (["--channel-mult", 0], "1 .. 64"),
    (["--nonsense"], "unrecognized arguments"), (["--out", "file/out"], "file"),
    (["--data", "a\nb"], "a b: No such file"),
    (["--data", "missing"], "missing: No such file"),
    (["--data", "large.npy", "--model-channels", 32], "3e+12 multipl"),
    (["--model-channels", 4096, "--channel-mult", 64], "6e+12 weights"),
    (["--data", "empty.npz"], "empty.npz"), (["--data", "text.npy"], "text.npy"),
    (["--data", "floats.npz"], "must hold uint8 images"), (["--data", "odd.npz"], "cannot halve"),
    (["--data", "none.npz"], "must hold uint8 images"), (["--data", "short.npz"], "short.npz"),
    (["--data", "deep.npz"], "(x 1 or 3)"), (["--data", "idx"], "promises"),
    (["--data", "idx.gz"], "promises"), (["--data", "cut.gz"], "cut.gz is not"),
    (["--data", "folder"], "holds no images"), (["--data", "object.npz"], "object.npz"),
    (["--data", "labels.npz"], "200 images, but 3 labels"),
    (["--data", "negative.npz"], "labels must be 0 .. 9999"),
    (["--data", "bomb.npz"], "would unpack to"), (["--data", "liar.npz"], "liar.npz is not"),
    (["--resume"], "start without --resume"), (["--evaluate"], "checkpoint.pt: No such file")])
def test_train_refuses_bad_input_in_one_line(argv, says, call, bad_files, monkeypatch):
    """Errors: one line on stderr that names the thing, status 2, no traceback, nothing written."""
    monkeypatch.setattr(files, "LARGEST", 1 << 30)
    status, text, errors = call(train, *argv)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("train.py: ")
    assert says in errors and not Path("out").exists()


def write_bad_checkpoints(trained):
    body = (trained[0] / "checkpoint.pt").read_bytes()
    good = torch.load(trained[0] / "checkpoint.pt", weights_only=True)

    class Code:
        def __reduce__(self):
            return os.mkdir, ("code was run",)

    def write(name, ema={}, **settings_):
        tensors = {key: value for key, value in (good["ema"] | ema).items() if value is not None}
        torch.save(dict(config=good["config"] | settings_, step=1, ema=tensors), name)
    bias = good["ema"]["conv_in.bias"]
    Path("file").write_text("no folder"), Path("text.pt").write_text("no checkpoint")
    Path("short.pt").write_bytes(body[:-500])
    Path("flipped.pt").write_bytes(body[:10**5] + bytes([body[10**5] ^ 1]) + body[10**5 + 1:])
    torch.save(dict(config={}, step=1, ema=Code()), "code.pt"), torch.save([1, 2, 3], "list.pt")
    write("less.pt", {"conv_in.bias": None}), write("more.pt", {"more": torch.ones(1)})
    write("shape.pt", {"conv_in.bias": torch.ones(5)}), write("old.pt", unknown=1)
    write("nan.pt", {"conv_out.bias": good["ema"]["conv_out.bias"] * math.nan})
    write("view.pt", {"conv_in.bias": torch.ones(1).expand(bias.shape)})
    torch.save(good, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(legacy, "a") as archive:
        archive.writestr("data.pkl", b"")
    Path("legacy.pt").write_bytes(legacy.getvalue())
    one = torch.zeros(max(p.numel() for p in good["ema"].values()))
    write("one.pt", {name: one[:p.numel()].view(p.shape) for name, p in good["ema"].items()})
    write("bytes.pt", {"conv_in.bias": bytearray(9)})
    write("huge.pt", model_channels=2**40), write("endless.pt", num_res_blocks=10**9)
    write("float.pt", num_groups=4.0), write("dropout.pt", dropout=math.nan)


@pytest.mark.parametrize("argv, says", [
    (["--device", "tpu"], "no device 'tpu'"), (["--sampler", "x"], "one of ddpm, ddim, dpm"),
    (["--label", 2], "--label must be 0 .. 1, all"), (["--label", "seven"], "--label must be"),
    (["--label", "all", "-n", 3], "multiple of 2"),
    (["--sampler", "ddpm", "--eta", 0.5], "--eta belongs to"),
    (["--sampler", "dpm", "--variance", "beta_tilde"], "--variance belongs to"),
    (["--out", "x.jpg"], "must end in .png or .npz"), (["--out", "file/x.png"], "file"),
    (["--resample", 2], "--resample belongs to --keep"),
    (["--keep", "left", "--data", config.DIGITS], "held-out images of (28, 28, 1)"),
    (["--keep", "left", "-n", 21], "has 20 held-out images"),
    (["--keep", "left", "--guidance", 2], "needs a --label"),
    (["--weights", "missing.pt"], "missing.pt: No such file"),
    (["--weights", "text.pt"], "is not a checkpoint"),
    (["--weights", "short.pt"], "is not a checkpoint"), (["--weights", "flipped.pt"], "damaged"),
    (["--weights", "code.pt"], "is not a checkpoint"), (["--weights", "list.pt"], "holds a list"),
    (["--weights", "less.pt"], "ema.conv_in.bias is missing"),
    (["--weights", "more.pt"], "ema.more is left over"),
    (["--weights", "shape.pt"], "ema.conv_in.bias is no tensor of (16,)"),
    (["--weights", "view.pt"], "ema.conv_in.bias is no tensor of (16,)"),
    (["--weights", "legacy.pt"], "no zip file"), (["--weights", "one.pt"], "it is too small"),
    (["--weights", "bytes.pt"], "it names"),
    (["--weights", "nan.pt"], "pixels that are no numbers"),
    (["--weights", "huge.pt"], "--model-channels must be a whole number, 4"),
    (["--weights", "endless.pt"], "--num-res-blocks must be"),
    (["--weights", "float.pt"], "--num-groups must be a whole number, 1"),
    (["--weights", "dropout.pt"], "--dropout must be"),
    (["--weights", "old.pt"], "not those of this version")])
def test_sample_refuses_bad_input_in_one_line(argv, says, call, trained, bad_files):
    """Errors: one line, status 2, no code run, nothing half-written; no checkpoint is believed."""
    weights = [] if "--weights" in argv else ["--weights", trained[0] / "checkpoint.pt"]
    status, text, errors = call(sample, *weights, *argv)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("sample.py: ")
    assert says in errors and not Path("code was run").exists()
    assert not list(Path().glob("x.*")) and not list(Path().glob("out/*"))


SILLY = ["", "x", "nan", "inf", "-inf", "1e999", "-5", "1_000", "9" * 20, "9" * 5000, "0x10", "1,5",
         "--", "[1]", "None", "1 2", "\u0663\u00b2", "a\nb", "\udcff", "-0.5"]


@pytest.mark.parametrize("script", [train, sample, evaluate, files])
def test_every_option_refuses_what_is_none_of_its_values(script, call, monkeypatch):
    """Errors: each option that --help lists, with 20 values that are none, and those just outside
    its range: one line with its name, status 2, before any work.
    """
    def work(*_):
        raise AssertionError("accepted")
    for module, name in ((train, "open_run"), (sample, "load_network"), (evaluate, "print_bound"),
                         (files, "load")):
        monkeypatch.setattr(module, name, work)
    rules = {config.flag(f.name): f.metadata for settings_ in (Config, Session, Sampling)
             for f in fields(settings_)}
    options = re.findall(r"^  (--?\w[\w-]*)", call(script, "--help")[1], re.M)
    assert len(options) >= {train: 32, sample: 16, evaluate: 3, files: 2}[script]
    for option in {*options} - {"-h"}:
        kind, low, high, choices = map(rules[option].get, ("kind", "low", "high", "choices"))
        wrong = SILLY if kind in (int, float) or choices else ["", "x" * 5000]
        if kind in (int, float):
            wrong = [*SILLY, low - 1, high + max(1, high / 100), low - 1e-10, f"{low}e"]
        for value in ["", "x", "True"] if kind is bool else wrong:
            status, text, errors = call(script, f"{option}={value}")
            assert status == 2 and not text and errors.count("\n") == 1, (option, value, errors)
            assert errors.startswith(f"{script.__name__}.py: ") and option in errors, errors
            assert len(errors) < 250 and not list(Path().iterdir())


RESUMED = [("optimizers", "Adam", 0, "exp_avg"), ("optimizers", "Adam", 0, "step"),
           ("optimizers", "Adam", 5), ("optimizers", "Muon", 3, "momentum_buffer"), ("optimizers",),
           ("random", "data"), ("random", "noise"), ("random",), ("net",),
           ("net", "conv_in.weight"),
           ("log",), ("log", 0), ("step",), ("device",), ("config", "batch")]


WRONG = [torch.ones(1), torch.zeros(0), torch.ones(1).expand(8, 4, 3, 3),
         torch.ones(3).to_sparse(),
         torch.ones(8, 4, 3, 3, device="meta"), torch.ones(8, 4, 3, 3, dtype=torch.complex64),
         torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), -1, 10**20, math.nan, "x",
         [], {}, None, [(1, "x")], ()]


@pytest.fixture(scope="session")
def run_file(tiny, tmp_path_factory):
    """The checkpoint of a small run, and what it holds."""
    images, labels = files.load(tiny)
    begun = support.run.Run(
        Config(data=str(tiny), batch=4, T=3, beta_1=0.1, beta_T=0.2, model_channels=8,
               channel_mult=(1,), image_shape=(1, 8, 8), num_classes=2, float32=True,
               fingerprint=files.fingerprint(images, labels)), CPU, tmp_path_factory.mktemp("run"))
    steps = zip(range(2), train.losses(begun, images, labels, compile=False))
    begun.log_loss([t_and_loss for _, t_and_loss in steps])
    begun.save()
    return begun.folder / "checkpoint.pt", (begun.folder / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("path", RESUMED, ids=str)
def test_no_leaf_of_a_checkpoint_is_believed_on_resume(path, run_file, tmp_path):
    """Resume: each leaf in turn gone, or replaced by what it is not (by a few of these, or with
    TRIES by all): one line that names the file, never a crash.
    """
    few, bad = random.Random(str(path)).sample(WRONG, 2), tmp_path / "checkpoint.pt"
    for value in ["gone", *(WRONG if "TRIES" in os.environ else few)]:
        place = state = torch.load(io.BytesIO(run_file[1]), weights_only=True)
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        if isinstance(value, str) and value == "gone":
            del place[path[-1]]
        torch.save(state, bad)
        try:
            support.run.open_run(tmp_path, CPU, {}, resume=True)
            assert path[0] == "log" and isinstance(value, (list, str)) and value in ([], "gone")
        except ValueError as error:
            assert str(bad) in str(error) and "\n" not in str(error)


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
        found, labels = files.load(path)
        assert (found.dtype == np.uint8 and found.ndim == 4
                and (labels is None or len(labels) == len(found)))
    except (ValueError, OSError) as error:
        assert str(path) in f"{error} {getattr(error, 'filename', '')}" and "\n" not in str(error)


def tiny_checkpoint():
    settings_ = Config(image_shape=(1, 4, 4), model_channels=8, channel_mult=(1,), num_classes=2,
                       patch_size=1, float32=True, T=3, beta_1=0.1, beta_T=0.2)
    return dict(config=asdict(settings_), step=1, ema=dict(UNet(settings_).state_dict()))


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
    place = data_.draw(st.sampled_from([checkpoint, checkpoint["config"], checkpoint["ema"]]))
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
        net, settings_ = load_network(path, CPU)
    except (ValueError, OSError) as error:
        assert str(path) in f"{error} {getattr(error, 'filename', '')}" and "\n" not in str(error)
        return
    label = torch.zeros(1, dtype=torch.long) if settings_.num_classes else None
    assert len(list(sample.generate(net, settings_, Sampling(steps=1), range(1), label))) == 2


@settings(max_examples=TRIES.max_examples // 5)
@given(st.data())
def test_any_run_goes_on_or_is_refused(run_file, data_):
    """Resume: any entry of a run, at any depth, changed or removed, or bytes of its file changed:
    only ValueError or OSError comes out, and what is accepted takes a step.
    """
    path, good = run_file
    place = state = torch.load(io.BytesIO(good), weights_only=True)
    if data_.draw(st.integers(0, 3)):
        key = data_.draw(st.sampled_from(list(place)))
        while isinstance(place[key], (dict, list)) and place[key] and data_.draw(st.integers(0, 3)):
            place = place[key]
            key = data_.draw(st.sampled_from(list(place) if isinstance(place, dict)
                                             else range(len(place))))
        place[key] = data_.draw(anything)
        if data_.draw(st.booleans()):
            del place[key]
        torch.save(state, path)
    else:
        path.write_bytes(data_.draw(mutated(good)))
    try:
        opened, images, labels, _ = support.run.open_run(path.parent, CPU, {}, resume=True)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
    else:
        next(train.losses(opened, images, labels, compile=False))


# ── README.md and READING.md ──────────────────────────────────────────────────────────────────────

README, READING = ((ROOT / name).read_text() for name in ("README.md", "READING.md"))
QUICK_START = [part for block in re.findall(r"```sh\n(.*?)\n```", README) for part in
               block.split(" && ")]
PATH = re.search(r"## A path of 45 minutes\n(.*?)\n## ", READING, re.S)[1]


def flags():
    """Every option of every script."""
    for parser in (train.arguments(), sample.arguments()):
        for action in parser._actions:
            yield from action.option_strings


@pytest.mark.parametrize("page", [README, READING], ids=["README", "READING"])
def test_the_pages_name_only_what_exists(page):
    """Every link leads to the line of its function or proof, to a file or to a heading; every file
    and flag is there.
    """
    links = re.findall(r'\[([^]]+)\]\((?!http)([\w./-]*)#?([\w-]*)(?: "(\w+)")?\)', page)
    for words, file, place, title in links:
        assert not file or (ROOT / file).exists(), file
        text = (ROOT / file).read_text() if Path(file).suffix in (".py", ".md") else page
        if re.fullmatch(r"L\d+", place):
            name = title or words.strip("`")
            line = text.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {name}\b", line), (file, name)
        elif place:
            headings = re.findall("^#+ (.*)", text, re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    proofs = [title for words, *_, title in links if words == "proof"]
    assert all(title.startswith("test_") for title in proofs)
    assert (len(links), len(proofs)) > ((100, 50) if page is READING else (15, 0))
    files = re.findall(r"`((?:\w+/)?[\w-]+\.(?:py|npz|txt))`|\]\((assets/[\w./-]+)\)", page)
    for name in map("".join, files):
        assert (ROOT / name).exists(), name
    known = {*flags(), "--hypothesis-profile", "--nproc_per_node", "--mine"}
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", page):
        assert flag in known, flag


def test_every_equation_is_in_the_reading_guide():
    """Ho (1) to (16), N1 to N8 and V1 to V14 stand in its table; in the next, the articles' words
    before each formula.
    """
    table, articles, *_ = re.findall(r"(?:^\|.*\n)+", READING, re.M)
    tags = " ".join(re.findall(r"\*\*(.*?)\*\*", table))
    numbers = ", ".join(re.findall(r"Ho \(([\d, ]+)\)", tags)).split(", ")
    assert {int(number) for number in numbers} == set(range(1, 17))
    for letter, last in (("N", 8), ("V", 14)):
        every = {f"{letter}{k}" for k in range(1, last + 1)}
        assert set(re.findall(rf"{letter}\d+", tags)) == every
        assert set(re.findall(rf"^\| ({letter}\d+) \| \"", articles, re.M)) == every


@pytest.mark.parametrize("algorithm", [train.algorithm_1, sample.algorithm_2])
def test_the_algorithms_in_the_readme_are_the_source(algorithm):
    """Algorithm 1, Algorithm 2: the code beside the paper's lines is that of the two loops."""
    table = re.search(rf"^.*\[`{algorithm.__name__}`\].*\n((?:\|.*\n)+)", README, re.M)[1]
    source = inspect.getsource(algorithm)
    body = ast.parse(source).body[0].body[1:]                                # after the docstring
    lines = source.splitlines()[body[0].lineno - 1:]
    assert re.findall("`(.*?)`", table) == [line.split("  #")[0].strip() for line in lines]


def test_the_readme_shows_what_training_prints(trained):
    """README: the last lines of `python train.py`, but for the figures."""
    out, text, _ = trained
    shown = re.search(r"&& python train\.py\n```\n\n```text\n(.*?)```", README, re.S)[1]
    shown, printed = (re.sub(r"\d+(\.\d+)?", "0", page).splitlines()
                      for page in (shown, text.replace(str(out), "out")))
    assert shown == printed[-len(shown):]


def test_the_commands_are_understood():
    """Every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python ((?:train|sample)\.py[^`\n]*)", README + READING)
    assert len(commands) > 20
    for command in commands:
        script, *argv = shlex.split(command)
        if argv != ["--help"]:
            {"train.py": train, "sample.py": sample}[script].arguments().parse_args(argv)


def test_the_quick_start_and_then_the_path_can_be_followed(call, tmp_path):
    """README, and in the same folder READING's path of 45 minutes: each command runs, made short
    where it takes long, and no later one finds an earlier one's files in its way.
    """
    assert "pip install -r requirements.txt" in QUICK_START and QUICK_START[-1] == "pytest"
    names = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
    assert names == ["numpy", "torch", "pytest", "hypothesis"]
    commands = [*QUICK_START, *re.findall(r"`(python .*?)`", PATH)]
    for script in ("ddpm.py", "posterior.py"):
        assert f"python {script}" in commands            # run above, as demonstrations
    for command in commands:
        script, *argv = shlex.split(command)[1:] or [""]
        if script in ("train.py", "sample.py"):
            module, short = {"train.py": (train, ["--batch", 2, "--T", 2, "--beta-T", 0.9]),
                             "sample.py": (sample, ["-n", 10])}[script]
            assert call(module, *argv, *short, "--steps", 2)[0] == 0
        elif script == "evaluate.py":
            assert (tmp_path / argv[argv.index("--weights") + 1]).exists()
    pictures = "samples.png", "step-000002.png", "mine/step-000002.png", "T50/step-000002.png"
    for name in pictures:
        assert decoded(tmp_path / "out" / name)[0].std() > 10
    assert (tmp_path / "out/mine/network.pt").exists()
