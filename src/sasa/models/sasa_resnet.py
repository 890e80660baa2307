"""The paper's networks: timm's ResNet with its spatial convolutions turned into attention, registered in timm.

Source: the paper (arXiv 1906.05909), section 3.2 and table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model, register_notrace_module
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import nn

from .._compat import hub_config
from ..nn import AttentionStem, RelativeSelfAttention, convert
from ..nn.conversion_plan import put_stem
from ..ops import checks
from .presets import PAPER_MODELS
from .saved_in_folder import SavedInFolder

STAGES = (1, 2, 3, 4)
STEM_WIDTH = 64
_PLACE = ("device", "dtype")  # arguments that determine where the parameters are, not what network it is

# torch.fx (and timm's feature extraction) must not trace into the layers: what they compute depends on their input.
register_notrace_module(RelativeSelfAttention)
register_notrace_module(AttentionStem)


class SasaResNet(
    TimmResNet,
    SavedInFolder,
    library_name="sasa",
    tags=["image-classification", "self-attention"],
    paper_url="https://arxiv.org/abs/1906.05909",
):
    """A ResNet of bottleneck blocks in which attention replaces the convolutions larger than 1x1.

    Everything else is timm's ``ResNet``, with its methods: ``forward_features``, ``forward_head``,
    ``forward_intermediates``, ``get_classifier``, ``reset_classifier``, ``set_grad_checkpointing``.

    Args:
        layers: blocks in each of the four stages.
        attention_stages: the stages, 1 to 4, whose 3x3 convolutions become attention; the others keep them.
        attention_stem: an :class:`sasa.AttentionStem` in place of the 7x7 convolution and its max pool.
        kernel_size: window of the attention, int or (height, width).
        num_heads: heads of the attention.
        position: ``"relative"``, ``"bias"``, ``"absolute"`` or ``"none"``; this and the next two as in
            :class:`sasa.RelativeSelfAttention`.
        position_split: ``"per_head"`` or ``"across_heads"``.
        border: ``"zero"``, ``"mask"`` or ``"shift"``, whose images must not be smaller than the window at any stage.
        stem_mixtures: value projections that the attention stem mixes.
        implementation: of the attention: None for the fastest.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        **kwargs: further arguments of timm's ResNet: ``drop_rate``, ``drop_path_rate``, ``output_stride``, ...

    Shape:
        (B, in_chans, H, W) to (B, num_classes), for any H and W.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: an argument has the wrong type.
    """

    needs = "layers"

    def __init__(
        self,
        layers: Sequence[int],
        attention_stages: Sequence[int] = STAGES,
        attention_stem: bool = True,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int = 8,
        position: str = "relative",
        position_split: str = "per_head",
        border: str = "zero",
        stem_mixtures: int = 4,
        implementation: str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        stages = _checked_stages(attention_stages)
        if type(num_classes) is not int or num_classes < 0:
            raise ValueError(f"num_classes: expected an int of at least 0, got {num_classes!r}")
        checks.positive("in_chans", in_chans)
        checks.positive("num_heads", num_heads)
        checks.choice("border", border, ("zero", "mask", "shift"))
        if STEM_WIDTH % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the {STEM_WIDTH} channels, got {num_heads}")
        if len(layers) != len(STAGES):
            raise ValueError(f"layers: expected the number of blocks of 4 stages, got {layers!r}")
        super().__init__(Bottleneck, tuple(layers), num_classes=num_classes, in_chans=in_chans, **kwargs)  # type: ignore[arg-type]
        if stages:
            prefixes = tuple(f"layer{stage}." for stage in stages)
            convert(
                self,
                kernel_size,
                num_heads,
                where=lambda name, _: name.startswith(prefixes),
                inplace=True,
                position=position,
                position_split=position_split,
                border=border,
                bias=False,
                implementation=implementation,
            )
        if attention_stem:
            stem = AttentionStem(
                in_chans,
                STEM_WIDTH,
                num_heads,
                mixtures=stem_mixtures,
                implementation=implementation,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
            )
            put_stem(self, stem)
        # Arguments that can't be stored in a file: such a network can be trained, but not saved by save_pretrained.
        self._unsaved = sorted(
            name for name, value in kwargs.items() if name not in _PLACE and not self._is_jsonable(value)
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write ``model.safetensors`` and ``config.json``, from which :meth:`from_pretrained` rebuilds the network.

        Args:
            save_directory: folder to write to, created if missing.
            **kwargs: as in huggingface_hub's mixin, which can upload too: ``push_to_hub``, ``repo_id``.

        Raises:
            ValueError: the network was built with an argument that JSON can't represent, e.g. a class of layers.
        """
        if self._unsaved:
            raise ValueError(
                f"save_directory: a network can't be saved that was built with {', '.join(self._unsaved)}, "
                "which JSON can't hold"
            )
        config = {k: v for k, v in hub_config(self).items() if k not in _PLACE}
        config |= {"num_classes": self.num_classes, "global_pool": self.global_pool.pool_type}
        config |= _for_timm(self, config)
        return super().save_pretrained(save_directory, config=config, **kwargs)


def _for_timm(network: SasaResNet, config: dict[str, Any]) -> dict[str, Any]:
    """What ``timm.create_model("local-dir:FOLDER")`` reads: an entry point, its arguments, how to prepare images."""
    cfg = dict(getattr(network, "pretrained_cfg", None) or _configuration(config.get("attention_stem", True)))
    name = cfg.pop("architecture", None)
    name = name if name in PAPER_MODELS else next(iter(PAPER_MODELS))
    cfg |= {"num_classes": network.num_classes}
    kept = {key: value for key, value in cfg.items() if value is not None and key not in ("file", "url", "source")}
    return {"architecture": name, "pretrained_cfg": kept, "model_args": dict(config)}


def _checked_stages(stages: Sequence[int]) -> tuple[int, ...]:
    """The stages in order; raises ValueError unless they are distinct numbers from 1 to 4."""
    try:
        found = sorted(stages)
    except TypeError:
        found = [0]
    if any(type(stage) is not int or stage not in STAGES for stage in found) or len(set(found)) < len(found):
        raise ValueError(f"attention_stages: expected distinct numbers from 1 to 4, got {stages!r}")
    return tuple(found)


def _configuration(attention_stem: bool) -> dict[str, Any]:
    """Configuration of a network for timm: size and normalisation of its images, names of its first and last layers."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("conv1.qk", "conv1.value") if attention_stem else "conv1",
        "classifier": "fc",
        "license": "mit",
        "paper_ids": "arXiv:1906.05909",
    }


default_cfgs = {name: _configuration(arguments["attention_stem"]) for name, arguments in PAPER_MODELS.items()}


def _register(name: str) -> None:
    """Register the network, so that ``timm.create_model(name)`` builds it."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(SasaResNet, name, pretrained, **PAPER_MODELS[name] | kwargs)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    register_model(build)


for _name in PAPER_MODELS:
    _register(_name)
