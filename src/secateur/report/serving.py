"""A local page that follows runs: an HTTP server of the standard library that can only be read from."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from secateur.core.errors import UsageError
from secateur.report.live import Watched

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ASSETS = {
    "/": ("text/html", ("watch.html",)),
    "/watch.js": ("text/javascript", ("watch.js",)),
    "/watch_charts.js": ("text/javascript", ("watch_charts.js",)),
    "/watch.css": ("text/css", ("page.css", "watch.css")),
}
SECONDS = 20
"""A client that is silent for so long is hung up on."""


class Server(ThreadingHTTPServer):
    """Serves the page and the figures of some runs.

    Args:
        watched: the runs.
        host: the address to listen on.
        port: the port; 0 takes any free one.

    Raises:
        UsageError: when the address is taken, unknown or not allowed.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, watched: Watched, host: str = "127.0.0.1", port: int = 8765) -> None:
        if not 0 <= port < 1 << 16:
            raise UsageError(f"--port is {port}; it must be between 0 and 65535.")
        self.watched, self.host = watched, host
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__((str(address[0]), port), Handler)
        except OSError as error:
            raise UsageError(_why(error, host, port)) from error

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which may ask the network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hangs up is no fault; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def local(self) -> bool:
        """Whether this machine alone can reach it."""
        return ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """Where the page is."""
        anywhere = ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_unspecified
        host = socket.gethostname() if anywhere else self.host
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.server_port}/"

    def knows(self, header: str | None) -> bool:
        """Whether a Host header names this server.

        A page from elsewhere can have a name of its own lead here, so that the browser lets it read what we send; its
        name stands in the header then. Addresses cannot be made to lead elsewhere.
        """
        try:
            named = urlsplit(f"//{header or ''}")
            name, port = named.hostname or "", named.port
        except ValueError:
            return False
        if port not in (self.server_port, None if self.server_port == 80 else self.server_port):
            return False
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return not self.local and name == socket.gethostname().lower()
        return address.is_loopback or not self.local


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken by another program; choose another with `--port {port + 1 & 65535}`."
    if error.errno == errno.EACCES:
        return f"this user may not listen on port {port}; choose one above 1023, such as `--port 8765`."
    return f"cannot listen on {host}, port {port}: {error.strerror or error}. Leave `--host` out for this machine."


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for a fixed list of addresses; nothing in a request is ever used as a path.

    Each connection carries one request, so that none outlives the server.
    """

    server: Server
    server_version = "secateur"
    sys_version = ""
    timeout = SECONDS

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Every method of HTTP but two is refused, whatever its name."""
        if name.startswith("do_"):
            return partial(self._refuse, HTTPStatus.METHOD_NOT_ALLOWED, "This page can only be read: use GET or HEAD.")
        raise AttributeError(name)

    def do_HEAD(self) -> None:
        """The same headers as GET."""
        self.do_GET()

    def do_GET(self) -> None:
        """The page, its parts, and figures as JSON."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"Open this page as {self.server.url}")
            return
        try:
            asked = urlsplit(self.path)
            query = parse_qs(asked.query, max_num_fields=4)
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "This address cannot be read.")
            return
        if asked.path in _ASSETS:
            kind, names = _ASSETS[asked.path]
            folder = files("secateur.report").joinpath("assets")
            text = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)
            self._send(HTTPStatus.OK, kind, text)
        elif asked.path == "/runs.json":
            self._figures(self.server.watched.listing())
        elif asked.path == "/curves.json":
            self._figures(self.server.watched.curves(query.get("run", [""])[0]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _figures(self, table: dict[str, Any] | None) -> None:
        """Figures; ``null`` for a run that is not there any more, which is no fault of who asks."""
        self._send(HTTPStatus.OK, "application/json", json.dumps(table, allow_nan=False, separators=(",", ":")))

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, "text/plain", why + "\n")

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a request every two seconds is no news."""


def serve(places: list[str | Path], host: str, port: int, told: Callable[[Server], object]) -> None:
    """Serve until interrupted.

    Args:
        places: run folders, or folders that hold some.
        host: the address to listen on.
        port: the port; 0 takes any free one.
        told: called once with the server when it listens.

    Raises:
        FileError: when a place is no folder.
        UsageError: when the address is taken, unknown or not allowed.
    """
    with Server(Watched([Path(place) for place in places]), host, port) as server:
        try:
            told(server)
            server.serve_forever()
        except KeyboardInterrupt:
            return
