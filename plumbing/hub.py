"""Files from the Hugging Face hub, each fetched once.

A file is looked for in our cache, then in the official client's, which is read and never written
to, and then on the hub. Once it is there no network is needed. Environment variables:
  SPARSE_CACHE   our cache, instead of ~/.cache/sparse-attention
  HF_HOME        the official client's folder, instead of ~/.cache/huggingface; its hub/ is the cache,
                 HF_HUB_CACHE names another one; its token is the access token, HF_TOKEN goes first
  HF_HUB_OFFLINE=1    the hub is not asked
  HF_ENDPOINT    a mirror, instead of https://huggingface.co; only this host sees the token
  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE    as everywhere
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.request
import zlib
from urllib.error import URLError
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from plumbing.files import WEIGHTS, read_header, read_index, shards
from plumbing.flags import DOWNLOADS

try:
    import certifi  # comes with tiktoken; some installations of Python have no certificates
except ImportError:
    certifi = None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

GPT2 = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]  # short for openai-community/...

# -----------------------------------------------------------------------------
# where files are: our cache, and the official client's


def setting(*names, default=""):
    """The first of these environment variables that is set, a leading ~ expanded."""
    return os.path.expanduser(next(filter(None, map(os.environ.get, names)), default))


def official(name):
    """A path in the folder of the official client."""
    caches = setting("XDG_CACHE_HOME", default="~/.cache")
    return os.path.join(setting("HF_HOME", default=os.path.join(caches, "huggingface")), name)


def access_token():
    """What `hf auth login` wrote, if no variable holds a token."""
    token = setting("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    path = setting("HF_TOKEN_PATH", default=official("token"))
    with contextlib.suppress(OSError, ValueError), open(path) as f:
        token = token or f.read()
    return "".join(token.split())


def full_name(name):
    """owner/name of a hub name; ValueError if it is none, so that no path leaves the cache."""
    repo = f"openai-community/{name}" if name in GPT2 else name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"{name!r} is no file or folder here and no hub name: give a local folder "
                         f"(config.json + model.safetensors), {', '.join(GPT2)}, or owner/name as "
                         "in meta-llama/Llama-3.2-1B")
    return repo


def our_folder(repo, revision="main", kind="model"):
    cache = setting("SPARSE_CACHE", default="~/.cache/sparse-attention")
    return os.path.join(cache, "datasets" * (kind == "dataset"), repo, revision)


def snapshots(repo, revision="main", kind="model"):
    """The folders where the official client, or an old one, would have put that revision."""
    new = setting("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=official("hub"))
    for cache in filter(None, (new, setting("TRANSFORMERS_CACHE"))):
        for name in (repo, repo.removeprefix("openai-community/")):  # once it was just gpt2
            folder, commit = os.path.join(cache, f"{kind}s--{name.replace('/', '--')}"), revision
            ref = os.path.join(folder, "refs", revision)
            with contextlib.suppress(OSError, ValueError), open(ref) as f:
                commit = f.read().strip()
            yield os.path.join(folder, "snapshots", commit)


def intact(path, name=None):
    """Is it a file, and of the kind that its name says? The login page of a network is not."""
    name = name or path
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        return False
    try:
        if name.endswith(".safetensors"):
            read_header(path, bytes_in(path))
        if name.endswith(".index.json"):
            read_index(path)
    except ValueError:
        return False
    with open(path, "rb") as f:
        begin = f.read(100).lstrip()[:1]
        f.seek(max(0, bytes_in(path) - 100))
        end = f.read().rstrip()[-1:]
    return begin + end == b"{}" if name.endswith(".json") else begin not in (b"", b"<")


def note(repo, folder):
    """The commits that the files in the folder are from go into results.json; returns the folder."""
    commits = {os.path.basename(folder)}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "commits")) as f:
        commits = {name: commit for commit, _, name in (line.partition(" ") for line in f)}.values()
    if commits := {commit for commit in commits if re.fullmatch("[0-9a-f]{40}", commit)}:
        DOWNLOADS[repo] = ", ".join(sorted(commits))
    return folder


# -----------------------------------------------------------------------------
# download: to <name>.part, continued after a cut, checked, then renamed

WAITS = [0.5, 1, 2, 4, None]  # seconds before another try; from the first again after progress
TIMEOUT = 30  # seconds without a byte
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException,
           EOFError, zlib.error, gzip.BadGzipFile)
DIGEST = r'(?:W/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?'  # an ETag that is a sha256, or git's sha1 of a blob


class MissingFile(ValueError):
    """The hub answered, and has no such file: another name may exist."""


def download(repo, filename, revision="main", kind="model"):
    """Path of a hub file, in one of the caches; a file that is there needs no network.

    repo 'owner/name'; kind 'model' or 'dataset'. Size and hash are checked where the server tells
    them. MissingFile (404), ValueError (gated, damaged), OSError (network, disk), one line each.
    Several processes may ask for the same file: one fetches it, the others wait.
    """
    repo = full_name(repo)
    ours = our_folder(repo, revision, kind)
    folders = ours, *snapshots(repo, revision, kind)
    found = next((folder for folder in folders if intact(os.path.join(folder, filename))), ours)
    if found == ours:
        fetch(repo, filename, revision, kind)
    return os.path.join(note(repo, found), filename)


def fetch(repo, filename, revision="main", kind="model"):
    """Path of a hub file in our cache, from the hub unless it is there."""
    folder = our_folder(repo, revision, kind)
    path = os.path.join(folder, filename)
    if intact(path):
        return path
    if setting("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE").upper() in ("1", "ON", "YES", "TRUE"):
        other = next(snapshots(repo, revision, kind))
        raise ConnectionError(f"HF_HUB_OFFLINE is set, and neither {folder} nor {other} has {filename} "
                              "and what belongs to it: unset it, or give a local folder")
    endpoint = setting("HF_ENDPOINT", default="https://huggingface.co").rstrip("/")
    place, part = "datasets/" * (kind == "dataset") + repo, path + ".part"
    url = f"{endpoint}/{place}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path):
            if intact(path):  # another process was faster
                return path
            sizes, tag, commit = transfer(url, part)
            fault = mismatch(part, sizes, tag)
            if fault := fault or not intact(part, filename) and "no file of its kind (a web page?)":
                os.remove(part)
                raise ValueError(f"{url} arrived with {fault} and was removed: run the same command "
                                 "again, or name another mirror in HF_ENDPOINT")
            os.replace(part, path)
            with open(os.path.join(folder, "commits"), "a") as f:
                f.write(f"{commit} {filename}\n")
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"can not write {path}: {error.strerror}; SPARSE_CACHE names "
                                   "another cache folder") from None
    return path


@contextlib.contextmanager
def locked(path):
    """Only one process at a time comes in, where the system has such locks."""
    lock = path + ".lock"
    with open(lock, "a") as f:
        try:
            fcntl and fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"waiting for another process, which downloads {path}")
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:  # beside a part it stays, because who waits and who comes now need the same lock
            with contextlib.suppress(OSError):
                os.path.exists(path + ".part") or os.remove(lock)


def transfer(url, part):
    """All of url into the file part, in as many requests as it takes -> ({sizes}, tag, commit)."""
    sizes, waits, most = set(), iter(WAITS), bytes_in(part)
    while True:
        try:
            # The last byte again: a part that is already whole gets an answer too.
            response, start, promised, tag, commit = connect(url, max(bytes_in(part) - 1, 0))
            sizes |= promised
            receive(response, part, start, promised)
            return sizes, tag, commit
        except NETWORK as error:
            code = getattr(error, "code", None)
            if code == 416:  # part is longer than the file
                os.remove(part)
            if bytes_in(part) > most:
                most, waits = bytes_in(part), iter(WAITS)
            offline = code is None and isinstance(error, URLError) and not bytes_in(part)
            wait = asked_for(error.headers) if code == 429 else next(waits)
            if wait is None or offline or code and code < 500 and code not in (408, 416, 429):
                raise explained(error, url, bytes_in(part)) from None
            tqdm.write(f"{url}: {error}; trying again in {wait} s")
            time.sleep(wait)


def asked_for(headers):
    """Seconds to wait after Too Many Requests: Retry-After, or t of RateLimit, else a minute."""
    after = re.fullmatch(r"\d+", headers["Retry-After"] or "")
    after = after or re.search(r"(?<=\bt=)\d+", headers["RateLimit"] or "")
    return min(max(1, int(after[0])), 3600) if after else 60


def bytes_in(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


class Redirects(urllib.request.HTTPRedirectHandler):
    """The hub redirects large files to a storage host, which must not see the token and does not
    tell hash, size and commit: the redirecting answers do, the first one counts."""

    def __init__(self):
        self.told = {}

    def listen(self, headers):
        names = ("X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size")
        self.told = {name: headers[name] for name in names if headers[name]} | self.told

    def redirect_request(self, request, body, code, message, headers, url):
        new = super().redirect_request(request, body, code, message, headers, url)
        self.listen(headers)
        if urlsplit(url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def certificates():
    """The ssl context of a request: the machine's certificates, or SSL_CERT_FILE's, and certifi's."""
    context = ssl.create_default_context()
    if certifi:
        context.load_verify_locations(certifi.where())
    return context


def connect(url, start):
    """GET url from byte start on -> response, its first byte, {sizes of the whole file}, tag, commit."""
    token, redirects = access_token(), Redirects()
    headers = {"User-Agent": "sparse-attention"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    opener = urllib.request.build_opener(redirects, urllib.request.HTTPSHandler(context=certificates()))
    response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    answer, at_home = response.headers, urlsplit(response.url)[:2] == urlsplit(url)[:2]
    redirects.listen(answer)
    told, etag = redirects.told, at_home and answer["ETag"] or ""
    of_a_hub = told.keys() & {"X-Repo-Commit", "X-Linked-Etag"}
    if not of_a_hub and not re.fullmatch(DIGEST, etag):
        raise ValueError(f"{url} was answered by {urlsplit(response.url).netloc}, which is no hub "
                         f"({answer['Content-Type']}, no X-Repo-Commit): the login page of a "
                         "network? Else check HF_ENDPOINT")
    if (coding := answer["Content-Encoding"] or "identity") not in ("identity", "gzip"):
        raise http.client.HTTPException(f"the server packs with {coding!r}")
    # A server that ignores Range sends the file from byte 0, without a Content-Range.
    length = answer["Content-Length"] if coding == "identity" else None
    span = answer["Content-Range"] or f"bytes 0-/{length or '*'}"
    if not (numbers := re.fullmatch(r"bytes (\d+)-\d*/(?:(\d+)|\*)", span)):
        raise http.client.HTTPException(f"the server speaks of {span!r}")
    sizes = {int(n) for n in (numbers[2], told.get("X-Linked-Size")) if n and n.isdecimal()}
    tag = told.get("X-Linked-Etag") or (etag if of_a_hub else "")
    return response, int(numbers[1]), sizes, tag, told.get("X-Repo-Commit")


def receive(response, part, start, sizes):
    """The body of the response into the file part, from byte start on; sizes: of the whole file."""
    size = max(sizes, default=None)
    bar = tqdm(desc=os.path.basename(part).removesuffix(".part"), initial=start, total=size,
               unit="B", unit_scale=True)
    with response, open(part, "ab") as f, bar:
        packed = response.headers["Content-Encoding"] == "gzip"
        body = gzip.GzipFile(fileobj=response) if packed else response
        f.truncate(start)
        while block := body.read1(2**20):
            f.write(block)
            bar.update(len(block))
        f.flush()
        os.fsync(f.fileno())
    if size is not None and bytes_in(part) < size:
        raise ConnectionError(f"the connection was cut at {bytes_in(part)} of {size} bytes")


def mismatch(path, sizes, tag):
    """What contradicts the sizes or the tag, if that is a hash."""
    have = bytes_in(path)
    if sizes - {have}:
        return f"{have} bytes instead of {max(sizes)}"
    if digest := re.fullmatch(DIGEST, tag):
        new = hashlib.sha256() if len(digest[1]) == 64 else hashlib.sha1(b"blob %d\0" % have)
        with open(path, "rb") as f:
            while block := f.read(2**20):
                new.update(block)
        if new.hexdigest() != digest[1]:
            return "another hash than the hub's"


def explained(error, url, have):
    """The exception for a request that failed for good: one line that says what to do."""
    code, reason = getattr(error, "code", None), getattr(error, "reason", error)
    page = url.split("/resolve/")[0]
    if code in (401, 403):
        said = "".join(filter(str.isprintable, error.headers["X-Error-Message"] or str(reason)))[:200]
        mend = ("is gated or private, or there is no such repository or local folder: accept the "
                "licence on that page and set HF_TOKEN to your access token")
        if access_token() and error.headers["X-Error-Code"] != "GatedRepo":
            mend = ("refuses your access token: renew it (HF_TOKEN, or hf auth login), or accept the "
                    "licence on that page; a public model needs no token")
        return ValueError(f"{page} {mend} ({urlsplit(error.url).netloc}: HTTP {code}, {said!r})")
    if code == 404:
        return MissingFile(f"{url}: there is no such repository or file")
    if code or have:
        return ConnectionError(f"{url}: {error}; {have} bytes are kept, run the same command again")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ConnectionError(f"{page}: {reason}: name a file with your network's certificates in "
                               "SSL_CERT_FILE")
    return ConnectionError(f"can not reach {page} ({reason}): without a network give a local folder "
                           "(config.json + model.safetensors), or copy ~/.cache/huggingface from where "
                           "`hf download` works, or set HF_ENDPOINT to a mirror")


def whole(folder):
    """Does the folder hold all of a model?"""
    at = functools.partial(os.path.join, folder)
    found = next((file for file in WEIGHTS if intact(at(file))), None)
    files = ["config.json"] + ["tokenizer.json"] * os.path.exists(at("tokenizer.json"))
    return found and all(intact(at(file)) for file in files + shards(at(found)))


def fetch_model(name):
    """The folder of a model: an existing path as it is, a hub name by download.

    'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or 'owner/name'. A folder of one of the caches that
    holds the whole model is taken as it is. Else our cache gets what it lacks of config.json, the
    first of WEIGHTS that there is, its shards, and tokenizer.json if there is one.
    """
    if os.path.exists(name):
        return name
    repo = full_name(name)
    for folder in filter(whole, (our_folder(repo), *snapshots(repo))):
        return note(repo, folder)
    at = functools.partial(os.path.join, os.path.dirname(fetch(repo, "config.json")))
    cached = [file for file in WEIGHTS if intact(at(file))]
    if not cached or os.path.exists(at("tokenizer.json")):  # else it was asked for then
        with contextlib.suppress(MissingFile):
            fetch(repo, "tokenizer.json")
    for file in cached or WEIGHTS:
        with contextlib.suppress(MissingFile):
            fetch(repo, file)
            break
    else:
        raise ValueError(f"{repo} has none of {', '.join(WEIGHTS)}")
    for shard in shards(at(file)):
        fetch(repo, shard)
    return note(repo, at())
