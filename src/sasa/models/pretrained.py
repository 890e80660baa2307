"""The weights that ship with the package, and the small network in timm. Nothing is downloaded.

``timm.create_model("sasa_resnet14.clothing", pretrained=True)``, after ``import sasa.models``.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .presets import SMALL_MODELS, scaled
from .small_resnet import SmallResNet

_NAME = "sasa_resnet14"


def shipped_weights() -> dict[str, Path]:
    """The package's weights files by name."""
    folder = Path(str(resources.files("sasa.models") / "weights"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_weights(weights: Path | str) -> Path:
    """The package's weights of that name, or the file."""
    return shipped_weights().get(str(weights), Path(weights))


def read_facts(path: Path) -> dict[str, Any]:
    """A weights file's metadata about its network: see :func:`sasa.train.load_model`."""
    with safe_open(str(path), framework="pt") as file:
        return {name: json.loads(fact) for name, fact in (file.metadata() or {}).items() if name != "format"}


def _configuration(path: Path) -> dict[str, Any]:
    """Configuration of the weights for timm."""
    facts = read_facts(path)
    size = facts["image_size"]
    return {
        "file": str(path),
        "num_classes": len(facts["classes"]),
        "label_names": tuple(facts["classes"]),
        "input_size": (facts["in_chans"], size, size),
        "crop_pct": facts["crop_pct"],
        "interpolation": "bilinear",
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "first_conv": "stem.spatial",
        "classifier": "fc",
        "license": "mit",
        "paper_ids": "arXiv:1906.05909",
    }


default_cfgs = generate_default_cfgs(
    {f"{_NAME}.{name}": _configuration(path) for name, path in shipped_weights().items()} or {_NAME: {}}
)


def sasa_resnet14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The small attention network: untrained, or with a tag (``sasa_resnet14.clothing``) as it was trained."""
    tag = kwargs.get("pretrained_cfg")
    if tag is None and pretrained:
        tag = next(iter(shipped_weights()), None)
    path = shipped_weights().get(tag) if isinstance(tag, str) else None
    size, spatial = SMALL_MODELS[_NAME]
    options: dict[str, Any] = {"spatial": spatial}
    if path is not None:
        facts = read_facts(path)
        options |= {"num_classes": len(facts["classes"]), "in_chans": facts["in_chans"], **facts["model_options"]}
    options |= kwargs
    return build_model_with_cfg(SmallResNet, _NAME, pretrained, size=scaled(size, options.pop("width", 1.0)), **options)


register_model(sasa_resnet14)
