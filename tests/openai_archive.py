"""Files as OpenAI publishes them: a CLIP as a TorchScript archive with float16 weights."""

import warnings

import torch
import torch.nn as nn


class Holder(nn.Module):
    """A bare tree of modules that holds tensors under dotted names."""

    def forward(self, x: torch.Tensor):
        return x


def put(root, name, tensor):
    *path, leaf = name.split('.')
    for part in path:
        if part not in root._modules:
            root.add_module(part, Holder())
        root = root._modules[part]
    root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def openai_state_dict(model):
    """``model``'s weights in the mix of float16 and float32 of OpenAI's files, with the three sizes they carry along."""
    half = ('conv1.weight', 'in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias', 'c_fc.weight', 'c_fc.bias',
            'c_proj.weight', 'c_proj.bias', 'text_projection', 'visual.proj')
    state_dict = {k: v.half() if k.endswith(half) else v for k, v in model.state_dict().items()}
    return {**state_dict, 'input_resolution': torch.tensor(model.visual.input_resolution),
            'context_length': torch.tensor(model.context_length), 'vocab_size': torch.tensor(model.vocab_size)}


def save_archive(model, path):
    root = Holder()
    for name, tensor in openai_state_dict(model).items():
        if tensor.is_floating_point():
            put(root, name, tensor)
        else:
            root.register_buffer(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.script(root).save(str(path))
