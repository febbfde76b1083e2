"""Other people's servers on this machine: a hub, a host that wants a token, one of signed URLs, TLS, and a proxy."""

import datetime
import json
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from support.remote_servers import _Files, _Handler, _running

Answer = tuple[int, dict[str, str], bytes]
EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


@dataclass
class Site:
    url: str
    seen: list[tuple[str, str, dict[str, str]]]
    """Method, path with query, headers by lower-case name."""
    host: str = ""

    def sent(self, header: str) -> set[str | None]:
        """All values of a header."""
        return {headers.get(header) for _, _, headers in self.seen}


class _Checked(_Files):
    """Files, once `server.check` has no other answer."""

    def answer(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers))
        if other := self.server.check(self.path, headers):
            return self.send(other[0], {"Content-Length": str(len(other[2])), **other[1]}, other[2])
        self.path = self.path.partition("?")[0]
        return super().answer()


@contextmanager
def site(folder: Path, check: Callable[[str, dict[str, str]], Answer | None] = lambda *_: None) -> Iterator[Site]:
    """The files of a folder, unless `check(path, headers)` has another answer."""
    with _running(_Checked, folder=folder, check=check, seen=[]) as server:
        yield Site(f"http://127.0.0.1:{server.server_port}", server.seen, f"127.0.0.1:{server.server_port}")


def wants(token: str, status: int = 401) -> Callable[[str, dict[str, str]], Answer | None]:
    """A check that lets only a bearer token in."""
    return lambda _, headers: None if headers.get("authorization") == f"Bearer {token}" else (status, {}, b"")


@dataclass
class Signed:
    """A check of signed URLs: of those whose `sig` is valid, the first so many requests."""

    valid: dict[str, int] = field(default_factory=dict)
    """Signature -> requests that it is good for."""

    def __call__(self, path: str, _: dict[str, str]) -> Answer | None:
        signature = parse_qs(urlsplit(path).query).get("X-Amz-Signature", [""])[0]
        self.valid[signature] = self.valid.get(signature, 0) - 1
        return None if self.valid[signature] >= 0 else (403, {}, EXPIRED)


@dataclass
class Hub:
    hub: Site
    cdn: Site


@contextmanager
def hub(folder: Path, repository: str, token: str | None = None, *, gated: bool = False) -> Iterator[Hub]:
    """The API and the files of one data set; large files are redirected to another host, by a URL of its own."""
    with site(folder) as cdn:

        def check(path: str, headers: dict[str, str]) -> Answer | None:
            if token and headers.get("authorization") != f"Bearer {token}":
                return 401, {"X-Error-Code": "GatedRepo"}, b""
            if gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            path = path.partition("?")[0]
            if path.startswith(f"/api/datasets/{repository}/tree/main"):
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                tree = [
                    {
                        "type": "file",
                        "oid": "0" * 40,
                        "size": file.stat().st_size,
                        "path": file.relative_to(folder).as_posix(),
                    }
                    for file in files
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            name = path.removeprefix(f"/datasets/{repository}/resolve/main/")
            if name == path or not (folder / name).is_file():
                return 404, {}, b""
            return 302, {"Location": f"{cdn.url}/{name}?Signature=of-the-cdn"}, b""

        with site(folder, check) as front:
            yield Hub(front, cdn)


class _Proxy(_Handler):
    """Whatever host is asked for, `server.port` of this machine answers."""

    def answer(self):
        self.server.seen.append((self.command, self.path, {}))
        parts = urlsplit(self.path)
        upstream = HTTPConnection("127.0.0.1", self.server.port)
        upstream.putrequest(self.command, f"{parts.path}?{parts.query}" if parts.query else parts.path, skip_host=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        response = upstream.getresponse()
        body = response.read()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
        self.send(response.status, {"Content-Length": str(len(body)), **headers}, body)
        upstream.close()

    def do_PUT(self):
        self.answer()

    def do_CONNECT(self):
        self.server.seen.append(("CONNECT", self.path, {}))
        with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            self.send_response_only(200)
            self.end_headers()
            ends = {self.connection: upstream, upstream: self.connection}
            while True:
                ready, _, _ = select.select(list(ends), [], [])
                for end in ready:
                    data = end.recv(1 << 16)
                    if not data:
                        self.close_connection = True
                        return
                    ends[end].sendall(data)


@contextmanager
def proxy(port: int) -> Iterator[Site]:
    """A proxy in front of one server of this machine, of any host's name."""
    with _running(_Proxy, port=port, seen=[]) as server:
        yield Site(f"http://127.0.0.1:{server.server_port}", server.seen)


@contextmanager
def tls(folder: Path, name: str, certificates: Path) -> Iterator[Site]:
    """`site`, over TLS under a name; `certificates` takes the authority's certificate, ca.pem."""
    authority, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ours = x509.BasicConstraints(ca=True, path_length=None)
    ca = _certificate("Lab CA", authority.public_key(), authority, [(ours, True)])
    theirs = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ]
    leaf = _certificate(name, server_key.public_key(), authority, theirs)
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    key = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (certificates / "ca.pem").write_bytes(ca.public_bytes(pem))
    (certificates / "server.pem").write_bytes(leaf.public_bytes(pem) + key)
    with _running(_Checked, folder=folder, check=lambda *_: None, seen=[]) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        yield Site(f"https://{name}", server.seen, f"127.0.0.1:{server.server_port}")


def _certificate(name: str, key, authority, extensions) -> x509.Certificate:
    start = datetime.datetime(2020, 1, 1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lab CA")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36_500))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(authority, hashes.SHA256())
