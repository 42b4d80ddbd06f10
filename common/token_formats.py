"""Tokenizers as model files carry them: Hugging Face's tokenizer.json, and GGUF's metadata.

    tokenizer, roles = read_folder(Path("SmolLM2-135M-Instruct"))
    for name, text in hugging_face_files(tokenizer, roles).items(): ...

Beside the tokenizer such files say which tokens play which `Roles`, and how a chat is laid out.
Both directions stand here side by side. A tokenizer that is not byte-level BPE with one of our two
ways of cutting words is not guessed at: reading warns and gives None, writing is refused.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import tokenizer_file
from common.gguf_file import refuse
from common.pretokenizer import DIGITS_PATTERN, GPT2_PATTERN
from common.tokenizer import END_OF_TEXT, BPETokenizer
from common.tokenizer_file import from_printable, parse_merge, to_printable

JSON_LIMIT = 64 << 20  # bytes; the largest tokenizer.json in use has about 35 MB
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Roles:
    """Ids of the tokens that begin a text, end it and fill a batch; and how a chat is written."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    chat_template: str | None = None  # in Jinja

    @classmethod
    def usual(cls, tokenizer: BPETokenizer | None) -> "Roles":
        """GPT-2's habit: one token between texts, <|endoftext|>, begins and ends them."""
        between = tokenizer.special_tokens.get(END_OF_TEXT) if tokenizer else None
        return cls(bos=between, eos=between)

    def ids(self) -> dict[str, int | None]:
        """As Hugging Face's configurations call them."""
        return {f"{role}_token_id": getattr(self, role) for role in ("bos", "eos", "pad")}


NO_ROLES = Roles()


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises WeightsFileError if it is none, or absurdly large."""
    if path.stat().st_size > JSON_LIMIT:
        refuse(path, "it is absurdly large")
    try:
        table = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError):
        table = None
    return table if isinstance(table, dict) else refuse(path, "it is not a JSON object")


def warn_unknown(path: Path, why: str = "is not of a kind known here") -> None:
    """Say that the weights of `path` come without their tokenizer."""
    warnings.warn(f"{path}: its tokenizer {why}, so it is None", stacklevel=2)


# ------------------------------------------------------------------------- Hugging Face's, and ours

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
STEPS = {GPT2_PATTERN: [BYTE_LEVEL], DIGITS_PATTERN: [DIGITS, BYTE_LEVEL]}


def read_folder(folder: Path) -> tuple[BPETokenizer | None, Roles]:
    """What tokenizer.json and the files beside it say; (None, NO_ROLES) where there is none."""
    path = folder / TOKENIZER
    if not path.exists():
        return None, NO_ROLES
    table = read_json(path)
    try:
        if table.get("format") == tokenizer_file.FORMAT:
            tokenizer = BPETokenizer(**tokenizer_file.parse(path.read_bytes()))
        else:
            tokenizer = _parse(path, **table)
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        refuse(path, f"it is damaged ({why})")
    return tokenizer, _read_roles(folder, tokenizer)


def _parse(
    path: Path, model, pre_tokenizer=None, added_tokens=(), normalizer=None, **_
) -> BPETokenizer | None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps if step]
    patterns = [pattern for pattern, known in STEPS.items() if known == steps]
    if not patterns or model["type"] != "BPE" or normalizer:
        return warn_unknown(path)
    special = {token["content"]: token["id"] for token in added_tokens}
    vocab = {i: from_printable(t) for t, i in model["vocab"].items() if t not in special}
    merges = [parse_merge(m if isinstance(m, str) else " ".join(m)) for m in model["merges"]]
    return BPETokenizer(merges, special, vocab, patterns[0])


def _read_roles(folder: Path, tokenizer: BPETokenizer | None) -> Roles:
    """From tokenizer_config.json, where a token is a text, or a table with it as "content"."""
    if tokenizer is None or not (folder / SETTINGS).exists():
        return Roles.usual(tokenizer)
    settings, ids = read_json(folder / SETTINGS), {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        ids[role] = tokenizer.special_tokens.get(text) if isinstance(text, str) else None
    template = settings.get("chat_template")
    if (folder / TEMPLATE).exists():  # a file of its own since version 4.51 of transformers
        template = (folder / TEMPLATE).read_text(encoding="utf8", errors="replace")
    return Roles(**ids, chat_template=template if isinstance(template, str) else None)


def own_files(tokenizer: BPETokenizer, roles: Roles) -> dict[str, str]:
    """Files to put beside our own formats, {name: text}; `BPETokenizer.load` reads the first."""
    _, made_from = tokenizer.__reduce__()
    return {TOKENIZER: tokenizer_file.dump(*made_from), **_role_files(tokenizer, roles)}


def hugging_face_files(
    tokenizer: BPETokenizer, roles: Roles, context_length: int
) -> dict[str, str]:
    """The files that `AutoTokenizer` reads, {name: text}. Raises ValueError where it could not."""
    special = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]  # fmt: skip
    steps = _lookup(STEPS, tokenizer)
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [s | {"trim_offsets": True} if s is BYTE_LEVEL else s for s in steps],
        },
        "post_processor": None,
        "decoder": decoder | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(_texts(tokenizer))},
            "merges": _merge_lines(tokenizer),
        },
    }
    settings = _role_files(
        tokenizer,
        roles,
        tokenizer_class="PreTrainedTokenizerFast",  # take tokenizer.json as it is
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    return {TOKENIZER: json.dumps(table, ensure_ascii=False, indent=1) + "\n", **settings}


def _role_files(tokenizer: BPETokenizer, roles: Roles, **settings) -> dict[str, str]:
    text_of = {i: text for text, i in tokenizer.special_tokens.items()}
    named = {f"{role}_token": text_of.get(getattr(roles, role)) for role in ("bos", "eos", "pad")}
    named = {key: text for key, text in named.items() if text is not None}
    files = {SETTINGS: json.dumps(named | settings, ensure_ascii=False, indent=2) + "\n"}
    return files | ({TEMPLATE: roles.chat_template} if roles.chat_template else {})


# --------------------------------------------------------------------------------------------- GGUF

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens
PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_PATTERN, "default": GPT2_PATTERN}
NAMES = {pattern: [name] for name, pattern in reversed(PATTERNS.items())}
GGUF_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def read_gguf(path: Path, metadata: Mapping, vocab_size: int) -> tuple[BPETokenizer | None, Roles]:
    """What the metadata of a GGUF file says. Raises ValueError where it does not fit together."""
    table = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if "tokens" not in table:
        return None, NO_ROLES
    pattern = PATTERNS.get(str(table.get("pre")))
    if str(table.get("model")) != "gpt2" or pattern is None:
        return warn_unknown(path), NO_ROLES
    tokens, merges, kinds = (table.get(key) for key in ("tokens", "merges", "token_type"))
    types = [type(value) for value in (tokens, merges, kinds)]
    if types != [list, list, np.ndarray] or not len(tokens) == len(kinds) == vocab_size:
        raise ValueError(f"its tokenizer is incomplete, or not for the {vocab_size} tokens it has")
    kinds = kinds.tolist()
    while kinds and kinds[-1] == UNUSED:  # rows that only fill up the embedding
        kinds.pop()
    known = list(zip(tokens, kinds, strict=False))
    special = {token: i for i, (token, kind) in enumerate(known) if kind != NORMAL}
    vocab = {i: from_printable(token) for i, (token, kind) in enumerate(known) if kind == NORMAL}
    ids = {role: table.get(f"{name}_token_id") for role, name in GGUF_ROLES.items()}
    known_ids = set(special.values())
    ids = {role: i if type(i) is int and i in known_ids else None for role, i in ids.items()}
    template = metadata.get("tokenizer.chat_template")
    roles = Roles(**ids, chat_template=template if isinstance(template, str) else None)
    return BPETokenizer(map(parse_merge, merges), special, vocab, pattern), roles


def gguf_tokenizer(tokenizer: BPETokenizer, roles: Roles, vocab_size: int) -> dict:
    """The metadata with which llama.cpp cuts text into the same tokens. Raises ValueError if none.

    vocab_size: rows of the embedding; those beyond the tokenizer's are marked as unused
    """
    padding = [f"[PAD{i}]" for i in range(tokenizer.vocab_size, vocab_size)]
    special = set(tokenizer.special_tokens.values())
    kinds = [CONTROL if i in special else NORMAL for i in range(tokenizer.vocab_size)]
    table = {
        "model": "gpt2",
        "pre": _lookup(NAMES, tokenizer)[0],
        "tokens": _texts(tokenizer) + padding,
        "token_type": np.array(kinds + [UNUSED] * len(padding), np.int32),
        "merges": _merge_lines(tokenizer),
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    for role, name in GGUF_ROLES.items():
        if getattr(roles, role) is not None:
            table[f"{name}_token_id"] = getattr(roles, role)
    table = {f"tokenizer.ggml.{key}": value for key, value in table.items()}
    template = roles.chat_template
    return table | ({"tokenizer.chat_template": template} if template else {})


# ----------------------------------------------------------------------------------- what both need


def _lookup(choices: Mapping[str, list], tokenizer: BPETokenizer) -> list:
    """What a format calls the tokenizer's way of cutting words."""
    if tokenizer.pattern not in choices:
        raise ValueError("its tokenizer cuts words by a pattern of its own, unknown to others")
    return choices[tokenizer.pattern]


def _texts(tokenizer: BPETokenizer) -> list[str]:
    """Every token as text, in the order of ids: ordinary ones as printable bytes."""
    text_of = {i: to_printable(token) for i, token in tokenizer.vocab.items()}
    text_of |= {i: text for text, i in tokenizer.special_tokens.items()}
    texts = [text_of[i] for i in range(len(text_of))]
    if len(set(texts)) < len(texts):
        twice = next(text for text in tokenizer.special_tokens if texts.count(text) > 1)
        raise ValueError(f"its special token {twice!r} is written like one of its ordinary tokens")
    return texts


def _merge_lines(tokenizer: BPETokenizer) -> list[str]:
    return [f"{to_printable(a)} {to_printable(b)}" for a, b in tokenizer.merges]
