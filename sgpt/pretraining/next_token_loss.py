"""Next-token loss that never holds all logits."""

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoForCausalLM

CHUNK = 512  # positions whose logits exist at a time


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy of a linear head that never holds all logits.

    Each chunk's gradient is computed in the forward pass, while its softmax is at hand: logits of 2,048 positions and
    12,288 tokens would take 100 MB, and as much again for their gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            target = targets[rows, None]
            logits = hidden[rows] @ weight.T  # [CHUNK, V]
            logits -= logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target)
            probabilities = logits.exp_()  # in place, as everything below: one such matrix exists at a time
            normalizer = probabilities.sum(1, keepdim=True)
            total += (normalizer.log() - target_logits).sum()
            probabilities /= normalizer
            # the gradient of the logits is the softmax less 1 at the target
            probabilities.scatter_add_(1, target, torch.full_like(target_logits, -1.0))
            hidden_gradient[rows] = probabilities @ weight
            weight_gradient.addmm_(probabilities.T, hidden[rows])
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, None


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats; hidden [n, D], weight [V, D], targets [n]. Computed in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _NextTokenLoss.apply(hidden.float(), weight, targets)


def perplexity(model: GPTNeoForCausalLM, ids: np.ndarray, window: int) -> float:
    """exp of the mean next-token loss over whole windows of held-out ids."""
    whole = ids[: len(ids) // window * window].astype(np.int64)
    windows = torch.from_numpy(whole).view(-1, window).to(model.device)
    losses = []
    with torch.inference_mode():
        for part in windows.split(4):
            hidden = model.transformer(part[:, :-1]).last_hidden_state.flatten(0, 1)
            losses.append(next_token_loss(hidden, model.lm_head.weight, part[:, 1:].flatten()))
    return float((sum(losses) / windows[:, 1:].numel()).exp())
