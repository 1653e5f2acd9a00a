"""The textbook formulation of MILAN's pretraining step: tools/benchmark.py measures ours against it.

The formulas as one would first write them down, over the same parameters under the same names: every attention matrix is
written out, all patches are embedded before most of them are dropped, every decoder block puts its tokens back into image
order, the teacher computes whole attention matrices for the sake of one row, the weights are updated one parameter after the
other, and every step waits for the device. Nothing here is meant to be fast, and nothing is slow on purpose.
"""

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from models_milan import MaskedAutoencoderViT, count_visible, patch_order


def attention(q, k, v):
    """q [N, H, M, d], k and v [N, H, T, d] -> output [N, M, H*d] and the attention matrices [N, H, M, T]."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def split_heads(x, parts, heads):
    """x [N, T, parts*H*d], the output of a joint projection -> [parts, N, H, T, d], to be unpacked."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def rows(x, ids):
    """Rows ``ids`` [N, K] of x [N, L, D] -> [N, K, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def image_order(tokens, ids_restore):
    """tokens [N, L+1, D]: class token, then patches in the order drawn -> class token, then patches in image order."""
    return torch.cat([tokens[:, :1], rows(tokens[:, 1:], ids_restore)], dim=1)


def mlp(block, x):
    return block.mlp.fc2(F.gelu(block.mlp.fc1(x)))


class TextbookMilan(MaskedAutoencoderViT):
    """Takes the arguments and the state dict of MaskedAutoencoderViT with use_clip, change_decoder and attn_mask."""

    def encode(self, imgs, ids_keep):
        """imgs [N, 3, H, W], visible patches ids_keep [N, K] -> latent [N, K+1, D], class token first."""
        x = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, rows(x, ids_keep)], dim=1)
        for block in self.blocks:
            q, k, v = split_heads(block.attn.qkv(block.norm1(x)), 3, block.attn.num_heads)
            x = x + block.attn.proj(attention(q, k, v)[0])
            x = x + mlp(block, block.norm2(x))
        return self.norm(x)

    def decode(self, latent, ids_keep, ids_masked, ids_restore):
        """latent [N, K+1, D] -> prediction [N, L+1, target_dim] in image order, class token first."""
        mask_tokens = self.mask_token.expand(*ids_masked.shape, -1)
        tokens = torch.cat([self.decoder_embed(latent), mask_tokens], dim=1)
        tokens = image_order(tokens, ids_restore) + self.decoder_pos_embed
        fixed = torch.cat([tokens[:, :1], rows(tokens[:, 1:], ids_keep)], dim=1)
        x = rows(tokens[:, 1:], ids_masked)
        for block in self.decoder_blocks:
            both = image_order(torch.cat([fixed, block.norm1(x)], dim=1), ids_restore)
            heads = block.attn.num_heads
            q, = split_heads(block.attn.q(rows(both[:, 1:], ids_masked)), 1, heads)
            k, v = split_heads(block.attn.kv(both), 2, heads)
            x = x + block.attn.proj(attention(q, k, v)[0])
            x = x + mlp(block, block.norm2(x))
        tokens = image_order(torch.cat([fixed, x], dim=1), ids_restore)
        return self.decoder_pred(self.decoder_norm(tokens))

    def forward(self, imgs, target, ids_shuffle, mask_ratio=0.75):
        """Scalar loss of images [N, 3, H, W], teacher's tokens [N, L+1, target_dim] and the patches' order [N, L] int64."""
        visible = count_visible(ids_shuffle.shape[1], mask_ratio)
        ids_keep, ids_masked = ids_shuffle[:, :visible], ids_shuffle[:, visible:]
        pred = self.decode(self.encode(imgs, ids_keep), ids_keep, ids_masked, ids_shuffle.argsort(dim=1))
        pred, target = F.normalize(pred.to(imgs.dtype), dim=-1), F.normalize(target.to(imgs.dtype), dim=-1)
        return (2 - 2 * (pred * target).sum(dim=-1)).mean()


@torch.no_grad()
def encode_tokens(visual, imgs):
    """CLIP's image tower ``visual``, images [N, 3, R, R] -> (tokens [N, L+1, output_dim], importance [N, L])."""
    x = visual.conv1(imgs).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks:
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        y, weights = attention(*split_heads(qkv, 3, block.attn.heads))
        matrix = weights.mean(dim=1)
        x = x + block.attn.out_proj(y)
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    return visual.ln_post(x) @ visual.proj, matrix[:, 0, 1:]


def build_optimizer(model, lr, weight_decay=0.05):
    """AdamW that goes from parameter to parameter, with the published betas and no decay of biases and norms."""
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=False, fused=False)


def train_step(model, visual, optimizer, scaler, imgs, noise, dtype=None, mask_ratio=0.75):
    """One update of ``model``; returns its loss, a float.

    Args:
        scaler: torch.amp.GradScaler, enabled for fp16.
        imgs: [N, 3, H, W], normalised. noise: uniform in (0, 1), [N, L]; see models_milan.patch_order.
        dtype: autocast's; None: no autocast.
    """
    with torch.autocast(imgs.device.type, dtype=dtype, enabled=dtype is not None):
        target, importance = encode_tokens(visual, imgs)
        loss = model(imgs, target, patch_order(noise, importance), mask_ratio)
    value = loss.item()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()  # as the published loop does
    scaler.step(optimizer)
    scaler.update()
    if imgs.is_cuda:
        torch.cuda.synchronize()
    return value
