"""Checkpoints of every format, made here, loaded by --finetune and compared in their outputs."""

import argparse
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import models_milan
import models_vit
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import finetune, ok
from util.checkpoints import key_names
from util.checkpoints.io import load, load_pretrained, read_weights
from util.checkpoints.unpickle import Stub
from util.errors import UserError

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
IMAGES = torch.from_numpy(images('checkpoints', 3, 32)).float()


def classifier(**kwargs):
    return load_deterministic(
        models_vit.VisionTransformer(num_classes=10, **TINY, **kwargs), skip=()
    ).eval()


def openmmlab_names(state_dict):
    """Return OpenMMLab's names, taken from its files and not from the code under test."""
    renamed = OrderedDict()
    for name, value in state_dict.items():
        for ours, theirs in (
            ('patch_embed.proj.', 'patch_embed.projection.'),
            ('.norm1.', '.ln1.'),
            ('.norm2.', '.ln2.'),
            ('.mlp.fc1.', '.ffn.layers.0.0.'),
            ('.mlp.fc2.', '.ffn.layers.1.'),
            ('blocks.', 'layers.'),
        ):
            name = name.replace(ours, theirs)
        if name.startswith(('norm.', 'fc_norm.')):
            name = {'norm': 'ln1', 'fc_norm': 'ln2'}[name.split('.')[0]] + '.' + name.split('.')[1]
        is_head = name.startswith('head.')
        name = name.replace('head.', 'head.fc.') if is_head else f'backbone.{name}'
        renamed[name] = value
    return renamed


def openmmlab_checkpoint(state_dict):
    """Return a checkpoint as mmengine saves it, with a log of a class of its own."""
    module = types.ModuleType('mmengine.logging.history_buffer')
    buffer = type('HistoryBuffer', (), {'__module__': module.__name__})
    module.HistoryBuffer = buffer
    modules = {
        'mmengine': types.ModuleType('mmengine'),
        'mmengine.logging': types.ModuleType('mmengine.logging'),
        module.__name__: module,
    }
    logged = buffer()
    logged._log_history, logged._max_length = np.arange(3.0), 1000000
    hub = {
        'log_scalars': OrderedDict({'train/loss': logged}),
        'runtime_info': OrderedDict(iter=5, best=np.float64(0.5)),
        'resumed_keys': OrderedDict(),
    }
    return modules, {
        'meta': {'mmengine_version': '0.3.2', 'epoch': 99, 'cfg': 'model = dict()'},
        'message_hub': hub,
        'state_dict': openmmlab_names(state_dict),
    }


def write(kind, state_dict, path):
    """Write a file of that kind and return its path."""
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
    torch.save(
        {
            'published': {
                'model': state_dict,
                'optimizer': {'state': {}},
                'epoch': 399,
                'scaler': {'scale': 65536.0},
                'args': argparse.Namespace(model='mae_vit_base_patch16', dist_url='env://'),
            },
            'weights alone under model': {'model': state_dict},
            'bare': state_dict,
            'data parallel': {'state_dict': {f'module.{k}': v for k, v in state_dict.items()}},
            'compiled': {'model': {f'_orig_mod.{k}': v for k, v in state_dict.items()}},
            'both': {f'module._orig_mod.{k}': v for k, v in state_dict.items()},
        }[kind],
        path,
    )
    return path


KINDS = [
    'published',
    'weights alone under model',
    'bare',
    'data parallel',
    'compiled',
    'both',
    'safetensors',
    'openmmlab',
]


def start_from(path, model, evaluation=False):
    load_pretrained(model, path, model_name='vit', eval_classes=10 if evaluation else None)
    return model.eval()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('pool', [{}, {'global_pool': True}], ids=['class token', 'global pool'])
def test_classifier_in_every_format(kind, pool, tmp_path):
    expected = classifier(**pool)
    path = write(kind, expected.state_dict(), tmp_path / 'file.pth')
    model = start_from(
        path, models_vit.VisionTransformer(num_classes=10, **TINY, **pool), evaluation=True
    )
    assert torch.equal(model(IMAGES), expected(IMAGES))


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_encoder_in_every_format(kind, tmp_path, capsys):
    """The encoder computes the same in the classifier and, for all patches, in pretraining."""
    source = load_deterministic(
        models_milan.MaskedAutoencoderViT(
            **TINY,
            decoder_embed_dim=32,
            decoder_depth=1,
            decoder_num_heads=4,
            use_clip=True,
            change_decoder=True,
            target_dim=24,
        )
    )
    weights = source.state_dict()
    if kind == 'openmmlab':  # there the decoder is part of another module, the neck
        encoder = ('cls_token', 'pos_embed', 'patch_embed', 'blocks', 'norm')
        weights = {k: v for k, v in weights.items() if k.split('.')[0] in encoder}
    model = start_from(
        write(kind, weights, tmp_path / 'file.pth'),
        models_vit.VisionTransformer(num_classes=10, **TINY),
    )
    every_patch = torch.arange(16).expand(len(IMAGES), -1)
    torch.testing.assert_close(
        model.forward_features(IMAGES), source.forward_encoder(IMAGES, every_patch)
    )
    loaded, missing, unused = capsys.readouterr().out.split(';')
    assert '30 tensors' in loaded and missing.endswith(': head (2)')
    assert unused.endswith(': none\n') if kind == 'openmmlab' else 'decoder_blocks (14)' in unused


def test_timm_checkpoint(tmp_path):
    theirs = timm.create_model('vit_small_patch16_224', num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / 'vit_small_patch16_224.pth')
    model = start_from(
        tmp_path / 'vit_small_patch16_224.pth',
        models_vit.vit_small_patch16(num_classes=10),
        evaluation=True,
    )
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


def test_openmmlab_names_round_trip():
    state_dict = classifier(global_pool=True).state_dict()
    renamed = key_names.to_openmmlab(state_dict)
    assert renamed.keys() == openmmlab_names(state_dict).keys()
    assert key_names.to_timm_names({'state_dict': renamed}).keys() == state_dict.keys()
    assert list(key_names.to_timm_names(state_dict)) == list(state_dict)


def test_position_embedding_is_resized_for_larger_images(tmp_path, capsys):
    path = write('bare', classifier().state_dict(), tmp_path / 'file.pth')
    sizes = {**TINY, 'img_size': 48}
    model = start_from(path, models_vit.VisionTransformer(num_classes=10, **sizes))
    assert '4x4 to 6x6' in capsys.readouterr().out
    assert torch.equal(model.pos_embed[:, 0], classifier().pos_embed[:, 0])
    start_from(path, models_vit.VisionTransformer(num_classes=10, **TINY))
    assert '4x4' not in capsys.readouterr().out


def test_head_for_other_classes_is_not_used(tmp_path, capsys):
    path = write('bare', classifier().state_dict(), tmp_path / 'file.pth')
    model = models_vit.VisionTransformer(num_classes=7, **TINY)
    fresh = model.head.weight.clone()
    start_from(path, model)
    assert torch.equal(model.head.weight, fresh)
    _, missing, unused = capsys.readouterr().out.split(';')
    assert missing.endswith(': head (2)') and unused.endswith(': head (2)\n')


@pytest.mark.parametrize(
    'content, words',
    [
        ({'model': {'fc.weight': torch.zeros(2, 2)}}, ['encoder', 'fc.weight']),
        (
            {'model': {'blocks.0.attn.qkv.weight': torch.zeros(96, 32)}},
            ['--model vit', 'blocks.0.attn.qkv.weight', '[96, 32]', '[144, 48]'],
        ),
        (
            {'model': {'norm.weight': torch.zeros(48, dtype=torch.int32)}},
            ['--model vit', 'norm.weight', 'int32'],
        ),
        ({'model': {'pos_embed': torch.zeros(1, 12, 48)}}, ['pos_embed']),
        ({'epoch': 3}, ['state dict']),
        ([torch.zeros(1)], ['state dict']),
        ({}, ['state dict']),
    ],
    ids=['no encoder', 'other shape', 'integers', 'pos_embed', 'no weights', 'list', 'empty'],
)
def test_checkpoints_that_do_not_fit(content, words, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError) as error:
        start_from(tmp_path / 'file.pth', models_vit.VisionTransformer(num_classes=10, **TINY))
    for word in ('file.pth', *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    'flags', [{'whole_encoder': True}, {'eval_classes': 10}], ids=['frozen encoder', '--eval']
)
def test_missing_tensors(flags, tmp_path):
    """They are an error for a frozen encoder and for --eval, and for fine-tuning they are not."""
    weights = classifier().state_dict()
    del weights['blocks.1.norm1.weight']
    path = write('bare', weights, tmp_path / 'file.pth')
    model = models_vit.VisionTransformer(num_classes=10, **TINY)
    load_pretrained(model, path, model_name='vit')
    with pytest.raises(UserError, match='file.pth.* blocks'):
        load_pretrained(model, path, model_name='vit', **flags)


class Shell:
    """A pickle of this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy format'])
def test_malicious_pickle_does_not_run(zipped, tmp_path):
    path = tmp_path / 'evil.pth'
    checkpoint = {'model': classifier().state_dict(), 'args': Shell(tmp_path / 'proof')}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    for read in (load, read_weights):
        with pytest.raises(UserError, match=r'evil.pth.*(posix|nt).system'):
            read(path)
    assert not (tmp_path / 'proof').exists()
    torch.load(path, weights_only=False)  # without the checks it runs
    assert (tmp_path / 'proof').exists()


class CraftedArray:
    """A NumPy array of objects whose bytes, which are pointers, come from the file."""

    def __reduce__(self):
        return (
            np.zeros(1).__reduce__()[0],
            (np.ndarray, (0,), b'b'),
            (1, (1,), np.dtype('f8'), False, b'A' * 8),
        )


def test_numpy_objects_are_ignored(tmp_path):
    args = argparse.Namespace(a=np.arange(3), b=np.float32(1), c=np.bool_(True))
    content = {
        'model': classifier().state_dict(),
        'epoch': np.float64(3),
        'args': args,
        'evil': CraftedArray(),
    }
    torch.save(content, tmp_path / 'file.pth')
    checkpoint, weights = read_weights(tmp_path / 'file.pth')
    assert weights.keys() == classifier().state_dict().keys()
    for value in (checkpoint['epoch'], checkpoint['evil'], *vars(checkpoint['args']).values()):
        assert type(value) is Stub
    torch.save({'model': {'blocks.0.attn.qkv.weight': np.zeros((144, 48))}}, tmp_path / 'numpy.pth')
    with pytest.raises(UserError, match='numpy.pth'):
        read_weights(tmp_path / 'numpy.pth')


def test_openmmlab_classifier_with_two_norms(tmp_path):
    """It may have the last norm of pretraining, which it does not use."""
    expected = classifier(global_pool=True)
    both = {**expected.state_dict(), 'norm.weight': torch.zeros(48), 'norm.bias': torch.zeros(48)}
    _, weights = read_weights(write('openmmlab', both, tmp_path / 'file.pth'))
    assert weights.keys() == expected.state_dict().keys()


@pytest.mark.parametrize('kind', ['published', 'safetensors'])
def test_damaged_files(kind, tmp_path):
    path = write(kind, classifier().state_dict(), tmp_path / 'intact.pth')
    data = path.read_bytes()
    for name, damaged in (
        ('truncated', data[: len(data) // 2]),
        ('empty', b''),
        ('text', b'no checkpoint\n' * 100),
    ):
        (tmp_path / f'{name}{path.suffix}').write_bytes(damaged)
        with pytest.raises(UserError, match=name) as error:
            load(tmp_path / f'{name}{path.suffix}')
        assert str(error.value).isprintable() and 'weights_only' not in str(error.value)
    for other in (tmp_path, tmp_path / 'missing.pth', Path('/dev/zero')):
        with pytest.raises(UserError, match=other.name):
            load(other)


def test_evaluation_of_foreign_files(classifier_flags, tmp_path):
    """They have no optimizer state, and their classifier is complete."""
    model = load_deterministic(
        models_vit.vit_tiny_patch8(img_size=32, num_classes=3, global_pool=True), skip=()
    )
    accuracies = set()
    for kind in ('published', 'openmmlab', 'safetensors'):
        path = write(kind, model.state_dict(), tmp_path / 'file.pth')
        for flag in ('--resume', '--finetune'):
            out = ok(finetune(*classifier_flags, '--eval', '--global_pool', flag, path))
            accuracies.add(out.splitlines()[-1])
    assert len(accuracies) == 1 and '13 test images' in accuracies.pop()
