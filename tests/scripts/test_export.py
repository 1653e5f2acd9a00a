"""tools/export.py: the code that it prints is run, and the result compared with the original."""

import argparse
import inspect
import resource
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from safetensors import safe_open

import models_milan
import models_vit
from models_infer import classifier_tensors, fold_probe, infer_arguments
from tests.helpers import ok, one_error_line, script
from tools.export import timm_code
from util.checkpoints.io import read_weights, save_on_master
from util.checkpoints.key_names import to_openmmlab

export = script('tools.export')
FORMATS = {'timm': 'out.pth', 'safetensors': 'out.safetensors', 'openmmlab': 'out.pth'}


def save(model, path, /, **args):
    """Save a checkpoint as the training scripts do; return the model.

    All parameters are changed first, so that no bias is zero.
    """
    for p in model.eval().parameters():
        p.data += 0.02 * torch.randn_like(p)
    checkpoint = {
        'model': model.state_dict(),
        'optimizer': {'state': {}},
        'epoch': 7,
        'scaler': {},
        'args': argparse.Namespace(**{'data_path': '/home/me/data', **args}),
    }
    save_on_master(checkpoint, path)
    return model


def convert(checkpoint, format, output):
    """Export a checkpoint and return the printed code."""
    result = export(checkpoint, '--format', format, '--output', output)
    return ok(result).partition('\n\n')[2]


def run_code(code):
    """Run the printed code and return the model that it builds."""
    names = {}
    exec(code, names)
    return names['model'].eval()


def probe_of(model):
    """Give a classifier the head of main_linprobe.py after it has seen data."""
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6)
    norm.running_mean.uniform_(-2, 2)
    norm.running_var.uniform_(1e-7, 3)  # the smallest are below eps
    model.head = nn.Sequential(norm, model.head)
    return model


# ---- timm ----


TIMM_TINY = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)  # vit_tiny_patch16_224


@torch.no_grad()
@pytest.mark.parametrize(
    'kwargs, output, call',
    [
        (
            TIMM_TINY,
            'out.safetensors',
            "timm.create_model('vit_tiny_patch16_224', img_size=64, num_",
        ),
        ({}, 'out.bin', 'VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=6, '),
    ],
    ids=['named', 'other'],
)
def test_encoder_in_timm(kwargs, output, call, tmp_path):
    method = dict(use_clip=True, change_decoder=True, target_dim=48)
    model = models_milan.mae_vit_tiny_patch8(**{**method, **kwargs, 'img_size': 64})
    save(model, tmp_path / 'in.pth')
    code = convert(tmp_path / 'in.pth', 'timm', tmp_path / output)
    assert call in code
    exported = run_code(code)
    x = torch.randn(2, 3, 64, 64)
    everything = torch.arange(model.patch_embed.num_patches).expand(len(x), -1)
    tokens = model.forward_encoder(x, everything)
    torch.testing.assert_close(exported.forward_features(x), tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported(x), tokens[:, 0], rtol=0, atol=1e-5)
    assert tokens.std() > 0.1


@pytest.mark.parametrize('name', ['small_patch16', 'base_patch16', 'large_patch16', 'huge_patch14'])
def test_name_in_timm(name):
    with torch.device('meta'):
        model = models_milan.MODELS[f'mae_vit_{name}'](decoder_depth=0)
    tensors = classifier_tensors(model.state_dict())
    code = timm_code(tensors, infer_arguments(tensors), False, 'out.pth')
    arguments = "num_classes=0, global_pool='token', checkpoint_path='out.pth'"
    assert code == f"import timm\nmodel = timm.create_model('vit_{name}_224', {arguments})"


CLASSIFIERS = {
    'pool': (dict(global_pool=True), "global_pool='avg', checkpoint"),
    'class token': (dict(global_pool=False), "global_pool='token', checkpoint"),
    'pool all': (dict(global_pool_wcls=True), "global_pool='avg', pool_include_prefix=True, "),
    'narrow': (dict(mlp_ratio=2.0), 'img_size=64, mlp_ratio=2.0, num_classes=10, '),
    'width': (
        dict(num_heads=4, embed_dim=256, depth=2),
        '(img_size=64, patch_size=16, embed_dim=256, depth=2, num_heads=4, ',
    ),
    'probe, pool': (dict(global_pool=True), "num_classes=10, global_pool='avg', checkpoint"),
    'probe, token': (dict(global_pool=False), "num_classes=10, global_pool='token', checkpoint"),
}


@torch.no_grad()
@pytest.mark.parametrize('case', CLASSIFIERS)
def test_classifier_in_timm(case, tmp_path):
    kwargs, call = CLASSIFIERS[case]
    arguments = {**TIMM_TINY, **kwargs}
    model = models_vit.VisionTransformer(img_size=64, num_classes=10, **arguments)
    model = probe_of(model) if case.startswith('probe') else model
    save(model, tmp_path / 'in.pth', **kwargs)
    code = convert(tmp_path / 'in.pth', 'timm', tmp_path / 'out.safetensors')
    assert call in code
    known = inspect.signature(timm.models.VisionTransformer).parameters
    if case == 'pool all' and 'pool_include_prefix' not in known:
        pytest.skip('this timm is too old to pool the class token too')
    x = torch.randn(3, 3, 64, 64)
    logits = model(x)
    assert logits.std(0).min() > 0.01
    atol = 1e-5 * max(1, logits.abs().max().item())
    torch.testing.assert_close(run_code(code)(x), logits, rtol=0, atol=atol)


def test_number_of_heads_of_the_recorded_model(tmp_path, monkeypatch):
    make = partial(models_vit.vit_tiny_patch8, depth=2, num_heads=6)
    monkeypatch.setitem(models_vit.MODELS, 'vit_mine', make)
    model = save(make(num_classes=3), tmp_path / 'in.pth', model='vit_mine')
    code = convert(tmp_path / 'in.pth', 'timm', tmp_path / 'out.pth')
    assert 'num_heads=6' in code
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(run_code(code)(x), model(x))


def test_timm_checkpoint_with_a_view_of_a_large_storage(tmp_path):
    """The exported tensor is as small as the view."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=4)
    tensors = model.state_dict()
    tensors['head.bias'] = torch.arange(1e6)[:4]
    torch.save(tensors, tmp_path / 'in.pth')
    code = convert(tmp_path / 'in.pth', 'timm', tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').stat().st_size < (tmp_path / 'in.pth').stat().st_size - 3_900_000
    assert torch.equal(run_code(code).head.bias, torch.arange(4.0))


# ---- all formats ----


CHECKPOINTS = {
    'milan': partial(
        models_milan.mae_vit_tiny_patch8, use_clip=True, change_decoder=True, target_dim=48
    ),
    'mae': models_milan.mae_vit_tiny_patch8,
    'global pool': partial(models_vit.vit_tiny_patch8, num_classes=3, global_pool=True),
    'class token': partial(models_vit.vit_tiny_patch8, num_classes=3),
    'probe': lambda: probe_of(models_vit.vit_tiny_patch8(num_classes=3)),
    'openmmlab': partial(models_vit.vit_tiny_patch8, num_classes=3, global_pool=True),
}


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_exported_files_hold_the_same_tensors(kind, tmp_path):
    """read_weights returns the original tensors, bit for bit."""
    everything = save(CHECKPOINTS[kind](), tmp_path / 'in.pth').state_dict()
    if kind == 'openmmlab':
        torch.save({'meta': {}, 'state_dict': to_openmmlab(everything)}, tmp_path / 'in.pth')
    decoder = ('decoder_', 'mask_token')
    classifier = {k: v for k, v in everything.items() if not k.startswith(decoder)}
    classifier = fold_probe(classifier) if kind == 'probe' else classifier
    for format, output in FORMATS.items():
        convert(tmp_path / 'in.pth', format, tmp_path / output)
        file, read = read_weights(tmp_path / output)
        expected = everything if format == 'safetensors' else classifier
        assert read.keys() == expected.keys(), format
        assert all(torch.equal(read[name], value) for name, value in expected.items()), format
    assert file.keys() == {'meta', 'state_dict'}
    names = {'backbone.cls_token', 'backbone.layers.5.ffn.layers.0.0.bias'}
    assert names < file['state_dict'].keys()


def test_metadata_of_safetensors(tmp_path):
    """It describes the weights and does not contain the owner's paths."""
    flags = dict(model='mae_vit_tiny_patch8', mask_ratio=0.75, use_clip=False)
    save(models_milan.mae_vit_tiny_patch8(), tmp_path / 'in.pth', **flags)
    convert(tmp_path / 'in.pth', 'safetensors', tmp_path / 'out.safetensors')
    with safe_open(tmp_path / 'out.safetensors', 'pt') as f:
        metadata = f.metadata()
    assert metadata.keys() == {'format', 'epoch', '.sha256', *flags}
    assert (metadata['epoch'], metadata['mask_ratio']) == ('7', '0.75')


# ---- errors ----


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp('tiny') / 'in.pth'
    save(models_vit.vit_tiny_patch8(num_classes=3), path)
    return path


@pytest.mark.parametrize('format', ['timm', 'openmmlab'])
def test_not_a_plain_vit(format, tiny, tmp_path):
    tensors = read_weights(tiny)[1]
    tensors['blocks.0.ls1.gamma'] = torch.ones(192)
    torch.save(tensors, tmp_path / 'in.pth')
    result = export(tmp_path / 'in.pth', '--format', format, '--output', tmp_path / 'out.pth')
    one_error_line(result, tmp_path / 'in.pth', 'blocks.0.ls1.gamma')
    assert [p.name for p in tmp_path.iterdir()] == ['in.pth']


ERRORS = {
    'no file': ('no.pth', 'timm', 'out.pth', 'no.pth'),
    'text': ('text.pth', 'timm', 'out.pth', 'text.pth'),
    'no encoder': ('clip.pth', 'safetensors', 'out.safetensors', 'visual.proj'),
    'pooling': ('wcls.pth', 'openmmlab', 'out.pth', '--global_pool_wcls'),
    'format': ('TINY', 'onnx', 'out.pth', '--format'),
    'suffix safetensors': ('TINY', 'safetensors', 'out.pth', '--output'),
    'suffix openmmlab': ('TINY', 'openmmlab', 'out.safetensors', '--output'),
    'no folder': ('TINY', 'timm', 'no/folder/out.pth', '--output'),
    'folder': ('TINY', 'timm', 'folder.pth', '--output'),
    'itself': ('TINY', 'timm', 'TINY', '--output'),
    'link to itself': ('TINY', 'timm', 'link.pth', '--output'),
}


@pytest.fixture(scope='module')
def bad_files(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp('bad')
    (root / 'text.pth').write_text('not a checkpoint')
    (root / 'folder.pth').mkdir()
    (root / 'link.pth').symlink_to(tiny)
    torch.save({'visual.proj': torch.ones(2)}, root / 'clip.pth')
    model = models_vit.vit_tiny_patch8(num_classes=3, global_pool_wcls=True)
    save(model, root / 'wcls.pth', global_pool_wcls=True)
    return root


@pytest.mark.parametrize('case', ERRORS)
def test_errors(case, tiny, bad_files):
    """They change no file."""
    checkpoint, format, output, word = ERRORS[case]
    checkpoint, output = (tiny if f == 'TINY' else bad_files / f for f in (checkpoint, output))
    before = sorted(bad_files.iterdir()), tiny.read_bytes()
    result = export(checkpoint, '--format', format, '--output', output)
    one_error_line(result, word)
    assert not result.stdout
    assert before == (sorted(bad_files.iterdir()), tiny.read_bytes())


@pytest.mark.parametrize('output', ['out.pth', 'out.safetensors'])
def test_full_disk_keeps_the_older_file(output, tiny, tmp_path):
    (tmp_path / output).write_text('older')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        result = export(tiny, '--format', 'timm', '--output', tmp_path / output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_error_line(result, output)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(output, 'older')]


@pytest.mark.slow
def test_command(tiny, tmp_path):
    output = tmp_path / 'out.pth'
    flags = ['--format', 'openmmlab', '--output', output]
    code = ok(export(tiny, *flags, launcher=[sys.executable])).partition('\n\n')[2]
    assert code == f"load_from = '{output}'\n"
