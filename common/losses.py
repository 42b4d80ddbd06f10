"""What a prediction costs: cross-entropy and what is added to it; never all logits at once.

    loss = weighted_sum({cross_entropy: 1.0, z_loss: 1e-4})
    loss(logits, targets)  # (B, T, V), (B, T) -> ()
    linear_cross_entropy(hidden, weight, targets)  # (N, C), (V, C), (N,) -> ()
    token_logprobs(hidden, weight, targets)  # the same -> (N,), for losses of whole answers

Every loss of logits takes logits (..., T, V) and targets (..., T), averages over the targets that
are not -100, and is in nats. Its arguments are set by `functools.partial(cross_entropy,
label_smoothing=0.1)`. B batch, T tokens, N = B * T, C model width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.gpt import GPTConfig

IGNORED = -100  # a target that isn't one, as in `torch.nn.functional.cross_entropy`
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean of -log(probability of the target).

    With `label_smoothing` ε, the target is no longer all of the truth but 1 - ε of it, and every
    token has ε/V (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of (log Z)², where Z = Σ exp(logits) is what softmax divides by.

    Cross-entropy doesn't notice when all logits grow together; this does, and keeps Z near 1.
    PaLM adds 1e-4 of it (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """
    return (logits.float().logsumexp(-1)[targets != IGNORED] ** 2).mean()


def unlikelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Against repetition: the mean of -Σ log(1 - probability of what has been there before).

    The sum is over the targets earlier in the row, each token once, except the target itself.
    To be added to the cross-entropy (Welleck et al. 2020, arXiv:1908.04319, section 5.1).
    """
    real, ids = targets != IGNORED, targets.clamp(min=0)
    same = targets[..., :, None] == targets[..., None, :]  # (..., T, T)
    first_time = ~same.tril(-1).any(-1)  # (..., T)
    unwanted = ((first_time & real)[..., None, :] & ~same).tril(-1)  # (..., T, T)
    logits = logits.float()
    earlier = ids[..., None, :].expand(same.shape)  # at each place, all tokens of the row
    p = (logits.gather(-1, earlier) - logits.logsumexp(-1, keepdim=True)).exp()  # (..., T, T)
    penalty = -torch.log1p(-p.clamp(max=1 - 1e-5)) * unwanted  # a certain repetition costs 11.5
    return penalty.sum(-1)[real].mean()


def weighted_sum(weights: Mapping[Loss, float]) -> Loss:
    """One loss out of several: {loss: its weight} -> a function of logits and targets."""
    return lambda logits, targets: sum(w * loss(logits, targets) for loss, w in weights.items())


# ------------------------------------------------------------------------------ one chunk at a time


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int = 256,
    *,
    label_smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T, of which only `chunk_size` rows exist at once.

    hidden (N, C), weight (V, C), targets (N,) -> (). Plus `z_weight` times the `z_loss`. The
    gradients are computed with the loss, while a chunk is at hand, and handed over by the backward
    pass, so a second one raises RuntimeError. After Liger Kernel, Hsu et al. 2024,
    arXiv:2410.10989.
    """
    device, dtype = hidden.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    options = chunk_size, dtype, torch.is_grad_enabled(), label_smoothing, z_weight
    return ChunkedCrossEntropy.apply(hidden, weight, targets, *options)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The work of `linear_cross_entropy`: products in `dtype`, the rest in fp32 at least."""

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, chunk_size, dtype, with_gradients, smoothing, z_weight
    ):
        exact = torch.promote_types(dtype, torch.float32)
        shares = (targets != IGNORED).to(exact)  # of each row in the mean: 1 / count, or 0
        shares /= shares.sum()
        needed = [with_gradients and need for need in ctx.needs_input_grad[:2]]
        d_hidden = torch.empty_like(hidden) if needed[0] else None  # (N, C)
        d_weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None  # (V, C)
        W, loss = weight.to(dtype), hidden.new_zeros((), dtype=exact)
        memory = aligned_rows(min(chunk_size, len(targets)), len(W), W)  # (n, V)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            x = hidden[rows].to(dtype)  # (n, C)
            logits = torch.mm(x, W.T, out=memory[: len(x)]).to(exact)  # (n, C) @ (C, V) -> (n, V)
            loss += loss_into_gradient(logits, targets[rows], shares[rows], smoothing, z_weight)
            d_logits = logits.to(dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ W  # (n, V) @ (V, C) -> (n, C)
            if d_weight is not None:
                add_product(d_weight, d_logits.T, x)  # (V, n) @ (n, C) -> (V, C)
            del logits, d_logits  # or, unless they are `memory`, two chunks exist at the next
        ctx.gradients = d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy keeps its gradients for one backward pass only: "
                "compute the loss again before the second"
            )
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # handed over, not copied
        scaled = (None if d is None else d.mul_(d_loss) for d in (d_hidden, d_weight))
        return *scaled, *[None] * 6


def loss_into_gradient(
    logits: Tensor, targets: Tensor, shares: Tensor, label_smoothing: float, z_weight: float
) -> Tensor:
    """The loss Σ shares * loss of a row, (); logits (n, V) become its gradient by them, in place.

    targets (n,), shares (n,): what each row counts. The gradient is the probability, less 1 at the
    target; with smoothing, 1 - ε there and ε/V everywhere; the z-loss adds 2 z log Z probabilities.
    """
    target, share = targets[:, None].clamp(min=0), shares[:, None]  # (n, 1) each
    largest = logits.amax(-1, keepdim=True)  # (n, 1), taken off so that exp doesn't overflow
    logits -= largest
    truth = (1 - label_smoothing) * logits.gather(1, target)  # (n, 1)
    if label_smoothing:
        truth += label_smoothing * logits.mean(-1, keepdim=True)
    total = logits.exp_().sum(-1, keepdim=True)  # (n, 1)
    log_z = total.log() + largest
    logits *= share * (1 + 2 * z_weight * log_z) / total
    if label_smoothing:
        logits -= share * (label_smoothing / logits.shape[-1])
    logits.scatter_add_(1, target, share * (label_smoothing - 1))
    return (share * (total.log() - truth + z_weight * log_z**2)).sum()


def aligned_rows(n_rows: int, n_columns: int, like: Tensor) -> Tensor:
    """Memory for a matrix, each row of which begins on a cache line of 64 bytes.

    With GPT-2's 50,257 columns in a row, products that write it are a sixth faster than without.
    """
    line = 64 // like.element_size()
    return like.new_empty(n_rows, -(-n_columns // line) * line)[:, :n_columns]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int = 256,
    temperature: float = 1.0,
) -> Tensor:
    """The log-probability of every target by itself, of which sums and ratios can be made.

    hidden (N, C), weight (V, C), targets (N,) -> (N,) in nats, fp32 at least. At most `chunk_size`
    rows of the logits hidden @ weight.T / temperature exist at once, on the way back, too: there
    they are computed anew (Chen et al. 2016, arXiv:1604.06174).
    """

    def of_chunk(x: Tensor, wanted: Tensor) -> Tensor:
        logits = F.linear(x, weight)  # (n, C) @ (C, V) -> (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return -F.cross_entropy(logits, wanted, reduction="none")

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(of_chunk, *chunk, **settings) for chunk in chunks])


def loss_bytes(
    config: GPTConfig, batch_size: int, n_tokens: int, chunk_size: int | None = None
) -> int:
    """The most that head and loss hold at once on the way there and back, in fp32.

    chunk_size=None is the plain cross-entropy of all logits: its log-probabilities, their gradient
    and that of the logits exist together. In chunks it's one chunk, and the head's gradient.
    """
    N, C, V = batch_size * n_tokens, config.d_model, config.vocab_size
    plain = max(
        3 * N * V, N * V + V * C
    )  # the head's gradient comes when two of the three are gone
    return 4 * (N * C + (plain if chunk_size is None else min(chunk_size, N) * V + V * C))
