"""Flags that the scripts share, and checks of their values."""

import argparse
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from util.cli import bounded
from util.errors import UserError


def add_common_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of all training scripts.

    Args:
        defaults: a script's own defaults by flag name.
    """
    group = parser.add_argument_group('training')
    group.add_argument(
        '--batch_size',
        default=64,
        type=bounded(int, 1),
        metavar='N',
        help='images per GPU and iteration; effective batch = batch_size * accum_iter * GPUs',
    )
    group.add_argument(
        '--epochs', type=bounded(int, 1), metavar='N', help='passes over the training set'
    )
    group.add_argument(
        '--accum_iter',
        default=1,
        type=bounded(int, 1),
        metavar='N',
        help='iterations whose gradients are accumulated per update',
    )
    group.add_argument(
        '--compile',
        default='auto',
        choices=['auto', 'on', 'off'],
        help='torch.compile; auto: on a GPU',
    )
    add_device_arguments(group)

    group = parser.add_argument_group('optimizer')
    group.add_argument(
        '--weight_decay',
        type=bounded(float, 0, 1e3),
        default=0.05,
        metavar='W',
        help='weight decay, not applied to biases and norms',
    )
    group.add_argument(
        '--lr',
        type=bounded(float, 0, 1e9),
        default=None,
        metavar='LR',
        help='absolute learning rate; default: from --blr',
    )
    group.add_argument(
        '--blr',
        type=bounded(float, 0, 1e9),
        default=1e-3,
        metavar='LR',
        help='base learning rate: lr = blr * effective batch / 256',
    )
    group.add_argument(
        '--min_lr',
        type=bounded(float, 0, 1e9),
        default=0.0,
        metavar='LR',
        help='learning rate at the end of the schedule',
    )
    group.add_argument(
        '--warmup_epochs', type=bounded(int, 0), metavar='N', help='epochs of linear warm-up'
    )
    group.add_argument(
        '--max_skipped_steps',
        default=10,
        type=bounded(int, 0),
        metavar='N',
        help='stop the run after more steps in a row with NaN or Inf gradients',
    )

    add_data_arguments(parser.add_argument_group('data'))

    group = parser.add_argument_group('output, checkpoints and resuming')
    group.add_argument(
        '--output_dir',
        default='./output_dir',
        metavar='DIR',
        help="folder for checkpoints and log.txt; '' writes none",
    )
    group.add_argument(
        '--log_dir',
        default='./output_dir',
        metavar='DIR',
        help="folder for TensorBoard events; '' writes none",
    )
    add_print_freq(group)
    group.add_argument(
        '--save_every',
        default=20,
        type=bounded(int, 1),
        metavar='N',
        help='keep checkpoint-EPOCH.pth after every N-th epoch and the last; '
        'checkpoint-last.pth is always the newest',
    )
    group.add_argument(
        '--save_minutes',
        default=None,
        type=bounded(float, 0),
        metavar='MINUTES',
        help='also save checkpoint-last.pth within epochs, every so many minutes, at the next log '
        'line if there are several processes; default: only at the end of an epoch',
    )
    group.add_argument(
        '--resume',
        default='',
        metavar='FILE',
        help='checkpoint to continue from; auto: the newest intact one in --output_dir, if any',
    )
    group.add_argument(
        '--start_epoch',
        default=0,
        type=bounded(int, 0),
        metavar='N',
        help='first epoch, counted from 0, if the checkpoint of --resume does not tell it',
    )

    add_process_arguments(parser)
    parser.set_defaults(**defaults)


def add_print_freq(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--print_freq',
        default=20,
        type=bounded(int, 1),
        metavar='N',
        help='iterations between two log lines',
    )


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--amp',
        default='auto',
        choices=['auto', 'fp32', 'bf16', 'fp16'],
        help='precision of the forward pass; auto: bf16 if the hardware has it, otherwise fp16 on '
        'a GPU and fp32 on a CPU',
    )
    group.add_argument(
        '--seed',
        default=0,
        type=bounded(int, 0, 2**63 - 1),
        metavar='N',
        help='seed of crops, masks and all other draws',
    )
    group.add_argument(
        '--device',
        default=None,
        metavar='DEVICE',
        help='cuda or cpu; default: cuda if there is a GPU, otherwise cpu',
    )


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --data_path and the flags of the data loader."""
    group.add_argument(
        '--data_path',
        metavar='DIR',
        help='folder with train/ and val/, each with one subfolder per class; pretraining needs '
        'only train/',
    )
    group.add_argument(
        '--dataset',
        default='',
        metavar='NAME',
        help='read --data_path as this timm data set instead: torch/cifar10, hfds/NAME, wds/NAME, '
        'or tar for tar files; default: an image folder',
    )
    group.add_argument(
        '--train_split',
        default='train',
        metavar='NAME',
        help='name of the training split, with --dataset',
    )
    group.add_argument(
        '--val_split',
        default='validation',
        metavar='NAME',
        help='name of the validation split, with --dataset',
    )
    group.add_argument(
        '--num_workers',
        default=16,
        type=bounded(int, 0),
        metavar='N',
        help='data-loader workers per process, at most the number of cores',
    )
    group.add_argument(
        '--pin_mem',
        action='store_true',
        default=True,
        help='page-locked memory for faster copies to the GPU (default)',
    )
    group.add_argument(
        '--no_pin_mem', action='store_false', dest='pin_mem', help='ordinary memory instead'
    )
    group.add_argument(
        '--max_bad_images',
        default=100,
        type=bounded(int, 0),
        metavar='N',
        help='stop the run after more unreadable images in one process',
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('processes (set by the launchers)')
    group.add_argument(
        '--world_size',
        default=1,
        type=int,
        metavar='N',
        help='accepted for published commands; set by the launcher',
    )
    group.add_argument(
        '--local_rank',
        '--local-rank',
        default=-1,
        type=int,
        metavar='N',
        help='index of the process on its machine',
    )
    group.add_argument('--dist_on_itp', action='store_true', help='the job was started by Open MPI')
    group.add_argument(
        '--dist_timeout',
        default=30.0,
        type=bounded(float, 0.01, 1e5),
        metavar='MINUTES',
        help='how long processes wait for each other before the run fails',
    )
    group.add_argument(
        '--dist_url', default='env://', metavar='URL', help='how processes find each other'
    )


def add_encoder_arguments(
    parser: argparse.ArgumentParser, models: Iterable[str], pooling: bool = True
) -> None:
    """Add the flags that build a classifier of models_vit.py.

    Args:
        models: choices of --model.
        pooling: add --global_pool and --cls_token.
    """
    group = parser.add_argument_group('model')
    group.add_argument(
        '--model',
        default='vit_large_patch16',
        choices=models,
        metavar='NAME',
        help=', '.join(models),
    )
    add_input_size(group)
    group.add_argument(
        '--nb_classes',
        default=1000,
        type=bounded(int, 1),
        metavar='N',
        help='number of classes; checked against the data',
    )
    if pooling:
        group.add_argument(
            '--global_pool', action='store_true', help='classify the mean of the patch tokens'
        )
        group.add_argument(
            '--cls_token',
            action='store_false',
            dest='global_pool',
            help='classify the class token (default)',
        )
    group.add_argument(
        '--finetune',
        default='',
        metavar='FILE',
        help='checkpoint to start from: ours, MAE, timm, OpenMMLab, .safetensors; '
        'default: random weights',
    )


def add_input_size(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--input_size',
        default=224,
        type=bounded(int, 1, 4096),
        metavar='PIXELS',
        help='height and width of the input',
    )


def add_classifier_arguments(parser: argparse.ArgumentParser, models: Iterable[str]) -> None:
    """Add the flags that fine-tuning and probing share."""
    add_encoder_arguments(parser, models)
    group = parser.add_argument_group('evaluation')
    group.add_argument(
        '--eval',
        action='store_true',
        help='evaluate the checkpoint of --resume or --finetune, and exit',
    )
    group.add_argument(
        '--dist_eval',
        action='store_true',
        help='split the validation set over the processes; the accuracy is the same',
    )


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
        raise UserError('--eval needs a checkpoint to evaluate: give --resume FILE')
    check_checkpoint(*(('--resume', resume) if resume else ('--finetune', finetune)))
