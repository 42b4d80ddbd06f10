"""`course push`: a model to a model hub, after a look at what would go there.

    plan = plan_push(Path("mine"), "owner/name", CardFacts(license="apache-2.0"))
    print(plan)           # every file with its size, where it would go, and the model card
    push(plan)            # makes the repository, private unless told otherwise, and uploads

The hub is huggingface.co, or what HF_ENDPOINT says; the token is the one of `hf auth login`, or
HF_TOKEN. Only weights and what belongs to them are uploaded, whatever else is in the folder.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.assets import HUB
from common.download import readable
from common.export import BESIDE, CARD
from common.model_card import CardFacts, model_card
from common.sources import KINDS
from common.tokenizer_file import write_atomically
from common.weights import open_pretrained


class HubError(Exception):
    """The model can't be pushed. The message is one line: why, and what to do."""


@dataclass(frozen=True)
class Push:
    """What is to go where."""

    folder: Path
    files: dict[str, int]  # names in the folder -> bytes; without the card
    left: list[str]  # what else is in the folder, and stays there
    repo: str
    public: bool
    endpoint: str
    card: str
    is_own_card: bool  # the folder has one already

    def __str__(self) -> str:
        sizes = self.files | {CARD: len(self.card.encode())}
        width = max(map(len, sizes))
        kind = "public" if self.public else "private"
        lines = [f"to {self.endpoint}/{self.repo} ({kind}), {readable(sum(sizes.values()))}:"]
        lines += [f"  {name:<{width}}  {readable(size):>8}" for name, size in sizes.items()]
        if self.left:
            lines.append(f"not uploaded: {', '.join(self.left)}")
        whose = "made from these files"
        if self.is_own_card:
            whose = "as it is in the folder (without it, one is made)"
        return "\n".join([*lines, "", f"{CARD}, {whose}:", "", self.card])


def plan_push(path: Path, repo: str, facts: CardFacts, public: bool = False) -> Push:
    """Look at a file or folder of weights and say what would be uploaded. Touches no network.

    Raises HubError for a name or address that can't be, and what `open_pretrained` raises.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as why:
        raise HubError(_line(why)) from None
    if repo.count("/") != 1:
        raise HubError(f"'{repo}' is no repository: write owner/name, such as ada/my-first-llm")
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or HUB
    if urlsplit(endpoint).scheme not in ("http", "https"):
        raise HubError(f"HF_ENDPOINT={endpoint} is no address: it begins with https://")
    if not path.exists():
        raise HubError(f"{path}: no such file or folder; `uv run course convert` makes one")
    pretrained = open_pretrained(path)
    folder = path if path.is_dir() else path.parent
    wanted = [path.name] if path.is_file() else [f.name for f in folder.iterdir() if _is_part(f)]
    wanted += [name for name in BESIDE if (folder / name).is_file()]
    files = {n: (folder / n).stat().st_size for n in sorted({*wanted} - {CARD})}
    left = sorted(f.name for f in folder.iterdir() if f.name not in {*files, CARD})
    own = folder / CARD
    card = own.read_text(encoding="utf8") if own.exists() else ""
    card = card or model_card(path, pretrained, repo, facts)
    return Push(folder, files, left, repo, public, endpoint, card, own.exists())


def _is_part(file: Path) -> bool:
    """Whether it holds weights, or says which files do."""
    return file.is_file() and (
        file.suffix in KINDS or file.name.endswith(".safetensors.index.json")
    )


def push(plan: Push) -> str:
    """Upload what the plan says, the card written into the folder; returns the model's address.

    What is at the hub already is not sent again, so that a broken upload is resumed by pushing
    again. Raises HubError, in one line, for a missing token and whatever the hub says.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError  # of its HTTP library, whichever that is

    if not get_token():
        raise HubError("there is no token: run `uv run hf auth login`, or set HF_TOKEN")
    if not plan.is_own_card:
        write_atomically(plan.folder / CARD, plan.card)
    api = HfApi(endpoint=plan.endpoint, library_name="llm-by-coding")
    try:
        api.create_repo(plan.repo, private=not plan.public, exist_ok=True)
        api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=[glob.escape(name) for name in (*plan.files, CARD)],
            commit_message="Upload by `course push`",
        )
    except (HTTPError, OSError, ValueError) as why:
        raise HubError(_explain(why, plan)) from None
    return f"{plan.endpoint}/{plan.repo}"


def _explain(why: Exception, plan: Push) -> str:
    """What went wrong at the hub, and what to do."""
    status = getattr(getattr(why, "response", None), "status_code", None)
    if status == 401:
        return f"{plan.endpoint} does not accept the token: `uv run hf auth login` makes a new one"
    if status == 403:
        return f"the token may not write to {plan.repo}: it needs the right to, or another owner"
    if status is not None:
        said = getattr(why, "server_message", None) or why
        return f"{plan.endpoint} answered {status}: {_line(said)}"
    return f"{plan.endpoint} can't be reached or used ({_line(why)}): is there a network?"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]
