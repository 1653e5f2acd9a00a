"""Released weights of MILAN and CLIP: where they are published, how to download and check them."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from filelock import FileLock

import clip.clip
from models_milan import mae_vit_base_patch16, mae_vit_large_patch16
from util.checkpoints.io import read_weights
from util.download import download
from util.errors import UserError, as_user_error, refuse

DRIVE = 'https://drive.google.com/uc?id={id}'
OPENMMLAB = (
    'https://download.openmmlab.com/mmselfsup/1.x/milan/'
    'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k/'
)


@dataclass(frozen=True)
class ReleasedFile:
    """A published checkpoint. Exactly one of ``url``, ``drive_id`` and ``clip_name`` is set.

    Attributes:
        description: the content in words.
        tensors: returns the tensors that the file must hold, by name, on the meta
            device: shapes that take no memory.
        url: address of the file.
        drive_id: id of the file on Google Drive.
        clip_name: name of the model in ``clip.available_models()``.
        top1: published top-1 accuracy on ImageNet-1k in percent, with its source.
    """

    description: str
    tensors: Callable[[], dict[str, torch.Tensor]]
    url: str = ''
    drive_id: str = ''
    clip_name: str = ''
    top1: str = '-'


# The tensors of a MILAN pretraining model whose teacher has 512 features.
def _milan(make):
    with torch.device('meta'):
        return make(use_clip=True, change_decoder=True, target_dim=512).state_dict()


# The tensors of its encoder.
def _encoder(make):
    return {k: v for k, v in _milan(make).items() if not k.startswith(('decoder_', 'mask_token'))}


# The tensors of that encoder with a head for the 1000 classes of ImageNet. The head pools the
# patch tokens, so norm becomes fc_norm. models_vit.py is not used here because not every release
# of timm can build its ViT on the meta device.
def _classifier(make):
    tensors = _encoder(make)
    tensors |= {f'fc_{k}': tensors.pop(k) for k in ('norm.weight', 'norm.bias')}
    weight = torch.empty(1000, tensors['cls_token'].shape[-1], device='meta')
    return {**tensors, 'head.weight': weight, 'head.bias': weight[:, 0]}


# The tensors of a CLIP; sizes: the arguments of clip.CLIP.
def _clip(*sizes):
    with torch.device('meta'):
        return clip.CLIP(*sizes).state_dict()


FILES = {
    'milan_vit_base': ReleasedFile(
        'MILAN ViT-B/16, pretrained, with its decoder',
        partial(_milan, mae_vit_base_patch16),
        drive_id='18UYGG_1r5SJyAgj1ykOfoqECdVBoFLoz',
        top1='85.4 fine-tuned (paper)',
    ),
    'milan_vit_large': ReleasedFile(
        'MILAN ViT-L/16, pretrained, with its decoder',
        partial(_milan, mae_vit_large_patch16),
        drive_id='1bODIriEMq6RgnTUyy4i4tfOr0DgzfVW3',
    ),
    'openmmlab_milan_vit_base': ReleasedFile(
        "OpenMMLab's MILAN ViT-B/16, pretrained encoder",
        partial(_encoder, mae_vit_base_patch16),
        url=OPENMMLAB + 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k_20221129-180922e8.pth',
        top1='85.3 fine-tuned, 78.9 linear (OpenMMLab)',
    ),
    'openmmlab_milan_vit_base_finetuned': ReleasedFile(
        'the same, fine-tuned on ImageNet-1k',
        partial(_classifier, mae_vit_base_patch16),
        url=OPENMMLAB + 'vit-base-p16_ft-8xb128-coslr-100e_in1k/'
        'vit-base-p16_ft-8xb128-coslr-100e_in1k-milan_20221129-74ac94fa.pth',
        top1='85.3 fine-tuned (OpenMMLab)',
    ),
    'clip_vit_b16': ReleasedFile(
        "CLIP ViT-B/16, MILAN's teacher",
        partial(_clip, 512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
        clip_name='ViT-B/16',
    ),
    'clip_vit_b32': ReleasedFile(
        'CLIP ViT-B/32',
        partial(_clip, 512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
        clip_name='ViT-B/32',
    ),
    'clip_vit_l14': ReleasedFile(
        'CLIP ViT-L/14',
        partial(_clip, 768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
        clip_name='ViT-L/14',
    ),
    'clip_vit_l14_336': ReleasedFile(
        'CLIP ViT-L/14 for 336 pixels',
        partial(_clip, 768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
        clip_name='ViT-L/14@336px',
    ),
}


def fetch(name: str, folder: str | None = None) -> str:
    """Return the path of FILES[name], after downloading it unless it is there, and checking it.

    Args:
        name: a key of FILES.
        folder: where to put the file. None: the working directory, and for CLIP the
            cache in which clip.load looks.

    Raises:
        UserError: if the download fails, or the file is not FILES[name].
    """
    file = FILES[name]
    path = os.path.join(folder or '.', os.path.basename(file.url) or f'{name}.pth')
    with as_user_error(name, OSError):
        if file.clip_name:
            # find() verifies the SHA-256 of a download. A file that it finds in the
            # working directory belongs to the user: it is checked but never deleted.
            path = clip.clip.find(file.clip_name, folder)
            check(name, path)
        elif file.url:
            download(
                file.url,
                path,
                # OpenMMLab's file names end with the first 8 hex digits of the SHA-256.
                sha256=path.removesuffix('.pth')[-8:],
                # The weights, two moments of an optimizer and a running mean: at most four
                # float32 tensors per parameter (16 bytes), and a margin.
                limit=20 * sum(tensor.numel() for tensor in file.tensors().values()),
            )
            _check_or_delete(name, path)
        else:
            with FileLock(f'{path}.lock'):
                _fetch_from_drive(name, path)
    return path


def check(name: str, path: str) -> None:
    """Check that a file has every tensor of FILES[name] in the right shape.

    Raises:
        UserError: if the file cannot be read, or a tensor is missing or has another shape.
    """
    file = FILES[name]
    if file.clip_name:
        with as_user_error(f'{path} does not match {name}', ValueError):
            found = clip.clip.read_state_dict(path)
    else:
        found = read_weights(path)[1]
    for key, tensor in file.tensors().items():
        refuse((key not in found, f'{path} does not match {name}: missing {key}'))
        # decoder_pred has one row per feature of the teacher, which may be any number.
        skip = 1 if key.startswith('decoder_pred.') else 0
        shape, expected = list(found[key].shape[skip:]), list(tensor.shape[skip:])
        refuse(
            (
                shape != expected,
                f'{path} does not match {name}: {key} has shape {shape}, expected {expected}',
            )
        )


# Check a downloaded file, and delete it if it is not FILES[name].
def _check_or_delete(name, path):
    try:
        check(name, path)
    except UserError as e:
        os.remove(path)
        raise UserError(f'the file downloaded for {name} is wrong and was deleted: {e}') from e


# Download FILES[name] from Google Drive with gdown, which resumes an earlier attempt, unless
# ``path`` passes the check already. The file gets its name ``path`` only once it is complete and
# checked.
def _fetch_from_drive(name, path):
    if os.path.isfile(path):
        try:
            return check(name, path)
        except UserError as e:
            print(f'{e}; downloading it again')
    url, unchecked = DRIVE.format(id=FILES[name].drive_id), f'{path}.unchecked'
    by_hand = f'open {url} in a browser and save the file as {path}'
    with as_user_error(
        f'{name} is on Google Drive, which needs gdown: pip install gdown; or {by_hand}',
        ImportError,
    ):
        import gdown  # only the two files on Google Drive need it, so it is not a requirement
    parts = glob.glob(f'{glob.escape(unchecked)}*.part')
    try:
        gdown.download(url=url, output=unchecked, resume=True, retries=5, timeout=30)
    except Exception as e:  # gdown's own types, those of requests, TypeError from old releases
        if parts and 'byte range' in str(e):
            # The server cannot continue the partial file, and never will: start again.
            for part in parts:
                os.remove(part)
            return _fetch_from_drive(name, path)
        reason = ' '.join(str(e).split()).partition(' You may still')[0]
        raise UserError(
            f'{name}: download from Google Drive failed: {reason}; run the command again to '
            f'resume, update gdown (pip install -U gdown), or {by_hand}'
        ) from e
    with open(unchecked, 'rb') as f:
        is_page = f.read(512).lstrip().startswith(b'<')
    if is_page:
        os.remove(unchecked)
        raise UserError(
            f'{name}: Google Drive sent a web page instead of the file (its download quota '
            f'may be exceeded); {by_hand}'
        )
    _check_or_delete(name, unchecked)
    os.replace(unchecked, path)
