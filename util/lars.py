import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer (arXiv 1708.03888).

    Parameters of one dimension, biases and norms, get neither the scaling nor weight decay. As PyTorch's fused optimisers do, it
    leaves a step out on the device where ``found_inf``, set from outside, is not zero.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=0, weight_decay=0, momentum=0.9, trust_coefficient=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, 'found_inf', None)
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group['weight_decay'])
                    p_norm, update_norm = p.norm(), update.norm()
                    scaled = (p_norm > 0) & (update_norm > 0)  # stays on the device
                    ratio = group['trust_coefficient'] * p_norm / update_norm
                    update = update * torch.where(scaled, ratio, torch.ones_like(ratio))
                state = self.state[p]
                if 'mu' not in state:
                    state['mu'] = torch.zeros_like(p)
                mu = state['mu'] * group['momentum'] + update
                step = -group['lr'] * mu
                if found_inf is not None:
                    mu, step = torch.where(found_inf > 0, state['mu'], mu), torch.where(found_inf > 0, 0, step)
                state['mu'].copy_(mu)
                p.add_(step)
        return loss
