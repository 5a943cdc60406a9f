"""The files of the pages that people open: read once from the package, sent with a policy that lets nothing else in.

No script or style stands inline, nothing comes from elsewhere; what a page shows of an archive it sets as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from importlib.resources import files

from fastapi import FastAPI, Response

from ma_cluster.errors import RequestFault
from ma_cluster.http.errors import RefusedError
from ma_cluster.http.guard import PAGE

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}
_MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def read_pages(*packages: str) -> dict[str, Response]:
    """The answers for the files in the folders `page` of packages, by name."""
    found = {}
    for package in packages:
        for file in files(package).joinpath("page").iterdir():
            media = _MEDIA.get("." + file.name.rpartition(".")[2])
            if media is not None:
                found[file.name] = Response(file.read_bytes(), media_type=media, headers=HEADERS)
    return found


def add_pages(api: FastAPI, pages: Mapping[str, Response]) -> None:
    """Answer GET /page/NAME with a file."""

    @api.get(PAGE + "{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        if name not in pages:
            raise RefusedError(HTTPStatus.NOT_FOUND, RequestFault.NOT_FOUND, "there is no such file")
        return pages[name]
