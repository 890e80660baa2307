"""Residual networks for small images, of attention or of convolutions: identical except for the spatial layer.

Source: the paper (arXiv 1906.05909), section 3.2: every convolution of a ResNet larger than 1x1 becomes attention;
where it had stride 2, attention runs at stride 1 and a 2x2 average pool of stride 2 follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn import RelativeSelfAttention
from ..nn.start import STRENGTH
from ..ops import checks
from .presets import SmallResNetSize

SpatialLayer = Callable[[int, int, int], nn.Module]
"""(in_channels, out_channels, stride) -> module: the layer that looks at a pixel's neighbours."""


def attention_layer(
    in_channels: int,
    out_channels: int,
    stride: int,
    *,
    kernel_size: int,
    num_heads: int,
    strength: float | None = STRENGTH,
    **options: Any,
) -> nn.Module:
    """Local self-attention; instead of a stride, every pixel attends and the outputs are averaged."""
    layer = RelativeSelfAttention(in_channels, out_channels, kernel_size, num_heads, pool=stride, **options)
    if strength != STRENGTH:
        layer.reset_parameters(strength)
    return layer


def convolution_layer(in_channels: int, out_channels: int, stride: int, *, kernel_size: int) -> nn.Module:
    """The convolution that attention replaces."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class Bottleneck(nn.Module):
    """1x1 convolution, spatial layer, 1x1 convolution, each with batch norm, around a shortcut.

    Shape:
        (B, in_channels, H, W) to (B, width·expansion, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, width: int, expansion: int, stride: int, spatial: SpatialLayer) -> None:
        super().__init__()
        out_channels = width * expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.spatial = spatial(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True) if stride != 1 else nn.Identity(),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.spatial(x)))
        return self.act(self.bn3(self.conv3(x)) + shortcut)


class SmallResNet(nn.Module):
    """A residual network whose spatial layers are attention or convolutions.

    Args:
        size: the sizes.
        spatial: ``"attention"`` or ``"convolution"``: for every layer not changed by ``attention_stages`` or
            ``attention_stem``.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        attention_stages: numbers of the stages, from 1, that attend; the others convolve. None: by ``spatial``.
        attention_stem: whether the stem attends. None: by ``spatial``.
        kernel_size: window of the attention after the stem; None: that of ``size``.
        position: of the attention; this and the next two as in :class:`sasa.RelativeSelfAttention`.
        position_split: likewise.
        border: likewise.
        start: how heads start: the ``strength`` of :meth:`sasa.RelativeSelfAttention.reset_parameters`, None included.

    Shape:
        (B, in_chans, H, W) to (B, num_classes), for any H and W.

    Raises:
        ValueError: ``spatial`` is unknown, a stage doesn't exist, or an argument is out of range.
    """

    def __init__(
        self,
        size: SmallResNetSize,
        spatial: str = "attention",
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        attention_stages: Sequence[int] | None = None,
        attention_stem: bool | None = None,
        kernel_size: int | None = None,
        position: str = "relative",
        position_split: str = "per_head",
        border: str = "zero",
        start: float | None = STRENGTH,
    ) -> None:
        super().__init__()
        checks.choice("spatial", spatial, ("attention", "convolution"))
        checks.positive("num_classes", num_classes)
        checks.positive("in_chans", in_chans)
        checks.choice("border", border, ("zero", "mask"))
        everywhere = tuple(range(1, len(size.blocks) + 1)) if spatial == "attention" else ()
        attending = everywhere if attention_stages is None else attention_stages
        if any(type(stage) is not int or not 1 <= stage <= len(size.blocks) for stage in attending):
            raise ValueError(f"attention_stages: expected numbers from 1 to {len(size.blocks)}, got {attending!r}")
        stem_attends = (
            spatial == "attention" if attention_stem is None else checks.flag("attention_stem", attention_stem)
        )
        options = {"position": position, "position_split": position_split, "border": border}
        attention = partial(attention_layer, strength=start, **options)
        convolution = partial(convolution_layer, kernel_size=size.convolution_kernel)
        stem: SpatialLayer = convolution
        if stem_attends:
            stem = partial(attention, kernel_size=size.stem_kernel, num_heads=size.stem_heads)
        window = size.attention_kernel if kernel_size is None else kernel_size
        attention = partial(attention, kernel_size=window, num_heads=size.attention_heads)
        self.stem = nn.Sequential(
            OrderedDict(
                spatial=stem(in_chans, size.stem_width, 1),
                # An attention head can only average its window; edges are differences between heads, computed here.
                mix=nn.Conv2d(size.stem_width, size.stem_width, 1, bias=False),
                bn=nn.BatchNorm2d(size.stem_width),
                act=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(2, ceil_mode=True),
            )
        )
        self.num_classes = num_classes
        channels = size.stem_width
        stages: list[tuple[str, nn.Module]] = []
        for index, (blocks, width) in enumerate(zip(size.blocks, size.widths, strict=True), start=1):
            layer: SpatialLayer = attention if index in attending else convolution
            stage = []
            for block in range(blocks):
                stride = 2 if index > 1 and block == 0 else 1
                stage.append(Bottleneck(channels, width, size.expansion, stride, layer))
                channels = width * size.expansion
            stages.append((f"stage{index}", nn.Sequential(*stage)))
        self.stages = nn.Sequential(OrderedDict(stages))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer, as in timm's networks."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a fresh one for ``num_classes`` classes."""
        self.num_classes = checks.positive("num_classes", num_classes)
        self.fc = nn.Linear(self.fc.in_features, num_classes).to(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))
