"""A network that ships with the package, on images of clothes from the package: no download."""

import timm
import torch

import sasa.models  # noqa: F401  (registers the networks in timm)
from sasa.train.sources import open_source

network = timm.create_model("sasa_resnet14.fashion_mnist", pretrained=True).eval()
config = network.pretrained_cfg
images = open_source(None).val

with torch.no_grad():
    for index in range(0, 500, 100):
        x = (images.read(index).float() / 255 - config["mean"][0]) / config["std"][0]
        probabilities = network(x[None]).softmax(1)[0]
        best = int(probabilities.argmax())
        right = config["label_names"][images.label(index)]
        print(f"{config['label_names'][best]:12} {probabilities[best]:.0%}   labelled {right}")
