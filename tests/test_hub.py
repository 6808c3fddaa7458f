"""Downloads from a small server on 127.0.0.1, safetensors against the safetensors package."""

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

from plumbing import hub, safetensors as safe

BODY = bytes(range(256)) * 400  # 102,400 bytes
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
HELLO_GIT = "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin


class Server(http.server.ThreadingHTTPServer):
    """Serves self.files {path: bytes}; a test puts its own self.answer(request, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.files, self.requests = {}, []
        self.answer = lambda request, body: request.send(body)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client that has gone


class Request(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        body = self.server.files.get(self.path)
        if body is None:
            return self.send(b"no such file", 404)
        self.server.answer(self, body)

    def send(self, body, status=200, promise=None, ranges=True, **headers):
        """body, or the rest that the Range header asks for; promise: what it calls its size."""
        size = len(body) if promise is None else promise
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked and ranges and status == 200:
            start = int(asked[1])
            if start >= size:
                return self.send(b"", 416, Content_Range=f"bytes */{size}")
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            status, body, size = 206, body[start:], size - start
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "WAITS", [0.01, 0.01, 0.01, None])
    yield server
    server.shutdown()
    server.server_close()


def serve(server, repo="some/repo", **files):
    """Puts files, written name__ext for name.ext, under a repository's main revision."""
    for name, content in files.items():
        server.files[f"/{repo}/resolve/main/{name.replace('__', '.')}"] = content


def in_cache(tmp_path):
    """The names of all files in the cache."""
    return sorted(file for _, _, files in os.walk(tmp_path / "cache") for file in files)


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


def git_sha1(body):
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


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
        request.end_headers()
        request.wfile.write(body)

    serve(server, weights__bin=BODY)
    server.answer = answer
    assert open(hub.download("some/repo", "weights.bin"), "rb").read() == BODY


def test_a_body_in_chunks_that_is_cut(server):
    def answer(request, body):
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
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
    serve(server, file__json=body)
    server.answer = lambda request, body: request.send(body, **headers)
    assert open(hub.download("some/repo", "file.json"), "rb").read() == body


@pytest.mark.parametrize(
    "headers", [{"X_Linked_Etag": f'"{ABC_SHA256}"'}, {"ETag": f'W/"{ABC_SHA256}"'},
                {"ETag": f'"{HELLO_GIT}"'}])
def test_a_wrong_hash_removes_the_file(server, tmp_path, headers):
    serve(server, file__json=b"abd")
    server.answer = lambda request, body: request.send(body, **headers)
    with pytest.raises(ValueError) as raised:
        hub.download("some/repo", "file.json")
    one_line(raised, "/some/repo/resolve/main/file.json", "hash", "run the same command again")
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
    server.answer = lambda request, body: request.send(b"no", status)
    with pytest.raises(ValueError) as raised:
        hub.fetch_model("meta-llama/Llama-3.2-1B")
    one_line(raised, f"{server.url}/meta-llama/Llama-3.2-1B is gated", "licence", "HF_TOKEN",
             f"HTTP {status}, no HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ValueError) as raised:
        hub.download("meta-llama/Llama-3.2-1B", "config.json")
    one_line(raised, "the HF_TOKEN you set")
    assert "hf_secret" not in str(raised.value)
    assert len(server.requests) == 2  # a refusal is not tried again


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
    serve(server, "openai-community/gpt2", config__json=b"{}", model__safetensors=b"x",
          tokenizer__json=b"t", pytorch_model__bin=b"never")
    folder = hub.fetch_model("gpt2")
    assert folder == str(tmp_path / "cache/openai-community/gpt2/main")
    assert in_cache(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert hub.fetch_model("gpt2") == folder and len(server.requests) == 3


def test_a_model_in_shards_without_tokenizer(server, tmp_path, monkeypatch):
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    index = json.dumps({"weight_map": files}).encode()
    server.files = {f"/some/repo/resolve/main/{name}": body for name, body in {
        "config.json": b"{}", "model.safetensors.index.json": index,
        "model-1.safetensors": b"1", "model-2.safetensors": b"2"}.items()}
    folder = hub.fetch_model("some/repo")
    assert sorted(os.listdir(folder)) == ["config.json", "model-1.safetensors",
                                          "model-2.safetensors", "model.safetensors.index.json"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch_model("some/repo") == folder  # what is missing is not asked for again
    os.remove(os.path.join(folder, "model-2.safetensors"))
    with pytest.raises(ConnectionError):
        hub.fetch_model("some/repo")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    del server.files["/some/repo/resolve/main/model-2.safetensors"]
    with pytest.raises(hub.MissingFile, match="model-2.safetensors"):
        hub.fetch_model("some/repo")


def test_an_index_can_not_name_files_elsewhere(server, tmp_path):
    for name in ["../../evil.safetensors", "/etc/evil.bin", "..", "model.safetensors.index.json"]:
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError) as raised:
            hub.read_weights(tmp_path)
        one_line(raised, "model.safetensors.index.json is damaged")


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
    one_line(raised, "some/repo has none of", *hub.WEIGHTS)


def test_a_local_path_is_returned_as_it_is(tmp_path):
    assert hub.fetch_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["gpt5", "", "./nowhere", "/no/where", "a/b/c", "../x", "a b/c"])
def test_a_name_that_is_nothing(server, name):
    with pytest.raises(ValueError) as raised:
        hub.fetch_model(name)
    one_line(raised, repr(name), "config.json + model.safetensors", "gpt2-medium", "owner/name")
    assert server.requests == []


# -----------------------------------------------------------------------------
# safetensors: the package is the oracle


def every_kind():
    random = torch.Generator().manual_seed(0)
    tensors = {"flags": torch.tensor([True, False, True])}  # 3 bytes: what follows is not aligned
    for kind, dtype in safe.DTYPES.items():
        x = torch.randn(3, 5, generator=random) * 100
        x = x > 0 if dtype == torch.bool else x.abs().to(dtype) if kind == "U8" else x.to(dtype)
        tensors |= {f"{kind}.matrix": x, f"{kind}.scalar": x[1, 2].clone(),
                    f"{kind}.empty": torch.zeros(0, 7, dtype=dtype)}
    tensors["ünïcode 'name'"] = torch.tensor([torch.inf, -0.0, 1e-45])
    return tensors


def assert_same(got, want):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert torch.equal(got[name], want[name]), name


def test_reads_what_the_package_writes(tmp_path):
    assert len(safe.DTYPES) == 10
    safetensors.torch.save_file(every_kind(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same(safe.read_safetensors(tmp_path / "x.safetensors"), every_kind())


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_safetensors(path, every_kind(), {"note": "hi"})
    assert_same(safetensors.torch.load_file(path), every_kind())
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "hi"}
    assert_same(safe.read_safetensors(path), every_kind())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_writes_views_and_parameters(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tensors = {"t": x.T, "cut": x[1:3, ::2], "same": x, "p": torch.nn.Parameter(x[:, 0]),
               "bf16": x.bfloat16().T}
    safe.write_safetensors(tmp_path / "x.safetensors", tensors)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)


def test_an_empty_table(tmp_path):
    safe.write_safetensors(tmp_path / "x.safetensors", {})
    assert safe.read_safetensors(tmp_path / "x.safetensors") == {}
    assert safetensors.torch.load_file(tmp_path / "x.safetensors") == {}


def test_the_file_is_mapped_and_stays_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_safetensors(path, {"a": torch.ones(1000), "b": torch.zeros(1000)})
    before = path.read_bytes()
    tensors = safe.read_safetensors(path)
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 4000  # views of one mapping
    tensors["a"].fill_(7)
    assert path.read_bytes() == before
    assert safe.read_safetensors(path)["a"].sum() == 1000 and tensors["a"].sum() == 7000


def test_a_file_can_replace_the_one_it_is_read_from(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_safetensors(path, {"a": torch.arange(5.0), "b": torch.arange(3)})
    safe.write_safetensors(path, {k: v + 1 for k, v in safe.read_safetensors(path).items()})
    safe.write_safetensors(path, safe.read_safetensors(path))
    assert_same(safe.read_safetensors(path),
                {"a": torch.arange(5.0) + 1, "b": torch.arange(3) + 1})


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_off_their_alignment(tmp_path):
    data = torch.tensor([1.5, 2.5])
    for pad in range(4):
        header = json.dumps({"b": entry(0, 1, [1], "BOOL"), "a": entry(1, 9, [2])}) + " " * pad
        path = file_of(tmp_path / "x.safetensors", header.encode(), b"\1" + data.numpy().tobytes())
        assert_same(safe.read_safetensors(path), {"b": torch.tensor([True]), "a": data})


EIGHT = bytes(8)
BAD = {
    "cut or no safetensors": (b"", None, "is cut"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", None, "Git LFS pointer"),
    "header beyond the file": ((1000).to_bytes(8, "little") + b"{}", None, "header of 1000"),
    "broken JSON": (b'{"a": ', EIGHT, "its header is no table"),
    "no UTF-8": (b'{"\xff": 1}', EIGHT, "its header is no table"),
    "a list": ([1], EIGHT, "its header is no table"),
    "deep": (b"[" * 100_000, EIGHT, "its header is no table"),
    "not a table inside": ({"a": 5}, EIGHT, "its header is no table"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT, "its header is no table"),
    "shape of text": ({"a": entry(0, 8, "2")}, EIGHT, "its header is no table"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, EIGHT, "its header is no table"),
    "fraction": ({"a": entry(0, 8, [2.0])}, EIGHT, "its header is no table"),
    "three offsets": ({"a": {**entry(0, 8, [2]), "data_offsets": [0, 4, 8]}}, EIGHT, "no table"),
    "negative offset": ({"a": entry(-8, 0, [2])}, EIGHT, "its header is no table"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F8_E4M3")}, EIGHT, "unknown dtype F8_E4M3"),
    "dtype of another kind": ({"a": entry(0, 8, [2], [])}, EIGHT, "unknown dtype"),
    "shape against offsets": ({"a": entry(0, 8, [3])}, EIGHT, "'a' has 8 bytes, which F32 [3]"),
    "backwards": ({"a": entry(8, 0, [2])}, EIGHT, "'a' has -8 bytes"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, EIGHT, "'b' begins at byte 4"),
    "twice the same": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, EIGHT, "overlap"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, EIGHT + b"1234", "hole"),
    "hole in front": ({"a": entry(4, 8, [1])}, EIGHT, "overlap or hole"),
    "truncated": ({"a": entry(0, 12, [3])}, EIGHT, "download it again"),
    "bytes left over": ({"a": entry(0, 4, [1])}, EIGHT, "download it again"),
    "huge": ({"a": entry(0, 0, [0, 2**47, 2**47, 2**47])}, b"", "a"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_one_line(tmp_path, case):
    header, data, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(header) if data is None else file_of(path, header, data)
    with pytest.raises(ValueError) as raised:
        hub.read_weights(path)
    one_line(raised, "bad.safetensors", message)


def test_a_truncated_file_names_both_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_safetensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)) as raised:
            safe.read_safetensors(path)
    one_line(raised, f"has {size} bytes, its header promises {len(whole)}")


def test_a_damaged_header_never_breaks_the_reader(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_safetensors(path, {"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bool)})
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole) - 26):
        for byte in b"\0\xff9-[":
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                safe.read_safetensors(path)
            except ValueError as error:
                refused += str(path) in str(error)
    assert refused > 400


# -----------------------------------------------------------------------------
# folders, shards, .bin


def two_tensors():
    return {"wte.weight": torch.arange(12.0).view(3, 4), "ln_f.bias": torch.ones(4).bfloat16()}


def write_index(folder, name, files):
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("ext", ["safetensors", "bin"])
def test_a_folder_in_one_file_and_in_shards(tmp_path, ext):
    write = safe.write_safetensors if ext == "safetensors" else lambda p, t: torch.save(t, p)
    name = "model.safetensors" if ext == "safetensors" else "pytorch_model.bin"
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    write(one / name, two_tensors())
    for n, (key, tensor) in enumerate(two_tensors().items()):
        write(many / f"part-{n}.{ext}", {key: tensor})
    write_index(many, name, {"wte.weight": f"part-0.{ext}", "ln_f.bias": f"part-1.{ext}"})
    for path in (one, str(one), one / name, many, many / f"{name}.index.json"):
        assert_same(hub.read_weights(path), two_tensors())

    stale = {"wte.weight": torch.zeros(1), "old": torch.zeros(1)}
    write(many / f"part-1.{ext}", two_tensors() | stale)  # the index decides what counts
    assert_same(hub.read_weights(many), two_tensors())
    write(many / f"part-1.{ext}", {"ln_f.other": torch.ones(4)})
    with pytest.raises(ValueError) as raised:
        hub.read_weights(many)
    one_line(raised, f"part-1.{ext} lacks ln_f.bias")
    os.remove(many / f"part-1.{ext}")
    with pytest.raises(ValueError) as raised:
        hub.read_weights(many)
    one_line(raised, f"names the file part-1.{ext}, which is not beside it")


def test_safetensors_come_before_bin(tmp_path):
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(hub.read_weights(tmp_path)) == {"old"}
    safe.write_safetensors(tmp_path / "model.safetensors", two_tensors())
    assert_same(hub.read_weights(tmp_path), two_tensors())


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError) as raised:
        hub.read_weights(tmp_path)
    one_line(raised, tmp_path, *hub.WEIGHTS)
    with pytest.raises(OSError, match="nowhere.bin"):
        hub.read_weights(tmp_path / "nowhere.bin")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff",
                                  b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ""}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(ValueError) as raised:
        hub.read_weights(tmp_path)
    one_line(raised, "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_old_and_new_whole_and_cut(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save(two_tensors(), path, _use_new_zipfile_serialization=zipped)
    assert_same(hub.read_weights(tmp_path), two_tensors())
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as raised:
            hub.read_weights(tmp_path)
        one_line(raised, "pytorch_model.bin can not be read: cut")


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_bin_file_can_not_run_code(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "owned")
    for write in (lambda p: torch.save({"a": evil}, p),
                  lambda p: p.write_bytes(pickle.dumps({"a": evil}, protocol=2))):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError) as raised:
            hub.read_weights(tmp_path)
        one_line(raised, "pytorch_model.bin can not be read")
        assert not os.path.exists(evil.path)


def test_a_bin_file_without_names(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not a table of named tensors"):
        hub.read_weights(tmp_path)
    torch.save({"step": 3, "model": {"w": torch.ones(2)}}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="last.pth is not a table of named tensors"):
        hub.read_weights(tmp_path / "last.pth")
    assert hub.read_pickle(tmp_path / "last.pth")["step"] == 3


# -----------------------------------------------------------------------------
# writing


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    safe.write_safetensors(path, two_tensors())
    monkeypatch.setattr(safe, "open", full_disk, raising=False)
    with pytest.raises(OSError) as raised:
        safe.write_safetensors(path, {"big": torch.ones(1000)})
    one_line(raised, f"can not write {path}", "No space left", "is as it was")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_same(safe.read_safetensors(path), two_tensors())


def test_what_can_not_be_written(tmp_path):
    with pytest.raises(ValueError) as raised:
        safe.write_safetensors(tmp_path / "x.safetensors", {"z": torch.ones(2, dtype=torch.cfloat)})
    one_line(raised, "x.safetensors", "'z' is torch.complex64")
    with pytest.raises(OSError) as raised:
        safe.write_safetensors(tmp_path / "no/x.safetensors", two_tensors())
    one_line(raised, "can not write", "No such file or directory")
    assert os.listdir(tmp_path) == []
