"""CLIP with a ViT image tower (arXiv 2103.00020), under OpenAI's state-dict keys.

Beside OpenAI's ``encode_image`` and ``encode_text`` it has ``encode_tokens``: what MILAN asks of its teacher.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from util.integrity import check_claims

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention under the parameter names of nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, class_row=False):
        """x [N, T, D] -> [N, T, D] and, if ``class_row``, the first token's attention to all, averaged over heads [N, T]."""
        n, t, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        y = self.out_proj(y.transpose(1, 2).reshape(n, t, d))
        if not class_row:
            return y, None
        # one row a head, not the T x T matrix that fused attention spares us
        row = (q[:, :, :1] @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        row = row.to(torch.promote_types(row.dtype, torch.float32))  # draws are made by it: no bf16 there
        return y, row.softmax(dim=-1).mean(dim=1).squeeze(1)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module('c_fc', nn.Linear(width, 4 * width))
        self.mlp.add_module('gelu', QuickGELU())
        self.mlp.add_module('c_proj', nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False, class_row=False):
        y, row = self.attn(self.ln_1(x), causal, class_row)
        x = x + y
        return x + self.mlp(self.ln_2(x)), row


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x, _ = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's image tower.

    Attributes: input_resolution and patch_size in pixels, grid_size in patches a side, output_dim, and layers, mean, std and
    answer as util/teacher.py has them.
    """

    mean, std = MEAN, STD
    answer = 'class token'

    def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim):
        super().__init__()
        self.input_resolution = input_resolution
        self.patch_size = patch_size
        self.grid_size = input_resolution // patch_size
        self.output_dim = output_dim
        self.layers = layers
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid_size**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def set_grid_size(self, grid_size):
        """Take images of grid_size x grid_size patches from now on; the position embedding is resized as timm does it."""
        from timm.layers import resample_abs_pos_embed  # the rest of clip/ does without timm
        if grid_size == self.grid_size:
            return
        table = resample_abs_pos_embed(self.positional_embedding.data[None], [grid_size, grid_size])[0]
        self.positional_embedding = nn.Parameter(table)
        self.grid_size = grid_size
        self.input_resolution = grid_size * self.patch_size

    def embed(self, images):
        """images [N, 3, R, R] -> the first block's input [N, L+1, width]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    def forward(self, images):
        """images [N, 3, R, R] -> image features [N, output_dim], not normalised."""
        x = self.transformer(self.embed(images))
        return self.ln_post(x[:, 0]) @ self.proj

    def encode_tokens(self, images, average_targets=1):
        """Features of all tokens and the last block's view of what matters (MILAN sections 3.1 and 3.3).

        Args:
            images: [N, 3, R, R], normalised.
            average_targets: mean over the outputs of that many last blocks, each through the final norm; 1 = the last block.

        Returns:
            tokens [N, L+1, output_dim], class token first.
            importance [N, L]: the class token's attention to each patch in the last block, averaged over heads (it sums to
            less than 1: the rest is the class token's attention to itself).
        """
        x = self.embed(images)
        blocks = self.transformer.resblocks
        outputs = []
        for i, block in enumerate(blocks):
            x, row = block(x, class_row=i == len(blocks) - 1)
            if i >= len(blocks) - average_targets:
                outputs.append(self.ln_post(x))
        return sum(outputs) / len(outputs) @ self.proj, row[:, 1:]


class CLIP(nn.Module):
    """Both towers. The arguments are OpenAI's; the heads of a tower are its width // 64 in every released model."""

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads, transformer_layers):
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.visual = VisionTransformer(
            image_resolution, vision_patch_size, vision_width, vision_layers, vision_width // 64, embed_dim)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialize_parameters()

    def initialize_parameters(self):
        """CLIP's initialisation (section 2.4 and OpenAI's figures), for training one from scratch."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        for tower in (self.transformer, self.visual.transformer):
            width = tower.resblocks[0].ln_1.weight.shape[0]
            residual = width**-0.5 * (2 * len(tower.resblocks)) ** -0.5
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=residual)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=residual)

    def encode_image(self, images):
        """images [N, 3, R, R] -> features [N, embed_dim], not normalised."""
        return self.visual(images)

    def encode_tokens(self, images, average_targets=1):
        """images [N, 3, R, R] -> (tokens [N, L+1, embed_dim], importance [N, L]); see VisionTransformer.encode_tokens."""
        return self.visual.encode_tokens(images, average_targets)

    def encode_text(self, ids):
        """Token ids [N, T], T <= context_length, as from tokenize -> features [N, embed_dim], not normalised."""
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        end = ids.argmax(dim=-1)  # the end token has the highest id
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def forward(self, images, ids):
        """Cosine similarities times the learned scale: (logits_per_image [N, M], logits_per_text [M, N])."""
        image_features = F.normalize(self.encode_image(images), dim=-1)
        text_features = F.normalize(self.encode_text(ids), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def build_model(state_dict):
    """A CLIP in eval mode, float32, of the sizes that the shapes in ``state_dict`` tell.

    Args:
        state_dict: OpenAI's keys, any floating dtype; input_resolution, context_length and vocab_size among them are ignored.

    Raises:
        ValueError: a ResNet CLIP, something that is no CLIP, or keys missing or too many.
    """
    state_dict = {k: v for k, v in state_dict.items() if k not in ('input_resolution', 'context_length', 'vocab_size')}
    if 'visual.layer1.0.conv1.weight' in state_dict or 'visual.attnpool.positional_embedding' in state_dict:
        raise ValueError('a ResNet CLIP has no patch tokens and cannot be a teacher; take one of the ViT models')
    check_claims(state_dict)
    for name, value in state_dict.items():
        if not value.is_floating_point() or value.numel() == 0:
            raise ValueError(f'not the state dict of a ViT CLIP: {name} is {value.dtype} of shape {list(value.shape)}')
    try:
        vision_width, _, patch_size, _ = state_dict['visual.conv1.weight'].shape
        grid = math.isqrt(state_dict['visual.positional_embedding'].shape[0] - 1)
        context_length, transformer_width = state_dict['positional_embedding'].shape
        if vision_width % 64 or transformer_width % 64:
            raise ValueError(f'widths {vision_width} and {transformer_width} are not those of a CLIP: its heads are 64 wide')
        with torch.device('meta'):  # no weights are drawn only to be overwritten
            model = CLIP(
                embed_dim=state_dict['visual.proj'].shape[1],
                image_resolution=grid * patch_size,
                vision_layers=_count_blocks(state_dict, 'visual.transformer.'),
                vision_width=vision_width,
                vision_patch_size=patch_size,
                context_length=context_length,
                vocab_size=state_dict['token_embedding.weight'].shape[0],
                transformer_width=transformer_width,
                transformer_heads=transformer_width // 64,
                transformer_layers=_count_blocks(state_dict, 'transformer.'))
        model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state_dict.items()}, assign=True)
    except KeyError as e:
        raise ValueError(f'not the state dict of a ViT CLIP: it has no {e.args[0]}') from None
    except (RuntimeError, IndexError) as e:
        reason = str(e).splitlines()[1:2] or [str(e)]
        raise ValueError(f'not the state dict of a ViT CLIP: {reason[0].strip()}') from None
    return model.eval()


def _count_blocks(state_dict, prefix):
    return sum(k.startswith(f'{prefix}resblocks.') and k.endswith('.ln_1.weight') for k in state_dict)
