"""Fewer steps, guidance, completion, and the estimates of evaluate.py."""
import itertools
import math
import statistics
import warnings
from dataclasses import replace
from fractions import Fraction
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import ddpm
import evaluate
import posterior
import sample
from ddpm import draw, log_normal, q_marginal
from posterior import beta_tilde, kl, reverse_mean
from support.config import KEEP, Config, Sampling, schedule_from
from support.data import split
from sample import image_noise
from support.drawing import projection
from test_math import (PAPER, SHORT, batch_of, evenly, gaussian_trajectory, generate, mild, near,
                       near32, on_every_device, small_unet, step_arguments, tables)

# ── Fewer steps: DDIM and DPM-Solver++ ────────────────────────────────────────────────────────────

@on_every_device
@given(schedule=mild, data=st.data())
def test_ddim_with_eta_1_is_the_posterior(device, schedule, data):
    """DDIM: η = 1 is a draw from q(x_{t−1}|x_t, x̂_0), Ho (6, 7), exactly."""
    t = data.draw(st.integers(1, schedule.T))
    (x_t, _, x0, _, z), (x_t32, _, x0_32, _, z32) = step_arguments(schedule, t, device)
    found = sample.ddim_step(x_t32, t, x0_32, z32, schedule, eta=1.0)
    near32(found, draw(*posterior.posterior(x_t, x0, t, schedule), z), condition=10)


@on_every_device
@given(schedule=st.lists(st.floats(0.001, 0.7), min_size=3, max_size=6).map(tables),
       data=st.data())
def test_dpm_is_its_published_formula_and_with_eta_1_a_posterior_draw(device, schedule, data):
    """DPM: D looks half a step of λ ahead; then Lu's step, or with η = 1 a draw from
    q(x_{t−1}|x_t, D).  With no x̂_0 before, and in the last step, it is DDIM's.
    """
    t = data.draw(st.integers(2, schedule.T - 1))
    (x_t, _, x0, x0_prev, z), (x_t32, _, x0_32, x0_prev32, z32) = step_arguments(
        schedule, t, device)
    past, now, ahead = (math.log(schedule.alpha_bar[u] / schedule.one_minus_alpha_bar[u]) / 2
                        for u in (t + 1, t, t - 1))
    D = x0 + (x0 - x0_prev) * ((ahead - now) / 2) / (now - past)
    (scale, variance), (_, variance_t) = (q_marginal(1.0, u, schedule) for u in (t - 1, t))
    exact = (math.sqrt(variance / variance_t) * x_t - scale * math.expm1(now - ahead) * D,
             draw(*posterior.posterior(x_t, D, t, schedule), z))
    # r is a quotient of differences of λ, and D magnifies its rounding
    digits_lost = max(abs(past), abs(ahead), 1) / min(ahead - now, now - past)
    condition = 10 + np.abs(D - x0).max() / np.abs(D).max() * digits_lost
    for eta, result in zip((0.0, 1.0), exact):
        found = sample.dpm_step(x_t32, t, x0_32, x0_prev32, z32, schedule, eta)
        near32(found, result, condition)
        assert torch.equal(sample.dpm_step(x_t32, t, x0_32, None, z32, schedule, eta),
                           sample.ddim_step(x_t32, t, x0_32, z32, schedule, eta))
        near32(sample.dpm_step(x_t32, 1, x0_32, x0_prev32, z32, schedule, eta), x0)


@pytest.mark.parametrize("sampling, x_0", [
    (Sampling(), [-0.024291897992953844, -0.0012977612748805542, 0.006858829319140749,
                  0.009794089081326758]),
    (Sampling(sigma2="beta_tilde", clip=False),
     [-18.58585917182956, -0.051514292110084556, 0.0021308849068037757, 0.5877906780099192]),
    (Sampling("ddim", steps=20, eta=0.5),
     [-0.9977774239225512, -0.2088157325125671, 0.2435664420670385, 0.9532946599353627])])
def test_the_samplers_are_those_of_diffusers(sampling, x_0):
    """Algorithm 2, DDIM: diffusers 0.42.1 ends in the same four pixels, in float64."""
    times = np.array([0, *range(1, 1001, 1000 // sampling.steps)])
    z = np.cos(1.3 * np.arange(4) + np.arange(1000)[:, None])
    noises = map(torch.tensor, [np.array([-2, -0.5, 0.1, 1.5]), *z])
    *_, found = sample.trajectory(
        lambda x, t: torch.tanh(0.7 * x + 0.3 * math.sin(times[t])),
        sample.respaced(PAPER, times), sampling, noises.__next__)
    # without clipping x̂_0 begins at x_T/√ᾱ_T, 157 times as large as x_T
    near(found.flatten().numpy(), x_0, scale=1 if sampling.clip else 300)


def test_no_step_takes_an_image_off_its_device():
    """Devices: meta tensors, which have no numbers to read, go through every sampler."""
    schedule, x_t = evenly(3, 0.05, 0.3), torch.ones(2, 1, 4, 4, device="meta")
    for sampling in (Sampling(), Sampling(clip=False), Sampling("ddim"), Sampling("dpm", eta=0.5),
                     Sampling(keep="left", resample=2), Sampling(start=3)):
        walk = sample.trajectory(lambda x_t, t: x_t / 2, schedule, sampling, lambda: x_t, x_t)
        assert [(x.device.type, x.dtype) for x in walk] == [("meta", torch.float32)] * 4


def test_orders_of_the_solvers():
    """DDIM is of order 1, DPM-Solver++(2M) of 2: half the step, half or a quarter of the error."""
    fine, m, s2, errors = evenly(12800, 1e-4 / 12.8, 0.02 / 12.8), 0.3, 0.25, []
    for name, steps in itertools.product(("ddim", "dpm"), (80, 160, 320)):
        # end at t_1 = 1/80 of the way, where λ is finite: what is left is one first-order step
        times = [0, *np.linspace(12800 // 80, 12800, steps + 1).round().astype(int)]
        short = sample.respaced(fine, times)
        noises = [torch.ones(1, dtype=torch.float64)] + [torch.zeros(1)] * steps
        *_, x_1, _ = gaussian_trajectory(Sampling(name, eta=0.0, clip=False), short, m, s2, noises)
        v_T, v_1 = (ddpm.variance_at(t, s2, short) for t in (short.T, 1))
        kept_T, kept_1 = np.sqrt(short.alpha_bar[[short.T, 1]])
        exact = kept_1 * m + math.sqrt(v_1 / v_T) * (1 - kept_T * m)    # the flow scales with √v
        errors.append(abs(x_1.item() - exact))
    ddim, dpm = np.reshape(errors, (2, 3))
    assert ddim[:-1] / ddim[1:] == pytest.approx([2, 2], abs=0.1)
    assert dpm[:-1] / dpm[1:] == pytest.approx([4, 4], abs=0.4)
    assert dpm[0] < ddim[2]


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=2).map(sorted))
@example([1, 1])
@example([1000, 1000])
def test_the_times_are_distinct_and_go_from_0_to_T(steps_and_T):
    """DDIM: N steps stand at N different times for any N ≤ T, evenly in √t where there is room."""
    steps, T = steps_and_T
    tau = sample.times(T, steps)
    assert tau[0] == 0 and tau[-1] == T and len(tau) == steps + 1 and np.all(np.diff(tau) >= 1)
    for i, t in enumerate(tau.tolist()):
        assert t == i or abs(t - Fraction(T * i * i, steps * steps)) <= Fraction(1, 2)


class Half(nn.Module):
    """ε_θ = x_t/2: no network, but one that `generate` can call, and a record of its calls."""

    def __init__(self):
        super().__init__()
        self.factor, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t, t, label=None):
        self.calls.append((x_t, t, label))
        return self.factor * x_t


POINT = Config(image_shape=(1, 1, 1), float32=True)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@given(st.builds(dict, schedule=st.just("cosine"), T=st.integers(1, 4000))
       | st.builds(dict, T=st.integers(1, 4000), beta_T=st.floats(0.001, 0.5)),
       st.integers(1, 30), st.floats(0, 1))
@example(dict(schedule="cosine", T=1000), 5, 1.0)
@example(dict(T=2, beta_1=4.802559792604222e-09, beta_T=0.561), 2, 1.0)     # 1 − ᾱ − σ² below 0
@example(dict(T=1000, beta_T=0.5), 20, 1.0)                       # ᾱ_t is 0 in float32, twice
@example(dict(T=4000, beta_T=0.5), 20, 0.0)                       # and here in float64
@example(dict(T=3), 6, 0.5)
def test_any_number_of_steps_on_any_schedule(sampler, schedule, steps, eta):
    """DDIM, DPM: N steps are N calls of the network, from T down; whatever rounds to zero or below
    in float32, every x_t is finite.  So is Algorithm 2's, but where ᾱ_T is nothing.
    """
    config, net = replace(POINT, **schedule), Half()
    sampling = Sampling(sampler, steps=steps, eta=1.0 if sampler == "ddpm" else eta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if sampler == "ddpm" else "error")
        trajectory = generate(net, config, sampling, range(2))
    tau = sample.times(config.T, min(config.T, steps))
    assert [t.tolist() for _, t, _ in net.calls] == [[t, t] for t in tau[:0:-1]]
    assert len(trajectory) == len(tau)
    assert all(torch.isfinite(x_t).all() for x_t in trajectory) or (
        sampler == "ddpm" and schedule_from(config).alpha_bar[-1] < 1e-9)


# ── Guidance and completion ───────────────────────────────────────────────────────────────────────

@on_every_device
def test_guidance_is_the_line_through_two_predictions(device):
    """CFG: s = 0 is unconditional, s = 1 conditional, all on a line."""
    net, t, label = small_unet().to(device), *torch.tensor([[1, 5, 9], [0, 1, 2]], device=device)
    x_t = batch_of(0, 3, 1, 8, 8, device=device)[1]
    with torch.no_grad():
        null, conditional = net(x_t, t, torch.full_like(label, 3)), net(x_t, t, label)
        for s in (0.0, 1.0, 0.5, 3.0):
            near32(sample.guided(net, x_t, t, label, s, null=3),
                   ((1 - s) * null + s * conditional).cpu(), condition=10)


def test_guidance_costs_twice_only_where_it_needs_both():
    """CFG: with s = 0, s = 1 or no labels each image is seen once, else also without its label."""
    config, label = replace(POINT, num_classes=5), torch.tensor([3, 0, 4])
    for scale, given, labels in ((0.0, label, [5, 5, 5]), (1.0, label, [3, 0, 4]),
                                 (2.0, label, [5, 5, 5, 3, 0, 4]), (2.0, None, None)):
        net, n = Half(), len(labels or label)
        generate(net, config, Sampling(steps=2, guidance=scale), range(3), given)
        assert [(len(x_t), len(t), None if seen is None else seen.tolist())
                for x_t, t, seen in net.calls] == [(n, n, labels)] * 2


@pytest.mark.parametrize("keep", KEEP)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_what_is_kept_is_a_projection(keep, rows, columns, seed):
    """completion: P keeps the named half, the centre, or the means over 4 x 4 pixels; P P = P."""
    height, width = 4 * rows, 4 * columns
    P, (x, x32) = projection(keep, height, width), batch_of(seed, 2, 3, height, width)
    down, across = (np.indices((height, width)) + 0.5) / np.reshape([height, width], (2, 1, 1))
    known = dict(left=across < 0.5, right=across > 0.5, top=down < 0.5, bottom=down > 0.5,
                 centre=np.maximum(abs(across - 0.5), abs(down - 0.5)) < 0.25)
    means = x.reshape(2, 3, rows, 4, columns, 4).mean((3, 5)).repeat(4, axis=2).repeat(4, axis=3)
    expected = x * known[keep] if keep in known else means
    near32(P(x32), expected)
    near32(P(P(x32)), expected)


def test_a_mask_of_one_s_own_and_what_cannot_be_kept(tmp_path, monkeypatch):
    """completion: an .npy of zeros and ones keeps its pixels; what cannot be kept is refused."""
    monkeypatch.chdir(tmp_path)
    mask, x = np.eye(8)[:, :6].astype(np.uint8), torch.randn(2, 3, 8, 6)
    for name, array in (("mask", mask), ("ones", np.ones((8, 6), bool)), ("wrong", 255 * mask)):
        np.save(name, array)
    assert torch.equal(projection("ones.npy", 8, 6)(x), x)
    assert np.array_equal(projection("mask.npy", 8, 6)(x), x.numpy() * mask)
    for keep, height, error, says in (
            ("mask.npy", 6, ValueError, "of 6 x 6"), ("coarse", 8, ValueError, "multiples of 4"),
            ("wrong.npy", 8, ValueError, "zeros and ones"), ("none.npy", 8, OSError, "none.npy")):
        with pytest.raises(error, match=says):
            projection(keep, height, 6)


@pytest.mark.parametrize("keep, kept, deviation", [
    ("left", np.s_[:, 0, :, :4], 1.0), ("coarse", np.s_[:, 0, ::4, ::4], 0.25)])   # of 16 pixels
def test_completion_keeps_what_is_known(keep, kept, deviation):
    """completion: P x_t follows P q(x_t|x_0) at all t, P x_0 is exact, and the rest differs.

    Five standard errors of at least 3,200 draws: a false alarm once in 10⁶, and a mean off by 0.1
    or a variance by an eighth is found.
    """
    schedule, P = evenly(12, 0.01, 0.3), projection(keep, 8, 8)
    known = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(800, 1, 1, 1)
    sampling = Sampling("ddim", keep=keep, resample=3)
    images = generate(Half(), SHORT, sampling, range(800), known=known)
    near32(P(images[-1]), P(known).numpy())
    assert (images[-1] - known - P(images[-1] - known)).abs().mean() > 0.1
    for t in (11, 6, 1):
        mean, variance = q_marginal(P(known)[kept].double().numpy(), t, schedule)
        z = (P(images[12 - t])[kept].double().numpy() - mean) / math.sqrt(variance) / deviation
        assert abs(z.mean()) < 5 / math.sqrt(z.size)
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)


def test_resampling_goes_back_by_the_forward_step():
    """RePaint, Ho (2): each round but the first begins with a draw from q(x_t|x_{t−1}), t > 1."""
    schedule, taken, noises = tables([0.19, 0.36]), [], iter(torch.arange(1.0, 9.0))

    def walk(x_t, t):
        taken.append((t, round(float(x_t), 5)))
        return iter([x_t, torch.tensor(2.0)])
    *_, image = sample.completed(walk, torch.tensor(0.0), lambda x: 0 * x, schedule,
                                 lambda: next(noises), resample=2)
    # noise 1 is x_T, 2 that of what is known, 3 leads back: 0.8 · 2 + 0.6 · 3
    assert taken == [(2, 1.0), (2, 3.4), (1, 2.0)] and image == 2


def test_what_was_noised_to_t_is_taken_back_from_there():
    """Ho (4), Algorithm 2: --start t noises each image to t, and takes it back in as many steps."""
    known = torch.linspace(-0.9, 0.9, 128).reshape(2, 1, 8, 8)
    noise = image_noise(0, range(2), (1, 8, 8), "cpu")().numpy()
    for start, steps in ((12, 12), (5, 5), (5, 3), (1, 1)):
        net = Half()
        found = generate(net, SHORT, Sampling(start=start, steps=steps), range(2), known=known)
        assert [t[0].item() for _, t, _ in net.calls] == sample.times(start, steps)[:0:-1].tolist()
        near32(found[0], draw(*q_marginal(known.numpy(), start, evenly(12, 0.01, 0.3)), noise))
        assert len(found) == steps + 1
    assert (found[-1] - known).abs().max() < 4 * math.sqrt(0.01)


def test_every_image_has_its_own_noise():
    """Determinism: the noise is N(0, 1), another for each image and seed, the same in any batch.

    Five standard errors of 16,384 draws: a false alarm once in 10⁶; a mean off by 0.04 or a
    variance off by a twentieth is found.
    """
    together, other = (image_noise(seed, range(64), (1, 16, 16), "cpu") for seed in (3, 4))
    apart = [image_noise(3, range(i, i + 16), (1, 16, 16), "cpu") for i in range(0, 64, 16)]
    for _ in range(3):
        z, others = together(), other()
        assert torch.equal(z, torch.cat([noise() for noise in apart]))
    assert abs(z.mean()) < 5 / 128 and abs(z.var() - 1) < 5 * math.sqrt(2) / 128
    assert len({tuple(image.flatten().tolist()) for image in [*z, *others]}) == 128


# ── The bound, the least loss, copies ─────────────────────────────────────────────────────────────

def test_the_estimated_bound_is_exact_for_a_network_off_by_a_constant():
    """Ho (5, 12, 13), V7: no noise is left in the estimate where all images have one error.

    Five standard errors of 4,000 numbers: a false alarm once in 10⁶; a variance off by a tenth is
    found.
    """
    schedule, calls = evenly(6, 0.05, 0.6), []
    x0 = (torch.arange(12.0) * 20).reshape(3, 1, 2, 2) / 127.5 - 1

    def predict(x_t, t, i):                               # it sees x_0, and its ε is off by 0.3
        eps = ddpm.eps_from_x0(x_t, int(t[0]), x0[i], schedule)
        calls.append((t.unique().tolist(), i.tolist(), eps))
        return eps + 0.3
    clean = x0.double().numpy()
    errors, mean_0 = evaluate.squared_errors(predict, schedule, x0, each=200)
    found = evaluate.bound(errors, mean_0, clean, schedule)
    rate, distortion = evaluate.rate_distortion(errors, clean, schedule)
    assert [t for t, *_ in calls] == [[6], [5], [4], [3], [2], [1]] and calls[-1][1] == [0, 1, 2]
    assert len({tuple(i) for _, i, _ in calls}) == 6 and {len(i) for _, i, _ in calls} == {200, 3}
    z = torch.cat([eps for *_, eps in calls]).double().numpy()
    assert abs(z.mean()) < 5 / math.sqrt(z.size) and abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
    for variance, terms in found.items():
        sigma2 = posterior.reverse_variance(variance, schedule)
        matching = [kl(0.0, beta_tilde(t, schedule), 0.3 * reverse_mean(0.0, 1.0, t, schedule),
                       sigma2[t]) / math.log(2) for t in range(2, 7)]
        assert terms["L_{t-1}"] == pytest.approx((sum(matching), 0), rel=1e-5, abs=1e-5)
        for t in range(1, 7) if variance == "beta" else ():       # x̂_0 is off by 0.3 of ε's factor
            assert rate[t] == pytest.approx(terms["L_T"][0] + sum(matching[t - 1:]), rel=1e-5)
            assert distortion[t] == pytest.approx(38.25 * abs(
                ddpm.x0_from_eps(0.0, t, 1.0, schedule)), rel=1e-5)
        mean = clean + 0.3 * reverse_mean(0.0, 1.0, 1, schedule)
        each = [posterior.bits_per_dim(image) for image in posterior.L_0(clean, mean, sigma2[1])]
        assert terms["L_0"] == pytest.approx(
            (sum(each) / 3, statistics.stdev(each) / math.sqrt(3)), rel=1e-4)
        assert terms["L_T"] == (posterior.bits_per_dim(posterior.L_T(clean, schedule)), 0)


def test_the_stated_error_is_the_spread_of_the_estimates():
    """Ho (5): over all ways to draw, the variance of Σ L_{t−1} is the mean of its error squared."""
    schedule, x0 = evenly(3, 0.1, 0.2), np.zeros((3, 1, 1, 1))
    pairs = list(itertools.product([0.01, 2.0, 9.0], repeat=2))
    found = [evaluate.bound(np.array([(0, 0), (0, 0), *drawn]), x0, x0, schedule)
             for drawn in itertools.product(pairs, repeat=2)]
    for variance in ("beta", "beta_tilde"):
        means, errors = zip(*(terms[variance]["L_{t-1}"] for terms in found))
        near(statistics.pvariance(means), np.mean(np.square(errors)))


def test_the_least_loss_is_that_of_the_perfect_network():
    """score, Ho (14): it is the mean L_simple of Bayes' rule; of a label's images, if it is told.

    Five standard errors of 160,000 draws; an error of a twentieth is found, and labels in disorder.
    """
    labels, schedule, training = np.arange(20) % 3, evenly(20, 0.01, 0.5), split(20)[0]
    config, rng = Config(T=20, beta_1=0.01, beta_T=0.5, p_uncond=0.25), np.random.default_rng(1)
    images = rng.integers(0, 64, (20, 2, 2, 1)) + 60 * labels.reshape(-1, 1, 1, 1)
    x = images.reshape(20, -1) / 127.5 - 1
    for known_labels in (None, labels):
        found, count = evaluate.least_loss(np.uint8(images), known_labels, config, 160_000)
        t, i = rng.integers(1, 21, (160_000, 1)), rng.choice(training, 160_000)
        told = (rng.random(160_000) >= 0.25) & (known_labels is not None)
        eps = rng.standard_normal((160_000, 4))
        x_t = ddpm.q_sample(x[i], t, eps, schedule)
        density = np.exp([log_normal(x_t, *q_marginal(x_i, t, schedule)).sum(1)
                          for x_i in x[training]])
        w = density * ~(told & (labels[i] != labels[training][:, None]))
        best = w.T @ x[training] / w.sum(0)[:, None]
        each = ((eps - ddpm.eps_from_x0(x_t, t, best, schedule)) ** 2).mean(1)
        error = each.std() / math.sqrt(160_000)
        assert abs(found - each.mean()) < 5 * error * math.sqrt(2) and error < 0.01 * found
        assert count == 18


@given(arrays(np.uint8, (3, 2, 2, 1)), arrays(np.uint8, (5, 2, 2, 1)))
def test_the_nearest_image_is_the_nearest(images, training):
    """Copies: the distance is the root of the mean square, pixels in [-1, 1]; 0 for a copy."""
    distance, index = evaluate.nearest(images, training)
    each = [[math.sqrt(((a / 127.5 - b / 127.5) ** 2).mean()) for b in training] for a in images]
    near(distance, np.min(each, axis=1), condition=10)
    near([row[i] for row, i in zip(each, index)], distance, condition=10)
    assert evaluate.nearest(training, training)[0].tolist() == [0] * 5


@pytest.mark.parametrize("count, side, known, pairs, unseen", [
    (12_000, 2, 10_000, 1000, 256), (700, 256, 256, 64, 64)])
def test_of_many_or_large_images_a_part_is_taken(count, side, known, pairs, unseen, monkeypatch):
    """score, Ho (14): the least loss compares with 10,000 images or 128 MB of them, from the whole
    file; of large ones fewer are drawn.  The t are spread over 1..T, and each image has its ε.
    """
    grey, best = np.uint8(256 * np.arange(count) // count), Mock(side_effect=lambda x_t, *_: x_t)
    images = np.broadcast_to(grey.reshape(-1, 1, 1, 1), (count, side, side, 1))
    monkeypatch.setattr(posterior, "best_x0", best)
    net, config = Half(), Config(p_uncond=0.0, batch=50, float32=True)
    assert evaluate.least_loss(images, None, config)[1] == known
    loss = evaluate.held_out_loss(net, config, images, None)
    assert loss() == loss()
    x_t, t = (torch.cat(parts).numpy() for parts in list(zip(*net.calls))[:2])
    assert max(len(x_t) for x_t, *_ in net.calls) == 50 and len(t) == 2 * unseen
    _, least_t, found, _ = best.call_args.args
    assert (len(least_t), len(found)) == (pairs, known) and found.min() < -0.9 and found.max() > 0.9
    for times in (least_t, t[:unseen]):
        part = (np.arange(len(times)) + 0.5) / len(times)
        assert np.abs((times - 0.5) / 1000 - part).max() <= 0.5 / 1000 + 0.5 / len(times)
    x0 = grey[split(count)[1][:unseen]] / 127.5 - 1
    eps = ddpm.eps_from_x0(x_t[:unseen, 0, 0, 0], t[:unseen], x0, PAPER)
    assert abs(eps.mean()) < 5 / math.sqrt(unseen) and 0.5 < eps.std() < 1.5


@pytest.mark.parametrize("shape, count, unseen, known", [
    ((1, 4, 4), 12_000, 1000, 10_800), ((3, 128, 128), 300, 42, 168)])
def test_what_is_evaluated_of_many_or_large_images(shape, count, unseen, known, call, monkeypatch):
    """Ho (5), copies: 1,000 images or 16 MB are evaluated, and compared with four times as many."""
    grey = np.uint8(255 * np.arange(count) // count).reshape(-1, 1, 1, 1)
    np.save("many.npy", np.broadcast_to(grey, (count, *shape[1:], shape[0])))
    drawn, bound, loaded = Mock(), Mock(), (Half(), Config(image_shape=shape))
    for name, mock in (("load_network", lambda *_: loaded), ("draw_perfectly", drawn),
                       ("print_bound", bound)):
        monkeypatch.setattr(evaluate, name, mock)
    assert call(evaluate, "--data", "many.npy")[0] == 0
    *_, training, _, others = drawn.call_args.args
    assert (len(training), len(others), len(bound.call_args.args[2])) == (known, 10, unseen)
    assert training.min() < 10 and training.max() > 245


def test_the_perfect_network_and_ours_are_drawn_from_one_noise(monkeypatch, tmp_path):
    """Copies: a network that is itself the perfect one draws the very images of that one."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(5).integers(0, 256, (20, 1, 2, 1), np.uint8)
    config = replace(POINT, image_shape=(1, 1, 2), batch=8, T=60, beta_1=0.01, beta_T=0.3)

    def perfect(x_t, t, label=None):
        x_t, t = x_t.double().numpy(), int(t[0])
        x0 = posterior.best_x0(x_t, t, images / 127.5 - 1, schedule_from(config))
        return torch.tensor(ddpm.eps_from_x0(x_t, t, x0, schedule_from(config))).float()
    net, nearest = Half(), Mock(wraps=evaluate.nearest)
    net.forward = Mock(wraps=perfect)
    monkeypatch.setattr(evaluate, "nearest", nearest)
    evaluate.draw_perfectly(net, config, images, None, images[:10])
    _, best, ours = (each.args[0] for each in nearest.call_args_list)
    assert np.array_equal(best, ours) and len(np.unique(best, axis=0)) > 5
    assert net.forward.call_count == 50                                  # as the README says


def test_beside_each_t_stand_its_loss_rate_and_distortion(capsys):
    """Ho section 4.3: as printed; no more images at a time are seen than in the training."""
    config, images = replace(POINT, batch=8, T=60, beta_T=0.3), np.uint8([[[[9]]], [[[200]]]])
    schedule, net, x0 = schedule_from(config), Half(), images / 127.5 - 1
    errors, _ = evaluate.squared_errors(lambda x_t, t, i: x_t / 2, schedule, torch.Tensor(x0))
    evaluate.print_bound(net, config, images, None)
    assert max(len(x_t) for x_t, *_ in net.calls) == 8
    rows = capsys.readouterr().out.split("distortion\n")[-1].splitlines()
    for row, t in zip(rows, sample.times(60, 10)[:0:-1], strict=True):
        rate, distortion = (array[t] for array in evaluate.rate_distortion(errors, x0, schedule))
        assert row.split() == [f"{t}", f"{errors[t].mean():.4f}", f"{rate:.4f}",
                               f"{distortion:.2f}"]
