"""The page of a status on this machine's loopback address: `/` is the page, `/status.json` the same for machines."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from gt_ray.errors import UserError
from gt_ray.studies.status import read_status
from gt_ray.studies.status_view import page

LOOPBACK = "127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        # A page of another site whose name leads here (DNS rebinding) is not to read it.
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:  # half an IPv6 address
            host = None
        if host not in (LOOPBACK, "localhost"):
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "open it as localhost\n")
        try:
            if self.path == "/":
                self._answer(HTTPStatus.OK, "text/html", page(read_status(self.folder)))
            elif self.path == "/status.json":
                self._answer(HTTPStatus.OK, "application/json", json.dumps(read_status(self.folder).as_json()))
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are / and /status.json\n")
        except UserError as error:  # its folder was moved, say
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"{error}\n")

    def _answer(self, status: HTTPStatus, kind: str, body: str) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """A line for every look would be noise."""


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server that is bound and answers once its `serve_forever` runs.

    Args:
        port: 0 for any that is free.

    Raises:
        UserError: the folder is neither a run nor a study, or the port is taken.
    """
    read_status(folder)
    try:
        return ThreadingHTTPServer((LOOPBACK, port), type("Handler", (_Handler,), {"folder": folder}))
    except OSError as error:
        raise UserError(f"port {port} is not to be had: {error.strerror}; give --serve another one") from error
