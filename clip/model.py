"""CLIP with a ViT image tower (arXiv 2103.00020), under OpenAI's state-dict keys.

In addition to OpenAI's ``encode_image`` and ``encode_text`` it has ``encode_tokens``, which
MILAN's teacher needs.
"""

import math
from collections import Counter, OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from util.errors import UserError, refuse

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention under the parameter names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, causal: bool = False, class_row: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from every token to every token.

        Args:
            x: [N, T, D].
            causal: attend only to earlier tokens.
            class_row: also return the attention of the first token.

        Returns:
            The output [N, T, D].
            If ``class_row``, the first token's attention to all tokens, averaged over heads
            [N, T], else None.
        """
        n, t, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        y = self.out_proj(y.transpose(1, 2).reshape(n, t, d))
        if not class_row:
            return y, None
        # compute only the class token's row, not the full T x T matrix
        row = (q[:, :, :1] @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        # the row is used as sampling weights: keep it at least in float32
        wide = torch.promote_types(row.dtype, torch.float32)
        return y, row.softmax(dim=-1, dtype=wide).mean(dim=1).squeeze(1)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.ln_1 = Attention(width, heads), nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGELU(), c_proj=c_proj))
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self, x: torch.Tensor, causal: bool = False, class_row: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the new tokens, and the class token's attention; see ``Attention.forward``."""
        y, row = self.attn(self.ln_1(x), causal, class_row)
        x = x + y
        return x + self.mlp(self.ln_2(x)), row


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """Map tokens [N, T, D] to tokens [N, T, D]."""
        for block in self.resblocks:
            x, _ = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's image tower.

    Attributes:
        input_resolution: height and width of the images, in pixels.
        patch_size: height and width of a patch, in pixels.
        grid_size: number of patches per side.
        layers: number of blocks.
        output_dim: dimension of the features.
        mean, std: normalization of its input, per channel.
        importance_source: where the importance of patches comes from, for the log.
    """

    mean, std, importance_source = MEAN, STD, 'class token'

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
    ) -> None:
        super().__init__()
        self.input_resolution, self.patch_size = input_resolution, patch_size
        self.layers, self.output_dim = layers, output_dim
        self.grid_size, scale = input_resolution // patch_size, width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid_size**2 + 1, width))
        self.ln_pre, self.transformer = nn.LayerNorm(width), Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def set_grid_size(self, grid_size: int) -> None:
        """Resize the position embedding, as timm does, for images of grid_size**2 patches."""
        table = resample_abs_pos_embed(self.positional_embedding[None], [grid_size, grid_size])
        self.positional_embedding = nn.Parameter(table[0].detach())
        self.grid_size, self.input_resolution = grid_size, grid_size * self.patch_size

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [N, 3, R, R] to the first block's input [N, L+1, width]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [N, 3, R, R] to features [N, output_dim], which are not normalized."""
        return self.ln_post(self.transformer(self.embed(images))[:, 0]) @ self.proj

    def encode_tokens(
        self, images: torch.Tensor, average_targets: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of all tokens and the importance of patches (MILAN, 3.1 and 3.3).

        Args:
            images: normalized images [N, 3, R, R].
            average_targets: average the outputs of this many last blocks, each after the
                final norm; 1 uses only the last block.

        Returns:
            Tokens [N, L+1, output_dim], the class token first.
            Importance [N, L]: the class token's attention to each patch in the last block,
            averaged over heads. It sums to less than 1 because the class token also attends
            to itself.
        """
        x, outputs = self.embed(images), []
        for i, block in enumerate(self.transformer.resblocks, 1):
            x, row = block(x, class_row=i == self.layers)
            if i > self.layers - average_targets:
                outputs.append(self.ln_post(x))
        return sum(outputs) / len(outputs) @ self.proj, row[:, 1:]


class CLIP(nn.Module):
    """Image tower and text tower. The arguments are OpenAI's.

    The number of heads of the image tower is vision_width // 64, as in every released model.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int,
        vision_width: int,
        vision_patch_size: int,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.visual = VisionTransformer(
            image_resolution,
            vision_patch_size,
            vision_width,
            vision_layers,
            vision_width // 64,
            embed_dim,
        )
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Initialize for training from scratch (CLIP section 2.4, OpenAI's values)."""
        stds = {
            self.token_embedding.weight: 0.02,
            self.positional_embedding: 0.01,
            self.text_projection: self.text_projection.shape[0] ** -0.5,
        }
        for tower in (self.transformer, self.visual.transformer):
            for block in tower.resblocks:
                width = block.attn.out_proj.in_features
                residual = width**-0.5 * (2 * len(tower.resblocks)) ** -0.5
                stds |= {
                    block.attn.in_proj_weight: width**-0.5,
                    block.attn.out_proj.weight: residual,
                    block.mlp.c_fc.weight: (2 * width) ** -0.5,
                    block.mlp.c_proj.weight: residual,
                }
        for parameter, std in stds.items():
            nn.init.normal_(parameter, std=std)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [N, 3, R, R] to features [N, embed_dim], which are not normalized."""
        return self.visual(images)

    def encode_tokens(
        self, images: torch.Tensor, average_targets: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and importance; see ``VisionTransformer.encode_tokens``."""
        return self.visual.encode_tokens(images, average_targets)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [N, T] of ``tokenize`` to features [N, embed_dim], not normalized."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        end = ids.argmax(dim=-1)  # the end token has the highest id
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled cosine similarities: per image [N, M] and per text [M, N]."""
        image_features = F.normalize(self.encode_image(images), dim=-1)
        text_features = F.normalize(self.encode_text(ids), dim=-1)
        logits = self.logit_scale.exp() * image_features @ text_features.t()
        return logits, logits.t()


def build_model(state_dict: dict[str, torch.Tensor]) -> CLIP:
    """Build a CLIP from its weights, in eval mode and float32. Its sizes follow from their shapes.

    Args:
        state_dict: OpenAI's keys, any floating dtype. The sizes that OpenAI's files also hold
            (input_resolution, context_length, vocab_size) are ignored.

    Raises:
        ValueError: if it is not a ViT CLIP (a ResNet CLIP, say), or has missing or unexpected
            keys.
    """
    unused = ('input_resolution', 'context_length', 'vocab_size')
    state_dict = {k: v for k, v in state_dict.items() if k not in unused}
    needed = (
        'visual.conv1.weight',
        'visual.positional_embedding',
        'visual.proj',
        'positional_embedding',
        'token_embedding.weight',
    )
    # 'visual.transformer.' and 'transformer.' -> number of blocks
    layers = Counter(k.split('resblocks.')[0] for k in state_dict if k.endswith('.ln_1.weight'))
    try:
        refuse(
            (
                any(k.startswith(('visual.layer1.', 'visual.attnpool.')) for k in state_dict),
                'a ResNet CLIP has no patch tokens to be a teacher; use a ViT model',
            ),
            *((name not in state_dict, f'{name} is missing') for name in needed),
            *(
                (not v.is_floating_point() or not v.numel(), f'{k} is {v.dtype} {list(v.shape)}')
                for k, v in state_dict.items()
            ),
        )
        width, _, patch_size, _ = state_dict['visual.conv1.weight'].shape
        grid = math.isqrt(len(state_dict['visual.positional_embedding']) - 1)
        context_length, text_width = state_dict['positional_embedding'].shape
        if width % 64 or text_width % 64:
            raise ValueError(f'widths {width} and {text_width} are not multiples of 64')
        with torch.device('meta'):  # no random weights that would be replaced
            model = CLIP(
                embed_dim=state_dict['visual.proj'].shape[1],
                image_resolution=grid * patch_size,
                vision_layers=layers['visual.transformer.'],
                vision_width=width,
                vision_patch_size=patch_size,
                context_length=context_length,
                vocab_size=len(state_dict['token_embedding.weight']),
                transformer_width=text_width,
                transformer_heads=text_width // 64,
                transformer_layers=layers['transformer.'],
            )
        weights = {k: v.to(torch.float32, copy=True) for k, v in state_dict.items()}
        model.load_state_dict(weights, assign=True)
    except (UserError, RuntimeError, IndexError, ValueError) as e:
        reason = (str(e).splitlines()[1:] or [str(e)])[0]  # load_state_dict: a title, then reasons
        raise ValueError(f'not the state dict of a ViT CLIP: {reason.strip()}') from None
    return model.eval()
