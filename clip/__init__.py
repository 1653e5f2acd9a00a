from .clip import available_models, load, tokenize
from .model import CLIP, build_model

__all__ = ['CLIP', 'available_models', 'build_model', 'load', 'tokenize']
