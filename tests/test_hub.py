"""Downloads from a small server on 127.0.0.1: what works, what is mended, what is refused."""

import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import socket
import threading

import pytest
import safetensors.torch
import torch

from plumbing import files, flags, hub
from hub_server import COMMIT, Hub, Server, git_sha1

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
    monkeypatch.setattr(hub, "DOWNLOADS", {})


def serve(server, repo="some/repo", **files):
    """Puts files, written name__ext for name.ext, under a repository's main revision."""
    for name, content in files.items():
        server.files[f"/{repo}/resolve/main/{name.replace('__', '.')}"] = content


def in_cache(tmp_path):
    """The names of all files in the cache, but locks and the list of commits."""
    return sorted(file for _, _, files in os.walk(tmp_path / "cache") for file in files
                  if file != "commits" and not file.endswith(".lock"))


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


@pytest.mark.parametrize("name", ["gpt5", "", "./nowhere", "/no/where", "a/b/c", "../x", "a b/c"])
def test_a_name_that_is_nothing(server, name):
    with pytest.raises(ValueError) as raised:
        hub.fetch_model(name)
    one_line(raised, repr(name), "config.json + model.safetensors", "gpt2-medium", "owner/name")
    assert server.requests == []
