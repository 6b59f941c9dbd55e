"""A hub on loopback, with faults: what `download_weights` meets in the world, without a network.

GET /{repo}/resolve/{revision}/{name} redirects to /store/{name}, as the hub does for large files; /plain/{name} is a
plain file server. Every request for a file takes the next fault of `faults[name]`, and behaves when there is none left.
"""

import gzip
import hashlib
import threading
import time
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OTHER_BODIES = {
    "web page": b"<!DOCTYPE html><html>sign in to this network</html>",
    "pointer": b"version https://git-lfs.example/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 427140\n",
}
DRIPPING_HEADERS = {
    "dripping header": b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 30_000,
    "dripping status": b"HTTP/1.1 200 " + b"O" * 30_000,
}
LEADS_NOWHERE = {"sent in a circle": "", "sent to a file": "file:///etc/hostname"}
PACKED = {
    "packed": lambda data: ("gzip", gzip.compress(data, 1)),
    "bomb": lambda data: ("gzip", gzip.compress(data + bytes(2**26), 9)),
    "bomb in a bomb": lambda data: ("gzip, gzip", gzip.compress(gzip.compress(data + bytes(2**26)))),
    "another packing": lambda data: ("zstd", data),
    "packed drip": lambda data: ("gzip", gzip.compress(data, 1)),
}


class Hub:
    """Serves the files of `folder`; `requests` lists (name, first byte asked for, fault)."""

    def __init__(self, folder: Path, repo: str = "someone/some-model", revision: str = "c" * 40):
        self.folder, self.repo, self.revision = folder, repo, revision
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, int, str]] = []
        self.tokens: list[str | None] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def manifest(self, **more) -> dict:
        files = {
            path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(self.folder.iterdir())
            if path.suffix in (".bin", ".model")
        }
        return {"huggingface": {"repo_id": self.repo, "revision": self.revision}, "files": files, **more}

    def resumed(self, name: str) -> bool:
        return any(asked == name and first > 0 for asked, first, _ in self.requests)

    def answer(self, request) -> None:
        self.tokens.append(request.headers.get("Authorization"))
        prefix = f"/{self.repo}/resolve/{self.revision}/"
        if request.path.startswith(prefix):
            return self.reply(request, 302, headers={"Location": f"/store/{request.path.removeprefix(prefix)}"})
        place, _, name = request.path.removeprefix("/").partition("/")
        path = self.folder / name
        fault = self.faults[name].pop(0) if self.faults[name] else ""
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.requests.append((name, first, fault))
        if place not in ("store", "plain") or not path.is_file():
            fault = "404"
        if fault.isdecimal():
            return self.reply(request, int(fault), headers={"Retry-After": "0"})
        if fault in LEADS_NOWHERE:
            return self.reply(request, 302, headers={"Location": LEADS_NOWHERE[fault] or request.path})
        if fault in DRIPPING_HEADERS:
            with suppress(OSError):
                for byte in DRIPPING_HEADERS[fault]:
                    request.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            request.close_connection = True
            return None
        if fault == "come back in 31 years":
            return self.reply(request, 429, headers={"Retry-After": "1000000000"})
        if fault == "refuse":
            return self.hang_up(request)
        self.send_file(request, path.read_bytes(), first, fault)

    def send_file(self, request, data: bytes, first: int, fault: str) -> None:
        if fault == "wrong bytes":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault == "longer":
            data += b"more"
        if fault in OTHER_BODIES:
            data = OTHER_BODIES[fault]
        if fault == "no range" or fault in OTHER_BODIES:
            first = 0
        if first >= len(data):
            return self.reply(request, 416)
        body, total = data[first:], len(data)
        if fault == "truncated":
            body = body[: len(body) // 2]
        if fault in PACKED:
            kinds, body = PACKED[fault](data)
            request.send_response(200)
            request.send_header("Content-Encoding", kinds)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            step = 1 if fault == "packed drip" else len(body)
            with suppress(OSError):
                for start in range(0, len(body), step):
                    request.wfile.write(body[start : start + step])
                    time.sleep(0.01 if step == 1 else 0)
            return None
        request.send_response(206 if first else 200)
        if first:
            request.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if fault == "endless":
            request.send_header("Transfer-Encoding", "chunked")
        else:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        try:
            if fault == "endless":
                while True:
                    request.wfile.write(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
            elif fault == "drip":
                for start in range(len(body)):
                    request.wfile.write(body[start : start + 1])
                    time.sleep(0.01)
            elif fault == "cut":
                request.wfile.write(body[: len(body) // 2])
                self.hang_up(request)
            elif fault == "slow":
                for start in range(0, len(body), 8192):
                    request.wfile.write(body[start : start + 8192])
                    time.sleep(0.02)
            else:
                request.wfile.write(body)
        except OSError:  # the other side has gone, which some tests want
            request.close_connection = True

    @staticmethod
    def reply(request, status: int, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    @staticmethod
    def hang_up(request) -> None:
        request.close_connection = True
        request.wfile.flush()
        request.connection.shutdown(2)
