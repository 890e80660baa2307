"""Residual networks for small images, of attention or of convolution: the same network but for the spatial layer.

Source: the paper (arXiv 1906.05909), section 3.2: every convolution of a ResNet larger than 1x1 becomes attention;
where it had stride 2, attention runs at stride 1 and a 2x2 average pool of stride 2 follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..nn import RelativeSelfAttention
from ..ops import checks
from .presets import SmallResNetSize

SpatialLayer = Callable[[int, int, int], nn.Module]
"""(in_channels, out_channels, stride) -> module: what looks at a pixel's neighbours."""


def attention_layer(in_channels: int, out_channels: int, stride: int, *, kernel_size: int, num_heads: int) -> nn.Module:
    """Local self-attention; in the place of a stride, of every pixel and then averaged."""
    return RelativeSelfAttention(in_channels, out_channels, kernel_size, num_heads, pool=stride)


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
    """A residual network whose spatial layers are all of one kind.

    Args:
        size: the sizes.
        spatial: ``"attention"`` or ``"convolution"``.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.

    Shape:
        (B, in_chans, H, W) to (B, num_classes), for any H and W.

    Raises:
        ValueError: an unknown ``spatial``, or a number below 1.
    """

    def __init__(
        self, size: SmallResNetSize, spatial: str = "attention", num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        checks.choice("spatial", spatial, ("attention", "convolution"))
        checks.positive("num_classes", num_classes)
        checks.positive("in_chans", in_chans)
        stem: SpatialLayer
        layer: SpatialLayer
        if spatial == "attention":
            stem = partial(attention_layer, kernel_size=size.stem_kernel, num_heads=size.stem_heads)
            layer = partial(attention_layer, kernel_size=size.attention_kernel, num_heads=size.attention_heads)
        else:
            stem = layer = partial(convolution_layer, kernel_size=size.convolution_kernel)
        self.stem = nn.Sequential(
            OrderedDict(
                spatial=stem(in_chans, size.stem_width, 1),
                # An attention head can only average its window; edges are differences of heads, made here.
                mix=nn.Conv2d(size.stem_width, size.stem_width, 1, bias=False),
                bn=nn.BatchNorm2d(size.stem_width),
                act=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(2, ceil_mode=True),
            )
        )
        channels = size.stem_width
        stages: list[tuple[str, nn.Module]] = []
        for index, (blocks, width) in enumerate(zip(size.blocks, size.widths, strict=True), start=1):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 1 and block == 0 else 1
                stage.append(Bottleneck(channels, width, size.expansion, stride, layer))
                channels = width * size.expansion
            stages.append((f"stage{index}", nn.Sequential(*stage)))
        self.stages = nn.Sequential(OrderedDict(stages))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.fc(self.pool(self.stages(self.stem(x))).flatten(1))
