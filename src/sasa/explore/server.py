"""The server behind the page: reachable only from this machine, and uploads stay in memory.

Browsers let any site send requests to 127.0.0.1. Therefore only requests to a local host name are answered, which
prevents DNS rebinding, and only posts from this page itself.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..train.errors import DataError, OptionError
from ..viz.effects import cover, predict
from ..viz.page import MOST_UPLOAD, render
from ..viz.payload import TEMPERATURES, png, top
from .source import Network, Shown

HOST = "127.0.0.1"
KEPT = 16
"""Maximum number of uploaded images that are kept for further requests."""


class Explored:
    """A network and its images. Requests are computed one at a time."""

    def __init__(self, network: Network, images: Sequence[Shown]) -> None:
        self.network, self._lock = network, threading.Lock()
        self._given = {shown.key: shown for shown in images}
        self._sent: OrderedDict[str, Shown] = OrderedDict()
        self._first = self.payload(images[0])

    def page(self) -> str:
        """The page with the first image; the others are fetched on request."""
        others = list(self._given.values())[1:]
        rest = [{"key": one.key, "name": one.name, "label": one.label, "picture": png(one.bytes)} for one in others]
        return render([self._first, *rest], network=self.network.facts["model"], note=self.network.note, server=True)

    def find(self, key: Any) -> Shown | None:
        """An image by its key."""
        if not isinstance(key, str):
            return None
        return self._given.get(key) or self._sent.get(key)

    def payload(self, shown: Shown) -> dict[str, Any]:
        """What the page shows of it."""
        with self._lock:
            return self.network.payload(shown, with_effects=False)

    def take(self, data: bytes, name: str) -> dict[str, Any]:
        """What the page shows of an uploaded image.

        Raises:
            UnreadableImage: it is not an image.
        """
        shown = self.network.read(data, name)
        payload = self.payload(shown)
        with self._lock:
            self._sent[shown.key] = shown
            while len(self._sent) > KEPT:
                self._sent.popitem(last=False)
        return payload

    def predict(self, asked: Any) -> list[dict[str, Any]]:
        """The predicted classes under a change: ``position``, ``temperature``, ``cover`` of rows and columns.

        Raises:
            ValueError: the request is for something else.
        """
        if not isinstance(asked, dict):
            raise ValueError("expected an object")
        shown = self.find(asked.get("image"))
        if shown is None:
            raise ValueError("image: it is no longer kept; send it again")
        position, temperature = asked.get("position", True), asked.get("temperature", 1)
        if not isinstance(position, bool):
            raise ValueError("position: expected true or false")
        if isinstance(temperature, bool) or temperature not in TEMPERATURES:
            raise ValueError(f"temperature: expected one of {TEMPERATURES}")
        image = self.network.input(shown)
        if (box := asked.get("cover")) is not None:
            if not (isinstance(box, list) and len(box) == 4 and all(type(x) is int and 0 <= x <= 10**6 for x in box)):
                raise ValueError("cover: expected top, left, bottom and right")
            image = cover(image, *box)
        with self._lock:
            plain = predict(self.network.model, self.network.input(shown))
            changed = predict(self.network.model, image, position=position, temperature=temperature)
        if plain is None or changed is None:
            raise ValueError("network: expected a classifier's finite output")
        classes = self.network.facts["classes"]
        return top(changed, classes, top(plain, classes))


def application(explored: Explored) -> Starlette:
    """The page and its requests, as an ASGI application."""

    async def page(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(explored.page))

    async def image(request: Request) -> Response:
        shown = explored.find(request.path_params["key"])
        if shown is None:
            return _error("image: it is no longer kept", 404)
        return await _answer(explored.payload, shown)

    async def explore(request: Request) -> Response:
        if not _own(request):
            return _error("expected a request of this page", 403)
        body = await _body(request, MOST_UPLOAD)
        if body is None:
            return _error(f"expected an image of at most {MOST_UPLOAD // 1_000_000} MB, got a larger one", 413)
        name = unquote(request.headers.get("x-name", "your image"))[:200]
        return await _answer(explored.take, body, name)

    async def ask(request: Request) -> Response:
        if not _own(request):
            return _error("expected a request of this page", 403)
        body = await _body(request, 10_000)
        if body is None:
            return _error("expected a short request", 413)

        def run() -> dict[str, Any]:
            return {"prediction": explored.predict(json.loads(body))}

        return await _answer(run)

    routes = [
        Route("/", page),
        Route("/image/{key}", image),
        Route("/explore", explore, methods=["POST"]),
        Route("/predict", ask, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


async def _answer(function: Any, *arguments: Any) -> Response:
    """A response with a function's result, or with the error in its input."""
    try:
        return JSONResponse(await run_in_threadpool(function, *arguments))
    except (ValueError, RecursionError) as error:
        return _error(str(error).removeprefix("data: "), 415 if isinstance(error, DataError) else 400)


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _own(request: Request) -> bool:
    """Whether a request comes from a page of this server; programs other than browsers send no origin."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _body(request: Request, most: int) -> bytes | None:
    """The request body; None if it is longer than ``most``."""
    received = bytearray()
    try:
        async for part in request.stream():
            received += part
            if len(received) > most:
                return None
    except ClientDisconnect:
        return None
    return bytes(received)


def listen(port: int) -> socket.socket:
    """A socket reachable only from this machine; port 0 finds a free one.

    Raises:
        OptionError: the port is in use or invalid.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"port: expected 0 to 65535, got {port}")
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except OSError as error:
        found.close()
        raise OptionError(f"port: expected a free one, {port}: {error.strerror}; --port 0 finds one") from error
    return found
