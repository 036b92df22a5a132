"""Going on from tokens that were computed before, and computing no more of the last block than is asked for.

Scoring reads a decoder differently from embedding: many texts begin alike, and only some positions matter at the end. So a
pack may continue texts whose keys and values are kept (`Past`), and of the last block everything behind the keys and values
is computed for `selected` tokens alone: its output projection and its MLP are three quarters of its cost.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sgpt.decoder.attention import Layers, packed
from sgpt.decoder.families import BLOCKS, takes_position_ids
from sgpt.decoder.packing import Pack, Past


@torch.inference_mode()
def continued_token_embeddings(
    trunk: nn.Module, pack: Pack, past: Past | None = None, *, selected: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Layers]:
    """Last hidden states of the `selected` places of the pack (all, if None), [n, D], and with `keep` each layer's keys and values.

    The trunk `takes_packs` and is causal; position_ids of the pack count on from the past.
    """
    inputs = {"input_ids": pack.input_ids[None], "attention_mask": torch.ones_like(pack.input_ids)[None]}
    if takes_position_ids(trunk):
        inputs["position_ids"] = pack.position_ids[None]
    kept: Layers | None = [] if keep else None
    with packed(pack, past, kept), _last_block_narrowed(trunk, selected):
        hidden = trunk(**inputs).last_hidden_state[0]
    return hidden if selected is None else hidden[selected], kept or []


@contextmanager
def _last_block_narrowed(trunk: nn.Module, selected: Tensor | None) -> Iterator[None]:
    """Inside, the last block computes what lies behind its keys and values for the selected tokens; the others come out as zeros."""
    # a post-norm block adds what its norm has made, which is of all tokens
    post_norm = not getattr(trunk.config, "do_layer_norm_before", True) or getattr(trunk.config, "apply_residual_connection_post_layernorm", False)
    if selected is None or post_norm:
        yield
        return
    blocks, norm, narrowed = BLOCKS[trunk.config.model_type]
    block = trunk.get_submodule(blocks)[-1]
    everything: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
        """The block is given the selected tokens, which become its residual; its first norm is given all of them."""
        everything.append(inputs[0] if inputs else options["hidden_states"])
        chosen = everything[0][:, selected]
        return ((chosen, *inputs[1:]), options) if inputs else (inputs, options | {"hidden_states": chosen})

    def leave(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        """The trunk shapes its output as its input was."""
        chosen = output[0] if isinstance(output, tuple) else output
        whole = torch.zeros_like(everything[0]).index_copy_(1, selected, chosen)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.get_submodule(norm).register_forward_pre_hook(lambda module, inputs: (everything[0],)),
        *(block.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (inputs[0][:, selected], *inputs[1:])) for name in narrowed),
        block.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
