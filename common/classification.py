"""Fine-tune a pretrained model to sort messages, from few labelled ones; from the command line.

    python -m common.classification --labelled 512 --seed 0          # spam or not, from 512 SMS
    python -m common.classification --labelled 64 --seed 0 --json    # one line for a program
    python -m common.classification --labelled 64 --method tfidf-chars  # the baseline to beat

It prints the accuracy on messages that nothing was learned from, its 95% interval, and seconds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from common.assets import AssetUnavailable
from common.classifier import POOLS, Classifier, save_classifier, trained_parameters
from common.classifier_training import RECIPES, Recipe, fine_tune, score
from common.device import pick_device
from common.gpt import GPT
from common.messages import (
    SPAM_LABELS,
    Split,
    check_labels,
    distinct,
    divide,
    fold_digits,
    read_messages,
    read_table,
)
from common.metrics import Scores
from common.tokenizer import BPETokenizer
from common.training import TrainingDiverged
from common.weights import load_pretrained

# ---------------------------------------------------------------------------------- the baselines

BASELINES = {  # methods without a model, and what they ask of scikit-learn's TfidfVectorizer
    "tfidf": {},  # words of two letters or more, in lower case: scikit-learn's own choice
    "tfidf-chars": {"analyzer": "char_wb", "ngram_range": (1, 4), "preprocessor": fold_digits},
}


def tfidf_scores(split: Split, labels: Sequence[str], method: str = "tfidf") -> Scores:
    """What TF-IDF with logistic regression reaches; `method`: one of `BASELINES`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    check_labels(split.train, labels)
    pieces = TfidfVectorizer(sublinear_tf=True, **BASELINES[method])
    model = make_pipeline(pieces, LogisticRegression(C=100.0, max_iter=1000))
    model.fit([m.text for m in split.train], [m.label for m in split.train])
    order = [list(model.classes_).index(label) for label in labels]  # scikit-learn sorts them
    probabilities = model.predict_proba([m.text for m in split.test])[:, order]
    return Scores.of([m.label for m in split.test], probabilities, labels)


# ------------------------------------------------------------------------------------ the command


def build_parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m common.classification",
        description="Fine-tune a pretrained model to tell spam from ham.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--labelled", type=int, default=512, metavar="N", help="messages to learn from")
    add("--seed", type=int, default=0, metavar="S", help="of split, adapters and order")
    add("--model", default="smollm2-135m", help="or gpt2-124m, or a file or folder of weights")
    add("--method", default="lora", choices=[*RECIPES, *BASELINES], help="what is trained")
    add("--pool", default="mean", choices=list(POOLS), help="the tokens that the head reads")
    add("--random-weights", action="store_true", help="the same model, not pretrained")
    add("--messages", metavar="FILE", help="a CSV file with the columns label (ham, spam) and text")
    add("--full", action="store_true", help="all 5,574 messages of UCI, downloaded once")
    add("--test", type=int, default=300, metavar="N", help="messages to judge by")
    add("--validation", type=float, default=0.0, metavar="X", help="share of the labelled ones")
    add("--learning-rate", type=float, metavar="X", help="default: the method's own")
    add("--rank", type=int, metavar="R", help="of LoRA's adapters; default: the method's own")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products; default: float32")
    add("--out", metavar="FILE", help="where to save the classifier")
    add("--device", help="cuda, mps or cpu; default: the best that there is")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--json", action="store_true", help="one line of JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: fine; 1: it did not work, and a line says why; 2: wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        result = run(arguments)
    except (ValueError, AssetUnavailable, TrainingDiverged) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if arguments.json:
        print(json.dumps(result))
    else:
        print(result["summary"])
    return 0


def _complain(line: str) -> int:
    print(f"classification: {line}", file=sys.stderr)
    return 1


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong before anything is read. Sets the number of threads."""
    threads, rank, out = arguments.threads, arguments.rank, arguments.out
    if threads is not None and threads < 1:
        raise ValueError(f"--threads is {threads}, it must be above 0")
    if rank is not None and (arguments.method != "lora" or rank < 1):
        raise ValueError(f"--rank is {rank}: it is for --method lora, and must be above 0")
    if out and not Path(out).absolute().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist; make it, or choose another")
    if out and arguments.random_weights:
        raise ValueError(
            "--out saves what differs from pretrained weights: without --random-weights"
        )
    if arguments.method not in BASELINES:
        recipe_of(arguments).settings(max(arguments.labelled, 1))
        pick_device(arguments.device)
    if threads:
        torch.set_num_threads(threads)


def run(arguments: argparse.Namespace) -> dict:
    """Split, fine-tune, score, save: the figures, as JSON takes them."""
    check(arguments)
    begun = perf_counter()
    source = arguments.messages
    messages = distinct(read_table(source) if source else read_messages(arguments.full))
    split = divide(
        messages, arguments.labelled, arguments.seed, arguments.test, arguments.validation
    )
    check_labels(split.train)
    trained = 0
    if arguments.method in BASELINES:
        scores = tfidf_scores(split, SPAM_LABELS, arguments.method)
    else:
        classifier = build_classifier(arguments)
        fine_tune(
            classifier,
            split.train,
            recipe_of(arguments),
            validation=split.validation,
            seed=arguments.seed,
            progress=sys.stderr.isatty(),
        )
        scores = score(classifier, split.test)
        trained = sum(p.numel() for p in trained_parameters(classifier).values())
        if arguments.out:
            save_classifier(classifier, arguments.out, arguments.model)
    seconds = perf_counter() - begun
    spam = sum(message.label == "spam" for message in split.train + split.validation)
    about = f"{arguments.method}, {arguments.labelled} labelled messages ({spam} spam)"
    figures = f"{trained:,} parameters trained, {seconds:.0f} s in all"
    return {
        "method": arguments.method,
        "model": None if arguments.method in BASELINES else arguments.model,
        "random_weights": arguments.random_weights,
        "pool": arguments.pool,
        "labelled": arguments.labelled,
        "labelled_spam": spam,
        "seed": arguments.seed,
        "trained_parameters": trained,
        "seconds": round(seconds, 1),
        **scores.to_dict(),
        "summary": f"{about}, seed {arguments.seed}: {scores}; {figures}",
    }


def build_classifier(arguments: argparse.Namespace) -> Classifier:
    """The pretrained model, or the same one with random weights, with a head for ham and spam."""
    gpt, tokenizer = load_base(arguments.model, arguments.random_weights, arguments.seed)
    gpt = gpt.to(pick_device(arguments.device))
    return Classifier(gpt, tokenizer, SPAM_LABELS, pool=arguments.pool)


def load_base(model: str, random_weights: bool, seed: int) -> tuple[GPT, BPETokenizer]:
    """A model that classifiers begin with: pretrained, or the same one with random weights.

    Raises what `load_pretrained` raises, and ValueError for a model without a tokenizer.
    """
    gpt, tokenizer = load_pretrained(model)
    if tokenizer is None:
        raise ValueError(f"{model} comes without a tokenizer: choose another model")
    if random_weights:
        torch.manual_seed(seed)
        gpt = GPT(gpt.config)
    torch.manual_seed(seed)  # for dropout, where the model has it
    return gpt, tokenizer


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The method's recipe, changed as the command line asks."""
    asked = {name: getattr(arguments, name) for name in ("learning_rate", "rank", "dtype")}
    changes = {name: value for name, value in asked.items() if value is not None}
    return replace(RECIPES[arguments.method], **changes)


if __name__ == "__main__":
    sys.exit(main())
