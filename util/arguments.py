"""Flags that the scripts and tools share, as tables for util.cli.add_flags; checks of values."""

import argparse
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from util.cli import add_flags, bounded
from util.errors import UserError

TRAINING = {
    '--batch_size': dict(
        default=64,
        type=bounded(int, 1),
        metavar='N',
        help='images per GPU and iteration; effective batch = batch_size * accum_iter * GPUs',
    ),
    '--epochs': dict(type=bounded(int, 1), metavar='N', help='passes over the training set'),
    '--accum_iter': dict(
        default=1,
        type=bounded(int, 1),
        metavar='N',
        help='iterations whose gradients are accumulated per update',
    ),
    '--compile': dict(
        default='auto', choices=['auto', 'on', 'off'], help='torch.compile; auto: on a GPU'
    ),
}
DEVICE = {
    '--amp': dict(
        default='auto',
        choices=['auto', 'fp32', 'bf16', 'fp16'],
        help='precision of the forward pass; auto: bf16 if the hardware has it, otherwise fp16 on '
        'a GPU and fp32 on a CPU',
    ),
    '--seed': dict(
        default=0,
        type=bounded(int, 0, 2**63 - 1),
        metavar='N',
        help='seed of crops, masks and all other draws',
    ),
    '--device': dict(
        default=None,
        metavar='DEVICE',
        help='cuda or cpu; default: cuda if there is a GPU, otherwise cpu',
    ),
}
OPTIMIZER = {
    '--weight_decay': dict(
        type=bounded(float, 0, 1e3),
        default=0.05,
        metavar='W',
        help='weight decay, not applied to biases and norms',
    ),
    '--lr': dict(
        type=bounded(float, 0, 1e9),
        default=None,
        metavar='LR',
        help='absolute learning rate; default: from --blr',
    ),
    '--blr': dict(
        type=bounded(float, 0, 1e9),
        default=1e-3,
        metavar='LR',
        help='base learning rate: lr = blr * effective batch / 256',
    ),
    '--min_lr': dict(
        type=bounded(float, 0, 1e9),
        default=0.0,
        metavar='LR',
        help='learning rate at the end of the schedule',
    ),
    '--warmup_epochs': dict(type=bounded(int, 0), metavar='N', help='epochs of linear warm-up'),
    '--max_skipped_steps': dict(
        default=10,
        type=bounded(int, 0),
        metavar='N',
        help='stop the run after more steps in a row with NaN or Inf gradients',
    ),
}
DATA = {
    '--data_path': dict(
        metavar='DIR',
        help='folder with train/ and val/, each with one subfolder per class; pretraining needs '
        'only train/',
    ),
    '--dataset': dict(
        default='',
        metavar='NAME',
        help='read --data_path as this timm data set instead: torch/cifar10, hfds/NAME, wds/NAME, '
        'or tar for tar files; default: an image folder',
    ),
    '--train_split': dict(
        default='train', metavar='NAME', help='name of the training split, with --dataset'
    ),
    '--val_split': dict(
        default='validation', metavar='NAME', help='name of the validation split, with --dataset'
    ),
    '--num_workers': dict(
        default=16,
        type=bounded(int, 0),
        metavar='N',
        help='data-loader workers per process, at most the number of cores',
    ),
    '--pin_mem': dict(
        action='store_true',
        default=True,
        help='page-locked memory for faster copies to the GPU (default)',
    ),
    '--no_pin_mem': dict(action='store_false', dest='pin_mem', help='ordinary memory instead'),
    '--max_bad_images': dict(
        default=100,
        type=bounded(int, 0),
        metavar='N',
        help='stop the run after more unreadable images in one process',
    ),
}
FOLDERS = {
    '--output_dir': dict(
        default='./output_dir',
        metavar='DIR',
        help="folder for checkpoints and log.txt; '' writes none",
    ),
    '--log_dir': dict(
        default='./output_dir', metavar='DIR', help="folder for TensorBoard events; '' writes none"
    ),
}
PRINT_FREQ = {
    '--print_freq': dict(
        default=20, type=bounded(int, 1), metavar='N', help='iterations between two log lines'
    ),
}
CHECKPOINTS = {
    '--save_every': dict(
        default=20,
        type=bounded(int, 1),
        metavar='N',
        help='keep checkpoint-EPOCH.pth after every N-th epoch and the last; '
        'checkpoint-last.pth is always the newest',
    ),
    '--save_minutes': dict(
        default=None,
        type=bounded(float, 0),
        metavar='MINUTES',
        help='also save checkpoint-last.pth within epochs, every so many minutes, at the next log '
        'line if there are several processes; default: only at the end of an epoch',
    ),
    '--resume': dict(
        default='',
        metavar='FILE',
        help='checkpoint to continue from; auto: the newest intact one in --output_dir, if any',
    ),
    '--start_epoch': dict(
        default=0,
        type=bounded(int, 0),
        metavar='N',
        help='first epoch, counted from 0, if the checkpoint of --resume does not have it',
    ),
}
PROCESSES = {
    '--world_size': dict(
        default=1,
        type=int,
        metavar='N',
        help='accepted for published commands; set by the launcher',
    ),
    '--local_rank --local-rank': dict(
        default=-1, type=int, metavar='N', help='index of the process on its machine'
    ),
    '--dist_on_itp': dict(action='store_true', help='the job was started by Open MPI'),
    '--dist_timeout': dict(
        default=30.0,
        type=bounded(float, 0.01, 1e5),
        metavar='MINUTES',
        help='how long processes wait for each other before the run fails',
    ),
    '--dist_url': dict(default='env://', metavar='URL', help='how processes find each other'),
}
INPUT_SIZE = {
    '--input_size': dict(
        default=224,
        type=bounded(int, 1, 4096),
        metavar='PIXELS',
        help='height and width of the input',
    ),
}
CLASSES = {
    '--nb_classes': dict(
        default=1000,
        type=bounded(int, 1),
        metavar='N',
        help='number of classes; checked against the data',
    ),
}
POOLING = {
    '--global_pool': dict(action='store_true', help='classify the mean of the patch tokens'),
    '--cls_token': dict(
        action='store_false', dest='global_pool', help='classify the class token (default)'
    ),
}
START = {
    '--finetune': dict(
        default='',
        metavar='FILE',
        help='checkpoint to start from: ours, MAE, timm, OpenMMLab, .safetensors; '
        'default: random weights',
    ),
}
EVALUATION = {
    '--eval': dict(
        action='store_true', help='evaluate the checkpoint of --resume or --finetune, and exit'
    ),
    '--dist_eval': dict(
        action='store_true',
        help='split the validation set over the processes; the accuracy is the same',
    ),
}


def add_common_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of all training scripts.

    Args:
        defaults: a script's own defaults by flag name.
    """
    add_flags(parser.add_argument_group('training'), TRAINING, DEVICE)
    add_flags(parser.add_argument_group('optimizer'), OPTIMIZER)
    add_flags(parser.add_argument_group('data'), DATA)
    group = parser.add_argument_group('output, checkpoints and resuming')
    add_flags(group, FOLDERS, PRINT_FREQ, CHECKPOINTS)
    add_flags(parser.add_argument_group('processes (set by the launchers)'), PROCESSES)
    parser.set_defaults(**defaults)


def add_encoder_arguments(
    parser: argparse.ArgumentParser, models: Iterable[str], pooling: bool = True
) -> None:
    """Add the flags that build a classifier of models_vit.py.

    Args:
        models: choices of --model.
        pooling: add --global_pool and --cls_token.
    """
    choices = {'choices': models, 'metavar': 'NAME', 'help': ', '.join(models)}
    model = {'--model': {'default': 'vit_large_patch16', **choices}}
    group = parser.add_argument_group('model')
    add_flags(group, model, INPUT_SIZE, CLASSES, POOLING if pooling else {}, START)


def add_classifier_arguments(parser: argparse.ArgumentParser, models: Iterable[str]) -> None:
    """Add the flags that fine-tuning and probing share."""
    add_encoder_arguments(parser, models)
    add_flags(parser.add_argument_group('evaluation'), EVALUATION)


# ---- checks ----


def grid_size_of(model: str, make: Callable[..., torch.nn.Module], input_size: int) -> int:
    """Return the number of patches per side.

    Args:
        model: name of the model, for the message.
        make: builds it. Its ``patch_size`` argument is the patch size if it has one; otherwise
            a model without memory is built and asked.
        input_size: pixels per side.

    Raises:
        UserError: if the patches do not fill the image.
    """
    parameter = inspect.signature(make).parameters.get('patch_size')
    if parameter is None:
        with torch.device('meta'):
            patch_size = make().patch_embed.patch_size[0]
    else:
        patch_size = parameter.default
    if input_size % patch_size:
        raise UserError(
            f'--input_size {input_size} is not a multiple of the patch size {patch_size} of {model}'
        )
    return input_size // patch_size


def check_checkpoint(flag: str, path: str) -> None:
    """Check that a file exists before the images are listed, which can take minutes.

    Raises:
        UserError: if it does not. '' and auto pass.
    """
    if path and path != 'auto' and not os.path.isfile(path):
        raise UserError(f'{flag}: checkpoint {path} does not exist, or is not a file')


def check_start(resume: str, finetune: str, evaluates: bool) -> None:
    """Check the files that a classifier starts from.

    Args:
        resume, finetune: the flags. --resume takes precedence.
        evaluates: --eval.

    Raises:
        UserError: if a file is missing, or --eval has nothing to evaluate.
    """
    if evaluates and not (resume or finetune):
        raise UserError(
            '--eval has no checkpoint to evaluate: give --resume FILE (auto looks in --output_dir)'
        )
    check_checkpoint(*(('--resume', resume) if resume else ('--finetune', finetune)))
