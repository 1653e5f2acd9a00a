"""Fetches released weights by name: goes on after a broken connection, and checks what came before anyone trains on it.

    python tools/download.py --list
    python tools/download.py milan_vit_base clip_vit_b16 --output_dir weights
"""

import glob
import os
import sys
import tempfile
from functools import partial
from urllib.parse import urlparse

import torch
from filelock import FileLock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds only its own folder

import clip.clip  # noqa: E402
from models_milan import mae_vit_base_patch16, mae_vit_large_patch16  # noqa: E402
from util.arguments import Parser  # noqa: E402
from util.checkpoint import read_weights  # noqa: E402
from util.download import download  # noqa: E402
from util.errors import UserError, as_user_error  # noqa: E402
from util.misc import run  # noqa: E402

DRIVE = 'https://drive.google.com/uc?id={id}'
OPENMMLAB = 'https://download.openmmlab.com/mmselfsup/1.x/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k/'


# ---- what there is ----

def milan(make):
    """Tensors of a MILAN pretraining model with a teacher 512 wide, by name, on the meta device: shapes that take no memory."""
    with torch.device('meta'):
        return make(use_clip=True, change_decoder=True, target_dim=512).state_dict()


def encoder(make):
    """Those of its encoder."""
    return {name: value for name, value in milan(make).items() if not name.startswith(('decoder_', 'mask_token'))}


def classifier(make):
    """Those of that encoder under a head for ImageNet's 1000 classes, which pools the patch tokens: norm becomes fc_norm.

    Spelled out here and not asked of models_vit.py, because not every release of timm can build its ViT on the meta device.
    """
    tensors = {f'fc_{name}' if name.startswith('norm.') else name: value for name, value in encoder(make).items()}
    weight = torch.empty(1000, tensors['cls_token'].shape[-1], device='meta')
    return {**tensors, 'head.weight': weight, 'head.bias': weight[:, 0]}


def clip_vit(*sizes):
    """Those of a CLIP; sizes: the arguments of clip.CLIP."""
    with torch.device('meta'):
        return clip.CLIP(*sizes).state_dict()


# Where a file is, one of these says: drive, Google Drive's id of it; url; clip, a name that clip.load knows.
FILES = {
    'milan_vit_base': dict(what='MILAN ViT-B/16, pretrained, with its decoder', drive='18UYGG_1r5SJyAgj1ykOfoqECdVBoFLoz',
                           tensors=partial(milan, mae_vit_base_patch16), top1='85.4 fine-tuned (paper)'),
    'milan_vit_large': dict(what='MILAN ViT-L/16, pretrained, with its decoder', drive='1bODIriEMq6RgnTUyy4i4tfOr0DgzfVW3',
                            tensors=partial(milan, mae_vit_large_patch16)),
    'openmmlab_milan_vit_base': dict(
        what="OpenMMLab's MILAN ViT-B/16, pretrained encoder",
        url=OPENMMLAB + 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k_20221129-180922e8.pth',
        tensors=partial(encoder, mae_vit_base_patch16), top1='85.3 fine-tuned, 78.9 linear (OpenMMLab)'),
    'openmmlab_milan_vit_base_finetuned': dict(
        what='the same, fine-tuned on ImageNet-1k',
        url=OPENMMLAB + 'vit-base-p16_ft-8xb128-coslr-100e_in1k/'
                        'vit-base-p16_ft-8xb128-coslr-100e_in1k-milan_20221129-74ac94fa.pth',
        tensors=partial(classifier, mae_vit_base_patch16), top1='85.3 fine-tuned (OpenMMLab)'),
    'clip_vit_b16': dict(what="CLIP ViT-B/16, MILAN's teacher", clip='ViT-B/16',
                         tensors=partial(clip_vit, 512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)),
    'clip_vit_b32': dict(what='CLIP ViT-B/32', clip='ViT-B/32',
                         tensors=partial(clip_vit, 512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)),
    'clip_vit_l14': dict(what='CLIP ViT-L/14', clip='ViT-L/14',
                         tensors=partial(clip_vit, 768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)),
    'clip_vit_l14_336': dict(what='CLIP ViT-L/14 for 336 pixels', clip='ViT-L/14@336px',
                             tensors=partial(clip_vit, 768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12)),
}


def print_table():
    rows = [('name', 'what it is', 'parameters', 'as float32', 'source', 'published top-1, %')]
    for name, file in FILES.items():
        millions = sum(value.numel() for value in file['tensors']().values()) / 1e6
        host = urlparse(file.get('url') or (DRIVE if 'drive' in file else clip.clip._URL)).hostname
        rows.append((name, file['what'], f'{millions:.1f} M', f'{4 * millions:,.0f} MB', host, file.get('top1', '-')))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(width) if i in (2, 3) else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print('  '.join(cells).rstrip())
    print('\nSizes are those of the weights named; the files may hold more, an optimiser say, or hold them as float16.')


# ---- getting it ----

def fetch(name, folder=None):
    """The path of FILES[name], fetched into ``folder`` unless it is there already, and checked.

    folder: None stands for the working directory, and for CLIP for the cache in which clip.load looks. Raises UserError.
    """
    file = FILES[name]
    with as_user_error(name, OSError):
        if 'clip' in file:
            # What find downloads has passed a whole SHA-256, and what it finds in the working directory is the user's own: if
            # this does not pass the check, it is not ours to delete.
            path = clip.clip.find(file['clip'], folder)
            check(name, path)
        elif 'url' in file:
            path = os.path.join(folder or '.', os.path.basename(file['url']))
            # With them, at most, an optimiser's two moments and a running mean: four float32 a parameter.
            limit = 20 * sum(value.numel() for value in file['tensors']().values())
            # OpenMMLab ends the names of its files with the first 8 hex digits of their SHA-256.
            download(file['url'], path, sha256=path.removesuffix('.pth')[-8:], limit=limit)
            check_or_delete(name, path)
        else:
            path = os.path.join(folder or '.', f'{name}.pth')
            with FileLock(f'{path}.lock'):
                from_drive(name, path)
    return path


def from_drive(name, path):
    """Google Drive's FILES[name] at ``path``: under another name until it is whole and has passed the check."""
    if os.path.isfile(path):
        try:
            return check(name, path)
        except UserError as e:
            print(f'{e}; it is downloaded again')
    unchecked = f'{path}.unchecked'
    gdown_to(unchecked, name, path)
    check_or_delete(name, unchecked)
    os.replace(unchecked, path)


def gdown_to(unchecked, name, path):
    """Let gdown bring the file, from where an earlier call left off."""
    url = DRIVE.format(id=FILES[name]['drive'])
    by_hand = f'open {url} in a browser and save the file as {path}'
    try:
        import gdown  # two files of the whole repository need it, so it is not a requirement
    except ImportError as e:
        raise UserError(f'{name} is on Google Drive, for which gdown is needed: pip install gdown; or {by_hand}') from e
    parts = glob.glob(f'{glob.escape(unchecked)}*.part')
    try:
        gdown.download(url=url, output=unchecked, resume=True, retries=5, timeout=30)
    except TypeError as e:
        raise UserError(f'{name}: this gdown is too old ({e}): pip install -U gdown; or {by_hand}') from e
    except Exception as e:  # gdown's own kinds, and those of the libraries below it
        if parts and 'byte range' in str(e):  # the server has not taken up what was left, and never will
            for part in parts:
                os.remove(part)
            return gdown_to(unchecked, name, path)
        reason = ' '.join(str(e).split()).removeprefix('Failed to retrieve file url: ').partition(' You may still')[0]
        raise UserError(f'{name}: Google Drive did not give it: {reason}; run the command again to go on, or {by_hand}') from e
    with open(unchecked, 'rb') as f:
        is_page = f.read(512).lstrip().startswith(b'<')
    if is_page:
        os.remove(unchecked)
        raise UserError(f'{name}: Google Drive sent a web page in its place (its quota of downloads may be spent); {by_hand}')


# ---- checking it ----

def check(name, path):
    """UserError unless the file at ``path`` has every tensor that FILES[name] tells of, in the right shape."""
    if 'clip' in FILES[name]:
        with as_user_error(f'{path} is not {name}', ValueError):
            found = clip.clip.read_state_dict(path)
    else:
        found = read_weights(path)[1]
    for key, value in FILES[name]['tensors']().items():
        if key not in found:
            raise UserError(f'{path} is not {name}: it has no {key}')
        given, due = list(found[key].shape), list(value.shape)
        if key.startswith('decoder_pred.'):  # its rows are the teacher's channels: as many as the teacher has
            given, due = given[1:], due[1:]
        if given != due:
            raise UserError(f'{path} is not {name}: {key} is {given} in it and should be {due}')


def check_or_delete(name, path):
    """``check``; what does not pass it is not left for anyone to mistake for ``name``."""
    try:
        check(name, path)
    except UserError as e:
        os.remove(path)
        raise UserError(f'what came for {name} is something else, and was deleted: {e}') from e


# ---- the command ----

def get_args_parser():
    parser = Parser('tools/download.py', description='Fetch released weights', allow_abbrev=False)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(FILES))
    parser.add_argument('--output_dir', metavar='DIR', help='default: the working directory, and for CLIP ~/.cache/clip, where '
                        'main_pretrain.py --clip_path finds it by name')
    parser.add_argument('--list', action='store_true', help='say what there is: size, source, published accuracy')
    return parser


def main(args):
    if args.list:
        return print_table()
    wrong = next((f'there is no {name} to download' for name in args.names if name not in FILES), '')
    if wrong or not args.names:
        raise UserError(f'{wrong or "give a name"}: choose from {", ".join(FILES)} (--list says more)')
    if args.output_dir:
        with as_user_error(f'--output_dir {args.output_dir} cannot be written to', OSError):
            os.makedirs(args.output_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.output_dir):
                pass
    for name in dict.fromkeys(args.names):
        path = fetch(name, args.output_dir)
        print(f'{name} is there and right: {"--clip_path" if "clip" in FILES[name] else "--finetune"} {path}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
