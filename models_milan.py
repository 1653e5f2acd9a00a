"""The pretraining model: MILAN, with MAE as a special case.

One class covers 2 x 2 x 2 methods:

* target: the masked pixels (MAE), or the features that a frozen teacher computes for the whole
  image (``use_clip``);
* decoder: MAE's, or MILAN's prompting decoder (``change_decoder``);
* visible patches: drawn uniformly, or in proportion to the teacher's attention (``attn_mask``).

Papers: MAE, arXiv 2111.06377; MILAN, arXiv 2208.06049.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Block, Mlp, PatchEmbed
from torch import Tensor, nn

from util.masking import count_visible, patch_order, take
from util.pos_embed import get_2d_sincos_pos_embed


class PromptingAttention(nn.Module):
    """Attention of the prompting decoder (MILAN section 3.2).

    Queries come from the mask tokens only. Keys and values come from the encoder's tokens and
    the mask tokens.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()  # the same switch as for timm's blocks
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, y: Tensor, encoder_tokens: Tensor) -> Tensor:
        """Y [N, M, D], encoder_tokens [N, K+1, D] -> [N, M, D]."""
        n, m, d = y.shape
        heads = (self.num_heads, d // self.num_heads)
        q = self.q(y).view(n, m, *heads).transpose(1, 2)
        kv = self.kv(torch.cat([encoder_tokens, y], dim=1))
        k, v = kv.view(n, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, m, d))


class PromptingBlock(nn.Module):
    """Block of the prompting decoder (MILAN section 3.2).

    It updates the mask tokens and never the encoder's tokens, which MILAN calls fixed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = PromptingAttention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, encoder_tokens: Tensor) -> Tensor:
        """Update the mask tokens x [N, M, D]; encoder_tokens [N, K+1, D] are not normalized."""
        x = x + self.attn(self.norm1(x), encoder_tokens)
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder with a ViT encoder.

    Between the encoder and the loss, tokens are kept in shuffled order: class token, visible
    patches, masked patches. Attention is permutation-equivariant (positions are added to the
    tokens) and the losses are means, so only the returned prediction is unshuffled.

    Args:
        img_size, patch_size: pixels; images are square, img_size a multiple of patch_size.
        in_chans, embed_dim, depth, num_heads, mlp_ratio: the encoder, a plain ViT.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        norm_layer: LayerNorm with the published eps by default.
        norm_pix_loss: normalize the pixels of each target patch (MAE section 3); only used
            without use_clip.
        use_clip: predict the teacher's features for all tokens instead of the masked pixels.
        attn_mask: draw visible patches by the teacher's importance instead of uniformly.
        change_decoder: use the prompting decoder instead of MAE's.
        target_dim: width D_t of the teacher's features; required by use_clip.

    Raises:
        ValueError: if the sizes do not fit, or for use_clip without target_dim.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss: bool = False,
        use_clip: bool = False,
        attn_mask: bool = False,
        change_decoder: bool = False,
        target_dim: int | None = None,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(
                f'the image size {img_size} is not a multiple of the patch size {patch_size}'
            )
        if use_clip and target_dim is None:
            raise ValueError("use_clip needs target_dim, the width of the teacher's features")
        self.use_clip, self.attn_mask, self.change_decoder = use_clip, attn_mask, change_decoder
        self.in_chans, self.norm_pix_loss = in_chans, norm_pix_loss

        # encoder
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        length = self.patch_embed.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        # decoder
        dim = decoder_embed_dim
        block = PromptingBlock if change_decoder else partial(Block, qkv_bias=True)
        self.decoder_embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, length, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            block(dim, decoder_num_heads, mlp_ratio, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(dim)
        self.decoder_pred = nn.Linear(dim, target_dim if use_clip else patch_size**2 * in_chans)

        self.initialize_weights()

    # ---- initialization ----

    def initialize_weights(self) -> None:
        """Initialize as MAE does; the position tables are fixed sine-cosine tables."""
        grid_size = self.patch_embed.grid_size[0]
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], grid_size, cls_token=True)
            table.data.copy_(torch.from_numpy(values).unsqueeze(0))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():  # norms already are 1 and 0
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # the patch embedding is a linear layer, written as a convolution
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)

    # ---- patches ----

    def patchify(self, imgs: Tensor, channels_first: bool = False) -> Tensor:
        """Cut images [N, C, H, W] into patches [N, L, p*p*C].

        The pixels of a patch are ordered by row, column, channel; with ``channels_first`` by
        channel, row, column.
        """
        p = self.patch_embed.patch_size[0]
        n, c, h, w = imgs.shape
        x = imgs.reshape(n, c, h // p, p, w // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5) if channels_first else x.permute(0, 2, 4, 3, 5, 1)
        return x.reshape(n, (h // p) * (w // p), p * p * c)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Invert patchify: patches [N, L, p*p*C] -> images [N, C, H, W]."""
        p = self.patch_embed.patch_size[0]
        g = self.patch_embed.grid_size[0]
        x = x.reshape(x.shape[0], g, g, p, p, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, g * p, g * p)

    # ---- encoder, decoder, loss ----

    def forward_encoder(self, imgs: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible patches.

        Args:
            imgs: [N, C, H, W].
            ids_keep: [N, K], indices of the visible patches.

        Returns:
            latent [N, K+1, D], class token first.
        """
        # The patch embedding is a linear layer on each patch: apply it to visible patches only.
        proj = self.patch_embed.proj
        patches = take(self.patchify(imgs, channels_first=True), ids_keep)
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        x = x + take(self.pos_embed[:, 1:], ids_keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Predict the target of every token.

        Args:
            latent: [N, K+1, D] from forward_encoder.
            ids_shuffle: [N, L], visible patches first.

        Returns:
            pred [N, L+1, D_t or p*p*C] in shuffled order: class token, visible, masked patches.
        """
        visible = latent.shape[1] - 1
        pos = take(self.decoder_pos_embed[:, 1:], ids_shuffle)
        cls_pos = self.decoder_pos_embed[:, :1].expand(len(pos), -1, -1)
        encoder_pos = torch.cat([cls_pos, pos[:, :visible]], dim=1)
        encoder_tokens = self.decoder_embed(latent) + encoder_pos
        x = self.mask_token + pos[:, visible:]
        if self.change_decoder:
            for block in self.decoder_blocks:
                x = block(x, encoder_tokens)
            x = torch.cat([encoder_tokens.to(x.dtype), x], dim=1)
        else:
            x = torch.cat([encoder_tokens, x], dim=1)
            for block in self.decoder_blocks:
                x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(
        self,
        imgs: Tensor,
        pred: Tensor,
        tokens: Tensor | None,
        ids_shuffle: Tensor,
        visible: int,
    ) -> Tensor:
        """Compute the loss.

        With use_clip: 2 - 2 cos(prediction, target), averaged over all L+1 tokens (MILAN
        equation 4). Without: mean squared error on the pixels of the masked patches (MAE).

        Args:
            imgs: [N, C, H, W], the pixel target; not used with use_clip.
            pred: [N, L+1, D_t or p*p*C] in shuffled order, from forward_decoder.
            tokens: [N, L+1, D_t] of the teacher in image order; only used with use_clip.
            ids_shuffle: [N, L], visible patches first.
            visible: number K of visible patches.

        Returns:
            The loss, a scalar, computed in float32 or wider.
        """
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        if self.use_clip:
            tokens = tokens.detach()  # never backpropagate into the teacher
            target = torch.cat([tokens[:, :1], take(tokens[:, 1:], ids_shuffle)], dim=1)
            target = F.normalize(target.to(pred.dtype), dim=-1)
            return (2 - 2 * (F.normalize(pred, dim=-1) * target).sum(dim=-1)).mean()
        target = take(self.patchify(imgs), ids_shuffle[:, visible:]).to(pred.dtype)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return F.mse_loss(pred[:, 1 + visible :], target)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        teacher_out: tuple[Tensor | None, Tensor | None] | None = None,
        ids_shuffle: Tensor | None = None,
        return_pred: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mask, encode, decode and compute the loss.

        Args:
            imgs: [N, C, H, W], normalized.
            mask_ratio: fraction of patches hidden from the encoder, in [0, 1); see
                count_visible.
            teacher_out: (tokens [N, L+1, D_t], importance [N, L]) of the teacher for these
                images. use_clip needs the tokens, attn_mask the importance.
            ids_shuffle: [N, L], order of the patches, visible ones first. The engine passes it;
                None draws it in the same way, with torch's global generator.
            return_pred: False skips pred and mask; training only needs the loss.

        Returns:
            loss: scalar.
            pred: in image order, [N, L+1, D_t] with the class token first, or pixels
                [N, L, p*p*C] without use_clip. None without return_pred.
            mask: [N, L] in image order, 1 = masked, 0 = visible. None without return_pred.

        Raises:
            ValueError: if the teacher's output is needed and missing, or mask_ratio leaves no
                patch to see or nothing to predict.
        """
        tokens, importance = teacher_out or (None, None)
        n, length = imgs.shape[0], self.patch_embed.num_patches
        visible = count_visible(length, mask_ratio)
        if visible < 1 or visible == length and not self.use_clip:
            raise ValueError(
                f'mask_ratio {mask_ratio} leaves {visible} of {length} patches visible: '
                'nothing to learn from'
            )
        if self.use_clip and tokens is None:
            raise ValueError("use_clip needs the teacher's tokens: pass teacher_out")
        if self.attn_mask and importance is None:
            raise ValueError("attn_mask needs the teacher's importance: pass teacher_out")
        if ids_shuffle is None:
            noise = torch.rand(n, length, device=imgs.device).clamp_min(1e-12)
            ids_shuffle = patch_order(noise, importance if self.attn_mask else None)

        latent = self.forward_encoder(imgs, ids_shuffle[:, :visible])
        pred = self.forward_decoder(latent, ids_shuffle)
        loss = self.forward_loss(imgs, pred, tokens, ids_shuffle, visible)
        if not return_pred:
            return loss, None, None

        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= visible).to(imgs.dtype)
        patches = take(pred[:, 1:], ids_restore)
        pred = torch.cat([pred[:, :1], patches], dim=1) if self.use_clip else patches
        return loss, pred, mask


# ---- models ----

mae_vit_tiny_patch8_dec128d2b = mae_vit_tiny_patch8 = partial(  # for tests and the demo
    MaskedAutoencoderViT,
    img_size=64,
    patch_size=8,
    embed_dim=192,
    depth=6,
    num_heads=3,
    decoder_embed_dim=128,
    decoder_depth=2,
    decoder_num_heads=4,
)
mae_vit_small_patch16_dec512d8b = mae_vit_small_patch16 = partial(
    MaskedAutoencoderViT, patch_size=16, embed_dim=384, depth=12, num_heads=6
)
mae_vit_base_patch16_dec512d8b = mae_vit_base_patch16 = partial(
    MaskedAutoencoderViT, patch_size=16, embed_dim=768, depth=12, num_heads=12
)
mae_vit_large_patch16_dec512d8b = mae_vit_large_patch16 = partial(
    MaskedAutoencoderViT, patch_size=16, embed_dim=1024, depth=24, num_heads=16
)
mae_vit_huge_patch14_dec512d8b = mae_vit_huge_patch14 = partial(
    MaskedAutoencoderViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16
)

# The choices of --model. To add a model, add one line here: its name, and a function that takes
# the keyword arguments of MaskedAutoencoderViT, each with a default, and returns the model.
MODELS: dict[str, Callable[..., MaskedAutoencoderViT]] = {
    'mae_vit_tiny_patch8': mae_vit_tiny_patch8,
    'mae_vit_small_patch16': mae_vit_small_patch16,
    'mae_vit_base_patch16': mae_vit_base_patch16,
    'mae_vit_large_patch16': mae_vit_large_patch16,
    'mae_vit_huge_patch14': mae_vit_huge_patch14,
    'mae_vit_tiny_patch8_dec128d2b': mae_vit_tiny_patch8_dec128d2b,
    'mae_vit_small_patch16_dec512d8b': mae_vit_small_patch16_dec512d8b,
    'mae_vit_base_patch16_dec512d8b': mae_vit_base_patch16_dec512d8b,
    'mae_vit_large_patch16_dec512d8b': mae_vit_large_patch16_dec512d8b,
    'mae_vit_huge_patch14_dec512d8b': mae_vit_huge_patch14_dec512d8b,
}
