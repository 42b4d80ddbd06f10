"""How fast SmolLM2-135M writes: `generate`, `transformers.generate`, and what memory allows.

    uv run python tests/benchmarks/bench_generation.py [--rounds 5] [--threads 2]
    uv run python tests/benchmarks/bench_generation.py --preset gpt2-124m

Greedy, batch 1, 64 prompt + 128 new tokens, random weights (the speed doesn't depend on them). The
limit is the bare products of the same weights with the same shapes: one matrix product each for the
prompt, then one matrix-vector product each per token, and nothing in between. The contenders take
turns, so that a busy machine slows all alike; ratios are taken within a round, the median counts.
"Fused" is `FusedGPT`, a copy of the model that only writes; "int8" is `quantize_for_decoding`. bf16
is left out on a CPU without instructions for it.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.decoding import FusedGPT
from common.generation import generate
from common.gpt import GPT, PRESETS, GPTConfig
from common.quantization import quantize_for_decoding

PROMPT, NEW = 64, 128
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or platform.machine() in ("arm64", "aarch64")


def rival(config: GPTConfig) -> LlamaForCausalLM | GPT2LMHeadModel:
    """The same architecture in `transformers`, as it is shipped."""
    if config.position == "learned":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=config.d_model, n_layer=config.n_layers, n_head=config.n_heads)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()


@torch.inference_mode()
def bare_products(model: GPT) -> None:
    """What nobody can leave out: every matrix times the prompt, then times NEW - 1 vectors."""
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head, widths = model.head.weight, {weight.shape[1] for weight in linears}
    for T in [PROMPT] + [1] * (NEW - 1):
        x = {n: torch.ones(1, T, n, dtype=head.dtype) for n in widths}
        for weight in linears:
            F.linear(x[weight.shape[1]], weight)
        F.linear(x[head.shape[1]][:, -1], head)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument(
        "--preset", choices=("smollm2-135m", "gpt2-124m"), default="smollm2-135m"
    )
    arguments = arguments.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    config = PRESETS[arguments.preset]
    theirs, ours, ours_bf16 = rival(config), GPT(config).eval(), GPT(config).eval().bfloat16()
    fused = FusedGPT(GPT(config))
    ours_int8 = quantize_for_decoding(GPT(config).eval())
    prompt = torch.randint(config.vocab_size, (1, PROMPT))

    def transformers_generate() -> None:
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape == (1, PROMPT + NEW)

    contenders = {
        "transformers fp32, cached": transformers_generate,
        "ours fp32, cached": lambda: generate(ours, prompt, NEW),
        "ours fp32, fused": lambda: generate(fused, prompt, NEW),
        "limit fp32: bare products": lambda: bare_products(ours),
        "ours int8, cached": lambda: generate(ours_int8, prompt, NEW),
        "ours bf16, cached": lambda: generate(ours_bf16, prompt, NEW),
        "limit bf16: bare products": lambda: bare_products(ours_bf16),
    }
    if not HAS_BF16:
        contenders = {name: run for name, run in contenders.items() if "bf16" not in name}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    generate(ours, prompt, NEW, use_cache=False)
    seconds["ours fp32, no cache (once)"] = [time.perf_counter() - start]

    print(f"{arguments.preset}, {arguments.threads} threads, {arguments.rounds} rounds")
    baseline = seconds["transformers fp32, cached"]
    for name, times in seconds.items():
        rate = NEW / statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(baseline, times, strict=False))
        print(f"{name:<26} {rate:6.1f} tokens/s {ratio:6.2f} x transformers")
    for name in ("ours fp32, cached", "ours fp32, fused", "ours bf16, cached"):
        if name not in seconds:
            continue
        limit = seconds[f"limit {name[5:9]}: bare products"]
        share = statistics.median(a / b for a, b in zip(limit, seconds[name], strict=True))
        print(f"{name}: {share:.0%} of the limit")


if __name__ == "__main__":
    main()
