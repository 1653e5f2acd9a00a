"""Names that forks of MAE import from util.misc. They are defined elsewhere."""

from util.amp import NativeScalerWithGradNormCount, get_grad_norm_
from util.checkpoints.checkpointer import load_model, save_model
from util.checkpoints.io import save_on_master
from util.distributed import (
    all_reduce_mean,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    setup_for_distributed,
)
from util.logs import MetricLogger, SmoothedValue

__all__ = [
    'MetricLogger',
    'NativeScalerWithGradNormCount',
    'SmoothedValue',
    'all_reduce_mean',
    'get_grad_norm_',
    'get_rank',
    'get_world_size',
    'init_distributed_mode',
    'is_dist_avail_and_initialized',
    'is_main_process',
    'load_model',
    'save_model',
    'save_on_master',
    'setup_for_distributed',
]
