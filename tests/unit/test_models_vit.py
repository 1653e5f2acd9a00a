"""Pooling and freezing of the classifier; its numbers are tested in test_golden.py."""

import pytest
import torch

import models_vit


def test_pooling():
    """The class token, the mean of the patches, and the mean of all tokens."""
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    token = models_vit.vit_tiny_patch8(num_classes=5).eval()
    tokens = {}
    token.blocks.register_forward_hook(lambda module, inputs, output: tokens.update(last=output))
    out = token(x)
    last = tokens['last']
    torch.testing.assert_close(out, token.head(token.norm(last)[:, 0]))
    weights = {f'fc_{k}' if k.startswith('norm.') else k: v for k, v in token.state_dict().items()}
    means = {'global_pool': last[:, 1:].mean(1), 'global_pool_wcls': last.mean(1)}
    for flag, mean in means.items():
        pooled = models_vit.vit_tiny_patch8(num_classes=5, **{flag: True}).eval()
        pooled.load_state_dict(weights)
        torch.testing.assert_close(pooled(x), token.head(token.norm(mean)))


def test_image_size_must_fit_the_patches():
    with pytest.raises(ValueError, match='not a multiple'):
        models_vit.vit_base_patch16(img_size=100)


def test_frozen_encoder():
    """It gets no gradients and stays in eval mode; the head trains."""
    model = models_vit.vit_tiny_patch8(num_classes=3, drop_path_rate=0.5)
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(192, affine=False), model.head)
    model.freeze_encoder().train()
    assert not model.blocks[3].training and not model.norm.training and model.head[0].training
    x = torch.randn(4, 3, 64, 64)
    features = []
    model.head[0].register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    model(x).sum().backward()
    assert not features[0].requires_grad
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {'head.1.weight', 'head.1.bias'}
    model(x)
    assert torch.equal(features[0], features[1])  # without stochastic depth
    assert not model.eval().head[0].training
