"""tools/export.py: the Python it prints is run, and what that builds is compared with the model that was exported."""

import argparse
import inspect
import resource
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from conftest import run as run_process
from safetensors import safe_open

import models_milan
import models_vit
from tools import export
from util import formats
from util.checkpoint import read_weights, save_on_master
from util.misc import run

FORMATS = {'timm': 'out.pth', 'safetensors': 'out.safetensors', 'openmmlab': 'out.pth'}


def save(model, path, /, **args):
    """A checkpoint as the training scripts write it, of ``model`` after something like training: no bias is zero any more."""
    for p in model.eval().parameters():
        p.data += 0.02 * torch.randn_like(p)
    save_on_master({'model': model.state_dict(), 'optimizer': {'state': {}}, 'epoch': 7, 'scaler': {},
                    'args': argparse.Namespace(**{'data_path': '/home/me/data', **args})}, path)
    return model


def command(checkpoint, format, output):
    run(export.main, export.get_args_parser().parse_args([str(checkpoint), '--format', format, '--output', str(output)]))


def load_as_told(capsys):
    """(what the printed Python builds, that Python)."""
    code = capsys.readouterr().out.partition('\n\n')[2]
    names = {}
    exec(code, names)
    return names['model'].eval(), code


def features(model, x):
    """All tokens that the encoder of a pretraining model gives for images x, none hidden."""
    everything = torch.arange(model.patch_embed.num_patches).expand(len(x), -1)
    return model.forward_encoder(x, everything)


def probe(model):
    """The head that main_linprobe.py gives a classifier, after it has seen data."""
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6)
    norm.running_mean.uniform_(-2, 2)
    norm.running_var.uniform_(1e-7, 3)  # the smallest are below eps
    model.head = nn.Sequential(norm, model.head)
    return model


@torch.no_grad()
@pytest.mark.parametrize('make, output, call', [
    (partial(models_milan.mae_vit_small_patch16, use_clip=True, change_decoder=True, target_dim=512), 'out.pth',
     "timm.create_model('vit_small_patch16_224', num_classes=0, global_pool='token', checkpoint_path="),
    (partial(models_milan.mae_vit_base_patch16, decoder_depth=1), 'out.safetensors',
     "timm.create_model('vit_base_patch16_224', num_classes=0, global_pool='token', checkpoint_path="),
    (models_milan.mae_vit_tiny_patch8, 'out.bin',
     "VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=0, global_pool='token')")
], ids=['small', 'base', 'tiny'])
def test_encoder_in_timm(make, output, call, tmp_path, capsys):
    model = save(make(), tmp_path / 'in.pth')
    command(tmp_path / 'in.pth', 'timm', tmp_path / output)
    theirs, code = load_as_told(capsys)
    assert call in code
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    ours = features(model, x)
    torch.testing.assert_close(theirs.forward_features(x), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(x), ours[:, 0], rtol=0, atol=1e-5)
    assert ours.std() > 0.1
    (tmp_path / 'in.pth').unlink()


@torch.no_grad()
@pytest.mark.parametrize('linear, kwargs, call', [
    (False, dict(global_pool=True), "'vit_small_patch16_224', img_size=64, num_classes=10, global_pool='avg', checkpoint"),
    (False, dict(global_pool=False), "'vit_small_patch16_224', img_size=64, num_classes=10, global_pool='token', checkpoint"),
    (False, dict(global_pool_wcls=True), "num_classes=10, global_pool='avg', pool_include_prefix=True, checkpoint"),
    (False, dict(mlp_ratio=2.0), 'img_size=64, mlp_ratio=2.0, num_classes=10, '),
    (False, dict(num_heads=8, embed_dim=512, depth=2), '(img_size=64, patch_size=16, embed_dim=512, depth=2, num_heads=8, '),
    (True, dict(global_pool=True), "num_classes=10, global_pool='avg', checkpoint"),
    (True, dict(global_pool=False), "num_classes=10, global_pool='token', checkpoint"),
], ids=['pool', 'class token', 'pool with class token', 'narrow', 'another width', 'probe, pool', 'probe, class token'])
def test_classifier_in_timm(linear, kwargs, call, tmp_path, capsys):
    model = models_vit.vit_small_patch16(num_classes=10, img_size=64, **kwargs)
    model = save(probe(model) if linear else model, tmp_path / 'in.pth', **kwargs)
    command(tmp_path / 'in.pth', 'timm', tmp_path / 'out.safetensors')
    if 'global_pool_wcls' in kwargs and 'pool_include_prefix' not in inspect.signature(timm.models.VisionTransformer).parameters:
        pytest.skip('this timm is too old to pool the class token too')
    theirs, code = load_as_told(capsys)
    assert call in code
    x = torch.randn(3, 3, 64, 64)
    ours = model(x)
    assert ours.std(0).min() > 0.01
    torch.testing.assert_close(theirs(x), ours, rtol=0, atol=1e-5 * max(1, ours.abs().max().item()))


def test_folding_a_probe_is_exact():
    """In float64 the one layer equals the two to rounding."""
    head = probe(nn.ModuleDict({'head': nn.Linear(48, 5)}).double()).head.double().eval()
    folded = export.fold_probe({f'head.{name}': value for name, value in head.state_dict().items()})
    x = torch.randn(20, 48, dtype=torch.float64)
    torch.testing.assert_close(x @ folded['head.weight'].T + folded['head.bias'], head(x), rtol=1e-12, atol=1e-12)
    assert folded.keys() == {'head.weight', 'head.bias'}


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('kind', ['pretrained', 'mae', 'global pool', 'class token', 'probe', 'openmmlab'])
def test_there_and_back(kind, format, tmp_path):
    """What read_weights gives of the exported file are the tensors that were there, bit for bit, with none lost or added."""
    make = {'pretrained': lambda: models_milan.mae_vit_tiny_patch8(use_clip=True, change_decoder=True, target_dim=48),
            'mae': models_milan.mae_vit_tiny_patch8,
            'global pool': lambda: models_vit.vit_tiny_patch8(num_classes=3, global_pool=True),
            'class token': lambda: models_vit.vit_tiny_patch8(num_classes=3),
            'probe': lambda: probe(models_vit.vit_tiny_patch8(num_classes=3)),
            'openmmlab': lambda: models_vit.vit_tiny_patch8(num_classes=3, global_pool=True)}[kind]
    tensors = save(make(), tmp_path / 'in.pth').state_dict()
    if kind == 'openmmlab':
        torch.save({'meta': {}, 'state_dict': formats.to_openmmlab(tensors)}, tmp_path / 'in.pth')
    command(tmp_path / 'in.pth', format, tmp_path / FORMATS[format])
    if format != 'safetensors':
        tensors = {name: v for name, v in tensors.items() if not name.startswith(('decoder_', 'mask_token'))}
    if format != 'safetensors' and kind == 'probe':
        tensors = export.fold_probe(tensors)
    file, read = read_weights(tmp_path / FORMATS[format])
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], value) for name, value in tensors.items())
    if format == 'openmmlab':
        assert file.keys() == {'meta', 'state_dict'}
        assert {'backbone.cls_token', 'backbone.layers.5.ffn.layers.0.0.bias'} < file['state_dict'].keys()


def test_safetensors_say_what_they_are(tmp_path):
    save(models_milan.mae_vit_tiny_patch8(), tmp_path / 'in.pth', model='mae_vit_tiny_patch8', mask_ratio=0.75, use_clip=False)
    command(tmp_path / 'in.pth', 'safetensors', tmp_path / 'out.safetensors')
    with safe_open(tmp_path / 'out.safetensors', 'pt') as f:  # and nothing of data_path
        assert f.metadata().keys() == {'format', 'epoch', 'model', 'mask_ratio', 'use_clip', '.sha256'}
        assert (f.metadata()['epoch'], f.metadata()['mask_ratio']) == ('7', '0.75')


def test_the_number_of_heads_is_the_models(tmp_path, capsys, monkeypatch):
    """Two models of one width: the checkpoint's own --model tells which it is."""
    monkeypatch.setitem(models_vit.MODELS, 'vit_mine', lambda: None)
    models_vit.MODELS['vit_mine'].keywords = dict(embed_dim=192, num_heads=6)
    model = save(models_vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=6, num_classes=3),
                 tmp_path / 'in.pth', model='vit_mine')
    command(tmp_path / 'in.pth', 'timm', tmp_path / 'out.pth')
    theirs, code = load_as_told(capsys)
    x = torch.randn(2, 3, 32, 32)
    assert 'num_heads=6' in code
    torch.testing.assert_close(theirs(x), model(x))


def test_a_checkpoint_of_timms(tmp_path, capsys):
    """timm's own file of weights, and a tensor in it that is a window onto a larger one: neither grows on the way."""
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=4)
    tensors = model.state_dict()
    tensors['head.bias'] = torch.arange(1e6)[:4]
    torch.save(tensors, tmp_path / 'in.pth')
    command(tmp_path / 'in.pth', 'timm', tmp_path / 'out.pth')
    assert (tmp_path / 'out.pth').stat().st_size < (tmp_path / 'in.pth').stat().st_size - 3_900_000
    assert torch.equal(load_as_told(capsys)[0].head.bias, torch.arange(4.0))


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp('tiny') / 'in.pth'
    save(models_vit.vit_tiny_patch8(num_classes=3), path)
    return path


def changed(tensors, **by_name):
    """``tensors`` with some replaced, or left out where the new value is None; '__' in a name stands for its dots."""
    tensors = {**tensors, **{name.replace('__', '.'): value for name, value in by_name.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize('change, message', [
    (dict(norm__weight=None), 'norm.weight is missing and should be [192]'),
    (dict(pos_embed=None), 'pos_embed is missing'),
    (dict(pos_embed=torch.zeros(1, 64, 192)), 'pos_embed is [1, 64, 192] and should be [1, 50, 192]'),
    (dict(blocks__3__mlp__fc1__weight=torch.zeros(10, 192)), 'blocks.3.mlp.fc1.weight is [10, 192] and should be [768, 192]'),
    (dict(blocks__0__ls1__gamma=torch.ones(192)), 'blocks.0.ls1.gamma is [192] and should not be there'),
    (dict(fc_norm__weight=torch.ones(192), fc_norm__bias=torch.ones(192)), 'norm.weight is [192] and should not be there'),
    (dict(head__weight=torch.ones(3, 100)), 'head.weight is [3, 100] and should be [3, 192]'),
    (dict(head__0__weight=torch.ones(3)), 'head.0.weight is [3] and should not be there'),
    (dict(patch_embed__proj__weight=torch.ones(192, 192)), 'not enough values'),
])
@pytest.mark.parametrize('format', ['timm', 'openmmlab'])
def test_not_a_plain_vit(change, message, format, tiny, tmp_path, capsys):
    torch.save(changed(read_weights(tiny)[1], **change), tmp_path / 'in.pth')
    with pytest.raises(SystemExit):
        command(tmp_path / 'in.pth', format, tmp_path / 'out.pth')
    error = capsys.readouterr().err
    assert error.startswith(f'error: {tmp_path}/in.pth is not a plain ViT, or not a whole one: ') and message in error
    assert error.count('\n') == 1 and [p.name for p in tmp_path.iterdir()] == ['in.pth']


def test_wrong_use(tiny, tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    (tmp_path / 'folder.pth').mkdir()
    torch.save({'visual.proj': torch.ones(2)}, tmp_path / 'clip.pth')
    save(models_vit.vit_tiny_patch8(num_classes=3, global_pool_wcls=True), tmp_path / 'wcls.pth', global_pool_wcls=True)
    (tmp_path / 'link.pth').symlink_to(tiny)
    for checkpoint, format, output, message in [
            (tmp_path / 'no.pth', 'timm', 'out.pth', 'no.pth does not exist'),
            (tmp_path / 'text.pth', 'timm', 'out.pth', 'text.pth cannot be read'),
            (tmp_path / 'clip.pth', 'safetensors', 'out.safetensors', 'no encoder is in it; its names are visual.proj, ...'),
            (tmp_path / 'wcls.pth', 'openmmlab', 'out.pth', 'OpenMMLab pools without the class token'),
            (tiny, 'onnx', 'out.pth', "invalid choice: 'onnx' (choose from"),
            (tiny, 'safetensors', 'out.pth', 'ends in .safetensors'),
            (tiny, 'openmmlab', 'out.safetensors', 'ends in .pth or .pt'),
            (tiny, 'timm', 'no/folder/out.pth', 'no/folder; create it first'),
            (tiny, 'timm', 'folder.pth', 'is a folder; name a file'),
            (tiny, 'timm', tiny, 'is the checkpoint itself; name another file'),
            (tiny, 'timm', 'link.pth', 'is the checkpoint itself; name another file')]:
        before = sorted(tmp_path.iterdir()), tiny.read_bytes()
        with pytest.raises(SystemExit) as e:
            command(checkpoint, format, tmp_path / output)
        out, error = capsys.readouterr()
        assert message in error and error.startswith('error: ') and error.count('\n') == 1 and not out and e.value.code
        assert before == (sorted(tmp_path.iterdir()), tiny.read_bytes())


@pytest.mark.parametrize('output', ['out.pth', 'out.safetensors'])
def test_a_full_disk_leaves_what_was_there(output, tiny, tmp_path, capsys):
    (tmp_path / output).write_text('older')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit):
            command(tiny, 'timm', tmp_path / output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f'{output} could not be written (disk full?)' in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(output, 'older')]


def test_as_a_command(tiny, tmp_path):
    result = run_process(sys.executable, 'tools/export.py', tiny, '--format', 'openmmlab', '--output', tmp_path / 'out.pth')
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"""{tmp_path}/out.pth: 80 tensors, 2.7 M parameters; left out: nothing. To load it:

load_from = '{tmp_path}/out.pth'
"""
