"""CLIP's tokenizer: byte-pair encoding of cleaned, lower-cased text into 49,408 tokens."""

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

# contractions, words, single digits, runs of other signs
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def vocab_path():
    """Path of the merges file: the copy inside an installed open_clip, or a download kept in ~/.cache/clip."""
    package = importlib.util.find_spec('open_clip')
    if package is not None:
        path = os.path.join(package.submodule_search_locations[0], VOCAB_FILE)
        if os.path.isfile(path):
            return path
    return download(VOCAB_URL, os.path.join(os.path.expanduser('~/.cache/clip'), VOCAB_FILE), VOCAB_SHA256, limit=1 << 22)


def bytes_to_unicode():
    """A printable character for each of the 256 bytes, so that BPE can work on strings and never meets a space.

    The order matters: a byte's place here is its token id.
    """
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def _read_merges(path):
    try:
        with gzip.open(path) as f:
            lines = f.read(1 << 23).decode().split('\n')[1:NUM_MERGES + 1]  # the first line is a version note
        merges = [tuple(line.split()) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise ValueError(f'{path} cannot be read as the vocabulary of CLIP: {first_line(e)}') from e
    if len(merges) != NUM_MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(f'{path} is not the vocabulary of CLIP: {NUM_MERGES} pairs of tokens should be in it')
    return merges


class SimpleTokenizer:
    """encode(text) -> token ids without start and end; decode(ids) -> text. ValueError for a file that is no vocabulary."""

    def __init__(self, bpe_path=None):
        merges = _read_merges(bpe_path or vocab_path())
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {c: b for b, c in self.byte_encoder.items()}
        characters = list(self.byte_encoder.values())
        vocab = characters + [c + '</w>' for c in characters] + [''.join(m) for m in merges]
        vocab += ['<|startoftext|>', '<|endoftext|>']
        self.encoder = {token: i for i, token in enumerate(vocab)}
        self.decoder = vocab
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.bpe = lru_cache(maxsize=65536)(self._bpe)

    def _bpe(self, piece):
        """Merge the piece's characters, the earliest-learned pair first, until no known pair is left."""
        if piece in ('<|startoftext|>', '<|endoftext|>'):
            return [piece]
        word = [*piece[:-1], piece[-1] + '</w>']
        while len(word) > 1:
            pair = min(zip(word, word[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(word):
                step = 2 if tuple(word[i:i + 2]) == pair else 1
                merged.append(''.join(word[i:i + step]))
                i += step
            word = merged
        return word

    def encode(self, text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = ' '.join(text.split()).lower()
        ids = []
        for piece in _PIECES.findall(text):
            piece = ''.join(self.byte_encoder[b] for b in piece.encode('utf-8'))
            ids.extend(self.encoder[token] for token in self.bpe(piece))
        return ids

    def decode(self, ids):
        text = ''.join(self.decoder[i] for i in ids)
        return bytes(self.byte_decoder[c] for c in text).decode('utf-8', 'replace').replace('</w>', ' ')
