"""Checkpoints: the published dict of model, optimizer, epoch, scaler, args, written safely; every known format, read safely."""

import argparse
import glob
import os
import pickle
import shutil
import sys

import torch

from util import formats, integrity
from util.distributed import gather, is_main_process
from util.errors import UserError, as_user_error, first_line
from util.pos_embed import interpolate_pos_embed
from util.provenance import first_start, restarts
from util.torchscript import is_torchscript

# ---- writing ----

def save_on_master(obj, path, names=()):
    """torch.save on the first process. The file appears under its name only when it is whole and on the disk.

    Before that it appears under the other ``names``: whoever finds a new ``path`` can rely on them. ``load`` recognises if its
    records are altered or exchanged later.
    """
    if not is_main_process():
        return
    part = f'{path}.tmp'
    try:
        with open(part, 'w+b') as f:
            torch.save(obj, f)
            integrity.seal(f)
            f.flush()
            os.fsync(f.fileno())
        for name in names:
            _also_as(part, name)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch's writer reports a full disk as a RuntimeError
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f'{path} could not be written (disk full?): {first_line(e)}') from e


def save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler, is_best=False, **more):
    """Write checkpoint-last.pth into args.output_dir; call it after every epoch.

    The same file stays under other names too: checkpoint-EPOCH.pth after every args.save_every-th epoch and the last one,
    checkpoint-best.pth with ``is_best``. ``more`` goes into the checkpoint's dict; with a ``step`` among it, ``epoch`` is the
    last whole one, and the file keeps to its first name.

    Raises:
        UserError: it cannot be written, or the weights are not finite, or at the end of the run the last steps were left out for
            that. The earlier files stay as they are.
    """
    if not args.output_dir or not is_main_process():
        return
    skipped = int(loss_scaler.skipped)
    if skipped > 1:  # one is what loss scaling does now and then; before several, a step may have broken the weights
        what = f'the last {skipped} steps had gradients that are not finite'
        if epoch + 1 == args.epochs:
            raise UserError(f'nothing is saved at the end: {what}; resume from the last checkpoint with a lower --blr, or with '
                            '--amp fp32')
        print(f'Not saved: {what}', file=sys.stderr)
        return
    if not all(p.isfinite().all() for p in model_without_ddp.parameters()):  # the loss was that before the last step
        raise UserError(f'the weights are no longer finite after epoch {epoch}, and are not saved; resume from the last '
                        'checkpoint with a lower --blr, or with --amp fp32')
    names = []
    if 'step' not in more and (epoch % args.save_every == 0 or epoch + 1 == args.epochs):
        names.append(f'checkpoint-{epoch}.pth')
    if is_best:
        names.append('checkpoint-best.pth')
    save_on_master({
        'model': model_without_ddp.state_dict(),
        'optimizer': optimizer.state_dict(),
        'epoch': epoch,
        'scaler': loss_scaler.state_dict(),
        'args': args,
        **more,
    }, os.path.join(args.output_dir, 'checkpoint-last.pth'), [os.path.join(args.output_dir, name) for name in names])


def _also_as(path, name):
    """A second name for the file: a hard link, which costs no space while both are there, or a copy where there are none."""
    part = f'{name}.tmp'
    try:
        if os.path.exists(part):
            os.remove(part)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        os.replace(part, name)
    except OSError as e:
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f'{name} could not be written (disk full?): {first_line(e)}') from e


# ---- reading ----

class _Ignored:
    """Stands for what a checkpoint may hold beside weights and nobody reads here: NumPy's numbers and arrays, mmengine's logs.

    NumPy's own classes are not allowed in its place: a made-up array can point anywhere in memory.
    """

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# The only classes beside tensors and plain values that the known formats hold; none of them runs code.
_IGNORED = ['mmengine.logging.history_buffer.HistoryBuffer', 'numpy.ndarray', 'numpy.dtype', *(
    f'{module}.multiarray.{name}' for module in ('numpy.core', 'numpy._core') for name in ('_reconstruct', 'scalar'))]
_ALLOWED = [argparse.Namespace, *((_Ignored, name) for name in _IGNORED)]


def load(path):
    """What a checkpoint file holds, on the CPU: .safetensors, or torch.save's format, of which only known classes are taken.

    Raises:
        UserError: missing, damaged or altered (util/integrity.py tells how it is recognised), or with other classes inside,
            which are named and not run.
    """
    if not os.path.isfile(path):
        raise UserError(f'checkpoint {path} does not exist, or is no file')
    try:
        if is_torchscript(path):
            raise UserError(f'{path} is a TorchScript archive: a teacher for --clip_path, and no checkpoint')
        if str(path).endswith('.safetensors'):
            return integrity.load_safetensors(path)
        integrity.check(path, _IGNORED)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location='cpu', weights_only=True)
    except integrity.ForeignName as e:
        raise UserError(f'checkpoint {path} is refused: it holds {e}, and could run code; a checkpoint needs only '
                        'tensors, plain values and argparse.Namespace') from e
    except UserError:
        raise
    except Exception as e:  # whatever a damaged file, or one made to do harm, can raise on the way
        # torch's own words on what it cannot unpickle advise to do without the protection
        reason = '' if isinstance(e, (pickle.UnpicklingError, KeyError)) or 'weights_only' in str(e) else f': {first_line(e)}'
        raise UserError(f'checkpoint {path} cannot be read, it is damaged or not a checkpoint{reason}') from e


def read_weights(path):
    """(what the file holds, its state dict under our names); formats: see util/formats.py. Raises UserError."""
    checkpoint = load(path)
    with as_user_error(f'checkpoint {path}', ValueError):
        state_dict = formats.to_ours(checkpoint)
        integrity.check_claims(state_dict)
        return checkpoint, state_dict


def load_pretrained(args, model, whole_encoder=False):
    """Start ``model``, a classifier, from the encoder in args.finetune: what --finetune does.

    Position embeddings of another grid are resized; a head for other classes is left out. Prints what was matched, what is
    missing and starts anew, and what the file has beyond that.

    Raises:
        UserError: nothing of the encoder is in the file, or a tensor has another shape; with args.eval, if anything is missing;
            with ``whole_encoder``, if anything of the encoder is.
    """
    where = f'--finetune {args.finetune}'
    _, state_dict = read_weights(args.finetune)
    with as_user_error(f'{where} has a pos_embed that cannot be resized', RuntimeError, IndexError, TypeError, ValueError):
        interpolate_pos_embed(model, state_dict)
    ours = model.state_dict()
    other_head = [k for k in ours if k.startswith('head') and k in state_dict and state_dict[k].shape != ours[k].shape]
    matched = [k for k in ours if k in state_dict and k not in other_head]
    missing = [k for k in ours if k not in matched]
    for name in matched:
        if unlike := misfit(ours[name], state_dict[name]):
            raise UserError(f'{where} does not fit --model {args.model}: {name} is {unlike}; '
                            'name the model it was made with')
    if not any(name.startswith(('blocks', 'patch_embed')) for name in matched):
        raise UserError(f'{where}: nothing of the encoder is in it; its names are {", ".join(list(state_dict)[:3])}, ...')
    gaps = [name for name in missing if name.startswith(('cls_token', 'pos_embed', 'patch_embed', 'blocks'))]
    if whole_encoder and gaps:
        raise UserError(f'{where} has no {_summary(gaps)}; a frozen encoder has to be whole')
    if args.eval and missing:
        raise UserError(f'{where} has no {_summary(missing)} for {args.nb_classes} classes; --eval needs the checkpoint of a '
                        'whole classifier and its flags for pooling')
    model.load_state_dict({name: state_dict[name] for name in matched}, strict=False)
    print(f'{args.finetune}: {len(matched)} tensors matched; missing, start anew: {_summary(missing)}; unexpected, not used: '
          f'{_summary(k for k in state_dict if k not in matched)}')


def resolve_resume(args):
    """Make args.resume the newest whole checkpoint in args.output_dir: for --resume auto, and where torchrun has restarted a run.

    Where there is none it becomes '' with auto, and stays what was given otherwise. All processes take the first's word for it.
    """
    restarted = any(gather(restarts()))
    if args.resume != 'auto' and not (restarted and args.output_dir):
        return
    if not args.output_dir:
        raise UserError('--resume auto looks for checkpoints in --output_dir, which is empty')
    found = ''
    if is_main_process():
        # Without auto, only what this very run has written: other files were there before it.
        since = 0 if args.resume == 'auto' else first_start(args.output_dir)
        found = newest_checkpoint(args.output_dir, since) if since is not None else ''
    found = gather(found)[0]
    if found:
        args.resume = found
    elif args.resume == 'auto':
        args.resume = ''
        print(f'--resume auto: no checkpoint in {args.output_dir}, a fresh start')


def newest_checkpoint(folder, since=0):
    """The newest checkpoint-*.pth in ``folder``, written after ``since``, that is whole; '' if there is none.

    Says which it passes over and why. checkpoint-best.pth is taken where there is no other.
    """
    paths = glob.glob(os.path.join(glob.escape(folder), 'checkpoint-*.pth'))
    paths = [path for path in paths if os.stat(path).st_mtime >= since]
    # checkpoint-best.pth comes last: beside checkpoint-last.pth it has nothing of its own but, for a Sweep, another head
    def rank(path):
        return not path.endswith('best.pth'), os.stat(path).st_mtime, path.endswith('last.pth')

    for path in sorted(paths, key=rank, reverse=True):
        try:
            load(path)
            return path
        except UserError as e:
            print(f'Passed over: {e}', file=sys.stderr)
    return ''


def load_model(args, model_without_ddp, optimizer, loss_scaler):
    """Continue from args.resume, if one is given: weights, optimiser, scaler, and args.start_epoch as the epoch after.

    A file without an optimiser's state gives its weights alone. Raises UserError if the weights are another model's.

    Returns:
        what the file holds beside the weights, or {}.
    """
    if not args.resume:
        return {}
    checkpoint, state_dict = read_weights(args.resume)
    difference = _difference(model_without_ddp.state_dict(), state_dict)
    if difference:
        raise UserError(f'--resume {args.resume} is a checkpoint of another model: {difference}; '
                        'give the flags it was trained with, --model and --input_size among them')
    model_without_ddp.load_state_dict(state_dict)
    if 'optimizer' not in checkpoint or 'epoch' not in checkpoint:
        print(f'Weights from {args.resume}, which has no optimiser state')
        return {}
    if getattr(args, 'eval', False):
        print(f'Weights from {args.resume}')
        return {}
    misfits = ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError
    with as_user_error(f'--resume {args.resume}: its optimiser state does not fit', *misfits):
        integrity.check_training_state(checkpoint, optimizer)
        optimizer.load_state_dict(checkpoint['optimizer'])
        loss_scaler.load_state_dict(checkpoint.get('scaler') or {})
        checkpoint['max_accuracy'] = float(checkpoint.get('max_accuracy', -1))
        if 'step' in checkpoint:
            checkpoint['sums'] = {str(k): (int(count), float(total)) for k, (count, total) in checkpoint['sums'].items()}
    args.start_epoch = checkpoint['epoch'] + 1
    if 'step' in checkpoint:
        print(f'Resumed from {args.resume}: epoch {args.start_epoch}, after step {checkpoint["step"]}')
    else:
        print(f'Resumed from {args.resume}: epoch {checkpoint["epoch"]} is done')
    return checkpoint


def misfit(ours, theirs):
    """'[3, 192] in it and [4, 192] here' if one tensor cannot be copied into the other, else ''. Rounding is no misfit."""
    if ours.shape != theirs.shape:
        return f'{list(theirs.shape)} in it and {list(ours.shape)} here'
    if ours.is_floating_point() != theirs.is_floating_point():
        return f'{theirs.dtype} in it and {ours.dtype} here'
    return ''


def _difference(ours, theirs):
    """The first difference in names or shapes of two state dicts, in words; '' if there is none."""
    for name, value in ours.items():
        if name not in theirs:
            return f'{name} is missing in it'
        if unlike := misfit(value, theirs[name]):
            return f'{name} is {unlike}'
    extra = [name for name in theirs if name not in ours]
    return f'it has {extra[0]}, which this model has not' if extra else ''


def _summary(names):
    """'decoder_blocks (96), mask_token': names by their first part, with how many tensors each part has."""
    counts = {}
    for name in names:
        part = name.partition('.')[0]
        counts[part] = counts.get(part, 0) + 1
    return ', '.join(part if n == 1 else f'{part} ({n})' for part, n in counts.items()) or 'none'

