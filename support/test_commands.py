"""The commands, as a user runs them: that what is proved of the formulas reaches the pictures.

With betas of 1e-6 an x_t tells its x_0 exactly, and what is left of it is ε.
"""
import contextlib
import functools
import inspect
import itertools
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ddpm
import evaluate
import posterior
import sample
import train
import unet
from support import console, data as files, devices
from support.config import PRESETS, Config, Sampling, flag
from support.drawing import labels_for, projection
from support.muon import optimizers
from support.test_data import decoded
from support.test_weights import CONFIG, network, saved
from support.weights import config_from, load_network, read_tensors

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "assets/digits.safetensors"
CLEAR = ["--T", 4, "--beta-1", 1e-6, "--beta-T", 1e-6]       # so little noise that x_0 can be read
SMALL = ["--model-channels", 8, "--device", "cpu"]


def words_of(named):
    """The words of a command line that names these settings."""
    for name, value in named.items():
        yield f"--no-{flag(name)[2:]}" if value is False else flag(name)
        if not isinstance(value, bool):
            yield from value if isinstance(value, tuple) else [value]


def drawn(call, *argv):
    """The images and the labels that `python sample.py` writes into an .npz."""
    assert call(sample, *argv, "--device", "cpu", "--out", "x.npz")[0] == 0
    found = np.load("x.npz")
    return found["images"].astype(int), found["labels"].tolist() if "labels" in found else None


def cells(page, height=8):
    """The images of a sheet, in rows: 8 pixels wide, magnified twice, with margins of 2."""
    rows = page[2:, 2:].reshape(-1, 2 * height + 2, page.shape[1] // 18, 18, page.shape[2])
    return rows[:, :-2:2, :, :-2:2].swapaxes(1, 2)


# ── The demonstrations ────────────────────────────────────────────────────────────────────────────

def is_a_row_of_ddpm(t, ink_1, paper_1, variance_1, ink, paper, variance, snr):
    """V1, V2, V4: means and variances of 100 draws, to five standard errors, and the SNR."""
    schedule, var_0 = ddpm.linear(), 1 - (704 / 1024) ** 2       # 864 pixels are paper, 160 are ink
    kept, added = schedule.alpha_bar[int(t)], schedule.beta[:int(t) + 1].sum()
    assert [variance_1, variance] == pytest.approx([var_0 + added, 1 - kept * (1 - var_0)], 0.022)
    assert [ink_1, paper_1, ink, paper] == pytest.approx([1, -1, kept ** 0.5, -kept ** 0.5],
                                                         abs=0.13)
    assert snr == pytest.approx(1 / (1 / kept - 1) if t else np.inf, rel=0.006)


def is_a_row_of_posterior(t, a1, a2, beta_tilde, distance):
    """Ho (7): A1, A2 and β̃ take q(x_t|x_0) to q(x_{t−1}|x_0); 784 pixels, five standard errors."""
    schedule, x0 = ddpm.linear(), files.to_pixels(files.load()[0][7])
    (before, now), beta = schedule.alpha_bar[int(t) - 1:int(t) + 1], schedule.beta[int(t)]
    assert a1 * now ** 0.5 + a2 == pytest.approx(before ** 0.5, abs=2e-6)
    assert a1 ** 2 * (1 - now) + beta_tilde == pytest.approx(1 - before, abs=5e-6)
    assert beta_tilde * (1 - now) == pytest.approx(beta * (1 - before), rel=1e-3)
    assert distance ** 2 == pytest.approx(
        (1 - before ** 0.5) ** 2 * (x0 ** 2).mean() + 1 - before, rel=5 * (2 / 784) ** 0.5)


@pytest.mark.parametrize("module, picture, says, is_row, size", [
    (ddpm, "letter", "naive: the letter stays", is_a_row_of_ddpm, (7, 4)),
    (posterior, "posterior", "from 0.000128 to 1.  A1 grows to 0.99415 at t = 462, then",
     is_a_row_of_posterior, (9, 1))])
def test_the_demonstrations(module, picture, says, is_row, size, call):
    """V, its two notebooks: each script alone prints its figures and draws the guide's pictures."""
    status, text, errors = call(module)
    assert status == 0 and says in text and not errors
    rows = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    for row in rows:
        is_row(*map(float, row))
    page, assets = decoded(Path(f"out/{picture}.png"))[0], sorted(ROOT.glob(f"assets/{picture}*"))
    for k, asset in enumerate(assets):                      # the reading guide shows it row by row
        row = decoded(asset)[0].astype(int)
        assert row.std() > 10 and np.abs(row - page[k * (len(row) - 2):][:len(row)]).max() <= 1
    assert (len(rows), len(assets)) == size


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

def test_training_says_what_it_does_and_the_loss_falls(trained, tiny):
    """Algorithm 1: what to expect, one line now and then, the next command; the files."""
    out, printed, errors = trained
    net, config = load_network(out / "network.safetensors", torch.device("cpu"))
    least, known = evaluate.least_loss(*files.load(tiny), config, draws=1000)
    for text in ("device    cpu", f"network   {unet.parameters(net):,} parameters",
                 "180 of 8x8x1 to train on, 20 held out, 2 labels, pixels 0 .. 239",
                 "linear, T = 20: L_T = 0.00", "1 for a network that predicts no noise; "
                 f"{least:.4f}, the least there is for {known} of\n          these images",
                 "step 100 of 100 · loss", "images/s", "next: python sample.py"):
        assert text in printed, text
    assert not errors and "\r" not in printed and known == 180
    log = np.genfromtxt(out / "log.csv", delimiter=",", names=True)
    steps, losses, held_out = (log[name] for name in ("step", "loss", "held_out"))
    assert len(log.dtype.names) == 3 and "nan" not in (out / "log.csv").read_text()
    assert steps.tolist() == [*range(10, 101, 10)]
    assert least < losses[-1] < losses[0] < 1.2 and losses[-1] < 0.5
    assert np.isnan(held_out).tolist() == 5 * [True, False]                  # where it is saved
    assert 0.5 < held_out[-1] / losses[-1] < 2
    assert f"held out {held_out[-1]:.4f}" in printed.split("step 100 of 100")[1]
    for k in (20, 40, 60, 80, 100):
        assert cells(decoded(out / f"step-{k:06}.png")[0]).shape == (10, 10, 8, 8, 1)


def test_the_progress_says_what_was_measured(capsys, monkeypatch):
    """Console: speed and time left, with a clock of our own."""
    clock = iter([100.0, 102.0, 104.0, 130.0, 0.0, 0.0, 0.05, 0.2, 1.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = console.Progress(30, first=10, images=64)
    progress(20, "a"), progress(25, "b"), progress(28, "c")
    assert capsys.readouterr().out == ("a · 320 images/s · 0:00:02 left\n"
                                       "c · 38.4 images/s · 0:00:03 left\n")
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True)       # a terminal of 8 columns
    monkeypatch.setenv("COLUMNS", "8")
    progress = console.Progress(2)
    progress(0, "one longer"), progress(0, "two"), progress(0, "three"), progress(2, "four")
    assert capsys.readouterr().out == "\rone lon\rthree  \rfour · \n"


def read_off(step, schedule, coloured):
    """Which image each x_t comes from, whether mirrored, and its ε."""
    images, x_t = np.load(coloured)["images"], step.x_t.double().numpy()
    both = np.concatenate([images, images[:, :, ::-1]]).transpose(0, 3, 1, 2) / 127.5 - 1
    k = ((x_t[:, None] - both) ** 2).mean((2, 3, 4)).argmin(1)
    assert np.abs(x_t - both[k]).max() < 2 / 127.5
    return k % 40, k >= 40, ddpm.eps_from_x0(x_t, step.t.numpy().reshape(-1, 1, 1, 1), both[k],
                                             schedule)


def test_the_network_is_trained_on_what_algorithm_1_says(coloured, call, watched):
    """Algorithm 1 in `python train.py`: x_0 from the training part, each with its label or none,
    its own t and ε; the loss in log.csv is theirs, and beside it that of the average on the images
    held out; dropout is active, but not in the average, which alone draws.

    Five standard errors of 640 images: a share off by a tenth, a noise level by 2%, are found.
    """
    assert call(train, "--data", coloured, "--steps", 10, "--batch", 64, "--flip", "--dropout", 0.2,
                "--p-uncond", 0.25, *CLEAR, *SMALL)[0] == 0
    steps, held_out, drawn = watched[:10], watched[10], watched[11:]
    schedule, losses, seen = ddpm.linear(4, 1e-6, 1e-6), [], []
    for step in steps:
        which, mirrored, eps = read_off(step, schedule, coloured)
        dropped = step.label.numpy() == 4
        assert step.training and step.dropout == {0.2} and len(set(which)) > 20
        assert np.array_equal(step.label, np.where(dropped, 4, which % 4))
        assert np.array_equal(np.bincount(step.t), [0] + [16] * 4)                  # stratified
        losses.append(((step.output.double().numpy() - eps) ** 2).mean())
        seen.append((which, mirrored, dropped, eps, step.t))
    which, mirrored, dropped, eps, t = map(np.concatenate, zip(*seen))
    assert set(which) == set(files.split(40)[0])
    for share, mean in ((mirrored, 0.5), (dropped, 0.25)):
        assert abs(share.mean() - mean) < 5 * (mean * (1 - mean) / 640) ** 0.5
    for z in (eps[t == each] for each in (1, 2, 3, 4)):
        assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    similar = np.corrcoef(eps.reshape(640, -1)) - np.eye(640)
    assert np.abs(similar).max() < 0.5                                          # of 192 pixels
    which, _, eps = read_off(held_out, schedule, coloured)
    assert list(which) == files.split(40)[1].tolist() and held_out.t.tolist() == [1, 2, 3, 4]
    assert held_out.label.tolist() == (which % 4).tolist()
    held_out_loss = ((held_out.output.double().numpy() - eps) ** 2).mean()
    row = np.loadtxt("out/log.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(row, [10, np.mean(losses), held_out_loss], rtol=1e-4)
    assert call(sample, "-n", 1, "--device", "cpu")[0] == 0
    (run, saved_as), (shared, told) = (read_tensors(Path("out", f"{name}.safetensors"))
                                       for name in ("checkpoint", "network"))
    assert [config_from(each).data for each in (saved_as, told)] == [str(coloured), None]
    assert all(torch.equal(p, run[f"ema.{name}"].half()) for name, p in shared.items())
    assert not torch.equal(run["ema.conv_in.bias"], run["net.conv_in.bias"])
    for step in watched[10:]:
        assert torch.equal(step.bias, run["ema.conv_in.bias"]) and not step.training
    for step, (first, last) in zip(drawn, 4 * [(0, 64)] + 4 * [(64, 100)], strict=True):
        assert step.label.tolist() == (np.arange(100) // 25)[first:last].tolist()


@pytest.mark.parametrize("named, schedule", [
    (dict(schedule="cosine", T=5), ddpm.cosine(5)),
    (dict(T=5, beta_1=0.2, beta_T=0.7), ddpm.linear(5, 0.2, 0.7)), ({}, ddpm.linear())])
def test_the_noise_is_that_of_the_named_schedule(named, schedule, call, watched, monkeypatch):
    """--schedule, --T, --beta-1, --beta-T: black images in training have mean −√ᾱ_t and variance
    1 − ᾱ_t, to five standard errors of 64 pixels a t.  Drawing: each picture takes ten steps, at
    the squares of 1 .. 10, from the same noise.  Data: the label that is held out alone is told.
    """
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    labels = np.arange(50) % 2
    labels[files.split(50)[1]] = 2
    np.savez("black.npz", images=np.zeros((50, 8, 8), np.uint8), labels=labels)
    text = call(train, "--data", "black.npz", "--steps", 3, "--batch", 100, *words_of(named),
                *SMALL)[1].split("step 1 ")[0]
    steps = [step for step in watched if step.training]
    mean, variance = ddpm.q_marginal(-1, np.array([step.t.numpy() for step in steps]), schedule)
    x_t = np.array([step.x_t.numpy().reshape(100, 64) for step in steps])
    z = (x_t - mean[..., None]) / np.sqrt(variance)[..., None]
    assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    for step in steps:
        assert step.t.min() >= 1 and schedule.T * 0.9 < step.t.max() <= schedule.T
    drawn = [step for step in watched if not step.training and len(step.x_t) == 100]
    times = [5, 4, 3, 2, 1] if named else [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10]
    assert [step.t.tolist() for step in drawn] == 3 * [[t] * 100 for t in times]
    assert all(torch.equal(step.x_t, drawn[0].x_t) for step in drawn[::len(times)])
    l_T = posterior.bits_per_dim(posterior.L_T(-np.ones(1), schedule))
    assert f"T = {schedule.T}: L_T = {l_T:.3g} bits/dim" in text
    assert ("x_T IS NOT YET NOISE" in text) == (l_T > 0.01) == ("beta_T" in named)
    assert "label 2 has no image to train on" in text


@pytest.mark.parametrize("float32", [False, True])
def test_bfloat16_is_used_where_it_can_be(float32, coloured, call, watched, monkeypatch):
    """Precision: all three commands are in bfloat16 where the device has it, not with --float32."""
    for name, best in (("avx2", "float32"), ("amx_bf16", "bfloat16"), ("avx512_bf16", "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
        assert devices.precision(torch.device("cpu"), False) == best
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for script_, argv in (
            (train, ["--data", coloured, "--steps", 1, "--batch", 4, "--model-channels", 8, *CLEAR,
                     *words_of(dict(float32=float32))]),
            (sample, ["--steps", 1, "-n", 2]), (evaluate, [])):
        text = call(script_, *argv, "--device", "cpu")[1]
        assert {step.bfloat16 for step in watched} == {not float32}
        assert script_ is not train or f"cpu, {'float32' if float32 else 'bfloat16'}\n" in text
        watched.clear()
    assert torch.backends.cudnn.allow_tf32 != float32                # float32 means float32


def test_what_is_asked_of_torch_is_done(coloured, call, monkeypatch):
    """--deterministic, --compile: so is each step of training, and only if it is named."""
    seen, calls, step_down = [], Mock(return_value=None), train.update_ema
    monkeypatch.setattr(torch, "compile", lambda net: lambda *args: calls() or net(*args))
    monkeypatch.setattr(train, "update_ema", lambda *args: step_down(*args) or seen.append((
        torch.are_deterministic_algorithms_enabled(), calls.call_count)))
    for name, argv in (("a", []), ("b", ["--deterministic"]), ("c", ["--compile"])):
        assert call(train, "--data", coloured, "--steps", 1, "--out", name, *argv, *SMALL)[0] == 0
    assert seen == [(False, 0), (True, 0), (False, 1)]


TRAINING = {f.name: not f.default for f in fields(Config) if isinstance(f.default, bool)} | dict(
    steps=4, batch=8, lr=0.01, muon_lr=0, warmup=1, beta2=0.5, grad_clip=0.001, ema_decay=0.1,
    p_uncond=0.9, seed=5, schedule="cosine", T=7, beta_1=0.01, beta_T=0.1, model_channels=16,
    channel_mult=1, num_res_blocks=2, attention_resolutions=4, dropout=0.5, num_groups=2,
    patch_size=1, data="other.npz")


def test_every_option_of_training_changes_what_is_trained(call, short, monkeypatch):
    """Options: each changes its own setting in the checkpoint and no other, and what is trained."""
    assert TRAINING.keys() == {f.name for f in fields(Config) if f.metadata["help"]}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    for name, order in (("images", images), ("other", images[::-1])):
        np.savez(name, images=order, labels=np.arange(30) % 3)

    def trained_with(**changes):
        named = dict(data="images.npz", steps=3, batch=6, warmup=2) | changes
        assert call(train, *SMALL, *words_of(named), "--out", f"out{[*changes]}")[0] == 0
        found, metadata = read_tensors(Path(f"out{[*changes]}/checkpoint.safetensors"))
        return found, asdict(config_from(metadata))
    plain, settings_ = trained_with()
    for name, value in TRAINING.items():
        changed, now = trained_with(**{name: value})
        follows = dict(labels={"num_classes", "fingerprint"}, data={"fingerprint"}).get(name, set())
        assert {key for key in now if now[key] != settings_[key]} == {name} | follows
        moved = {key[:4] for key, p in changed.items()
                 if key not in plain or not torch.equal(p, plain[key])}
        assert "ema." in moved and ("net." in moved) == (name != "ema_decay"), name


def test_the_presets_are_what_they_say():
    """Ho appendix B and section 4, CIFAR10, one by one; and every default of training."""
    paper = dict(
        data=None, labels=False, flip=True, steps=800_000, batch=128, lr=2e-4, muon_lr=0.0,
        warmup=5000, decay=False, beta2=0.999, grad_clip=1.0, ema_decay=0.9999, stratified=False,
        p_uncond=0.1, seed=0, float32=False, schedule="linear", T=1000, beta_1=1e-4, beta_T=0.02,
        model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
        attention_resolutions=(16,), dropout=0.1, num_groups=32, patch_size=1,
        image_shape=(3, 32, 32), num_classes=0, fingerprint="none")
    assert asdict(PRESETS["cifar10"]) == paper
    assert asdict(PRESETS["digits"]) == asdict(Config()) == paper | dict(
        labels=True, flip=False, stratified=True, steps=2000, batch=64, lr=6e-3, muon_lr=0.03,
        warmup=100, decay=True, beta2=0.99, ema_decay=0.999, model_channels=16, channel_mult=(1, 2),
        num_res_blocks=1, attention_resolutions=(0,), dropout=0.0, num_groups=1, patch_size=2,
        image_shape=(1, 28, 28))


def test_a_preset_and_what_is_named_beside_it(tiny, call, short):
    """--preset: its settings, and over them those that are named."""
    named = dict(data=str(tiny), steps=2, model_channels=32, batch=4, T=5, flip=False,
                 attention_resolutions=(4, 2), num_res_blocks=1, channel_mult=(1, 2))
    assert call(train, "--preset", "cifar10", *words_of(named), "--device", "cpu")[0] == 0
    found = asdict(config_from(read_tensors(Path("out/checkpoint.safetensors"))[1]))
    assert found == asdict(PRESETS["cifar10"]) | named | dict(image_shape=(1, 8, 8),
                                                              fingerprint=found["fingerprint"])


# ── Sampling and evaluation ───────────────────────────────────────────────────────────────────────

def test_the_default_is_algorithm_2():
    """Algorithm 2: ddpm, all steps, σ² = β, guidance 1 and all defaults; the help shows them."""
    assert asdict(Sampling()) == dict(
        sampler="ddpm", steps=1000, sigma2="beta", eta=1.0, clip=True, guidance=1.0,
        label="each", start=0, keep=None, resample=1, n=100, batch=100, weights=None,
        out="out/samples.png", animate=False, data=None, device=None, seed=0)
    for parser, settings_ in ((train.arguments(), Config), (sample.arguments(), Sampling)):
        text = " ".join(parser.format_help().split())
        for rule in fields(settings_):
            shown = rule.default if isinstance(rule.default, tuple) else (rule.default,)
            told = f"{rule.metadata['help']} ({' '.join(map(str, shown))})".replace(" (None)", "")
            assert not rule.metadata["help"] or " ".join(told.split()) in text, told


def test_sampling_draws_what_was_learned(trained, call):
    """Algorithm 2: the sheet's images have a bright half, and labels choose which."""
    status, text, errors = call(
        sample, "--weights", trained[0] / "checkpoint.safetensors", "--guidance", 3, "-n", 40,
        "--batch", 25, "--out", "new/folder/s.npz")
    assert text.endswith(f"drawn: {Path('new/folder/s.npz')}, with --seed 0\n")
    assert status == 0 and "ddpm, 20 steps" in text and "images/s" in text and not errors
    assert "step 0 of 20 · images 1 to 25 of 40\n" in text
    assert "step 20 of 20 · images 26 to 40 of 40 · " in text
    images, labels = np.load("new/folder/s.npz").values()
    assert (images.shape, images.dtype) == ((40, 8, 8, 1), np.uint8)
    assert labels.tolist() == [0, 1] * 20
    brighter_left = images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))
    assert (brighter_left == (labels == 0)).mean() > 0.8


@pytest.mark.parametrize("named", [
    dict(sigma2="beta_tilde"), dict(sampler="ddim", steps=4, eta=0.5),
    dict(sampler="dpm", steps=4, guidance=2, label=1), dict(keep="left", label=1),
    dict(start=9, label=1)])
def test_the_same_pictures_whatever_the_batch(named, trained, call, monkeypatch):
    """Determinism: the seed decides each image, -n nothing, the batch but the rounding of sums."""
    monkeypatch.setattr(devices, "precision", lambda device, float32: "float32")
    weights = ["--weights", trained[0] / "checkpoint.safetensors", "-n", 12]
    (a, told), (b, _), (c, _), (d, _), (first, _) = found = [
        drawn(call, *weights, *words_of(named), *extra)
        for extra in ([], [], ["--batch", 5], ["--seed", 1], ["-n", 3])]
    assert np.array_equal(a, b) and np.abs(a - c).max() <= 1 and np.abs(a - d).max() > 20
    assert np.abs(a[:len(first)] - first).max() <= 1 and len(a) == 4 * len(first)
    assert told == ([1] * len(a) if "label" in named else [0, 1] * 6)
    assert all(labels == told[:len(labels)] for _, labels in found)


@pytest.mark.parametrize("argv, size, frames, labels", [
    (["-n", 5, "--label", 1], (2, 3, 8), 0, [1] * 5),
    (["-n", 4, "--animate"], (2, 2, 16), 4, [0, 1, 0, 1]),
    (["-n", 5], (3, 2, 8), 0, [0, 1, 0, 1, 0]), (["-n", 2, "--guidance", 0], (1, 2, 8), 0, None),
    (["-n", 4, "--label", "none"], (2, 2, 8), 0, None),
    (["-n", 2, "--keep", "top", "--resample", 2, "--label", 1], (6, 2, 8), 0, [1] * 8),
    (["-n", 2, "--keep", "top", "--animate"], (6, 2, 8), 4, None),
    (["-n", 3, "--keep", "coarse"], (6, 3, 8), 0, None),
    (["-n", 2, "--start", 9], (6, 2, 8), 0, None)])
def test_pictures_of_all_kinds(argv, size, frames, labels, trained, tiny, call):
    """A sheet, a column per class; --keep: columns of original, kept, four different completions
    with the known half exact; animations.  .npz: images, one after the other in all its ways, the
    last frame, the labels followed.
    """
    argv = ["--weights", trained[0] / "checkpoint.safetensors", "--sampler", "ddim", "--steps", 3,
            "--device", "cpu", *argv]
    images, told = drawn(call, *argv)
    assert call(sample, *argv)[0] == 0
    page, found = decoded(Path("out/samples.png"))
    shown = cells(page, size[2])
    assert shown.shape[:3] == size and len(found) == frames and told == labels
    images = images.reshape(-1, 4 if size[0] == 6 else 1, *images.shape[1:]).swapaxes(0, 1)
    if size[0] == 6:
        originals = files.load(tiny)[0][files.split(200)[1][:size[1]]]
        assert np.array_equal(shown[0], originals)
        kept, shown = shown[1], shown[2:]
        if "top" in argv:
            assert np.array_equal(kept[:, :4], originals[:, :4]) and np.all(kept[:, 4:] == 128)
            assert np.all(shown[:, :, :4] == originals[:, :4])
            assert len({way.tobytes() for way in shown}) == 4
    images = images.reshape(-1, *images.shape[2:])
    assert np.array_equal(shown.reshape(-1, *shown.shape[2:])[:len(images)], images)


def test_the_frames_of_an_animation_run_from_noise_to_the_image(trained, call):
    """--animate: each x_t above the x̂_0 seen in it, at last the image twice: also the still."""
    argv = ["--weights", trained[0] / "checkpoint.safetensors", "--sampler", "ddim", "--steps", 3,
            "-n", 5, "--device", "cpu", "--batch", 2]
    assert call(sample, *argv, "--animate")[0] == 0
    last, frames = decoded(Path("out/samples.png"))
    pairs = [cells(frame, 16).reshape(-1, 2, 8, 8, 1)[:5] for frame in frames]
    x_t, predicted = zip(*(pair.swapaxes(0, 1) for pair in pairs))
    x_T = sample.image_noise(0, range(5), (8, 8, 1), "cpu")().numpy()
    assert np.abs(x_t[0] - np.clip(127.5 * x_T + 127.5, 0, 255)).max() <= 1
    assert [np.array_equal(*pair) for pair in zip(x_t, predicted)] == [False, False, False, True]
    assert np.array_equal(x_t[-1], drawn(call, *argv)[0]) and np.array_equal(last, frames[-1])
    config = replace(CONFIG, T=50)
    shown = sample.draw_images(network(config), config, Sampling(n=1, animate=True))
    assert len(shown) == 1 + 40                                  # of a long walk x_T and forty more


@pytest.fixture
def random_network(coloured, tmp_path):
    """A network with random weights, trained as it were on the coloured images; and another."""
    settings_ = dict(data=str(coloured), image_shape=(3, 8, 8), num_classes=4, model_channels=8,
                     channel_mult=(1, 2), patch_size=2, T=6, beta_1=1e-6, beta_T=0.3,
                     fingerprint=files.fingerprint(*files.load(coloured)))
    net = network(Config(**settings_))
    saved(tmp_path / "net", net.state_dict(), **settings_)
    net.conv_out.bias.data += 0.5
    saved(tmp_path / "other", net.state_dict(), **settings_)


SAMPLING = [
    ({}, dict(sampler=["ddim"], steps=[3], sigma2=["beta_tilde"], clip=[False], label=[1, "none"],
              guidance=[3, 0], n=[3], weights=["other"], seed=[1])),
    (dict(sampler="ddim"), dict(sampler=["dpm"], eta=[0.5])),
    (dict(sampler="dpm"), dict(eta=[0.5])), (dict(start=2), dict(start=[4])),
    (dict(keep="top"), dict(keep=["bottom", "left", "coarse"], resample=[2], data=["turned.npz"]))]


def test_every_option_of_sampling_changes_what_is_drawn(random_network, coloured, call):
    """Options: each changes the images."""
    assert {name for _, changes in SAMPLING for name in changes} == {
        f.name for f in fields(Sampling)} - {"out", "batch", "animate", "device"}
    images, labels = files.load(coloured)
    np.savez("turned.npz", images=images[:, ::-1], labels=labels)
    for base, changes in SAMPLING:
        one, _ = drawn(call, *words_of(dict(weights="net", n=4) | base))
        for name, value in ((name, value) for name in changes for value in changes[name]):
            other, _ = drawn(call, *words_of(dict(weights="net", n=4) | base | {name: value}))
            assert one.shape != other.shape or np.abs(one - other).max() > 2, name


def test_the_bound_of_the_held_out_images(random_network, coloured, call, watched, monkeypatch):
    """Ho (5): the network is evaluated on the images that were held out, each with its own label;
    then come terms and total, and the distances to the training images, all of them.
    """
    nearest, clock = Mock(wraps=evaluate.nearest), Mock(monotonic=Mock(side_effect=range(9)))
    monkeypatch.setattr(evaluate, "nearest", nearest)
    monkeypatch.setattr(console, "time", clock)
    status, text, errors = call(evaluate, "--weights", "net", "--device", "cpu")
    assert status == 0 and not errors and text.count("the bound: t = 1 ·") == 1
    assert text.startswith("net on cpu\n")
    assert "t = 6 · 32 images/s · 0:00:05 left" in text                   # 32 in each second
    rows, classes = files.split(40)[1], [k % 4 for k in range(10)]
    steps = [step for step in watched if len(step.x_t) != 10]        # ten images are of perfect.png
    assert [step.t.tolist() for step in steps] == [*([t] * 32 for t in (6, 5, 4, 3, 2)), [1] * 4]
    assert not any(step.training for step in watched)
    assert all(step.label.tolist() == classes for step in watched if len(step.x_t) == 10)
    schedule, (images, _) = ddpm.linear(6, 1e-6, 0.3), files.load(coloured)
    which = read_off(steps[5], schedule, coloured)[0]
    assert which.tolist() == rows.tolist() and steps[5].label.tolist() == (rows % 4).tolist()
    l_T = posterior.bits_per_dim(posterior.L_T(images[rows] / 127.5 - 1, schedule))
    for choice in ("beta", "beta_tilde"):
        line, = re.findall(rf"^{choice} .*", text, re.M)
        values = [float(word) for word in line.replace("±", " ").split()[1:]]
        assert values[6] == pytest.approx(values[0] + values[2] + values[4], abs=2e-3)
        assert values[7] == pytest.approx((values[3] ** 2 + values[5] ** 2) ** 0.5, rel=1e-2)
        assert values[0] == pytest.approx(l_T, abs=1e-4)
    assert "−log p(x_0) of 4 held-out" in text and "nearest of 36 training images" in text
    others, perfect, ours = [each.args for each in nearest.call_args_list]
    for name, each in dict(others=others, perfect=perfect, ours=ours).items():
        assert sorted(each[1][:, 0, 0, 0]) == sorted(images[files.split(40)[0]][:, 0, 0, 0])
        shown = re.search(rf"^{name} +(.*)", text, re.M)[1].split()
        assert shown == [f"{d:.3f}" for d in evaluate.nearest(*each)[0]]
        assert name != "perfect" or set(shown) == {"0.000"}
    assert np.array_equal(others[0], images[rows]) and min(map(float, shown)) > 0.1
    assert (perfect[0][:, 0, 0, 0] // 5 % 4).tolist() == classes
    above, copied, ours = cells(decoded(Path("out/perfect.png"))[0])
    assert np.array_equal(above, copied) and not np.array_equal(above, ours)


def test_the_bound_of_images_not_seen_before(random_network, coloured, call, watched):
    """--data: the bound is that of all images of another file; labels held out are not drawn."""
    images, labels = files.load(coloured)
    labels[labels == 2] = 3
    labels[files.split(40)[1]] = 2                                     # 2 is held out alone
    np.savez("other.npz", images=images[::-1], labels=labels + 1)
    status, text, _ = call(evaluate, "--weights", "net", "--data", "other.npz", "--device", "cpu")
    assert status == 0 and "of 40 held-out images" in text and "nearest of 36" in text
    assert text.count("labels 1 .. 4 become 0 .. 3") == 1
    perfect = next(step for step in watched if len(step.x_t) == 10)
    assert perfect.label.tolist() == [0, 1, 3, 0, 1, 3, 0, 1, 3, 0]
    which = read_off(watched[-1], ddpm.linear(6, 1e-6, 0.3), coloured)[0]
    assert sorted(which) == list(range(40)) != which.tolist()


def test_the_network_that_ships_is_shown_but_not_measured_on_what_it_has_seen(call):
    """evaluate.py, in a fresh clone: drawings beside the perfect network's, and why no bound."""
    status, text, errors = call(evaluate, "--weights", SHIPPED, "--device", "cpu")
    assert status == 0 and not errors and "no bound: " in text and "--data" in text
    assert text.count("0.000") == 10 and decoded(Path("out/perfect.png"))[0].std() > 30
    assert "drawn: out/perfect.png: the perfect network's, the nearest training images" in text


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def unfit(tmp_path_factory):
    """A folder of images and weights that do not fit, or whose names are no words."""
    folder, large = tmp_path_factory.mktemp("unfit"), np.zeros((99, 28, 28), np.uint8)
    evil = "\x1b]0;x\x07\x1b[2J\n\0\u202e" + 5000 * "A"               # moves cursors, fills screens
    (folder / "file").write_text("no folder")
    np.savez(folder / "small.npz", images=large[:, :8, :8], labels=np.arange(99) % 10)
    np.savez(folder / "few.npz", images=large, labels=np.arange(99) % 10)
    np.savez(folder / "bare.npz", images=large)
    np.savez(folder / "eleven.npz", images=large, labels=np.arange(99) % 11)
    np.savez(folder / "a.npz", **{"a\x1b[2J" + 50 * "B": np.zeros(3)})
    np.savez(folder / "b.npz", images=np.zeros(9, [(3000 * "x", "u1")]))
    (tensors, metadata), rgba = read_tensors(SHIPPED), Config(image_shape=(4, 8, 8), T=2)
    shipped = asdict(config_from(metadata))
    saved(folder / "c", tensors | {evil: torch.ones(1)}, **shipped)
    saved(folder / "d", tensors, **shipped | {evil: 1})
    saved(folder / "e", tensors, **shipped | dict(schedule=evil))
    saved(folder / "rgba", network(rgba).state_dict(), **asdict(rgba))
    tensors["conv_out.bias"] *= float("nan")
    saved(folder / "nan", tensors, **shipped)
    return folder


@pytest.mark.parametrize("command, says", {
    "train --T 0": "--T must be 1 .. 1000000, not 0", "train --T x": "invalid int",
    "train --beta-T nan": "--beta-T must be 1e-09 .. 0.9999, not nan",
    "train --device x": "no device 'x'", "train --device meta": "no device 'meta'",
    "train --device cuda:99": "no device 'cuda:99'", "train --nonsense": "unrecognized",
    "train --model-channels 7": "7 model channels must be an even number",
    "train --patch-size 3": "cannot halve images of 28x28: both sides must be multiples of 6",
    "train --out file/out": "file", "train --data a\nb": "a b: No such file",
    "train --resume": "start without --resume",
    "train --data a.npz": "it holds a?[2JBB", "train --data b.npz": "[('xxx",
    "sample --sampler x": "invalid choice", "sample --label 10": "must be 0 .. 9",
    "sample --eta 0.5": "--eta belongs to", "sample --start 1001": "--start must be 1 .. 1000",
    "sample --keep nose": "--keep must be one of left, ",
    "sample --out x.jpg": "must end in .png", "sample --out file/x.png": "file",
    "sample --keep left --data small.npz": "99 images of (8, 8, 1)",
    "sample --keep left --data few.npz -n 100": "few.npz has 99 images",
    "sample --keep left": "trained on other images than",
    "sample --weights missing": "missing: No such file",
    "sample --weights nan": "some pixels are not finite",
    "sample --weights rgba": "images of 4 channels are no .png: name an .npz",
    "sample --weights c": '"?]0;x??[2J ??AA', "sample --weights d": ": ?]0;x??[2J ??AA",
    "sample --weights e": "not '\\x1b]0;x\\x07",
    "evaluate --data small.npz": "99 images of (8, 8, 1)",
    "evaluate --data bare.npz": "trained with labels 0 .. 9",
    "evaluate --data eleven.npz": "trained with labels 0 .. 9",
    "evaluate --seed 1": "unrecognized"}.items())
def test_what_the_user_can_mend_is_told_in_one_line(command, says, unfit, call, monkeypatch):
    """Errors: one line on stderr that names the thing, status 2, no traceback, nothing written;
    names in a stranger's file move no cursor, and fill no screen.
    """
    monkeypatch.chdir(unfit)
    name, *argv = command.split(" ")
    module, always = dict(train=(train, dict(steps=1)), evaluate=(evaluate, dict(weights=SHIPPED)),
                          sample=(sample, dict(steps=1, weights=SHIPPED)))[name]
    status, _, errors = call(module, *words_of(always), *argv)
    line, = (line for line in errors.splitlines() if not line.startswith("usage: "))
    assert status == 2 and line.startswith(f"{name}.py: ") and says in line
    assert line.isprintable() and len(line) < 300
    assert not {*Path().glob("x.*"), *Path().glob("out/*")} - {Path("out/.lock")}


def script(error):
    """A script that says something and ends with this error, or by this signal."""
    def main():
        print("a word")
        print("another", file=sys.stderr)
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error
    return SimpleNamespace(__name__="x", main=main)


MEMORY = "x.py: not enough memory: a smaller --batch or network or larger --patch-size needs less\n"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]
NO_COMPILER = type("E", (RuntimeError,), dict(__module__="torch._inductor.exc"))


@pytest.mark.parametrize("error, status, says", [
    (MemoryError(), 2, MEMORY), (torch.OutOfMemoryError("CUDA out of memory. Tried\na"), 2, MEMORY),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate "
                  "memory: you tried to allocate 68719476736 bytes. Error code 12"), 2, MEMORY),
    (ValueError(999 * "a"), 2, f"x.py: {400 * 'a'}\n"), (SystemExit(2), 2, ""), *(
        (RuntimeError(why), 2, f"x.py: another of the processes has ended: {why}\n")
        for why in ("NCCL", "[gloo/tcp] closed")),
    (NO_COMPILER("no g++\n\nSet …"), 2, "x.py: --compile does not work here: no g++\n"),
    *((number, 128 + number, "") for number in SIGNALS)])
def test_how_a_script_ends(error, status, says, call, monkeypatch):
    """Memory, --compile: one line says why.  Signals: 128 and the signal's number, not a word.

    Many devices: what another process prints goes nowhere, and before it refuses it waits for the
    launcher, which sees the end of the first one and ends the others.
    """
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit(9)))
    monkeypatch.setattr(console.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    assert call(script(error)) == (status, "a word\n", "another\n" + says)
    monkeypatch.setenv("RANK", "1")
    assert call(script(error)) == (9, "", "")


@pytest.mark.parametrize("error", [RuntimeError("unsupported memory format"), KeyError("x")])
@pytest.mark.parametrize("rank", "01")
def test_a_bug_keeps_its_trace(error, rank, call, monkeypatch):
    """Errors: what the user cannot mend is not hidden, in any of several processes."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(console.time, "sleep", lambda seconds: None)
    with pytest.raises(type(error)):
        call(script(error))


def test_ctrl_c_is_quiet_while_python_still_imports():
    """Signals: `support` comes before all that takes a second, and then no trace is printed."""
    early = subprocess.run([sys.executable, "-c", "import support; raise KeyboardInterrupt"],
                           cwd=ROOT, capture_output=True)
    assert early.returncode in (130, -2) and not early.stderr
    for script in (train, evaluate):
        first = next(line for line in inspect.getsource(script).splitlines() if "import" in line)
        assert first.startswith("import support ")


def test_help_and_a_reader_who_has_gone(tmp_path, monkeypatch):
    """Scripts without options: --help says what they are, even where there is no ε; where nobody
    reads, they end as by SIGPIPE, without a word; and where stdout was closed before, they go on.
    """
    told = subprocess.run([sys.executable, ROOT / "ddpm.py", "--help"], capture_output=True,
                          env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert told.returncode == 0 and ddpm.__doc__.strip().encode("ascii", "replace") in told.stdout
    process = subprocess.Popen([sys.executable, ROOT / "ddpm.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + 13
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.run_script(lambda: console.Progress(1)(1, "done"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the malloc of Linux")
def test_what_is_freed_stays_for_the_next_step(monkeypatch):
    """Memory: 32 MB used over and over are new pages at most twice; elsewhere there is no harm."""
    resource = pytest.importorskip("resource")
    used = functools.partial(resource.getrusage, resource.RUSAGE_SELF)
    devices.choose_device("cpu")
    before = used().ru_minflt
    for _ in range(20):
        blocks = [np.ones(1 << 20, np.float32) for _ in range(8)]
        del blocks
    assert (used().ru_minflt - before) * resource.getpagesize() < 2 * (32 << 20)
    for other in (TypeError, OSError, AttributeError):
        monkeypatch.setattr(devices.ctypes, "CDLL", Mock(side_effect=other))
        devices.keep_memory()


@pytest.mark.parametrize("names, code, says", [
    (["ddpm", "posterior", "sample"], "from sample import *; print(len([*algorithm_2("
     "lambda x, t: x, ddpm.linear(9), ddpm.linear(9).beta, lambda: torch.ones(1))]))", ["10\n"]),
    (["ddpm", "posterior"], "import posterior, sys; print('torch' in sys.modules)", ["False\n"]),
    (["unet"], "import runpy; runpy.run_path('unet.py', run_name='__main__')",
     ["train.py's default network has "
      f"{unet.parameters(unet.UNet(Config(num_classes=10))):,} parameters\n\n",
      "has 35,746,307 parameters\n\n"])])
def test_each_file_that_is_said_to_stand_alone_does(names, code, says, tmp_path):
    """sample.py needs ddpm.py and posterior.py alone, these NumPy alone, and unet.py PyTorch alone:
    in a folder with nothing else they import, draw and print.
    """
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                           text=True)
    assert not found.stderr and all(text in found.stdout for text in says)


# ── What each option can be ───────────────────────────────────────────────────────────────────────

RANGES = {
    Config: dict(
        steps=(1, 10**9), batch=(1, 10**5), lr=(1e-9, 1.0), muon_lr=(0.0, 1.0), warmup=(1, 10**9),
        beta2=(0.0, 0.999999), grad_clip=(1e-9, 1e9), ema_decay=(0.0, 1.0), p_uncond=(0.0, 1.0),
        seed=(0, 2**62), T=(1, 10**6), beta_1=(1e-9, 0.9999), beta_T=(1e-9, 0.9999),
        model_channels=(4, 4096), channel_mult=(1, 64), num_res_blocks=(1, 16),
        attention_resolutions=(0, 8192), dropout=(0.0, 0.99), num_groups=(1, 4096),
        patch_size=(1, 64), image_shape=(1, 8192), num_classes=(0, 10**4)),
    Sampling: dict(steps=(1, 10**6), eta=(0.0, 1.0), guidance=(0.0, 100.0), start=(0, 10**6),
                   resample=(1, 1000), n=(1, 10**6), batch=(1, 10**5), seed=(0, 2**62))}


def refused(why):
    """ValueError, for this reason; or if there is none, no error."""
    return pytest.raises(ValueError, match=why) if why else contextlib.nullcontext()


@pytest.mark.parametrize("settings_", RANGES)
def test_each_range_has_its_two_ends(settings_):
    """Options: both ends are taken, but not what lies just outside or is of another type."""
    rules = {f.name: f.default for f in fields(settings_) if f.metadata["low"] is not None}
    assert rules.keys() == RANGES[settings_].keys()
    for name, (low, high) in RANGES[settings_].items():
        beyond = [low - 1, high + 1] if isinstance(low, int) else [
            math.nextafter(low, -np.inf), math.nextafter(high, np.inf)]
        others = map(float if isinstance(low, int) else round, (low, high))
        needed = dict(eta=dict(sampler="ddim"), resample=dict(keep="top")).get(name, {})
        told = re.escape(f"{flag(name)} must be {low} .. {high}, not ")
        for value, why in zip([low, high, *beyond, *others, True], ["", "", *[told] * 5]):
            with refused(why):
                settings_(**{name: (value,) if isinstance(rules[name], tuple) else value}, **needed)


def test_what_belongs_together():
    """Options: of all combinations those are refused that mean nothing, and the cause is told."""
    for sampler, sigma2, eta, keep, start, resample in itertools.product(
            ("ddpm", "ddim", "dpm"), ("beta", "beta_tilde"), (0.0, 0.5, 1.0),
            (None, "top", "a.npy"), (0, 9), (1, 2)):
        causes = {"--sigma2 belongs": sampler in ("ddim", "dpm") and sigma2 == "beta_tilde",
                  "--eta belongs": sampler == "ddpm" and eta < 1,
                  "--resample belongs": keep is None and resample == 2,
                  "name one of them": keep is not None and start == 9,
                  "--keep works with": keep is not None and sampler == "dpm"}
        with refused("|".join(cause for cause, is_so in causes.items() if is_so)):
            Sampling(sampler, sigma2=sigma2, eta=eta, keep=keep, start=start, resample=resample)
    for named in ({}, dict(beta_1=0.01), dict(beta_T=0.01), dict(beta_1=0.01, beta_T=0.03)):
        assert Config(**named).schedule == "linear"
        with refused("belong to --schedule linear" if named else ""):
            Config(schedule="cosine", **named)
    assert labels_for(Sampling(), 0) is labels_for(Sampling(label="none"), 0) is None
    for named in (dict(label="3"), dict(guidance=2.0)):
        with refused("knows no labels"):
            labels_for(Sampling(**named), 0)


def test_the_figures_in_the_help_are_those_that_do_so(tmp_path):
    """Options: the number that the help names before what it does is the one that does it."""
    def number(name, does, settings_=Sampling):
        told = settings_.__dataclass_fields__[name].metadata["help"]
        return float(re.search(rf"(\d+):? {does}", told)[1])
    label, schedule = torch.tensor([3]), ddpm.linear(3)
    for does, found in (("ignores the label", 7), ("follows it", 3)):
        assert sample.guided(lambda x_t, t, c: c, label, label, label, number("guidance", does),
                             7) == found
    for does, variance in (("none", 0), ("that of beta_tilde", posterior.beta_tilde(2, schedule))):
        spread = np.ptp([sample.ddim_step(1.0, 2, 0.5, z, schedule, number("eta", does))
                         for z in (0, 1)])
        assert spread ** 2 == pytest.approx(variance)
    assert not Sampling(start=int(number("start", "draw from noise"))).start
    np.save(tmp_path / "mask.npy", np.full((4, 4), number("keep", "where the image is kept")))
    assert projection(str(tmp_path / "mask.npy"), 4, 4)(torch.ones(4, 4)).all()
    alone = int(number("attention_resolutions", "only the middle has it", Config))
    net = unet.UNet(Config(attention_resolutions=(alone,)))
    assert sum(isinstance(module, unet.Attention) for module in net.modules()) == 1
    assert len(optimizers(net, 1.0, 0.9, number("muon_lr", "Adam for all", Config))) == 1
    assert unet.PAPER.patch_size == number("patch_size", "is the paper", Config)
