"""Algorithm 1: teach a network to see the noise in an image.                   N6, N7, V12, Ho (14)

`python train.py` trains on the digits in assets/ and draws new ones into out/.  `--data PATH` takes
other images, `--resume` goes on after a stop, `torchrun --nproc_per_node=N train.py` uses N
devices, `--evaluate` prints the bound on −log p(x_0) of the images that were held out.
"""
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import evaluate
import posterior
from ddpm import Schedule
from sample import generate, on_device, q_sample, schedule_from
from support.config import Config, Sampling, Session, add_options, given
from support.console import Parser, Progress, chart, one_line_errors, stop_signals
from support.devices import SharedGenerator, autocast, over_all, precision, start_processes
from support.images import image_grid, to_batch, to_pictures, to_pixels, write_png
from support.run import Run, open_run
from unet import parameters

LOOK = 10              # steps between two looks at loss and signals: each waits for the device
RESIDENT = 1 << 30     # bytes: a smaller data set moves to the device as a whole


# ── Algorithm 1 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_1(eps_theta: Callable, next_batch: Callable, schedule: Schedule,
                noise: SharedGenerator, descend: Callable) -> Iterator[tuple]:
    """Yields t and the loss of each image, step by step; the caller stops               Algorithm 1

    eps_theta(x_t, t, label) → ε;  next_batch() → (x_0, label);  descend(loss): a gradient step, and
    all that follows from it.
    """
    while True:                                                      # 1: repeat
        x0, label = next_batch()                                     # 2:   x_0 ~ q(x_0)
        t = stratified_t(len(x0), schedule.T, noise)                 # 3:   t ~ Uniform({1, …, T})
        eps = noise.standard_normal(x0.shape)                        # 4:   ε ~ N(0, I)
        loss = l_simple(eps_theta, x0, t, eps, label, schedule)      # 5:   gradient step on
        descend(loss.mean())                                         #        ∇_θ ‖ε − ε_θ(x_t, t)‖²
        yield t, loss.detach()                                       # 6: until converged


def l_simple(eps_theta: Callable, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor | None,
             schedule: Schedule) -> Tensor:
    """L_simple = ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖²                               Ho (14), N6, N7

    Of each image (B,), the mean over its pixels.  x0, eps: (B, C, H, W);  t: (B,), in 1..T;
    label: (B,) or None.
    """
    x_t = q_sample(x0, t, eps, schedule)
    return (eps - eps_theta(x_t, t, label)).square().mean((1, 2, 3))


def stratified_t(count: int, T: int, noise: SharedGenerator) -> Tensor:
    """t ~ Uniform({1, …, T}), but stratified: one t from each of `count` equal parts of the range.

    The expected loss is that of independent t, and it varies less: better digits, sooner (README).
    """
    return (noise.stratified(count) * T).long().clamp(max=T - 1) + 1


def learning_rate(step: int, config: Config) -> float:
    """The factor on the largest rate: rises for `warmup` steps, times, with `decay`, a linear fall
    from 1 at the first step to 1/steps at the last.
    """
    rise = min(1.0, step / config.warmup)
    fall = 1 - (step - 1) / config.steps if config.decay else 1.0
    return rise * fall


def gradient_step(loss: Tensor, net: nn.Module, optimizers: list[torch.optim.Optimizer], step: int,
                  config: Config):
    """Down the clipped gradient, at the step's learning rate                Algorithm 1, line 5"""
    net.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate(step, config)
        optimizer.step()


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float):
    """θ_ema ← d θ_ema + (1 − d) θ, early on with d for an average over the latest tenth."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(ema.parameters(), net.parameters()):
        average.lerp_(parameter, 1 - decay)


def batches(images: np.ndarray, labels: np.ndarray | None, config: Config, rng: SharedGenerator,
            device: torch.device) -> Callable:
    """next_batch() → x_0 ~ q(x_0), (B, C, H, W) in [-1, 1], and labels (B,) or None, on the device.

    A label is dropped with probability p_uncond: then it is num_classes.  Nothing here waits for
    the device, so the next batch is gathered while the device computes.
    """
    images = torch.from_numpy(images)
    images = images.to(device) if images.nbytes <= RESIDENT else images
    labels = None if labels is None else torch.from_numpy(labels)

    def next_batch():
        index = rng.integers(0, len(images) - 1, config.batch // rng.world)
        flip, drop = rng.uniform(len(index)) < 0.5, rng.uniform(len(index)) < config.p_uncond
        there = index.to(images.device, non_blocking=True)
        x0 = to_batch(images[there].to(device, non_blocking=True))
        if config.flip:
            flip = flip.to(device, non_blocking=True)[:, None, None, None]
            x0 = torch.where(flip, x0.flip(3), x0)
        if labels is None:
            return x0, None
        label = torch.where(drop, config.num_classes, labels[index])
        return x0, label.to(device, non_blocking=True)
    return next_batch


# ── Who logs, draws, saves and stops ──────────────────────────────────────────────────────────────

def losses(run: Run, images: np.ndarray, labels: np.ndarray | None, compile: bool) -> Iterator:
    """Algorithm 1 with the run's network, images and noise; each loss is a step further."""
    net = nn.parallel.DistributedDataParallel(run.net) if run.world > 1 else run.net
    net = torch.compile(net) if compile else net

    def eps_theta(x_t, t, label):
        with autocast(run.device, run.config.float32):
            return net(x_t, t, label)

    def descend(loss):
        run.step += 1
        gradient_step(loss, run.net, run.optimizers, run.step, run.config)
        update_ema(run.ema, run.net, run.step, run.config.ema_decay)

    next_batch = batches(images, labels, run.config, run.data_rng, run.device)
    schedule = on_device(schedule_from(run.config), run.device)
    return algorithm_1(eps_theta, next_batch, schedule, run.noise_rng, descend)


def train(run: Run, images: np.ndarray, labels: np.ndarray | None, compile: bool = False) -> int:
    """Take steps until all are done, or a signal asks to stop: its number is returned, or 0."""
    steps, signals, recent = run.config.steps, stop_signals(), []
    progress = Progress(steps, run.step, run.config.batch)
    every = LOOK * max(1, min(steps // 5, 5000) // LOOK)            # steps between two checkpoints
    for t_and_loss in losses(run, images, labels, compile):
        recent.append(t_and_loss)
        done = run.step == steps
        if run.step % LOOK and not done:
            continue
        run.log_loss(recent)
        if run.rank == 0:
            progress(run.step, f"step {run.step} of {steps} · loss {run.log[-1][1]:.4f}")
        recent.clear()
        # a signal to one process stops all, at the same step
        stop = int(over_all(max(signals, default=0), run.device, largest=True))
        checkpoint = run.step % every == 0
        if done or (checkpoint and not stop):
            draw_samples(run, f"step-{run.step:06}.png")
        if done or checkpoint or stop:
            run.save()
        if done or stop:
            return 0 if done else stop


def draw_samples(run: Run, name: str):
    """100 images that the averaged network draws in 10 steps, its labels in order."""
    if run.rank == 0:
        classes = run.config.num_classes
        label = torch.arange(100, device=run.device) * classes // 100 if classes else None
        for x_t in generate(run.ema, run.config, Sampling(steps=10), range(100), label):
            x0 = x_t
        write_png(run.folder / name, image_grid(to_pictures(x0), columns=10))


def announce(run: Run, images: np.ndarray, held_out: np.ndarray, least: np.ndarray):
    """What is about to happen, and what loss to expect.  least: by quarter of t."""
    config, schedule, world = run.config, schedule_from(run.config), run.world
    x0 = to_pixels(images[:1000])
    l_T = posterior.bits_per_dim(posterior.L_T(x0, schedule))
    noise = "x_T is noise" if l_T < 0.01 else "x_T IS STILL THE IMAGE: more steps or larger betas!"
    print(f"device    {run.device}, {precision(run.device, config.float32)}"
          f"{f', {world} processes' if world > 1 else ''}")
    print(f"images    {len(images)} of {'x'.join(map(str, images.shape[1:]))} to train on, "
          f"{len(held_out)} held out, {config.num_classes or 'no'} labels")
    print(f"network   {parameters(run.net):,} parameters")
    print(f"schedule  {config.schedule}, T = {schedule.T}: L_T = {l_T:.3g} bits/dim ({noise})")
    print(f"loss      1 knows nothing (ε_θ = 0); {np.nanmean(least):.4f} is the least possible on "
          "these images,\n          of a network that draws nothing but copies of them\n")


def arguments() -> Parser:
    parser = Parser(description="Train a denoising diffusion model; without options, on digits.")
    return add_options(add_options(parser, Session), Config)


@one_line_errors()
def main():
    args = arguments().parse_args()
    session, named = Session(**given(args, Session)), given(args, Config)
    out = Path(session.out)
    if session.evaluate:
        return evaluate.print_bound(out / "checkpoint.pt", named.get("data"), session.device)
    device = start_processes(session.device, session.deterministic)
    run, images, labels, held_out = open_run(out, device, named, session.resume)
    if run.rank == 0:
        least = evaluate.least_loss(images, labels, run.config)
        announce(run, images, held_out, least)
        run.write_log()                  # fails now if the folder cannot be written
    stopped = train(run, images, labels, session.compile)
    if run.rank == 0 and stopped:
        print(f"\nstopped and saved at step {run.step}; "
              f"to go on: python train.py --resume --out {out}")
    elif run.rank == 0:
        recent = np.array(run.log[-max(1, len(run.log) // 10):])[:, 2:]
        recent = np.ma.masked_invalid(recent).mean(axis=0).filled(np.nan)
        told = ", ".join(f"{loss:.4f} ({floor:.4f})" for loss, floor in zip(recent, least))
        print(f"\n{chart(run.log)}\n\nloss by quarter of t (least): {told}\n"
              f"drawn: {out}/step-{run.step:06}.png\n"
              "beside it: checkpoint.pt, log.csv, network.pt\n"
              f"next: python sample.py --weights {out / 'checkpoint.pt'}")
    raise SystemExit(128 + stopped if stopped else 0)


if __name__ == "__main__":
    main()
