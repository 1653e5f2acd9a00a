"""Checkpoints in the published format: a dict of model, optimizer, epoch, scaler, args."""

import argparse
import os
import pickle

import torch
import torch.distributed as dist

from util.errors import UserError


def save_on_master(obj, path):
    """torch.save on the first process. The file appears under its name only when it is whole and on the disk."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    part = f'{path}.tmp'
    try:
        with open(part, 'wb') as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch's writer reports a full disk as a RuntimeError
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f'{path} could not be written (disk full?): {first_line(e)}') from e


def load(path):
    """The contents of a checkpoint file, on the CPU. Tensors, plain values and an argparse.Namespace; anything else is refused.

    Raises:
        UserError: missing, damaged, or with foreign objects inside.
    """
    if not os.path.isfile(path):
        raise UserError(f'checkpoint {path} does not exist')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f'checkpoint {path} cannot be read (damaged, or not a checkpoint): {first_line(e)}') from e


def save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler):
    """Write checkpoint-EPOCH.pth into args.output_dir."""
    save_on_master({
        'model': model_without_ddp.state_dict(),
        'optimizer': optimizer.state_dict(),
        'epoch': epoch,
        'scaler': loss_scaler.state_dict(),
        'args': args,
    }, os.path.join(args.output_dir, f'checkpoint-{epoch}.pth'))


def load_model(args, model_without_ddp, optimizer, loss_scaler):
    """Continue from args.resume, if one is given: weights, optimiser, scaler, and args.start_epoch as the epoch after.

    A file without an optimiser gives its weights alone. Raises UserError if the weights are another model's.
    """
    if not args.resume:
        return
    checkpoint = load(args.resume)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('model', checkpoint), dict):
        raise UserError(f'--resume {args.resume}: not a checkpoint')
    state_dict = checkpoint.get('model', checkpoint)
    difference = _difference(model_without_ddp.state_dict(), state_dict)
    if difference:
        raise UserError(f'--resume {args.resume} is a checkpoint of another model: {difference}; '
                        'give the flags it was trained with, --model and --input_size among them')
    model_without_ddp.load_state_dict(state_dict)
    if 'optimizer' not in checkpoint or 'epoch' not in checkpoint:
        print(f'Weights from {args.resume}, which has no optimiser state')
        return
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
    except ValueError as e:
        raise UserError(f'--resume {args.resume}: the optimiser state does not fit: {first_line(e)}') from e
    args.start_epoch = checkpoint['epoch'] + 1
    loss_scaler.load_state_dict(checkpoint.get('scaler') or {})
    print(f'Resumed from {args.resume}: epoch {checkpoint["epoch"]} is done')


def _difference(ours, theirs):
    """The first difference in names or shapes of two state dicts, in words; '' if there is none."""
    for name, value in ours.items():
        if name not in theirs:
            return f'{name} is missing in it'
        if theirs[name].shape != value.shape:
            return f'{name} is {list(theirs[name].shape)} in it and {list(value.shape)} here'
    extra = [name for name in theirs if name not in ours]
    return f'it has {extra[0]}, which this model has not' if extra else ''


def first_line(error):
    """First line of an exception's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
