"""The wiring: that what is proved of the formulas reaches the user, seen by runs of the scripts.

`watched` records every call of the network in a run: what it was given and in which state it was.
With betas of 1e-6 an x_t tells its x_0 exactly, and what is left of it is ε.
"""
import ast
import inspect
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm
import evaluate
import sample
import train
from support import devices, exercises
from support.config import PRESETS, Config, Sampling
from support.images import load, to_batch, to_pictures
from unet import UNet

CLEAR = ["--T", 4, "--beta-1", 1e-6, "--beta-T", 1e-6]       # so little noise that x_0 can be read
SMALL = ["--model-channels", 8, "--device", "cpu"]


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a script's main() in this process, in an empty folder; it must end well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "stop_signals", list)

    def main(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            module.main()
        except SystemExit as end:
            assert not end.code
    return main


@pytest.fixture
def watched(monkeypatch):
    """Every call of the network: x_t, t, label, its output, and the state that it was in."""
    calls, forward = [], UNet.forward

    def watch(net, x_t, t, label=None):
        found = forward(net, x_t, t, label)
        calls.append(SimpleNamespace(
            x_t=x_t.clone(), t=t.clone(), label=label, output=found.detach(), training=net.training,
            bfloat16=torch.is_autocast_enabled("cpu"), bias=net.conv_in.bias.detach().clone(),
            dropout={m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}))
        return found
    monkeypatch.setattr(UNet, "forward", watch)
    return calls


@pytest.fixture
def coloured(tmp_path):
    """40 images: red tells which, green whether it is mirrored or upside down, blue is a quarter;
    the last four are held out.  Four labels.
    """
    images = np.zeros((40, 8, 8, 3), np.uint8)
    images[..., 0] = 5 * np.arange(40)[:, None, None]
    images[:, :, 4:, 1], images[:, 0, :, 1], images[..., 2] = 200, 100, 64
    np.savez(tmp_path / "coloured.npz", images=images, labels=np.arange(40) % 4)
    return tmp_path / "coloured.npz"


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


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

def test_the_network_is_trained_on_what_algorithm_1_says(coloured, call, watched):
    """Algorithm 1 in `python train.py`: x_0 from the training part, each with its own label, or
    none; each its own t and ε, at the noise level of its t; the loss in log.csv is theirs; dropout
    is active; what is drawn then is the average's, without dropout.

    Five standard errors of 640 images: a false alarm once in 10⁶; a share that is off by a tenth,
    and a noise level by 2%, are found.
    """
    call(train, "--data", coloured, "--steps", 10, "--batch", 64, "--flip", "--dropout", 0.2,
         "--p-uncond", 0.25, *CLEAR, *SMALL)
    steps, drawn = watched[:10], watched[10:]
    schedule, losses, seen = ddpm.linear(4, 1e-6, 1e-6), [], []
    for step in steps:
        assert step.training and step.dropout == {0.2} and step.x_t.shape == (64, 3, 8, 8)
        which, mirrored, eps = read_off(step.x_t, step.t, schedule)
        dropped = step.label.numpy() == 4
        assert which.max() < 36 and np.array_equal(step.label[~dropped], which[~dropped] % 4)
        assert len(set(which)) > 20 and sorted(set(step.t.tolist())) == [1, 2, 3, 4]
        assert np.array_equal(np.bincount(step.t)[1:], [16] * 4)                # stratified
        losses.append(((step.output.double().numpy() - eps) ** 2).mean((1, 2, 3)))
        seen.append((which, mirrored, dropped, eps))
    which, mirrored, dropped, eps = map(np.concatenate, zip(*seen))
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 640 ** 0.5 and len(set(which)) == 36
    assert abs(dropped.mean() - 0.25) < 5 * 0.434 / 640 ** 0.5
    t = torch.cat([step.t for step in steps]).numpy()
    for time in (1, 2, 3, 4):
        z = eps[t == time]
        assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    similar = np.corrcoef(eps.reshape(640, -1)) - np.eye(640)
    assert np.abs(similar).max() < 0.5                                          # of 192 pixels
    row = [float(part) for part in Path("out/log.csv").read_text().split()[1].split(",")]
    by_t = [np.concatenate(losses)[t == time].mean() for time in (1, 2, 3, 4)]
    np.testing.assert_allclose(row, [10, np.mean(losses), *by_t], rtol=1e-4)
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    shared = torch.load("out/network.pt", weights_only=True)
    assert drawn and not any(step.training for step in drawn)
    for step in drawn:
        assert torch.equal(step.bias, saved["ema"]["conv_in.bias"])
        assert not torch.equal(step.bias, saved["net"]["conv_in.bias"])
        assert step.label.tolist() == [4] * 100 + [0] * 25 + [1] * 25 + [2] * 25 + [3] * 25
    assert all(torch.equal(shared["ema"][name], p.half()) for name, p in saved["ema"].items())


def test_a_picture_of_the_training_takes_ten_steps(coloured, call, watched):
    """Drawing: one step of training, then ten calls of the network at the squares of 1 .. 10."""
    call(train, "--data", coloured, "--steps", 1, "--batch", 8, *SMALL)
    assert [int(step.t[0]) for step in watched[1:]] == [1000, 810, 640, 490, 360, 250, 160, 90,
                                                        40, 10]


@pytest.mark.parametrize("named, schedule", [
    (["--schedule", "cosine", "--T", 5], ddpm.cosine(5)),
    (["--T", 5, "--beta-1", 0.2, "--beta-T", 0.7], ddpm.linear(5, 0.2, 0.7)), ([], ddpm.linear())])
def test_the_noise_is_that_of_the_schedule_that_was_named(named, schedule, call, watched):
    """--schedule, --T, --beta-1, --beta-T: black images in training have mean −√ᾱ_t and variance
    1 − ᾱ_t, and a walk begins at t = T.

    Five standard errors of 64 pixels a t: z has mean 0 and variance 1 over all of them; an ᾱ_t of
    another schedule is found.
    """
    np.savez("black.npz", images=np.zeros((50, 8, 8), np.uint8))
    call(train, "--data", "black.npz", "--steps", 3, "--batch", 100, *named, *SMALL)
    z = []
    for step in watched[:3]:
        mean, variance = ddpm.q_marginal(-1, step.t.numpy(), schedule)
        z.append((step.x_t.numpy() - mean.reshape(-1, 1, 1, 1))
                 / np.sqrt(variance).reshape(-1, 1, 1, 1))
        assert step.t.min() >= 1 and schedule.T * 0.9 < step.t.max() <= schedule.T
    z = np.array(z)
    assert abs(z.mean()) < 5 / z.size ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.size) ** 0.5
    assert watched[3].t.tolist() == [schedule.T] * 100


def test_the_seed_reaches_weights_images_and_noise(coloured, call, watched):
    """--seed: the same one gives the same run; another one other weights, images, t and ε."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        call(train, "--data", coloured, "--steps", 1, "--batch", 16, "--seed", seed, "--out", name,
             *CLEAR, *SMALL)
    firsts = [step for step in watched if step.training]
    weights = [torch.load(f"{name}/checkpoint.pt", weights_only=True)["net"] for name in "abc"]
    for same, other in ((0, 1), (0, 2)):
        equal = other == 1
        assert torch.equal(firsts[same].x_t, firsts[other].x_t) == equal
        assert all(torch.equal(p, q) for p, q in zip(
            weights[same].values(), weights[other].values())) == equal
    schedule = ddpm.linear(4, 1e-6, 1e-6)
    (which, _, eps), (others, _, other_eps) = (read_off(step.x_t, step.t, schedule)
                                               for step in (firsts[0], firsts[2]))
    assert not np.array_equal(which, others) and abs((eps * other_eps).mean()) < 0.1


@pytest.mark.parametrize("extra, bfloat16", [([], True), (["--float32"], False)])
def test_bfloat16_is_used_where_it_can_be(extra, bfloat16, coloured, call, watched, monkeypatch):
    """Precision: training, sampling and evaluation are in bfloat16 where the device has it, and
    not with --float32.
    """
    monkeypatch.setattr(devices, "precision",
                        lambda device, float32: "float32" if float32 else "bfloat16")
    call(train, "--data", coloured, "--steps", 1, "--batch", 4, *extra, *CLEAR, *SMALL)
    trained = len(watched)
    call(sample, "--steps", 1, "-n", 2, "--device", "cpu")
    sampled = len(watched)
    call(evaluate, "--device", "cpu")
    assert 0 < trained < sampled < len(watched)
    assert all(step.bfloat16 == bfloat16 for step in watched)


TRAINING = [
    ("labels", ["--no-labels"]), ("flip", ["--flip"]), ("steps", ["--steps", 4]),
    ("batch", ["--batch", 8]), ("lr", ["--lr", 0.01]), ("muon_lr", ["--muon-lr", 0]),
    ("warmup", ["--warmup", 1]), ("decay", ["--no-decay"]), ("beta2", ["--beta2", 0.5]),
    ("grad_clip", ["--grad-clip", 0.001]), ("ema_decay", ["--ema-decay", 0.1]),
    ("p_uncond", ["--p-uncond", 0.9]), ("seed", ["--seed", 5]), ("float32", ["--float32"]),
    ("schedule", ["--schedule", "cosine"]), ("T", ["--T", 7]), ("beta_1", ["--beta-1", 0.01]),
    ("beta_T", ["--beta-T", 0.1]), ("model_channels", ["--model-channels", 16]),
    ("channel_mult", ["--channel-mult", 1]), ("num_res_blocks", ["--num-res-blocks", 2]),
    ("attention_resolutions", ["--attention-resolutions", 4]), ("dropout", ["--dropout", 0.5]),
    ("num_groups", ["--num-groups", 2]), ("patch_size", ["--patch-size", 1]),
    ("data", ["--data", "other.npz"])]


@pytest.fixture(scope="module")
def plain_run():
    """The final state of the run without any of these options, kept from its first use."""
    return {}


@pytest.mark.parametrize("name, argv", TRAINING, ids=[name for name, _ in TRAINING])
def test_every_option_of_training_changes_what_is_trained(name, argv, plain_run, call, monkeypatch):
    """Options: each changes its own setting in the checkpoint and no other, and with it the
    parameters or their average.
    """
    assert {name for name, _ in TRAINING} | {"preset"} == {
        f.name for f in fields(Config) if f.metadata["help"]}
    monkeypatch.setattr(train, "draw_samples", lambda run, name: None)
    monkeypatch.setattr(devices, "precision",
                        lambda device, float32: "float32" if float32 else "bfloat16")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(30) % 3)
    np.savez("other.npz", images=images[::-1], labels=np.arange(30) % 3)
    base = ["--data", "images.npz", "--steps", 3, "--batch", 6, *SMALL, "--warmup", 2]
    if not plain_run:
        call(train, *base)
        plain_run |= torch.load("out/checkpoint.pt", weights_only=True)
    call(train, *base, *argv, "--out", "changed")
    changed = torch.load("changed/checkpoint.pt", weights_only=True)
    follows = dict(labels={"num_classes"}, data={"fingerprint"}).get(name, set())
    differ = {key for key, value in changed["config"].items() if value != plain_run["config"][key]}
    assert differ == {name} | follows
    assert any(changed[part].keys() != plain_run[part].keys() or any(
        p.shape != changed[part][key].shape or not torch.equal(p, changed[part][key])
        for key, p in plain_run[part].items()) for part in ("net", "ema"))
    if name == "ema_decay":
        assert all(torch.equal(p, changed["net"][key]) for key, p in plain_run["net"].items())


def test_the_presets_are_what_they_say():
    """Ho appendix B and section 4, CIFAR10, one by one; the digits' have labels and the same T."""
    assert asdict(PRESETS["cifar10"]) == dict(
        preset="cifar10", data=None, labels=False, flip=True, steps=800_000, batch=128, lr=2e-4,
        muon_lr=0.0, warmup=5000, decay=False, beta2=0.999, grad_clip=1.0, ema_decay=0.9999,
        p_uncond=0.1, seed=0, float32=False, schedule="linear", T=1000, beta_1=1e-4, beta_T=0.02,
        model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
        attention_resolutions=(16,), dropout=0.1, num_groups=32, patch_size=1,
        image_shape=(3, 32, 32), num_classes=0, fingerprint="none", first_t=1)
    assert PRESETS["digits"] == Config() and Config().labels and not Config().flip
    assert (Config().schedule, Config().T, Config().beta_1, Config().beta_T) == (
        "linear", 1000, 1e-4, 0.02)


def test_colours_stay_in_their_channels():
    """Images: red, green, blue of (H, W, C) are channels 0, 1, 2 of (C, H, W), and back."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    x0 = to_batch(torch.from_numpy(images))
    for channel in range(3):
        np.testing.assert_allclose(x0[:, channel], images[..., channel] / 127.5 - 1, atol=1e-6)
    assert np.array_equal(to_pictures(x0), images)


# ── Sampling and evaluation ───────────────────────────────────────────────────────────────────────

@pytest.fixture
def network(coloured, tmp_path):
    """A checkpoint of a network with random weights, and its settings."""
    torch.manual_seed(0)
    images, labels = load(coloured)
    config = Config(data=str(coloured), image_shape=(3, 8, 8), num_classes=4, model_channels=8, T=6,
                    beta_1=1e-6, beta_T=0.3, float32=True,
                    fingerprint=evaluate.fingerprint(images, labels))
    net = UNet(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save(dict(config=asdict(config), step=1, ema=net.state_dict()), tmp_path / "net.pt")
    net.conv_out.bias.data += 0.5
    torch.save(dict(config=asdict(config), step=1, ema=net.state_dict()), tmp_path / "other.pt")
    return config


DDPM, DDIM, KEEP = ["--sampler", "ddpm"], ["--sampler", "ddim"], ["--keep", "top"]
SAMPLING = [
    ("sampler", DDPM, DDIM), ("sampler", DDIM, ["--sampler", "dpm"]), ("sampler", [], DDPM),
    ("steps", [], ["--steps", 3]), ("variance", DDPM, ["--variance", "beta_tilde"]),
    ("eta", DDIM, ["--eta", 0.5]), ("eta", [], ["--eta", 0]),
    ("clip", [], ["--no-clip"]), ("label", [], ["--label", 1]), ("label", [], ["--label", "none"]),
    ("guidance", [], ["--guidance", 3]), ("guidance", DDPM, ["--guidance", 0]),
    ("keep", KEEP, ["--keep", "bottom"]), ("keep", KEEP, ["--keep", "left"]),
    ("keep", KEEP, ["--keep", "coarse"]), ("resample", KEEP, ["--resample", 2]),
    ("n", [], ["-n", 3]), ("weights", [], ["--weights", "other.pt"]),
    ("data", KEEP, ["--data", "turned.npz"]), ("seed", [], ["--seed", 1])]


@pytest.mark.parametrize("name, base, extra", SAMPLING)
def test_every_option_of_sampling_changes_what_is_drawn(name, base, extra, network, coloured, call,
                                                        monkeypatch):
    """Options: each reaches the walk as its setting, with no other, and changes the images."""
    assert {name for name, _, _ in SAMPLING} | {"out", "batch", "animate", "device"} == {
        f.name for f in fields(Sampling)}
    images, labels = load(coloured)
    np.savez("turned.npz", images=images[:, ::-1], labels=labels)
    walks, found = [], []

    def generate(net, config, sampling, *rest, walk=sample.generate):
        walks.append(sampling)
        return walk(net, config, sampling, *rest)
    monkeypatch.setattr(sample, "generate", generate)
    for argv in (base, [*base, *extra]):
        call(sample, "--weights", "net.pt", "-n", 4, "--device", "cpu", "--out", "x.npz", *argv)
        found.append(np.load("x.npz")["images"])
    assert {f.name for f in fields(Sampling)
            if getattr(walks[0], f.name) != getattr(walks[1], f.name)} == {name}
    assert found[0].shape != found[1].shape or np.abs(
        found[0].astype(int) - found[1]).max() > 2


def test_the_bound_is_that_of_the_held_out_images(network, coloured, call, watched):
    """Ho (5): the network that is evaluated is the average, without dropout, on the images that
    were held out, each with its own label and its own t.
    """
    call(evaluate, "--weights", "net.pt", "--device", "cpu")
    ema = torch.load("net.pt", weights_only=True)["ema"]
    assert not any(step.training for step in watched)
    assert all(torch.equal(step.bias, ema["conv_in.bias"]) for step in watched)
    assert [(step.t[0].item(), len(step.x_t)) for step in watched] == [
        *((t, 32) for t in (2, 3, 4, 5, 6)), (1, 4),                    # the bound; then a walk
        *((t, 8) for t in (6, 5, 4, 3, 2, 1))]
    assert all(len(set(step.t.tolist())) == 1 for step in watched)
    which = read_off(watched[5].x_t, watched[5].t, ddpm.linear(6, 1e-6, 0.3))[0]
    assert which.tolist() == [36, 37, 38, 39]
    assert watched[5].label.tolist() == [0, 1, 2, 3]
    assert all(step.label.tolist() == 4 * [4] + [0, 1, 2, 3] for step in watched[6:])


# ── Write it yourself ─────────────────────────────────────────────────────────────────────────────

def test_the_exercises_are_ours_without_the_equations():
    """Exercises: every tagged function is blank, its docstring and all the rest are kept."""
    for name in exercises.FILES:
        source = (exercises.ROOT / f"{name}.py").read_text()
        trees = [ast.parse(text) for text in (source, exercises.blanked(source))]
        left = exercises.blanks(exercises.blanked(source))
        assert not exercises.blanks(source) and len(left) > 5
        for ours, theirs in zip(*(tree.body for tree in trees), strict=True):
            if getattr(ours, "name", None) not in left:
                assert ast.unparse(ours) == ast.unparse(theirs)
            elif isinstance(ours, ast.FunctionDef):
                assert ast.unparse(ours.args) == ast.unparse(theirs.args)
                assert ast.get_docstring(ours) == ast.get_docstring(theirs) != ""
                assert ast.unparse(theirs.body[1]).startswith("raise NotImplementedError")
        tagged = {node.name for node in trees[0].body if isinstance(node, ast.FunctionDef)
                  and "Ho (" in (ast.get_docstring(node) or "").split("\n")[0]}
        assert tagged <= set(left)


def test_what_a_reader_fills_in_is_proved_and_counted(tmp_path, call, capsys):
    """Exercises: blank, one filled in, one with a wrong symbol: which claims are proved, which
    function breaks one, and what is still blank.
    """
    call(exercises, "mine")
    assert "pytest --mine mine" in capsys.readouterr().out
    path = Path("mine/ddpm.py")
    head, schedule_of, linear, cosine, rest = re.split(
        r"(?=def schedule_of)|(?=def linear)|(?=def cosine)|(?=def times)", path.read_text())
    cosine = cosine.replace(exercises.BLANK, """t = np.arange(T + 1)
    f = cos((t / T + 0.008) / 1.008 * pi / 2)
    return schedule_of(np.minimum(1 - f[1:] / f[:-1], 0.999))""")          # without its square
    linear = linear.replace(exercises.BLANK, "return schedule_of(np.linspace(beta_1, beta_T, T))")
    source = inspect.getsource(ddpm.schedule_of)
    path.write_text(head + source + linear + cosine + rest)
    chosen = "linear_goes or cosine_has or x_T_is_nearly"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_math.py", "-k", chosen,
         f"--mine={tmp_path / 'mine'}"], cwd=exercises.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for expected in (r"Ho section 4 +1 of +1  proved", r"N2 +0 of +1  waits for L_T",
                     r"cosine +0 of +1  NOT PROVED by test_cosine_has_its_published_values",
                     r"1 of 3 claims proved",
                     r"still blank in .*ddpm.py: times, respaced, naive_step, scaled_step, .*"):
        assert any(re.fullmatch(expected, line) for line in lines), done.stdout
