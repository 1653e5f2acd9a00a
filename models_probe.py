"""Probing heads on a frozen encoder: linear or attentive, at one learning rate or several."""

import argparse
import copy
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.optim import param_groups_weight_decay

from models_vit import MODELS, VisionTransformer
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import load_pretrained
from util.errors import UserError, as_user_error
from util.lars import LARS
from util.lr_sched import absolute_lr
from util.seeding import seeded


def build_encoder(
    model: str, *, input_size: int, global_pool: bool, finetune: str, seed: int
) -> VisionTransformer:
    """Build a classifier without its last layer, for features.

    Args:
        model: name in models_vit.MODELS.
        input_size: pixels per side.
        global_pool: pool the patch tokens instead of taking the class token.
        finetune: checkpoint of the encoder; '': random weights.
        seed: of the random weights.

    Returns:
        The model in eval mode.

    Raises:
        UserError: if the input size or the checkpoint does not fit the model.
    """
    context = f'--model {model} --input_size {input_size}'
    with seeded('weights', seed), as_user_error(context, ValueError):
        encoder = MODELS[model](img_size=input_size, num_classes=0, global_pool=global_pool)
    if finetune:
        load_pretrained(encoder, finetune, model_name=model, whole_encoder=True)
    return encoder.eval()


# ---- heads ----


def linear_probe(model: VisionTransformer) -> nn.Sequential:
    """Return the head of linear probing (MAE, appendix A.1): batch norm, then model.head.

    The batch norm makes one learning rate suit all features. Without affine parameters, the
    classifier stays linear.
    """
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6)
    return nn.Sequential(norm, model.head)


def attentive_probe(model: VisionTransformer) -> nn.Sequential:
    """Return the head of attentive probing, on patch tokens: attention pooling, then model.head.

    As in V-JEPA (arXiv 2404.08471), a learned query attends to the tokens with as many heads as
    the encoder has, and a residual MLP follows. The module is timm's (arXiv 2106.04560). Unlike
    V-JEPA's it does not add the query to the result.
    """
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    heads = model.blocks[0].attn.num_heads
    pool = AttentionPoolLatent(model.embed_dim, num_heads=heads, norm_layer=nn.LayerNorm)
    return nn.Sequential(pool, model.head)


PROBES = {'linear': linear_probe, 'attentive': attentive_probe}


def build_optimizer(
    head: nn.Module, probe: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build LARS for a linear probe, AdamW for an attentive one.

    Args:
        head: a probing head, or a Sweep, whose parameter groups get their own ``blr``.
        probe: key of PROBES.
        lr: learning rate of groups without ``blr``.
        weight_decay: not applied to biases, norms and the query.
    """
    groups = []
    for blr, one in head.by_rate() if isinstance(head, Sweep) else [(None, head)]:
        own = [{'params': list(one.parameters())}]  # LARS itself excludes biases from decay
        if probe == 'attentive':
            own = param_groups_weight_decay(one, weight_decay, no_weight_decay_list=['0.latent'])
        groups += own if blr is None else [{**group, 'blr': blr} for group in own]
    if probe == 'linear':
        return LARS(groups, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


# ---- several learning rates in one pass ----


class Sweep(nn.ModuleDict):
    """Copies of one head, one per base learning rate, trained side by side on the same features.

    Each copy learns exactly as it would alone.

    Args:
        head: maps features to logits [N, C].
        rates: base learning rates. They name the copies in the state dict, so that a checkpoint
            of other rates does not load.
    """

    def __init__(self, head: nn.Module, rates: list[float]) -> None:
        copies = {f'blr{rate}'.replace('.', '_'): copy.deepcopy(head) for rate in rates}
        super().__init__(copies)
        self.rates = rates
        for p in self.parameters():
            p.register_hook(lambda grad: grad.nan_to_num(0, 0, 0))

    def by_rate(self) -> list[tuple[float, nn.Module]]:
        """Return pairs of base learning rate and head."""
        return list(zip(self.rates, self.values()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features to logits [heads, N, C]."""
        return torch.stack([head(features) for head in self.values()])

    def compare(
        self, results: list[dict[str, Any]], optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Print a table of all heads and return the statistics of the best one.

        A head whose loss is not finite is frozen: its weights and, in ``optimizer``, its
        learning rate become zero. The others continue, and what is saved is finite.

        Args:
            results: engine_finetune.evaluate's, one dict per head.

        Returns:
            The best head's dict with its ``blr``, and ``heads``, the statistics of all heads.
            Diverged heads have None.

        Raises:
            UserError: if all heads have diverged.
        """
        rows = []
        for (blr, head), result in zip(self.by_rate(), results):
            frozen = not any(p.any() for p in head.parameters())
            diverged = frozen or not math.isfinite(result['loss'])
            if diverged and not frozen and optimizer is not None:
                print(f'Note: the loss with --blr {blr} diverged; this head is frozen')
                _freeze(head, blr, optimizer)
            if diverged:
                result = {'loss': None, 'acc1': None, 'acc5': None}
            rows.append({'blr': blr, **result})
        finite = [row for row in rows if row['loss'] is not None]
        if not finite:
            raise UserError(f'--blr: the loss diverged with all of {self.rates}; use lower rates')
        best = max(finite, key=lambda row: (row['acc1'], -row['loss']))
        print(f'{"blr":>10}  top-1, %  top-5, %        loss')
        for row in rows:
            cells = 'diverged'
            if row['loss'] is not None:
                cells = f'{row["acc1"]:8.2f}  {row["acc5"]:8.2f}  {row["loss"]:10.4g}'
            print(f'{row["blr"]:10g}  {cells}{"  best" if row is best else ""}')
        heads = [{k: row[k] for k in ('blr', 'loss', 'acc1', 'acc5')} for row in rows]
        return {**best, 'heads': heads}


@torch.no_grad()
def _freeze(head, blr, optimizer):
    for group in _groups_of(optimizer, blr):
        group['lr_scale'] = 0.0
    for p in head.parameters():
        p.zero_()
        optimizer.state.pop(p, None)


def _groups_of(optimizer, blr):
    return [group for group in optimizer.param_groups if group['blr'] == blr]


def sweep_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each head: logits [heads, N, C], labels [N] -> [heads].

    A diverged head contributes a constant loss and zero gradients. Otherwise its NaNs would make
    all heads skip the step.
    """
    losses = torch.stack([F.cross_entropy(x, targets) for x in logits])
    return losses.where(losses.isfinite(), math.log(logits.shape[-1]))


def best_head_checkpoint(
    checkpointer: Checkpointer, epoch: int, blr: float, probe: str, effective_batch: int
) -> dict[str, Any]:
    """Return the checkpoint that a run with only the best learning rate would have saved.

    Args:
        checkpointer: of a model whose head is a Sweep.
        epoch: the epoch that is done.
        blr: the best base learning rate.
        probe: key of PROBES.
        effective_batch: images per update.
    """
    optimizer = checkpointer.optimizer
    flags = {**checkpointer.flags, 'blr': [blr], 'lr': absolute_lr(blr, effective_batch)}
    head = dict(checkpointer.model.head.by_rate())[blr]
    alone = build_optimizer(head, probe, flags['lr'], flags['weight_decay'])
    for group, of_sweep in zip(alone.param_groups, _groups_of(optimizer, blr)):
        group['lr'] = of_sweep['lr']
        alone.state.update({p: optimizer.state[p] for p in group['params']})
    contents = checkpointer.contents(epoch)
    encoder = {k: v for k, v in contents['model'].items() if not k.startswith('head.')}
    return {
        **contents,
        'model': {**encoder, **{f'head.{k}': v for k, v in head.state_dict().items()}},
        'optimizer': alone.state_dict(),
        'args': argparse.Namespace(**flags),
    }
