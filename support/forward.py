"""The forward process of ddpm.py in PyTorch: the same formulas, batched, on any device.

Only the tables come from ddpm.py, computed in float64 and cast once; test_math.py holds each
formula against its NumPy original.
"""
import torch
from torch import Tensor

from ddpm import Schedule, cosine, linear
from support.config import Config


def schedule_from(config: Config) -> Schedule:
    """The schedule that the settings name, in float64."""
    return (cosine(config.T) if config.schedule == "cosine"
            else linear(config.T, config.beta_1, config.beta_T))


def on_device(schedule: Schedule, device) -> Schedule:
    """The float64 tables of ddpm.py, cast to float32 once."""
    return Schedule(*(torch.tensor(table).to(torch.float32).to(device) for table in schedule))


def sqrt_at(table: Tensor, t) -> Tensor:
    """√table[t], to be multiplied with images (B, C, H, W).  t: one for all, or a tensor (B,)."""
    return table[t].sqrt().reshape(-1, 1, 1, 1)


def q_sample(x0, t, eps, schedule):
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε                                                Ho (4), N3, V3"""
    return sqrt_at(schedule.alpha_bar, t) * x0 + sqrt_at(schedule.one_minus_alpha_bar, t) * eps


def x0_from_eps(x_t, t, eps, schedule):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ)/√ᾱ_t                                            Ho (9, 15), N5"""
    return (x_t - sqrt_at(schedule.one_minus_alpha_bar, t) * eps) / sqrt_at(schedule.alpha_bar, t)


def eps_from_x0(x_t, t, x0, schedule):
    """ε = (x_t − √ᾱ_t x̂_0)/√(1−ᾱ_t)                                              Ho (9, 15), N5"""
    return (x_t - sqrt_at(schedule.alpha_bar, t) * x0) / sqrt_at(schedule.one_minus_alpha_bar, t)
