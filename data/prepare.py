"""Get the question sets of the paper and convert them to our JSONL.

    python data/prepare.py all                          # 16 MB, five files in data/
    python data/prepare.py gsm8k aime24                 # only those; also: math500, prm12k
    python data/prepare.py gsm8k --from ~/sources       # offline: ~/sources/gsm8k/train.jsonl, ...
    python data/prepare.py gsm8k --from URL             # a mirror laid out in the same way

Every source file is pinned to a commit, a size and a SHA-256, wherever it comes from, so two
people who ran this script have the same questions. data/README.md says what each set is.
"""

import argparse
import hashlib
import json
import os
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TIMEOUT = 30  # seconds without a single byte before we give up
RECORD = ".prepared.json"  # {output name: [SHA-256 of its source, SHA-256 of the output]}


# ---- one row of each source -> one row of ours -----------------------------------------------


def gsm8k_row(row: dict) -> dict:
    """GSM8K keeps the final answer behind "#### ", with thousands separators: "#### 1,080"."""
    solution, _, answer = row["answer"].rpartition("####")
    return {
        "question": row["question"],
        "answer": answer.strip().replace(",", ""),
        "solution": solution.rstrip("\n"),
    }


def math_row(row: dict) -> dict:
    """MATH as PRM800K splits it. "level" becomes a string: it names a group, it is no quantity."""
    return {
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row["solution"],
        "level": str(row["level"]),
        "subject": row["subject"],
        "id": row["unique_id"],
    }


def aime_row(row: dict) -> dict:
    """AIME: the id is the end of the source's link, which names exam and problem."""
    return {
        "question": row["question"],
        "answer": row["answer"],  # three digits, leading zeros kept: "025"
        "solution": row["solution"],
        "id": row["url"].rpartition("index.php/")[2],  # "2024_AIME_I_Problems/Problem_1"
    }


# ---- where the files are ---------------------------------------------------------------------

RAW = "https://raw.githubusercontent.com"
LFS = "https://media.githubusercontent.com/media"  # like RAW, for files kept in Git LFS
GSM8K = f"{RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
PRM800K = f"{LFS}/openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163"
UPFT = f"{RAW}/1KE-JI/UPFT/05f40279a4b22f32a7924952c1fc60afafd5d7a2"
MATH_LICENCE = "MIT (OpenAI PRM800K; problems from MATH, Hendrycks et al. 2021)"

FILES = [
    dict(set="gsm8k", split="train", rows=7_473, bytes=4_166_206, convert=gsm8k_row,
         url=f"{GSM8K}/grade_school_math/data/train.jsonl", licence="MIT (OpenAI)",
         sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    dict(set="gsm8k", split="test", rows=1_319, bytes=749_738, convert=gsm8k_row,
         url=f"{GSM8K}/grade_school_math/data/test.jsonl", licence="MIT (OpenAI)",
         sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    dict(set="math500", split="test", rows=500, bytes=446_564, convert=math_row,
         url=f"{PRM800K}/prm800k/math_splits/test.jsonl", licence=MATH_LICENCE,
         sha256="35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    dict(set="prm12k", split="train", rows=12_000, bytes=10_896_985, convert=math_row,
         url=f"{PRM800K}/prm800k/math_splits/train.jsonl", licence=MATH_LICENCE,
         sha256="90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076"),
    dict(set="aime24", split="test", rows=30, bytes=146_272, convert=aime_row,
         url=f"{UPFT}/data/math_test/aime24/test.jsonl",
         licence="none stated by the source; problems by MAA",
         sha256="dbd5bee043f45a7c8b1a5fff3d0ee0a87be3c2f133c3015149c05023afaea0c8"),
]


# ---- from there to here ----------------------------------------------------------------------


def layout(file: dict) -> str:
    """Where a folder or mirror given to --from holds the file: "gsm8k/train.jsonl"."""
    return f"{file['set']}/{file['url'].rpartition('/')[2]}"


def locate(file: dict, source: str | None) -> str:
    """The URL to read: the pinned one, or one in the folder or below the URL given to --from."""
    if source is None:
        return file["url"]
    if "://" in source:
        return f"{source.rstrip('/')}/{layout(file)}"
    return (Path(source).expanduser().resolve() / layout(file)).as_uri()


def fetch(file: dict, url: str) -> bytes:
    """The pinned bytes read from url, or a ValueError that says what is wrong with what is there.

    They stay in memory (11 MB at most), so an interrupted download has nothing to leave behind.
    """
    data, size = bytearray(), file["bytes"]
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, tqdm(
            total=size, desc=layout(file), unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            # beyond the expected size nothing can be right any more: stop reading
            while len(data) <= size and (chunk := response.read(1 << 16)):
                data += chunk
                bar.update(len(chunk))
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()).strip("<>")  # one line, whatever the server said
        raise ValueError(f"cannot read {url}: {reason}") from None
    if len(data) != size:
        found = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"{url}: {found} bytes instead of {size:,}, cut short or another file")
    if sha256(data) != file["sha256"]:
        raise ValueError(f"{url}: wrong checksum, SHA-256 {sha256(data)}, not {file['sha256']}")
    return bytes(data)


def convert(file: dict, data: bytes) -> bytes:
    """The source's JSONL as ours; non-ASCII is escaped, so no reader can cut a line in two."""
    # Split on \n only: str.splitlines would also cut at U+2028, which GSM8K contains.
    rows = [file["convert"](json.loads(line)) for line in data.split(b"\n") if line.strip()]
    if len(rows) != file["rows"]:
        raise ValueError(f"{layout(file)}: {len(rows):,} rows instead of {file['rows']:,}")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def sha256(data: bytes) -> str:
    """The SHA-256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: `path` is never half a file."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_record(out: Path) -> dict:
    """What earlier runs wrote into `out`; empty if there is no record or it is damaged."""
    try:
        record = json.loads((out / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        record = None
    return record if isinstance(record, dict) else {}


def prepare(file: dict, source: str | None, out: Path) -> None:
    """Make one output file and say so. One that is already right costs no request.

    Right means: the very bytes an earlier run wrote, from the source that is pinned now. Anything
    else under that name (edited, cut short, made from an older pin) is made again.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, record = out / f"{file['set']}_{file['split']}.jsonl", read_record(out)
    right = path.is_file() and record.get(path.name) == [file["sha256"], sha256(path.read_bytes())]
    if not right:
        data = convert(file, fetch(file, locate(file, source)))
        write_whole(path, data)
        # Read again: another process may have added its own while this one downloaded.
        record = read_record(out) | {path.name: [file["sha256"], sha256(data)]}
        write_whole(out / RECORD, json.dumps(record, indent=1).encode())
    state = "already there" if right else "written"
    print(f"{path}: {file['rows']:,} rows, {state}; licence: {file['licence']}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 or 130 (Ctrl-C) with one line on stderr."""
    names = list(dict.fromkeys(file["set"] for file in FILES))
    parser = argparse.ArgumentParser(description="Get the question sets of the paper as JSONL.")
    parser.add_argument("sets", nargs="+", metavar="SET", help=f"{', '.join(names)}, or all")
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL",
                        help="folder or base URL that holds the source files as SET/NAME, "
                             "such as gsm8k/train.jsonl (default: GitHub)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                        help="folder to write (default: data/)")
    args = parser.parse_args(argv)
    local = "--from DIR_OR_URL reads source files that you already have"
    try:
        for name in args.sets:
            if name not in [*names, "all"]:
                raise ValueError(f"no such set: {name}; there are {', '.join(names)}, and all")
        for file in FILES:
            if file["set"] in args.sets or "all" in args.sets:
                local = f"put it at DIR_OR_URL/{layout(file)} and add --from DIR_OR_URL"
                prepare(file, args.source, args.out)
    except ValueError as error:
        print(f"error: {error}. To use a local copy: {local}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; another folder can be given with --out DIR", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the files finished so far are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
