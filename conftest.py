"""How hard Hypothesis looks, the same few examples each time or `pytest --hypothesis-profile=deep`;
and scripts run as a user runs them, in this process.
"""
import contextlib
import io
import signal
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = dict(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", derandomize=True, max_examples=60, database=None, **COMMON)
settings.register_profile("deep", max_examples=5000, **COMMON)
settings.load_profile("default")

TINY = ["--batch", "16", "--T", "20", "--beta-T", "0.5", "--dropout", "0.1", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="session")
def full_float32():
    """No TF32 where a GPU is held against NumPy; one thread: for small tensors more cost time."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def example_names(doctest_namespace):
    """For the values in the docstrings: the schedule of a few betas, and plain numbers."""
    from ddpm import schedule_of
    doctest_namespace["schedule_of"] = schedule_of
    np.set_printoptions(legacy="1.25")


def in_process(module, *argv):
    """Run a script's main() as its last lines do: (exit status, stdout, stderr)."""
    from support.console import run_script
    handlers = {number: signal.signal(number, signal.default_int_handler)
                for number in signal.valid_signals() & {1, 2, 15}}     # SIGHUP, SIGINT, SIGTERM
    status = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), \
            contextlib.redirect_stdout(io.StringIO()) as text, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        warnings.simplefilter("error")                      # a user would see it as another line
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            run_script(module.main)
        except SystemExit as end:
            status = end.code or 0
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
    """200 images of 8x8 in two classes, sorted: a bright left or right half, with noise."""
    rng, labels = np.random.default_rng(0), np.arange(200) // 100
    images = rng.integers(0, 60, (200, 8, 8))
    images[:100, :, :4] += 180
    images[100:, :, 4:] += 180
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez_compressed(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A finished run of 100 steps on the tiny images, and what it printed."""
    import train
    out = tmp_path_factory.mktemp("trained") / "out"
    status, *printed = in_process(train, "--data", tiny, "--steps", 100, "--out", out, *TINY)
    assert status == 0, printed
    return out, *printed


@pytest.fixture
def short(monkeypatch):
    """Training logs, saves and draws every second step: four images in one step of the sampler."""
    import sample
    import train
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "draw_images", lambda net, config, sampling, label:
                        sample.draw_images(net, config, replace(sampling, steps=1, n=4), label))


@pytest.fixture
def watched(monkeypatch):
    """Every call of the network: x_t, t, label, its output, and the state that it was in."""
    from unet import UNet
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
    """40 images: red tells which, green whether mirrored or upside down, blue is a quarter."""
    images = np.zeros((40, 8, 8, 3), np.uint8)
    images[..., 0] = 5 * np.arange(40)[:, None, None]
    images[:, :, 4:, 1], images[:, 0, :, 1], images[..., 2] = 200, 100, 64
    np.savez(tmp_path / "coloured.npz", images=images, labels=np.arange(40) % 4)
    return tmp_path / "coloured.npz"
