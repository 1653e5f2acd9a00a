"""Layer-wise learning-rate decay (ELECTRA, BEiT)."""


def param_groups_lrd(model, weight_decay=0.05, no_weight_decay_list=(), layer_decay=0.75):
    """Parameter groups of a ViT, each with its ``lr_scale`` = layer_decay ** (depth + 1 - layer) and weight decay.

    Args:
        model: a ViT whose transformer blocks are ``model.blocks``.
        weight_decay: for all but 1-D parameters and those in ``no_weight_decay_list``.
        no_weight_decay_list: names of parameters.
        layer_decay: 1 = the same rate for all layers.
    """
    num_layers = len(model.blocks) + 1
    groups = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decay = 0.0 if param.ndim == 1 or name in no_weight_decay_list else weight_decay
        layer = get_layer_id_for_vit(name, num_layers)
        group = groups.setdefault((layer, decay), {
            'lr_scale': layer_decay ** (num_layers - layer), 'weight_decay': decay, 'params': []})
        group['params'].append(param)
    return list(groups.values())


def get_layer_id_for_vit(name, num_layers):
    """0 for the embeddings, i + 1 for block i, num_layers for what follows the blocks."""
    if name in ('cls_token', 'pos_embed') or name.startswith('patch_embed'):
        return 0
    if name.startswith('blocks'):
        return int(name.split('.')[1]) + 1
    return num_layers
