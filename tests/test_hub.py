"""Downloads from a small server on 127.0.0.1: what works, what is mended, what is refused."""

import errno
import gzip
import io
import json
import multiprocessing
import os
import socket
import ssl
import time

import numpy as np
import pytest
from hub_server import COMMIT, Hub, Server, git_sha1

from plumbing import files, flags, hub
from plumbing.weights import read_fields

EMPTY = b"\2\0\0\0\0\0\0\0{}"  # a safetensors file without tensors
BODY = bytes(range(256)) * 400  # 102,400 bytes
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
HELLO_GIT = "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    use(server.url, tmp_path, monkeypatch)
    yield server
    server.close()


def use(url, tmp_path, monkeypatch):
    """Downloads come from there, and nothing of this machine's user counts."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "WAITS", [0.01, 0.01, 0.01, None])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certificates takes a tenth of a second
    monkeypatch.setattr(ssl, "create_default_context", lambda: context)
    monkeypatch.setattr(hub, "certifi", None)
    monkeypatch.setattr(hub, "DOWNLOADS", {})
    monkeypatch.setattr(flags, "DOWNLOADS", hub.DOWNLOADS)


def serve(server, repo="some/repo", **files):
    """Puts files, written name__ext for name.ext, under a repository's main revision."""
    for name, content in files.items():
        server.files[f"/{repo}/resolve/main/{name.replace('__', '.')}"] = content


def in_cache(tmp_path):
    """The names of all files in the cache, but the list of commits and a lock beside a part."""
    found = {file for _, _, files in os.walk(tmp_path / "cache") for file in files} - {"commits"}
    return sorted(found - {file.replace(".part", ".lock") for file in found if file.endswith(".part")})


def one_line(raised, *parts):
    """The message of a pytest.raises is one line and holds every part."""
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert str(part) in message, message


# -----------------------------------------------------------------------------
# downloads that work


def test_a_whole_file_then_no_server_is_needed(server, tmp_path, monkeypatch, capsys):
    serve(server, weights__bin=BODY)
    path = hub.download("some/repo", "weights.bin")
    assert path == str(tmp_path / "cache/some/repo/main/weights.bin")
    assert open(path, "rb").read() == BODY
    assert "102k/102k" in capsys.readouterr().err  # the progress bar
    assert in_cache(tmp_path) == ["weights.bin"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.download("some/repo", "weights.bin") == path
    assert len(server.requests) == 1


def test_datasets_revisions_and_folders_have_their_own_place(server, tmp_path):
    server.files["/datasets/a/b/resolve/refs%2Fpr%2F1/sub/x%20y.bin"] = b"set"
    path = hub.download("a/b", "sub/x y.bin", revision="refs/pr/1", kind="dataset")
    assert path == str(tmp_path / "cache/datasets/a/b/refs/pr/1/sub/x y.bin")
    assert open(path, "rb").read() == b"set"
    with pytest.raises(hub.MissingFile):
        hub.download("a/b", "sub/x y.bin", revision="refs/pr/1")


def test_a_cut_connection_is_continued_by_range(server):
    def answer(request, body):
        cut = {1: 30_000, 2: 70_000}.get(len(server.requests), len(body))
        request.send(body[:cut], promise=len(body))

    serve(server, weights__bin=BODY)
    server.answer = answer
    path = hub.download("some/repo", "weights.bin")
    assert open(path, "rb").read() == BODY
    asked = [headers["Range"] for _, headers in server.requests]
    assert asked == [None, "bytes=29999-", "bytes=69999-"]


def test_a_reset_connection_is_continued(server):
    def answer(request, body):
        if len(server.requests) == 1:
            request.send(body[:50_000], promise=len(body))
            linger_off = b"\1\0\0\0\0\0\0\0"  # close() sends RST
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_off)
            request.connection.close()
        else:
            request.send(body)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert len(server.requests) == 2


@pytest.mark.parametrize("have", [50, 102_399, 102_400, 102_401, 200_000])
def test_a_part_of_an_earlier_run_is_continued(server, tmp_path, have):
    folder = tmp_path / "cache/some/repo/main"
    folder.mkdir(parents=True)
    (folder / "weights.bin.part").write_bytes((BODY + BODY)[:have])
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(body, ETag=f'"{git_sha1(body)}"')
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert server.requests[0][1]["Range"] == f"bytes={have - 1}-"
    assert len(server.requests) == (1 if have <= 102_400 else 2)
    assert in_cache(tmp_path) == ["weights.bin"]


def test_a_server_without_range_sends_all_of_it_again(server):
    def answer(request, body):
        cut = 40_000 if len(server.requests) == 1 else len(body)
        request.send(body[:cut], promise=len(body), ranges=False)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert [headers["Range"] for _, headers in server.requests] == [None, "bytes=39999-"]


def test_a_server_error_is_tried_again(server):
    def answer(request, body):
        request.send(body, 503 if len(server.requests) < 3 else 200)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert len(server.requests) == 3


def test_a_body_of_unknown_length(server):
    def answer(request, body):
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        request.wfile.write(body)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY


def test_a_body_in_chunks_that_is_cut(server):
    def answer(request, body):
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        end = b"" if len(server.requests) == 1 else b"0\r\n\r\n"
        request.wfile.write(b"%x\r\n%b\r\n" % (len(body), body) + end)
        request.close_connection = True

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert len(server.requests) == 2


def test_a_network_that_comes_back_in_the_middle(server, monkeypatch):
    def answer(request, body):
        request.send(body[:50_000] if len(server.requests) == 1 else body, promise=len(body))

    def connect(url, start, real=hub.connect):
        tries.append(start)
        if len(tries) == 2:
            raise hub.URLError(ConnectionRefusedError("refused"))
        return real(url, start)

    tries = []
    serve(server, weights__bin=BODY)
    server.answer = answer
    monkeypatch.setattr(hub, "connect", connect)
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY
    assert tries == [0, 49_999, 49_999]


# -----------------------------------------------------------------------------
# sizes, hashes, tokens


@pytest.mark.parametrize(
    "body, headers",
    [(b"abc", {"X_Linked_Etag": f'"{ABC_SHA256}"'}), (b"abc", {"ETag": ABC_SHA256}),
     (b"hello\n", {"ETag": f'"{HELLO_GIT}"'}), (b"hello\n", {"ETag": f'W/"{HELLO_GIT}"'}),
     (b"abc", {"ETag": '"0123456789abcdef0123456789abcdef-12"'}),  # a storage's own kind: no hash
     (b"abc", {"X_Linked_Etag": f'"{ABC_SHA256}"', "ETag": f'"{HELLO_GIT}"'})],
)
def test_the_right_hash_is_accepted(server, body, headers):
    serve(server, file__bin=body)
    server.answer = lambda request, body: request.send(body, **headers)
    assert open(hub.download("some/repo", "file.bin"), "rb").read() == body


@pytest.mark.parametrize(
    "headers", [{"X_Linked_Etag": f'"{ABC_SHA256}"'}, {"ETag": f'W/"{ABC_SHA256}"'},
                {"ETag": f'"{HELLO_GIT}"'}])
def test_a_wrong_hash_removes_the_file(server, tmp_path, headers):
    serve(server, file__bin=b"abd")
    server.answer = lambda request, body: request.send(body, **headers)
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", "file.bin")
    one_line(raised, "/some/repo/resolve/main/file.bin", "hash", "run the same command again")
    assert in_cache(tmp_path) == []


def test_a_promised_size_that_never_comes(server, tmp_path):
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(body, promise=200_000, ranges=False)
    with pytest.raises(ConnectionError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "cut at 102400 of 200000 bytes", "run the same command again")
    assert in_cache(tmp_path) == ["weights.bin.part"]
    assert len(server.requests) == len(hub.WAITS)


def test_a_size_that_changes_removes_the_file(server, tmp_path):
    def answer(request, body):
        request.send(body, promise=200_000 if len(server.requests) == 1 else None)

    serve(server, weights__bin=BODY)
    server.answer = answer
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "102400 bytes instead of 200000", "was removed", "HF_ENDPOINT")
    assert in_cache(tmp_path) == []


def redirecting(server, host):
    """The hub redirects .bin files to /storage on `host`, as it does with large files."""
    def answer(request, body):
        if request.path.startswith("/storage"):
            request.send(body, ETag=f'"{"0" * 64}"')  # the storage's own ETag is not a hash
        else:
            location = f"http://{host}:{server.server_port}/storage/weights.bin"
            request.send(b"elsewhere", 302, Location=location, X_Linked_Etag=server.tag)

    serve(server, weights__bin=b"abc")
    server.files["/storage/weights.bin"] = b"abc"
    server.answer, server.tag = answer, f'"{ABC_SHA256}"'


def test_the_token_goes_to_the_hub_and_not_to_another_host(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    redirecting(server, "localhost")
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == b"abc"
    (first, sent), (second, beyond) = server.requests
    assert (first, second) == ("/some/repo/resolve/main/weights.bin", "/storage/weights.bin")
    assert sent["Authorization"] == "Bearer hf_secret"
    assert beyond["Host"].startswith("localhost") and beyond["Authorization"] is None
    assert "hf_secret" not in str(beyond)


def test_the_token_follows_a_redirect_within_the_hub(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    redirecting(server, "127.0.0.1")
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == b"abc"
    assert [h["Authorization"] for _, h in server.requests] == ["Bearer hf_secret"] * 2


def test_no_token_no_header(server):
    serve(server, weights__bin=BODY)
    hub.download("some/repo", "weights.bin")
    assert server.requests[0][1]["Authorization"] is None


def test_the_hash_of_the_redirecting_answer_counts(server, tmp_path):
    redirecting(server, "localhost")
    server.tag = f'"{"1" * 64}"'
    with pytest.raises(ValueError, match="hash"):
        hub.download("some/repo", "weights.bin")
    assert in_cache(tmp_path) == []


def test_the_etag_of_the_storage_is_no_hash(server):
    def answer(request, body):
        location = f"http://localhost:{server.server_port}/storage/weights.bin"
        stored = request.path.startswith("/storage")
        request.send(body, 200 if stored else 302, Location=location, ETag=f'"{"0" * 64}"')

    redirecting(server, "localhost")
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == b"abc"


def test_a_redirect_can_not_name_a_local_file(server, tmp_path):
    (tmp_path / "private").write_bytes(b"private")
    serve(server, weights__bin=b"abc")
    server.answer = lambda request, body: request.send(
        body, 302, Location=f"file://{tmp_path}/private")
    with pytest.raises(ConnectionError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "weights.bin", "302")
    assert in_cache(tmp_path) == []


# -----------------------------------------------------------------------------
# downloads that fail: one line that says what to do


def test_an_answer_of_another_kind(server):
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(body, 206, Content_Range="lines 3-4/7")
    with pytest.raises(ConnectionError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "can not reach", "'lines 3-4/7'")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(server, status, monkeypatch):
    serve(server, "meta-llama/Llama-3.2-1B", config__json=b"{}")
    server.answer = lambda request, body: request.send(
        b"no", status, X_Error_Code="GatedRepo", X_Error_Message="Access to it is restricted.")
    for token in ("", "hf_secret"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError) as raised:
            hub.fetch_model("meta-llama/Llama-3.2-1B")
        one_line(raised, f"{server.url}/meta-llama/Llama-3.2-1B is gated", "licence", "HF_TOKEN",
                 f"127.0.0.1:{server.server_port}: HTTP {status}, 'Access to it is restricted.'")
        assert "hf_secret" not in str(raised.value)
    assert len(server.requests) == 2  # a refusal is not tried again


def test_an_expired_token_on_a_public_model(server, monkeypatch):
    """No licence would help: what the hub says is in the line."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    serve(server, config__json=b"{}")
    message = "Invalid credentials in Authorization header\x1b[31m" + "x" * 5000
    server.answer = lambda request, body: request.send(b"no", 401, X_Error_Message=message)
    with pytest.raises(ValueError) as raised:
        hub.fetch_model("some/repo")
    one_line(raised, "refuses your access token: renew it", "Invalid credentials in Authorization",
             "a public model needs no token", f"127.0.0.1:{server.server_port}: HTTP 401")
    assert "hf_secret" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_missing(server):
    with pytest.raises(hub.MissingFile) as raised:
        hub.download("some/repo", "model.safetensors")
    one_line(raised, f"{server.url}/some/repo/resolve/main/model.safetensors", "no such repository")
    assert len(server.requests) == 1


def test_a_server_that_stays_broken(server):
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(b"", 500)
    with pytest.raises(ConnectionError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "500")
    assert len(server.requests) == len(hub.WAITS)


def test_nobody_listens(server, tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub.time, "sleep", lambda s: pytest.fail("without a network, no waiting"))
    with pytest.raises(ConnectionError) as raised:
        hub.fetch_model("gpt2")
    one_line(raised, f"can not reach http://127.0.0.1:{port}", "refused", "HF_ENDPOINT",
             "local folder (config.json + model.safetensors)")
    assert in_cache(tmp_path) == []


def test_an_endpoint_that_is_no_address(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", "config.json")
    one_line(raised, "hf-mirror.com")


class FullDisk(io.FileIO):
    def write(self, data):
        if self.tell() + memoryview(data).nbytes > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def full_disk(path, mode="r"):
    return open(path, mode) if "r" in mode else FullDisk(path, mode)


def test_a_full_disk_while_downloading(server, tmp_path, monkeypatch):
    serve(server, weights__bin=BODY)
    monkeypatch.setattr(hub, "open", full_disk, raising=False)
    with pytest.raises(OSError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "can not write", "weights.bin", "No space left", "SPARSE_CACHE")
    assert raised.value.errno == errno.ENOSPC and len(server.requests) == 1
    assert not (tmp_path / "cache/some/repo/main/weights.bin").exists()


def test_a_cache_that_can_not_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "file"))
    serve(server, weights__bin=BODY)
    with pytest.raises(OSError) as raised:
        hub.download("some/repo", "weights.bin")
    one_line(raised, "can not write", "SPARSE_CACHE")


# -----------------------------------------------------------------------------
# whole models


def files_asked(server):
    return [path.rsplit("/", 1)[1] for path, _ in server.requests]


def test_a_model_in_one_file(server, tmp_path):
    serve(server, "openai-community/gpt2", config__json=b"{}", model__safetensors=EMPTY,
          tokenizer__json=b"{}", pytorch_model__bin=b"never")
    folder = hub.fetch_model("gpt2")
    assert folder == str(tmp_path / "cache/openai-community/gpt2/main")
    assert in_cache(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert hub.fetch_model("gpt2") == folder and len(server.requests) == 3


def test_a_model_in_shards_without_tokenizer(server, tmp_path, monkeypatch):
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    index = json.dumps({"weight_map": files}).encode()
    server.files = {f"/some/repo/resolve/main/{name}": body for name, body in {
        "config.json": b"{}", "model.safetensors.index.json": index,
        "model-1.safetensors": EMPTY, "model-2.safetensors": EMPTY}.items()}
    folder = hub.fetch_model("some/repo")
    assert in_cache(tmp_path) == ["config.json", "model-1.safetensors", "model-2.safetensors",
                                  "model.safetensors.index.json"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch_model("some/repo") == folder  # what is missing is not asked for again
    os.remove(os.path.join(folder, "model-2.safetensors"))
    with pytest.raises(ConnectionError):
        hub.fetch_model("some/repo")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    del server.files["/some/repo/resolve/main/model-2.safetensors"]
    with pytest.raises(hub.MissingFile, match="model-2.safetensors"):
        hub.fetch_model("some/repo")


def test_a_model_with_only_a_bin(server, tmp_path):
    serve(server, config__json=b"{}", pytorch_model__bin=b"x")
    hub.fetch_model("some/repo")
    assert in_cache(tmp_path) == ["config.json", "pytorch_model.bin"]
    assert files_asked(server) == ["config.json", "tokenizer.json", "model.safetensors",
                                   "model.safetensors.index.json", "pytorch_model.bin"]


def test_a_model_without_weights(server):
    serve(server, config__json=b"{}")
    with pytest.raises(ValueError) as raised:
        hub.fetch_model("some/repo")
    one_line(raised, "some/repo has none of", *files.WEIGHTS)


def test_a_local_path_is_returned_as_it_is(tmp_path):
    assert hub.fetch_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["gpt5", "", "./nowhere", "/no/where", "a/b/c", "../nowhere", "a b/c"])
def test_a_name_that_is_nothing(server, name):
    with pytest.raises(ValueError) as raised:
        hub.fetch_model(name)
    one_line(raised, repr(name), "config.json + model.safetensors", "gpt2-medium", "owner/name")
    assert server.requests == []


# -----------------------------------------------------------------------------
# as the real hub answers


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A hub with two models: gpt2 in one file, and one in shards whose index names them."""
    index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode()
    one, two = (np.random.default_rng(seed).bytes(300_000) for seed in (1, 2))
    hub_of_two = Hub({
        "openai-community/gpt2": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": whole_file(one)},
        "big/model": {"config.json": b"{}", "model.safetensors.index.json": index,
                      "a.safetensors": whole_file(one), "b.safetensors": whole_file(two)}})
    use(hub_of_two.home.url, tmp_path, monkeypatch)
    yield hub_of_two
    hub_of_two.close()


def whole_file(data):
    """A safetensors file with these bytes in it."""
    text = json.dumps({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(path):
    with open(path, "rb") as f:
        return f.read()


def test_a_model_from_the_hub_over_its_redirects(real, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = hub.fetch_model("big/model")
    served = real.home.files
    for name in ("a.safetensors", "b.safetensors", "model.safetensors.index.json", "config.json"):
        assert read(os.path.join(folder, name)) == served[f"/big/model/resolve/main/{name}"]
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in real.home.requests)
    assert len(real.storage.requests) == 2  # it refuses a token
    assert hub.DOWNLOADS == {"big/model": COMMIT}
    real.close()
    hub.DOWNLOADS.clear()
    assert hub.fetch_model("big/model") == folder and hub.DOWNLOADS == {"big/model": COMMIT}


def test_a_commit_is_in_results_and_other_files_of_another_commit_too(server, tmp_path):
    serve(server, a__bin=b"a", b__bin=b"b")
    hub.download("some/repo", "a.bin")
    server.answer = lambda request, body: request.send(body, commit="b" * 40)
    hub.download("some/repo", "b.bin")
    flags.write_results(tmp_path, 0.0)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["downloads"]["some/repo"] == f"{COMMIT}, {'b' * 40}"


def test_every_cut_gets_a_fresh_signature_and_every_progress_a_fresh_budget(real):
    """Eight cuts, where four tries without progress are too many."""
    def pace(request, body):
        start = int((request.headers["Range"] or "bytes=0-")[6:-1])
        cut = body[:start + 40_000] if start + 40_000 < len(body) else body
        request.send(cut, promise=len(body), commit=None)

    real.pace = pace
    path = hub.download("big/model", "a.safetensors")
    assert read(path) == real.home.files["/big/model/resolve/main/a.safetensors"]
    signed = [path for path, _ in real.storage.requests]
    assert len(signed) == 8 > len(hub.WAITS) and len(set(signed)) == 8


def test_slow_bytes_and_a_silence(real, monkeypatch):
    def pace(request, body):
        if len(real.storage.requests) > 1:
            return request.send(body, commit=None)
        request.send(body[:100], promise=len(body), commit=None)
        time.sleep(0.6)

    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    real.pace = pace
    path = hub.download("big/model", "a.safetensors")
    assert read(path) == real.home.files["/big/model/resolve/main/a.safetensors"]
    assert [headers["Range"] for _, headers in real.storage.requests] == [None, "bytes=99-"]


@pytest.mark.parametrize("headers, seconds", [
    ({"Retry-After": "7"}, 7), ({"RateLimit": '"resolvers";r=0;t=123', "RateLimit-Policy": "x"}, 123),
    ({"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}, 60), ({}, 60), ({"Retry-After": "0"}, 1),
    ({"Retry-After": "999999"}, 3600)])
def test_too_many_requests_waits_as_long_as_it_is_told(server, monkeypatch, capsys, headers, seconds):
    slept = []
    monkeypatch.setattr(hub.time, "sleep", slept.append)
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(
        *(body, 200) if len(server.requests) > 9 else (b"slow down", 429), **headers if len(server.requests) < 10 else {})
    assert read(hub.download("some/repo", "weights.bin")) == BODY
    assert slept == [seconds] * 9 > hub.WAITS[:-1]  # more often than another error
    assert f"429: Too Many Requests; trying again in {seconds} s" in capsys.readouterr().out


def test_a_request_timeout_is_tried_again(server):
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(body, 408 if len(server.requests) < 3 else 200)
    assert read(hub.download("some/repo", "weights.bin")) == BODY


PAGE = b"\n<!DOCTYPE html><html>Please log in to the network</html>"


@pytest.mark.parametrize("commit", [None, COMMIT])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_login_page_does_not_get_into_the_cache(server, tmp_path, name, commit):
    server.files[f"/some/repo/resolve/main/{name}"] = body = EMPTY if "safe" in name else b"{}"
    server.answer = lambda request, _: request.send(PAGE, commit=commit, Content_Type="text/html")
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", name)
    one_line(raised, f"/some/repo/resolve/main/{name}", "HF_ENDPOINT", "page")
    assert in_cache(tmp_path) == []
    server.answer = lambda request, body: request.send(body)
    assert read(hub.download("some/repo", name)) == body


def test_any_other_answer_than_a_hubs_is_refused(server, tmp_path):
    serve(server, config__json=b'{"status": "not logged in"}')
    server.answer = lambda request, body: request.send(body, commit=None, ETag='"5f3c-abc"')
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", "config.json")
    one_line(raised, f"127.0.0.1:{server.server_port}, which is no hub", "no X-Repo-Commit", "login page")
    assert in_cache(tmp_path) == []


def test_a_page_that_an_earlier_version_kept_is_replaced_once(server, tmp_path):
    folder = tmp_path / "cache/some/repo/main"
    folder.mkdir(parents=True)
    files_of = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": EMPTY}
    for name, body in files_of.items():
        (folder / name).write_bytes(PAGE)
        server.files[f"/some/repo/resolve/main/{name}"] = body
    assert hub.fetch_model("some/repo") == str(folder)
    assert {name: read(folder / name) for name in files_of} == files_of
    assert hub.fetch_model("some/repo") == str(folder) and len(server.requests) == 3
    (folder / "config.json").write_bytes(PAGE)
    server.answer = lambda request, body: request.send(PAGE)
    with pytest.raises(ValueError):
        hub.fetch_model("some/repo")
    assert len(server.requests) == 4


@pytest.mark.parametrize("size", [len(BODY), None])
def test_forced_gzip_is_unpacked(server, size):
    """Also after a cut; Content-Length is then of the packed bytes, X-Linked-Size of the file."""
    def answer(request, body):
        packed = gzip.compress(body)
        cut = len(packed) // 2 if len(server.requests) == 1 else len(packed)
        linked = {"X_Linked_Size": str(size)} if size else {}
        request.send(packed[:cut], promise=len(packed), ranges=False, Content_Encoding="gzip",
                     ETag=f'W/"{git_sha1(body)}"', **linked)

    body = np.random.default_rng(0).bytes(len(BODY))
    serve(server, weights__bin=body)
    server.answer = answer
    assert read(hub.download("some/repo", "weights.bin")) == body
    assert len(server.requests) == 2


def test_the_linked_size_counts_where_there_is_no_length(server, tmp_path):
    def answer(request, body):
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("X-Linked-Size", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:70_000] if len(server.requests) == 1 else body)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert read(hub.download("some/repo", "weights.bin")) == BODY and len(server.requests) == 2


def test_the_hash_of_a_mirror_that_is_no_hub_is_not_fatal(server):
    serve(server, weights__bin=BODY)
    server.answer = lambda request, body: request.send(body, commit=None, ETag=f'"{"0" * 40}"')
    assert read(hub.download("some/repo", "weights.bin")) == BODY


def in_two_processes(work, *arguments):
    """Exit codes of work(*arguments) in two processes at once."""
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=work, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return [process.exitcode for process in both]


def slow(request, body):
    for n in range(10):
        if not n:
            request.send(body[: len(body) // 10], promise=len(body), commit=None)
        else:
            request.wfile.write(body[n * len(body) // 10 : (n + 1) * len(body) // 10])
        time.sleep(0.03)


def test_two_processes_fetch_one_model(real, tmp_path):
    real.pace = slow
    assert in_two_processes(hub.fetch_model, "big/model") == [0, 0]
    asked = [path for path, _ in real.home.requests if "resolve/main" in path and path.endswith("a.safetensors")]
    assert len(asked) == 1  # the other one waited
    folder = tmp_path / "cache/big/model/main"
    for name in ("a.safetensors", "b.safetensors"):
        assert read(folder / name) == real.home.files[f"/big/model/resolve/main/{name}"]
    assert not [name for name in os.listdir(folder) if name.endswith((".part", ".lock"))]


def test_who_waits_goes_on_where_the_other_one_died(real, tmp_path, monkeypatch):
    real.pace = lambda request, body: request.send(body[:1000], promise=len(body), commit=None)
    monkeypatch.setattr(hub, "WAITS", [0.01, None])
    with pytest.raises(ConnectionError):
        hub.download("big/model", "a.safetensors")
    assert in_cache(tmp_path) == ["a.safetensors.part"]
    real.pace = lambda request, body: request.send(body, commit=None)
    assert in_two_processes(hub.download, "big/model", "a.safetensors") == [0, 0]
    assert in_cache(tmp_path) == ["a.safetensors"]


def test_certificates_have_their_own_line(server, monkeypatch):
    error = ssl.SSLCertVerificationError("certificate verify failed")
    monkeypatch.setattr(hub, "connect", lambda *_: (_ for _ in ()).throw(hub.URLError(error)))
    with pytest.raises(ConnectionError) as raised:
        hub.download("some/repo", "config.json")
    one_line(raised, "certificate verify failed", "SSL_CERT_FILE")


def test_certificates_of_certifi_count(server, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(hub, "certifi", type("", (), {"where": lambda: "here.pem"}))
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda self, *names, **_: loaded.extend(names))
    serve(server, a__bin=BODY)
    hub.download("some/repo", "a.bin")
    assert "here.pem" in loaded


# -----------------------------------------------------------------------------
# the official client's cache: read, never written


def official(root, repo, files_of, commit=COMMIT):
    """A repository as the official client keeps it: refs, blobs, and snapshots of links."""
    folder = root / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    for name, body in files_of.items():
        (folder / "blobs" / git_sha1(body)).write_bytes(body)
        (folder / "snapshots" / commit / name).symlink_to(f"../../blobs/{git_sha1(body)}")
    return folder / "snapshots" / commit


MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": EMPTY}


@pytest.mark.parametrize("repo", ["openai-community/gpt2", "gpt2"])
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME",
                                      "TRANSFORMERS_CACHE"])
def test_existing_files_need_no_network(server, tmp_path, monkeypatch, variable, repo):
    home = tmp_path / "theirs"
    root = {"HF_HOME": home / "hub", "XDG_CACHE_HOME": home / "huggingface/hub"}.get(variable, home)
    folder = official(root, repo, MODEL)
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(home))
    before = sorted(map(str, home.rglob("*")))
    assert hub.fetch_model("gpt2") == hub.fetch_model("openai-community/gpt2") == str(folder)
    assert hub.download("gpt2", "config.json") == str(folder / "config.json")
    assert hub.DOWNLOADS == {"openai-community/gpt2": COMMIT}
    assert server.requests == [] and sorted(map(str, home.rglob("*"))) == before
    assert not (tmp_path / "cache").exists()


def test_a_data_set_of_the_official_client(server, tmp_path):
    folder = tmp_path / "huggingface/hub/datasets--a--b/snapshots/main"
    folder.mkdir(parents=True)
    (folder / "x.bin").write_bytes(BODY)
    assert hub.download("a/b", "x.bin", kind="dataset") == str(folder / "x.bin")


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_half_a_model_of_the_official_client_is_left_alone(server, tmp_path, lost):
    """Files of two places would be of two commits."""
    folder = official(tmp_path / "huggingface/hub", "some/repo", {n: b for n, b in MODEL.items() if n != lost})
    serve(server, **{name.replace(".", "__"): body for name, body in MODEL.items()})
    assert hub.fetch_model("some/repo") == str(tmp_path / "cache/some/repo/main")
    assert in_cache(tmp_path) == sorted(MODEL) and not (folder / lost).exists()


def test_a_link_to_a_blob_that_is_gone_is_no_file(server, tmp_path):
    folder = official(tmp_path / "huggingface/hub", "some/repo", MODEL)
    os.remove(os.path.realpath(folder / "model.safetensors"))
    serve(server, **{name.replace(".", "__"): body for name, body in MODEL.items()})
    assert hub.fetch_model("some/repo") == str(tmp_path / "cache/some/repo/main")


def test_offline_is_one_line_that_names_both_caches(server, tmp_path, monkeypatch):
    serve(server, config__json=b"{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError) as raised:
        hub.fetch_model("some/repo")
    one_line(raised, "HF_HUB_OFFLINE is set", tmp_path / "cache/some/repo/main",
             tmp_path / "huggingface/hub/models--some--repo/snapshots/main", "config.json")
    assert server.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert read(hub.download("some/repo", "config.json")) == b"{}"


def test_the_token_of_hf_auth_login_is_sent(server, tmp_path, monkeypatch):
    serve(server, **{f"{name}__bin": BODY for name in "abcd"})
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/token").write_text("hf_file\n")
    (tmp_path / "other").write_text("hf_other")
    hub.download("some/repo", "a.bin")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    hub.download("some/repo", "b.bin")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_old")
    hub.download("some/repo", "c.bin")
    monkeypatch.setenv("HF_TOKEN", "hf_new")
    hub.download("some/repo", "d.bin")
    sent = [headers["Authorization"] for _, headers in server.requests]
    assert sent == [f"Bearer hf_{x}" for x in ("file", "other", "old", "new")]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "HERE/x", "a/..", "a"])
def test_a_name_can_not_leave_the_cache(server, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "deep/down/cache"))
    name = name.replace("HERE", str(tmp_path))
    before = sorted(map(str, tmp_path.rglob("*")))
    for look in (hub.download, read_fields):
        with pytest.raises(ValueError) as raised:
            look(*(name, "config.json")[: 2 if look is hub.download else 1])
        one_line(raised, "no file or folder here and no hub name")
    assert server.requests == [] and sorted(map(str, tmp_path.rglob("*"))) == before
