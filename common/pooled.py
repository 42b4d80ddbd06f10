"""A GPT that is read by a small head: one state per text, frozen blocks computed once.

    model = PooledGPT(gpt, n_outputs=1)       # a reward; a classifier has one output per label
    model(token_ids, lengths)                 # (B, T), (B,) -> (B, 1)
    states = lower_states(model, rows)        # what the frozen blocks make of each row

The state is that of a text's last token, which has seen all the others. Texts are filled up at the
right, where the causal mask hides the filling from every real token: no text depends on its
neighbours in a batch. B batch, T tokens, C model width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.evaluation import evaluation_mode
from common.fine_tuning import LengthBatches
from common.gpt import GPT

POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (B, T, C), lengths (B,) -> (B, C)
    "last": lambda x, lengths: x[torch.arange(len(x), device=x.device), lengths - 1],
    "mean": lambda x, lengths: (x * real_tokens(x, lengths)).sum(1) / lengths[:, None],
    "first": lambda x, lengths: x[:, 0],
}


def real_tokens(x: Tensor, lengths: Tensor) -> Tensor:
    """True where x (B, T, C) holds a text, False where it is filled up: (B, T, 1)."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]


class PooledGPT(nn.Module):
    """Token ids (B, T) and lengths (B,) -> (B, n_outputs), by a linear head that begins at zero.

    gpt:  pretrained or not; its own head is not used
    pool: what the head reads: the state of the "last" token, the "mean" of all, or that of the
          "first", to see why not. Raises ValueError for any other
    """

    def __init__(self, gpt: GPT, n_outputs: int, pool: str = "last"):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}, it must be one of {', '.join(POOLS)}")
        self.gpt, self.pool = gpt, pool
        self.head = nn.Linear(gpt.config.d_model, n_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(gpt.token_embedding.weight.device)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The head's (B, n_outputs) from ids (B, T), or from what `lower` made, (B, T, C)."""
        start = self.n_frozen if x.is_floating_point() else 0
        x = self._blocks(x, start, None)  # (B, T, C)
        return self.head(self.gpt.final_norm(POOLS[self.pool](x, lengths)))

    def lower(self, token_ids: Tensor) -> Tensor:
        """What the first `n_frozen` blocks make of ids (B, T): (B, T, C), always the same."""
        return self._blocks(token_ids, 0, self.n_frozen)

    def _blocks(self, x: Tensor, start: int, end: int | None) -> Tensor:
        """Blocks from `start` to `end`; before the first come the embeddings."""
        gpt, positions = self.gpt, torch.arange(x.shape[1], device=x.device)
        if not x.is_floating_point():
            x = gpt.dropout(gpt.position_embedding.embed(gpt.token_embedding(x), positions))
        rotate = gpt.position_embedding.rotation(positions, x.dtype)
        for block in gpt.blocks[start:end]:
            x = block(x, rotate)
        return x  # (B, T, C)

    @property
    def n_frozen(self) -> int:
        """How many blocks, from the first on, no training changes; 0 if the embeddings train."""
        trains = lambda module: any(p.requires_grad for p in module.parameters())
        if trains(self.gpt.token_embedding) or trains(self.gpt.position_embedding):
            return 0
        return next(
            (i for i, block in enumerate(self.gpt.blocks) if trains(block)), len(self.gpt.blocks)
        )

    @torch.no_grad()
    def outputs(self, rows: Sequence[Tensor], batch_size: int = 16) -> Tensor:
        """(N, n_outputs) in fp32 on the CPU, of rows of ids or of what `lower_states` made."""
        device = self.head.weight.device
        found = torch.empty(len(rows), self.head.out_features)
        with evaluation_mode(self):
            for x, lengths, places in LengthBatches(rows, range(len(rows)), batch_size):
                found[places] = self(x.to(device), lengths.to(device)).float().cpu()
        return found


@torch.no_grad()
def lower_states(model: PooledGPT, rows: Sequence[Tensor], batch_size: int = 16) -> list[Tensor]:
    """What the frozen blocks make of each row (T,): (T, C). Compute it once, use it every epoch.

    Where all blocks are frozen, only what is pooled is kept, (1, C). Where none is, the
    rows come back as they are.
    """
    if not model.n_frozen:
        return list(rows)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = model.head.weight.device
    all_frozen = model.n_frozen == len(model.gpt.blocks)
    with evaluation_mode(model):
        for ids, lengths, places in LengthBatches(rows, range(len(rows)), batch_size):
            states = model.lower(ids.to(device)).cpu()  # (B, T, C)
            if all_frozen:
                states = POOLS[model.pool](states, lengths)[:, None]  # (B, 1, C)
            for place, length, state in zip(places.tolist(), lengths.tolist(), states, strict=True):
                found[place] = state[:length].clone()
    return found
