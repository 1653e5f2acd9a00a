"""The pretraining model: the family of methods, inputs and outputs, the registry."""

import itertools

import pytest
import torch

import models_milan
from models_milan import MODELS, MaskedAutoencoderViT
from tests.helpers import ok, pretrain

TINY = dict(
    img_size=32,
    patch_size=8,
    embed_dim=48,
    depth=1,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=4,
)
SWITCHES = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize('mask_ratio', [0.0, 0.6, 0.75, 0.9])
@pytest.mark.parametrize('use_clip, change_decoder, attn_mask', SWITCHES)
def test_every_combination_of_target_decoder_and_mask(
    use_clip, change_decoder, attn_mask, mask_ratio
):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        **TINY, use_clip=use_clip, change_decoder=change_decoder, attn_mask=attn_mask, target_dim=24
    )
    imgs = torch.randn(2, 3, 32, 32)
    importance = torch.zeros(2, 16)
    importance[:, :8] = 1.0
    teacher_out = (torch.randn(2, 17, 24), importance)
    if mask_ratio == 0 and not use_clip:
        with pytest.raises(ValueError, match='mask_ratio 0.0'):
            model(imgs, mask_ratio, teacher_out)
        return
    loss, pred, mask = model(imgs, mask_ratio, teacher_out)
    visible = int(16 * (1 - mask_ratio))
    assert torch.isfinite(loss) and loss.ndim == 0
    assert pred.shape == ((2, 17, 24) if use_clip else (2, 16, 192))
    assert ((mask == 0) | (mask == 1)).all() and (mask.sum(1) == 16 - visible).all()
    if attn_mask and visible <= 8:
        assert (mask[:, 8:] == 1).all()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_encoder_sees_only_visible_patches_and_pixel_loss_only_masked_ones():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**TINY).double()
    imgs, ids = torch.randn(1, 3, 32, 32).double(), torch.randperm(16)[None]
    _, pred, mask = model(imgs, 0.75, ids_shuffle=ids)
    patches = model.patchify(imgs)
    other = model.unpatchify(torch.where(mask[..., None] == 1, torch.randn_like(patches), patches))
    loss, pred_other, _ = model(other, 0.75, ids_shuffle=ids)
    torch.testing.assert_close(pred, pred_other)
    expected = (((pred - model.patchify(other)) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected)


def test_patchify_and_unpatchify():
    model, imgs = MaskedAutoencoderViT(**TINY), torch.randn(2, 3, 32, 32)
    patches = model.patchify(imgs)
    assert torch.equal(model.unpatchify(patches), imgs)
    assert torch.equal(patches[0, 6].view(8, 8, 3), imgs[0, :, 8:16, 16:24].permute(1, 2, 0))


def test_errors():
    with pytest.raises(ValueError, match='target_dim'):
        MaskedAutoencoderViT(**TINY, use_clip=True)
    with pytest.raises(ValueError, match='not a multiple'):
        MaskedAutoencoderViT(img_size=225)
    imgs = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match='tokens'):
        MaskedAutoencoderViT(**TINY, use_clip=True, target_dim=24)(imgs)
    with pytest.raises(ValueError, match='importance'):
        MaskedAutoencoderViT(**TINY, attn_mask=True)(imgs)


def test_initialization():
    """Xavier uniform and zero biases, norms at 1 and 0, tokens with std 0.02, fixed tables."""
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


def test_registry_holds_short_and_long_names():
    sizes = dict(small_patch16=384, base_patch16=768, large_patch16=1024, huge_patch14=1280)
    for size, width in sizes.items():
        name = f'mae_vit_{size}'
        with torch.device('meta'):
            model = MODELS[name]()
        assert model.cls_token.shape[-1] == width
        assert model.patch_embed.patch_size == (int(name[-2:]),) * 2
        for choice in (name, f'{name}_dec512d8b'):
            assert MODELS[choice] is getattr(models_milan, choice) is MODELS[name]


def test_plain_function_is_a_model(milan_flags, monkeypatch, tmp_path):
    def mine(**kwargs):
        return MaskedAutoencoderViT(**{**TINY, **kwargs})

    monkeypatch.setitem(MODELS, 'mine', mine)
    ok(pretrain(*milan_flags, '--model', 'mine', '--epochs', 1, '--log_dir', ''))
    state_dict = torch.load(tmp_path / 'out' / 'checkpoint-0.pth', weights_only=False)['model']
    assert state_dict['decoder_pred.weight'].shape == (48, 32)
