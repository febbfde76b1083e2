"""A folder of tars on an S3-protocol server and on an HTTP server of this machine, behind proxies that make faults."""

import http.client
import logging
import os
import random
import socket
import struct
import threading
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock
from urllib.parse import unquote

import obstore
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from cache.store import retry

KINDS = ("reset", "503", "slow", "short", "cut", "reset in body")
"""Connection reset before the answer; status 503; first byte late by `slow_s`; a body half as long as its range, with
a length that fits; a body that ends early; a connection reset in its middle. On request only, "no ranges": the whole
object in answer to a range."""

_MOST = 4
_buckets = count()


def hurry(monkeypatch) -> None:
    """As many retries as ever, without their waits."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.01)
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5)}
    monkeypatch.setitem(retry.CLIENT["retry_config"], "backoff", backoff)


@dataclass
class Faults:
    """What happens to the next requests, of both servers; may be changed at any time."""

    rate: float = 0.0  # of the requests that meet one of `kinds`
    kinds: tuple[str, ...] = KINDS
    slow_s: float = 0.5
    script: deque[str] = field(default_factory=deque)  # first of all, in this order
    requests: Counter[str] = field(default_factory=Counter)  # seen, by method
    made: Counter[str] = field(default_factory=Counter)
    ranges: list[str | None] = field(default_factory=list)
    harmed: Counter[str | None] = field(default_factory=Counter)  # by range, so often in a row
    closing: threading.Event = field(default_factory=threading.Event)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, method: str, wanted: str | None) -> str | None:
        with self._lock:
            self.requests[method] += 1
            self.ranges.append(wanted)
            kind = self.script.popleft() if self.script else None
            # Clients try seven times: a range that chance harms as often in a row would say nothing of them.
            spared = self.rate < 1 and self.harmed[wanted] >= _MOST
            if kind is None and self._random.random() < self.rate and not spared:
                kind = self._random.choice(self.kinds)
            self.harmed[wanted] = self.harmed[wanted] + 1 if kind else 0
            if method == "HEAD" and kind in ("short", "cut", "reset in body"):
                kind = "503"  # there is no body to harm
            self.made.update([kind] if kind else [])
            return kind

    def clear(self) -> None:
        """No faults from here on, counters at zero, and dice as at the start."""
        self.rate, self.kinds = 0.0, KINDS
        self._random.seed(0)
        for record in (self.script, self.requests, self.made, self.ranges, self.harmed):
            record.clear()


@dataclass
class Remote:
    s3: str  # s3://bucket, for whoever has the environment of this process
    http: str  # http://127.0.0.1:port
    tagged: str  # the same, of a server that sends ETags, as Google's and Azure's do
    faults: Faults
    environment: dict[str, str]  # the variables that lead to `s3`


@contextmanager
def serve(folder: Path, fault_rate: float = 0.0, kinds: tuple[str, ...] = KINDS) -> Iterator[Remote]:
    """Serve every file below `folder` by both protocols; S3 has a copy of them, HTTP follows changes.

    Sets AWS_* in the environment meanwhile. The HTTP server sends no ETag, the S3 server does.
    """
    faults = Faults(fault_rate, kinds)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    bucket = f"tars-{next(_buckets)}"  # moto's servers share their state
    with ExitStack() as stack:
        moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        files = stack.enter_context(_running(_Files, folder=folder))
        s3 = stack.enter_context(_running(_Proxy, upstream=moto.get_host_and_port(), faults=faults))
        tagged = stack.enter_context(_running(_Files, folder=folder, headers={"ETag": '"1"'}))
        web = stack.enter_context(_running(_Proxy, upstream=files.server_address, faults=faults))
        stack.callback(faults.closing.set)
        environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3.server_port}",
            "NO_PROXY": "127.0.0.1",
        }
        stack.enter_context(mock.patch.dict(os.environ, environment))
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        store = S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True})
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                obstore.put(store, path.relative_to(folder).as_posix(), path)
        hosts = (f"http://127.0.0.1:{server.server_port}" for server in (web, tagged))
        yield Remote(f"s3://{bucket}", *hosts, faults, environment)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five, as usual, makes the sixth client at once wait for a second
    folder: Path
    upstream: tuple
    faults: Faults
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, handler: type, **facts):
        self.__dict__.update(facts)
        self.clients: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request: Any, client_address: Any):
        self.clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any):
        """Close at once: the usual orderly shutdown would come before a reset."""
        self.clients.discard(request)
        request.close()

    def handle_error(self, request, client_address):
        """A client that went away is what these tests are about."""


@contextmanager
def _running(handler: type, **facts) -> Iterator[_Server]:
    with _Server(handler, **facts) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            for client in list(server.clients):  # kept alive by their clients' pools
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
    server: _Server
    answer: Callable[..., None]

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Files(_Handler):
    """Static files, with ranges."""

    def answer(self):
        try:
            content = (self.server.folder / unquote(self.path).lstrip("/")).read_bytes()
        except OSError:
            return self.send(404, {"Content-Length": "0"}, b"")
        headers = {"Last-Modified": formatdate(0, usegmt=True), "Accept-Ranges": "bytes", **self.server.headers}
        status, total = 200, len(content)
        if wanted := self.headers.get("Range"):
            start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            content = content[start : end + 1]
            if not content:
                return self.send(416, {"Content-Length": "0", "Content-Range": f"bytes */{total}"}, b"")
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
            status = 206
        return self.send(status, {**headers, "Content-Length": str(len(content))}, content)


class _Proxy(_Handler):
    """Passes requests on to `server.upstream`, except for those that the faults want."""

    def answer(self):
        faults = self.server.faults
        kind = faults.draw(self.command, self.headers.get("Range"))
        if kind == "reset":
            return self.reset()
        if kind == "503":
            return self.send(503, {"Content-Length": "0"}, b"")
        if kind == "slow":
            faults.closing.wait(faults.slow_s)
        upstream = http.client.HTTPConnection(*self.server.upstream[:2])
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "range" or kind != "no ranges":
                    upstream.putheader(name, value)
            upstream.endheaders()
            response = upstream.getresponse()
            body = response.read()
        finally:
            upstream.close()
        headers = dict(response.getheaders())
        for name in ("Connection", "Transfer-Encoding", "Keep-Alive"):
            headers.pop(name, None)
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        half = body[: len(body) // 2]
        if kind == "short":
            headers["Content-Length"] = str(len(half))
        self.send(response.status, headers, half if kind in ("short", "cut", "reset in body") else body)
        if kind == "cut":
            self.close_connection = True
        if kind == "reset in body":
            self.reset()

    def reset(self) -> None:
        """Close with RST in place of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
