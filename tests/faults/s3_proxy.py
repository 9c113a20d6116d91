"""An HTTP proxy in front of an S3 server that answers some requests as a store in trouble does.

What happens to a request is decided by a rule: a function of the request that names a fault or None. `seeded` draws by
a hash of the seed, the request and how often it came before, so the same requests meet the same faults whatever the
threads do, and a request that is repeated is drawn anew.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

ANSWERS = {
    "throttled": (429, "TooManyRequests"),
    "slow_down": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "unavailable": (503, "ServiceUnavailable"),
    "gateway": (502, "BadGateway"),
    "request_timeout": (400, "RequestTimeout"),
    "forbidden": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "missing": (404, "NoSuchKey"),
    "no_bucket": (404, "NoSuchBucket"),
}
"""Faults that are an answer of the store: status and S3's code."""
CONNECTION = ("reset", "lost_answer", "short", "wrong_length", "late")
"""Faults of the connection: reset before or after the store did it, a body shorter than its Content-Length, a body cut
with the length of what is left, and an answer that takes a second."""
TRANSIENT = ("throttled", "slow_down", "internal", "unavailable", "gateway", "request_timeout", *CONNECTION[:-1])
"""Faults that pass when the request is repeated; quick ones."""


class Request(NamedTuple):
    """A request of a client."""

    method: str
    key: str
    """Bucket and key, or the bucket alone for a listing."""
    query: dict[str, list[str]]
    nth: int
    """How many requests with this method and target came before."""

    @property
    def is_listing(self) -> bool:
        """Whether it lists keys."""
        return self.method == "GET" and "list-type" in self.query


Rule = Callable[[Request], str | None]


def seeded(seed: int, probability: float, faults: Sequence[str] = TRANSIENT) -> Rule:
    """A rule by which every request meets one of `faults` with this probability."""

    def rule(request: Request) -> str | None:
        target = f"{seed} {request.method} {request.key} {sorted(request.query.items())} {request.nth}"
        draw = int.from_bytes(blake2b(target.encode(), digest_size=8).digest(), "little")
        fault = faults[draw % 1009 % len(faults)] if (draw >> 10) / 2**54 < probability else None
        # A store says so of uploads; of others Arrow keeps the status alone, which is that of a request that is wrong.
        return "internal" if fault == "request_timeout" and request.method not in ("PUT", "POST") else fault

    return rule


class FaultyStore:
    """The proxy; `rule` and `list_lag` (seconds by which listings are behind) may be set at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.rule: Rule = lambda request: None
        self.list_lag = 0.0
        self.hang_s = 30.0
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._targets: Counter[tuple[str, str]] = Counter()
        self._written: dict[str, float] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.closed = threading.Event()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    def heal(self) -> None:
        """No fault from now on, and counts of zero."""
        self.rule, self.list_lag = (lambda request: None), 0.0
        self.requests.clear()
        self.faults.clear()

    def close(self) -> None:
        """Stop answering; what hangs is let go."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def seen(self, method: str, target: str) -> tuple[Request, str | None]:
        """Count a request; returns it and the fault that it meets."""
        parts = urlsplit(target)
        key = unquote(parts.path).strip("/")
        with self._lock:
            query = parse_qs(parts.query, keep_blank_values=True)
            request = Request(method, key, query, self._targets[method, target])
            self._targets[method, target] += 1
            self.requests[method] += 1
            fault = self.rule(request)
            if fault:
                self.faults[fault] += 1
            if method in ("PUT", "POST"):
                self._written[key.partition("/")[2]] = time.monotonic()
        return request, fault

    def without_new(self, listing: bytes) -> bytes:
        """A listing as it was `list_lag` seconds ago."""
        now = time.monotonic()
        with self._lock:
            new = {key for key, when in self._written.items() if now - when < self.list_lag}

        def kept(match: re.Match[str]) -> str:
            return "" if unquote(match[1]) in new else match[0]

        text = re.sub(r"<Contents>\s*<Key>(.*?)</Key>.*?</Contents>", kept, listing.decode(), flags=re.DOTALL)
        return text.encode()

    def _handler(store) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def answer(self) -> None:
                body = self.body()
                request, fault = store.seen(self.command, self.path)
                if fault == "hang":
                    store.closed.wait(store.hang_s)
                    return self.reset()
                if fault == "reset":
                    return self.reset()
                if fault in ANSWERS:
                    status, code = ANSWERS[fault]
                    xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} told</Message></Error>"
                    return self.send(status, [("Content-Type", "application/xml")], xml.encode())
                if fault == "late":
                    time.sleep(1.0)
                status, headers, found = self.forward(body)
                if request.is_listing and store.list_lag:
                    found = store.without_new(found)
                if fault == "lost_answer":
                    return self.reset()
                if fault in ("short", "wrong_length") and self.command == "GET" and len(found) > 1:
                    half = found[: len(found) // 2]
                    return self.send(status, headers, half, None if fault == "wrong_length" else len(found))
                self.send(status, headers, found)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():  # what is said after the body
                    pass
                return b"".join(parts)

            def handle_expect_100(self) -> bool:
                found = super().handle_expect_100()
                self.wfile.flush()
                return found

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection(store.upstream, timeout=30)
                own = ("expect", "transfer-encoding", "content-length")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
                connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
                response = connection.getresponse()
                found = response.read()
                told = [
                    (n, v) for n, v in response.getheaders() if n.lower() not in ("transfer-encoding", "connection")
                ]
                connection.close()
                return response.status, told, found

            def send(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
                is_head = self.command == "HEAD"
                length = len(body) if length is None else length
                self.send_response_only(status)
                for name, value in headers:
                    if is_head or name.lower() != "content-length":
                        self.send_header(name, value)
                if not is_head:
                    self.send_header("Content-Length", str(length))
                    self.close_connection |= length != len(body)
                elif status >= 400:
                    self.send_header("Content-Length", "0")
                self.end_headers()
                if not is_head:
                    self.wfile.write(body)
                self.wfile.flush()

            def reset(self) -> None:
                """End the connection by a reset, as a failing load balancer does."""
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            def handle(self) -> None:
                with suppress(OSError, ValueError):  # the client is gone, or was sent away
                    super().handle()

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """An S3 server of this process behind the proxy, with an empty bucket called `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = FaultyStore(f"{host}:{port}")
    connection = http.client.HTTPConnection(store.upstream, timeout=30)
    connection.request("PUT", "/bucket")
    connection.getresponse().read()
    connection.close()
    try:
        yield store
    finally:
        store.close()
        server.stop()
