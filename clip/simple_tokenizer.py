"""CLIP's tokenizer: byte-pair encoding (BPE) of cleaned, lower-cased text, 49,408 tokens."""

import gzip
import html
import importlib.util
import os
import zlib
from functools import lru_cache

import ftfy
import regex

from util.download import download
from util.errors import first_line

VOCAB_FILE = 'bpe_simple_vocab_16e6.txt.gz'
VOCAB_URL = f'https://raw.githubusercontent.com/openai/CLIP/main/clip/{VOCAB_FILE}'
VOCAB_SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
NUM_MERGES = 49152 - 256 - 2

_SPECIAL = ['<|startoftext|>', '<|endoftext|>']
# contractions, words, single digits, sequences of other characters
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def vocab_path() -> str:
    """Return the path of the merges file: open_clip's if installed, else a cached download."""
    package = importlib.util.find_spec('open_clip')
    for folder in package.submodule_search_locations if package else ():
        if os.path.isfile(os.path.join(folder, VOCAB_FILE)):
            return os.path.join(folder, VOCAB_FILE)
    path = os.path.expanduser(f'~/.cache/clip/{VOCAB_FILE}')
    return download(VOCAB_URL, path, VOCAB_SHA256, limit=1 << 22)


def bytes_to_unicode() -> dict[int, str]:
    """Map each of the 256 bytes to a printable character that is not a space.

    BPE can then work on strings. The order matters: the position of a byte is its token id.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


# Pairs of tokens to merge -> their rank.
def _read_merges(path):
    try:
        with gzip.open(path) as f:  # 8 MB are more than the vocabulary has
            lines = f.read(1 << 23).decode().split('\n')[1 : NUM_MERGES + 1]  # after the version
        return {
            (a, b): i for i, (a, b) in zip(range(NUM_MERGES), map(str.split, lines), strict=True)
        }
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise ValueError(f'{path} is not the vocabulary of CLIP: {first_line(e)}') from e


class SimpleTokenizer:
    """Tokenizer between text and token ids, without start and end tokens.

    Args:
        bpe_path: the merges file; None is that of vocab_path().

    Raises:
        ValueError: if it is not CLIP's vocabulary.
    """

    def __init__(self, bpe_path: str | None = None) -> None:
        self.rank = _read_merges(bpe_path or vocab_path())
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {c: b for b, c in self.byte_encoder.items()}
        words = [f'{c}</w>' for c in self.byte_decoder]
        self.decoder = [*self.byte_decoder, *words, *map(''.join, self.rank), *_SPECIAL]
        self.encoder = {token: i for i, token in enumerate(self.decoder)}
        self.bpe = lru_cache(maxsize=65536)(self._bpe)

    # merge the characters of a piece, the pair learned first before others, until none is known
    def _bpe(self, piece):
        if piece in _SPECIAL:
            return [piece]
        tokens = [*piece[:-1], piece[-1] + '</w>']
        while known := self.rank.keys() & set(zip(tokens, tokens[1:])):
            a, b = min(known, key=self.rank.get)
            spaced = ''.join(f' {token} ' for token in tokens)  # no token has a space
            tokens = spaced.replace(f' {a}  {b} ', f' {a}{b} ').split()
        return tokens

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        pieces = _PIECES.findall(' '.join(text.split()).lower())
        pieces = [''.join(map(self.byte_encoder.get, piece.encode())) for piece in pieces]
        return [self.encoder[token] for piece in pieces for token in self.bpe(piece)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, with a space after every word."""
        characters = ''.join(self.decoder[i] for i in ids)
        content = bytes(map(self.byte_decoder.get, characters))
        return content.decode('utf-8', 'replace').replace('</w>', ' ')
