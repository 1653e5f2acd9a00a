"""models_infer.py: which plain ViT a state dict belongs to."""

import pytest
import torch
import torch.nn as nn

import models_infer
import models_milan
import models_vit
from models_infer import classifier_tensors, fold_probe, infer_arguments


def probe_of(dim, classes):
    """The head of main_linprobe.py after it has seen data."""
    norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
    norm.running_mean.uniform_(-2, 2)
    norm.running_var.uniform_(1e-7, 3)  # the smallest are below eps
    return nn.Sequential(norm, nn.Linear(dim, classes))


def test_folded_probe_is_exact():
    head = nn.ModuleDict({'head': probe_of(48, 5)}).double().eval()
    folded = classifier_tensors(head.state_dict())
    x = torch.randn(20, 48, dtype=torch.float64)
    logits = x @ folded['head.weight'].T + folded['head.bias']
    torch.testing.assert_close(logits, head['head'](x), rtol=1e-12, atol=1e-12)
    assert folded.keys() == {'head.weight', 'head.bias'}
    assert fold_probe(head.state_dict()).keys() == folded.keys()


@pytest.mark.parametrize('name', ['tiny_patch8', 'base_patch16', 'huge_patch14'])
def test_arguments_of_known_models(name):
    """They rebuild the encoder; the number of heads is right even if the name is not known."""
    with torch.device('meta'):
        model = models_milan.MODELS[f'mae_vit_{name}']()
    tensors = classifier_tensors(model.state_dict())
    arguments = infer_arguments(tensors)
    assert arguments == infer_arguments(tensors, f'mae_vit_{name}')
    assert arguments == infer_arguments(tensors, f'vit_{name}')
    assert arguments['num_heads'] == model.blocks[0].attn.num_heads
    assert arguments['depth'] == len(model.blocks) and arguments['mlp_ratio'] == 4
    assert arguments['patch_size'] == model.patch_embed.patch_size[0]
    assert arguments['img_size'] == model.patch_embed.img_size[0]


def test_number_of_heads_of_a_model_that_is_a_plain_function(monkeypatch):
    """The name decides between two models of one width."""

    def vit_mine(**kwargs):
        return models_vit.vit_tiny_patch8(**{'num_heads': 6, **kwargs})

    monkeypatch.setitem(models_vit.MODELS, 'vit_mine', vit_mine)
    tensors = classifier_tensors(vit_mine(num_classes=3).state_dict())
    assert infer_arguments(tensors, 'vit_mine')['num_heads'] == 6
    assert infer_arguments(tensors)['num_heads'] == 3


@pytest.fixture(scope='module')
def tensors():
    return models_vit.vit_tiny_patch8(num_classes=3).state_dict()


@pytest.mark.parametrize(
    'name, value, reason',
    [
        ('norm.weight', None, 'norm.weight is missing'),
        ('pos_embed', None, 'pos_embed is missing'),
        ('pos_embed', torch.zeros(1, 64, 192), '[1, 64, 192]'),
        ('blocks.3.mlp.fc1.weight', torch.zeros(10, 192), '[10, 192]'),
        ('blocks.0.ls1.gamma', torch.ones(192), 'blocks.0.ls1.gamma'),
        ('reg_token', torch.ones(1, 4, 192), 'reg_token'),
        ('fc_norm.weight', torch.ones(192), 'fc_norm.bias is missing'),
        ('head.weight', torch.ones(3, 100), '[3, 100]'),
        ('head.0.weight', torch.ones(3), 'head.0.weight'),
        ('patch_embed.proj.weight', torch.ones(192, 192), 'not enough values'),
    ],
)
def test_not_a_plain_vit(name, value, reason, tensors):
    tensors = {**tensors, name: value}
    with pytest.raises(ValueError) as error:
        infer_arguments({k: v for k, v in tensors.items() if v is not None})
    assert reason in str(error.value)


def test_only_the_classifier_is_kept(tensors):
    others = {'decoder_embed.weight': torch.ones(2), 'mask_token': torch.ones(1)}
    assert classifier_tensors({**tensors, **others}).keys() == tensors.keys()
    assert set(models_infer.PROBE).isdisjoint(tensors)
