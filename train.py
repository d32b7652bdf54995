"""Algorithm 1: teach a network to predict the noise in an image.               N6, N7, V13, Ho (14)

`python train.py` trains on the digits in assets/ and draws new ones into out/, with the average of
its weights.  `--data PATH` takes other images, `--resume` continues a stopped run, `torchrun
--nproc_per_node=N train.py` uses N devices.
"""
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor, nn

import posterior
from ddpm import Schedule, l_simple
from evaluate import least_loss
from sample import draw_images
from support.config import PRESETS, Config, Sampling, options, tuples
from support.console import SIGPIPE, Progress, on_stop, run_script
from support.data import split, to_batch, to_pixels
from support.devices import (autocast, graphed, over_all, precision, processes, seed_from, shared,
                             standard_normal, start_processes)
from support.forward import on_device, q_sample, schedule_from
from support.pictures import image_grid, write_png
from support.run import CHECKPOINT, NETWORK, Run, lock, open_run
from unet import parameters

LOG_EVERY = 10              # steps; to read a loss is to wait for the device


# ── Algorithm 1 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_1(run: Run, eps_theta: Callable, next_batch: Callable,
                schedule: Schedule) -> Iterator[Tensor]:
    """Yields the loss of each step; the caller decides when to stop                     Algorithm 1

    run: its network, average and optimizers are changed in place.  next_batch(step) → (x_0, label).
    eps_theta(x_t, t, label): the network's prediction of ε.
    """
    for step in count(run.step + 1):                                 # 1: repeat
        rng = run.rng(step)                                          #      (this step's numbers)
        x0, label = next_batch(step)                                 # 2:   x_0 ~ q(x_0)
        t = stratified_t(len(x0), schedule.T, rng)                   # 3:   t ~ Uniform({1, …, T})
        eps = standard_normal(x0.shape, rng)                         # 4:   ε ~ N(0, I)
        x_t = q_sample(x0, t, eps, schedule)                         # 5:   take a gradient step on
        loss = l_simple(eps, eps_theta(x_t, t, label))               #        ∇_θ ‖ε − ε_θ(x_t, t)‖²
        run.net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.net.parameters(), run.config.grad_clip)
        optimizer_step(run.optimizers, lr_scale(step, run.config))
        update_ema(run.ema, run.net, step, run.config.ema_decay)
        run.step = step
        yield loss.detach()                                          # 6: until converged


def stratified_t(n: int, T: int, rng: torch.Generator) -> Tensor:
    """t ~ Uniform({1, …, T}), but stratified: 1..T is cut into as many equal parts as the whole
    batch has images, and one t is drawn from each.

    The expected loss is that of independent t, and it varies less: better digits, sooner.
    """
    batch = n * processes()[1]
    u = torch.rand(batch, generator=rng, device=rng.device)
    u = (torch.arange(batch, device=rng.device) + u) / batch
    return shared((u * T).long().clamp(max=T - 1) + 1)                  # in float32 u can become 1


def lr_scale(step: int, config: Config) -> float:
    """What the learning rates are multiplied by: a straight rise to 1 during the warm-up, times,
    with `decay`, a straight fall from 1 at the first step to 1/steps at the last.
    """
    rise = min(1.0, step / config.warmup)
    fall = 1 - (step - 1) / config.steps if config.decay else 1.0
    return rise * fall


def optimizer_step(optimizers: list[torch.optim.Optimizer], scale: float):
    """A step of each optimizer, its learning rate scaled."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * scale
        optimizer.step()


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float):
    """θ_ema ← d θ_ema + (1 − d) θ,  d = min(decay, (1 + step)/(10 + step))

    At first this averages about the latest tenth of the steps, with a decay of 0.999 up to step
    9,000.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - d)


def batches(images: np.ndarray, labels: np.ndarray | None, config: Config,
            device: torch.device) -> Callable:
    """next_batch(step) → x_0 ~ q(x_0), (B, C, H, W) in [-1, 1], and labels (B,) or None.

    The images are those that are not held out.  With probability p_uncond the label num_classes,
    for "no label", takes the place of an image's own.
    """
    training, _ = split(len(images))
    to = dict(device=device, non_blocking=device.type == "cuda")  # MPS would read it too late

    def next_batch(step):
        rng = torch.Generator().manual_seed(seed_from("data", config.seed, step))     # on the host
        chosen = shared(torch.randint(len(training), (config.batch,), generator=rng))
        flip = shared(torch.rand(config.batch, generator=rng)) < 0.5
        drop = shared(torch.rand(config.batch, generator=rng)) < config.p_uncond
        rows = training[chosen.numpy()]
        x0 = to_batch(torch.from_numpy(images[rows]).to(**to))
        if config.flip:
            x0 = torch.where(flip.to(**to)[:, None, None, None], x0.flip(3), x0)
        if labels is None:
            return x0, None
        return x0, torch.where(drop, config.num_classes, torch.from_numpy(labels[rows])).to(**to)
    return next_batch


# ── The training run ──────────────────────────────────────────────────────────────────────────────

def predictor(run: Run, compile: bool) -> Callable:
    """eps_theta(x_t, t, label): the run's network; DDP averages the gradients of all processes."""
    net, config = run.net, run.config
    if processes()[1] > 1:
        net = nn.parallel.DistributedDataParallel(net)
    elif not compile:
        net = graphed(net, run.device, config.batch, config, labelled=config.num_classes > 0)
    net = torch.compile(net) if compile else net

    def eps_theta(x_t, t, label):
        with autocast(run.device, config.float32):
            return net(x_t, t) if label is None else net(x_t, t, label)
    return eps_theta


def train(run: Run, images: np.ndarray, labels: np.ndarray | None, folder: Path,
          compile: bool = False) -> int:
    """Take steps until all are done, or a signal asks to stop; returns that signal, or 0."""
    config, (rank, world), signals, losses = run.config, processes(), [], []
    on_stop(signals.append)                                  # noted here, and acted on after a step
    progress = Progress(config.steps, run.step, config.batch)
    # five times in all, but at least every 5,000 steps, and always with a new entry of the log
    save_every = LOG_EVERY * max(1, min(config.steps // 5, 5000) // LOG_EVERY)
    schedule = on_device(schedule_from(config), run.device)
    next_batch = batches(images, labels, config, run.device)
    for loss in algorithm_1(run, predictor(run, compile), next_batch, schedule):
        losses.append(loss)
        done = run.step == config.steps
        if run.step % LOG_EVERY and not done:
            continue
        mean = over_all(torch.stack(losses).mean(), run.device).item() / world
        if not np.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {run.step}: a smaller --lr or --muon-lr "
                             "may help")
        run.log.append((run.step, mean))
        losses.clear()
        try:
            progress(run.step, f"step {run.step} of {config.steps} · loss {mean:.4f}")
        except OSError:                  # stdout is closed, as by `| head`: a stop like Ctrl-C
            signals.append(SIGPIPE)
        # a signal to one process stops all, at the same step
        stop = 0 if done else int(over_all(max(signals, default=0), run.device, largest=True))
        if done or stop or run.step % save_every == 0:
            run.save(folder)
            if rank == 0 and not stop:
                draw_samples(run, folder / f"step-{run.step:06}.png")
        if done or stop:
            return stop


def draw_samples(run: Run, path: Path):
    """100 images, drawn with the average of the weights in 10 steps of dpm; labels in order."""
    config, classes = run.config, run.config.num_classes
    sampling = Sampling("dpm", steps=10, batch=config.batch // processes()[1])
    label = np.arange(100) * classes // 100 if classes else None
    write_png(path, image_grid(draw_images(run.ema, config, sampling, label)[-1], columns=10))


def announce(run: Run, images: np.ndarray, labels: np.ndarray | None):
    """What is about to happen, and what loss to expect."""
    config, schedule = run.config, schedule_from(run.config)
    training, held_out = split(len(images))
    some = images[training[:100]]
    l_T = posterior.bits_per_dim(posterior.L_T(to_pixels(some), schedule))
    verdict = "x_T is noise" if l_T < 0.01 else (
        "x_T IS NOT YET NOISE: take more steps, or larger betas")
    least, known = least_loss(images, labels, config)
    world = processes()[1]
    print(f"device    {run.device}, {precision(run.device, config.float32)}"
          f"{f', {world} processes' if world > 1 else ''}")
    print(f"images    {len(training)} of {'x'.join(map(str, images.shape[1:]))} to train on, "
          f"{len(held_out)} held out, {config.num_classes or 'no'} labels, "
          f"pixels {some.min()} .. {some.max()}")
    for c in set(range(config.num_classes)) - set([] if labels is None else labels[training]):
        print(f"          label {c} has no image to train on: all of its images are held out")
    print(f"network   {parameters(run.net):,} parameters")
    print(f"schedule  {config.schedule}, T = {schedule.T}: L_T = {l_T:.3g} bits/dim ({verdict})")
    print(f"loss      1 for a network that predicts no noise; {least:.4f}, the least there is for "
          f"{known} of\n          these images, for one that draws nothing but copies of them\n")


def arguments() -> ArgumentParser:
    parser = options("Train a denoising diffusion model; by default, on digits.", Config)
    parser.add_argument("--preset", choices=PRESETS, help="the settings to begin with: digits "
                        "(the default), or cifar10, the paper's")
    parser.add_argument("--out", help="folder for checkpoint and pictures (out)")
    parser.add_argument("--resume", action=BooleanOptionalAction,
                        help="continue the run whose checkpoint is in --out, exactly")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best one here")
    parser.add_argument("--deterministic", action=BooleanOptionalAction,
                        help="bit for bit repeatable on a GPU too; slower")
    parser.add_argument("--compile", action=BooleanOptionalAction,
                        help="use torch.compile: slow to start, then faster")
    return parser


def main():
    named = tuples(vars(arguments().parse_args()))
    out, resume = Path(named.pop("out", "out")), named.pop("resume", False)
    compile, deterministic = (named.pop(name, False) for name in ("compile", "deterministic"))
    device = start_processes(named.pop("device", None), deterministic)
    run, images, labels = open_run(out, device, named, resume)
    with lock(out):
        announce(run, images, labels)
        stopped = train(run, images, labels, out, compile)
    if stopped:
        print(f"\nstopped and saved at step {run.step}; "
              f"to resume: python train.py --resume --out {quote(str(out))}")
        raise SystemExit(128 + stopped)
    print(f"\ndrawn: {out}/step-{run.step:06}.png\n"
          f"beside it: {CHECKPOINT}, {NETWORK}, log.csv\n"
          f"next: python sample.py --weights {quote(str(out / CHECKPOINT))}")


if __name__ == "__main__":
    run_script(main)
