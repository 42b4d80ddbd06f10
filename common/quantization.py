"""Weights of 8 bits for writing text: a quarter of the bytes, and reading bytes is what takes time.

    quantize_for_decoding(model)
    generate(model, prompt, 100)

One token is one vector, and multiplying it by a matrix takes as long as reading the matrix. So each
row of a matrix is kept a second time, as whole numbers from -127 to 127 and one scale. The vector
is rounded too, at each call, and the product is one of integers, which processors without bf16 are
fast at. It costs a quarter more memory and some accuracy: on SmolLM2, whose vectors have a few very
large entries, about 0.1 nats. Dettmers et al. 2022, arXiv:2208.07339, say where that comes from.
"""

import warnings

import torch
from torch import Tensor, nn

from common.gpt import GPT, TiedHead

LARGEST = 127  # of 8 bits; -128 is left out, so that both sides are alike


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (N, M) int8, and the scale of each row (N,): weight ≈ numbers * scale.

    No entry is off by more than half its row's scale. A row of zeros gets the scale 1.
    """
    scale = weight.abs().amax(1) / LARGEST  # (N,)
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Product:
    """The forward pass of a linear layer: a single vector by 8-bit weights, more than one exactly.

    x (B, ..., M) float32 -> (B, ..., N) float32. Raises RuntimeError where PyTorch has no kernels.
    """

    def __init__(self, layer: nn.Linear | TiedHead):
        self.layer = layer
        weight, bias = layer.weight.detach().float(), getattr(layer, "bias", None)
        _, scale = quantize_rows(weight)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        try:
            with warnings.catch_warnings():  # PyTorch plans to replace these tensors one day
                warnings.simplefilter("ignore")
                numbers = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(numbers, bias)
        except (AttributeError, RuntimeError) as why:
            reason = str(why).splitlines()[0]
            raise RuntimeError(f"this PyTorch can't compute with 8-bit weights: {reason}") from None

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:  # prompts and batches: work, not reading, is what takes time
            return type(self.layer).forward(self.layer, x)
        # True: x in 7 bits, as sums of two products may not overflow 16 on older processors.
        return torch.ops.quantized.linear_dynamic(x, self.packed, True)  # (1, M) -> (1, N)


def quantize_for_decoding(model: GPT) -> GPT:
    """Lets `generate` read 8-bit copies of all matrices, the head's too; in place, float32, CPU.

    What the model does with more than one token at a time stays exact, as do saving and copying its
    parameters. After training, or loading other weights, call it again.
    Raises RuntimeError for a model of another dtype or device.
    """
    weight = model.token_embedding.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise RuntimeError(
            f"8-bit weights are made from float32 on the CPU, not {weight.dtype} on {weight.device}"
        )
    for layer in model.modules():
        if isinstance(layer, nn.Linear | TiedHead):
            layer.forward = Int8Product(layer)
    return model
