"""Precision, loss scaling, and steps with NaN or Inf gradients."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from util.distributed import gather, is_main_process
from util.errors import UserError
from util.files import append_line
from util.logs import Record

AMP_DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def resolve_amp(amp: str, device: str | torch.device) -> str:
    """Resolve --amp auto: bf16 if the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    if amp != 'auto':
        return amp
    if torch.device(device).type == 'cuda':
        return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    # Without these instructions bf16 is emulated and slower than fp32. The test is private to
    # PyTorch; tried with 2.6 to 2.15.
    has_bf16 = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    return 'bf16' if has_bf16() else 'fp32'


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Return the autocast context of a resolved precision. fp32 needs none."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class NativeScalerWithGradNormCount:
    """Backward pass and optimizer step, with loss scaling for fp16.

    A step with NaN or Inf gradients is skipped on all ranks and changes nothing.

    Attributes:
        skipped: the number of steps skipped in a row, a scalar tensor on the device. Reading
            it waits for the device.
    """

    state_dict_key = 'amp_scaler'

    def __init__(self, enabled: bool = True, device: str | torch.device = 'cuda') -> None:
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=enabled)
        self.skipped = torch.zeros((), device=device)

    def __call__(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        parameters: Iterable[torch.Tensor] | None = None,
        create_graph: bool = False,
        update_grad: bool = True,
    ) -> torch.Tensor | None:
        """Run the backward pass and, with ``update_grad``, the optimizer step.

        Args:
            clip_grad: clip the gradients to this norm. None: do not clip.
            parameters: the parameters of the norm. None: all of the optimizer's.

        Returns:
            The norm of the gradients before clipping, or None without ``update_grad``.
        """
        # A non-finite loss on one rank must poison its gradients, so that after the all-reduce
        # every rank skips the step.
        loss = loss * (1 + 0 * loss.detach())
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self._scaler.unscale_(optimizer)
        if parameters is None:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
        parameters = list(parameters)
        if clip_grad is None:
            norm = get_grad_norm_(parameters)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        broken = (~norm.isfinite()).float()
        self.skipped = (self.skipped + 1) * broken
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
            self._scaler.update()
        elif getattr(optimizer, '_step_supports_amp_scaling', False):
            # Fused optimizers skip the step on the device; nothing waits for the answer. The
            # attributes are how GradScaler talks to them, tried with PyTorch 2.6 to 2.15.
            optimizer.grad_scale, optimizer.found_inf = None, broken
            optimizer.step()
        elif not broken:  # any other optimizer has to wait
            optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._scaler.is_enabled() and state_dict:  # empty after a run in bf16 or fp32
            self._scaler.load_state_dict(state_dict)


def get_grad_norm_(
    parameters: torch.Tensor | Sequence[torch.Tensor], norm_type: float = 2.0
) -> torch.Tensor:
    """Return the norm of all gradients together, a scalar tensor."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads, norm_type)


def check_skipped(
    records: list[Record], epoch: int, limit: int, accum_iter: int, output_dir: str
) -> None:
    """Report skipped steps, and end the run after too many in a row.

    Args:
        records: of util.logs.EpochLog.update.
        epoch: this epoch.
        limit: the number of steps in a row that may be skipped.
        accum_iter: iterations per step.
        output_dir: folder of skipped_steps.txt, or ''.

    Raises:
        UserError: if more than ``limit`` steps in a row were skipped. The last checkpoint is
            still good.
    """
    for i, last in enumerate(records):
        if not last.skipped or (last.step + 1) % accum_iter:
            continue
        where = f'epoch {epoch}, step {last.step}, lr {last.lr:.2e}'
        iterations = records[max(0, i + 1 - accum_iter) : i + 1]
        batches = gather(
            {
                'losses': [str(r.loss) for r in iterations],
                'samples': [r.sample_ids.tolist() for r in iterations],
            }
        )
        if is_main_process():
            message = f'Skipped step with NaN or Inf gradients: {where} ({last.skipped} in a row)'
            tqdm.write(message, file=sys.stderr)
        if is_main_process() and output_dir:
            note = {'epoch': epoch, 'step': last.step, 'lr': last.lr, 'in_a_row': last.skipped}
            path = os.path.join(output_dir, 'skipped_steps.txt')
            append_line(path, json.dumps({**note, 'processes': batches}))
        if last.skipped > limit:
            raise UserError(
                f'{last.skipped} steps in a row had NaN or Inf gradients (--max_skipped_steps '
                f'{limit}), the last in {where}; resume from the last checkpoint with a lower '
                '--blr, or with --amp fp32'
            )
