"""What is predicted, and with which loss: the next token, by a cross-entropy that saves memory.

    loss = next_token_loss(model, inputs, targets)  # (B, T), (B, T) -> ()

The logits are by far the largest tensor of a small model: 8 * 256 tokens and a vocabulary of 50,257
make 412 MB in fp32, the log-probabilities 412 MB more, their gradient as much again. None of them
is needed as a whole. B batch, T tokens, N = B * T, C model width, V vocabulary.
"""

import torch
from torch import Tensor, nn

IGNORED = -100  # a target that isn't one, as in `torch.nn.functional.cross_entropy`


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of `model` in nats: (B, T), (B, T) -> ().

    Equal to `F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())`, with its gradients.
    Targets of -100 don't count.
    """
    hidden = model.hidden(inputs).flatten(0, 1)  # (B, T, C) -> (N, C)
    return linear_cross_entropy(hidden, model.head.weight, targets.flatten())


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int = 256
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T, of which only `chunk_size` rows exist at once.

    hidden (N, C), weight (V, C), targets (N,) -> (). The gradients are computed along with the
    loss, while a chunk is at hand. After Liger Kernel, Hsu et al. 2024, arXiv:2410.10989.
    """
    device, dtype = hidden.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with_gradients = torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_size, dtype, with_gradients)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The work of `linear_cross_entropy`: products in `dtype`, everything else in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_size, dtype, with_gradients):
        count = (targets != IGNORED).sum()
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)  # (N, C)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)  # (V, C)
        W = weight.to(dtype)
        chunks = (tensor.split(chunk_size) for tensor in (hidden.to(dtype), targets, d_hidden))
        for x, target, d_x in zip(*chunks, strict=True):
            real = (target != IGNORED)[:, None]  # (n, 1)
            target = target[:, None].clamp(min=0)  # (n, 1)
            logits = (x @ W.T).float()  # (n, C) @ (C, V) -> (n, V)
            logits -= logits.amax(-1, keepdim=True)  # so that exp doesn't overflow
            at_target = logits.gather(1, target)  # (n, 1)
            total = logits.exp_().sum(-1, keepdim=True)  # (n, 1)
            loss += ((total.log() - at_target) * real).sum()
            if with_gradients:  # by the logits: the probability, less 1 at the target
                d_logits = logits.mul_(real / (total * count))
                d_logits = d_logits.scatter_add_(1, target, -(real / count)).to(dtype)
                d_x.copy_(d_logits @ W)  # (n, V) @ (V, C) -> (n, C)
                add_product(d_weight, d_logits.T, x)  # (V, n) @ (n, C) -> (V, C)
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight.to(weight.dtype))
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, d_weight * d_loss, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
