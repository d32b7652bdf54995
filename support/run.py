"""A training run: begun, saved, stopped, and gone on with exactly."""
import copy
import io
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from support.checkpoint import copied, network_of, read
from support.config import DIGITS, PRESETS, Config, flag
from support.devices import SharedGenerator, over_all, processes
from support.images import atomic_write, fingerprint, load, parsing, split
from unet import UNet


class Run:
    """What training works on: network, average, optimizers, random numbers, all from the seed."""

    def __init__(self, config: Config, device: torch.device, folder: Path):
        self.config, self.device, self.folder = config, device, folder
        self.rank, self.world = processes()
        torch.manual_seed(config.seed)
        self.net = UNet(config).to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizers = optimizers(self.net, config)
        torch.manual_seed(config.seed + self.rank)             # dropout differs from rank to rank
        self.data_rng = SharedGenerator(config.seed, "cpu", self.rank, self.world)   # on the host
        self.noise_rng = SharedGenerator(config.seed + 1, device, self.rank, self.world)
        self.step = self.saved = 0              # saved: the step of the last checkpoint
        self.log = []         # (step, mean loss since the entry before, and by quarter of t)

    def log_loss(self, recent: list[tuple[Tensor, Tensor]]):
        """The mean loss of the pairs (t, loss of each image) since the last entry, of all and of
        each quarter of 1..T.  Raises ValueError if it is no number.
        """
        t, loss = (torch.cat(part) for part in zip(*recent))
        quarter = F.one_hot((t - 1) * 4 // self.config.T, 4).float()
        total, count = over_all(torch.stack([loss @ quarter, quarter.sum(0)]), self.device).tolist()
        mean = sum(total) / sum(count)
        if not np.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {self.step}; {self.last_good()}")
        parts = (part / n if n else np.nan for part, n in zip(total, count))
        self.log.append((self.step, mean, *parts))

    def last_good(self) -> str:
        path = self.folder / "checkpoint.pt"
        return (f"the last good checkpoint, of step {self.saved}, is {path}" if self.saved
                else "there is no checkpoint of it yet")

    def state(self) -> dict:
        random = dict(data=self.data_rng.generator.get_state(),
                      noise=self.noise_rng.generator.get_state(), dropout=torch.get_rng_state())
        if self.device.type == "cuda":
            random["dropout_cuda"] = torch.cuda.get_rng_state(self.device)
        return dict(config=asdict(self.config), step=self.step, device=self.device.type,
                    net=dict(self.net.state_dict()), ema=dict(self.ema.state_dict()),
                    optimizers={type(optimizer).__name__: optimizer.state_dict()["state"]
                                for optimizer in self.optimizers}, random=random, log=self.log)

    def restore(self, found: dict):
        """Become the run that was saved; this one, new and with the same settings, is the template.

        Raises ValueError, with the name, for whatever differs from it.
        """
        for p in self.net.parameters():              # a step down no gradient: the optimizer's
            p.grad = torch.zeros_like(p)             # state takes its shape, and nothing moves
        for optimizer in self.optimizers:
            optimizer.step()
        good = copied(self.state() | dict(log=[(0,) + 5 * (0.0,)]), found, "the run")
        steps = [0, *(step for step, *_ in good["log"])]
        if not (steps == sorted(set(steps)) and steps[-1] <= good["step"] <= 10**9
                and all(0 < loss < np.inf for _, loss, *_ in good["log"])):
            raise ValueError("its log is not that of its steps")
        self.net.load_state_dict(good["net"])
        self.ema.load_state_dict(good["ema"])
        for optimizer in self.optimizers:
            state = good["optimizers"][type(optimizer).__name__]
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
        self.data_rng.generator.set_state(good["random"]["data"])
        self.noise_rng.generator.set_state(good["random"]["noise"])
        if self.rank == 0:                           # the others' dropout is their own
            torch.set_rng_state(good["random"]["dropout"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(good["random"]["dropout_cuda"], self.device)
        self.step, self.saved, self.log = good["step"], good["step"], good["log"]

    def save(self):
        """log.csv, network.pt (the average alone, in float16, to give away) and checkpoint.pt.

        Each is written whole or not at all, and never weights that are not finite.
        """
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):
            raise ValueError(f"the weights are not finite at step {self.step}; {self.last_good()}")
        self.write_log()
        self.write("network.pt", dict(
            config=asdict(replace(self.config, data=None)), step=self.step,
            ema={name: value.half() for name, value in self.ema.state_dict().items()}))
        self.write("checkpoint.pt", self.state())
        self.saved = self.step

    def write_log(self):
        rows = "".join(",".join(map(repr, row)) + "\n" for row in self.log)
        header = "step,loss,loss_t1,loss_t2,loss_t3,loss_t4"            # t1: the first quarter of t
        self.write("log.csv", f"{header}\n{rows}".encode())

    def write(self, name: str, content: bytes | dict):
        if self.rank == 0:
            if isinstance(content, dict):
                torch.save(content, buffer := io.BytesIO())
                content = buffer.getbuffer()
            try:
                with atomic_write(self.folder / name) as file:
                    file.write(content)
            except OSError as error:
                raise ValueError(f"{error.filename} could not be written: {error.strerror}; "
                                 f"{self.last_good()}") from None


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, whose matrix is made orthogonal before each step.

    A convolution is the matrix (c_out, c_in · 3 · 3).  In float32: PyTorch's own Muon computes in
    bfloat16, which doubles the time of a whole training step on processors that have none.
    """

    def __init__(self, params, momentum: float = 0.95):
        super().__init__(params, dict(lr=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = []
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(buffer, group["momentum"]).flatten(1))      # Nesterov
            for p, update in zip(group["params"], orthogonal(updates)):
                rows, columns = update.shape
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """U Vᵀ of each matrix U S Vᵀ, nearly: five rounds of Newton-Schulz bring all of S near 1.

    A round x ← p(x xᵀ) x multiplies x by a polynomial in x xᵀ.  These commute, so the rounds need
    only the small x xᵀ, all of one size together, and x itself takes their product at the end.
    """
    scaled, products = [matrix / (matrix.norm() + 1e-7) for matrix in matrices], {}
    wide = [x.mT if len(x) > len(x.mT) else x for x in scaled]
    for rows in {len(x) for x in wide}:
        alike = [i for i, x in enumerate(wide) if len(x) == rows]
        s = torch.stack([wide[i] @ wide[i].mT for i in alike])
        one = product = torch.eye(rows).to(s)
        for _ in range(5):
            p = 3.4445 * one - 4.7750 * s + 2.0315 * s @ s
            s, product = p @ s @ p, p @ product
        products |= zip(alike, product)
    near = [products[i] @ x for i, x in enumerate(wide)]
    return [x.mT if len(matrix) > len(matrix.mT) else x for matrix, x in zip(matrices, near)]


def optimizers(net: UNet, config: Config) -> list[torch.optim.Optimizer]:
    """Adam; with muon_lr, Muon for the matrices and convolutions between first and last layer."""
    hidden = [p for part in (net.down, net.middle, net.up) for p in part.parameters()
              if p.ndim > 1 and config.muon_lr]
    kept = set(hidden)
    others = [p for p in net.parameters() if p not in kept]
    adam = torch.optim.Adam([dict(params=others, initial_lr=config.lr)], config.lr,
                            betas=(0.9, config.beta2), fused=True)
    return [adam, Muon([dict(params=hidden, initial_lr=config.muon_lr)])] if hidden else [adam]


def open_run(folder: Path, device: torch.device, named: dict, resume: bool) -> tuple:
    """The run, its images and labels, and the images held out.  Nothing is written here.

    named: the settings of the command line.  A run goes on with the settings it began with, but for
    `steps` and where its images lie.  Raises ValueError or OSError for all that can be mended.
    """
    path = folder / "checkpoint.pt"
    if resume != path.exists():
        raise ValueError(f"{path} is not there: start without --resume" if resume else f"{path} is "
                         "there already: go on with --resume, or begin another run with --out")
    begun, found = (saved_run(path, device) if resume
                    else (PRESETS[named.get("preset", "digits")], None))
    config = replace(begun, **named)
    images, labels = load(config.data)
    config = replace(
        config, fingerprint=fingerprint(images, labels),
        image_shape=(images.shape[3], *images.shape[1:3]),
        num_classes=int(labels.max()) + 1 if config.labels and labels is not None else 0)
    if resume:
        refuse_changes(begun, config)
    run = Run(config, device, folder)
    if config.batch % run.world:
        raise ValueError(f"--batch {config.batch} is no multiple of {run.world} processes")
    if resume:
        with parsing(path, "the checkpoint of a run"):
            run.restore(found | dict(config=asdict(config)))
        if run.step >= config.steps:
            raise ValueError(f"{path} is complete at step {run.step}: "
                             "a larger --steps trains it further")
    images, held_out = split(images)
    return run, images, split(labels)[0] if config.num_classes else None, held_out


def saved_run(path: Path, device: torch.device) -> tuple[Config, dict]:
    """The settings of a run that was saved, and what it holds, not yet believed."""
    found = read(path, "a checkpoint of train.py")
    begun = network_of(found, path)[1]                        # and it is as large as it says it is
    if "net" not in found:
        raise ValueError(f"{path} holds no training run, only a trained network")
    if found.get("device") != device.type:
        raise ValueError(f"{path} did not begin on {device.type}: go on there with --device")
    return begun, found


def refuse_changes(begun: Config, config: Config):
    """Raise ValueError for other images or settings: that would be another run."""
    if begun.fingerprint != config.fingerprint:
        raise ValueError(f"{config.data or DIGITS} holds other images than those the run began "
                         "with: name them with --data")
    differ = [f"{flag(name)} was {was}, now {getattr(config, name)}"
              for name, was in asdict(begun).items()
              if name not in ("steps", "data") and was != getattr(config, name)]
    if differ:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(differ)}: "
                         "leave that out, or begin another run with another --out")
