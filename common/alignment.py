"""Chapter 7's comparison: SFT, a reward model, DPO, PPO and what each is worth, in stored results.

    python -m common.alignment all --out ch07_instruction_finetune/results
    python -m common.alignment sft reward dpo ppo compare --out DIR     # or stage by stage

Stopped at any moment, it goes on: what DIR holds is not done again. Half "a" of the pairs teaches
reward model, DPO and PPO; half "b" has prompts that none of them saw, and a judge of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from time import perf_counter

import torch

from common.alignment_bench import Bench
from common.alignment_comparison import compare
from common.alignment_policies import direct_preference, reinforcement
from common.alignment_supervised import fine_tuning, reward_models
from common.assets import AssetUnavailable

STAGES = {
    "sft": fine_tuning,
    "reward": reward_models,
    "dpo": direct_preference,
    "ppo": reinforcement,
    "compare": compare,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. 0: fine; 1: it did not work, and a line says why; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m common.alignment", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help=", ".join(STAGES))
    add("--out", required=True, metavar="DIR", help="where results and adapters are, or will be")
    add("--model", default="smollm2-135m", help="the base: a name, or a file or folder of weights")
    add("--limit", type=int, metavar="N", help="only N entries of each kind of data, to try it")
    add("--steps", type=int, metavar="N", help="no run longer than N steps, to try it")
    add("--threads", type=int, metavar="N", help="CPU threads")
    arguments = parser.parse_args(argv)
    try:
        for name in ("limit", "steps", "threads"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, it must be above 0")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        bench = Bench(arguments.model, arguments.out, arguments.limit, arguments.steps)
        for name in STAGES if "all" in arguments.stages else arguments.stages:
            begun = perf_counter()
            STAGES[name](bench)
            print(f"{name}: done in {perf_counter() - begun:.0f} s", flush=True)
    except (ValueError, OSError, AssetUnavailable) as error:
        print(f"alignment: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
