"""A server on 127.0.0.1 that behaves as the Hugging Face hub does, also on its bad days."""

import hashlib
import http.server
import re
import threading
from urllib.parse import quote

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def git_sha1(body):
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves self.files {path: bytes}; a test puts its own self.answer(request, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.files, self.requests = {}, []
        self.answer = lambda request, body: request.send(body)
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client that has gone

    def close(self):
        self.shutdown()
        self.server_close()


class Request(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        body = self.server.files.get(self.path)
        if body is None:
            return self.send(b"no such file", 404)
        self.server.answer(self, body)

    def send(self, body, status=200, promise=None, ranges=True, commit=COMMIT, **headers):
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
        headers |= {"X-Repo-Commit": commit} if commit else {}
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Hub:
    """Two servers: the hub with repositories {name: {file: bytes}}, and the storage of large files.

    Small files: 307 to a relative address of the hub itself. Large ones: 302 to a signed address on
    the storage, which works once, refuses who shows a token, and has an ETag that is not the sha256.
    """

    def __init__(self, repositories):
        self.home, self.storage = Server(), Server()
        self.home.answer, self.storage.answer = self.redirect, self.stored
        self.pace = lambda request, body: request.send(body, commit=None, ETag=f'"{"e" * 64}"')
        for repo, files in repositories.items():
            for name, body in files.items():
                self.home.files[f"/{repo}/resolve/main/{name}"] = body

    @property
    def requests(self):
        return self.home.requests + self.storage.requests

    def redirect(self, request, body):
        path = request.path
        if path.startswith("/api/resolve-cache/"):
            return request.send(body, ETag=f'"{git_sha1(body)}"')
        _, owner, name, _, _, file = path.split("/")
        if file.endswith(".json"):
            place = f"/api/resolve-cache/models/{owner}/{name}/{COMMIT}/{file}?{quote(path, '')}=&etag=x"
            self.home.files[place] = body
            return request.send(b"see there", 307, Location=place, X_Linked_Size=str(len(body)),
                                X_Linked_ETag=f'"{git_sha1(body)}"')
        place = f"/xet/{hashlib.md5(body).hexdigest()}?X-Amz-Signature={len(self.home.requests)}"
        self.storage.files[place] = body
        request.send(b"Found. Redirecting", 302, Location=self.storage.url + place,
                     X_Linked_Size=str(len(body)), X_Linked_ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    def stored(self, request, body):
        if request.headers["Authorization"]:
            return request.send(b"only one auth mechanism", 400, commit=None)
        del self.storage.files[request.path]
        self.pace(request, body)

    def close(self):
        self.home.close()
        self.storage.close()
