"""Where it runs: the device, its precision, and the processes that share the work."""
import atexit
import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def keep_memory():
    """Freed memory stays with the process, for the next step.  The C library of Linux would give it
    back and ask for new pages in each step: a sixth of the time of Algorithm 2 on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):                # where there is no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)                                          # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)                                          # M_MMAP_THRESHOLD


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here.  Raises ValueError if it is not here."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(best if name is None else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {name!r} here: choose from "
                         f"{', '.join({best.type: 0, 'cpu': 0})}") from None
    if device.type == "cpu":
        keep_memory()
    elif device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device


def precision(device: torch.device, float32: bool) -> str:
    """bfloat16 where the device computes it natively (emulated it would be slow), or float32."""
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else (
        device.type == "cpu" and any(torch.cpu.get_capabilities().get(name)
                                     for name in ("avx512_bf16", "amx_bf16")))
    return "bfloat16" if native and not float32 else "float32"


def autocast(device: torch.device, float32: bool) -> torch.autocast:
    """Convolutions and matrix products in bfloat16, where `precision` says so."""
    if float32:
        torch.backends.cudnn.allow_tf32 = False         # else a GPU's convolutions keep 10 bits
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=device.type != "cuda",
                          enabled=precision(device, float32) == "bfloat16")


def graphed(predict: Callable, device: torch.device, batch: int, config,
            labelled: bool = False) -> Callable:
    """predict(x_t, t) or predict(x_t, t, label); on CUDA as one graph, for batches of this size.

    A graph launches its hundreds of small kernels at once: the CPU would be too slow for the GPU.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return predict
    warnings.filterwarnings("ignore", "The AccumulateGrad node")    # the capture has its own stream
    with autocast(device, config.float32):
        x_t = torch.zeros(batch, *config.image_shape, device=device)
        t, label = (torch.ones(batch, dtype=torch.long, device=device) for _ in range(2))
        inputs = (x_t, t, label) if labelled else (x_t, t)
        return torch.cuda.make_graphed_callables(predict, inputs)


# ── Several processes, started by torchrun ────────────────────────────────────────────────────────

def processes() -> tuple[int, int]:
    """(rank, world): which of how many processes this is; rank 0 alone writes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(name: str | None, deterministic: bool) -> torch.device:
    """This process's device, ready to train on, together with the others."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if processes()[1] == 1:
        return choose_device(name)
    own = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    device = choose_device(name or own)                     # without GPUs all share the CPU
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return device


def over_all(value, device: torch.device, largest: bool = False) -> Tensor:
    """The sum of all processes' values, or the largest of them."""
    value = torch.as_tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return value


def seed_from(use: str, *key: int) -> int:
    """A seed for one use of random numbers, unlike those for other uses and for other keys."""
    return int(np.random.SeedSequence((*use.encode(), *key)).generate_state(1)[0])
