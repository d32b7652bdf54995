"""The noise predictor ε_θ(x_t, t): the U-Net of Ho et al. (2020), appendix B.               N6, V12

Everything else is a formula; this is the part that learns.  It sees a noisy image and t, and
answers with the noise that it believes was mixed into x_0.  `python unet.py` prints its layers
and its size.

    x_t ─ conv_in ─ block ─ block ─┬─────────── skips ───────────┬─ block ─ block ─ conv_out ─ ε_θ
                                 halve                         double
                                   └─ block ─ … middle … ─ block ┘
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_embedding(t: Tensor, width: int) -> Tensor:
    """[sin(ω_k t), cos(ω_k t)], ω_k = 10000^(−k / (width/2 − 1))                     Ho appendix B

    k = 0 .. width/2 − 1;  t: (B,), in 1..T → (B, width) float32.  As in Ho's code; Vaswani et al.
    (2017) have k/(width/2), and a sine and a cosine in turn.
    """
    k = torch.arange(width // 2, device=t.device)
    omega = torch.exp(-k * math.log(10_000) / (width // 2 - 1))
    angle = t[:, None].float() * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm, with its sums in float32: those of bfloat16 would be coarse.

    CPUs take bfloat16 as it is, and are faster with it if a group has 16 channels or more.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.num_channels >= 16 * self.num_groups:
            with torch.autocast("cpu", enabled=False):           # which would make it float32
                return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    """x + proj(softmax(Q Kᵀ/√C) V)                                                  Ho appendix B

    Every pixel looks at every pixel, with one head.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = Norm(groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)                      # (B, H·W, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2)
        h = self.proj(weights.to(v.dtype) @ v)                       # softmax gives float32
        return x + h.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """shortcut(x) + conv2(drop(act(norm2(conv1(act(norm1(x))) + time(act(temb))))))   Ho appendix B

    Then attention, at some levels.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int, groups: int, dropout: float,
                 attention: bool):
        super().__init__()
        self.norm1 = Norm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm2 = Norm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Downsample(nn.Module):
    """Halve the image: conv3 with stride 2                                           Ho appendix B

    Padded on the right and at the bottom only.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: each pixel becomes 2 x 2, then conv3                       Ho appendix B"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """ε_θ(x_t, t)                                                                  Ho appendix B

    x_t: (B, C, H, W) in [-1, 1] plus noise;  t: (B,), in 1..T → the noise (B, C, H, W).
    config: the settings of support/config.py.  Each level has model_channels times its channel_mult
    channels and num_res_blocks residual blocks, one more on the way up; attention stands at the
    levels whose height is in attention_resolutions.  patch_size² pixels become the channels of one,
    which saves time; 1 is the paper.  The label num_classes means "no label".
    Raises ValueError for sizes that do not fit together, such as images that cannot be halved.
    """

    def __init__(self, config):
        super().__init__()
        width, groups, patch = config.model_channels, config.num_groups, config.patch_size
        if width % groups or width % 2:
            raise ValueError(f"{width} model channels are no even multiple of {groups} groups")
        self.width, self.patch = width, patch
        factor = patch * 2 ** (len(config.channel_mult) - 1)
        channels, *size = config.image_shape
        if any(side % factor for side in size):
            raise ValueError(f"this network cannot halve images of {size[0]}x{size[1]}: "
                             f"both sides must be multiples of {factor}")
        c_time, last = 4 * width, config.channel_mult[0] * width

        self.time = nn.Sequential(nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.label = None
        if config.num_classes:
            table = torch.empty(config.num_classes + 1, c_time)
            if not table.is_meta:                   # on "meta" this would load torch's compiler
                table.normal_()
            self.label = nn.Embedding.from_pretrained(table, freeze=False)
        self.conv_in = nn.Conv2d(channels * patch ** 2, width, 3, padding=1)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.add_levels(config, c_time)
        self.norm_out = Norm(groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, channels * patch ** 2, 3, padding=1)
        self.initialise()

    def add_levels(self, config, c_time: int):
        """Down, halving between the levels; the middle; up again, with a skip for each block."""
        def block(c_in, c_out, attention):
            return Block(c_in, c_out, c_time, config.num_groups, config.dropout, attention)
        c, skips = self.width, [self.width]
        size, attended = config.image_shape[1] // self.patch, config.attention_resolutions
        for level, mult in enumerate(config.channel_mult):
            if level > 0:
                self.down.append(Downsample(c))
                skips.append(c)
            for _ in range(config.num_res_blocks):
                self.down.append(block(c, mult * self.width, size >> level in attended))
                c = mult * self.width
                skips.append(c)
        self.middle.extend([block(c, c, attention=True), block(c, c, attention=False)])
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(block(c + skips.pop(), mult * self.width, size >> level in attended))
                c = mult * self.width
            if level > 0:
                self.up.append(Upsample(c))

    def initialise(self):
        """As the paper's authors: variance 1/fan_avg, and each residual branch begins as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.conv_out.weight)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, Attention):
                nn.init.zeros_(module.proj.weight)
                for weight in module.qkv.weight.chunk(3):        # q, k and v are three maps in one
                    nn.init.xavier_uniform_(weight)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        temb = self.time(time_embedding(t, self.width))
        if self.label is not None:
            temb = temb + self.label(label)

        # Channels-last is the layout that convolutions work in; what follows keeps it.
        h = F.pixel_unshuffle(x_t, self.patch).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)
        skips = [h]
        for layer in self.down:
            h = layer(h, temb)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, temb)
        for layer in self.up:
            if isinstance(layer, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, temb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch).float()


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


if __name__ == "__main__":
    from support.config import PRESETS
    from support.console import one_line_errors

    with one_line_errors():
        paper = UNet(PRESETS["cifar10"])
        print(paper)
        print(f"\nThe paper's CIFAR10 network: {parameters(paper):,} parameters "
              "(the paper says 35.7 million)")
