"""The attentive probe against its formula; training is tested in scripts/test_linprobe.py."""

import torch

import models_vit
from models_probe import PROBES


def test_attentive_probe():
    model = models_vit.vit_tiny_patch8(num_classes=5)
    model.head = PROBES['attentive'](model)
    model.freeze_encoder(head_takes_tokens=True).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed(x))))[:, 1:]
    pool, classifier = model.head
    query = (pool.latent[0] @ pool.q.weight.T + pool.q.bias).reshape(3, 64)
    keys, values = (tokens @ pool.kv.weight.T + pool.kv.bias).reshape(2, 64, 2, 3, 64).unbind(2)
    weights = (torch.einsum('hc,nlhc->nhl', query, keys) / 8).softmax(2)
    pooled = torch.einsum('nhl,nlhc->nhc', weights, values).flatten(1)
    pooled = pooled @ pool.proj.weight.T + pool.proj.bias
    pooled = pooled + pool.mlp(pool.norm(pooled))
    torch.testing.assert_close(model(x), pooled @ classifier.weight.T + classifier.bias)
    model.train()(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith('head.')}
    assert not model.blocks.training and model.head.training
