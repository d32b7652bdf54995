"""A training run, from the first step to the last: begun, saved, stopped and gone on with, exactly."""
import copy
import io
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.checkpoint import config_of, copied, read
from support.config import Config, flag
from support.devices import SharedGenerator, mean_of_all, processes
from support.images import atomic_write, fingerprint, load, parsing, split
from unet import UNet


@dataclass
class Run:
    """What training works on, and all that a checkpoint keeps."""

    config: Config
    device: torch.device
    folder: Path
    net: UNet
    ema: UNet                                   # the average of net's parameters: what is sampled
    optimizer: torch.optim.Optimizer
    data_rng: SharedGenerator                      # images, labels and flips; on the host
    noise_rng: SharedGenerator                     # t and ε; on the device
    step: int = 0
    saved: int = 0                                 # the step of the last checkpoint
    log: list = field(default_factory=list)        # (step, mean loss since the entry before)
    loss_sum: Tensor = None                        # of the losses since the last entry

    @property
    def rank(self) -> int:
        return self.noise_rng.rank

    @property
    def last_good(self) -> str:
        if not self.saved:
            return "there is no checkpoint of it yet"
        path = self.folder / "checkpoint.pt"
        return f"the last good checkpoint, of step {self.saved}, is {path}"

    def log_loss(self):
        """The mean loss since the last entry.  Raises ValueError for one that is no number."""
        since = self.log[-1][0] if self.log else 0
        mean = mean_of_all(self.loss_sum) / (self.step - since)
        if not np.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {self.step}; {self.last_good}")
        self.log.append((self.step, mean))
        self.loss_sum = torch.zeros((), device=self.device)

    def state(self) -> dict:
        random = dict(data=self.data_rng.generator.get_state(),
                      noise=self.noise_rng.generator.get_state(), dropout=torch.get_rng_state())
        if self.device.type == "cuda":
            random["dropout_cuda"] = torch.cuda.get_rng_state(self.device)
        return dict(config=asdict(self.config), step=self.step, device=self.device.type,
                    net=dict(self.net.state_dict()), ema=dict(self.ema.state_dict()),
                    optimizer=self.optimizer.state_dict()["state"], random=random, log=self.log,
                    loss_sum=self.loss_sum)

    def restore(self, found: dict):
        """Become the run that was saved.  `self` is a new one with the same settings: a template."""
        for p in self.net.parameters():              # a step down no gradient: the optimizer's
            p.grad = torch.zeros_like(p)             # state takes its shape, and nothing moves
        self.optimizer.step()
        good = copied(self.state() | dict(log=[(0, 0.0)]), found, "the run")
        steps = [0, *(step for step, _ in good["log"])]
        if not (steps == sorted(set(steps)) and steps[-1] <= good["step"] <= 10**9
                and all(0 < loss < np.inf for _, loss in good["log"])):
            raise ValueError("its log is not that of its steps")
        self.net.load_state_dict(good["net"])
        self.ema.load_state_dict(good["ema"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | dict(state=good["optimizer"]))
        self.data_rng.generator.set_state(good["random"]["data"])
        self.noise_rng.generator.set_state(good["random"]["noise"])
        if self.rank == 0:                           # the others' dropout is their own
            torch.set_rng_state(good["random"]["dropout"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(good["random"]["dropout_cuda"], self.device)
        self.step = self.saved = good["step"]
        self.log, self.loss_sum = good["log"], good["loss_sum"].to(self.device)

    def save(self):
        """checkpoint.pt and log.csv, each whole or not at all; never weights that are no numbers."""
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):
            raise ValueError(f"the weights are no longer finite at step {self.step}; "
                             f"{self.last_good}")
        if self.rank != 0:
            return
        content = io.BytesIO()
        torch.save(self.state(), content)
        try:
            with atomic_write(self.folder / "checkpoint.pt") as file:
                file.write(content.getbuffer())
            self.write_log()
        except OSError as error:
            raise ValueError(f"{error.filename} could not be written: {error.strerror}; "
                             f"{self.last_good}") from None
        self.saved = self.step

    def write_log(self):
        with atomic_write(self.folder / "log.csv") as file:
            file.write(b"step,loss\n")
            file.writelines(f"{step},{loss!r}\n".encode() for step, loss in self.log)

    def export(self):
        """network.pt: the averaged network alone, in float16, to give away or to sample from."""
        ema = {name: value.half() for name, value in self.ema.state_dict().items()}
        with atomic_write(self.folder / "network.pt") as file:
            torch.save(dict(config=asdict(replace(self.config, data=None)), step=self.step,
                            ema=ema), file)


def new_run(config: Config, device: torch.device, folder: Path) -> Run:
    """A network and its average, Adam, and random numbers, all from the seed."""
    rank, world = processes()
    torch.manual_seed(config.seed)
    net = UNet(config).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), config.lr, betas=(0.9, config.beta2), fused=True)
    torch.manual_seed(config.seed + rank)                     # dropout differs from rank to rank
    return Run(config, device, folder, net, ema, optimizer,
               SharedGenerator(config.seed, torch.device("cpu"), rank, world),
               SharedGenerator(config.seed + 1, device, rank, world),
               loss_sum=torch.zeros((), device=device))


def open_run(config: Config, found: dict | None, device: torch.device, folder: Path):
    """The run, new or as `found`; its images and labels; the images held out: nothing is written.

    Raises ValueError or OSError for all that a user can get wrong.
    """
    images, labels = load(config.data)
    config_of_data = dict(
        fingerprint=fingerprint(images, labels), image_shape=(images.shape[3], *images.shape[1:3]),
        num_classes=int(labels.max()) + 1 if config.labels and labels is not None else 0)
    if found and config.fingerprint != config_of_data["fingerprint"]:
        raise ValueError(f"{config.data} holds other images than those the run began with: "
                         "name them with --data")
    config = replace(config, **config_of_data)
    run = new_run(config, device, folder)
    if config.batch % run.noise_rng.world:
        raise ValueError(f"--batch {config.batch} is no multiple of {run.noise_rng.world} processes")
    if found:
        with parsing(folder / "checkpoint.pt", "the checkpoint of a run"):
            run.restore(found | dict(config=asdict(config)))
    images, held_out = split(images)
    return run, images, split(labels)[0] if config.num_classes else None, held_out


def saved_run(folder: Path, device: torch.device, named: dict) -> tuple[dict, Config]:
    """The checkpoint to go on from and its settings, with the steps and data that are named anew.

    Raises ValueError for any other setting that differs: that would be another run.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path} is not there: start without --resume")
    found = read(path, "a checkpoint of train.py")
    if "net" not in found:
        raise ValueError(f"{path} holds no training run, only a trained network")
    with parsing(path, "the checkpoint of a run"):
        stored = config_of(found)
        if found.get("device") != device.type:
            raise ValueError(f"it began on {found.get('device')!r:.20}: go on there with --device")
        if type(found.get("step")) is not int:
            raise ValueError("it has no number of steps")
    wanted = replace(stored, **named)
    differ = [f"{flag(name)} was {old}, now {getattr(wanted, name)}"
              for name, old in asdict(stored).items()
              if name not in ("steps", "data") and old != getattr(wanted, name)]
    if differ:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(differ)}: "
                         "leave that out, or begin another run with another --out")
    if wanted.steps <= found["step"] and (folder / "network.pt").exists():
        raise ValueError(f"{path} is complete at step {found['step']}: "
                         "a larger --steps trains it further")
    return found, wanted
