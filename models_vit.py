"""Classifier for fine-tuning and linear probing: timm's ViT with MAE's arguments.

The names in its state dict are those of the pretraining model's encoder
(models_milan.py), so a pretraining checkpoint loads without renaming. Unlike there, the
position embedding is trained.
"""

from functools import partial

import timm.models.vision_transformer
import torch
import torch.nn as nn


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """ViT classifier (MAE, appendix A.1).

    Args:
        global_pool: classify the mean of the patch tokens: last block, mean, ``fc_norm``,
            ``head``. Otherwise classify the class token: last block, ``norm``, class token,
            ``head``.
        global_pool_wcls: average all tokens including the class token, instead of only the
            patch tokens.
        img_size: pixels per side, a multiple of ``patch_size``. Images are square.
        patch_size: pixels per side.
        norm_layer: LayerNorm with the published eps by default.
        kwargs: timm's arguments, such as num_classes, embed_dim, depth, num_heads and
            drop_path_rate (stochastic depth, which grows linearly from 0 in the first block
            to this rate in the last).

    Raises:
        ValueError: if img_size is not a multiple of patch_size.
    """

    encoder_frozen = head_takes_tokens = False

    def __init__(
        self,
        global_pool: bool = False,
        global_pool_wcls: bool = False,
        img_size: int = 224,
        patch_size: int = 16,
        norm_layer: type[nn.Module] | partial = partial(nn.LayerNorm, eps=1e-6),
        **kwargs,
    ) -> None:
        if img_size % patch_size:
            raise ValueError(
                f'the image size {img_size} is not a multiple of the patch size {patch_size}'
            )
        super().__init__(
            global_pool='avg' if global_pool or global_pool_wcls else 'token',
            img_size=img_size,
            patch_size=patch_size,
            norm_layer=norm_layer,
            **kwargs,
        )
        self.global_pool_wcls = global_pool_wcls

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """Pool all tokens [N, L+1, D] to [N, D]."""
        return x.mean(dim=1) if self.global_pool_wcls else super().pool(x, pool_type)

    def freeze_encoder(self, head_takes_tokens: bool = False) -> 'VisionTransformer':
        """Freeze everything except ``head``: no gradients, and eval mode even after train().

        Args:
            head_takes_tokens: pass the patch tokens after ``norm`` [N, L, D] to the head
                instead of the pooled features [N, D].
        """
        self.encoder_frozen, self.head_takes_tokens = True, head_takes_tokens
        for name, p in self.named_parameters():
            p.requires_grad = name.startswith('head.')
        return self.train(self.training)

    def train(self, mode: bool = True) -> 'VisionTransformer':
        """Set training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        for name, module in self.named_children() if self.encoder_frozen else ():
            module.train(mode and name == 'head')
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized images [N, 3, H, W] to logits [N, num_classes]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            x = self.forward_features(x)
            x = (
                x[:, self.num_prefix_tokens :]
                if self.head_takes_tokens
                else self.forward_head(x, pre_logits=True)
            )
        return self.head(x)


# for tests and the demo
vit_tiny_patch8 = partial(
    VisionTransformer, img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3
)
vit_small_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = partial(
    VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16
)
vit_large_patch14 = partial(vit_large_patch16, patch_size=14)
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

# The choices of --model: a name and any function that builds a VisionTransformer from the
# arguments of that class.
MODELS = {
    'vit_tiny_patch8': vit_tiny_patch8,
    'vit_small_patch16': vit_small_patch16,
    'vit_base_patch16': vit_base_patch16,
    'vit_large_patch16': vit_large_patch16,
    'vit_large_patch14': vit_large_patch14,
    'vit_huge_patch14': vit_huge_patch14,
}
