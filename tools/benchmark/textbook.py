"""The textbook formulation of MILAN's pretraining step, which ``step`` compares with ours.

These are the formulas as one would first write them down, on the parameters of our model. Every
attention matrix is materialized. All patches are embedded before most of them are dropped.
Every decoder block restores the image order of its tokens. The teacher computes whole attention
matrices and uses one row. The optimizer updates one parameter after the other, and every step
waits for the device. Nothing here is meant to be fast, and nothing is slow on purpose.
"""

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from util.masking import count_visible, patch_order, take


# q [N, H, M, d], k and v [N, H, T, d] -> output [N, M, H*d], attention matrices [N, H, M, T].
def _attention(q, k, v):
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


# The output of a joint projection [N, T, parts*H*d] -> [parts, N, H, T, d].
def _split_heads(x, parts, heads):
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


# Restore the image order of the patches in [N, L+1, D]. The class token stays first.
def _image_order(tokens, ids_restore):
    return torch.cat([tokens[:, :1], take(tokens[:, 1:], ids_restore)], dim=1)


# Images [N, 3, H, W], visible patches ids_keep [N, K] -> latent [N, K+1, D], class token first.
def _encode(model, imgs, ids_keep):
    x = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls_token, take(x, ids_keep)], dim=1)
    for block in model.blocks:
        q, k, v = _split_heads(block.attn.qkv(block.norm1(x)), 3, block.attn.num_heads)
        x = x + block.attn.proj(_attention(q, k, v)[0])
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


# The prompting decoder: latent [N, K+1, D] and ids_shuffle [N, L], of which the first ``visible``
# patches are visible -> prediction [N, L+1, target_dim] in image order, class token first.
def _decode(model, latent, ids_shuffle, visible):
    ids_keep, ids_masked = ids_shuffle[:, :visible], ids_shuffle[:, visible:]
    ids_restore = ids_shuffle.argsort(dim=1)
    mask_tokens = model.mask_token.expand(*ids_masked.shape, -1)
    tokens = torch.cat([model.decoder_embed(latent), mask_tokens], dim=1)
    tokens = _image_order(tokens, ids_restore) + model.decoder_pos_embed
    encoder_tokens = torch.cat([tokens[:, :1], take(tokens[:, 1:], ids_keep)], dim=1)
    x = take(tokens[:, 1:], ids_masked)
    for block in model.decoder_blocks:
        both = _image_order(torch.cat([encoder_tokens, block.norm1(x)], dim=1), ids_restore)
        heads = block.attn.num_heads
        (q,) = _split_heads(block.attn.q(take(both[:, 1:], ids_masked)), 1, heads)
        k, v = _split_heads(block.attn.kv(both), 2, heads)
        x = x + block.attn.proj(_attention(q, k, v)[0])
        x = x + block.mlp(block.norm2(x))
    tokens = _image_order(torch.cat([encoder_tokens, x], dim=1), ids_restore)
    return model.decoder_pred(model.decoder_norm(tokens))


def milan_loss(
    model: nn.Module,
    imgs: Tensor,
    target: Tensor,
    ids_shuffle: Tensor,
    mask_ratio: float = 0.75,
) -> Tensor:
    """Compute the loss, a scalar.

    Args:
        model: a MaskedAutoencoderViT with use_clip and change_decoder.
        imgs: [N, 3, H, W], normalized.
        target: the teacher's tokens [N, L+1, target_dim].
        ids_shuffle: order of the patches [N, L], visible ones first.
        mask_ratio: fraction of masked patches.
    """
    visible = count_visible(ids_shuffle.shape[1], mask_ratio)
    latent = _encode(model, imgs, ids_shuffle[:, :visible])
    pred = _decode(model, latent, ids_shuffle, visible)
    pred, target = (F.normalize(x.to(imgs.dtype), dim=-1) for x in (pred, target))
    return (2 - 2 * (pred * target).sum(dim=-1)).mean()


@torch.no_grad()
def encode_tokens(visual: nn.Module, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Run CLIP's image tower ``visual`` on images [N, 3, R, R].

    Returns:
        tokens [N, L+1, output_dim] and importance [N, L].
    """
    x = visual.conv1(imgs).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks:
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        y, weights = _attention(*_split_heads(qkv, 3, block.attn.heads))
        x, matrix = x + block.attn.out_proj(y), weights.mean(dim=1)
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    return visual.ln_post(x) @ visual.proj, matrix[:, 0, 1:]


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.05
) -> torch.optim.Optimizer:
    """Build AdamW that loops over parameters, with the published betas and groups."""
    return torch.optim.AdamW(
        param_groups_weight_decay(model, weight_decay),
        lr=lr,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )


def train_step(
    model: nn.Module,
    visual: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    imgs: Tensor,
    noise: Tensor,
    dtype: torch.dtype | None = None,
    mask_ratio: float = 0.75,
) -> float:
    """Update ``model`` once.

    Args:
        model: a MaskedAutoencoderViT with use_clip and change_decoder.
        visual: CLIP's image tower, the teacher.
        optimizer: see ``build_optimizer``.
        scaler: enabled for fp16.
        imgs: [N, 3, H, W], normalized.
        noise: [N, L], uniform in (0, 1); see util.masking.patch_order.
        dtype: for autocast. None: no autocast.
        mask_ratio: fraction of masked patches.

    Returns:
        The loss.
    """
    with torch.autocast(imgs.device.type, dtype=dtype, enabled=dtype is not None):
        target, importance = encode_tokens(visual, imgs)
        loss = milan_loss(model, imgs, target, patch_order(noise, importance), mask_ratio)
    value = loss.item()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    # the norm of the gradients, as in the published loop
    torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    scaler.step(optimizer)
    scaler.update()
    if imgs.is_cuda:
        torch.cuda.synchronize()
    return value
