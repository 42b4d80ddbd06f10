"""Do the tests notice when the model is broken? This script breaks it, one piece at a time.

    uv run python tests/mutations.py            # all, about five minutes on 2 cores
    uv run python tests/mutations.py rotary     # those whose name contains a word

Each mutation replaces one piece of text in a temporary copy of `common` and runs the tests of that
room. A line per mutation says which test went red first. Exit status 1 if one stayed green
(survived): then the tests are too weak, or the piece isn't needed.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room: {name: (what stands there, what to put in its place)}
MUTATIONS = {
    "layers": {
        "layer norm: the mean stays": ("weight * (x - mean) /", "weight * x /"),
        "layer norm: bias dropped in the kernel": (
            "self.weight, self.bias, self.eps",
            "self.weight, None, self.eps",
        ),
        "rms norm: eps dropped": (
            "self.weight.shape, self.weight, self.eps)",
            "self.weight.shape, self.weight)",
        ),
        "gelu: the exact one": ('approximate="tanh"', 'approximate="none"'),
        "swiglu: gate and value swapped": (
            "F.silu(self.gate(x)) * self.up(x)",
            "F.silu(self.up(x)) * self.gate(x)",
        ),
        "rotary: sign": ("torch.cat((-sin, sin), -1)", "torch.cat((sin, -sin), -1)"),
        "rotary: no sign": ("torch.cat((-sin, sin), -1)", "torch.cat((sin, sin), -1)"),
        "rotary: theta forgotten": ("self.head_dim, self.theta)", "self.head_dim)"),
        "rotary: all pairs equally fast": ("/ theta**exponents", "/ theta ** (0 * exponents)"),
        "positions: not added": ("return x + self.weight[positions]", "return x"),
    },
    "attention": {
        "causal mask: dropped": ("visible.tril(n_keys - n_queries)", "visible"),
        "causal mask: one token too far": (
            "visible.tril(n_keys - n_queries)",
            "visible.tril(n_keys - n_queries + 1)",
        ),
        "causal mask: dropped in the kernel": ("is_causal=causal and T == S", "is_causal=False"),
        "causal mask: dropped behind a cache": ("if causal and 1 < T < S:", "if False:"),
        "scale: dropped": (" / q.shape[-1] ** 0.5", ""),
        "scale: D instead of its root": ("q.shape[-1] ** 0.5", "q.shape[-1]"),
        "mask: inverted": ("masked_fill(~mask", "masked_fill(mask"),
        "softmax: over the queries": ("return scores.softmax(-1)", "return scores.softmax(-2)"),
        "groups: heads in the wrong order": (
            "k = k.repeat_interleave(groups, dim=1)",
            "k = k.repeat(1, groups, 1, 1)",
        ),
        "heads: not brought back": ("y.transpose(1, 2).flatten(2)", "y.reshape(x.shape)"),
        "rotation: keys left out": (
            "k = rotate(self.key(source).unflatten(-1, split))",
            "k = self.key(source).unflatten(-1, split)",
        ),
        "cross-attention: values of x": ("v = self.value(source)", "v = self.value(x)"),
        "dropout: in evaluation, too": ("self.dropout if self.training else 0.0", "self.dropout"),
        "cache: written at the start": (
            "self.values[:, :, self.length : end] = v",
            "self.values[:, :, : k.shape[2]] = v",
        ),
        "padding: visible": ("visible & (real | itself)", "visible.expand(len(real), 1, -1, -1)"),
        "padding: blind fill tokens": ("(real | itself)", "real"),
        "padding: counted as positions": (
            "(positions - self.padding[:, None]).clamp(min=0)",
            "positions.expand(len(self.padding), -1)",
        ),
    },
    "transformer": {
        "decoder: sees the future": (
            "self.attention.causal = True",
            "self.attention.causal = False",
        ),
        "decoder: doesn't look at the source": (
            "x, memory=memory",
            "x, memory=x",
        ),
        "residual: dropped": (
            "self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))",
            "self.feed_forward_norm(self.dropout(self.feed_forward(x)))",
        ),
        "positions: sine and cosine swapped": (
            "(angles.sin(), angles.cos())",
            "(angles.cos(), angles.sin())",
        ),
        "positions: dropped": ("* C**0.5 + positions", "* C**0.5"),
    },
    "gpt": {
        "residual: dropped around attention": (
            "x = x + self.dropout(attended)",
            "x = self.dropout(attended)",
        ),
        "residual: dropped around the MLP": (
            "return x + self.dropout(self.mlp(",
            "return self.dropout(self.mlp(",
        ),
        "norm: dropped before attention": (
            "self.attention(self.attention_norm(x), ",
            "self.attention(x, ",
        ),
        "norm: dropped before the MLP": ("self.mlp(self.mlp_norm(x))", "self.mlp(x)"),
        "norm: dropped before the head": ("return self.final_norm(x)", "return x"),
        "norm: eps forgotten": (
            "self.attention_norm = NORMS[config.norm](C, config.norm_eps)",
            "self.attention_norm = NORMS[config.norm](C, 0.1)",
        ),
        "positions: from 0 behind a cache": ("cache.positions(T) if cache else ", ""),
        "padding: mask not passed on": ("mask = cache.mask(T)", "mask = None"),
        "groups: none": (
            "C, config.n_heads, config.n_kv_heads,",
            "C, config.n_heads, config.n_heads,",
        ),
        "start: ten times too wide": ("std=0.02 * scale", "std=0.2 * scale"),
        "start: residual projections as wide as the rest": (
            "-0.5 if added else 1.0",
            "-0.0 if added else 1.0",
        ),
        "start: biases left alone": ("parameter.zero_()", "pass"),
        "head: listed twice": (
            "self.shared = (embedding,)",
            "self.shared = nn.ModuleList([embedding])",
        ),
        "accounting: attention's FLOPs": (
            "4 * config.n_layers * n_tokens",
            "2 * config.n_layers * n_tokens",
        ),
        "accounting: grouped keys": (
            "2 * config.n_layers * config.n_kv_heads",
            "2 * config.n_layers * config.n_heads",
        ),
    },
    "generation": {
        "logits: of the first position": (
            "model.hidden(unread, cache)[:, -1]",
            "model.hidden(unread, cache)[:, 0]",
        ),
        "cache: not started anew when full": (
            "cache.length in (0, cache.capacity)",
            "cache.length == 0",
        ),
        "cache: never used": ("if not use_cache or", "if True or"),
        "padding: forgotten": ("(padding - ids.shape[1] + unread.shape[1]).clamp(min=0)", "None"),
        "padding: not shrinking with the window": (
            "padding - ids.shape[1] + unread.shape[1]",
            "padding",
        ),
        "end: the row goes on": ("token.masked_fill(finished, eos_id)", "token"),
        "end: never stops": ("and finished.all():", "and False:"),
        "temperature: upside down": (
            "logits.float() / temperature",
            "logits.float() * temperature",
        ),
        "top-k: one too many": ("logits.topk(min(k,", "logits.topk(min(k + 1,"),
        "top-p: one too few": ("cumsum(-1) - probabilities", "cumsum(-1)"),
        "top-p: in sorted order": (".scatter(-1, order, largest_first)", ".copy_(largest_first)"),
        "dropout: while generating": ("    model.eval()\n", ""),
        "dropout: gone afterwards": ("model.train(training)", "pass"),
    },
    "decoding": {
        "residual: dropped after attention": ("of_one(y.view(H * D), x)", "of_one(y.view(H * D))"),
        "residual: dropped for one token": ("of_one(bent, x)", "of_one(bent)"),
        "residual: dropped for many": (
            "block.up(self._norm(x)))).add_(x)",
            "block.up(self._norm(x))))",
        ),
        "bias: lost behind a residual": ("residual + start", "residual"),
        "norm: its weight forgotten": ("weight * norm.weight * self.root", "weight * self.root"),
        "norm: its bias forgotten": (
            "moved = weight @ norm.bias",
            "moved = 0 * weight @ norm.bias",
        ),
        "norm: eps forgotten": ("self.root * config.norm_eps**0.5", "0.0"),
        "eps: something is added to its entry": (
            "(0, 0, 0, extra)).clone()",
            "(0, 0, 0, extra), value=0.1)",
        ),
        "final norm: its bias forgotten": ("else x + self.final_bias", "else x"),
        "rotary: pairs are not neighbours": ("halves.transpose(1, 2)", "halves"),
        "rotary: keys of one token not turned": (
            "heads[: (H + K) * D]",
            "heads[: (H + K) * D].clone()",
        ),
        "mask: dropped": ("values, mask, causal=mask is None", "values, None, causal=True"),
        "causal mask: dropped": ("causal=mask is None)", "causal=False)"),
        "padding: one token does as if there were none": (
            "if len(x) == 1 and mask is None",
            "if len(x) == 1",
        ),
        "gate and value swapped": ("gate, up = x.chunk", "up, gate = x.chunk"),
        "gate and value swapped for one token": (
            "gate, up = wide[:width]",
            "up, gate = wide[:width]",
        ),
        "adapters: taken for plain layers": ("if any(type(m) is not nn.Linear", "if any(False"),
    },
    "losses": {
        "targets of -100 count": ("shares = (targets != IGNORED)", "shares = (targets != 1000)"),
        "gradient: nothing taken off at the target": ("share * (label_smoothing - 1)", "0 * share"),
        "gradient: not averaged": ("shares /= shares.sum()", "pass"),
        "gradient: not by the outer one": ("d.mul_(d_loss)", "d"),
        "stability: the largest logit stays": ("logits -= largest", "largest = 0 * largest"),
        "smoothing: the target keeps it all": ("truth = (1 - label_smoothing) *", "truth ="),
        "smoothing: nothing for the others": ("share * (label_smoothing / logits.shape[-1])", "0"),
        "z-loss: no gradient": ("(1 + 2 * z_weight * log_z)", "1"),
        "z-loss: without the largest": ("total.log() + largest", "total.log()"),
        "unlikelihood: against the target": ("[..., None, :] & ~same)", "[..., None, :])"),
        "unlikelihood: counted twice": ("~same.tril(-1).any(-1)", "real | ~real"),
        "unlikelihood: of the future": ("& ~same).tril(-1)", "& ~same)"),
        "unlikelihood: infinite": ("p.clamp(max=1 - 1e-5)", "p"),
        "memory: two chunks at once": ("d_logits = logits.to(dtype)", "d_logits = logits.clone()"),
        "memory: gradients copied": ("d.mul_(d_loss)", "d * d_loss"),
    },
    "objectives": {
        "masked: always by the mask": ("chosen & (fate < 0.8)", "chosen & (fate < 1)"),
        "masked: never left": ("chosen & (fate >= 0.9)", "chosen & (fate >= 0.8)"),
        "masked: causal": ("torch.ones(T, T,", "torch.eye(T, T,"),
        "masked: asks for everything": ("ids.masked_fill(~chosen, IGNORED)", "ids"),
        "prefix: causal inside": ("| known[:, None, :]", "| False"),
        "prefix: one token too few asked for": (
            "lengths[:, None] - 1, IGNORED",
            "lengths[:, None], IGNORED",
        ),
        "prefix: sees what it should say": ("known = place < lengths", "known = place <= lengths"),
        "spans: same lengths always": ("[: n - 1] + 1", "[: n - 1] * 0 + torch.arange(1, n)"),
        "spans: never at the end": ("kept[[0, -1]] -= 1", "kept[[0, 0]] -= 2"),
        "chance: not from the generator": (
            "torch.rand(ids.shape, generator=generator,",
            "torch.rand(ids.shape,",
        ),
        "loss: mask forgotten": ("model.hidden(inputs, mask=mask)", "model.hidden(inputs)"),
    },
    "dataloader": {
        "targets: not shifted": (
            "return window[:-1], window[1:]",
            "return window[:-1], window[:-1]",
        ),
        "targets: not shifted in shards": ("batch[:, 1:].astype", "batch[:, :-1].astype"),
    },
    "chat_format": {
        "control tokens: from what users type": (
            'ids += self.tokenizer.encode("".join(texts))',
            'ids += self.tokenizer.encode("".join(texts), self.template.controls)',
        ),
        "learned: not the end": ("after[0] = after[0]._replace(learned=True)", "pass"),
        "learned: questions, too": (
            '_Piece(turn["content"], learned=answer)',
            '_Piece(turn["content"], learned=True)',
        ),
        "context: the newest turn goes first": ("rest = rest[2:]", "rest = rest[:-2]"),
    },
    "instruction": {
        "mask: one token late": (
            "masked_fill(~learned[1:], IGNORED)",
            "masked_fill(~learned[:-1], IGNORED)",
        ),
        "filling: counts": ("padding_value=IGNORED", "padding_value=0"),
        "loss: of all tokens": ("learned = targets != IGNORED", "learned = targets != 1000"),
        "answers: in the order of lengths": ("answers[place] =", "answers[len(places) - 1] ="),
    },
    "rewards": {
        "loss: the other way round": (
            "F.logsigmoid(chosen - rejected)",
            "F.logsigmoid(rejected - chosen)",
        ),
        "state: of the token before": (
            "ids = ids[: len(ids) - learned[::-1].index(True)]",
            "ids = ids[: len(ids) - learned[::-1].index(True) - 1]",
        ),
    },
    "preference": {
        "reference: left out": ("beta * (policy - reference)", "beta * (policy - 0 * reference)"),
        "log-probabilities: of the wrong rows": (
            "learned.nonzero()[:, 0]",
            "learned.nonzero()[:, 0].flip(0)",
        ),
        "reference: with its adapters": ("off = has_lora(model) and not adapters", "off = False"),
        "reference: sides swapped": ("found.view(2, -1).T", "found.view(2, -1).flip(0).T"),
    },
    "rollout": {
        "mask: filling counts": (
            "(tokens, chosen.masked_fill(~alive, 0.0), alive)",
            "(tokens, chosen, torch.ones_like(alive))",
        ),
        "targets: one late": ("targets[: len(prompt) - 1]", "targets[: len(prompt)]"),
        "targets: one early": ("targets[: len(prompt) - 1]", "targets[: max(len(prompt) - 2, 0)]"),
        "temperature: forgotten": ("logits.float() / temperature", "logits.float()"),
        "reference: moves with the policy": ("copy.deepcopy(policy)", "policy"),
    },
    "reinforcement": {
        "k3: upside down": ("log_r = reference - logprobs", "log_r = logprobs - reference"),
        "baseline: itself included": (
            "(groups.sum(1, keepdim=True) - groups) / max(n - 1, 1)",
            "groups.mean(1, keepdim=True).expand_as(groups)",
        ),
        "gae: one reward late": ("delta = rewards[:, t]", "delta = rewards[:, t - 1]"),
        "gae: the filling is worth something": (
            "rewards, values = rewards * mask, values * mask",
            "pass",
        ),
        "reward: on the last column": (
            "mask.long().cumsum(1) == mask.sum(1, keepdim=True)",
            "mask.long().cumsum(1) == mask.shape[1]",
        ),
        "ratio: clipped alone": ("-torch.min(ratio * advantages, ", "-torch.min(1e9 + 0 * ratio, "),
        "ratio: upside down": ("ratio = (logprobs - old).exp()", "ratio = (old - logprobs).exp()"),
        "kl: the weight runs away": ("self.weight *= 1 + error", "self.weight *= 1 - error"),
        "reinforce: no leash": (
            "totals = e.scores - self.kl.weight * strayed",
            "totals = e.scores",
        ),
        "grpo: no leash": ("self.kl.weight * kl_k3(logprobs, e.reference)", "0"),
    },
    "policy_training": {
        "dropout: in the update": (
            "with evaluation_mode(learner.actor):",
            "with evaluation_mode(learner.actor, on=False):",
        ),
        "leash: never adapted": ("learner.algorithm.kl.update(steps[-1].kl, len(played))", "pass"),
        "end: costs nothing": ("- no_end_penalty * ~played.ended", ""),
    },
}


class FirstRed:
    """A pytest plugin that remembers the first test that failed."""

    name = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid.partition("::")[2]


def run(room: str, name: str) -> tuple[str, bool]:
    """Tries one mutation; returns the line to print, and whether a test noticed."""
    old, new = MUTATIONS[room][name]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("common", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "benchmarks")
            shutil.copytree(ROOT / part, Path(folder, part), ignore=ignored)
        source = Path(folder, "common", f"{room}.py")
        text = source.read_text(encoding="utf8")
        if old not in text:
            return f"STALE     {room}: {name}: there is no '{old}' any more", False
        source.write_text(text.replace(old, new), encoding="utf8")
        red = pytest_in(folder, f"tests/test_{room}.py")
    return (f"red       {room}: {name}: {red}" if red else f"SURVIVED  {room}: {name}"), bool(red)


def pytest_in(folder: str, test_file: str) -> str | None:
    """The first test of the copy in `folder` that fails. In this process: torch is loaded once."""
    for module in list(sys.modules):
        if module.split(".")[0] == "common" or module.startswith("test_"):
            del sys.modules[module]
    first_red, working_directory = FirstRed(), os.getcwd()
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder  # for tests that start a process of their own
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = ["-x", "-p", "no:cacheprovider", "-p", "no:nbval", "-c", os.devnull]
            pytest.main([*arguments, f"--rootdir={folder}", test_file], plugins=[first_red])
    finally:
        os.chdir(working_directory)
        sys.path.remove(folder)
    return first_red.name


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    jobs = [(room, name) for room in MUTATIONS for name in MUTATIONS[room]]
    jobs = [job for job in jobs if wanted in ": ".join(job)]
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started now
    noticed = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for line, red in pool.map(run, *zip(*jobs, strict=True)):
            print(line, flush=True)
            noticed += red
    print(f"{noticed} of {len(jobs)} mutations turned a test red")
    return int(noticed < len(jobs))


if __name__ == "__main__":
    sys.exit(main())
