"""Precision, loss scaling, and how a script ends; with the names that MAE's util/misc.py is imported for."""

import errno
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

from util.checkpoint import load_model, save_model, save_on_master  # noqa: F401
from util.distributed import (  # noqa: F401
    all_reduce_mean,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    missing_processes,
    no_sync,
    setup_for_distributed,
)
from util.errors import UserError
from util.interruption import STATUS, Interrupted, restore_signals
from util.logs import MetricLogger, SmoothedValue  # noqa: F401

# ---- precision ----

AMP_DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def resolve_amp(amp, device):
    """--amp auto as one of fp32, bf16, fp16: bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU."""
    if amp != 'auto':
        return amp
    if torch.device(device).type != 'cuda':
        # Without these instructions bf16 is emulated, and slower than fp32.
        return 'bf16' if getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)() else 'fp32'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def autocast(device, amp):
    """The autocast context of a resolved precision; ``fp32`` is none at all."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)


def resolve_compile(choice, device):
    """--compile as a bool. auto: on a GPU, and what cannot be compiled there runs as it is; on a CPU compiling buys nothing."""
    if choice == 'auto' and torch.device(device).type == 'cuda':
        torch._dynamo.config.suppress_errors = True
        return True
    return choice == 'on'


class NativeScalerWithGradNormCount:
    """Backward pass and optimiser step, with loss scaling where the precision is fp16 and without elsewhere.

    A step whose gradients are not finite changes nothing, on any process. ``skipped``, a scalar tensor on the device, tells how
    many in a row have been left out by now.
    """

    state_dict_key = 'amp_scaler'

    def __init__(self, enabled=True, device='cuda'):
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=enabled)
        self.skipped = torch.zeros((), device=device)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        """Backward; with ``update_grad`` also clip to ``clip_grad`` and step, and return the gradients' norm before clipping.

        ``parameters``: those to clip and to take the norm of; None: the optimiser's.
        """
        # The loss is one process's own, gradients are the same on all: of one that is not finite they are not either.
        loss = loss * (1 + 0 * loss.detach())
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self._scaler.unscale_(optimizer)
        if parameters is None:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
        if clip_grad is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        else:
            norm = get_grad_norm_(parameters)
        broken = (~norm.isfinite()).float()
        self.skipped = (self.skipped + 1) * broken
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
            self._scaler.update()
        elif getattr(optimizer, '_step_supports_amp_scaling', False):  # the fused ones, which need not wait for the answer
            optimizer.grad_scale, optimizer.found_inf = None, broken
            optimizer.step()
        elif not broken:  # a fork's own optimiser
            optimizer.step()
        return norm

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict):
        if self._scaler.is_enabled() and state_dict:  # a run in bf16 or fp32 leaves an empty state
            self._scaler.load_state_dict(state_dict)


def get_grad_norm_(parameters, norm_type=2.0):
    """Norm of all gradients together: a scalar tensor."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)


# ---- scripts ----

def run(main, args):
    """``main(args)`` of a script. What the user can mend ends it with one line on stderr and status 1.

    Other statuses: 75 after an interruption that was saved, 130 after Ctrl-C.
    """
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # closed by whoever started this
    status = 0
    try:
        main(args)
    except BrokenPipeError:
        os._exit(1)  # whoever read the output has gone; a normal exit would try to write the rest
    except Interrupted as e:
        print(e, flush=True)
        status = STATUS
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    except (UserError, OSError, RuntimeError) as e:
        message = explain(e)
        if message is None:
            raise
        # Local rank 0 has the first word: what is wrong for all processes is then said once, since the launcher ends the others.
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.write(f'error: {message}\n')
        sys.stderr.flush()
        if is_dist_avail_and_initialized():
            os._exit(1)  # an orderly shutdown would wait for processes that may be stuck in a collective
        sys.exit(1)
    finally:
        restore_signals()
    if is_dist_avail_and_initialized():
        dist.barrier()  # none leaves before the first process has written its files, nor with a collective half torn down
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def explain(error):
    """What has happened and what to do, in one line; None for what is nobody's fault but ours."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        full = {errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the disk quota is used up'}.get(error.errno)
        return full and f'{full}{f": {error.filename}" if error.filename else ""}; make room and go on with --resume auto'
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:  # the latter on a CPU
        return ('there is not enough memory for a step: lower --batch_size, and raise --accum_iter by the same factor, which '
                'keeps the effective batch')
    if 'DataLoader worker' in text and 'killed by signal' in text:
        return ('a loader worker was killed, most likely for want of memory: lower --num_workers or --batch_size'
                if 'Bus error' not in text else 'a loader worker found no room in shared memory: enlarge /dev/shm, or lower '
                '--num_workers or --batch_size')
    if not is_dist_avail_and_initialized():
        return None
    if any(words in text for words in ('onnection closed by peer', 'onnection reset by peer', 'roken pipe')):
        return 'another process of this run has ended; its message says why'
    if 'imed out' in text or 'imeout' in text:
        return (f'the processes of this run waited for each other in vain{missing_processes()}: look at them and their machines; '
                'how long they wait is set by --dist_timeout')
    return None
