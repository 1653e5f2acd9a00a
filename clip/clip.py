"""Loading CLIP by name or from a file, and tokenizing text, under the names of OpenAI's package."""

import os
from functools import lru_cache

import torch
from torchvision import transforms

from util.checkpoint import read_weights
from util.download import download
from util.errors import UserError, first_line
from util.torchscript import is_torchscript, read_torchscript

from .model import MEAN, STD, build_model
from .simple_tokenizer import SimpleTokenizer

_URL = 'https://openaipublic.azureedge.net/clip/models/{sha256}/{file}'
# name: (file name of OpenAI's download, its SHA-256, other names under which people keep it in the working directory)
_MODELS = {
    'ViT-B/16': ('ViT-B-16.pt', '5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f',
                 ['clip_vit_base_16.pth.tar']),
    'ViT-B/32': ('ViT-B-32.pt', '40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af', []),
    'ViT-L/14': ('ViT-L-14.pt', 'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836', []),
    'ViT-L/14@336px': ('ViT-L-14-336px.pt', '3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02', []),
}


def available_models():
    """Names that ``load`` knows and downloads."""
    return list(_MODELS)


def load(name_or_path, device=None, jit=False, download_root=None):
    """A CLIP from a file or by name.

    A name is looked for in the working directory first, then in the cache, ~/.cache/clip as in OpenAI's package, and
    downloaded into the latter if it is in neither.

    Args:
        name_or_path: one of available_models(), or a file: OpenAI's TorchScript archive or a state dict saved by torch.save.
        device: where the model goes; None: CUDA where there is one, else the CPU.
        jit: must be False; it stands here because OpenAI's package has it.
        download_root: the cache.

    Returns:
        (model, preprocess): the model in eval mode and float32 (OpenAI's package gives float16 on CUDA: use autocast), and the
        torchvision transform from a PIL image to what its encode_image takes.

    Raises:
        FileNotFoundError: neither a file nor a known name. ValueError: a file that is not a ViT CLIP.
        OSError: the download failed.
    """
    if jit:
        raise ValueError('jit=True is not supported: the model is plain PyTorch')
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    path = find(name_or_path, download_root)
    model = build_model(read_state_dict(path)).to(device)
    return model, _transform(model.visual.input_resolution)


def find(name_or_path, download_root=None):
    """The file for a name or path, downloaded if need be; see load."""
    if os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in _MODELS:
        names = ', '.join(available_models())
        raise FileNotFoundError(f'{name_or_path} is neither a file nor one of CLIP\'s names: {names}')
    file, sha256, local_names = _MODELS[name_or_path]
    for local in (*local_names, file):
        if os.path.isfile(local):
            print(f'CLIP {name_or_path} from the working directory: {local}')
            return local
    root = download_root or os.path.expanduser('~/.cache/clip')
    return download(_URL.format(sha256=sha256, file=file), os.path.join(root, file), sha256, limit=1 << 30)


def read_state_dict(path):
    """The state dict in an OpenAI archive or a torch.save file; nothing in it is run."""
    try:
        return read_torchscript(path) if is_torchscript(path) else read_weights(path)[1]
    except (UserError, ValueError, OSError) as e:
        raise ValueError(f'{path} cannot be read as a CLIP checkpoint: {first_line(e)}') from None


def _transform(size):
    return transforms.Compose([
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.Lambda(_to_rgb),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD)])


def _to_rgb(image):
    return image.convert('RGB')


@lru_cache(maxsize=1)
def _tokenizer():
    return SimpleTokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """Token ids as encode_text takes them: start, text, end, then zeros.

    Args:
        texts: a string or a list of them.
        context_length: columns; 77 in every released CLIP.
        truncate: cut longer texts (the end token stays) instead of raising.

    Returns:
        int32 tensor [len(texts), context_length].

    Raises:
        RuntimeError: a text that is too long, as in OpenAI's package.
    """
    tokenizer = _tokenizer()
    texts = [texts] if isinstance(texts, str) else texts
    start, end = tokenizer.encoder['<|startoftext|>'], tokenizer.encoder['<|endoftext|>']
    result = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(result, texts):
        ids = [start, *tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise RuntimeError(f'{len(ids)} tokens are too many for a context of {context_length}: {text[:200]}')
            ids = [*ids[:context_length - 1], end]
        row[:len(ids)] = torch.tensor(ids)
    return result
