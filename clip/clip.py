"""Load CLIP by name or from a file, and tokenize text. The names are those of OpenAI's package."""

import os
from functools import lru_cache
from operator import methodcaller

import torch
from torchvision import transforms

from util.checkpoints.io import read_weights
from util.download import download
from util.errors import UserError, first_line

from .model import CLIP, MEAN, STD, build_model
from .simple_tokenizer import SimpleTokenizer

_URL = 'https://openaipublic.azureedge.net/clip/models/{sha256}/{file}'
# name: (OpenAI's file, its SHA-256, other names that people give it in the working directory)
_MODELS = {
    'ViT-B/16': (
        'ViT-B-16.pt',
        '5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f',
        ['clip_vit_base_16.pth.tar'],
    ),
    'ViT-B/32': (
        'ViT-B-32.pt',
        '40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af',
        [],
    ),
    'ViT-L/14': (
        'ViT-L-14.pt',
        'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836',
        [],
    ),
    'ViT-L/14@336px': (
        'ViT-L-14-336px.pt',
        '3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02',
        [],
    ),
}


def available_models() -> list[str]:
    return list(_MODELS)


def load(
    name_or_path: str,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
) -> tuple[CLIP, transforms.Compose]:
    """Load a CLIP.

    A name is looked up in the working directory, then in the cache, and then downloaded into
    the cache.

    Args:
        name_or_path: one of available_models(), or a file: OpenAI's TorchScript archive or a
            state dict saved with torch.save.
        device: device of the model; None is CUDA if there is a GPU, else the CPU.
        jit: unsupported; kept for the signature of OpenAI's package.
        download_root: the cache; None is ~/.cache/clip, as in OpenAI's package.

    Returns:
        The model in eval mode and float32. OpenAI's package returns float16 on CUDA: use
        autocast.
        The torchvision transform from a PIL image to the input of encode_image.

    Raises:
        FileNotFoundError: if there is neither a file nor a model of that name.
        ValueError: if the file is not a ViT CLIP.
        OSError: if the download failed.
    """
    if jit:
        raise ValueError('jit=True is not supported: the model is plain PyTorch')
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    model = build_model(read_state_dict(find(name_or_path, download_root))).to(device)
    size = model.visual.input_resolution
    return model, transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            methodcaller('convert', 'RGB'),  # unlike a lambda, it can be pickled
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def find(name_or_path: str, download_root: str | None = None) -> str:
    """Return the file of a name or path, downloading it if necessary; see ``load``."""
    if os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in _MODELS:
        raise FileNotFoundError(
            f"{name_or_path} is neither a file nor one of CLIP's names: {', '.join(_MODELS)}"
        )
    file, sha256, local_names = _MODELS[name_or_path]
    for local in filter(os.path.isfile, (*local_names, file)):
        print(f'CLIP {name_or_path} from the working directory: {local}')
        return local
    path = os.path.join(download_root or os.path.expanduser('~/.cache/clip'), file)
    return download(_URL.format(sha256=sha256, file=file), path, sha256, limit=1 << 30)


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Return the state dict in an OpenAI archive or a torch.save file. No code in it is run.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return read_weights(path)[1]
    except UserError as e:
        raise ValueError(f'{path} cannot be read as a CLIP checkpoint: {first_line(e)}') from None


_tokenizer = lru_cache(SimpleTokenizer)


def tokenize(
    texts: str | list[str], context_length: int = 77, truncate: bool = False
) -> torch.Tensor:
    """Return the token ids of texts for encode_text: start, text, end, then zeros.

    Args:
        texts: a string or a list of strings.
        context_length: number of columns; 77 in every released CLIP.
        truncate: shorten texts that are too long, keeping the end token.

    Returns:
        int32 tensor [len(texts), context_length].

    Raises:
        RuntimeError: if a text is too long, as in OpenAI's package.
    """
    tokenizer, texts = _tokenizer(), [texts] if isinstance(texts, str) else texts
    start, end = tokenizer.encoder['<|startoftext|>'], tokenizer.encoder['<|endoftext|>']
    result = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(result, texts):
        ids = [start, *tokenizer.encode(text)]
        if len(ids) >= context_length and not truncate:
            raise RuntimeError(
                f'{len(ids) + 1} tokens do not fit a context of {context_length}: {text[:200]}'
            )
        ids = [*ids[: context_length - 1], end]
        row[: len(ids)] = torch.tensor(ids)
    return result
