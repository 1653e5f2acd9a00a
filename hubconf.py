"""Encoders for torch.hub, as backbones of other code.

torch.hub.load('/path/to/this/repository', 'vit_base_patch16', source='local',
               checkpoint='OUT/checkpoint-399.pth')
"""

import os
import sys

import torch

dependencies = ['torch', 'torchvision', 'timm', 'numpy', 'safetensors']

# torch.hub imports our modules by these common names. If the caller has already imported
# other modules under these names, Python would use those.
for _name in ('models_vit', 'util'):
    _file = getattr(sys.modules.get(_name), '__file__', None)
    if _file and not os.path.realpath(_file).startswith(
        os.path.dirname(os.path.realpath(__file__)) + os.sep
    ):
        raise ImportError(
            f'{_file} is already imported as {_name}, a name that {__file__} needs: load the '
            'model in a separate process, or convert the weights with python -m tools.export'
        )

from models_vit import MODELS as _MODELS  # noqa: E402
from util.checkpoints.io import load_pretrained as _load_pretrained  # noqa: E402
from util.errors import UserError as _UserError  # noqa: E402


# Return the path of a checkpoint, after downloading it if it is a released one.
def _find(checkpoint):
    if os.path.isfile(checkpoint):
        return checkpoint
    from models_released import FILES, fetch  # needs packages that other checkpoints do not

    names = [name for name, file in FILES.items() if not file.clip_name]
    if checkpoint not in names:
        raise _UserError(f'checkpoint {checkpoint}: not a file and not one of {", ".join(names)}')
    return fetch(checkpoint, os.path.join(torch.hub.get_dir(), 'checkpoints'))


def _entry(name):
    def build(checkpoint: str = '', num_classes: int = 0, **kwargs) -> torch.nn.Module:
        model = _MODELS[name](num_classes=num_classes, **kwargs)
        if checkpoint:
            _load_pretrained(model, _find(checkpoint), model_name=name, whole_encoder=True)
        return model

    build.__name__, build.__doc__ = (
        name,
        f"""Build {name}: timm's VisionTransformer as in models_vit.py.

    Args:
        checkpoint: any checkpoint that --finetune reads, or the name of a released one
            (models_released.py), which is downloaded. '': random weights.
        num_classes: size of the classification head; 0: no head.
        kwargs: arguments of models_vit.VisionTransformer and timm's, such as img_size,
            global_pool (False: the class token), drop_path_rate, dynamic_img_size (True:
            images of any shape whose sides are multiples of the patch size).

    Returns:
        The model in training mode. Images are [N, 3, H, W], normalized with the ImageNet
        mean and std. As in timm, forward_features returns all tokens [N, 1 + L, D] after
        the last norm. forward_intermediates and get_intermediate_layers return those of
        selected blocks, also as maps [N, D, H / patch_size, W / patch_size].

    Raises:
        util.errors.UserError: if the checkpoint is missing, damaged or another model's.
    """,
    )
    return build


# torch.hub offers the functions that are attributes of this module.
vit_tiny_patch8 = _entry('vit_tiny_patch8')
vit_small_patch16 = _entry('vit_small_patch16')
vit_base_patch16 = _entry('vit_base_patch16')
vit_large_patch16 = _entry('vit_large_patch16')
vit_large_patch14 = _entry('vit_large_patch14')
vit_huge_patch14 = _entry('vit_huge_patch14')
