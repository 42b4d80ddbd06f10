"""How long it takes until a pretrained model is in memory, and how much memory on the way.

    uv run python tests/benchmarks/bench_loading.py [--rounds 3]        # about 2 minutes

SmolLM2-135M from the packaged GGUF, against transformers from the same file; GPT-2 124M from a
safetensors file with random weights, against transformers and against what teaching code does
(make the model with random weights, read the file, copy one into the other). Ours makes the
tokenizer as well, the others do not.

Every load is the first in a process of its own, libraries imported, and timed until every weight
has been read once: transformers maps a safetensors file, and the file is read when the weights are
used. The contenders take turns, the median counts. Memory is the peak above what the imports had
taken, in units of the model's own size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def load_ours(source: str):
    from common.weights import load_pretrained

    return lambda: load_pretrained(source)[0]


def load_gguf_with_transformers(source: str):
    from transformers import AutoModelForCausalLM

    from common.assets import fetch

    path = fetch(source)
    return lambda: AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def load_with_transformers(source: str):
    from transformers import GPT2LMHeadModel

    return lambda: GPT2LMHeadModel.from_pretrained(Path(source).parent)


def load_as_teaching_code_does(source: str):
    """Constructor, then copy: the names are GPT-2's, the loop is everybody's."""
    import torch
    from safetensors.torch import load_file

    from common.families import GPT2
    from common.gpt import GPT, PRESETS

    def load():
        model = GPT(PRESETS["gpt2-124m"])
        stored = {k.removeprefix(GPT2.prefix): v for k, v in load_file(source).items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = stored[GPT2.stored_name(name)]
                parameter.copy_(GPT2.convert(name, tensor, model.config.head_dim))
        return model

    return load


CONTENDERS = {
    "SmolLM2-135M, GGUF": {"ours": load_ours, "transformers": load_gguf_with_transformers},
    "GPT-2 124M, safetensors": {
        "ours": load_ours,
        "teaching code": load_as_teaching_code_does,
        "transformers": load_with_transformers,
    },
}


def peak_memory() -> int:
    """Bytes; of this process alone, which Linux's `getrusage` would not give."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def measure(model: str, contender: str, source: str) -> None:
    """In a child process: one load; seconds and the ratio of memory go to standard output."""
    load = CONTENDERS[model][contender](source)
    before, start = peak_memory(), time.perf_counter()
    loaded = load()
    for parameter in loaded.parameters():
        parameter.detach().amax()
    seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    print(json.dumps([seconds, (peak_memory() - before) / size]))


def write_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    with tempfile.TemporaryDirectory() as folder:
        sources = dict(
            zip(CONTENDERS, ("smollm2-135m", str(write_gpt2(Path(folder)))), strict=True)
        )
        for model, contenders in CONTENDERS.items():
            results = {contender: [] for contender in contenders}
            for _ in range(arguments.rounds):
                for contender, runs in results.items():
                    command = [sys.executable, __file__, "--measure"]
                    command += [model, contender, sources[model]]
                    output = subprocess.run(
                        command,
                        check=True,
                        text=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                    ).stdout
                    runs.append(json.loads(output.splitlines()[-1]))
            ours = statistics.median(seconds for seconds, _ in results["ours"])
            print(f"\n{model}: seconds (all rounds), times ours, peak memory / model")
            for contender, runs in results.items():
                seconds = [run[0] for run in runs]
                middle, memory = statistics.median(seconds), max(run[1] for run in runs)
                rounds = ", ".join(f"{s:.2f}" for s in seconds)
                print(
                    f"  {contender:14}{middle:7.2f} ({rounds}) {middle / ours:6.1f}x {memory:6.2f}"
                )
    return None


if __name__ == "__main__":
    main()
