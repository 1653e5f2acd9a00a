"""hubconf.py: encoders for other code, through torch.hub."""

import hashlib
import sys

import pytest
import torch
from timm.models._features import FeatureGetterNet

import models_vit
from models_milan import mae_vit_tiny_patch8
from models_released import FILES, ReleasedFile
from tests.helpers import ROOT, ok, run
from util.errors import UserError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def weights():
    """All tensors of a pretraining model."""
    return {
        k: v + 0.02 * torch.randn_like(v) for k, v in mae_vit_tiny_patch8().state_dict().items()
    }


@pytest.fixture(scope='module')
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('hub') / 'checkpoint.pth'
    torch.save({'model': weights}, path)
    return str(path)


def hub(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source='local', **kwargs)


def test_encoder_of_a_checkpoint(checkpoint, weights):
    model = hub('vit_tiny_patch8', checkpoint=checkpoint).eval()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    patches = model.patch_embed(IMAGES)
    x = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1) + model.pos_embed
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


def test_backbone(checkpoint):
    """As in detection and segmentation: maps of several blocks, any image shape, gradients."""
    encoder = hub('vit_tiny_patch8', checkpoint=checkpoint, dynamic_img_size=True)
    net = FeatureGetterNet(encoder, out_indices=[1, 3, 4])
    assert net.feature_info.channels() == [192] * 3 and net.feature_info.reduction() == [8] * 3
    maps = net(torch.randn(1, 3, 80, 120))
    assert [m.shape for m in maps] == [(1, 192, 10, 15)] * 3
    sum(m.square().sum() for m in maps).backward()
    assert net.model.patch_embed.proj.weight.grad.any()
    assert len(net.model.blocks) == 5  # unused blocks are removed


def test_arguments(checkpoint):
    options = dict(img_size=32, num_classes=7, global_pool=True)
    model = hub('vit_tiny_patch8', checkpoint=checkpoint, **options)
    assert model(IMAGES[:, :, :32, :32]).shape == (2, 7) and model.pos_embed.shape == (1, 17, 192)
    first, second = (m.blocks[0].attn.qkv.weight for m in (hub('vit_tiny_patch8'), model))
    assert not torch.equal(first, second)


def test_released_checkpoint_by_name(checkpoint, weights, tmp_path, monkeypatch):
    """A file that is in torch.hub's folder already is not downloaded: port 9 does not answer."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    with open(checkpoint, 'rb') as f:
        content = f.read()
    name = f'tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    (folder / name).write_bytes(content)
    tensors = {'cls_token': torch.empty(1, 1, 192)}
    file = ReleasedFile('tiny', lambda: tensors, url=f'http://127.0.0.1:9/{name}')
    monkeypatch.setitem(FILES, 'tiny', file)
    model = hub('vit_tiny_patch8', checkpoint='tiny')
    assert torch.equal(model.norm.weight, weights['norm.weight'])


def test_errors(checkpoint):
    with pytest.raises(UserError, match='nowhere.pth.*milan_vit_base'):
        hub('vit_tiny_patch8', checkpoint='nowhere.pth')
    with pytest.raises(UserError, match='vit_small_patch16'):
        hub('vit_small_patch16', checkpoint=checkpoint)
    with pytest.raises(ValueError, match='36'):
        hub('vit_tiny_patch8', img_size=36)


LOAD = f"""
import torch
model = torch.hub.load({str(ROOT)!r}, "vit_tiny_patch8", source="local")
print(model(torch.zeros(1, 3, 64, 64)).shape)
"""


@pytest.mark.slow
def test_from_another_project(tmp_path):
    result = run(sys.executable, '-c', LOAD, cwd=tmp_path)
    assert ok(result) == 'torch.Size([1, 192])\n'


@pytest.mark.slow
def test_project_with_its_own_util(tmp_path):
    (tmp_path / 'util.py').write_text('')
    result = run(sys.executable, '-c', f'import util{LOAD}', cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith('ImportError: ') and f'{tmp_path}/util.py' in last


def test_all_models_and_nothing_else_are_offered():
    hubconf = torch.hub._import_module('hubconf', str(ROOT / 'hubconf.py'))
    public = [name for name in dir(hubconf) if not name.startswith('_')]
    assert {name for name in public if callable(getattr(hubconf, name))} == set(models_vit.MODELS)
    assert 'vit_base_patch16' in hubconf.vit_base_patch16.__doc__
