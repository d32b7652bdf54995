"""The paper's figures that need a network, or points in the plane.    Ho figures 2, 6, 7, 8, 9, 10

`python figures.py` draws all of them into out/, with your last checkpoint or else the network that
ships; `python figures.py 7 9` draws some.  Each takes Algorithm 2 from some x_t at some t.
"""
import support                             # first: Ctrl-C while the rest is imported is quiet
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

import ddpm
import posterior
import sample
from support import console, data, devices, pictures
from support.config import Config, Sampling, options, schedule_from
from support.weights import load_network


# ── Points in the plane ───────────────────────────────────────────────────────────────────────────

def figure_2(points: int = 1000, steps: int = 200):
    """x_0 → x_T → x_0, for points on a spiral, with the perfect network of these  Ho figure 2

    The second picture has the paths of twenty of them, by Algorithm 2 and by DDIM with η = 0.
    """
    schedule = sample.respaced(ddpm.linear(), sample.times(1000, steps))
    rng = np.random.default_rng(0)
    angle = 3 * np.pi * rng.uniform(0.05, 1, points) ** 0.5
    x0 = angle[:, None] / 5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    noise, shown = partial(rng.standard_normal, x0.shape), np.linspace(0, steps, 7).astype(int)

    def x0_theta(x_t, t):
        return posterior.best_x0(x_t, t, x0, schedule)

    def eps_theta(x_t, t):
        return ddpm.eps_from_x0(x_t, t, x0_theta(x_t, t), schedule)
    walks = (sample.algorithm_2(eps_theta, schedule, schedule.beta, noise),
             sample.ddim(x0_theta, schedule, 0.0, noise))
    walked, straight = (np.array(list(followed(walk, steps, "figure 2"))) for walk in walks)
    there = [in_the_plane(ddpm.q_sample(x0, t, noise(), schedule)) for t in shown]
    back = [in_the_plane(walked[steps - t]) for t in shown]
    draw("2", torch.tensor(np.array(there + back)), columns=len(there))
    paths = [in_the_plane(np.linspace(walk[:-1, :20], walk[1:, :20], 30).reshape(-1, 2), 240, 25)
             for walk in (walked, straight)]
    draw("2-paths", torch.tensor(np.array(paths)), columns=2)


def in_the_plane(points: np.ndarray, size: int = 64, black: int = 4) -> np.ndarray:
    """Points (N, 2) in [-3, 3]² as a picture (1, size, size) in [-1, 1]; `black` of them are -1."""
    count, _, _ = np.histogram2d(-points[:, 1], points[:, 0], size, ((-3, 3), (-3, 3)))
    return 1 - 2 * np.minimum(count / black, 1)[None]


# ── Images ────────────────────────────────────────────────────────────────────────────────────────

def walk_of(net, config: Config, noise: Callable, count: int, label=None) -> tuple:
    """walk(x_t, t) → x_t, x_{t−1}, …, x_0 by Algorithm 2, and x̂_0(x_t, t), for `count` images."""
    eps_theta, schedule = sample.prediction(net, config, Sampling(steps=config.T), count, label)
    sigma2 = posterior.reverse_variance("beta", schedule)
    walk = partial(sample.algorithm_2, sample.clipped(eps_theta, schedule), schedule, sigma2, noise)
    return walk, sample.x0_predictor(eps_theta, schedule)


def figure_6(net, config: Config):
    """x̂_0 while it forms, t = T .. 0, a row for each image (of each label)    Ho figures 6, 10"""
    noise, T = noise_of(net, config, range(10)), config.T
    label = np.arange(10) % config.num_classes if config.num_classes else None
    walk, x0_theta = walk_of(net, config, noise, 10, label)
    columns = [x0_theta(x_t, t) if t else x_t
               for t, x_t in zip(range(T, -1, -1), followed(walk(), T, "figure 6"))
               if t % (T // min(T, 10)) == 0]
    draw("6", torch.stack(columns, dim=1).flatten(0, 1), columns=len(columns))


def figure_7(net, config: Config):
    """One x_t, and six x_0 from it, for t = T, ¾T, ½T, ¼T: what is decided when     Ho figure 7"""
    one, _ = walk_of(net, config, noise_of(net, config, range(1)), 1)
    walked, rows = list(followed(one(), config.T, "figure 7")), []
    for t in (config.T * quarters // 4 for quarters in (4, 3, 2, 1)):
        walk, _ = walk_of(net, config, noise_of(net, config, range(1, 7)), 6)
        x_t = walked[config.T - t]
        *_, x0 = followed(walk(x_t.repeat(6, 1, 1, 1), t), t, "figure 7")
        rows += [x_t, x0]
    draw("7", torch.cat(rows), columns=7)


def figure_9(net, config: Config, known: torch.Tensor):
    """x_t of two images, mixed 0 … 1 and decoded, a row for each t; each end beside them

    Both are noised by one ε and all of a row decoded by the same z, so that a mix is as noisy as
    its ends: that is ours.                                                    Ho figures 8, 9
    """
    weights, rows = torch.linspace(0, 1, 9, device=known.device).reshape(-1, 1, 1, 1), []
    for t in (config.T * eighths // 8 for eighths in (1, 2, 4, 6, 8)):
        noise = noise_of(net, config, range(1))
        x_t, other = ddpm.q_sample(known, t, noise(), schedule_from(config)).split(1)
        walk, _ = walk_of(net, config, noise, 9)
        mixed = (1 - weights) * x_t + weights * other
        *_, x0 = followed(walk(mixed, t), t, "figure 9")
        rows += [known[:1], x0, known[1:]]
    draw("9", torch.cat(rows), columns=11)


def noise_of(net, config: Config, images: range) -> Callable:
    return sample.image_noise(0, images, config.image_shape, next(net.parameters()).device)


def followed(walk: Iterator, steps: int, name: str) -> Iterator:
    """The same walk, with progress."""
    progress = console.Progress(steps)
    for k, x_t in enumerate(walk):
        progress(k, f"{name}: step {k} of {steps}")
        yield x_t


def draw(name: str, images, columns: int):
    """A sheet of images (N, C, H, W) in [-1, 1]."""
    found = pictures.to_pictures(images)
    pictures.write_png(f"out/figure-{name}.png", pictures.image_grid(found, columns))
    print(f"drawn: out/figure-{name}.png")


@torch.no_grad()
def main():
    parser = options(__doc__.split("\n\n")[1], Sampling, names=("weights", "data", "device"))
    parser.add_argument("figures", nargs="*", default=[], metavar="FIGURE",
                        help="2, 6, 7, 9 (all of them)")
    asked = vars(parser.parse_args())
    figures = asked.pop("figures") or ["2", "6", "7", "9"]
    for name in set(figures) - {"2", "6", "7", "9"}:
        raise ValueError(f"there is no figure {name} here: choose from 2, 6, 7, 9")
    chosen = Sampling(**asked)
    net, config = load_network(chosen.weights or sample.default_weights(),
                               devices.choose_device(chosen.device))
    if "2" in figures:
        figure_2()
    if "6" in figures:
        figure_6(net, config)
    if "7" in figures:
        figure_7(net, config)
    if "9" in figures:
        images, _ = data.held_out_images(chosen.data or config.data or data.DIGITS, config, 2, 2)
        device = next(net.parameters()).device
        figure_9(net, config, data.to_batch(torch.from_numpy(images).to(device)))


if __name__ == "__main__":
    console.run_script(main)
