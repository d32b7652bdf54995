"""The figures: each shows what it says it shows."""
import math
import os
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ddpm
import figures
import posterior
import sample
from support.config import Sampling, schedule_from
from support.testing import PAPER, near
from test_math import SMALL, generate, small_unet

CONFIG = replace(SMALL, T=8, beta_1=1e-4, beta_T=0.3, float32=True)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, under its name: the images in rows, instead of a file."""
    found = {}

    def draw(name, images, columns):
        found[name] = images.reshape(-1, columns, *images.shape[1:])
    monkeypatch.setattr(figures, "draw", draw)
    with torch.no_grad():
        yield found


def test_the_points_of_figure_2_are_noise_and_come_back(drawn, monkeypatch):
    """Figure 2: draws from q(x_t|x_0), x_0 on a spiral; below them Algorithm 2 with σ² = β and the
    perfect network, from N(0, 1) to x_0; then twenty of its paths, and of those of DDIM with η = 0.

    Five standard errors of 800 numbers: a false alarm once in 10⁵; a variance off by a quarter is
    found, and β̃ is off by more at t = 2.
    """
    points = np.repeat([[2.9, 2.8], [-2.9, -2.8], [0, 9]], [2, 5, 1], axis=0)
    picture = np.ones((1, 64, 64))
    picture[0, 2, 62], picture[0, 61, 1] = 0, -1
    assert np.array_equal(figures.in_the_plane(points), picture)
    monkeypatch.setattr(figures, "in_the_plane", lambda points, *size: points)
    figures.figure_2(points=400, steps=6)
    (there, back), (paths,) = drawn["2"].numpy(), drawn["2-paths"].numpy()
    schedule, x0, noises = sample.respaced(PAPER, sample.times(1000, 6)), there[0], [back[6]]
    r = np.hypot(*x0.T)
    near(x0.T, r * [np.cos(5 * r), np.sin(5 * r)], condition=10, scale=1)
    (walked, walked_to), (straight, straight_to) = paths.reshape(2, 30, 6, 20, 2)[:, [0, -1]]
    assert np.array_equal(walked, back[:0:-1, :20]) and np.array_equal(walked_to, back[5::-1, :20])
    for t in range(1, 7):
        mean, variance = ddpm.q_marginal(x0, t, schedule)
        noises.append((there[t] - mean) / math.sqrt(variance))
        best = posterior.best_x0(back[t], t, x0, schedule)
        mean, _ = posterior.posterior(back[t], best, t, schedule)
        noises.append((back[t - 1] - mean) / math.sqrt(schedule.beta[t]))
        best = posterior.best_x0(straight[6 - t], t, x0, schedule)
        near(straight_to[6 - t], sample.ddim_step(straight[6 - t], t, best, 0, schedule), scale=1)
    assert np.abs(noises.pop(2)).max() < 1e-12                         # of x_0 no noise is left
    for z in noises:
        assert abs(z.mean()) < 5 / math.sqrt(800) and abs(z.var() - 1) < 5 * math.sqrt(2 / 800)


@pytest.mark.parametrize("T, every", [(8, 1), (20, 2)])
def test_figure_6_ends_in_the_images(T, every, drawn):
    """Figures 6, 10: ten labels in turn, x̂_0 at each t or at ten of them, at last x_0 itself."""
    net, config, label = small_unet(), replace(CONFIG, T=T), np.arange(10) % 3
    figures.figure_6(net, config)
    _, x0_theta = figures.walk_of(net, config, None, 10, label)
    *walk, x0 = generate(net, config, Sampling(), range(10), label)[::every]
    shown = [x0_theta(x_t, T - every * k) for k, x_t in enumerate(walk)]
    assert torch.equal(drawn["6"], torch.stack([*shown, x0], dim=1))


def test_what_figure_7_shares_decides_more_at_small_t(drawn):
    """Figure 7: the x_t of one trajectory, and six from each: nearer each other the smaller t."""
    net, config = small_unet(), replace(CONFIG, T=4, beta_T=1e-3)
    figures.figure_7(net, config)
    walk, _ = figures.walk_of(net, config, figures.noise_of(net, config, range(1)), 1)
    assert drawn["7"].shape == (4, 7, 1, 8, 8)
    assert all(torch.equal(row[0], x_t[0]) for row, x_t in zip(drawn["7"], walk()))
    spread = [row[1:].std(dim=0).mean() for row in drawn["7"]]
    assert spread[0] > spread[1] > spread[2] > spread[3] == 0
    assert drawn["7"][3, 1:].abs().max() <= 1                                    # clipped


def test_the_ends_of_figure_9_are_the_two_images(drawn):
    """Figures 8, 9: each row's ends become what the images alone would by the same ε and z; the
    images stand beside them, and the middle is half of both.
    """
    net, known = small_unet(), torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    figures.figure_9(net, CONFIG, known)
    assert drawn["9"].shape == (5, 11, 1, 8, 8)
    for t, row in zip((1, 2, 4, 6, 8), drawn["9"]):
        noise = sample.image_noise(0, range(1), (1, 8, 8), "cpu")
        x_t = ddpm.q_sample(known, t, noise(), schedule_from(CONFIG))
        walk, _ = figures.walk_of(net, CONFIG, noise, 3)
        *_, x0 = walk(torch.cat([x_t, x_t.mean(dim=0, keepdim=True)]), t)
        assert torch.allclose(row[[1, -2, 5]], x0, atol=1e-5)
        assert torch.equal(row[[0, -1]], known)
    assert (drawn["9"][0, 1] - known[0]).abs().max() < 5 * math.sqrt(1e-4)


def test_the_figures_that_are_named_are_drawn(call, monkeypatch):
    """python figures.py: all, or those named; one line for what is no figure or no option."""
    monkeypatch.setattr(figures, "figure_2", partial(figures.figure_2, points=50, steps=6))
    status, text, errors = call(figures, 2)
    assert status == 0 and not errors and "figure 2: step 6 of 6" in text
    assert sorted(os.listdir("out")) == ["figure-2-paths.png", "figure-2.png"]
    drawn = {name: Mock() for name in (6, 7, 9)}
    for name, mock in drawn.items():
        monkeypatch.setattr(figures, f"figure_{name}", mock)
        assert call(figures, name)[0] == 0
    assert call(figures, "--device", "cpu")[0] == 0                                # all of them
    assert [mock.call_count for mock in drawn.values()] == [2, 2, 2]
    assert drawn[9].call_args.args[2].shape == (2, 1, 28, 28)
    assert call(figures, 3)[::2] == (
        2, "figures.py: there is no figure 3 here: choose from 2, 6, 7, 9\n")
    assert call(figures, "--steps", 9)[0] == 2
