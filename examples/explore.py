"""The page on which one points at a pixel, as one file: ``python examples/explore.py page.html``, then open it."""

import sys

import timm

import sasa.models  # registers the networks in timm
import sasa.viz
from sasa.train.sources import open_source

network = timm.create_model("sasa_resnet14.fashion_mnist", pretrained=True).eval()
config = network.pretrained_cfg
val = open_source(None).val

pictures = [val.read(index) for index in range(3)]
images = [(picture.float() / 255 - config["mean"][0]) / config["std"][0] for picture in pictures]
page = sasa.viz.explorer(network, images, pictures=pictures, classes=config["label_names"], network="sasa_resnet14")
path = sys.argv[1] if len(sys.argv) > 1 else "page.html"
page.save(path)
print(f"wrote {path}: {len(page.html) / 1e6:.1f} MB")
