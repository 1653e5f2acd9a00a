"""Released weights of MILAN and CLIP: where they are published, how to download and check them."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from filelock import FileLock

import clip.clip
import models_milan
import models_vit
from models_infer import build_on_meta
from util.checkpoints.io import difference, read_weights
from util.download import download
from util.errors import UserError, as_user_error

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


# Return the tensors of ``make(*sizes, **arguments)``, on the meta device.
def _tensors(make, *sizes, **arguments):
    return build_on_meta(partial(make, *sizes), **arguments).state_dict()


# the arguments of MILAN's pretraining models, whose teacher has 512 features
_MILAN = {'use_clip': True, 'change_decoder': True, 'target_dim': 512}
FILES = {
    'milan_vit_base': ReleasedFile(
        'MILAN ViT-B/16, pretrained, with its decoder',
        partial(_tensors, models_milan.mae_vit_base_patch16, **_MILAN),
        drive_id='18UYGG_1r5SJyAgj1ykOfoqECdVBoFLoz',
        top1='85.4 fine-tuned (paper)',
    ),
    'milan_vit_large': ReleasedFile(
        'MILAN ViT-L/16, pretrained, with its decoder',
        partial(_tensors, models_milan.mae_vit_large_patch16, **_MILAN),
        drive_id='1bODIriEMq6RgnTUyy4i4tfOr0DgzfVW3',
    ),
    'openmmlab_milan_vit_base': ReleasedFile(
        "OpenMMLab's MILAN ViT-B/16, pretrained encoder",
        partial(_tensors, models_vit.vit_base_patch16, num_classes=0),
        url=OPENMMLAB + 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k_20221129-180922e8.pth',
        top1='85.3 fine-tuned, 78.9 linear (OpenMMLab)',
    ),
    'openmmlab_milan_vit_base_finetuned': ReleasedFile(
        'the same, fine-tuned on ImageNet-1k',
        partial(_tensors, models_vit.vit_base_patch16, num_classes=1000, global_pool=True),
        url=OPENMMLAB + 'vit-base-p16_ft-8xb128-coslr-100e_in1k/'
        'vit-base-p16_ft-8xb128-coslr-100e_in1k-milan_20221129-74ac94fa.pth',
        top1='85.3 fine-tuned (OpenMMLab)',
    ),
    'clip_vit_b16': ReleasedFile(
        "CLIP ViT-B/16, MILAN's teacher",
        partial(_tensors, clip.CLIP, 512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
        clip_name='ViT-B/16',
    ),
    'clip_vit_b32': ReleasedFile(
        'CLIP ViT-B/32',
        partial(_tensors, clip.CLIP, 512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
        clip_name='ViT-B/32',
    ),
    'clip_vit_l14': ReleasedFile(
        'CLIP ViT-L/14',
        partial(_tensors, clip.CLIP, 768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
        clip_name='ViT-L/14',
    ),
    'clip_vit_l14_336': ReleasedFile(
        'CLIP ViT-L/14 for 336 pixels',
        partial(_tensors, clip.CLIP, 768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
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
    with as_user_error(name, OSError, UserError):
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
    expected, found = FILES[name].tensors(), read_weights(path)[1]
    # decoder_pred has one row per feature of the teacher, which may be any number
    wrong = difference(
        *(
            {
                key: x.new_empty(x.shape[1:]) if key.startswith('decoder_pred.') else x
                for key, x in tensors.items()
                if key in expected
            }
            for tensors in (expected, found)
        )
    )
    if wrong:
        raise UserError(f'{path} is another file: {wrong}')


# Check a downloaded file, and delete it if it is not FILES[name].
def _check_or_delete(name, path):
    try:
        check(name, path)
    except UserError as e:
        os.remove(path)
        raise UserError(f'the downloaded file is wrong and was deleted: {e}') from e


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
        f'Google Drive needs gdown: pip install gdown; or {by_hand}',
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
        raise UserError(
            f'download from Google Drive failed: {" ".join(str(e).split())}; run the command again '
            f'to resume, update gdown (pip install -U gdown), or {by_hand}'
        ) from e
    # when a download quota is exceeded, it sends a web page
    with as_user_error(f'Google Drive sent a web page or a wrong file; {by_hand}', UserError):
        _check_or_delete(name, unchecked)
    os.replace(unchecked, path)
