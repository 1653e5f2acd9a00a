"""The optimizer of linear probing."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a step size per layer (arXiv 1708.03888).

    1-D parameters, biases and norms, get neither the scaling nor weight decay.

    Like PyTorch's fused optimizers, it skips the step on the device if ``found_inf``, which
    GradScaler sets, is not zero.
    """

    _step_supports_amp_scaling = True  # what GradScaler looks for; tried with PyTorch 2.6 to 2.15

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict],
        lr: float = 0,
        weight_decay: float = 0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum}
        super().__init__(params, {**defaults, 'trust_coefficient': trust_coefficient})

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, 'found_inf', None)
        pairs = [(group, p) for group in self.param_groups for p in group['params']]
        for group, p in pairs:
            if p.grad is None:
                continue
            update = p.grad
            if p.ndim > 1:
                update = update.add(p, alpha=group['weight_decay'])
                p_norm, update_norm = p.norm(), update.norm()
                nonzero = (p_norm > 0) & (update_norm > 0)  # stays on the device
                ratio = group['trust_coefficient'] * p_norm / update_norm
                update = update * torch.where(nonzero, ratio, 1.0)
            if 'mu' not in self.state[p]:
                self.state[p]['mu'] = torch.zeros_like(p)
            momentum = self.state[p]['mu']
            mu = momentum * group['momentum'] + update
            step = -group['lr'] * mu
            if found_inf is not None:
                mu = torch.where(found_inf > 0, momentum, mu)
                step = torch.where(found_inf > 0, 0, step)
            momentum.copy_(mu)
            p.add_(step)
