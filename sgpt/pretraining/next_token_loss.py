"""Next-token loss that never holds all logits."""

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoForCausalLM

CHUNK = 512  # positions whose logits exist at a time


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy of a linear head that never holds all logits: each chunk's gradient is made while its softmax is at hand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            part, target = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            logits = part @ weight.T
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            probabilities = logits.exp_()
            normalizer = probabilities.sum(1, keepdim=True)
            total += (normalizer.log() - chosen).sum()
            probabilities /= normalizer
            probabilities.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            hidden_gradient[start : start + CHUNK] = probabilities @ weight
            weight_gradient.addmm_(probabilities.T, part)
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
    windows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window).to(model.device)
    with torch.inference_mode():
        losses = [next_token_loss(model.transformer(part[:, :-1]).last_hidden_state.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten())
                  for part in windows.split(4)]
    return float((sum(losses) / windows[:, 1:].numel()).exp())
