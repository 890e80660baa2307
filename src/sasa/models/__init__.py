"""Networks. Knows nothing of training."""

from .presets import MODELS, ResNetSize
from .resnet import ResNet, create_model

__all__ = ["MODELS", "ResNet", "ResNetSize", "create_model"]
