"""How much filling batches by length save, on the course's own instructions.

    uv run python tests/benchmarks/bench_instruction_batches.py [--batch-size 8] [--epochs 20]

Conversations in SmolLM2's own template. A batch is as long as its longest row, and what fills up
the others costs as much as text. Counted are the tokens of whole epochs, filling included, in
shuffled batches and in those of `InstructionBatches`; and the shares of filling among them. Exit
status 1 if less than 25% of all tokens are saved at a batch size of 8 or more.
"""

import argparse
import sys

import torch

from common.chat_format import ChatFormat
from common.fine_tuning import by_length, padding_share
from common.instruction import BLUR, InstructionBatches
from common.instruction_data import read_instructions
from common.weights import open_pretrained

LEAST = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    tokenizer = open_pretrained("smollm2-135m").tokenizer
    talks = [entry.messages for entry in read_instructions(split="train")]
    lengths = InstructionBatches(ChatFormat(tokenizer), talks, 1).lengths
    mean = sum(lengths) / len(lengths)
    print(f"{len(talks):,} conversations, {min(lengths)} to {max(lengths)} tokens, mean {mean:.1f}")
    generator, least = torch.Generator().manual_seed(0), 1.0
    for batch_size in arguments.batch_size:
        shuffled, sorted_ = [], []
        for _ in range(arguments.epochs):
            order = torch.randperm(len(lengths), generator=generator).split(batch_size)
            shuffled += [places.tolist() for places in order]
            sorted_ += by_length(lengths, batch_size, generator, BLUR)
        tokens = [sum(len(b) * max(lengths[i] for i in b) for b in x) for x in (shuffled, sorted_)]
        filling = [padding_share(lengths, batches) for batches in (shuffled, sorted_)]
        saved = 1 - tokens[1] / tokens[0]
        filled = [share * n for share, n in zip(filling, tokens, strict=True)]
        print(
            f"batches of {batch_size:2}: filling {filling[0]:.1%} shuffled, {filling[1]:.1%} by "
            f"length; {saved:.1%} of all tokens saved, "
            f"{1 - filled[1] / filled[0]:.1%} of the filling"
        )
        if batch_size >= 8:
            least = min(least, saved)
    return int(least < LEAST)


if __name__ == "__main__":
    sys.exit(main())
