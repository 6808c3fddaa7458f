"""Weights from a hub or a folder: download with resume, whole models, pickles.

Environment: HF_ENDPOINT, a mirror instead of https://huggingface.co; HF_TOKEN, your access token
for gated models, which only that host sees; SPARSE_CACHE, instead of ~/.cache/sparse-attention.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.request
from urllib.error import URLError
from urllib.parse import quote, urlsplit

import torch
from tqdm import tqdm

from plumbing.flags import replace
from plumbing.safetensors import read_safetensors

WEIGHTS = ["model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json"]  # looked for in this order
GPT2 = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]  # short for openai-community/...

# -----------------------------------------------------------------------------
# download: to <name>.part, continued after a cut, checked, then renamed

WAITS = [0.5, 1, 2, 4, None]  # seconds before another try
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


class MissingFile(ValueError):
    """The hub answered, and has no such file: another name may exist."""


def download(repo, filename, revision="main", kind="model"):
    """Path of a hub file in the cache folder; a file that is there needs no network.

    repo 'owner/name'; kind 'model' or 'dataset'. Size and hash are checked where the server tells
    them. MissingFile (404), ValueError (gated, damaged), OSError (network, disk), one line each.
    One process at a time may download the same file.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    place = {"model": "", "dataset": "datasets/"}[kind] + repo
    cache = os.path.expanduser(os.environ.get("SPARSE_CACHE") or "~/.cache/sparse-attention")
    path = os.path.join(cache, place, revision, filename)
    if os.path.exists(path):
        return path
    url = f"{endpoint}/{place}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    part = path + ".part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if fault := mismatch(part, *transfer(url, part)):
            os.remove(part)
            raise ValueError(f"{url} arrived with {fault} and was removed: run the same command "
                             "again, or name another mirror in HF_ENDPOINT")
        os.replace(part, path)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"can not write {path}: {error.strerror}; SPARSE_CACHE names "
                                   "another cache folder") from None
    return path


def transfer(url, part):
    """All of url into the file part, in as many requests as it takes -> ({sizes}, tag) promised."""
    sizes = set()
    for wait in WAITS:
        try:
            # The last byte again: a part that is already whole gets an answer too.
            response, start, size, tag = connect(url, max(bytes_in(part) - 1, 0))
            sizes |= {size} - {None}
            receive(response, part, start, size)
            return sizes, tag
        except NETWORK as error:
            code = getattr(error, "code", None)
            if code == 416:  # part is longer than the file
                os.remove(part)
            offline = code is None and isinstance(error, URLError) and not bytes_in(part)
            if wait is None or offline or code and code < 500 and code != 416:
                raise explained(error, url, bytes_in(part)) from None
            tqdm.write(f"{url}: {error}; trying again in {wait} s")
            time.sleep(wait)


def bytes_in(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


class Redirects(urllib.request.HTTPRedirectHandler):
    """The hub redirects large files to a storage host, which must not see the token and does not
    tell the hash: the redirecting answer does."""

    tag = None

    def redirect_request(self, request, body, code, message, headers, url):
        new = super().redirect_request(request, body, code, message, headers, url)
        self.tag = self.tag or headers["X-Linked-Etag"]
        if urlsplit(url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def connect(url, start):
    """GET url from byte start on -> response, its first byte, bytes of the whole file, hash tag."""
    token, redirects = os.environ.get("HF_TOKEN", "").strip(), Redirects()
    headers = {"User-Agent": "sparse-attention"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    response = urllib.request.build_opener(redirects).open(request, timeout=30)
    answer, at_home = response.headers, urlsplit(response.url)[:2] == urlsplit(url)[:2]
    # A server that ignores Range sends the file from byte 0, without a Content-Range.
    span = answer["Content-Range"] or f"bytes 0-/{answer['Content-Length'] or '*'}"
    if not (numbers := re.fullmatch(r"bytes (\d+)-\d*/(?:(\d+)|\*)", span)):
        raise http.client.HTTPException(f"the server speaks of {span!r}")
    first, size = (n and int(n) for n in numbers.groups())
    tag = redirects.tag or answer["X-Linked-Etag"] or (at_home and answer["ETag"])
    return response, first, size, tag


def receive(response, part, start, size):
    """The body of the response into the file part, from byte start on; size: of the whole file."""
    bar = tqdm(desc=os.path.basename(part).removesuffix(".part"), initial=start, total=size,
               unit="B", unit_scale=True)
    with response, open(part, "ab") as f, bar:
        f.truncate(start)
        while block := response.read1(2**20):
            f.write(block)
            bar.update(len(block))
        f.flush()
        os.fsync(f.fileno())
    if size is not None and bytes_in(part) < size:
        raise ConnectionError(f"the connection was cut at {bytes_in(part)} of {size} bytes")


def mismatch(path, sizes, tag):
    """What contradicts the sizes or the ETag: 64 digits are a sha256, 40 git's sha1 of a blob."""
    have = bytes_in(path)
    if sizes - {have}:
        return f"{have} bytes instead of {max(sizes)}"
    if digest := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?', tag or ""):
        new = hashlib.sha256() if len(digest[1]) == 64 else hashlib.sha1(b"blob %d\0" % have)
        with open(path, "rb") as f:
            while block := f.read(2**20):
                new.update(block)
        if new.hexdigest() != digest[1]:
            return "another hash than the hub's"


def explained(error, url, have):
    """The exception for a request that failed for good: one line that says what to do."""
    code, page = getattr(error, "code", None), url.split("/resolve/")[0]
    if code in (401, 403):
        token = "the HF_TOKEN you set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN"
        return ValueError(f"{page} is gated or private, or there is no such repository or local "
                          f"folder (HTTP {code}, {token}): accept the licence on that page and set "
                          "HF_TOKEN to your access token")
    if code == 404:
        return MissingFile(f"{url}: there is no such repository or file")
    if code or have:
        return ConnectionError(f"{url}: {error}; {have} bytes are kept, run the same command again")
    return ConnectionError(f"can not reach {page} ({getattr(error, 'reason', error)}): without a "
                           "network give a local folder (config.json + model.safetensors), or set "
                           "HF_ENDPOINT to a mirror")


def fetch_model(name):
    """The folder of a model: an existing path as it is, a hub name by download.

    'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or 'owner/name'. Fetches config.json, the first
    of WEIGHTS that there is, its shards, and tokenizer.json if there is one.
    """
    if os.path.exists(name):
        return name
    repo = f"openai-community/{name}" if name in GPT2 else name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"{name!r} is no file or folder here and no hub name: give a local folder "
                         f"(config.json + model.safetensors), {', '.join(GPT2)}, or owner/name as "
                         "in meta-llama/Llama-3.2-1B")
    folder = os.path.dirname(download(repo, "config.json"))
    cached = [file for file in WEIGHTS if os.path.exists(os.path.join(folder, file))]
    if not cached:  # else it was asked for then: a second run needs no network
        with contextlib.suppress(MissingFile):
            download(repo, "tokenizer.json")
    for file in cached or WEIGHTS:
        try:
            path = download(repo, file)
        except MissingFile:
            continue
        for shard in sorted(set(read_index(path).values())) if file.endswith(".json") else []:
            download(repo, shard)
        return folder
    raise ValueError(f"{repo} has none of {', '.join(WEIGHTS)}")


# -----------------------------------------------------------------------------
# readers: {name: tensor}, memory-mapped, so that only what is used is read

def read_weights(path):
    """{name: tensor} of a folder that holds one of WEIGHTS, or of one such file."""
    path = os.fspath(path)
    if os.path.isdir(path):
        found = [file for file in WEIGHTS if os.path.exists(os.path.join(path, file))]
        if not found:
            raise ValueError(f"{path} holds no weights: looked for {', '.join(WEIGHTS)}")
        path = os.path.join(path, found[0])
    if path.endswith(".index.json"):
        return read_shards(path)
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} is not a table of named tensors")
    return dict(content)


def read_index(path):
    """{tensor name: file name in the same folder} of a *.index.json."""
    with contextlib.suppress(ValueError, TypeError, KeyError), open(path, "rb") as f:
        files = dict(json.load(f)["weight_map"])
        if all(re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file) for file in files.values()):
            return files
    raise ValueError(f"{path} is damaged: its weight_map names no files beside it")


def read_shards(path):
    files, tensors = read_index(path), {}
    for shard in sorted(set(files.values())):
        file = os.path.join(os.path.dirname(path), shard)
        if not os.path.exists(file):
            raise ValueError(f"{path} names the file {shard}, which is not beside it")
        content = read_weights(file)
        names = [name for name in files if files[name] == shard]
        if lost := [name for name in names if name not in content]:
            raise ValueError(f"{file} lacks {lost[0]}, which the index says it holds")
        tensors |= {name: content[name] for name in names}
    return tensors


def read_pickle(path):
    """What torch.save wrote, if it is tensors and plain containers: nothing in it is executed."""
    with open(path, "rb") as f:
        mapped = f.read(4) == b"PK\3\4"  # files from before torch 1.6 can not be mapped
    try:
        return torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except MemoryError:
        raise
    except Exception:  # damaged bytes make torch and pickle raise nearly anything
        raise ValueError(f"{path} can not be read: cut, damaged, or more than tensors and plain "
                         "containers") from None


# -----------------------------------------------------------------------------
# writers: whole or not at all


def write_pickle(path, content):
    """torch.save of tensors and plain containers, which read_pickle opens."""
    try:
        replace(path, lambda temporary: torch.save(content, temporary))
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"can not write {path}, is the disk full? what was there before is as it "
                      f"was ({str(error).splitlines()[0]})") from None
