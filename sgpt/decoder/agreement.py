"""Whether a family that no test proves is computed here as plain transformers computes it.

Texts are put in rows of one length, with a mask and, for most families, with position ids. Families differ in what they
make of these: some count positions behind the padding id, some look at padding, some cut rows into windows. So rows of
different lengths are computed once padded as we do it and once each alone, with no mask at all. The difference is
judged against the rounding of these very weights: what comes out otherwise when each result is changed in its last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sgpt.runtime.errors import InputError

LENGTHS = (5, 24)
ROUNDINGS = 16  # times the measured rounding; wrong families are beyond 1,000 times (tests/family_sweep.py)


@torch.inference_mode()
def check_agreement(
    path: str,
    trunk: nn.Module,
    embed: Callable[[Tensor, Tensor], Tensor],
    width: int,
    limit: int | None,
    *,
    causal: bool = False,
) -> tuple[float, float]:
    """Raises InputError for a trunk whose padded rows differ from each alone, with the number and the family.

    embed: input_ids and mask [rows, T] to hidden states, as it is done here. width: D, as config.json has it.
    limit: of positions. causal: a token must not see those behind it, either. Returns by how much they differ, and how
    much rounding explains, as shares of the largest number.
    """
    family = trunk.config.model_type
    rows = probe_rows(trunk, limit)
    alone = [_hidden(trunk, row[None])[0] for row in rows]
    if alone[0].shape[-1] != width:
        raise InputError(
            f"{path}: {type(trunk).__name__} ({family}) gives {alone[0].shape[-1]} numbers where its config says "
            f"{width}; choose another base"
        )
    ids, mask = _padded(rows, getattr(trunk.config, "pad_token_id", None))
    largest = max(float(row.abs().max()) for row in alone)
    allowed = ROUNDINGS * (trunk_rounding(trunk, rows, alone) + torch.finfo(alone[0].dtype).eps)

    def difference(padded: Tensor, expected: list[Tensor]) -> float:
        """padded [rows, T, D]; expected: the real tokens of each row, [length, D]."""
        if padded.shape[1] < len(expected[-1]):  # a family that gives fewer hidden states than tokens
            return float("inf")
        by_row = [(one[: len(row)] - row).abs().max() for one, row in zip(padded, expected, strict=True)]
        return max(float(row) for row in by_row) / max(largest, 1e-30)

    padded = difference(embed(ids, mask), alone)
    if not padded <= allowed:  # NaN is refused too
        raise InputError(
            f"{path}: rows of different lengths are not computed as each alone by {type(trunk).__name__} ({family}): "
            f"they differ by {padded:.1e} of the largest number where rounding explains {allowed:.1e}; this family "
            "cannot be used here, choose another base"
        )
    if causal:
        ahead = 0.0
        for row, whole in zip(rows, alone, strict=True):
            half = row[: len(row) // 2]
            ahead = max(ahead, difference(whole[None], [_hidden(trunk, half[None])[0]]))
        if not ahead <= allowed:
            raise InputError(
                f"{path}: {type(trunk).__name__} ({family}) looks at tokens behind the one it reads, by {ahead:.1e} "
                "of the largest number, so it predicts no next token; re-rank with a decoder such as "
                "EleutherAI/gpt-neo-125m"
            )
    return padded, allowed


def probe_rows(trunk: nn.Module, limit: int | None) -> list[Tensor]:
    """Token ids of two lengths, the same each time, from the upper part of the table, where no special tokens are."""
    size = trunk.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    stated = trunk.config.to_dict().items()
    special = {value for key, value in stated if key.endswith("token_id") and isinstance(value, int)}
    usual = torch.tensor([token for token in range(size // 2, size) if token not in special] or [0])
    device = trunk.get_input_embeddings().weight.device
    lengths = (max(1, min(length, limit or length)) for length in LENGTHS)
    return [usual[torch.randint(len(usual), (length,), generator=generator)].to(device) for length in lengths]


@torch.inference_mode()
def trunk_rounding(trunk: nn.Module, rows: list[Tensor], alone: list[Tensor]) -> float:
    """The largest change, as a share of the largest number, when each operation's result is changed in its last bit."""
    generator = torch.Generator().manual_seed(1)

    def nudge(module: nn.Module, inputs, output):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps).to(output.dtype)

    hooks = [module.register_forward_hook(nudge) for module in trunk.modules() if not any(module.children())]
    try:
        again = [_hidden(trunk, row[None])[0] for row in rows]
    finally:
        for hook in hooks:
            hook.remove()
    largest = max(float(row.abs().max()) for row in alone)
    change = max(float((one - other).abs().max()) for one, other in zip(again, alone, strict=True))
    return change / max(largest, 1e-30)


def _hidden(trunk: nn.Module, ids: Tensor) -> Tensor:
    return trunk(input_ids=ids).last_hidden_state


def _padded(rows: list[Tensor], pad_id: int | None) -> tuple[Tensor, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    masks = [torch.ones_like(row) for row in rows]
    return pad(rows, batch_first=True, padding_value=max(pad_id or 0, 0)), pad(masks, batch_first=True)
