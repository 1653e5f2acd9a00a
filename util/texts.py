"""Texts as features of the CLIP whose image tower is the teacher: for --text of tools/visualize.py and --vis_text."""

import torch
import torch.nn.functional as F

import clip
from util.errors import UserError, as_user_error


def text_tower(args):
    """Name or file of the CLIP whose image tower the teacher of the flags is; '' for teachers of another kind."""
    if args.use_clip_dino or args.use_clip_slip:
        return ''
    if args.teacher:
        return (args.teacher_path or args.teacher) if args.teacher in clip.available_models() else ''
    return args.clip_path


def check_texts(flag, texts, path):
    """UserError where the texts of ``flag`` have nothing in them, or no CLIP (``path``, see text_tower) to be read by."""
    if not path:
        raise UserError(f'{flag} compares texts with the tokens of a CLIP that has a text tower: give it by --clip_path, in '
                        'place of another teacher')
    if not all(text.strip() for text in texts):
        raise UserError(f'{flag}: one of the texts is empty')


def read_texts(flag, texts, path):
    """The texts of ``flag`` as the CLIP ``path`` encodes them.

    It is read from its file again, since a teacher keeps no text tower, and gone from memory afterwards.

    Returns:
        features [K, D] of length 1, and CLIP's scale of the logits, a float.

    Raises:
        UserError: see check_texts; a CLIP that cannot be read, or texts that are too long for it.
    """
    check_texts(flag, texts, path)
    with as_user_error(f'{flag} with the CLIP {path}', OSError, ValueError, RuntimeError), torch.no_grad():
        model, _ = clip.load(path, 'cpu')
        ids = clip.tokenize(texts, model.context_length)
        if ids.max() >= model.vocab_size:
            raise ValueError(f'its text tower knows {model.vocab_size} tokens, and the texts need others')
        return F.normalize(model.encode_text(ids), dim=-1), model.logit_scale.exp().item()
