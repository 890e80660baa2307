"""The networks of the zoo: how each is built, what it is called with, and a loss."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .timm_families import TIMM

Size = tuple[int, int]


@dataclass(frozen=True)
class Network:
    """A network of random weights.

    Attributes:
        library: where it is from.
        family: what it is an example of.
        name: of the network in its library, unique there.
        make: builds it.
    """

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    def build(self) -> nn.Module:
        """The network, always with the same weights, in none of which a part of it is switched off.

        Many networks start with the weight of a branch's last layer at zero, or a small scale behind it: whatever
        took the place of the branch's convolutions would compute the same.
        """
        torch.manual_seed(0)
        model = self.make()
        for parameter in model.parameters():
            if parameter.numel() and parameter.detach().abs().max() < 1e-2:
                nn.init.normal_(parameter, std=0.1)
        return model

    def sizes(self, model: nn.Module) -> Iterator[tuple[Size, ...]]:
        """Sizes of images to try, until the network itself takes them: two of them, or the one that it is made for."""
        yield (64, 64), (64, 96)
        yield (128, 128), (128, 160)
        yield ((64, 64),)
        own = SIZES.get(self.name) or (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
        yield (own,)

    def images(self, size: Size) -> Tensor:
        """Two random images."""
        return torch.rand(2, CHANNELS.get(self.name, 3), *size, generator=torch.Generator().manual_seed(1))

    def outputs(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """All that the network computes from images."""
        more = CALLS.get(self.name, lambda _: ())(x)
        return [y for y in tree_leaves(model(x, *more)) if isinstance(y, Tensor)]

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        """A number that depends on all outputs."""
        outputs = [y for y in self.outputs(model, x) if y.is_floating_point()]
        return torch.stack([(y - 1).square().mean() for y in outputs]).sum()


class Detector(Network):
    """A detector of torchvision's. The number of its detections depends on the weights: its heads' outputs don't."""

    def sizes(self, model: nn.Module) -> Iterator[tuple[Size, ...]]:
        yield (64, 64), (64, 96)

    def outputs(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        model.eval()(list(x))
        features = list(model.backbone(x).values())
        head = model.head if hasattr(model, "head") else model.rpn.head
        return features + [y for y in tree_leaves(head(features)) if isinstance(y, Tensor)]

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        target = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *x.shape[2:], dtype=torch.uint8),
            "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
        }
        return torch.stack(list(model(list(x), [target] * len(x)).values())).sum()


def _timm() -> Iterator[Network]:
    for family, names in TIMM.items():
        for name in names.split():
            yield Network("timm", family, name, lambda name=name: timm.create_model(name, num_classes=10))


CLASSIFIERS = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2"""
SEGMENTERS = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
DETECTORS = """fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn maskrcnn_resnet50_fpn
retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large"""
TORCHVISION: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
}


def _torchvision() -> Iterator[Network]:
    kinds = (("classification", CLASSIFIERS), ("segmentation", SEGMENTERS), ("detection", DETECTORS))
    for family, names in kinds:
        for name in names.split():
            arguments = {"weights": None, "num_classes": 2} | TORCHVISION.get(name, {})
            if family != "classification":
                arguments["weights_backbone"] = None
            if family == "detection" and not name.startswith("ssd"):  # those have a size of their own
                arguments |= {"min_size": 64, "max_size": 96}
            make = lambda name=name, arguments=arguments: torchvision.models.get_model(name, **arguments)  # noqa: E731
            yield (Detector if family == "detection" else Network)("torchvision", family, name, make)


DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"
ENCODERS = """densenet121 dpn68 efficientnet-b0 inceptionresnetv2 inceptionv4 mit_b0 mobilenet_v2 mobileone_s0
resnet50 resnext50_32x4d se_resnet50 senet154 timm-efficientnet-b0 timm-skresnet18 timm-tf_efficientnet_lite0
tu-convnext_atto tu-regnetx_002 vgg11_bn xception"""


def _segmentation_models() -> Iterator[Network]:
    import segmentation_models_pytorch as smp

    pairs = [(decoder, "resnet18") for decoder in DECODERS.split()] + [
        ("Unet", encoder) for encoder in ENCODERS.split()
    ]
    for decoder, encoder in pairs:
        make = lambda pair=(decoder, encoder): smp.create_model(*pair, encoder_weights=None, classes=2)  # noqa: E731
        family = "decoders" if encoder == "resnet18" else "encoders"
        yield Network("segmentation_models_pytorch", family, f"{decoder}, {encoder}", make)


FLAT = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
STEPS = {"channels": (8, 16, 32), "strides": (2, 2)}
SMALL = {"channels": (8, 16), "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 4}
MONAI: dict[str, dict[str, Any]] = {
    "AHNet": FLAT | {"layers": (1, 1, 1, 1), "psp_block_num": 1},
    "AttentionUnet": FLAT | STEPS,
    "AutoEncoder": FLAT | {"channels": (8, 16), "strides": (2, 2), "num_res_units": 1, "inter_channels": (8,)},
    "AutoencoderKL": FLAT | SMALL,
    "BasicUNet": FLAT | {"features": (8, 8, 16, 32, 64, 8)},
    "BasicUNetPlusPlus": FLAT | {"features": (8, 8, 16, 32, 64, 8)},
    "Classifier": STEPS | {"in_shape": (3, 64, 64), "classes": 2},
    "Critic": STEPS | {"in_shape": (3, 64, 64)},
    "DenseNet121": FLAT,
    "DiffusionModelUNet": FLAT | SMALL | {"num_head_channels": 8},
    "Discriminator": STEPS | {"in_shape": (3, 64, 64)},
    "DynUNet": FLAT | {"kernel_size": (3,) * 4, "strides": (1, 2, 2, 2), "upsample_kernel_size": (2,) * 3},
    "EfficientNetBN": {"model_name": "efficientnet-b0", "pretrained": False, "num_classes": 2},
    "FlexibleUNet": {"in_channels": 3, "out_channels": 2, "backbone": "resnet18"},
    "HighResNet": FLAT,
    "HoVerNet": {"in_channels": 3, "decoder_padding": True},
    "LocalNet": FLAT | {"num_channel_initial": 8, "extract_levels": (0, 1, 2)},
    "MedNeXt": FLAT | {"init_filters": 8},
    "MultiScalePatchDiscriminator": FLAT | {"num_d": 2, "num_layers_d": 2, "channels": 8, "minimum_size_im": 64},
    "PatchDiscriminator": FLAT | {"channels": 8},
    "Quicknat": {"num_classes": 2, "num_channels": 3, "num_filters": 16},
    "RegUNet": FLAT | {"num_channel_initial": 8, "depth": 2},
    "Regressor": STEPS | {"in_shape": (3, 64, 64), "out_shape": (2,)},
    "restormer.Restormer": FLAT | {"dim": 16, "num_refinement_blocks": 1},
    "SEResNext50": {"spatial_dims": 2, "in_channels": 3, "num_classes": 2},
    "SPADENet": FLAT | {"label_nc": 3, "input_shape": (64, 64), "channels": [8, 16], "z_dim": 8},
    "SegResNet": FLAT,
    "SegResNetDS": FLAT | {"init_filters": 8, "dsdepth": 2},
    "SegResNetVAE": FLAT | {"input_image_size": (64, 64)},
    "SwinUNETR": FLAT | {"feature_size": 12},
    "TorchVisionFCModel": {"model_name": "resnet18", "num_classes": 2, "pool": None},
    "UNETR": FLAT | {"img_size": 64, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
    "UNet": FLAT | STEPS | {"num_res_units": 2},
    "VNet": FLAT | {"in_channels": 1},
    "VQVAE": FLAT
    | {"channels": (8, 16), "num_res_layers": 1, "num_res_channels": (8, 16)}
    | {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
    "VarAutoEncoder": {
        "channels": (8, 16),
        "strides": (2, 2),
        "spatial_dims": 2,
        "in_shape": (3, 64, 64),
        "out_channels": 2,
        "latent_size": 4,
    },
    "ViTAutoEnc": FLAT | {"img_size": 64, "patch_size": 16, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
    "VoxelMorphUNet": {
        "spatial_dims": 2,
        "in_channels": 2,
        "unet_out_channels": 8,
        "channels": (8, 8, 16, 16, 8, 8),
        "final_conv_channels": (8, 8),
    },
    "resnet10": {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 2},
}
SIZES: dict[str, Size] = {"HoVerNet": (256, 256)}
CHANNELS = {"VNet": 1, "VoxelMorphUNet": 2}
# What a network is called with besides images.
CALLS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "DiffusionModelUNet": lambda x: (torch.arange(len(x), dtype=x.dtype),),
    "SPADENet": lambda x: (x,),
}


def _monai() -> Iterator[Network]:
    from monai.networks import nets

    for name in MONAI:
        yield Network("monai", "2-D", name, lambda name=name: operator.attrgetter(name)(nets)(**MONAI[name]))


OPEN = (_timm, _torchvision)  # libraries that the package's tests need anyway
EVERY = (*OPEN, _segmentation_models, _monai)


@functools.cache
def networks(libraries: tuple[Callable[[], Iterator[Network]], ...] = EVERY) -> dict[str, Network]:
    """All networks by name."""
    return {str(network): network for library in libraries for network in library()}
