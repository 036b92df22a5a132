"""A forward pass behind a KV cache, which computes no more of the last block than is asked for.

Scoring reads a decoder differently from embedding: many texts begin alike, and only some positions matter at the end.
So the texts of a pack may follow a prefix whose keys and values are cached (`PrefixCache`), and of the last block
everything behind the keys and values is computed for `selected` tokens alone: its output projection and its MLP are
three quarters of its cost.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sgpt.decoder.attention import Layers, packed
from sgpt.decoder.families import family_of, is_post_norm, takes_position_ids
from sgpt.decoder.packing import Pack, PrefixCache


@torch.inference_mode()
def forward_with_prefix(
    trunk: nn.Module,
    pack: Pack,
    prefix: PrefixCache | None = None,
    *,
    selected: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Layers]:
    """Last hidden states of the `selected` tokens of the pack (all, if None), [n, D], and with `keep` each layer's keys
    and values.

    selected: int64 [n], their indices in the pack. The trunk `takes_packs` and is causal; the pack's position_ids count
    on from the prefix.
    """
    inputs = {"input_ids": pack.input_ids[None], "attention_mask": torch.ones_like(pack.input_ids)[None]}
    if takes_position_ids(trunk):
        inputs["position_ids"] = pack.position_ids[None]
    layers: Layers = []
    with packed(pack, prefix, layers if keep else None), _last_block_narrowed(trunk, selected):
        hidden = trunk(**inputs).last_hidden_state[0]
    return hidden if selected is None else hidden[selected], layers


@contextmanager
def _last_block_narrowed(trunk: nn.Module, selected: Tensor | None) -> Iterator[None]:
    """Inside, the last block computes what lies behind its keys and values for the selected tokens; the others come out
    as zeros.
    """
    # a post-norm block adds what its norm gives, which is of all tokens, so its residual cannot be narrowed
    if selected is None or is_post_norm(trunk):
        yield
        return
    family = family_of(trunk.config.model_type)
    block = trunk.get_submodule(family.blocks)[-1]
    everything: list[Tensor] = []  # one tensor, the hidden states of all tokens, from `enter` on

    def enter(module: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
        """The block is given the selected tokens, which become its residual; its first norm is given all of them."""
        everything.append(inputs[0] if inputs else options["hidden_states"])
        narrow = everything[0][:, selected]
        return ((narrow, *inputs[1:]), options) if inputs else (inputs, options | {"hidden_states": narrow})

    def give_everything(module: nn.Module, inputs: tuple) -> tuple:
        return (everything[0],)

    def give_selected(module: nn.Module, inputs: tuple) -> tuple:
        return (inputs[0][:, selected], *inputs[1:])

    def leave(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        """The trunk shapes its output as its input was, so the block must give as many tokens as it got."""
        narrow = output[0] if isinstance(output, tuple) else output
        whole = torch.zeros_like(everything[0]).index_copy_(1, selected, narrow)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.get_submodule(family.first_norm).register_forward_pre_hook(give_everything),
        *(block.get_submodule(path).register_forward_pre_hook(give_selected) for path in family.narrowed),
        block.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
