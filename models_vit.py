"""The classifier that fine-tuning and linear probing put a pretrained encoder into: timm's ViT with MAE's arguments.

The names in its state dict are those of the pretraining model's encoder (models_milan.py), so that a checkpoint loads as it is.
Unlike there, the position embedding is trained.
"""

from functools import partial

import timm.models.vision_transformer
import torch
import torch.nn as nn


class VisionTransformer(timm.models.vision_transformer.VisionTransformer):
    """ViT classifier (MAE, appendix A.1).

    Args:
        global_pool: mean of the patch tokens after the last block, then ``fc_norm``, then ``head``. Without: ``norm``, then the
            class token, then ``head``.
        global_pool_wcls: the mean over all tokens, the class token among them, in place of that over the patches.
        img_size, patch_size: pixels; images are square and img_size is a multiple of patch_size.
        norm_layer: LayerNorm with the published eps by default.
        kwargs: timm's, such as num_classes, embed_dim, depth, num_heads, drop_path_rate (stochastic depth: grows linearly from 0
            at the first block to this rate at the last).

    Raises:
        ValueError: img_size is not a multiple of patch_size.
    """

    encoder_frozen = False
    head_pools = False

    def __init__(self, global_pool=False, global_pool_wcls=False, img_size=224, patch_size=16,
                 norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs):
        if img_size % patch_size:
            raise ValueError(f'the image size {img_size} is not a multiple of the patch size {patch_size}')
        pool = 'avg' if global_pool or global_pool_wcls else 'token'
        super().__init__(global_pool=pool, img_size=img_size, patch_size=patch_size, norm_layer=norm_layer, **kwargs)
        self.global_pool_wcls = global_pool_wcls

    def pool(self, x, pool_type=None):
        """All tokens [N, L+1, D] -> what is classified [N, D]."""
        return x.mean(dim=1) if self.global_pool_wcls else super().pool(x, pool_type)

    def freeze_encoder(self, head_pools=False):
        """From now on only ``head`` learns: all else gets no gradient and stays in eval mode, whatever train() says.

        head_pools: it is given the patch tokens after ``norm`` [N, L, D] in place of what the model makes of them [N, D].
        """
        self.encoder_frozen, self.head_pools = True, head_pools
        for name, p in self.named_parameters():
            p.requires_grad = name.startswith('head.')
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.encoder_frozen:
            for name, module in self.named_children():
                module.train(mode and name == 'head')
        return self

    def forward(self, x):
        """Images [N, 3, H, W], normalised -> logits [N, num_classes]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            x = self.forward_features(x)
            x = x[:, self.num_prefix_tokens:] if self.head_pools else self.forward_head(x, pre_logits=True)
        return self.head(x)


# Every function below whose name starts with vit_ is a choice of --model; a new one is one line.
vit_tiny_patch8 = partial(VisionTransformer, img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3)  # tests and demo
vit_small_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = partial(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_large_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = partial(VisionTransformer, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

MODELS = {name: make for name, make in list(globals().items()) if name.startswith('vit_')}
