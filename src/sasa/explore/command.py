"""The command ``sasa explore``: a saved page, or a server that also accepts images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import check_installed
from ..train.command import run_function

if TYPE_CHECKING:
    from .source import Network, Shown


def explore(images: Sequence[Path] = (), weights: Path | None = None, save: Path | None = None, port: int = 0) -> None:
    """Point at a pixel, and see what the network sees: a page of every layer, head and tap.

    Args:
        images: images, or folders of them; by default, some of the packaged ones.
        weights: model.safetensors of a run of sasa train, or clothing or fashion_mnist, which ship with the package; by
            default, that of sasa demo in runs/demo if it exists, else fashion_mnist.
        save: HTML file to write the page to, which needs no server. Without it, a server reachable only from this
            machine shows the page, accepts images too, and runs until Ctrl-C.
        port: of the server; 0 finds a free one.

    Raises:
        DataError: there is no network, no attention layer in it, or no image.
        OptionError: the port is in use, or the network can't process the images.
        OutputError: save can't be written.
    """
    from .source import find_images, find_network

    if save is None:
        check_installed(("starlette", "uvicorn"), "explore")
    network = find_network(weights)
    shown, problems = find_images(network, images)
    for problem in problems:
        print(f"sasa explore: {problem}", file=sys.stderr)
    if network.note:
        print(network.note)
    if save is not None:
        _save(network, shown, save)
    else:
        _serve(network, shown, port)


def _save(network: Network, shown: list[Shown], save: Path) -> None:
    from ..train.errors import OutputError
    from ..viz.page import MOST_BYTES, render

    found, size, left_out = [], 300_000, []
    for one in shown:
        payload = None if left_out else network.payload(one, with_effects=True)
        size += len(json.dumps(payload)) if payload else 0
        if payload and (size <= MOST_BYTES or not found):
            found.append(payload)
        else:
            left_out.append(one.name)
    if left_out:
        print(
            f"{len(left_out)} images are left out: the page holds {MOST_BYTES // 1_000_000} MB at most", file=sys.stderr
        )
    page = render(found, network=network.facts["model"], note=network.note)
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"save: can't write {save}: {error.strerror}") from error
    print(f"wrote {save}: {len(found)} images, {len(page) / 1e6:.1f} MB")


def _serve(network: Network, shown: list[Shown], port: int) -> None:
    import uvicorn

    from .server import HOST, Explored, application, listen

    with listen(port) as open_socket:
        app = application(Explored(network, shown))
        print(f"http://{HOST}:{open_socket.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[open_socket])


def command(program: str, arguments: list[str]) -> int:
    """``sasa explore``, with arguments from the command line."""
    return run_function(program, explore, arguments, positional=("images",))
