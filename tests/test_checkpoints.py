"""Checkpoints of every format: built here by key and shape, loaded by --finetune, and equal in what they compute."""

import argparse
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import finetune
from deterministic import images, load_deterministic

import models_milan
import models_vit
from util import formats
from util.checkpoint import load, load_pretrained, read_weights
from util.errors import UserError

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
IMAGES = torch.from_numpy(images('checkpoints', 3, 32)).float()


def classifier(**kwargs):
    return load_deterministic(models_vit.VisionTransformer(num_classes=10, **TINY, **kwargs), skip=()).eval()


def openmmlab_names(state_dict):
    """OpenMMLab's names, written down from its files (SPEC section 5) and not from the code under test."""
    renamed = OrderedDict()
    for name, value in state_dict.items():
        for ours, theirs in (('patch_embed.proj.', 'patch_embed.projection.'), ('.norm1.', '.ln1.'), ('.norm2.', '.ln2.'),
                             ('.mlp.fc1.', '.ffn.layers.0.0.'), ('.mlp.fc2.', '.ffn.layers.1.'), ('blocks.', 'layers.')):
            name = name.replace(ours, theirs)
        if name.startswith(('norm.', 'fc_norm.')):
            name = {'norm': 'ln1', 'fc_norm': 'ln2'}[name.split('.')[0]] + '.' + name.split('.')[1]
        renamed[name.replace('head.', 'head.fc.') if name.startswith('head.') else f'backbone.{name}'] = value
    return renamed


def openmmlab_checkpoint(state_dict):
    """As mmengine's runner saves it, with a log of its own class."""
    module = types.ModuleType('mmengine.logging.history_buffer')
    buffer = type('HistoryBuffer', (), {'__module__': module.__name__})
    module.HistoryBuffer = buffer
    modules = {'mmengine': types.ModuleType('mmengine'), 'mmengine.logging': types.ModuleType('mmengine.logging'),
               module.__name__: module}
    logged = buffer()
    logged._log_history, logged._max_length = np.arange(3.0), 1000000
    hub = {'log_scalars': OrderedDict({'train/loss': logged}), 'runtime_info': OrderedDict(iter=5, best=np.float64(0.5)),
           'resumed_keys': OrderedDict()}
    return modules, {'meta': {'mmengine_version': '0.3.2', 'epoch': 99, 'cfg': 'model = dict()'}, 'message_hub': hub,
                     'state_dict': openmmlab_names(state_dict)}


def write(kind, state_dict, path):
    """A file of that kind; returns its path."""
    if kind == 'safetensors':
        path = path.with_suffix('.safetensors')
        safetensors.torch.save_file(dict(state_dict), path)
        return path
    if kind == 'openmmlab':
        modules, checkpoint = openmmlab_checkpoint(state_dict)
        with pytest.MonkeyPatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            torch.save(checkpoint, path)
        return path
    torch.save({
        'published': {'model': state_dict, 'optimizer': {'state': {}}, 'epoch': 399, 'scaler': {'scale': 65536.0},
                      'args': argparse.Namespace(model='mae_vit_base_patch16', dist_url='env://')},
        'weights alone under model': {'model': state_dict},
        'bare': state_dict,
        'data parallel': {'state_dict': {f'module.{k}': v for k, v in state_dict.items()}},
        'compiled': {'model': {f'_orig_mod.{k}': v for k, v in state_dict.items()}},
        'both': {f'module._orig_mod.{k}': v for k, v in state_dict.items()},
    }[kind], path)
    return path


KINDS = ['published', 'weights alone under model', 'bare', 'data parallel', 'compiled', 'both', 'safetensors', 'openmmlab']


def start_from(path, model, evaluation=False):
    load_pretrained(argparse.Namespace(finetune=str(path), model='vit', eval=evaluation, nb_classes=10), model)
    return model.eval()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('pool', [{}, {'global_pool': True}], ids=['class token', 'global pool'])
def test_a_classifier_in_every_format(kind, pool, tmp_path):
    expected = classifier(**pool)
    path = write(kind, expected.state_dict(), tmp_path / 'file.pth')
    model = start_from(path, models_vit.VisionTransformer(num_classes=10, **TINY, **pool), evaluation=True)
    assert torch.equal(model(IMAGES), expected(IMAGES))


@pytest.mark.parametrize('kind', KINDS)
def test_a_pretrained_encoder_in_every_format(kind, tmp_path, capsys):
    """The encoder computes for all patches what it does in the pretraining model; the report tells of the rest."""
    source = load_deterministic(models_milan.MaskedAutoencoderViT(
        **TINY, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4, use_clip=True, change_decoder=True, target_dim=24))
    weights = source.state_dict()
    if kind == 'openmmlab':  # there the decoder is another module's, the neck's
        encoder = ('cls_token', 'pos_embed', 'patch_embed', 'blocks', 'norm')
        weights = {k: v for k, v in weights.items() if k.split('.')[0] in encoder}
    model = start_from(write(kind, weights, tmp_path / 'file.pth'), models_vit.VisionTransformer(num_classes=10, **TINY))
    every_patch = torch.arange(16).expand(len(IMAGES), -1)
    torch.testing.assert_close(model.forward_features(IMAGES), source.forward_encoder(IMAGES, every_patch))
    said = capsys.readouterr().out
    assert '30 tensors matched; missing, start anew: head (2)' in said
    assert ('unexpected, not used: none' if kind == 'openmmlab' else 'decoder_blocks (14)') in said


def test_timm(tmp_path):
    """timm's own ViT, saved and loaded: its logits."""
    theirs = timm.create_model('vit_small_patch16_224', num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / 'vit_small_patch16_224.pth')
    model = start_from(tmp_path / 'vit_small_patch16_224.pth', models_vit.vit_small_patch16(num_classes=10), evaluation=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


def test_names_go_there_and_back():
    state_dict = classifier(global_pool=True).state_dict()
    assert formats.to_openmmlab(state_dict).keys() == openmmlab_names(state_dict).keys()
    assert formats.to_ours({'state_dict': formats.to_openmmlab(state_dict)}).keys() == state_dict.keys()
    assert list(formats.to_ours(state_dict)) == list(state_dict)


def test_a_larger_picture(tmp_path, capsys):
    """The position embedding is resized; on the same grid it is left as it is."""
    path = write('bare', classifier().state_dict(), tmp_path / 'file.pth')
    sizes = {**TINY, 'img_size': 48}
    model = start_from(path, models_vit.VisionTransformer(num_classes=10, **sizes))
    assert 'resized from 4x4 to 6x6' in capsys.readouterr().out
    assert torch.equal(model.pos_embed[:, 0], classifier().pos_embed[:, 0])
    start_from(path, models_vit.VisionTransformer(num_classes=10, **TINY))
    assert 'resized' not in capsys.readouterr().out


def test_a_head_for_other_classes_is_left_out(tmp_path, capsys):
    path = write('bare', classifier().state_dict(), tmp_path / 'file.pth')
    model = models_vit.VisionTransformer(num_classes=7, **TINY)
    fresh = model.head.weight.clone()
    start_from(path, model)
    assert torch.equal(model.head.weight, fresh)
    said = capsys.readouterr().out
    assert 'start anew: head (2)' in said and 'not used: head (2)' in said


@pytest.mark.parametrize('content, message', [
    ({'model': {'fc.weight': torch.zeros(2, 2)}}, 'nothing of the encoder is in it; its names are fc.weight'),
    ({'model': {'blocks.0.attn.qkv.weight': torch.zeros(96, 32)}}, r'does not fit --model vit: blocks.0.attn.qkv.weight is \[96'),
    ({'model': {'pos_embed': torch.zeros(1, 12, 48)}}, 'has a pos_embed that cannot be resized'),
    ({'epoch': 3}, 'there are no weights in it'),
    ([torch.zeros(1)], 'there are no weights in it'),
    ({}, 'there are no weights in it'),
])
def test_what_does_not_fit(content, message, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError, match=message) as error:
        start_from(tmp_path / 'file.pth', models_vit.VisionTransformer(num_classes=10, **TINY))
    assert 'file.pth' in str(error.value) and '\n' not in str(error.value)


class Shell:
    """What a malicious checkpoint does when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(legacy, tmp_path):
    checkpoint = {'model': classifier().state_dict(), 'args': Shell(tmp_path / 'proof')}
    torch.save(checkpoint, tmp_path / 'evil.pth', _use_new_zipfile_serialization=not legacy)
    for read in (load, read_weights):
        with pytest.raises(UserError, match=r'evil.pth is refused: it holds (posix|nt).system, and could run code') as error:
            read(tmp_path / 'evil.pth')
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'proof').exists()
    torch.load(tmp_path / 'evil.pth', weights_only=False)  # the test has teeth: without protection it runs
    assert (tmp_path / 'proof').exists()


class MadeUpPointer:
    """A NumPy array of objects whose bytes are the file's: to read its item is to follow a pointer that the file made up."""

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b'b'), (1, (1,), np.dtype('f8'), False, b'A' * 8)


def test_no_array_of_numpy_is_made(tmp_path):
    """What NumPy's classes stand for is ignored: a made-up dtype would turn bytes of the file into pointers."""
    args = argparse.Namespace(a=np.arange(3), b=np.float32(1), c=np.bool_(True))
    torch.save({'model': classifier().state_dict(), 'epoch': np.float64(3), 'args': args, 'evil': MadeUpPointer()},
               tmp_path / 'file.pth')
    checkpoint, weights = read_weights(tmp_path / 'file.pth')
    assert weights.keys() == classifier().state_dict().keys()
    for value in (checkpoint['epoch'], checkpoint['evil'], *vars(checkpoint['args']).values()):
        assert type(value).__module__ == 'util.checkpoint'
    torch.save({'model': {'blocks.0.attn.qkv.weight': np.zeros((144, 48))}}, tmp_path / 'numpy.pth')
    with pytest.raises(UserError, match='there are no weights in it'):
        read_weights(tmp_path / 'numpy.pth')


def test_openmmlab_with_both_norms(tmp_path):
    """Their classifier may carry the norm that pretraining ended with; it is not used."""
    expected = classifier(global_pool=True)
    both = {**expected.state_dict(), 'norm.weight': torch.zeros(48), 'norm.bias': torch.zeros(48)}
    _, weights = read_weights(write('openmmlab', both, tmp_path / 'file.pth'))
    assert weights.keys() == expected.state_dict().keys()


def test_damaged_files(tmp_path):
    for kind in ('published', 'safetensors'):
        path = write(kind, classifier().state_dict(), tmp_path / 'whole.pth')
        data = path.read_bytes()
        for name, damaged in (('cut', data[:len(data) // 2]), ('empty', b''), ('text', b'no checkpoint\n' * 100)):
            (tmp_path / f'{name}{path.suffix}').write_bytes(damaged)
            with pytest.raises(UserError, match='cannot be read') as error:
                load(tmp_path / f'{name}{path.suffix}')
            assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


def test_foreign_files_through_the_script(classifier_flags, tmp_path):
    """--eval: OpenMMLab's fine-tuned classifier and .safetensors have no optimiser's state, and are whole all the same."""
    model = load_deterministic(models_vit.vit_tiny_patch8(img_size=32, num_classes=3, global_pool=True), skip=())
    lines = set()
    for kind in ('published', 'openmmlab', 'safetensors'):
        path = write(kind, model.state_dict(), tmp_path / 'file.pth')
        for flag in ('--resume', '--finetune'):
            result = finetune(*classifier_flags, '--eval', '--global_pool', flag, path)
            assert result.returncode == 0, result.stderr
            lines.add(result.stdout.splitlines()[-1])
    assert len(lines) == 1 and lines.pop().startswith('Accuracy of the network on the 13 test images')
