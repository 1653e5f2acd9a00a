"""Semantic aware masking: the distribution of the draws, and where their randomness comes from."""

import itertools

import pytest
import torch

from models_milan import MaskedAutoencoderViT, patch_order
from util.seeding import sample_noise, seed_of, seeded

TINY = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, decoder_embed_dim=32, decoder_depth=1,
            decoder_num_heads=4)


def sequential_inclusion(weights, k):
    """Exact probability of each item to be among k draws one by one without replacement, each in proportion to what is left."""
    inclusion = torch.zeros(len(weights), dtype=torch.float64)
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        inclusion[list(order)] += probability
    return inclusion


@pytest.mark.parametrize('weights, k', [([0.5, 0.25, 0.125, 0.08, 0.04, 0.005], 3), ([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], 2)])
def test_inclusion_probabilities(weights, k):
    n = 200_000
    expected = sequential_inclusion(weights, k)
    noise = sample_noise(0, 0, torch.arange(n), len(weights))
    ids = patch_order(noise, torch.tensor([weights]).expand(n, -1))[:, :k]
    observed = torch.bincount(ids.flatten(), minlength=len(weights)).double() / n
    deviation = (observed - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviation.abs().max() < 4.5, deviation  # standard errors; one in 100,000 correct runs would exceed that
    # the test has teeth: drawing in proportion to the square root of the importance is noticed
    wrong = patch_order(noise, torch.tensor([weights]).sqrt().expand(n, -1))[:, :k]
    wrong = torch.bincount(wrong.flatten(), minlength=len(weights)).double() / n
    assert ((wrong - expected) / (expected * (1 - expected) / n).sqrt()).abs().max() > 20


def test_order_of_the_draws():
    """Not only who is drawn but when: first and second draw of three."""
    n, weights = 200_000, [0.6, 0.3, 0.1]
    ids = patch_order(sample_noise(1, 0, torch.arange(n), 3), torch.tensor([weights]).expand(n, -1))
    for order in itertools.permutations(range(3)):
        expected = weights[order[0]] * weights[order[1]] / (1 - weights[order[0]])
        observed = (ids == torch.tensor(order)).all(1).double().mean().item()
        assert abs(observed - expected) < 4.5 * (expected * (1 - expected) / n) ** 0.5


def test_zero_importance():
    """Never drawn before the others, and in random order once only they are left."""
    importance = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]]).expand(9000, -1)
    ids = patch_order(sample_noise(0, 0, torch.arange(9000), 5), importance)
    assert (ids.sort(1).values == torch.arange(5)).all()
    assert set(ids[:, :2].flatten().tolist()) == {1, 3}
    share = torch.bincount(ids[:, 2], minlength=5)[[0, 2, 4]] / 9000
    assert (share - 1 / 3).abs().max() < 0.03


def test_uniform_without_importance():
    n = 100_000
    ids = patch_order(sample_noise(0, 0, torch.arange(n), 8))[:, :2]
    observed = torch.bincount(ids.flatten(), minlength=8).double() / n
    assert (observed - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / n) ** 0.5


def test_noise_is_a_function_of_seed_epoch_and_sample():
    samples = torch.tensor([5, 3, 900_000_000])
    noise = sample_noise(7, 2, samples, 196)
    assert noise.dtype == torch.float32 and 0 < noise.min() and noise.max() < 1
    assert torch.equal(noise[1], sample_noise(7, 2, torch.tensor([3]), 196)[0])
    for other in (sample_noise(8, 2, samples, 196), sample_noise(7, 3, samples, 196)):
        assert not (other == noise).all(dim=1).any()
    x = sample_noise(0, 0, torch.arange(50_000), 4).double()
    assert (x.mean(0) - 0.5).abs().max() < 0.006 and (x.var(0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(x.T) - torch.eye(4)).abs().max() < 0.02


def test_seeded_puts_generators_back():
    import random
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    with seeded('a', 1):
        first = torch.rand(3)
    assert (torch.rand(1), random.random()) == expected
    with seeded('a', 1):
        assert torch.equal(first, torch.rand(3))
    assert seed_of('a', 1) != seed_of('a', 2) and 0 <= seed_of('a') < 2**63


@pytest.mark.parametrize('mask_ratio', [0.0, 0.6, 0.75, 0.9])
@pytest.mark.parametrize('use_clip, change_decoder, attn_mask', list(itertools.product([False, True], repeat=3)))
def test_the_whole_family(use_clip, change_decoder, attn_mask, mask_ratio):
    if mask_ratio == 0 and not use_clip:
        pytest.skip('no masked pixels, no loss')
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**TINY, use_clip=use_clip, change_decoder=change_decoder, attn_mask=attn_mask, target_dim=24)
    imgs = torch.randn(2, 3, 32, 32)
    importance = torch.zeros(2, 16)
    importance[:, :8] = 1.0
    loss, pred, mask = model(imgs, mask_ratio, (torch.randn(2, 17, 24), importance))
    visible = int(16 * (1 - mask_ratio))
    assert torch.isfinite(loss) and loss.ndim == 0
    assert pred.shape == ((2, 17, 24) if use_clip else (2, 16, 192))
    assert ((mask == 0) | (mask == 1)).all() and (mask.sum(1) == 16 - visible).all()
    if attn_mask and visible <= 8:
        assert (mask[:, 8:] == 1).all()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_encoder_sees_visible_patches_only_and_the_loss_masked_pixels_only():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**TINY).double()
    imgs, ids = torch.randn(1, 3, 32, 32).double(), torch.randperm(16)[None]
    _, pred, mask = model(imgs, 0.75, ids_shuffle=ids)
    patches = model.patchify(imgs)
    assert torch.equal(model.unpatchify(patches), imgs)
    assert torch.equal(patches[0, 6].view(8, 8, 3), imgs[0, :, 8:16, 16:24].permute(1, 2, 0))
    other = model.unpatchify(torch.where(mask[..., None] == 1, torch.randn_like(patches), patches))
    loss, pred_other, _ = model(other, 0.75, ids_shuffle=ids)
    torch.testing.assert_close(pred, pred_other)
    target = model.patchify(other)
    expected = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected)


def test_constructor_errors():
    with pytest.raises(ValueError, match='target_dim'):
        MaskedAutoencoderViT(**TINY, use_clip=True)
    with pytest.raises(ValueError, match='not a multiple'):
        MaskedAutoencoderViT(img_size=225)


def test_initialisation():
    """Xavier uniform and zero biases, norms at 1 and 0, tokens with deviation 0.02, sine-cosine tables."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(img_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3)
    bound = (6 / (192 + 3 * 64)) ** 0.5
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    bound = (6 / (192 + 576)) ** 0.5
    assert 0.95 * bound < model.blocks[1].attn.qkv.weight.abs().max() <= bound
    assert abs(model.mask_token.std() - 0.02) < 0.003 and abs(model.cls_token.std() - 0.02) < 0.004
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        if 'norm' in name and name.endswith('weight'):
            assert (p == 1).all(), name
    assert (model.pos_embed[:, 0] == 0).all() and not model.pos_embed.requires_grad
