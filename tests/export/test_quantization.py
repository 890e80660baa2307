"""Static quantization by onnxruntime, with the code of the page."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import sasa.export
from sasa.models import create_model


@pytest.mark.nightly
def test_the_code_of_the_page(tmp_path, monkeypatch):
    """Convolutions and projections become integers, attention stays in float, and the outputs are nearly the same."""
    torch.manual_seed(0)
    network = create_model("sasa_resnet14", 10, 1, width=0.5)
    images = torch.randn(64, 1, 28, 28)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # statistics of these images
    with torch.no_grad():
        network(images)
    sasa.export.to_onnx(sasa.export.fold_batch_norms(network.eval()), images[:2], tmp_path / "model.onnx")

    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(from onnxruntime\.quantization.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"batches": np.split(images.numpy(), 4)})

    graph = onnx.load("model-int8.onnx").graph
    kinds = [node.op_type for node in graph.node]
    integers = sum(constant.data_type == onnx.TensorProto.INT8 for constant in graph.initializer)
    assert integers >= kinds.count("Conv") > 0 and kinds.count("Scan") > 0
    for node in graph.node:
        for attribute in node.attribute:
            assert not [inner for inner in attribute.g.node if "Quantize" in inner.op_type]
    right, found = (
        onnxruntime.InferenceSession(name).run(None, {"images": images.numpy()})[0]
        for name in ("model.onnx", "model-int8.onnx")
    )
    assert 0 < np.abs(found - right).mean() < 0.1 * right.std()
