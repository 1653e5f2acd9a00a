"""The encoders for torch.hub, to be the backbone of other code:

    torch.hub.load('/path/to/this/repository', 'vit_base_patch16', source='local', checkpoint='OUT/checkpoint-399.pth')
"""

import argparse
import os
import sys

dependencies = ['torch', 'torchvision', 'timm', 'numpy', 'safetensors']

_ROOT = os.path.dirname(os.path.abspath(__file__))
for _name in ('models_vit', 'util'):  # torch.hub imports by these plain names, which other projects may use too
    _file = getattr(sys.modules.get(_name), '__file__', None)
    if _file and not os.path.abspath(_file).startswith(_ROOT + os.sep):
        raise ImportError(f'{_file} is already imported under the name {_name}, which {_ROOT} uses as well: load the model in '
                          'a process of its own, or take the weights to timm with tools/export.py')

from models_vit import MODELS as _MODELS  # noqa: E402


def _load(name, checkpoint, arguments):
    from util.checkpoint import load_pretrained
    from util.errors import UserError
    model = _MODELS[name](**arguments)
    if checkpoint and not os.path.isfile(checkpoint):
        from tools.download import FILES, fetch
        names = [name for name, file in FILES.items() if 'clip' not in file]
        if checkpoint not in names:
            raise UserError(f'checkpoint {checkpoint} is neither a file nor one of {", ".join(names)}')
        checkpoint = fetch(checkpoint, _downloads())
    if checkpoint:
        args = argparse.Namespace(finetune=checkpoint, model=name, eval=False)
        load_pretrained(args, model, whole_encoder=True)
    return model


def _downloads():
    from torch.hub import get_dir
    folder = os.path.join(get_dir(), 'checkpoints')
    os.makedirs(folder, exist_ok=True)
    return folder


def _entry(name):
    def build(checkpoint='', num_classes=0, **kwargs):
        return _load(name, checkpoint, {'num_classes': num_classes, **kwargs})
    build.__name__ = name
    build.__doc__ = f"""{name}: timm's VisionTransformer with the arguments and names of models_vit.py.

    Args:
        checkpoint: whatever --finetune takes, or a name of tools/download.py, which is then downloaded; '': random weights.
        num_classes: 0 for no classifier.
        kwargs: models_vit.VisionTransformer's and timm's: img_size, global_pool (False: the class token), drop_path_rate,
            dynamic_img_size (True: pictures of any shape whose sides are multiples of the patch's), ...

    Returns:
        the model, in training mode. Images [N, 3, H, W] with ImageNet's mean and deviation; forward_features gives all tokens
        [N, 1 + L, D] after the last norm, forward_intermediates and get_intermediate_layers those of chosen blocks, as maps
        [N, D, H / patch, W / patch] too; all three are timm's own.

    Raises:
        util.errors.UserError: the checkpoint is missing, damaged or another model's.
    """
    return build


globals().update({name: _entry(name) for name in _MODELS})
