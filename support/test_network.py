"""The network against plain formulas and independent figures, and the optimizers."""
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from support import devices
from support.config import PRESETS, Config
from support.devices import autocast, graphed
from support.muon import Muon, optimizers, orthogonal
from support.weights import their_names
from test_math import DEVICES, SMALL, batch_of, near32, small_unet
from train import lr_scale, update_ema
from unet import PAPER, Architecture, Attention, Block, Norm, UNet, parameters


def test_the_paper_s_network_has_the_paper_s_size():
    """Ho appendix B: 35.7 million parameters for CIFAR10, to the last; 113.7 million at 256x256."""
    with torch.device("meta"):
        assert parameters(UNet(PAPER)) == 35_746_307
        assert parameters(UNet(replace(PAPER, image_shape=(3, 256, 256),
                                       channel_mult=(1, 1, 2, 2, 4, 4)))) == 113_673_219
    assert asdict(PAPER).items() <= asdict(PRESETS["cifar10"]).items()


def test_the_network_is_that_of_diffusers():
    """Ho appendix B: of weights that a rule makes, diffusers 0.42.1 has the same output (its mean,
    mean square, five entries): a swapped skip, q, k and v in disorder, other padding would show.
    """
    net = UNet(Architecture(8, (1, 2, 2), 2, (8,), num_groups=4, patch_size=1,
                            image_shape=(3, 16, 16))).eval()
    names = {}
    for name, tensor in net.state_dict().items():
        theirs = their_names(name, 2)
        names |= zip(theirs, tensor.chunk(len(theirs)), strict=True)
    for n, name in enumerate(sorted(names)):
        tensor = names[name]
        v = np.sin(n + np.arange(tensor.numel()) ** 2.0).reshape(tensor.shape)
        if tensor.ndim > 1:
            v = v * math.sqrt(3 / tensor[0].numel())
        else:
            v = 0.1 * v + name.endswith("weight")
        tensor.copy_(torch.tensor(v, dtype=torch.float32))
    x = torch.tensor(np.cos(0.11 * np.arange(1536)).reshape(2, 3, 16, 16))
    with torch.no_grad():
        found = net(x.float(), torch.tensor([3, 870])).flatten().double()
    near32(torch.stack([found.mean(), found.square().mean()]),
           [-0.24860960936457846, 0.6530918757364437], condition=3)
    near32(found[[0, 1, 512, 768, 1535]], [-0.33475942927347047, 0.1290635530323906,
           -0.7026060780287101, -0.7830392976813665, 0.07227366757321466], condition=3)


def test_dropout_is_of_what_the_last_convolution_of_a_block_sees():
    """Ho appendix B: in training half of the activations are 0 there, the others twice as large."""
    block, seen = Block(4, 8, 6, groups=2, dropout=0.5, attention=False), []
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        block.train(training)(batch_of(0, 2, 4, 9, 9)[1], torch.ones(2, 6))
    (dropped, whole), kept = seen, seen[0] != 0
    near32(dropped, (2 * whole * kept).detach())
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 4])
def test_norms_of_bfloat16_have_exact_sums(groups, device):
    """Ho appendix B: but for its last rounding, of pixels far from 0 too, GroupNorm is exact."""
    norm, generator = Norm(groups, 16, eps=1e-6).to(device), torch.Generator().manual_seed(0)
    x = (20 + 3 * torch.randn(2, 16, 8, 8, generator=generator)).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        found = norm(x.to(device, memory_format=torch.channels_last))
    grouped = x.double().reshape(2, groups, -1)
    exact = ((grouped - grouped.mean(2, keepdim=True))
             / (grouped.var(2, correction=0, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.detach().cpu().double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_gradients_are_the_plain_ones(device):
    """--compile: in bfloat16 every gradient of a block, those of the biases included, is float32's
    to 5% of its norm, as without the compiler.  On the CPU only with COMPILE=1: half a minute.
    """
    if device == "mps" or device == "cpu" and "COMPILE" not in os.environ:
        pytest.skip("no compiler, or too slow a one")
    torch.manual_seed(0)
    block = Block(32, 64, 32, 4, 0.0, attention=True).to(device)
    (_, x), (_, temb), (_, target) = (batch_of(i, *shape, device=device) for i, shape in
                                      enumerate([(8, 32, 8, 8), (8, 32), (8, 64, 8, 8)]))

    def gradients(block, bfloat16):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = (block(x.contiguous(memory_format=torch.channels_last), temb) - target).square()
        return torch.autograd.grad(loss.mean(), weights)
    weights = [x.requires_grad_(), *block.parameters()]        # x too, as in the network
    exact = gradients(block, False)
    for each in (block, torch.compile(block)):
        for found, g in zip(gradients(each, True), exact, strict=True):
            assert (found - g).norm() < 0.05 * g.norm() + 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are CUDA's")
@pytest.mark.parametrize("float32", [True, False])
def test_a_graph_computes_what_the_network_computes(float32):
    """CUDA: predictions and gradients of a graph are the network's, batch after batch."""
    device, config = torch.device("cuda"), replace(SMALL, float32=float32)
    plain, net = (small_unet().to(device).train() for _ in range(2))
    graph = graphed(net, device, 5, config, labelled=True)
    for seed in range(3):
        (_, x_t), (_, target) = (batch_of(seed + i, 5, 1, 8, 8, device=device) for i in (0, 9))
        t, label = torch.tensor([[1, 2, 3, 4, 5], [0, 1, 2, 3, 0]], device=device) + seed % 2
        found = []
        for predict, module in ((graph, net), (plain, plain)):
            module.zero_grad()
            with autocast(device, float32):
                eps = predict(x_t, t, label % 4)
            (eps - target).square().mean().backward()
            found.append([eps, *[p.grad for p in module.parameters()]])
        for ours, theirs in zip(*found):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6

    def predict(x_t, t):
        with autocast(device, float32):
            return plain(x_t, t)
    with torch.no_grad():
        near32(graphed(predict, device, 5, config)(x_t, t), predict(x_t, t).cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_is_only_an_order_in_memory(device):
    """EMA, clipping, "is it finite": of channels-last weights and gradients what NumPy says; the
    average is of the parameters alone: buffers, such as tables, are left as they are.
    """
    (w, p), (v, q), (g, grad) = (batch_of(seed, 6, 5, 3, 3, device=device) for seed in range(3))
    net, ema = nn.Conv2d(5, 6, 3, bias=False), nn.Conv2d(5, 6, 3, bias=False)
    for table, (module, values) in enumerate([(ema, q), (net, p)]):
        module.weight = nn.Parameter(values.contiguous(memory_format=torch.channels_last))
        module.register_buffer("table", torch.tensor(table))
    net.weight.grad = grad.contiguous(memory_format=torch.channels_last)
    update_ema(ema, net, step=500, decay=0.75)
    near32(ema.weight, 0.75 * v + 0.25 * w)
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    near32(net.weight.grad, g * 0.5 / np.linalg.norm(g))
    assert ema.table == 0 and torch.isfinite(net.weight).all()
    net.weight.data[5, 4, 2, 1] = math.nan
    assert not torch.isfinite(net.weight).all()


def test_an_untrained_network_predicts_no_noise_and_every_parameter_counts():
    """Ho appendix B: the output begins at 0; with any other weights, every one is used."""
    torch.manual_seed(0)
    net = UNet(SMALL)
    for block in filter(lambda m: isinstance(m, Block), net.modules()):    # each begins as nothing
        h, temb = torch.randn(2, block.norm1.num_channels, 4, 4), torch.randn(2, 32)
        assert torch.equal(block(h, temb), block.shortcut(h))
    x, t, label = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 9, 1000]), torch.tensor([0, 1, 2, 3])
    assert torch.count_nonzero(net(x, t, label)) == 0
    drawn = [(net.label_table, 1)]                                    # weights and their variance
    for name, m in net.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.any():
            drawn += [(part, 2 / sum(part.shape[:2]) / part[0, 0].numel())         # 1/fan_avg
                      for part in m.weight.chunk(3 if name.endswith("qkv") else 1)]
            assert not m.bias.any()
    assert len(drawn) > 15
    for weight, variance in drawn:                           # uniform, as far as √(3 variance)
        ends = torch.stack([-weight.min(), weight.max()]) / math.sqrt(3 * variance)
        assert 0.85 < ends.min() and ends.max() <= 1
    net = small_unet()
    net(x, t, label).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_a_label_is_added_to_the_time_embedding_and_none_is_the_last():
    """N6: a label's row is added before the activation, as if to the bias of the layer before."""
    net, x, t = small_unet(), torch.randn(2, 1, 8, 8), torch.tensor([1, 900])
    with torch.no_grad():
        outputs = [net(x, t, torch.tensor([c, c])) for c in range(4)]
        assert torch.equal(net(x, t), outputs[3])
        net.time_mlp[2].bias += net.label_table[1]
        net.label_table.zero_()
        near32(net(x, t), outputs[1].numpy(), condition=10)


@pytest.mark.parametrize("shape, patch", [((1, 8, 8), 1), ((3, 12, 20), 1), ((1, 28, 28), 2),
                                          ((3, 32, 32), 4)])
def test_any_size_that_can_be_halved(shape, patch):
    """Ho appendix B: pixel i, j of each square is in channels c p² + i p + j; levels then 4 high
    have attention; the output has the input's shape; other sizes are refused.
    """
    net, squares = small_unet(image_shape=shape, num_classes=0, patch_size=patch), []
    net.conv_in.register_forward_hook(lambda _, inputs, output: squares.append(inputs[0]))
    net.conv_out.register_forward_hook(lambda _, inputs, output: squares.append(output))
    x = torch.randn(2, *shape)
    output = net(x, torch.tensor([1, 2]))
    assert output.shape == x.shape
    for k in range(patch ** 2):
        for images, found in zip((x, output), squares):
            i, j = divmod(k, patch)
            assert torch.equal(found[:, k::patch ** 2], images[:, :, i::patch, j::patch])
    attention = [m for m in net.modules() if isinstance(m, Attention)]
    assert len(attention) == (4 if shape[1] == 8 * patch else 1)            # 1: in the middle
    assert all(m.eps == 1e-6 for m in net.modules() if isinstance(m, nn.GroupNorm))
    with pytest.raises(ValueError, match=f"multiples of {2 * patch}"):
        small_unet(image_shape=(shape[0], shape[1] + 1, shape[2]), patch_size=patch)
    with pytest.raises(ValueError, match="groups"):
        small_unet(model_channels=102, num_groups=4)


def test_muon_has_the_hidden_matrices_and_adam_the_rest():
    """Muon: it has the matrices between first and last layer; Adam the rest, or all."""
    net = small_unet()
    adam, muon = optimizers(net, lr=0.0625, beta2=0.99, muon_lr=0.125)
    theirs = [{id(p) for p in each.param_groups[0]["params"]} for each in (adam, muon)]
    for name, p in net.named_parameters():
        hidden = name.startswith(("down", "middle", "up")) and p.ndim > 1
        assert [id(p) in each for each in theirs] == [not hidden, hidden]
    assert (adam.defaults["lr"], muon.defaults["lr"]) == (0.0625, 0.125) and len(theirs[1]) > 10
    assert adam.defaults["fused"]                      # one kernel, not one for each operation
    assert type(adam) is torch.optim.Adam and adam.defaults["betas"] == (0.9, 0.99)
    assert [type(o) for o in optimizers(net, 0.1, 0.99, 0.0)] == [torch.optim.Adam]


def test_muon_is_pytorch_s_in_float32():
    """Muon: three steps are torch.optim.Muon's, which rounds to bfloat16, of a convolution those to
    its matrix; and its polynomial, to the digit.
    """
    ours = [nn.Parameter(batch_of(0, *shape)[1])
            for shape in ((8, 24), (24, 8), (16, 16), (8, 4, 3, 3))]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    both = Muon(ours, dict(lr=0.1)), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for seed in range(1, 4):
        for p, q in zip(ours, theirs):
            p.grad = batch_of(seed, *p.shape)[1]
            q.grad = p.grad.flatten(1).clone()
        for each in both:
            each.step()
    for p, q in zip(ours, theirs):
        difference = (p.detach().flatten(1) - q.detach()).norm() / 0.3 / min(q.shape) ** 0.5
        assert 0 < difference < 0.03                       # of the path; bfloat16 has 2⁻⁸ = 0.004
    values = np.array([5.0, 2.0, 0.3, 0.01])
    (found,), s = orthogonal([torch.diag(torch.tensor(values))]), values / np.linalg.norm(values)
    for _ in range(5):                                        # each singular value by itself
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    np.testing.assert_allclose(found.diag(), s, rtol=1e-4)


def test_the_rate_is_the_product_of_its_rise_and_its_fall():
    """Training: at step 4 of 10 with 6 of warmup it is 4/6 of 7/10; without decay it is 4/6."""
    for decay, expected in ((True, 4 / 6 * 0.7), (False, 4 / 6)):
        assert lr_scale(4, Config(steps=10, warmup=6, decay=decay)) == pytest.approx(expected)


def test_the_short_format_is_bfloat16(monkeypatch):
    """Precision: products are in what `precision` says, and that is not float16."""
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setattr(devices, "precision", lambda device, float32: name)
        with autocast(torch.device("cpu"), False):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
