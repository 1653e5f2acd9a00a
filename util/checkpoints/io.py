"""Save checkpoints safely; load checkpoints of every known format."""

import os
from collections import Counter
from collections.abc import Iterable

import torch

from util.checkpoints import key_names, unpickle, verify
from util.distributed import is_main_process
from util.errors import UserError, as_user_error, refuse
from util.files import atomic_write
from util.pos_embed import interpolate_pos_embed


def save_on_master(
    obj: object, path: str | os.PathLike, links: Iterable[str | os.PathLike] = ()
) -> None:
    """Save ``obj`` with torch.save on rank 0.

    The file appears under its name only when it is complete and on the disk. ``load`` detects
    it if records are altered or exchanged later.

    Args:
        links: other names for the same file, which appear before ``path``.

    Raises:
        UserError: if the file cannot be written. Earlier files stay as they are.
    """
    if is_main_process():
        atomic_write(path, lambda f: verify.write_archive(obj, f), links)


def load(path: str | os.PathLike) -> object:
    """Return the content of a checkpoint file, tensors on the CPU. No code in it is run.

    Args:
        path: a .safetensors file, a file of torch.save, or a TorchScript archive, whose content
            is the module's state dict.

    Raises:
        UserError: if the file is missing, damaged, or altered since it was saved (see
            verify.py), or if it names classes that no known format has.
    """
    if not os.path.isfile(path):  # reading a pipe or a device would not end
        raise UserError(f'checkpoint {path} does not exist, or is not a file')
    # a damaged file can raise almost anything
    with as_user_error(
        f'checkpoint {path} cannot be read (damaged, or not a checkpoint)', Exception
    ):
        safe = str(path).endswith('.safetensors')
        return verify.load_safetensors(path) if safe else unpickle.read_torch_file(path)


def read_weights(path: str | os.PathLike) -> tuple[object, dict[str, torch.Tensor]]:
    """Return the content of a checkpoint file and the state dict in it, under timm's names.

    For the formats see ``load`` and key_names.py.

    Raises:
        UserError: as ``load``; or if there is no state dict in the file.
    """
    checkpoint = load(path)
    with as_user_error(f'checkpoint {path}', ValueError):
        state_dict = key_names.to_timm_names(checkpoint)
        verify.check_tensor_sizes(state_dict)
    return checkpoint, state_dict


def load_pretrained(
    model: torch.nn.Module,
    path: str | os.PathLike,
    *,
    model_name: str = '',
    whole_encoder: bool = False,
    eval_classes: int | None = None,
) -> None:
    """Load the weights of --finetune into a classifier: the encoder, and the head if it fits.

    Position embeddings for another grid are resized. A head for other classes is not used.
    Prints which tensors were loaded, which keep their random values, and which are unused.

    Args:
        model_name: --model, for error messages.
        whole_encoder: require all tensors of the encoder.
        eval_classes: with --eval, the number of classes; require all tensors of the classifier.

    Raises:
        UserError: if the file has no encoder, or lacks a required tensor, or a tensor has
            another shape.
    """
    context = f'--finetune {path}'
    state_dict, ours = read_weights(path)[1], model.state_dict()
    with as_user_error(
        f'{context}: its pos_embed cannot be resized',
        RuntimeError,
        IndexError,
        TypeError,
        ValueError,
    ):
        interpolate_pos_embed(model, state_dict)
    loaded = {
        name: value
        for name, value in state_dict.items()
        if name in ours and not (name.startswith('head') and value.shape != ours[name].shape)
    }
    missing = [name for name in ours if name not in loaded]
    gaps = [k for k in missing if k.startswith(('cls_token', 'pos_embed', 'patch_embed', 'blocks'))]
    different = difference({name: ours[name] for name in loaded}, loaded)
    refuse(
        (
            different,
            f'{context} does not fit --model {model_name}: {different}; give the model of its '
            'pretraining',
        ),
        (
            not any(name.startswith(('blocks', 'patch_embed')) for name in loaded),
            f'{context} has no tensors of the encoder; its names are '
            f'{", ".join(list(state_dict)[:3])}, ...',
        ),
        (
            whole_encoder and gaps,
            f'{context}: missing {_summary(gaps)}; the encoder must be complete',
        ),
        (
            eval_classes is not None and missing,
            f'{context}: missing {_summary(missing)} for {eval_classes} classes; --eval needs '
            'the checkpoint of a complete classifier, and its flags for pooling',
        ),
    )
    model.load_state_dict(loaded, strict=False)
    print(
        f'{path}: {len(loaded)} tensors loaded; not in the checkpoint (randomly initialized): '
        f'{_summary(missing)}; unused: {_summary(k for k in state_dict if k not in loaded)}'
    )


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Describe the first reason why ``theirs``, from a file, cannot replace ``ours``.

    Missing and extra names are reasons, and another shape, and integers for floats. Another
    precision is none.

    Returns:
        'NAME is ...', or '' if there is no reason.
    """
    for name in ours | theirs:
        if name not in theirs or name not in ours:
            return f'{name} is ' + ('not part of this model' if name in theirs else 'missing')
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return (
                f'{name} is {b.dtype} {list(b.shape)} in the file and '
                f'{a.dtype} {list(a.shape)} in the model'
            )
    return ''


# Count names by their first part: 'decoder_blocks (96), mask_token'.
def _summary(names):
    counts = Counter(name.partition('.')[0] for name in names)
    return ', '.join(part if n == 1 else f'{part} ({n})' for part, n in counts.items()) or 'none'
