"""A frozen encoder, and what main_linprobe.py trains on it: a head, or several at rates of their own in the same pass."""

import argparse
import copy
import math
import os
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.optim import param_groups_weight_decay

from models_vit import MODELS
from util.checkpoint import load_pretrained, save_on_master
from util.errors import UserError, as_user_error
from util.lars import LARS
from util.lr_sched import absolute_lr
from util.seeding import seeded


def build_encoder(args):
    """The classifier of args.model without its last layer, with the weights of args.finetune, in eval mode.

    Reads args.model, input_size, global_pool, finetune, seed. Raises UserError.
    """
    with seeded('weights', args.seed), as_user_error(f'--model {args.model} --input_size {args.input_size}', ValueError):
        model = MODELS[args.model](img_size=args.input_size, num_classes=0, global_pool=args.global_pool)
    if args.finetune:
        load_pretrained(argparse.Namespace(**{**vars(args), 'eval': False}), model, whole_encoder=True)
    return model.eval()


def linear_probe(model):
    """The head of linear probing (MAE, appendix A.1) for a classifier: batch norm, then the Linear that ``model`` has."""
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    # features of unlike scales learn at one rate only when each is normalised; without affine, the classifier stays linear
    return nn.Sequential(nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6), model.head)


def attentive_probe(model):
    """The head of attentive probing, over the patch tokens of a classifier, then the Linear that ``model`` has.

    As V-JEPA probes (arXiv 2404.08471): a learned query attends to the tokens, with as many heads as the encoder's blocks
    have, and a residual MLP follows. The module is timm's (that of arXiv 2106.04560); unlike V-JEPA's it does not add the
    query to what it gathers.
    """
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    pool = AttentionPoolLatent(model.embed_dim, num_heads=model.blocks[0].attn.num_heads, norm_layer=nn.LayerNorm)
    return nn.Sequential(pool, model.head)


PROBES = {'linear': linear_probe, 'attentive': attentive_probe}


def build_optimizer(args, head):
    """LARS for a linear probe, AdamW for an attentive one; a Sweep's groups have ``blr``, which util/lr_sched.py goes by."""
    groups = []
    for rate, one in head.by_rate() if isinstance(head, Sweep) else [(None, head)]:
        if args.probe == 'linear':
            own = [{'params': list(one.parameters())}]  # LARS itself decays no biases
        else:
            own = param_groups_weight_decay(one, args.weight_decay, no_weight_decay_list=['0.latent'])
        groups += own if rate is None else [{**group, 'blr': rate} for group in own]
    kind = LARS if args.probe == 'linear' else partial(torch.optim.AdamW, fused=True)
    return kind(groups, lr=args.lr, weight_decay=args.weight_decay)


class Sweep(nn.ModuleDict):
    """Copies of one head, one a base learning rate. They see the same features, and each learns as it would alone.

    Args:
        head: from features to logits [N, C].
        rates: base learning rates. The copies' names in the state dict tell them: with others, a checkpoint does not fit.
    """

    def __init__(self, head, rates):
        super().__init__({f'blr{rate}'.replace('.', '_'): copy.deepcopy(head) for rate in rates})
        self.rates = rates
        for p in self.parameters():
            p.register_hook(lambda grad: grad.nan_to_num(0, 0, 0))

    def by_rate(self):
        """Pairs (base learning rate, head)."""
        return list(zip(self.rates, self.values()))

    def forward(self, features):
        """Features -> logits [heads, N, C]."""
        return torch.stack([head(features) for head in self.values()])

    def compare(self, results, optimizer=None):
        """The statistics of the best head and, under ``heads``, those of all, each with its ``blr``; printed as a table.

        Heads whose loss is not finite have None for it, and are set to zero with their rates in ``optimizer``: the others go
        on, and what is saved is finite.

        Args:
            results: engine_finetune.evaluate's, a dict a head.

        Raises:
            UserError: not one head is left.
        """
        rows = []
        for (rate, head), result in zip(self.by_rate(), results):
            stopped = not any(p.any() for p in head.parameters())
            if not stopped and not math.isfinite(result['loss']) and optimizer is not None:
                print(f'Note: with --blr {rate} the loss is no longer finite; this head learns no more')
                _stop(head, groups_of(optimizer, rate), optimizer)
            if stopped or not math.isfinite(result['loss']):
                result = {'loss': None, 'acc1': None, 'acc5': None}
            rows.append({'blr': rate, **result})
        alive = [row for row in rows if row['loss'] is not None]
        if not alive:
            raise UserError('--blr: the loss is finite with none of these rates; give lower ones')
        best = max(alive, key=lambda row: (row['acc1'], -row['loss']))
        _print_table(rows, best)
        return {**best, 'heads': [{k: row[k] for k in ('blr', 'loss', 'acc1', 'acc5')} for row in rows]}


@torch.no_grad()
def _stop(head, groups, optimizer):
    for group in groups:
        group['lr_scale'] = 0.0
    for p in head.parameters():
        p.zero_()
        optimizer.state.pop(p, None)


def _print_table(rows, best):
    print(f'{"blr":>10}  top-1, %  top-5, %        loss')
    for row in rows:
        cells = 'diverged' if row['loss'] is None else f'{row["acc1"]:8.2f}  {row["acc5"]:8.2f}  {row["loss"]:10.4g}'
        print(f'{row["blr"]:10g}  {cells}{"  best" if row is best else ""}')


def sweep_loss(logits, targets):
    """Cross-entropy of each head: logits [heads, N, C], classes [N] -> [heads].

    A head that has diverged has the loss of a guess and, by Sweep, gradients of zero: what is not finite in one of them would
    make all heads leave the step out.
    """
    losses = torch.stack([F.cross_entropy(x, targets) for x in logits])
    return losses.where(losses.isfinite(), math.log(logits.shape[-1]))


def groups_of(optimizer, rate):
    return [group for group in optimizer.param_groups if group['blr'] == rate]


def save_best_head(args, epoch, model_without_ddp, optimizer, loss_scaler, test_stats, max_accuracy):
    """checkpoint-best.pth of a Sweep: the best head's, as a run with its rate alone would have saved it."""
    if not args.output_dir:
        return
    rate = test_stats['blr']
    head = dict(model_without_ddp.head.by_rate())[rate]
    args = argparse.Namespace(**{**vars(args), 'blr': rate, 'lr': absolute_lr(args, rate)})
    alone = build_optimizer(args, head)
    for group, of_sweep in zip(alone.param_groups, groups_of(optimizer, rate)):
        group['lr'] = of_sweep['lr']
        alone.state.update({p: optimizer.state[p] for p in group['params']})
    weights = {name: value for name, value in model_without_ddp.state_dict().items() if not name.startswith('head.')}
    weights.update({f'head.{name}': value for name, value in head.state_dict().items()})
    save_on_master({'model': weights, 'optimizer': alone.state_dict(), 'epoch': epoch, 'scaler': loss_scaler.state_dict(),
                    'args': args, 'max_accuracy': max_accuracy}, os.path.join(args.output_dir, 'checkpoint-best.pth'))
