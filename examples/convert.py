"""A network of torchvision becomes attention that computes the same function, and is saved and loaded."""

import tempfile

import torch
import torchvision

import sasa

torch.manual_seed(0)
resnet = torchvision.models.resnet18(num_classes=10).eval()  # use one with weights here
print(sasa.conversion_report(resnet))

attention = sasa.convert(resnet, keep_function=True).eval()
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    difference = (attention(images) - resnet(images)).abs().max().item()
print(f"outputs differ by at most {difference:.1e}")

with tempfile.TemporaryDirectory() as folder:
    sasa.save_converted(attention, folder)
    loaded = sasa.load_converted(torchvision.models.resnet18(num_classes=10), folder).eval()
with torch.no_grad():
    print("loaded again, equal:", torch.equal(loaded(images), attention(images)))
