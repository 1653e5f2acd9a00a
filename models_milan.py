"""MILAN's pretraining model, and MAE as its special case.

One class covers the family of 2 x 2 x 2: the target is the masked pixels (MAE) or the features a frozen teacher gives for
the whole image (``use_clip``); the decoder is MAE's or MILAN's prompting decoder (``change_decoder``); the visible patches are
drawn uniformly or in proportion to the teacher's attention (``attn_mask``).

Papers: MAE, arXiv 2111.06377; MILAN, arXiv 2208.06049.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Block, Mlp, PatchEmbed

from util.pos_embed import get_2d_sincos_pos_embed


def patch_order(noise, importance=None):
    """Random order of the patches of every image, as a sort of perturbed scores (MILAN section 3.3, "semantic aware masking").

    The first K entries of a row are K draws without replacement. With ``importance`` each draw is proportional to the
    importance of what is left: sorting log(importance) + Gumbel noise has exactly the distribution of drawing one by one, costs
    one sort, and takes zeros (they come last, in random order among themselves).

    Args:
        noise: uniform in (0, 1), [N, L], float32.
        importance: None for the uniform order, else [N, L], >= 0; rows need not sum to 1.

    Returns:
        ids_shuffle [N, L] int64: the patches' numbers in the order drawn.
    """
    if importance is None:
        return noise.argsort(dim=1)
    gumbel = -torch.log(-torch.log(noise))
    scores = importance.float().clamp_min(torch.finfo(torch.float32).tiny).log() + gumbel
    return scores.argsort(dim=1, descending=True)


def count_visible(num_patches, mask_ratio):
    """K, the number of patches that the encoder sees."""
    return int(num_patches * (1 - mask_ratio))


def take(x, ids):
    """Rows ``ids`` [N, K] of ``x`` [N, L, D] (or [1, L, D], shared by the batch) -> [N, K, D]."""
    x = x.expand(ids.shape[0], -1, -1)
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PromptingAttention(nn.Module):
    """Queries from the mask tokens alone; keys and values from the fixed tokens and the mask tokens."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()  # the switch that timm's blocks obey too
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, y, fixed):
        """y [N, M, D], fixed [N, K+1, D] -> [N, M, D]."""
        n, m, d = y.shape
        heads = (self.num_heads, d // self.num_heads)
        q = self.q(y).view(n, m, *heads).transpose(1, 2)
        k, v = self.kv(torch.cat([fixed, y], dim=1)).view(n, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, m, d))


class PromptingBlock(nn.Module):
    """Block of the prompting decoder (MILAN section 3.2): it updates mask tokens and never the encoder's tokens."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, norm_layer=nn.LayerNorm):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = PromptingAttention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, fixed):
        """Mask tokens x [N, M, D], fixed tokens [N, K+1, D] (not normalised here) -> updated mask tokens [N, M, D]."""
        x = x + self.attn(self.norm1(x), fixed)
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder with a ViT encoder.

    Between the encoder and the loss, tokens stand in the order they were drawn: class token, visible patches, masked patches.
    Attention does not ask for an order (positions are added to the tokens) and the losses are means, so that nothing is sorted
    back but the prediction handed to the caller.

    Args:
        img_size, patch_size: pixels; images are square and img_size is a multiple of patch_size.
        in_chans, embed_dim, depth, num_heads, mlp_ratio: the encoder, a plain ViT.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        norm_layer: LayerNorm with the published eps by default.
        norm_pix_loss: normalise the pixels of each target patch (MAE section 3); only without use_clip.
        use_clip: predict the teacher's features for all tokens instead of the masked pixels.
        attn_mask: draw visible patches by the teacher's importance instead of uniformly.
        change_decoder: the prompting decoder instead of MAE's.
        target_dim: width of the teacher's features; needed with use_clip, ignored without.

    Raises:
        ValueError: sizes that do not fit, or use_clip without target_dim.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=1024, depth=24, num_heads=16,
                 decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0,
                 norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=False, use_clip=False, attn_mask=False,
                 change_decoder=False, target_dim=None):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f'the image size {img_size} is not a multiple of the patch size {patch_size}')
        if use_clip and target_dim is None:
            raise ValueError("use_clip needs target_dim, the width of the teacher's features")
        self.in_chans = in_chans
        self.use_clip = use_clip
        self.attn_mask = attn_mask
        self.norm_pix_loss = norm_pix_loss
        self.change_decoder = change_decoder

        # encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)])
        self.norm = norm_layer(embed_dim)

        # decoder
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, decoder_embed_dim), requires_grad=False)
        decoder_block = PromptingBlock if change_decoder else partial(Block, qkv_bias=True)
        self.decoder_blocks = nn.ModuleList([
            decoder_block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer=norm_layer)
            for _ in range(decoder_depth)])
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, target_dim if use_clip else patch_size**2 * in_chans)

        self.initialize_weights()

    def initialize_weights(self):
        grid_size = self.patch_embed.grid_size[0]
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], grid_size, cls_token=True)
            table.data.copy_(torch.from_numpy(values).unsqueeze(0))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(self._init_weights)
        # the patch embedding is a linear layer that happens to be written as a convolution
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)

    @staticmethod
    def _init_weights(m):
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)

    def patchify(self, imgs, channels_first=False):
        """imgs [N, C, H, W] -> [N, L, p*p*C], the pixels of a patch ordered by row, column, channel; or channel, row, column."""
        p = self.patch_embed.patch_size[0]
        n, c, h, w = imgs.shape
        x = imgs.reshape(n, c, h // p, p, w // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5) if channels_first else x.permute(0, 2, 4, 3, 5, 1)
        return x.reshape(n, (h // p) * (w // p), p * p * c)

    def unpatchify(self, x):
        """The inverse of patchify: [N, L, p*p*C] -> [N, C, H, W]."""
        p = self.patch_embed.patch_size[0]
        g = self.patch_embed.grid_size[0]
        x = x.reshape(x.shape[0], g, g, p, p, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, g * p, g * p)

    def forward_encoder(self, imgs, ids_keep):
        """imgs [N, C, H, W] and the visible patches' numbers [N, K] -> latent [N, K+1, D], class token first."""
        # The convolution of the patch embedding is a linear layer on each patch; only the visible ones go through it.
        proj = self.patch_embed.proj
        x = F.linear(take(self.patchify(imgs, channels_first=True), ids_keep), proj.weight.flatten(1), proj.bias)
        x = x + take(self.pos_embed[:, 1:], ids_keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, ids_shuffle):
        """latent [N, K+1, D] -> prediction [N, L+1, target width]: class token, visible, masked, in the order drawn."""
        visible = latent.shape[1] - 1
        pos = take(self.decoder_pos_embed[:, 1:], ids_shuffle)
        fixed = self.decoder_embed(latent)
        fixed = fixed + torch.cat([self.decoder_pos_embed[:, :1].expand(len(pos), -1, -1), pos[:, :visible]], dim=1)
        x = self.mask_token + pos[:, visible:]
        if self.change_decoder:
            for block in self.decoder_blocks:
                x = block(x, fixed)
            x = torch.cat([fixed.to(x.dtype), x], dim=1)
        else:
            x = torch.cat([fixed, x], dim=1)
            for block in self.decoder_blocks:
                x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, imgs, pred, clip_tokens, ids_shuffle, visible):
        """Scalar loss; pred [N, L+1, target width] in the order drawn, of which ``visible`` patches were seen.

        With use_clip 2 - 2 cos(prediction, target), mean over all tokens (MILAN equation 4); clip_tokens [N, L+1, target_dim].
        Without, the mean squared error on the masked patches' pixels.
        """
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        if self.use_clip:
            clip_tokens = clip_tokens.detach()  # the teacher is frozen, whoever calls
            target = torch.cat([clip_tokens[:, :1], take(clip_tokens[:, 1:], ids_shuffle)], dim=1).to(pred.dtype)
            cos = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)
            return (2 - 2 * cos).mean()
        target = take(self.patchify(imgs), ids_shuffle[:, visible:]).to(pred.dtype)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return F.mse_loss(pred[:, 1 + visible:], target)

    def forward(self, imgs, mask_ratio=0.75, clip_teacher=None, ids_shuffle=None, loss_only=False):
        """One forward pass.

        Args:
            imgs: [N, C, H, W], normalised.
            mask_ratio: share of patches hidden from the encoder, in [0, 1); count_visible says how many stay visible.
            clip_teacher: (tokens [N, L+1, target_dim], importance [N, L]) of the teacher for these images; needed with use_clip
                (tokens) and attn_mask (importance).
            ids_shuffle: [N, L], the patches in the order to draw them; drawn here from torch's generator if not given.
            loss_only: leave out pred and mask (None), which nobody asks for in training.

        Returns:
            loss: scalar.
            pred: in image order: [N, L+1, target_dim] with the class token first, or pixels [N, L, p*p*C] without use_clip.
            mask: [N, L] in image order, 1 = masked, 0 = visible.

        Raises:
            ValueError: a teacher that is needed and not given, or a mask_ratio that leaves nothing to see or to predict.
        """
        tokens, importance = clip_teacher if clip_teacher is not None else (None, None)
        n, length = imgs.shape[0], self.patch_embed.num_patches
        visible = count_visible(length, mask_ratio)
        if visible < 1 or visible == length and not self.use_clip:
            raise ValueError(f'mask_ratio {mask_ratio} leaves {visible} of {length} patches visible: nothing to learn from')
        if self.use_clip and tokens is None:
            raise ValueError("use_clip needs the teacher's tokens: give clip_teacher")
        if self.attn_mask and importance is None and ids_shuffle is None:
            raise ValueError("attn_mask needs the teacher's importance: give clip_teacher")
        if ids_shuffle is None:
            noise = torch.rand(n, length, device=imgs.device).clamp_min(1e-12)
            ids_shuffle = patch_order(noise, importance if self.attn_mask else None)

        latent = self.forward_encoder(imgs, ids_shuffle[:, :visible])
        pred = self.forward_decoder(latent, ids_shuffle)
        loss = self.forward_loss(imgs, pred, tokens, ids_shuffle, visible)

        if loss_only:
            return loss, None, None
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= visible).to(imgs.dtype)
        patches = take(pred[:, 1:], ids_restore)
        pred = torch.cat([pred[:, :1], patches], dim=1) if self.use_clip else patches
        return loss, pred, mask


# Every function below whose name starts with mae_vit_ is a choice of --model; a new one is one line.
mae_vit_tiny_patch8_dec128d2b = partial(
    MaskedAutoencoderViT, img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3,
    decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4)  # for tests and the demo
mae_vit_small_patch16_dec512d8b = partial(MaskedAutoencoderViT, patch_size=16, embed_dim=384, depth=12, num_heads=6)
mae_vit_base_patch16_dec512d8b = partial(MaskedAutoencoderViT, patch_size=16, embed_dim=768, depth=12, num_heads=12)
mae_vit_large_patch16_dec512d8b = partial(MaskedAutoencoderViT, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
mae_vit_huge_patch14_dec512d8b = partial(MaskedAutoencoderViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

mae_vit_tiny_patch8 = mae_vit_tiny_patch8_dec128d2b
mae_vit_small_patch16 = mae_vit_small_patch16_dec512d8b
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

MODELS = {name: make for name, make in list(globals().items()) if name.startswith('mae_vit_')}
