"""Save and resume a training run."""

import argparse
import os
import sys
from typing import Any, NamedTuple

import torch

from util.amp import NativeScalerWithGradNormCount
from util.checkpoints import io, verify
from util.distributed import is_main_process
from util.errors import UserError, as_user_error


class Start(NamedTuple):
    """Where a run begins. The defaults are those of a new run.

    Attributes:
        epoch: the first epoch to train.
        step: iterations of that epoch that are already done.
        sums: result of util.logs.EpochLog.sums over these.
        max_accuracy: best validation accuracy so far, in percent; -1 if there is none.
        resumed: whether a checkpoint was loaded.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, tuple[int, float]] = {}
    max_accuracy: float = -1.0
    resumed: bool = False

    def within(self, epoch: int) -> dict[str, Any]:
        """Return what is already done of ``epoch``: its ``start_step``, and the log's ``sums``."""
        step, sums = (self.step, self.sums) if epoch == self.epoch else (0, {})
        return {'start_step': step, 'sums': sums}

    def step_of(self, epoch: int) -> int:
        """Return the number of iterations of ``epoch`` that are already done."""
        return self.within(epoch)['start_step']

    def resumed_at(self, steps_per_epoch: int) -> float | None:
        """Return the fractional epoch at which a resumed run begins, None for a new run."""
        return self.epoch + self.step / steps_per_epoch if self.resumed else None


class Checkpointer:
    """Save and resume model, optimizer and loss scale.

    A checkpoint is the published dict: model, optimizer, epoch, scaler, args. Within an epoch
    it also has step, step_images and sums.

    Args:
        model: the model without DDP.
        output_dir: folder of the checkpoints; '' saves none.
        flags: all flags with their resolved values, stored as ``args``.
        epochs: length of the run, whose last epoch is always kept.
        save_every: keep checkpoint-EPOCH.pth after every N-th epoch.
        images_per_step: images per iteration on all ranks.

    Attributes:
        extra: further entries of every checkpoint. Classifiers keep max_accuracy in it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scaler: NativeScalerWithGradNormCount,
        output_dir: str,
        *,
        flags: dict[str, Any],
        epochs: int,
        save_every: int = 20,
        images_per_step: int = 1,
    ) -> None:
        self.model, self.optimizer, self.loss_scaler = model, optimizer, loss_scaler
        self.output_dir, self.flags, self.epochs = output_dir, flags, epochs
        self.save_every, self.images_per_step = save_every, images_per_step
        self.extra = {}

    def save(
        self,
        epoch: int,
        step: int | None = None,
        best: bool = False,
        sums: dict[str, tuple[int, float]] | None = None,
    ) -> None:
        """Write checkpoint-last.pth, on rank 0.

        The same file is kept as checkpoint-EPOCH.pth after every N-th epoch and the last one,
        and as checkpoint-best.pth with ``best``.

        Args:
            epoch: the epoch that is done; with ``step``, the epoch that is under way.
            step: the number of its iterations that are done. None: all of them.
            best: keep the file as checkpoint-best.pth, too.
            sums: result of util.logs.EpochLog.sums, with ``step``.

        Raises:
            UserError: if the file cannot be written, or the weights are not finite, or the last
                steps of the run were skipped. Earlier checkpoints stay as they are.
        """
        if not self.output_dir or not is_main_process() or not self._weights_are_good(epoch, step):
            return
        keep = step is None and (epoch % self.save_every == 0 or epoch + 1 == self.epochs)
        names = ['checkpoint-best.pth'] * best + [f'checkpoint-{epoch}.pth'] * keep
        links = [os.path.join(self.output_dir, name) for name in names]
        checkpoint = self.contents(epoch)
        if step is not None:
            checkpoint |= {
                'epoch': epoch - 1,  # the last complete epoch
                'step': step,
                'step_images': self.images_per_step,
                'sums': sums,
            }
        io.save_on_master(checkpoint, os.path.join(self.output_dir, 'checkpoint-last.pth'), links)

    def contents(self, epoch: int) -> dict[str, Any]:
        """Return the checkpoint at the end of ``epoch``."""
        return {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'epoch': epoch,
            'scaler': self.loss_scaler.state_dict(),
            'args': argparse.Namespace(**self.flags),
            **self.extra,
        }

    # Return whether to save. Several skipped steps in a row may mean that the weights are already
    # broken; one is normal with loss scaling. The end of the run must not pass in silence.
    def _weights_are_good(self, epoch, step):
        skipped = int(self.loss_scaler.skipped)
        if skipped > 1:
            reason = f'the last {skipped} steps had NaN or Inf gradients'
            if step is not None or epoch + 1 < self.epochs:
                print(f'Not saved: {reason}', file=sys.stderr)
                return False
        elif all(p.isfinite().all() for p in self.model.parameters()):
            return True
        else:
            reason = 'the weights are NaN or Inf'  # the last loss was computed before the last step
        raise UserError(
            f'epoch {epoch} is not saved: {reason}; resume from the last checkpoint with a lower '
            '--blr, or with --amp fp32'
        )

    def resume(
        self,
        path: str,
        *,
        start_epoch: int = 0,
        steps_per_epoch: int = 1,
        accum_iter: int = 1,
        weights_only: bool = False,
    ) -> Start:
        """Continue from a checkpoint.

        A file without an optimizer state gives only its weights.

        Args:
            path: the checkpoint; '' begins a new run.
            start_epoch: the first epoch if the checkpoint does not have it.
            steps_per_epoch, accum_iter: iterations per epoch and per update of this run. After
                a change of batch size or number of processes, the run resumes after the last
                whole update that ends before the same image and is not the last of the epoch.
            weights_only: load only the weights, for evaluation.

        Raises:
            UserError: if the file is damaged, or is a checkpoint of another model.
        """
        if not path:
            return Start(epoch=start_epoch)
        checkpoint, state_dict = io.read_weights(path)
        different = io.difference(self.model.state_dict(), state_dict)
        if different:
            raise UserError(
                f'--resume {path} is a checkpoint of another model: {different}; use the flags '
                'of its training, such as --model and --input_size'
            )
        self.model.load_state_dict(state_dict)
        if weights_only or 'optimizer' not in checkpoint or 'epoch' not in checkpoint:
            print(f'Weights from {path}' + ('' if weights_only else ', without optimizer state'))
            return Start(epoch=start_epoch, resumed=True)
        errors = UserError, ValueError, LookupError, TypeError, AttributeError, RuntimeError
        with as_user_error(f'--resume {path}: the optimizer state does not fit', *errors):
            verify.check_training_state(checkpoint, self.optimizer)
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            self.loss_scaler.load_state_dict(checkpoint.get('scaler') or {})
            sums = {
                str(name): (int(count), float(total))
                for name, (count, total) in checkpoint.get('sums', {}).items()
            }
        images = checkpoint.get('step', 0) * checkpoint.get('step_images', self.images_per_step)
        done = min(images // self.images_per_step, steps_per_epoch - 1)  # the epoch may be shorter
        step = done // accum_iter * accum_iter
        epoch = checkpoint['epoch'] + 1
        where = f'epoch {epoch}, after step {step}' if step else f'epoch {epoch - 1} is done'
        print(f'Resumed from {path}: {where}')
        return Start(
            epoch,
            step,
            sums if step else {},
            float(checkpoint.get('max_accuracy', -1)),
            resumed=True,
        )


# ---- MAE's functions, for forks ----


def save_model(
    args: argparse.Namespace,
    epoch: int,
    model: torch.nn.Module,
    model_without_ddp: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scaler: NativeScalerWithGradNormCount,
) -> None:
    """Save a checkpoint as MAE's function of this name does; Checkpointer.save does the work."""
    Checkpointer(
        model_without_ddp,
        optimizer,
        loss_scaler,
        args.output_dir,
        flags=vars(args),
        epochs=args.epochs,
        save_every=vars(args).get('save_every', 20),
    ).save(epoch)


def load_model(
    args: argparse.Namespace,
    model_without_ddp: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scaler: NativeScalerWithGradNormCount,
) -> None:
    """Resume as MAE's function of this name does: sets ``args.start_epoch``."""
    checkpointer = Checkpointer(
        model_without_ddp, optimizer, loss_scaler, '', flags=vars(args), epochs=args.epochs
    )
    args.start_epoch = checkpointer.resume(
        args.resume,
        start_epoch=args.start_epoch,
        weights_only=vars(args).get('eval', False),
    ).epoch
