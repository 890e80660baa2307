"""A network as ONNX, run by onnxruntime on another size of images and compared with PyTorch."""

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

import sasa.export
import sasa.models  # registers the networks in timm

torch.manual_seed(0)
network = timm.create_model("sasa_resnet14.fashion_mnist", pretrained=True).eval()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "network.onnx"
    sasa.export.to_onnx(network, torch.randn(2, 1, 28, 28), path)
    print(f"wrote {path.name}: {path.stat().st_size / 1e3:.0f} kB")
    session = onnxruntime.InferenceSession(str(path))

images = torch.randn(3, 1, 40, 36)
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
with torch.no_grad():
    difference = (torch.from_numpy(logits) - network(images)).abs().max().item()
print(f"outputs differ by at most {difference:.1e}")
