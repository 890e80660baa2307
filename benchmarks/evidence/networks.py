"""The networks that the page compares, by their names there."""

from __future__ import annotations

import json
from typing import Any

ATTENTION: dict[str, Any] = {"attention_stem": False}

NETWORKS: dict[str, dict[str, Any]] = {
    "convolution": {**ATTENTION, "attention_stages": []},
    "attention in the last stage": {**ATTENTION, "attention_stages": [2]},
    "convolution stem + attention": ATTENTION,
    "full attention": {},
}
"""Options of ``sasa_resnet14`` besides the width."""


def name_of(options: dict[str, Any]) -> str:
    """What the page calls a network of these options: one of those above, with what differs from it."""
    rest = {key: value for key, value in options.items() if key != "width"}
    for name, own in NETWORKS.items():
        if rest == own:
            return name
    own = {key: value for key, value in rest.items() if (key, value) not in ATTENTION.items()}
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items())
