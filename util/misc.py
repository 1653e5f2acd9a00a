"""Precision, loss scaling, and how a script ends; with the names that MAE's util/misc.py is imported for."""

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
    no_sync,
    setup_for_distributed,
)
from util.errors import UserError
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
    """Backward pass and optimiser step, with loss scaling where the precision is fp16 and without elsewhere."""

    state_dict_key = 'amp_scaler'

    def __init__(self, enabled=True, device='cuda'):
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=enabled)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        """Backward; with ``update_grad`` also clip to ``clip_grad`` and step, and return the gradients' norm before clipping.

        ``parameters``: those to clip and to take the norm of; None: no norm is computed and None returned.
        """
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self._scaler.unscale_(optimizer)
        norm = None
        if clip_grad is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        elif parameters is not None:
            norm = get_grad_norm_(parameters)
        self._scaler.step(optimizer)
        self._scaler.update()
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
    """``main(args)`` of a script; a UserError ends it with its one line on stderr and status 1."""
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # closed by whoever started this
    try:
        main(args)
    except BrokenPipeError:
        os._exit(1)  # whoever read the output has gone; a normal exit would try to write the rest
    except UserError as e:
        # Local rank 0 has the first word: what is wrong for all processes is then said once, since the launcher ends the others.
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.write(f'error: {e}\n')
        sys.stderr.flush()
        if is_dist_avail_and_initialized():
            os._exit(1)  # an orderly shutdown would wait for processes that may be stuck in a collective
        sys.exit(1)
    except RuntimeError as e:
        if not (is_dist_avail_and_initialized() and 'onnection closed by peer' in str(e)):
            raise
        sys.stderr.write('error: another process of this run has ended; its message says why\n')
        os._exit(1)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    if is_dist_avail_and_initialized():
        dist.barrier()  # none leaves before the first process has written its files, nor with a collective half torn down
        dist.destroy_process_group()
