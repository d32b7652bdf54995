"""A training run: begun, saved, and resumed exactly."""
import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from support.config import PRESETS, Config, flag, schedule_from
from support.data import DIGITS, fingerprint, load, parsing
from support.devices import processes, seed_from
from support.muon import optimizers
from support.pictures import atomic_write
from support.weights import config_from, load_network, read_tensors, relabelled, write_tensors
from unet import UNet

CHECKPOINT, NETWORK = "checkpoint.safetensors", "network.safetensors"
# What a network keeps when it is trained further, with --from: its sizes and its schedule.
KEPT = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_groups",
        "patch_size", "schedule", "T", "beta_1", "beta_T")


class Run:
    """What training changes: the network, its average, the optimizers; the steps and their loss."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device, self.schedule = config, device, schedule_from(config)
        torch.manual_seed(config.seed)
        self.net = UNet(config).to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizers = optimizers(self.net, config.lr, config.beta2, config.muon_lr)
        self.step, self.log = 0, []     # (step, mean loss since the last entry, held out or NaN)

    def rng(self, step: int) -> torch.Generator:
        """The random numbers of one step.  They follow from the seed, the step and the process
        alone, dropout's too, so a run that goes on needs no state of them.
        """
        key = self.config.seed, step, processes()[0]
        torch.manual_seed(seed_from("dropout", *key))
        return torch.Generator(self.device).manual_seed(seed_from("noise", *key))

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, the live tensors themselves, under flat names."""
        names = {p: name for name, p in self.net.named_parameters()}
        return ({f"net.{name}": p for name, p in self.net.state_dict().items()}
                | {f"ema.{name}": p for name, p in self.ema.state_dict().items()}
                | {f"{key}.{names[p]}": value for optimizer in self.optimizers
                   for p, state in optimizer.state.items() for key, value in state.items()})

    def begin_with(self, net: UNet, path: str):
        """Take over another network's weights; its labels too, if there are as many of them.

        Raises ValueError for a setting of the command line that it cannot have.
        """
        theirs, ours = net.architecture, self.config
        for name in KEPT:
            if getattr(theirs, name) != getattr(ours, name):
                raise ValueError(f"{flag(name)} is {getattr(theirs, name)} in {path}: leave it out")
        if theirs.image_shape[0] != ours.image_shape[0]:
            raise ValueError(f"{path} is for images of {theirs.image_shape[0]} channels, not "
                             f"{ours.image_shape[0]}")
        for module in (self.net, self.ema):
            module.load_state_dict(relabelled(net.state_dict(), ours.num_classes))

    def restore(self, path: Path, found: dict[str, Tensor], metadata: dict[str, str]):
        """Become the run that was saved.  Raises ValueError, with the name, for what differs."""
        with parsing(path, "the checkpoint of a run"):
            for p in self.net.parameters():          # a step with gradients of 0 leaves the weights
                p.grad = torch.zeros_like(p)         # and makes the optimizers' state
            for optimizer in self.optimizers:
                optimizer.step()
            log, ours = found.pop("log", torch.zeros(0)), self.tensors()
            for name in ours.keys() | found.keys():
                if name not in ours or name not in found or ours[name].shape != found[name].shape:
                    raise ValueError(f"{name} is missing, left over or of another shape")
                ours[name].copy_(found[name])
            self.step = int(metadata["step"])
            if not 0 < self.step <= 10**9:
                raise ValueError(f"its step is {self.step}")
            self.log = [(int(step), *losses) for step, *losses in log.reshape(-1, 3).tolist()]

    def save(self, folder: Path, draw: Callable | None = None):
        """Draw, then log.csv, the average alone in float16, to give away, and the checkpoint last.

        Each is written whole or not at all, and none if a number in them is not finite.
        """
        half = {name: p.half() for name, p in self.ema.state_dict().items()}
        tensors, log = self.tensors(), dict(log=torch.tensor(self.log, dtype=torch.float64))
        for name, tensor in (*half.items(), *tensors.items()):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite at step {self.step}: "
                                 "a smaller --lr or --muon-lr may help")
        if processes()[0] > 0:
            return
        if draw:
            draw(self, folder)
        rows = [",".join(map(str, row)).replace("nan", "") + "\n" for row in self.log]
        with atomic_write(folder / "log.csv") as file:
            file.write("".join(["step,loss,held_out\n", *rows]).encode())
        for name, parts, config in ((NETWORK, half, replace(self.config, data=None)),
                                    (CHECKPOINT, tensors | log, self.config)):
            with atomic_write(folder / name) as file:
                write_tensors(file, parts, dict(config=json.dumps(asdict(config)),
                                                step=str(self.step)))


def lock(folder: Path):
    """An open file: until it is closed, or its process ends, this raises ValueError for others."""
    if processes()[0] > 0:
        return open(os.devnull)
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:       # Windows and some file systems have no such locks
        if isinstance(error, BlockingIOError):
            raise ValueError(f"another run is at work in {folder}: wait for its end, or name "
                             "another folder with --out") from None
    for name in ("log.csv", "step-*.png", NETWORK, CHECKPOINT):        # by a run that was killed
        for left in folder.glob(f".{name}.*.part"):
            left.unlink()
    return os.fdopen(file, "rb")


def open_run(folder: Path, device: torch.device, named: dict, resume: bool,
             weights: str | None = None) -> tuple:
    """The run, all images and their labels, in a folder that is locked.  Nothing is written here.

    named: the settings of the command line; a run that goes on takes only --steps and --data from
    it.  weights: a network to begin with.  Raises ValueError or OSError, saying what to do.
    """
    path, begun = folder / CHECKPOINT, PRESETS[named.get("preset", "digits")]
    if resume != path.exists():
        raise ValueError(f"{path} is not there: start without --resume" if resume else f"{path} is "
                         "there already: go on with --resume, or begin another run with --out")
    if resume:
        found, metadata = read_tensors(path)
        with parsing(path, "the checkpoint of a run"):
            begun = config_from(metadata)
        if weights or named.keys() - {"steps", "data"}:
            raise ValueError("--resume goes on with the settings of the run: only --steps, --data, "
                             "--out, --device, --deterministic and --compile may stand beside it")
    settings = {name: value for name, value in named.items() if name != "preset"}
    if weights:
        net, theirs = load_network(weights, torch.device("cpu"))
        settings = {name: getattr(theirs, name) for name in KEPT} | settings
    config, images, labels = with_data(replace(begun, **settings))
    if resume and config.fingerprint != begun.fingerprint:
        raise ValueError(f"{config.data or DIGITS} holds other images than those the run began "
                         "with: name them with --data")
    run = Run(config, device)
    if weights:
        run.begin_with(net, weights)
    if resume:
        run.restore(path, found, metadata)
        if run.step >= config.steps:
            print(f"complete at step {run.step}: a larger --steps trains it further")
    return run, images, labels


def with_data(config: Config) -> tuple:
    """The settings with what follows from the images; all images, and their labels."""
    images, labels = load(config.data, config.labels)
    if config.batch % processes()[1]:
        raise ValueError(f"--batch {config.batch} is no multiple of {processes()[1]} processes")
    return replace(config, fingerprint=fingerprint(images, labels),
                   image_shape=(images.shape[3], *images.shape[1:3]),
                   num_classes=0 if labels is None else int(labels.max()) + 1), images, labels
