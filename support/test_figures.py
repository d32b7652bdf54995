"""The figures: each shows what it says it shows."""
import math
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ddpm
import figures
import sample
from support.config import Config, Sampling, schedule_from
from test_math import generate, small_unet

CONFIG = Config(image_shape=(1, 8, 8), model_channels=8, num_classes=3, attention_resolutions=(4,),
                patch_size=1, T=8, beta_1=1e-4, beta_T=0.3, float32=True)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, under its name: the images in rows, instead of a file."""
    found = {}

    def draw(name, images, columns):
        found[name] = images.reshape(-1, columns, *images.shape[1:])
    monkeypatch.setattr(figures, "draw", draw)
    with torch.no_grad():
        yield found


def decoded(net, x_t, t):
    """x_0 by Algorithm 2 from x_t, with the noise of image 0 but for the first draw."""
    noise = sample.image_noise(0, range(1), (1, 8, 8), "cpu")
    noise()
    walk, _ = figures.walk_of(net, CONFIG, noise, len(x_t))
    return list(walk(x_t, t))[-1]


def test_the_points_of_figure_2_are_noise_and_come_back(drawn):
    """Figure 2: in the end below there are the points of the beginning above, since the perfect
    network draws these; the last panels are N(0, 1); twenty paths
    of Algorithm 2 cover more of the plane than those of DDIM with η = 0.
    """
    figures.figure_2(points=400, steps=100)
    (there, back), (paths,) = drawn["2"], drawn["2-paths"]
    before, after = there[0] < 1, back[0] < 1
    assert there.shape == (7, 1, 64, 64) and after.sum() > 0.5 * before.sum()
    assert (after & before).sum() > 0.9 * after.sum()      # the others lie between two points
    for panel in (there[-1, 0], back[-1, 0]):
        count = (1 - panel.numpy()) * 2                       # of points, at most 4 in a pixel
        y, x = 3 - 6 * (np.indices((64, 64)) + 0.5) / 64
        assert abs((count * x).sum() / count.sum()) < 0.15
        assert abs((count * y ** 2).sum() / count.sum() - 1) < 0.25
    assert (paths[0] < 1).sum() > 5 * (paths[1] < 1).sum()


def test_figure_6_ends_in_the_images(drawn):
    """Figures 6, 10: ten labels in turn, x̂_0 at each t, and at last x_0 itself."""
    net = small_unet()
    figures.figure_6(net, CONFIG)
    assert drawn["6"].shape == (10, 9, 1, 8, 8)
    label = np.arange(10) % 3
    _, x0_theta = figures.walk_of(net, CONFIG, None, 10, label)
    for k, x_t in enumerate(generate(net, CONFIG, Sampling(), range(10), label)):
        shown = x0_theta(x_t, 8 - k) if k < 8 else x_t
        assert torch.equal(drawn["6"][:, k], shown)


def test_what_figure_7_shares_decides_more_at_small_t(drawn):
    """Figure 7: the six of a row begin in the x_t beside them, which is one trajectory's; where t
    is small they are near it and near each other, and at t = 1 within some σ_1.
    """
    net, config = small_unet(), replace(CONFIG, T=4, beta_T=1e-3)
    figures.figure_7(net, config)
    (x_4, *_), *_, (x_1, *images) = drawn["7"]
    walk, _ = figures.walk_of(net, config, figures.noise_of(net, config, range(1)), 1)
    assert all(torch.equal(row[0], x_t[0]) for row, x_t in zip(drawn["7"], walk()))
    spread = [row[1:].std(dim=0).mean() for row in drawn["7"]]
    assert spread[0] > spread[1] > spread[2] > spread[3] == 0
    clipped = torch.stack(images).abs().max() <= 1
    assert clipped and x_4.shape == x_1.shape


def test_the_ends_of_figure_9_are_the_two_images(drawn):
    """Figures 8, 9: in each row the first and the last mix are what the image alone becomes, with
    the same ε and z, and the images themselves stand beside them; the middle is half of both.
    """
    net, known = small_unet(), torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    figures.figure_9(net, CONFIG, known)
    assert drawn["9"].shape == (5, 11, 1, 8, 8)
    eps = sample.image_noise(0, range(1), (1, 8, 8), "cpu")()
    for t, row in zip((1, 2, 4, 6, 8), drawn["9"]):
        x_t = ddpm.q_sample(known, t, eps, schedule_from(CONFIG))
        mixed = torch.cat([x_t, x_t.mean(dim=0, keepdim=True)])
        first, last, middle = decoded(net, mixed, t)
        assert torch.equal(row[0], known[0]) and torch.equal(row[-1], known[1])
        for found, expected in ((row[1], first), (row[-2], last), (row[5], middle)):
            assert torch.allclose(found, expected, atol=1e-5)
    assert (drawn["9"][0, 1] - known[0]).abs().max() < 5 * math.sqrt(1e-4)


def test_the_figures_that_are_named_are_drawn(call, monkeypatch, tmp_path):
    """python figures.py: all of them, or the named one alone, or one line for what is none."""
    monkeypatch.setattr(figures, "figure_2", partial(figures.figure_2, points=50, steps=6))
    status, text, errors = call(figures, 2)
    assert status == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figure-2-paths.png", "figure-2.png"] and not errors
    drawn = [Mock(), Mock(), Mock()]
    for mock, name in zip(drawn, (6, 7, 9)):
        monkeypatch.setattr(figures, f"figure_{name}", mock)
        assert call(figures, name)[0] == 0
    assert call(figures, "--device", "cpu")[0] == 0                                # all of them
    assert [mock.call_count for mock in drawn] == [2, 2, 2]
    assert drawn[2].call_args.args[2].shape == (2, 1, 28, 28)
    assert call(figures, 3)[::2] == (
        2, "figures.py: there is no figure 3 here: choose from 2, 6, 7, 9\n")
