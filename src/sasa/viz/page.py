"""The interactive page for pointing at a pixel: one self-contained HTML file that makes no network requests."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .looking import stems
from .payload import image_payload

MOST_BYTES = 15_000_000
"""Maximum size of a saved page: images that don't fit are left out."""

FRAME = ("explore.css", "explore.html")
SCRIPTS = ("attention.js", "drawing.js", "prediction.js", "explore.js")
"""Scripts, concatenated into one module."""

MOST_UPLOAD = 16_000_000
"""Maximum bytes of an image that a server accepts."""


def render(images: Sequence[dict[str, Any]], *, network: str, note: str = "", server: bool = False) -> str:
    """The page as HTML, whose policy allows only its own script and no connections (browser drivers need ``eval``).

    Args:
        images: from :func:`sasa.viz.payload.image_payload`; for those fetched from the server, only ``name`` and
            ``picture``.
        network: its name.
        note: an introductory sentence.
        server: whether there is one, to accept images and predict with changes.
    """
    folder = resources.files("sasa.viz") / "page"
    style, template, *scripts = ((folder / name).read_text(encoding="utf-8") for name in (*FRAME, *SCRIPTS))
    script = "".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"network": network, "note": note, "server": server, "most_bytes": MOST_UPLOAD, "images": list(images)}
    parts = {
        "title": html.escape(network),
        "hash": digest,
        "connect": "'self'" if server else "'none'",
        "style": style,
        # no "<" in it starts a tag
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
    }
    head, *rest = template.split("{{")
    return head + "".join(parts[name] + text for name, _, text in (part.partition("}}") for part in rest))


class Explorer:
    """The page of a network and images: shown by Jupyter, or saved as a file.

    Attributes:
        html: the page.
        left_out: names of images that did not fit.
    """

    def __init__(self, page: str, left_out: Sequence[str] = ()) -> None:
        self.html, self.left_out = page, list(left_out)

    def save(self, path: str | Path) -> None:
        """Write the page to a file that any browser can open, without a server."""
        Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:900px;border:0" title="sasa explorer"></iframe>'


def explorer(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    *,
    pictures: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    network: str | None = None,
    note: str = "",
) -> Explorer:
    """The page of a network and images: point at a pixel, and see what the network sees.

    Args:
        model: any network with attention layers; it is left unchanged.
        images: as the network expects them, (B, C, H, W), or a sequence of (C, H, W).
        pictures: the same for display, bytes of (1 or 3, H, W); by default the images, contrast-stretched.
        names: of the images.
        labels: their classes, if known.
        classes: names of the network's classes.
        network: name of the network; by default its class.
        note: a sentence to begin with.

    Returns:
        An object that a notebook displays as the page; ``save(path)`` writes it. Images beyond 15 MB are left out.

    Raises:
        ValueError: there is no image or no attention layer, or the number of pictures, names or labels is not that of
            images.
    """
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    for argument, values in {"pictures": pictures, "names": names, "labels": labels}.items():
        if values is not None and len(values) != len(images):
            raise ValueError(f"{argument}: expected one for each of {len(images)} images, got {len(values)}")
    found, left_out, size = [], [], 0
    for i, image in enumerate(images):
        name = f"image {i + 1}" if names is None else names[i]
        if left_out:
            left_out.append(name)
            continue
        payload = image_payload(
            model,
            image,
            None if pictures is None else pictures[i],
            name=name,
            label="" if labels is None else labels[i],
            classes=classes,
        )
        size += len(json.dumps(payload))
        if found and size > MOST_BYTES - 200_000:
            left_out.append(name)
        else:
            found.append(payload)
    title = type(model).__name__ if network is None else network
    return Explorer(render(found, network=title, note=" ".join(filter(None, (note, about_stems(model))))), left_out)


def about_stems(model: nn.Module) -> str:
    """A sentence about the attention stems, which the page does not show; "" if there is none."""
    names = stems(model)
    if not names:
        return ""
    return f"The attention stem ({', '.join(names)}) attends inside blocks of pixels and is not shown."
