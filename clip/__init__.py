"""CLIP under the names of OpenAI's package. It needs only util/, and can be copied with it."""

from .clip import available_models, load, tokenize
from .model import CLIP, build_model

__all__ = ['CLIP', 'available_models', 'build_model', 'load', 'tokenize']
