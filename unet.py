"""The noise predictor ε_θ(x_t, t): the U-Net of Ho et al. (2020), appendix B.               N6, V12

Everything else is a formula; this is the part that learns.  It sees a noisy image and t, and
predicts the noise in it.  The file needs PyTorch alone, so it can be copied into other projects.
`python unet.py` prints two networks, the one that train.py trains by default and the paper's.

    x_t ─ conv_in ─ block ─ block ─┬─────────── skips ───────────┬─ block ─ block ─ conv_out ─ ε_θ
                                 halve                         double
                                   └─ block ─ … middle … ─ block ┘
"""
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def setting(default, help="", low=None, high=None, choices=None):
    """A field of a settings class; low .. high is the range of a number, or of each of several."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Architecture:
    """The sizes of a U-Net; by default, of the small one that train.py trains on digits."""

    model_channels: int = setting(16, "channels of the network's first level", 4, 4096)
    channel_mult: tuple[int, ...] = setting((1, 2), "channels of each level, times these", 1, 64)
    num_res_blocks: int = setting(1, "residual blocks per level, one more on the way up", 1, 16)
    attention_resolutions: tuple[int, ...] = setting(
        (0,), "heights, in patches, of the levels with attention; 0: only the middle has it",
        0, 8192)
    dropout: float = setting(0.0, "share of activations dropped in training", 0.0, 0.99)
    num_groups: int = setting(1, "groups of each GroupNorm", 1, 4096)
    patch_size: int = setting(2, "side of the pixel squares that become one; 1 is the paper", 1, 64)
    image_shape: tuple[int, ...] = setting((1, 28, 28), low=1, high=8192)       # channels first
    num_classes: int = setting(0, low=0, high=10**4)     # one more label, num_classes, means "none"


# The paper's network for CIFAR10: Ho appendix B
PAPER = Architecture(model_channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
                     attention_resolutions=(16,), dropout=0.1, num_groups=32, patch_size=1,
                     image_shape=(3, 32, 32))


def time_embedding(t: Tensor, width: int) -> Tensor:
    """[sin(ω_k t), cos(ω_k t)], ω_k = 10000^(−k / (width/2 − 1))                     Ho appendix B

    k = 0 .. width/2 − 1;  t: (B,), in 1..T → (B, width) float32.  As in Ho's code; Vaswani et al.
    (2017) have k/(width/2), and a sine and a cosine in turn.
    >>> time_embedding(torch.tensor([1]), 4)
    tensor([[8.4147e-01, 1.0000e-04, 5.4030e-01, 1.0000e+00]])
    """
    k = torch.arange(width // 2, device=t.device)
    omega = torch.exp(-k * math.log(10_000) / (width // 2 - 1))
    angle = t[:, None].float() * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm whose result has the type of its input: bfloat16 stays bfloat16, as PyTorch alone
    would not keep it.  Its mean and variance are computed in float32 all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):       # which would make it all float32
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Attention(nn.Module):
    """x + proj(softmax(Q Kᵀ/√C) V)                                                  Ho appendix B

    One head: every pixel attends to every pixel.
    >>> Attention(8, groups=2)(torch.ones(1, 8, 2, 3)).shape
    torch.Size([1, 8, 2, 3])
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
    >>> Block(8, 16, 32, 2, 0.0, attention=True)(torch.ones(1, 8, 2, 3), torch.ones(1, 32)).shape
    torch.Size([1, 16, 2, 3])
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
    >>> Downsample(8)(torch.ones(1, 8, 4, 6), None).shape
    torch.Size([1, 8, 2, 3])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: each pixel becomes 2 x 2, then conv3                       Ho appendix B

    >>> Upsample(8)(torch.ones(1, 8, 2, 3), None).shape
    torch.Size([1, 8, 4, 6])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """ε_θ(x_t, t)                                                                  Ho appendix B

    x_t: (B, C, H, W) in [-1, 1] plus noise;  t: (B,), in 1..T;  label: (B,), in 0..num_classes, or
    None for no label → the noise (B, C, H, W).  Raises ValueError for sizes that do not fit.
    >>> net = UNet(Architecture(model_channels=8, image_shape=(1, 8, 8)))
    >>> net(torch.ones(1, 1, 8, 8), torch.tensor([1])).abs().sum().item()     # untrained: no noise
    0.0
    """

    def __init__(self, architecture: Architecture = Architecture()):
        super().__init__()
        a = self.architecture = architecture
        if a.model_channels % a.num_groups or a.model_channels % 2:
            raise ValueError(f"{a.model_channels} model channels must be an even number, and a "
                             f"multiple of the {a.num_groups} groups")
        factor = a.patch_size * 2 ** (len(a.channel_mult) - 1)
        channels, height, width = a.image_shape
        if height % factor or width % factor:
            raise ValueError(f"this network cannot halve images of {height}x{width}: "
                             f"both sides must be multiples of {factor}")
        c, c_time, c_image = a.model_channels, 4 * a.model_channels, channels * a.patch_size ** 2
        self.time_mlp = nn.Sequential(nn.Linear(c, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.label_table = (nn.Parameter(torch.empty(a.num_classes + 1, c_time))
                            if a.num_classes else None)
        self.conv_in = nn.Conv2d(c_image, c, 3, padding=1)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.add_levels(height // a.patch_size, c_time)
        self.norm_out = Norm(a.num_groups, a.channel_mult[0] * c, eps=1e-6)
        self.conv_out = nn.Conv2d(a.channel_mult[0] * c, c_image, 3, padding=1)
        self.initialise()

    def add_levels(self, height: int, c_time: int):
        """Down, halving between the levels; the middle; up again, with a skip for each block.

        With levels of c, 2c channels and one block each, at the image's full height or at half:
            down    full: block c → c            half: halve c, block c → 2c
            middle                               half: block 2c → 2c, twice
            up      half: block 2c + 2c → 2c, block 2c + c → 2c
                    full: double 2c, block 2c + c → c, block c + c → c
        """
        a = self.architecture
        channels = [a.model_channels * mult for mult in a.channel_mult]
        attended = [(height >> level) in a.attention_resolutions for level in range(len(channels))]
        c, skips = a.model_channels, [a.model_channels]          # channels now; those of each skip

        def block(c_in, c_out, attention):
            return Block(c_in, c_out, c_time, a.num_groups, a.dropout, attention)
        for level, c_out in enumerate(channels):
            if level > 0:
                self.down.append(Downsample(c))
                skips.append(c)
            for _ in range(a.num_res_blocks):
                self.down.append(block(c, c_out, attended[level]))
                c = c_out
                skips.append(c)
        self.middle.extend([block(c, c, attention=True),
                            block(c, c, attention=False)])
        for level, c_out in reversed(list(enumerate(channels))):
            for _ in range(a.num_res_blocks + 1):
                self.up.append(block(c + skips.pop(), c_out, attended[level]))
                c = c_out
            if level > 0:
                self.up.append(Upsample(c))

    def initialise(self):
        """As the paper's authors: variance 1/fan_avg, and each residual branch begins as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.conv_out.weight)
        if self.label_table is not None:
            nn.init.uniform_(self.label_table, -math.sqrt(3), math.sqrt(3))          # variance 1
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, Attention):
                nn.init.zeros_(module.proj.weight)
                for weight in module.qkv.weight.chunk(3):        # q, k and v are three maps in one
                    nn.init.xavier_uniform_(weight)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        temb = self.time_mlp(time_embedding(t, self.architecture.model_channels))   # (B, 4c)
        if self.label_table is not None:
            null = torch.full_like(t, self.architecture.num_classes)
            temb = temb + F.embedding(null if label is None else label, self.label_table)

        # Convolutions are fastest in the channels-last layout, and what follows keeps it.
        patch = self.architecture.patch_size
        h = F.pixel_unshuffle(x_t, patch).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)                                    # (B, c, H/patch, W/patch)
        skips = [h]
        for layer in self.down:                                # level l ends with (B, c·mult_l,
            h = layer(h, temb)                                 #   H/patch/2^l, W/patch/2^l)
            skips.append(h)
        for layer in self.middle:                              # the last level's shape stays
            h = layer(h, temb)
        for layer in self.up:                                  # each block takes the latest skip:
            if isinstance(layer, Block):                       #   (B, c_h + c_skip, …) → (B, c, …)
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, temb)
        h = self.conv_out(F.silu(self.norm_out(h)))            # (B, C·patch², H/patch, W/patch)
        return F.pixel_shuffle(h, patch).float()               # (B, C, H, W)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def main():
    digits = Architecture(num_classes=10)
    for name, architecture in (("train.py's default network", digits),
                               ("the paper's for CIFAR10, which it says has 35.7 million,", PAPER)):
        net = UNet(architecture)
        print(f"{net}\n\n{name} has {parameters(net):,} parameters\n")


if __name__ == "__main__":
    main()
