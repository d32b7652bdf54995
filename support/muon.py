"""The optimizers: Muon for the hidden layers, Adam for the rest."""
import torch
from torch import Tensor, nn

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, whose matrix is made orthogonal before each step.

    A convolution is the matrix (c_out, c_in · 3 · 3).  In float32: PyTorch's own Muon computes in
    bfloat16, which doubles the time of a whole training step on processors that have none.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                       for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
            updates = torch._foreach_lerp(grads, buffers, MOMENTUM)                    # Nesterov
            for p, update in zip(params, orthogonal([u.flatten(1) for u in updates])):
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
        one = product = torch.eye(rows, device=s.device, dtype=s.dtype)
        for _ in range(5):
            p = 3.4445 * one - 4.7750 * s + 2.0315 * s @ s
            s, product = p @ s @ p, p @ product
        products |= zip(alike, product)
    near = [products[i] @ x for i, x in enumerate(wide)]
    return [x.mT if len(matrix) > len(matrix.mT) else x for matrix, x in zip(matrices, near)]


def optimizers(net: nn.Module, lr: float, beta2: float, muon_lr: float) -> list:
    """Adam; with muon_lr, Muon for the matrices and convolutions between first and last layer."""
    hidden = {name: p for name, p in net.named_parameters()
              if muon_lr and p.ndim > 1 and name.startswith(("down.", "middle.", "up."))}
    rest = [p for name, p in net.named_parameters() if name not in hidden]
    adam = torch.optim.Adam(rest, lr, (0.9, beta2), fused=True)
    return [adam, Muon(hidden.values(), dict(lr=muon_lr))] if hidden else [adam]
