"""RetinaNet with attention in its backbone, its heads and, optionally, its pyramid.

Sources: Lin et al., *Focal Loss for Dense Object Detection* (arXiv 1708.02002), as torchvision builds it: its anchors,
matcher, losses, transforms and non-maximum suppression; and the paper (arXiv 1906.05909), section 4.2 and table 2.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import FeatureListNet
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..nn import convert
from ..ops import checks
from .create import create_model
from .presets import MODELS
from .saved_in_folder import SavedInFolder
from .small_resnet import SmallResNet

KINDS = ("attention", "convolution")
EXTRA_LEVELS = 2  # added by the pyramid above the backbone's: P6 and P7
ANCHOR_OF_STRIDE = 4  # side of a level's smallest anchor, in strides: arXiv 1708.02002, section 4
ASPECT_RATIOS = (0.5, 1.0, 2.0)
PRIOR = 0.01  # of an object at initialisation, as in torchvision

OF_TORCHVISION = (
    *("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size"),
    *("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates", "fg_iou_thresh", "bg_iou_thresh"),
)
"""Further arguments of torchvision's ``RetinaNet`` and its transform that JSON can represent."""


class SasaRetinaNet(
    RetinaNet,
    SavedInFolder,
    library_name="sasa",
    tags=["object-detection", "self-attention"],
    paper_url="https://arxiv.org/abs/1906.05909",
):
    """RetinaNet on one of this package's networks.

    ``backbone.body`` gives the maps of strides 8, 16 and 32 (of the small networks the last: stride 4),
    ``backbone.fpn`` builds a pyramid from them and adds two coarser levels, ``head`` classifies and regresses
    ``3·anchor_scales`` anchors at each position of each level. ``save_pretrained(folder)`` and
    ``from_pretrained(folder)`` store and load it with files that can't run code.

    Args:
        backbone: one of :data:`sasa.models.MODELS`.
        heads: ``"attention"``: all five layers of both heads; ``"convolution"``: torchvision's.
        num_classes: labels are 0 to ``num_classes - 1``. Each has its own sigmoid, so there is no background class.
        pyramid: likewise for the pyramid's 3x3 layers. They attend according to the paper's text, but can't according
            to its table 2: see ``docs/detection.md``.
        channels: of the pyramid and the heads.
        anchor_scales: number of anchor sizes per octave, each in three aspect ratios.
        group_norm: group norm (32 groups) in the pyramid and the heads, for training from scratch.
        kernel_size: window of the attention in heads and pyramid.
        num_heads: heads of that attention; if they don't divide a layer's channels, the nearest number that does.
        position: this and the next two as in :class:`sasa.RelativeSelfAttention`.
        position_split: where the halves of the position fall.
        border: of all layers but the last ones, which mask the border so that their biases, the prior of an object,
            hold everywhere.
        implementation: of the attention in the whole network, backbone included: None for the fastest.
        backbone_options: arguments of the backbone, as of :func:`sasa.models.create_model`.
        **options: of torchvision's ``RetinaNet``: ``min_size`` (several for multi-scale training), ``max_size``,
            ``image_mean``, ``image_std``, ``size_divisible``, ``fixed_size``, ``score_thresh``, ``nms_thresh``,
            ``detections_per_img``, ``topk_candidates``, ``fg_iou_thresh``, ``bg_iou_thresh``.

    Shape:
        A list of images (3, H, W) with values from 0 to 1, each of its own size, and in training mode a list of targets
        ``{"boxes": (N, 4) as x1, y1, x2, y2 in pixels, "labels": (N,)}``. In training mode the losses
        ``{"classification", "bbox_regression"}``; else for each image ``{"boxes", "scores", "labels"}``.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: an argument is unknown or has the wrong type.
    """

    needs = "backbone"

    def __init__(
        self,
        backbone: str = "sasa_resnet50",
        heads: str = "attention",
        num_classes: int = 91,
        *,
        pyramid: str = "convolution",
        channels: int = 256,
        anchor_scales: int = 3,
        group_norm: bool = False,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int = 8,
        position: str = "relative",
        position_split: str = "per_head",
        border: str = "zero",
        implementation: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        checks.choice("backbone", backbone, MODELS)
        checks.choice("heads", heads, KINDS)
        checks.choice("pyramid", pyramid, KINDS)
        for name, size in (("num_classes", num_classes), ("channels", channels), ("anchor_scales", anchor_scales)):
            checks.positive(name, size)
        checks.implementation(implementation)
        unknown = sorted(set(options) - set(OF_TORCHVISION))
        if unknown:
            raise TypeError(f"expected options of torchvision's RetinaNet ({', '.join(OF_TORCHVISION)}), got {unknown}")
        norm = partial(nn.GroupNorm, 32) if checks.flag("group_norm", group_norm) else None
        if norm is not None and channels % 32:
            raise ValueError(f"channels: expected a multiple of 32 with group_norm=True, got {channels}")
        body, widths, strides = _body(backbone, dict(backbone_options or {}))
        levels = [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(EXTRA_LEVELS))]
        anchors = AnchorGenerator(
            tuple(
                tuple(int(ANCHOR_OF_STRIDE * stride * 2 ** (i / anchor_scales)) for i in range(anchor_scales))
                for stride in levels
            ),
            (ASPECT_RATIOS,) * len(levels),
        )
        head = RetinaNetHead(channels, anchor_scales * len(ASPECT_RATIOS), num_classes, norm_layer=norm)
        super().__init__(
            BodyAndPyramid(body, widths, channels, norm), num_classes, anchor_generator=anchors, head=head, **options
        )
        attention = {"position": position, "position_split": position_split, "implementation": implementation}
        last = {"head.classification_head.cls_logits": -math.log(1 / PRIOR - 1), "head.regression_head.bbox_reg": 0.0}
        attend = partial(convert, self, kernel_size, num_heads, inplace=True, **attention)
        if pyramid == "attention":
            attend(where=lambda name, _: name.startswith("backbone.fpn."), border=border)
        if heads == "attention":
            attend(where=lambda name, _: name.startswith("head.") and name not in last, border=border)
            attend(where=lambda name, _: name in last, border="mask")
            for name, prior in last.items():
                _start_as_torchvision(self.get_submodule(name), prior)
        if implementation is not None:
            for module in self.backbone.body.modules():
                if hasattr(module, "implementation"):
                    module.implementation = implementation  # type: ignore[assignment]

    def dense(self) -> DenseDetector:
        """This detector up to non-maximum suppression, as a module of one tensor: for export and FLOP counts.

        It shares its parameters with this detector, and is in evaluation mode if this is.
        """
        return DenseDetector(self).train(self.training)


class DenseDetector(nn.Module):
    """A detector up to non-maximum suppression: every anchor's box and scores, for a batch of equally sized images.

    Shape:
        images (B, 3, H, W), values from 0 to 1, to boxes (B, A, 4) as x1, y1, x2, y2 in pixels, within the image, and
        scores (B, A, num_classes) from 0 to 1. The detector itself resizes its images before this; afterwards it drops
        boxes below ``score_thresh``, keeps ``topk_candidates`` per level, and applies non-maximum suppression.
    """

    def __init__(self, detector: SasaRetinaNet) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores."""
        detector = self.detector
        height, width = images.shape[-2:]
        x = detector.transform.normalize(images)
        multiple = detector.transform.size_divisible  # the detector's padding, on which the anchors' strides depend
        x = nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))
        levels = list(detector.backbone(x).values())
        found = detector.head(levels)
        anchors = detector.anchor_generator(ImageList(x, [(height, width)]), levels)[0]
        offsets = found["bbox_regression"]
        boxes = detector.box_coder.decode_single(offsets.flatten(0, 1), anchors.repeat(images.shape[0], 1))
        boxes = clip_boxes_to_image(boxes, (height, width)).view_as(offsets)
        return boxes, found["cls_logits"].sigmoid()


def retinanet(
    backbone: str = "sasa_resnet50", heads: str = "attention", num_classes: int = 91, **options: Any
) -> SasaRetinaNet:
    """RetinaNet with fresh parameters: ``SasaRetinaNet(backbone, heads, num_classes, **options)``.

    Example:
        >>> detector = sasa.models.retinanet("sasa_resnet14", heads="attention", num_classes=3)
        >>> sorted(detector.eval()([torch.rand(3, 64, 96), torch.rand(3, 50, 61)])[0])
        ['boxes', 'labels', 'scores']
    """
    return SasaRetinaNet(backbone, heads, num_classes, **options)


class BodyAndPyramid(nn.Module):
    """A backbone and the feature pyramid on it (Lin et al. 2017, arXiv 1612.03144), with P6 and P7 made from P5.

    Args:
        body: a module that returns its maps, from fine to coarse.
        widths: channels of these maps.
        channels: of the pyramid.
        norm: creates the norm for a number of channels; None for none.

    Shape:
        (B, 3, H, W) to an ordered dict of maps (B, channels, H', W'), from fine to coarse.
    """

    def __init__(self, body: nn.Module, widths: Sequence[int], channels: int, norm: Any = None) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelP6P7(channels, channels), norm)
        self.out_channels = channels  # read by RetinaNet

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The pyramid's levels."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


class LastStage(nn.Module):
    """A small network without its classifier: the map of its last stage, in a list.

    Args:
        network: the network, whose ``stem`` and ``stages`` are taken over.
    """

    def __init__(self, network: SmallResNet) -> None:
        super().__init__()
        self.stem, self.stages = network.stem, network.stages

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) to one map (B, C', H / stride, W / stride), rounded up."""
        return [self.stages(self.stem(x))]


def _body(name: str, options: dict[str, Any]) -> tuple[nn.Module, list[int], list[int]]:
    """The network's convolutional part, the channels of its maps and their strides."""
    network = create_model(name, **options)
    if isinstance(network, SmallResNet):
        return LastStage(network), [network.fc.in_features], [2 ** len(network.stages)]
    body = FeatureListNet(network, out_indices=(2, 3, 4))  # what timm's features_only=True makes
    return body, body.feature_info.channels(), body.feature_info.reduction()


@torch.no_grad()
def _start_as_torchvision(layer: Any, bias: float) -> None:
    """Start with small values whose bias is the layer's initial output, as the attention weights sum to 1."""
    values = slice(-layer.out_channels, None)
    nn.init.normal_(layer.qkv.weight[values], std=0.01)
    nn.init.constant_(layer.qkv.bias[values], bias)  # type: ignore[index]
