"""The page's data for one image: small enough to send, exact enough to compute with.

The page computes logits and weights itself, from queries, keys and embeddings: those of a ResNet-50 take a quarter of
the space of weights and logits, and the temperature and the position terms can be changed on the page. Queries and keys
are stored with 16 bits over each layer's range (weights then differ by about 1e-5), maps for display with 8.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .effects import has_position, predict, probabilities
from .looking import Seen, entropy, look

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
MOST_BYTES = 11_000_000
"""Maximum size of one image's numbers as text, which keeps a page with one image below 15 MB."""
_TOP = 5


def image_payload(
    network: nn.Module,
    image: Tensor,
    picture: Tensor | None = None,
    *,
    name: str = "image",
    label: str = "",
    classes: Sequence[str] = (),
    with_effects: bool = True,
) -> dict[str, Any]:
    """Everything that the page shows of an image, as JSON-compatible values.

    Args:
        network: a classifier, or any other network with attention layers.
        image: as the network expects it, (C, H, W).
        picture: the same as bytes for display, (1 or 3, H, W); by default ``image``, contrast-stretched.
        name: of the image.
        label: its class, if known.
        classes: their names.
        with_effects: also predict without position terms and at other temperatures, for a page without a server.

    Raises:
        ValueError: as :func:`sasa.viz.look`; or the image is so large that no layer's numbers fit.
    """
    seen, output = look(network, image)
    height, width = image.shape[1:]
    layers, size, left_out = [], 0, []
    kept = {}
    for one in sorted(seen, key=lambda one: one.query.numel() + one.key.numel()):
        size += 8 * (one.query.numel() + one.key.numel()) // 3
        kept[one.name] = size <= MOST_BYTES
    for one in seen:
        if kept[one.name]:
            layers.append(_layer(one))
        else:
            left_out.append(one.name)
    if not layers:
        raise ValueError(f"image: expected a layer of at most {MOST_BYTES:,} bytes, got {height}x{width} pixels")
    found = probabilities(output)
    effects: dict[str, Any] = {}
    if found is not None:
        effects["1"] = top(found, classes)
        if with_effects:
            for position in (True, False) if has_position(network) else (True,):
                for temperature in TEMPERATURES:
                    changed = predict(network, image, position=position, temperature=temperature)
                    if changed is not None:
                        effects[effect_key(position, temperature)] = top(changed, classes, effects["1"])
    return {
        "name": name,
        "label": label,
        "picture": png(image if picture is None else picture),
        "size": [height, width],
        "layers": layers,
        "left_out": left_out,
        "effects": effects,
        "position": has_position(network),
    }


def effect_key(position: bool, temperature: float) -> str:
    """The page's key for a prediction: the temperature, and whether position terms are off."""
    return f"{temperature:g}" + ("" if position else " off")


def top(found: Tensor, classes: Sequence[str], before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The most likely classes, and those of ``before`` that no longer are."""
    places = found.topk(min(_TOP, len(found))).indices.tolist()
    places += [one["index"] for one in before if one["index"] not in places]
    names = classes if len(classes) == len(found) else [f"class {i}" for i in range(len(found))]
    return [{"index": i, "name": names[i], "probability": round(found[i].item(), 5)} for i in places]


def _layer(seen: Seen) -> dict[str, Any]:
    weights = seen.weights()
    distances = seen.distances()
    entropies = entropy(weights, 1)  # (N, h, w)
    distance = torch.einsum("nkhw,k->nhw", weights, distances)
    window = seen.window
    return {
        "name": seen.name,
        "heads": len(seen.query),
        "channels": seen.query.shape[1],
        "size": list(seen.size),
        "offset": list(seen.offset),
        "key_size": list(seen.key.shape[2:]),
        "queries": [window.rows.outputs, window.cols.outputs],
        "axes": [_axis(axis) for axis in (window.rows, window.cols)],
        "border": window.border,
        # channels last: a query's numbers are adjacent
        "query": _sixteen_bits(seen.query.permute(2, 3, 0, 1)),
        "key": _sixteen_bits(seen.key.permute(2, 3, 0, 1)),
        "row": None if seen.row is None else _floats(seen.row),
        "col": None if seen.col is None else _floats(seen.col),
        "table": None if seen.table is None else _floats(seen.table),
        "entropy": {"heads": _means(entropies), "map": _eight_bits(entropies.mean(0))},
        "distance": {"heads": _means(distance), "map": _eight_bits(distance.mean(0))},
    }


def _axis(axis: Any) -> dict[str, int]:
    return {name: getattr(axis, name) for name in ("kernel", "stride", "dilation", "before")}


def _means(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.mean((1, 2)).tolist()]


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _sixteen_bits(values: Tensor) -> dict[str, Any]:
    """Signed 16-bit numbers, little-endian, times ``step``."""
    step = values.abs().max().item() / 32767 or 1.0
    return {"step": step, "data": _base64((values / step).round().numpy().astype("<i2"))}


def _eight_bits(values: Tensor) -> dict[str, Any]:
    """Bytes from ``low`` to ``high``, row by row."""
    low, high = values.min().item(), values.max().item()
    scaled = (values - low) / ((high - low) or 1.0) * 255
    return {"low": low, "high": high, "data": _base64(scaled.round().numpy().astype("u1"))}


def _floats(values: Tensor) -> dict[str, Any]:
    return {"shape": list(values.shape), "data": _base64(values.numpy().astype("<f4"))}


def as_bytes(image: Tensor) -> Tensor:
    """(1 or 3, H, W) bytes for display: bytes unchanged; others stretched, grey unless there are three channels."""
    if image.dtype == torch.uint8 and image.shape[0] in (1, 3):
        return image.cpu()
    image = image.detach().float().cpu()
    if image.shape[0] != 3:
        image = image.mean(0, keepdim=True)
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return (image * 255).round().to(torch.uint8)


def png(image: Tensor) -> str:
    """A data URL."""
    pixels = as_bytes(image).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
