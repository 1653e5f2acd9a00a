"""hubconf.py: the encoders as other code takes them."""

import hashlib
import sys

import pytest
import torch
from conftest import ROOT, run
from timm.models._features import FeatureGetterNet

import models_vit
from tools.download import FILES
from util.checkpoint import load
from util.errors import UserError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def hub(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source='local', **kwargs)


def test_the_encoder_of_a_checkpoint(pretrained, capsys):
    model = hub('vit_tiny_patch8', checkpoint=str(pretrained)).eval()
    weights = load(pretrained)['model']
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert 'missing, start anew: none' in capsys.readouterr().out
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(IMAGES)], dim=1) + model.pos_embed
    blocks = [x := block(x) for block in model.blocks]
    tokens = model.norm(x)
    torch.testing.assert_close(model.forward_features(IMAGES), tokens)
    torch.testing.assert_close(model(IMAGES), tokens[:, 0])

    def as_map(x):
        return x[:, 1:].transpose(1, 2).reshape(2, 192, 8, 8)

    last, maps = model.forward_intermediates(IMAGES, indices=[1, 5])
    torch.testing.assert_close([last, *maps], [tokens, as_map(blocks[1]), as_map(blocks[5])])
    layers = model.get_intermediate_layers(IMAGES, 2, reshape=True, norm=True)
    torch.testing.assert_close(list(layers), [as_map(model.norm(x)) for x in blocks[4:]])


def test_a_backbone(pretrained):
    """What detection and segmentation take: maps of several depths of a picture of any shape, and gradients through them."""
    net = FeatureGetterNet(hub('vit_tiny_patch8', checkpoint=str(pretrained), dynamic_img_size=True), out_indices=[1, 3, 4])
    assert net.feature_info.channels() == [192] * 3 and net.feature_info.reduction() == [8] * 3
    maps = net(torch.randn(1, 3, 80, 120))
    assert [m.shape for m in maps] == [(1, 192, 10, 15)] * 3
    sum(m.square().sum() for m in maps).backward()
    assert net.model.patch_embed.proj.weight.grad.any() and len(net.model.blocks) == 5  # what nobody asked for is cut off


def test_arguments(pretrained):
    model = hub('vit_tiny_patch8', checkpoint=str(pretrained), img_size=32, num_classes=7, global_pool=True)
    assert model(IMAGES[:, :, :32, :32]).shape == (2, 7) and model.pos_embed.shape == (1, 17, 192)
    assert not torch.equal(hub('vit_tiny_patch8').blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_downloaded_file(pretrained, tmp_path, monkeypatch):
    """By a name of tools/download.py, where torch.hub keeps its files: it is there already, or this would ask port 9."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    name = f'tiny-{hashlib.sha256(pretrained.read_bytes()).hexdigest()[:8]}.pth'
    entry = dict(url=f'http://127.0.0.1:9/{name}', tensors=lambda: {'cls_token': torch.empty(1, 1, 192)})
    monkeypatch.setitem(FILES, 'tiny', entry)
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    (tmp_path / 'hub' / 'checkpoints' / name).write_bytes(pretrained.read_bytes())
    assert torch.equal(hub('vit_tiny_patch8', checkpoint='tiny').norm.weight, load(pretrained)['model']['norm.weight'])


def test_wrong_use(pretrained):
    with pytest.raises(UserError, match='checkpoint nowhere.pth is neither a file nor one of milan_vit_base, '):
        hub('vit_base_patch16', checkpoint='nowhere.pth')
    with pytest.raises(UserError, match='does not fit --model vit_small_patch16'):
        hub('vit_small_patch16', checkpoint=str(pretrained))
    with pytest.raises(ValueError, match='not a multiple'):
        hub('vit_tiny_patch8', img_size=36)


def test_from_another_project(tmp_path):
    """In a fresh interpreter, elsewhere; a project with its own util is told what is the matter."""
    load_it = (f'import torch; model = torch.hub.load({str(ROOT)!r}, "vit_tiny_patch8", source="local"); '
               'print(model(torch.zeros(1, 3, 64, 64)).shape)')
    result = run(sys.executable, '-c', load_it, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == 'torch.Size([1, 192])\n', result.stderr
    (tmp_path / 'util.py').write_text('')
    result = run(sys.executable, '-c', f'import util; {load_it}', cwd=tmp_path)
    assert f'{tmp_path}/util.py is already imported under the name util' in result.stderr


def test_nothing_but_models_is_offered():
    hubconf = torch.hub._import_module('hubconf', str(ROOT / 'hubconf.py'))
    offered = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')}
    assert offered == set(models_vit.MODELS) and 'vit_base_patch16' in offered
    assert hubconf.vit_base_patch16.__doc__.startswith('vit_base_patch16: ')
