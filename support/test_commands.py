"""The commands, as a user runs them: that what is proved of the formulas reaches the pictures.

With betas of 1e-6 an x_t tells its x_0 exactly, and what is left of it is ε.
"""
import contextlib
import functools
import inspect
import itertools
import json
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
import support.weights
import train
import unet
from support import console, devices
from support import data as files
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


# ── The demonstrations ────────────────────────────────────────────────────────────────────────────

def is_a_row_of_ddpm(row):
    """V1, V2, V4: means and variances of 100 draws, to five standard errors, and the SNR."""
    t, *found, snr = row
    schedule, var_0 = ddpm.linear(), 1 - (704 / 1024) ** 2       # 864 pixels are paper, 160 are ink
    kept, added = schedule.alpha_bar[int(t)], schedule.beta[:int(t) + 1].sum()
    variances = [found.pop(5), found.pop(2)]
    assert variances == pytest.approx([1 - kept * (1 - var_0), var_0 + added], rel=0.022)
    assert found == pytest.approx([1, -1, kept ** 0.5, -kept ** 0.5], abs=0.13)
    assert snr == pytest.approx(1 / (1 / kept - 1) if t else np.inf, rel=0.006)


def is_a_row_of_posterior(row):
    """Ho (7): A1, A2 and β̃ make of a draw from q(x_t|x_0) one from q(x_{t−1}|x_0), at the distance
    from x_0 that it has, to five standard errors of 784 pixels.
    """
    t, a1, a2, beta_tilde, distance = row
    schedule, x0 = ddpm.linear(), files.to_pixels(files.load()[0][7])
    (before, now), beta = schedule.alpha_bar[int(t) - 1:int(t) + 1], schedule.beta[int(t)]
    assert a1 * now ** 0.5 + a2 == pytest.approx(before ** 0.5, abs=2e-6)
    assert a1 ** 2 * (1 - now) + beta_tilde == pytest.approx(1 - before, abs=5e-6)
    assert beta_tilde * (1 - now) == pytest.approx(beta * (1 - before), rel=1e-3)
    assert distance ** 2 == pytest.approx(
        (1 - before ** 0.5) ** 2 * (x0 ** 2).mean() + 1 - before, rel=5 * (2 / 784) ** 0.5)


@pytest.mark.parametrize("module, picture, says, is_row", [
    (ddpm, "out/letter.png", "naive: the letter stays", is_a_row_of_ddpm),
    (posterior, "out/posterior.png", "from 0.000128 to 1.  A1 grows to 0.99415 at t = 462, then",
     is_a_row_of_posterior),
    (unet, None, "train.py's default network has "
     f"{unet.parameters(unet.UNet(Config(num_classes=10))):,} parameters", None)])
def test_the_demonstrations(module, picture, says, is_row, call):
    """V, its two notebooks: each script alone draws its picture and prints its figures."""
    status, text, errors = call(module)
    assert status == 0 and says in text and not errors
    rows = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    assert len(rows) == {ddpm: 7, posterior: 9, unet: 0}[module]
    for row in rows:
        is_row(map(float, row))
    rows = sorted(ROOT.glob(f"assets/{Path(picture).stem}*.png")) if picture else []
    for k, asset in enumerate(rows):                        # the reading guide shows it row by row
        row, page = decoded(asset)[0].astype(int), decoded(Path(picture))[0]
        assert row.std() > 10 and np.abs(row - page[k * (len(row) - 2):][:len(row)]).max() <= 1
    assert len(rows) == (0 if picture is None else 4 if module is ddpm else 1)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

def test_training_says_what_it_does_and_the_loss_falls(trained, tiny):
    """Algorithm 1: what to expect, one line now and then, the next command; the files."""
    out, printed, errors = trained
    images, labels = files.load(tiny)
    least, known = evaluate.least_loss(images, labels, config_from(read_tensors(
        out / "checkpoint.safetensors")[1]), draws=1000)
    net, _ = load_network(out / "network.safetensors", torch.device("cpu"))
    for text in ("device    cpu", f"network   {unet.parameters(net):,} parameters",
                 "180 of 8x8x1 to train on, 20 held out, 2 labels, pixels 0 .. 239",
                 "linear, T = 20: L_T = 0.00", "1 for a network that predicts no noise; "
                 f"{least:.4f}, the least there is for {known} of\n          these images",
                 "step 100 of 100 · loss", "images/s", "next: python sample.py"):
        assert text in printed, text
    assert not errors and "\r" not in printed and known == 180
    rows = [line.split(",") for line in (out / "log.csv").read_text().split()]
    losses, held_out = [float(row[1]) for row in rows[1:]], [row[2] for row in rows[1:]]
    assert [row[0] for row in rows] == ["step", *(str(10 * k) for k in range(1, 11))]
    assert least < losses[-1] < losses[0] < 1.2 and losses[-1] < 0.5
    assert [bool(loss) for loss in held_out] == 5 * [False, True]            # where it is saved
    assert 0.5 < float(held_out[-1]) / losses[-1] < 2 and f"held out {float(held_out[-1]):.4f}" in (
        printed.split("step 100 of 100")[1])
    for k in (20, 40, 60, 80, 100):
        assert decoded(out / f"step-{k:06}.png")[0].shape == (10 * 18 + 2, 10 * 18 + 2, 1)


def test_a_label_without_a_training_image_is_told(call, short):
    """Data: before training begins, the label whose only image is held out."""
    labels = np.arange(99) % 2
    labels[files.split(99)[1][0]] = 2
    np.savez("rare.npz", images=np.zeros((99, 8, 8), np.uint8), labels=labels)
    text = call(train, "--data", "rare.npz", "--steps", 1, "--batch", 2, *SMALL)[1]
    assert "label 2 has no image to train on" in text.split("step 1")[0]


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


def read_off(x_t, t, schedule):
    """Which image each x_t comes from, whether mirrored, and its ε."""
    level = (x_t.double().numpy() + 1) * 127.5
    assert np.abs(level[:, 2] - 64).max() < 2                              # blue is the third
    assert np.abs(level[:, 1, 0] - 100).max() < 2                          # and up is up
    which, mirrored = np.rint(level[:, 0].mean((1, 2)) / 5).astype(int), level[:, 1, 4, 0] > 100
    x0 = np.zeros(x_t.shape)
    for k, (image, mirror) in enumerate(zip(which, mirrored)):
        picture = np.zeros((3, 8, 8))
        picture[0], picture[1, :, 4:], picture[1, 0], picture[2] = 5 * image, 200, 100, 64
        x0[k] = (picture[:, :, ::-1] if mirror else picture) / 127.5 - 1
    return which, mirrored, ddpm.eps_from_x0(x_t.double().numpy(), t.numpy().reshape(-1, 1, 1, 1),
                                             x0, schedule)


def test_the_network_is_trained_on_what_algorithm_1_says(coloured, call, watched):
    """Algorithm 1 in `python train.py`: x_0 from the training part, each with its own label, or
    none; each its own t and ε, at the noise level of its t; the loss in log.csv is theirs; dropout
    is active; the average alone, without dropout, is what is tried on the images held out, whose
    loss stands beside it, and what draws.

    Five standard errors of 640 images: a false alarm once in 10⁶; a share that is off by a tenth,
    and a noise level by 2%, are found.
    """
    assert call(train, "--data", coloured, "--steps", 10, "--batch", 64, "--flip", "--dropout", 0.2,
                "--p-uncond", 0.25, *CLEAR, *SMALL)[0] == 0
    steps, held_out, drawn = watched[:10], watched[10], watched[11:]
    schedule, losses, seen = ddpm.linear(4, 1e-6, 1e-6), [], []
    for step in steps:
        assert step.training and step.dropout == {0.2} and step.x_t.shape == (64, 3, 8, 8)
        which, mirrored, eps = read_off(step.x_t, step.t, schedule)
        dropped = step.label.numpy() == 4
        assert np.array_equal(step.label[~dropped], which[~dropped] % 4) and len(set(which)) > 20
        assert np.array_equal(np.bincount(step.t), [0] + [16] * 4)                  # stratified
        losses.append(((step.output.double().numpy() - eps) ** 2).mean((1, 2, 3)))
        seen.append((which, mirrored, dropped, eps))
    which, mirrored, dropped, eps = map(np.concatenate, zip(*seen))
    assert set(which) == set(files.split(40)[0])
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 640 ** 0.5
    assert abs(dropped.mean() - 0.25) < 5 * 0.434 / 640 ** 0.5
    t = torch.cat([step.t for step in steps]).numpy()
    for each in (1, 2, 3, 4):
        z = eps[t == each]
        assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    similar = np.corrcoef(eps.reshape(640, -1)) - np.eye(640)
    assert np.abs(similar).max() < 0.5                                          # of 192 pixels
    row = [float(part) for part in Path("out/log.csv").read_text().split()[1].split(",")]
    which, _, eps = read_off(held_out.x_t, held_out.t, schedule)
    assert list(which) == files.split(40)[1].tolist() and held_out.t.tolist() == [1, 2, 3, 4]
    assert held_out.label.tolist() == (which % 4).tolist()
    held_out_loss = ((held_out.output.double().numpy() - eps) ** 2).mean()
    np.testing.assert_allclose(row, [10, np.mean(losses), held_out_loss], rtol=1e-4)
    (run, saved_as), (shared, told) = (read_tensors(Path("out", f"{name}.safetensors"))
                                       for name in ("checkpoint", "network"))
    assert [config_from(each).data for each in (saved_as, told)] == [str(coloured), None]
    assert len(drawn) == 2 * 4 and not any(step.training for step in drawn)    # 64, then 36
    assert torch.equal(held_out.bias, run["ema.conv_in.bias"]) and not held_out.training
    for step, first, last in zip(drawn, 4 * [0] + 4 * [64], 4 * [64] + 4 * [100]):
        assert torch.equal(step.bias, run["ema.conv_in.bias"])
        assert not torch.equal(step.bias, run["net.conv_in.bias"])
        assert step.label.tolist() == (np.arange(100) // 25)[first:last].tolist()
    assert all(torch.equal(p, run[f"ema.{name}"].half()) for name, p in shared.items())
    assert call(sample, "-n", 1, "--device", "cpu")[0] == 0
    assert torch.equal(watched[-1].bias, run["ema.conv_in.bias"]) and not watched[-1].training


def test_a_picture_of_the_training_takes_ten_steps(coloured, call, watched, monkeypatch):
    """Drawing: ten calls of the network at the squares of 1 .. 10, always from the same noise."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    call(train, "--data", coloured, "--steps", 2, "--batch", 100, *SMALL)
    drawn = [step for step in watched if not step.training and len(step.x_t) == 100]
    assert [int(step.t[0]) for step in drawn] == 2 * [1000, 810, 640, 490, 360, 250, 160, 90, 40,
                                                      10]
    assert torch.equal(drawn[0].x_t, drawn[10].x_t)


@pytest.mark.parametrize("named, schedule", [
    (["--schedule", "cosine", "--T", 5], ddpm.cosine(5)),
    (["--T", 5, "--beta-1", 0.2, "--beta-T", 0.7], ddpm.linear(5, 0.2, 0.7)), ([], ddpm.linear())])
def test_the_noise_is_that_of_the_schedule_that_was_named(named, schedule, call, watched):
    """--schedule, --T, --beta-1, --beta-T: black images in training have mean −√ᾱ_t and variance
    1 − ᾱ_t, and sampling begins at t = T.

    Five standard errors of 64 pixels a t: z has mean 0 and variance 1 over all of them; an ᾱ_t of
    another schedule is found.
    """
    np.savez("black.npz", images=np.zeros((50, 8, 8), np.uint8))
    _, text, _ = call(train, "--data", "black.npz", "--steps", 3, "--batch", 100, *named, *SMALL)
    z = []
    for step in watched[:3]:
        mean, variance = ddpm.q_marginal(-1, step.t.numpy(), schedule)
        z.append((step.x_t.numpy() - mean.reshape(-1, 1, 1, 1))
                 / np.sqrt(variance).reshape(-1, 1, 1, 1))
        assert step.t.min() >= 1 and schedule.T * 0.9 < step.t.max() <= schedule.T
    z = np.array(z)
    assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    assert watched[4].t.tolist() == [schedule.T] * 100
    l_T = posterior.bits_per_dim(posterior.L_T(-np.ones(1), schedule))
    assert f"T = {schedule.T}: L_T = {l_T:.3g} bits/dim" in text
    assert ("x_T IS NOT YET NOISE" in text) == (l_T > 0.01) == ("--beta-T" in named)


@pytest.mark.parametrize("extra, bfloat16", [([], True), (["--float32"], False)])
def test_bfloat16_is_used_where_it_can_be(extra, bfloat16, coloured, call, watched, monkeypatch):
    """Precision: training, sampling and evaluation are in bfloat16 where the device has it, and
    not with --float32.
    """
    for name in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
        assert devices.precision(torch.device("cpu"), False) == "bfloat16"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    text = call(train, "--data", coloured, "--steps", 1, "--batch", 4, *extra, *CLEAR, *SMALL)[1]
    assert torch.backends.cudnn.allow_tf32 == bfloat16           # float32 means float32
    assert f"device    cpu, {'bfloat16' if bfloat16 else 'float32'}\n" in text
    seen = [len(watched)]
    call(sample, "--steps", 1, "-n", 2, "--device", "cpu")
    seen.append(len(watched))
    call(evaluate, "--device", "cpu")
    assert 0 < seen[0] < seen[1] < len(watched)
    assert all(step.bfloat16 == bfloat16 for step in watched)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert devices.precision(torch.device("cpu"), False) == "float32"


def test_what_is_asked_of_torch_is_done(coloured, call, monkeypatch):
    """--deterministic, --compile: so is each step of training, and only if it is named; where the
    compiler fails, one line says why.
    """
    failure = type("E", (RuntimeError,), dict(__module__="torch._inductor.exc"))("no g++\n\nSet …")
    seen, calls, step_down = [], Mock(side_effect=[None, failure]), train.update_ema
    monkeypatch.setattr(torch, "compile", lambda net: lambda *args: calls() or net(*args))
    monkeypatch.setattr(train, "update_ema", lambda *args: step_down(*args) or seen.append((
        torch.are_deterministic_algorithms_enabled(), calls.call_count)))
    for name, argv in (("a", []), ("b", ["--deterministic"]), ("c", ["--compile"])):
        assert call(train, "--data", coloured, "--steps", 1, "--out", name, *argv, *SMALL)[0] == 0
    assert seen == [(False, 0), (True, 0), (False, 1)]
    assert call(train, "--data", coloured, "--compile", *SMALL)[::2] == (
        2, "train.py: --compile does not work here: no g++\n")


TRAINING = [
    ("labels", ["--no-labels"]), ("flip", ["--flip"]), ("steps", ["--steps", 4]),
    ("batch", ["--batch", 8]), ("lr", ["--lr", 0.01]), ("muon_lr", ["--muon-lr", 0]),
    ("warmup", ["--warmup", 1]), ("decay", ["--no-decay"]), ("beta2", ["--beta2", 0.5]),
    ("grad_clip", ["--grad-clip", 0.001]), ("ema_decay", ["--ema-decay", 0.1]),
    ("p_uncond", ["--p-uncond", 0.9]), ("stratified", ["--no-stratified"]),
    ("seed", ["--seed", 5]), ("float32", ["--float32"]),
    ("schedule", ["--schedule", "cosine"]), ("T", ["--T", 7]), ("beta_1", ["--beta-1", 0.01]),
    ("beta_T", ["--beta-T", 0.1]), ("model_channels", ["--model-channels", 16]),
    ("channel_mult", ["--channel-mult", 1]), ("num_res_blocks", ["--num-res-blocks", 2]),
    ("attention_resolutions", ["--attention-resolutions", 4]), ("dropout", ["--dropout", 0.5]),
    ("num_groups", ["--num-groups", 2]), ("patch_size", ["--patch-size", 1]),
    ("data", ["--data", "other.npz"])]


@pytest.fixture(scope="module")
def plain_run():
    """The final state of the run without any of these options, kept from its first use."""
    return []


@pytest.mark.parametrize("name, argv", TRAINING, ids=[name for name, _ in TRAINING])
def test_every_option_of_training_changes_what_is_trained(name, argv, plain_run, call, monkeypatch):
    """Options: each changes its own setting in the checkpoint and no other, and with it the
    parameters or their average.
    """
    assert {name for name, _ in TRAINING} == {f.name for f in fields(Config) if f.metadata["help"]}
    for part in ("draw_samples", "announce"):
        monkeypatch.setattr(train, part, lambda *args: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(30) % 3)
    np.savez("other.npz", images=images[::-1], labels=np.arange(30) % 3)
    base = ["--data", "images.npz", "--steps", 3, "--batch", 6, *SMALL, "--warmup", 2]
    if not plain_run:
        assert call(train, *base)[0] == 0
        plain_run.extend(read_tensors(Path("out/checkpoint.safetensors")))
    assert call(train, *base, *argv, "--out", "changed")[0] == 0
    changed, metadata = read_tensors(Path("changed/checkpoint.safetensors"))
    plain, settings_ = plain_run[0], asdict(config_from(plain_run[1]))
    follows = dict(labels={"num_classes"}, data={"fingerprint"}).get(name, set())
    found = asdict(config_from(metadata))
    differ = {key for key, value in found.items() if value != settings_[key]}
    if name == "labels":                                # the fingerprint is of images and labels
        differ -= {"fingerprint"}
    assert differ == {name} | follows
    assert changed.keys() != plain.keys() or any(
        p.shape != changed[key].shape or not torch.equal(p, changed[key])
        for key, p in plain.items() if key.startswith(("net.", "ema.")))
    if name == "ema_decay":
        assert all(torch.equal(p, changed[key]) for key, p in plain.items() if key[:4] == "net.")


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
    argv = ["--preset", "cifar10", "--data", tiny, "--steps", 2, "--model-channels", 32, "--batch",
            4, "--T", 5, "--no-flip", "--attention-resolutions", 4, 2, "--num-res-blocks", 1,
            "--channel-mult", 1, 2, "--device", "cpu"]
    assert call(train, *argv)[0] == 0
    found = asdict(config_from(read_tensors(Path("out/checkpoint.safetensors"))[1]))
    assert found == asdict(PRESETS["cifar10"]) | dict(
        data=str(tiny), steps=2, model_channels=32, batch=4, T=5, flip=False,
        attention_resolutions=(4, 2), image_shape=(1, 8, 8), num_res_blocks=1, channel_mult=(1, 2),
        fingerprint=found["fingerprint"])


# ── Sampling and evaluation ───────────────────────────────────────────────────────────────────────

def test_the_default_is_algorithm_2():
    """Algorithm 2: ddpm, all steps, σ² = β, guidance 1, and every other default of sampling; the
    help shows them.
    """
    assert asdict(Sampling()) == dict(
        sampler="ddpm", steps=1000, sigma2="beta", eta=1.0, clip=True, guidance=1.0,
        label="each", start=0, keep=None, resample=1, n=100, batch=100, weights=None,
        out="out/samples.png", animate=False, data=None, device=None, seed=0)
    for parser, settings_ in ((train.arguments(), Config), (sample.arguments(), Sampling)):
        text = " ".join(parser.format_help().split())
        for rule in fields(settings_):
            shown = rule.default
            shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
            if rule.metadata["help"]:
                told = rule.metadata["help"] + (f" ({shown})" if shown is not None else "")
                assert " ".join(told.split()) in text, told


def test_sampling_draws_what_was_learned(trained, call):
    """Algorithm 2: the sheet's images have a bright half, and labels choose which."""
    status, text, errors = call(
        sample, "--weights", trained[0] / "checkpoint.safetensors", "--guidance", 3, "-n", 40,
        "--batch", 25, "--out", "new/folder/s.npz")
    assert text.endswith(f"drawn: {Path('new/folder/s.npz')}, with --seed 0\n")
    assert status == 0 and "ddpm, 20 steps" in text and "images/s" in text and not errors
    assert "step 0 of 20 · images 1 to 25 of 40\n" in text
    assert "step 20 of 20 · images 26 to 40 of 40 · " in text
    found = np.load("new/folder/s.npz")
    images, labels = found["images"].astype(int), found["labels"]
    assert (images.shape == (40, 8, 8, 1) and found["images"].dtype == np.uint8
            and labels.tolist() == [0, 1] * 20)
    brighter_left = images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))
    assert (brighter_left == (labels == 0)).mean() > 0.8


@pytest.mark.parametrize("options", [
    ["--sigma2", "beta_tilde"], ["--sampler", "ddim", "--steps", 4, "--eta", 0.5],
    ["--sampler", "dpm", "--steps", 4, "--guidance", 2, "--label", 1],
    ["--keep", "left", "--label", 1]])
def test_the_same_pictures_whatever_the_batch(options, trained, call, monkeypatch):
    """Determinism: same seed, same images; -n 12 is -n 12 --batch 5 to within the rounding of sums
    in another order; another seed is not.
    """
    monkeypatch.setattr(devices, "precision", lambda device, float32: "float32")
    weights = ["--weights", trained[0] / "checkpoint.safetensors", "-n", 12, *options]
    for name, extra in (("a", []), ("b", []), ("c", ["--batch", 5]), ("d", ["--seed", 1])):
        assert call(sample, *weights, "--device", "cpu", "--out", f"{name}.npz", *extra)[0] == 0
    a, b, c, d = (np.load(f"{name}.npz") for name in "abcd")
    assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["labels"], b["labels"])
    assert np.array_equal(a["labels"], c["labels"])
    assert np.abs(a["images"].astype(int) - c["images"]).max() <= 1
    assert np.abs(a["images"].astype(int) - d["images"]).max() > 20
    if "--label" not in options:
        assert a["labels"].tolist() == d["labels"].tolist() == [0, 1] * 6


@pytest.mark.parametrize("extra, size, frames, labels", [
    (["-n", 5, "--label", 1], (2, 3, 16), 0, [1] * 5),
    (["-n", 4, "--animate"], (2, 2, 32), 4, [0, 1, 0, 1]),
    (["-n", 5], (3, 2, 16), 0, [0, 1, 0, 1, 0]), (["-n", 2, "--guidance", 0], (1, 2, 16), 0, None),
    (["-n", 4, "--label", "none"], (2, 2, 16), 0, None),
    (["-n", 2, "--keep", "top", "--resample", 2, "--label", 1], (6, 2, 16), 0, [1] * 8),
    (["-n", 2, "--keep", "top", "--animate"], (6, 2, 16), 4, None),
    (["-n", 3, "--keep", "coarse"], (6, 3, 16), 0, None),
    (["-n", 2, "--start", 9], (6, 2, 16), 0, None)])
def test_pictures_of_all_kinds(extra, size, frames, labels, trained, call):
    """A sheet, a column per class, columns of original, kept, completions; animations from x_T to
    x_0, with x̂_0 below.  .npz: the images alone, the last of each animation, and the labels that
    were followed, the four completions of an image alike.
    """
    argv = ["--weights", trained[0] / "checkpoint.safetensors", "--sampler", "ddim", "--steps", 3,
            "--device", "cpu", *extra]
    assert call(sample, *argv)[0] == call(sample, *argv, "--out", "x.npz")[0] == 0
    pixels, found = decoded(Path("out/samples.png"))
    rows, columns, height = size
    assert pixels.shape == (rows * (height + 2) + 2, columns * 18 + 2, 1) and len(found) == frames
    found = np.load("x.npz")
    assert (found["labels"].tolist() if "labels" in found else None) == labels
    first = pixels[2 + 36 * (rows == 6):][:height:2, 2:18:2]
    assert np.array_equal(found["images"][0], first) and len(found["images"]) % extra[1] == 0


def test_completions_keep_what_they_say(trained, tiny, call):
    """--keep top: the known half of each held-out image, exact, in four different completions; the
    picture shows the original and what is kept of it above them.
    """
    keep = ["--weights", trained[0] / "checkpoint.safetensors", "--steps", 3, "-n", 2, "--keep",
            "top", "--device", "cpu", "--out"]
    assert call(sample, *keep, "k.npz")[0] == call(sample, *keep, "k.png")[0] == 0
    original = files.load(tiny)[0][files.split(200)[1][:2], :, :, 0]
    completed = np.load("k.npz")["images"].reshape(4, 2, 8, 8)
    assert np.array_equal(completed[:, :, :4], np.broadcast_to(original[:, :4], (4, 2, 4, 8)))
    assert not np.array_equal(completed[0, 0], completed[1, 0])
    page = decoded(Path("k.png"))[0][..., 0]
    shown = [page[2 + 18 * row:18 * row + 18:2, 2 + 18 * k:18 * k + 18:2]
             for row in range(6) for k in range(2)]
    assert np.array_equal(shown[0], original[0]) and np.array_equal(shown[11], completed[3, 1])
    assert np.array_equal(shown[3][:4], original[1, :4]) and np.all(shown[3][4:] == 128)


def test_the_frames_of_an_animation_run_from_noise_to_the_image(trained, call):
    """--animate: each x_t above the x̂_0 that the network sees in it; at last the image twice.  A
    viewer without animation shows that last frame.
    """
    both = ["--weights", trained[0] / "checkpoint.safetensors", "--sampler", "ddim", "--steps", 3,
            "-n", 5, "--device", "cpu", "--batch", 2, "--out"]
    assert call(sample, *both, "way.png", "--animate")[0] == 0
    assert call(sample, *both, "x0.npz")[0] == 0
    last, frames = decoded(Path("way.png"))
    cells = [np.array([frame[2 + 34 * (i // 2):][:32:2, 2 + 18 * (i % 2):][:, :16:2]
                       for i in range(5)]) for frame in frames]
    x_t, predicted = [[cell[:, rows] for cell in cells] for rows in (slice(0, 8), slice(8, 16))]
    assert not np.array_equal(predicted[0], x_t[0]) and x_t[0].std() > 80 and len(frames) == 4
    assert np.array_equal(x_t[-1], np.load("x0.npz")["images"])
    assert np.array_equal(predicted[-1], x_t[-1]) and not np.array_equal(predicted[1], x_t[1])
    assert np.array_equal(last, frames[-1])
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


DDIM, KEEP = ["--sampler", "ddim"], ["--keep", "top"]
SAMPLING = [
    ("sampler", [], DDIM), ("sampler", DDIM, ["--sampler", "dpm"]), ("steps", [], ["--steps", 3]),
    ("sigma2", [], ["--sigma2", "beta_tilde"]), ("eta", DDIM, ["--eta", 0.5]),
    ("eta", ["--sampler", "dpm"], ["--sampler", "dpm", "--eta", 0.5]),
    ("clip", [], ["--no-clip"]), ("label", [], ["--label", 1]), ("label", [], ["--label", "none"]),
    ("guidance", [], ["--guidance", 3]), ("guidance", [], ["--guidance", 0]),
    ("keep", KEEP, ["--keep", "bottom"]), ("keep", KEEP, ["--keep", "left"]),
    ("keep", KEEP, ["--keep", "coarse"]), ("start", ["--start", 2], ["--start", 4]),
    ("resample", KEEP, ["--resample", 2]),
    ("n", [], ["-n", 3]), ("weights", [], ["--weights", "other"]),
    ("data", KEEP, ["--data", "turned.npz"]), ("seed", [], ["--seed", 1])]


def test_every_option_of_sampling_changes_what_is_drawn(random_network, coloured, call):
    """Options: each changes the images."""
    assert {name for name, _, _ in SAMPLING} | {"out", "batch", "animate", "device"} == {
        f.name for f in fields(Sampling)}
    images, labels = files.load(coloured)
    np.savez("turned.npz", images=images[:, ::-1], labels=labels)

    @functools.cache
    def drawn(*argv):
        assert call(sample, "--weights", "net", "-n", 4, "--device", "cpu", "--out", "x.npz",
                    *argv)[0] == 0
        return np.load("x.npz")["images"].astype(int)
    for name, base, extra in SAMPLING:
        one, other = drawn(*base), drawn(*base, *extra)
        assert one.shape != other.shape or np.abs(one - other).max() > 2, name


def test_the_bound_is_that_of_the_held_out_images(random_network, coloured, call, watched,
                                                  monkeypatch):
    """Ho (5): what is evaluated is the average, on the images that were held out, each with its own
    label and its own t; then come its terms and total, and the distances to the training images,
    all of them.
    """
    nearest, clock = Mock(wraps=evaluate.nearest), Mock(monotonic=Mock(side_effect=range(9)))
    monkeypatch.setattr(evaluate, "nearest", nearest), monkeypatch.setattr(console, "time", clock)
    status, text, errors = call(evaluate, "--weights", "net", "--device", "cpu")
    assert status == 0 and not errors and text.count("the bound: t = 1 ·") == 1
    assert text.startswith("net on cpu\n")
    assert "t = 6 · 32 images/s · 0:00:05 left" in text                   # 32 in each second
    rows = files.split(40)[1]
    steps = [step for step in watched if len(step.x_t) != 10]        # ten images are of perfect.png
    assert [(step.t[0].item(), len(step.x_t)) for step in steps] == [
        *((t, 32) for t in (6, 5, 4, 3, 2)), (1, 4)]
    assert all(len(set(step.t.tolist())) == 1 and not step.training for step in watched)
    which = read_off(steps[5].x_t, steps[5].t, ddpm.linear(6, 1e-6, 0.3))[0]
    assert which.tolist() == rows.tolist() and steps[5].label.tolist() == (rows % 4).tolist()
    x0 = files.to_pixels(files.load(coloured)[0][rows].astype(float))
    terms = [line for line in text.splitlines() if line.startswith("beta")]
    assert [line.split()[0] for line in terms] == ["beta", "beta_tilde"]
    for line in terms:
        values = [float(word) for word in line.replace("±", " ").split()[1:]]
        assert values[6] == pytest.approx(values[0] + values[2] + values[4], abs=2e-3)
        assert values[7] == pytest.approx((values[3] ** 2 + values[5] ** 2) ** 0.5, rel=1e-2)
        l_T = posterior.bits_per_dim(posterior.L_T(x0, ddpm.linear(6, 1e-6, 0.3)))
        assert values[0] == pytest.approx(l_T, abs=1e-4)
    training = files.load(coloured)[0][files.split(40)[0]]
    assert "−log p(x_0) of 4 held-out" in text and "nearest of 36 training images" in text
    classes = [k % 4 for k in range(10)]
    assert all(step.label.tolist() == classes for step in watched if len(step.x_t) == 10)
    others, perfect, ours = nearest.call_args_list
    assert all(np.array_equal(np.sort(each.args[1][:, 0, 0, 0]), training[:, 0, 0, 0])
               for each in (others, perfect, ours))
    assert np.array_equal(others.args[0], files.load(coloured)[0][rows])
    assert (perfect.args[0][:, 0, 0, 0] // 5 % 4).tolist() == classes
    shown = [line.split()[1:] for line in text.splitlines() if
             line.startswith(("others", "perfect", "ours"))]
    for each, line in zip((others, perfect, ours), shown, strict=True):
        assert line == [f"{d:.3f}" for d in evaluate.nearest(*each.args)[0]]
    assert set(shown[1]) == {"0.000"} and min(map(float, shown[2])) > 0.1
    page = decoded(Path("out/perfect.png"))[0]
    above, copied, ours = (page[2 + 18 * row:18 * row + 18] for row in range(3))
    assert np.array_equal(above, copied) and not np.array_equal(above, ours)


def test_the_bound_of_images_that_the_network_has_not_seen(
        random_network, coloured, call, watched):
    """--data: of another file the network has seen no image, so the bound is that of all of them; a
    label whose images are held out is not drawn.
    """
    images, labels = files.load(coloured)
    labels[labels == 2], labels[files.split(40)[1]] = 3, 2             # 2 is held out alone
    np.savez("other.npz", images=images[::-1], labels=labels)
    status, text, _ = call(evaluate, "--weights", "net", "--data", "other.npz", "--device", "cpu")
    assert status == 0 and "of 40 held-out images" in text and "nearest of 36" in text
    perfect = [step.label.tolist() for step in watched if len(step.x_t) == 10]
    assert perfect[0] == [0, 1, 3, 0, 1, 3, 0, 1, 3, 0]
    which = read_off(watched[-1].x_t, watched[-1].t, ddpm.linear(6, 1e-6, 0.3))[0]
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
    """A folder of images and weights that do not fit."""
    folder, large = tmp_path_factory.mktemp("unfit"), np.zeros((99, 28, 28), np.uint8)
    (folder / "file").write_text("no folder")
    np.savez(folder / "small.npz", images=large[:, :8, :8], labels=np.arange(99) % 10)
    np.savez(folder / "few.npz", images=large, labels=np.arange(99) % 10)
    np.savez(folder / "bare.npz", images=large)
    np.savez(folder / "eleven.npz", images=large, labels=np.arange(99) % 11)
    tensors, metadata = read_tensors(SHIPPED)
    tensors["conv_out.bias"] *= float("nan")
    saved(folder / "nan", tensors, **asdict(config_from(metadata)))
    rgba = dict(image_shape=(4, 8, 8), T=2)
    saved(folder / "rgba", network(Config(**rgba)).state_dict(), **asdict(Config(**rgba)))
    return folder


@pytest.mark.parametrize("script, argv, says", [
    (train, ["--T", 0], "--T must be 1 .. 1000000, not 0"), (train, ["--T", "x"], "invalid int"),
    (train, ["--beta-T", "nan"], "--beta-T must be 1e-09 .. 0.9999, not nan"),
    (train, ["--device", "nonsense"], "no device 'nonsense'"),
    (train, ["--device", "meta"], "no device 'meta'"),
    (train, ["--device", "cuda:99"], "no device"),
    (train, ["--schedule", "x"], "invalid choice"), (train, ["--nonsense"], "unrecognized"),
    (train, ["--model-channels", 7], "7 model channels must be an even number"),
    (train, ["--patch-size", 3], "cannot halve images of 28x28: both sides must be multiples of 6"),
    (train, ["--out", "file/out"], "file"), (train, ["--data", "a\nb"], "a b: No such file"),
    (train, ["--resume"], "start without --resume"),
    (sample, ["--sampler", "x"], "invalid choice"), (sample, ["--label", 10], "must be 0 .. 9"),
    (sample, ["--eta", 0.5], "--eta belongs to"),
    (sample, ["--keep", "nose"], "--keep must be one of left, "),
    (sample, ["--start", 1001], "--start must be 1 .. 1000"),
    (sample, ["--out", "x.jpg"], "must end in .png"), (sample, ["--out", "file/x.png"], "file"),
    (sample, ["--keep", "left", "--data", "small.npz"], "99 images of (8, 8, 1)"),
    (sample, ["--keep", "left", "--data", "few.npz", "-n", 100], "few.npz has 99 images"),
    (sample, ["--keep", "left"], "trained on other images than"),
    (sample, ["--weights", "missing"], "missing: No such file"),
    (sample, ["--weights", "nan"], "some pixels are not finite"),
    (sample, ["--weights", "rgba"], "images of 4 channels are no .png: name an .npz"),
    (evaluate, ["--data", "small.npz"], "99 images of (8, 8, 1)"),
    (evaluate, ["--data", "bare.npz"], "trained with labels 0 .. 9"),
    (evaluate, ["--data", "eleven.npz"], "trained with labels 0 .. 9")])
def test_what_the_user_can_mend_is_told_in_one_line(script, argv, says, unfit, call, monkeypatch):
    """Errors: one line on stderr that names the thing, status 2, no traceback, nothing written."""
    monkeypatch.chdir(unfit)
    weights = [] if "--weights" in argv or script is train else ["--weights", SHIPPED]
    status, text, errors = call(script, *weights, *argv, *([] if script is evaluate else [
        "--steps", 1]))
    lines = [line for line in errors.splitlines() if not line.startswith("usage: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: ")
    assert says in errors and not {*Path().glob("x.*"), *Path().glob("out/*")} - {Path("out/.lock")}


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate "
                 "memory: you tried to allocate 68719476736 bytes. Error code 12"), MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\na")])
def test_too_little_memory_is_one_line(error, call, monkeypatch):
    """Memory: whatever it is that asks for too much, one line, and no trace."""
    monkeypatch.setattr(support.weights, "load_network", Mock(side_effect=error))
    status, _, errors = call(sample)
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith("sample.py: not enough memory: a smaller --batch or network or ")


def test_what_a_file_says_is_shown_in_one_line(call):
    """Errors: names in a stranger's file move no cursor, and fill no screen."""
    evil = "\x1b]0;x\x07\x1b[2J\n\0\u202e" + 5000 * "A"
    tensors, metadata = read_tensors(SHIPPED)
    config = json.loads(metadata["config"])
    np.savez("a", **{"a\x1b[2J" + 50 * "B": np.zeros(3)})
    np.savez("b", images=np.zeros(9, [(3000 * "x", "u1")]))
    saved(Path("c"), tensors | {evil: torch.ones(1)}, **config)
    saved(Path("d"), tensors, **config | {evil: 1})
    saved(Path("e"), tensors, **config | dict(schedule=evil))
    for script, argv in ((train, ["--data", "a.npz"]), (train, ["--data", "b.npz"]),
                         *((sample, ["--weights", name]) for name in "cde")):
        status, _, errors = call(script, *argv)
        assert status == 2 and errors[:-1].isprintable() and len(errors) < 300


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_script_that_is_stopped_says_so_by_its_status(name, status, call, monkeypatch):
    """Signals: 128 and the signal's number, and not a word."""
    monkeypatch.setattr(support.weights, "load_network",
                        lambda *_: signal.raise_signal(getattr(signal, name)))
    assert call(sample) == (status, "", "")


def test_ctrl_c_is_quiet_while_python_still_imports():
    """Signals: `support` comes before all that takes a second, and then no trace is printed."""
    early = subprocess.run([sys.executable, "-c", "import support; raise KeyboardInterrupt"],
                           cwd=ROOT, capture_output=True)
    assert early.returncode in (130, -2) and not early.stderr
    for script in (train, evaluate):
        first = next(line for line in inspect.getsource(script).splitlines() if "import" in line)
        assert first.startswith("import support ")


def test_help_and_a_reader_who_has_gone(tmp_path, monkeypatch):
    """Scripts without options: --help says what they are; where nobody reads, they end as by
    SIGPIPE, without a word; and where stdout was closed before, they go on.
    """
    told = subprocess.run([sys.executable, ROOT / "ddpm.py", "--help"], capture_output=True)
    assert told.returncode == 0 and ddpm.__doc__.strip() in told.stdout.decode()
    process = subprocess.Popen([sys.executable, ROOT / "ddpm.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + 13
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.run_script(lambda: console.Progress(1)(1, "done"))


def script(error):
    """A script that says something and ends with this error."""
    def main():
        print("a word"), print("another", file=sys.stderr)
        raise error
    return SimpleNamespace(__name__="x", main=main)


@pytest.mark.parametrize("error", [RuntimeError("unsupported memory format"), KeyError("x")])
def test_a_bug_keeps_its_trace(error, call, monkeypatch):
    """Errors: what the user cannot mend is not hidden, nor is it in any of several processes."""
    monkeypatch.setattr(console.time, "sleep", lambda seconds: None)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(type(error)):
            call(script(error))


@pytest.mark.parametrize("error, says", [
    (ValueError("x"), "x.py: x\n"), (SystemExit(2), ""),
    *((RuntimeError(why), f"x.py: another of the processes has ended: {why}\n")
      for why in ("NCCL", "[gloo/tcp] closed"))])
def test_of_several_processes_the_first_one_speaks(error, says, call, monkeypatch):
    """Many devices: what another one prints goes nowhere, and before it refuses it waits for the
    launcher, which sees the end of the first one and ends the others.
    """
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit(9)))
    monkeypatch.setattr(console.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    assert call(script(error)) == (2, "a word\n", "another\n" + says)
    monkeypatch.setenv("RANK", "1")
    assert call(script(error)) == (9, "", "")


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


def test_each_file_that_is_said_to_stand_alone_does(tmp_path):
    """sample.py needs ddpm.py and posterior.py alone, these NumPy alone, and unet.py PyTorch alone:
    in a folder with nothing else they import, draw and print.
    """
    for names, code in (
            (["ddpm", "posterior", "sample"], "import sample; sample.torch.manual_seed(0); "
             "print(len(list(sample.algorithm_2(lambda x, t: x / 2, sample.ddpm.linear(9), "
             "sample.ddpm.linear(9).beta, lambda: sample.torch.randn(1)))))"),
            (["ddpm", "posterior"], "import posterior, sys; print('torch' in sys.modules)"),
            (["unet"], "import runpy; runpy.run_path('unet.py', run_name='__main__')")):
        folder = tmp_path / names[-1]
        folder.mkdir()
        for name in names:
            shutil.copy(ROOT / f"{name}.py", folder)
        found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True,
                               text=True)
        assert not found.stderr and {"sample": "10\n", "posterior": "False\n"}.get(
            names[-1], "has 35,746,307 parameters\n\n") in found.stdout


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


@pytest.mark.parametrize("settings_", RANGES)
def test_each_range_has_its_two_ends(settings_):
    """Options: both ends are taken; what lies just outside is refused, and so are a fraction for a
    whole number, a whole number for a fraction, and yes for 1.
    """
    rules = {f.name: f for f in fields(settings_) if f.metadata["low"] is not None}
    assert rules.keys() == RANGES[settings_].keys()
    for name, ends in RANGES[settings_].items():
        def settings_with(value):
            several = isinstance(rules[name].default, tuple)
            return settings_(**{name: (value,) if several else value}, **dict(
                eta=dict(sampler="ddim"), resample=dict(keep="top")).get(name, {}))
        for end, far in zip(ends, (-np.inf, np.inf)):
            settings_with(end)
            whole = isinstance(end, int)
            beyond = end + (1 if far > 0 else -1) if whole else math.nextafter(end, far)
            for wrong in (beyond, float(end) if whole else round(end), True):
                with pytest.raises(ValueError, match=re.escape(
                        f"{flag(name)} must be {ends[0]} .. {ends[1]}, not ")):
                    settings_with(wrong)


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
        try:
            Sampling(sampler, sigma2=sigma2, eta=eta, keep=keep, start=start, resample=resample)
            told = ""
        except ValueError as error:
            told = str(error)
        wrong = [cause for cause, is_so in causes.items() if is_so]
        assert any(cause in told for cause in wrong) if wrong else not told
    for named in ({}, dict(beta_1=0.01), dict(beta_T=0.01), dict(beta_1=0.01, beta_T=0.03)):
        assert Config(**named).schedule == "linear"
        with pytest.raises(ValueError, match="belong to --schedule linear") if named else (
                contextlib.nullcontext()):
            Config(schedule="cosine", **named)
    assert labels_for(Sampling(), 0) is labels_for(Sampling(label="none"), 0) is None
    for named in (dict(label="3"), dict(guidance=2.0)):
        with pytest.raises(ValueError, match="knows no labels"):
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
