"""The `course` command: `uv run course --help`.

Each subcommand is a function that takes the parsed arguments and returns the exit status, with a
few lines in `build_parser`. What it needs is imported inside it, so that every one starts fast.
"""

import argparse
import os
import shutil
import sys

from common import teaching

FORMATS = ("safetensors", "pytorch", "numpy", "transformers", "gguf")
DTYPES = ("float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="course", description="Tools for the course.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_doctor(commands)

    fetch = commands.add_parser("fetch", help="get files ahead of a session, or offer them")
    what = fetch.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="everything (from a mirror: all it has)")
    what.add_argument("--list", action="store_true", help="what there is, and where it is")
    what.add_argument("--serve", action="store_true", help="offer this machine's files to a room")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="as in `course fetch --list`")
    fetch.add_argument("--port", type=int, default=8000, help="of --serve (default: %(default)s)")
    fetch.add_argument("--host", default="0.0.0.0", help="of --serve (default: all interfaces)")
    fetch.set_defaults(run=run_fetch, usage_error=fetch.error)

    convert = commands.add_parser("convert", help="write a model in the format of other programs")
    convert.add_argument("source", metavar="NAME|PATH", help="a pretrained model, a file, a folder")
    convert.add_argument("--to", required=True, choices=FORMATS, help="the format")
    convert.add_argument("--out", required=True, metavar="DIR", help="a folder that is made for it")
    convert.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)"
    )
    convert.add_argument("--tokenizer", metavar="NAME|PATH", help="take it from another model")
    convert.add_argument("--force", action="store_true", help="replace what was converted before")
    convert.set_defaults(run=run_convert)

    push = commands.add_parser(
        "push", help="bring a model to a model hub; shows what, unless --yes"
    )
    push.add_argument("path", metavar="PATH", help="a file or folder of weights")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where it goes")
    push.add_argument("--yes", action="store_true", help="do it, and do not only show it")
    push.add_argument("--public", action="store_true", help="for all to see")
    for fact in ("license", "language", "dataset", "base-model"):
        several = {"action": "append", "default": []} if fact in ("language", "dataset") else {}
        push.add_argument(f"--{fact}", help="for the model card", **several)
    push.set_defaults(run=run_push)
    add_chat(commands)
    teaching.add_commands(commands)
    return parser


def add_doctor(commands) -> None:
    """The options of `course doctor`."""
    doctor = commands.add_parser("doctor", help="check this machine and say what to repair")
    doctor.add_argument("--json", action="store_true", help="for machines")
    room = {"nargs": "?", "metavar": "URL", "const": ""}
    doctor.add_argument("--send", **room, help="to the instructor (default: $COURSE_MIRROR)")
    doctor.add_argument(
        "--name", default="", metavar="NICK", help="of --send (default: the host's)"
    )
    doctor.add_argument("--room", **room, help="what all have sent (default: this machine)")
    doctor.set_defaults(run=run_doctor)


def add_chat(commands) -> None:
    """The options of `course chat`."""
    chat = commands.add_parser("chat", help="talk to a model")
    add = chat.add_argument
    add("--model", default="smollm2-135m", metavar="NAME|PATH", help="(default: %(default)s)")
    add("--adapters", metavar="FILE", help="of a fine-tuning by LoRA, made beside the same model")
    add("--tokenizer", metavar="NAME|PATH", help="take it from another model")
    add("--template", choices=("alpaca", "chatml", "smollm2"), help="default: the one that fits")
    add("--system", metavar="TEXT", help="what the model is told first")
    add("--temperature", type=float, default=0.7, help="0: the likeliest (default: %(default)s)")
    add("--top-p", type=float, default=0.95, metavar="P", help="(default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="(default: all)")
    add("--max-tokens", type=int, metavar="N", help="of an answer (default: 256)")
    add("--seed", type=int, help="for the same answers again")
    add("--device", help="cuda, mps or cpu (default: the best that there is)")
    chat.set_defaults(run=run_chat)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: fine; 1: it did not work, and a line says why; 2: wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console can't show every character
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("\ncourse: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `course fetch --list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen command; what can go wrong becomes one line."""
    try:
        from common.assets import AssetUnavailable
        from common.chapters import NotebookError
        from common.classroom import ReportError
        from common.mirror import MirrorError
    except ModuleNotFoundError as error:
        print(f"course: {error}: `uv sync` installs what the course needs", file=sys.stderr)
        return 1
    try:
        return arguments.run(arguments)
    except (AssetUnavailable, MirrorError, NotebookError, ReportError) as error:
        print(f"course: {error}", file=sys.stderr)
        return 1


def run_doctor(arguments: argparse.Namespace) -> int:
    """Check this machine, and tell the instructor; or show what all machines of a room said."""
    from common import classroom
    from common.doctor import examine, report

    if arguments.room is not None:
        reports = classroom.collect(arguments.room or "127.0.0.1:8000")
        print(classroom.table(reports))
        return int(any(f["status"] == "fail" for r in reports for f in r["findings"]))
    findings = examine()
    status = report(findings, as_json=arguments.json)
    if arguments.send is not None:
        url = arguments.send or os.environ.get("COURSE_MIRROR")
        if not url:
            raise classroom.ReportError("where to? `--send URL`, as the instructor's screen says")
        sent = classroom.report_of(findings, arguments.name)
        classroom.send(url, sent)
        print(f"Sent to {url} as '{sent['name']}'.", file=sys.stderr)
    return status


def run_fetch(arguments: argparse.Namespace) -> int:
    """Get files, list them, or offer them to others."""
    from common import mirror

    if arguments.serve:
        mirror.serve(arguments.host, arguments.port)
        return 0
    if arguments.list:
        return list_assets()
    if bool(arguments.names) == arguments.all:
        arguments.usage_error("say which: NAME..., --all, --list or --serve")
    return fetch_all(choose_all() if arguments.all else arguments.names)


def list_assets() -> int:
    """Print a table of all assets."""
    from common.assets import ASSETS, readable, whereabouts

    rows = [(a.name, readable(a.size), whereabouts(a), a.licence, a.about) for a in ASSETS.values()]
    rows.insert(0, ("name", "size", "where", "licence", "what"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def choose_all() -> list[str]:
    """Every asset; from a mirror, those that it has or that are here already."""
    from common.assets import ASSETS, locate
    from common.mirror import names_at

    here = {name for name, asset in ASSETS.items() if locate(asset)[0]}
    mirror = os.environ.get("COURSE_MIRROR")
    if not mirror or len(here) == len(ASSETS):
        return list(ASSETS)
    there = names_at(mirror)
    chosen = [name for name in ASSETS if name in here | there]
    left_out = [name for name in ASSETS if name not in chosen]
    if left_out:
        print(f"not on the mirror, left out: {', '.join(left_out)}")
    return chosen


def fetch_all(names: list[str]) -> int:
    """Fetch what is missing, after saying how much that is. One that fails stops no other."""
    from common.assets import AssetUnavailable, cache_dir, fetch, find, locate, readable

    missing = [asset for asset in map(find, names) if not locate(asset)[0]]
    if missing:
        total = sum(asset.size for asset in missing)
        folder = next(path for path in (cache_dir(), *cache_dir().parents) if path.exists())
        free = shutil.disk_usage(folder).free
        print(f"{readable(total)} to download into {cache_dir()}, {readable(free)} free")
        if total > free:
            raise AssetUnavailable(
                f"{readable(total)} do not fit: name fewer files, make room, or set COURSE_CACHE "
                "to a folder on another disk"
            )
    failed = False
    for name in names:
        try:
            print(f"{name}: {fetch(name, download=True)}")
        except AssetUnavailable as error:
            print(f"course: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def run_convert(arguments: argparse.Namespace) -> int:
    """Write a model in another format, and say what was written and how long it took."""
    from pathlib import Path
    from time import perf_counter

    from common.download import readable
    from common.export import ExportError, export, with_tokenizer_of
    from common.gguf_file import WeightsFileError
    from common.weights import open_pretrained

    out, start = Path(arguments.out), perf_counter()
    try:
        pretrained = open_pretrained(arguments.source)
        if arguments.tokenizer:
            pretrained = with_tokenizer_of(pretrained, arguments.tokenizer)
        sizes = export(pretrained, out, arguments.to, arguments.dtype, arguments.force)
    except (ExportError, WeightsFileError, OSError) as error:
        print(f"course: {error}", file=sys.stderr)
        return 1
    for name, size in sizes.items():
        print(f"{out / name}  {readable(size)}")
    print(f"{readable(sum(sizes.values()))} in {perf_counter() - start:.1f} s")
    return 0


def run_push(arguments: argparse.Namespace) -> int:
    """Show what would go to a model hub; with --yes, bring it there."""
    from pathlib import Path

    from common.gguf_file import WeightsFileError
    from common.hub import HubError, plan_push, push
    from common.model_card import CardFacts

    facts = CardFacts(
        arguments.license or "unknown",
        arguments.language,
        arguments.base_model,
        arguments.dataset,
    )
    try:
        plan = plan_push(Path(arguments.path), arguments.repo, facts, arguments.public)
        print(plan)
        if arguments.yes:
            print(f"\npushed: {push(plan)}")
        else:
            print("\nNothing was uploaded: the same command with --yes does it.")
    except (HubError, WeightsFileError, OSError) as error:
        print(f"course: {error}", file=sys.stderr)
        return 1
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Talk to a model until it is enough."""
    from common.chat import converse, edit_lines, load_chat
    from common.gguf_file import WeightsFileError

    names = ("adapters", "tokenizer", "template", "system", "temperature", "top_p", "top_k")
    options = {name: getattr(arguments, name) for name in (*names, "seed", "device")}
    try:
        chat = load_chat(arguments.model, max_new_tokens=arguments.max_tokens, **options)
    except (ValueError, WeightsFileError, OSError) as error:
        print(f"course: {error}", file=sys.stderr)
        return 1
    edit_lines()
    converse(chat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
