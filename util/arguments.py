"""What the scripts' command lines have in common."""

import argparse
import os
import sys

import timm.layers
import torch

from util import misc
from util.checkpoint import resolve_resume
from util.errors import UserError
from util.lr_sched import absolute_lr
from util.memory import keep_freed_memory
from util.parser import Parser, bounded  # noqa: F401
from util.provenance import available_cores


class Device(argparse.Action):
    """--device, remembering that it was asked for: only the default gives way to the CPU where there is no CUDA."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.device = values
        namespace.device_given = True


def add_common_arguments(parser, **defaults):
    """The flags of all scripts; a script's own defaults by name."""
    group = parser.add_argument_group('training')
    group.add_argument('--batch_size', default=64, type=bounded(int, 1), metavar='N',
                       help='images a process and step; the effective batch is batch_size * accum_iter * processes')
    group.add_argument('--epochs', type=bounded(int, 1), metavar='N', help='passes over the training set')
    group.add_argument('--accum_iter', default=1, type=bounded(int, 1), metavar='N',
                       help='steps whose gradients are accumulated before the weights are updated')
    group.add_argument('--compile', default='auto', choices=['auto', 'on', 'off'], help='torch.compile; auto: on a GPU')
    add_device_arguments(group)

    group = parser.add_argument_group('optimiser')
    group.add_argument('--weight_decay', type=bounded(float, 0, 1e3), default=0.05, metavar='W', help='not on biases and norms')
    group.add_argument('--lr', type=bounded(float, 0, 1e9), default=None, metavar='LR',
                       help='absolute learning rate; default: what follows from --blr')
    group.add_argument('--blr', type=bounded(float, 0, 1e9), default=1e-3, metavar='LR',
                       help='base learning rate: lr = blr * effective batch / 256')
    group.add_argument('--min_lr', type=bounded(float, 0, 1e9), default=0.0, metavar='LR', help='the rate the schedule ends at')
    group.add_argument('--warmup_epochs', type=bounded(int, 0), metavar='N', help='epochs of linear warm-up')
    group.add_argument('--max_skipped_steps', default=10, type=bounded(int, 0), metavar='N',
                       help='steps in a row that are left out for gradients that are not finite before the run stops')

    add_data_arguments(parser.add_argument_group('data'))

    group = parser.add_argument_group('output, saving and going on')
    group.add_argument('--output_dir', default='./output_dir', metavar='DIR', help="checkpoints and log.txt; '' writes none")
    group.add_argument('--log_dir', default='./output_dir', metavar='DIR', help="TensorBoard's events; '' writes none")
    group.add_argument('--print_freq', default=20, type=bounded(int, 1), metavar='N', help='steps between two log lines')
    group.add_argument('--save_every', default=20, type=bounded(int, 1), metavar='N',
                       help='checkpoint-EPOCH.pth after every N-th epoch and the last; checkpoint-last.pth is always the newest')
    group.add_argument('--save_minutes', default=None, type=bounded(float, 0), metavar='MINUTES',
                       help='save inside epochs too, as checkpoint-last.pth, after so many minutes; default: at their end only')
    group.add_argument('--resume', default='', metavar='FILE',
                       help='checkpoint to continue from; auto: the newest whole one in --output_dir, if there is one')
    group.add_argument('--start_epoch', default=0, type=bounded(int, 0), metavar='N',
                       help='the first epoch, counted from 0, where --resume does not tell it')

    add_process_arguments(parser)
    parser.set_defaults(**defaults)


def add_device_arguments(group):
    group.add_argument('--amp', default='auto', choices=['auto', 'fp32', 'bf16', 'fp16'],
                       help='precision of the forward pass; auto: bf16 if the hardware has it, else fp16 on a GPU, fp32 on CPU')
    group.add_argument('--seed', default=0, type=bounded(int, 0, 2**63 - 1), metavar='N',
                       help='crops, masks and other draws follow from it')
    group.add_argument('--device', default='cuda', action=Device, metavar='DEVICE',
                       help='cuda or cpu; where there is no CUDA the default is cpu')


def add_data_arguments(group):
    group.add_argument('--data_path', metavar='DIR',
                       help='folder with train/ and val/, a folder a class in each; pretraining needs train/ alone')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help='read --data_path as this data set of timm instead: torch/cifar10, hfds/NAME, wds/NAME, or tar '
                            'for tar files; default: an image folder')
    group.add_argument('--train_split', default='train', metavar='NAME', help='name of the training set, with --dataset')
    group.add_argument('--val_split', default='validation', metavar='NAME', help='name of the validation set, with --dataset')
    group.add_argument('--num_workers', default=16, type=bounded(int, 0), metavar='N',
                       help='loader processes of each process; no more than it has cores')
    group.add_argument('--pin_mem', action='store_true', default=True,
                       help='page-locked memory for faster copies to the GPU (the default)')
    group.add_argument('--no_pin_mem', action='store_false', dest='pin_mem', help='ordinary memory instead')
    group.add_argument('--max_bad_images', default=100, type=bounded(int, 0), metavar='N',
                       help='unreadable image files that a process passes over before the run stops')


def add_process_arguments(parser):
    group = parser.add_argument_group('processes (set by the launchers)')
    group.add_argument('--world_size', default=1, type=int, metavar='N', help='number of processes')
    group.add_argument('--local_rank', '--local-rank', default=-1, type=int, metavar='N',
                       help="the process's number on its machine")
    group.add_argument('--dist_on_itp', action='store_true', help='the job was started by Open MPI')
    group.add_argument('--dist_timeout', default=30.0, type=bounded(float, 0.01, 1e5), metavar='MINUTES',
                       help='how long processes wait for each other before the run is given up')
    group.add_argument('--dist_url', default='env://', metavar='URL', help='how processes find each other')


def add_encoder_arguments(parser, models, pooling=True):
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_large_patch16', choices=models, metavar='NAME', help=', '.join(models))
    group.add_argument('--input_size', default=224, type=bounded(int, 1, 4096), metavar='PIXELS', help='pixels along a side')
    group.add_argument('--nb_classes', default=1000, type=bounded(int, 1), metavar='N', help='classes; checked against the data')
    if pooling:
        group.add_argument('--global_pool', action='store_true', help='classify the mean of the patch tokens')
        group.add_argument('--cls_token', action='store_false', dest='global_pool', help='classify the class token (the default)')
    group.add_argument('--finetune', default='', metavar='FILE',
                       help='checkpoint to start from: ours, MAE, timm, OpenMMLab, .safetensors; default: random weights')


def add_classifier_arguments(parser, models):
    """The flags that fine-tuning and linear probing share beyond those of all scripts."""
    add_encoder_arguments(parser, models)
    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluate the checkpoint of --resume or --finetune, and end')
    group.add_argument('--dist_eval', action='store_true',
                       help='a share of the validation set on each process instead of all of it; the accuracy is the same')


def check_classifier(args, models):
    """Combinations of flags that cannot work in fine-tuning and linear probing."""
    if args.eval and not (args.resume or args.finetune):
        raise UserError('--eval needs a checkpoint to evaluate: give --resume FILE')
    check_sizes(args, models)
    check_checkpoint(args)


def check_sizes(args, models):
    """The number of patches of the flags; UserError where they do not fill the image."""
    patch_size = models[args.model].keywords['patch_size']
    if args.input_size % patch_size:
        raise UserError(f'--input_size {args.input_size} is not a multiple of the patch size {patch_size} of {args.model}')
    return (args.input_size // patch_size) ** 2


def check_checkpoint(args):
    """UserError where the file to begin with is not there: said before the images are listed, which can take minutes."""
    flag = 'resume' if args.resume else 'finetune'
    file = getattr(args, flag, '')
    if file and file != 'auto' and not os.path.isfile(file):
        raise UserError(f'--{flag}: checkpoint {file} does not exist, or is no file')


def set_learning_rate(args):
    """args.lr from --blr and the effective batch, if --lr does not give it; both are printed."""
    batch = args.batch_size * args.accum_iter * args.world_size
    if args.lr is None:
        args.lr = absolute_lr(args, args.blr)
    if not getattr(args, 'eval', False):
        print(f'effective batch {batch} = {args.batch_size} x accum_iter {args.accum_iter} x {args.world_size}, '
              f'lr {args.lr:.3g} (blr {args.lr * 256 / batch:.3g})')
        if args.warmup_epochs >= args.epochs:
            print(f'Note: the warm-up of {args.warmup_epochs} epochs is longer than the run; the rate stays below {args.lr:.3g}')


def setup(args):
    """Device, processes and precision of a run; resolves args.device, amp, lr, num_workers. Returns the torch.device."""
    choose_device(args)
    misc.init_distributed_mode(args)
    device = torch.device(args.device)
    resolve_resume(args)
    torch.manual_seed(args.seed)  # nothing of ours draws from it (util/seeding.py), but what a fork adds may
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu':
        keep_freed_memory()

    args.amp = misc.resolve_amp(args.amp, device)
    args.compile = misc.resolve_compile(args.compile, device)
    # In bf16 on a CPU, the backward pass of PyTorch's fused attention takes longer than that of the plain formula.
    timm.layers.set_fused_attn(device.type != 'cpu' or args.amp == 'fp32')
    args.pin_mem = args.pin_mem and device.type == 'cuda'
    args.num_workers = min(args.num_workers, available_cores())
    print(f'{args.world_size} process(es) on {device.type}, {args.amp}{", compiled" if args.compile else ""}, '
          f'{args.num_workers} loader workers each')
    set_learning_rate(args)
    if not (args.resume or getattr(args, 'finetune', True)):
        print('No --finetune: the encoder starts from random weights')
    return device


def choose_device(args):
    given = getattr(args, 'device_given', False)
    vars(args).pop('device_given', None)
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = None
    if kind not in ('cuda', 'cpu'):
        raise UserError(f'--device {args.device}: take cuda or cpu')
    if kind == 'cuda' and not torch.cuda.is_available():
        if given:
            raise UserError(f'--device {args.device}: PyTorch finds no CUDA GPU here; take --device cpu')
        if int(os.environ.get('RANK', 0)) == 0:
            print('No CUDA GPU here: running on the CPU', file=sys.stderr)
        args.device = 'cpu'
