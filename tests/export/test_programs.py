"""Exported programs, compiled packages, folded batch norms, and the command."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

import sasa
import sasa.export
from sasa.cli import main
from sasa.models import create_model
from sasa.train.weights import save_weights

WITHOUT_SASA = """
import sys, torch
program = torch.export.load(sys.argv[1], extra_files={"sasa.json": ""}).module()
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(program(x), y, rtol=1e-4, atol=1e-4)
assert "sasa" not in sys.modules
"""


def network_with_stem():
    network = nn.Sequential(sasa.AttentionStem(3, 8, 2), nn.ReLU(), sasa.RelativeSelfAttention(8, 8, 3, 2, pool=2))
    return network.eval()


@pytest.mark.parametrize("chosen", [None, "reference"])
def test_programs_of_any_size(chosen, tmp_path):
    network, path = network_with_stem(), tmp_path / "program.pt2"
    facts = {"classes": ["a"], "mean": [0.5]}
    sasa.export.to_program(network, torch.zeros(1, 3, 20, 24), path, implementation=chosen, metadata=facts)
    files = {"sasa.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    assert json.loads(files["sasa.json"]) == {"classes": '["a"]', "mean": "[0.5]"}
    for size in ((1, 16, 20), (2, 17, 30), (3, 9, 24), (2, 22, 11)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_program_of_the_equation_needs_no_sasa(tmp_path):
    network, x = network_with_stem(), torch.randn(2, 3, 20, 24)
    sasa.export.to_program(network, x, tmp_path / "program.pt2", implementation="reference")
    torch.save((x, network(x).detach()), tmp_path / "right.pt")
    paths = [str(tmp_path / name) for name in ("program.pt2", "right.pt")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_SASA, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A network, and the package compiled of it."""
    network, path = network_with_stem(), tmp_path_factory.mktemp("package") / "model.pt2"
    sasa.export.to_aoti(network, torch.zeros(2, 3, 20, 24), path, metadata={"classes": ["a"]})
    return network, path


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_package(package):
    network, path = package
    run = torch._inductor.aoti_load_package(str(path))
    assert run.get_metadata()["classes"] == '["a"]'
    for size in ((2, 3, 20, 24), (3, 3, 33, 14)):
        x = torch.randn(size)
        torch.testing.assert_close(run(x), network(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_package_in_cpp(package):
    """The program of the page, built and run beside ``model.pt2``, as the page says."""
    network, path = package
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (program,) = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    (build,) = re.findall(r"```bash\n(TORCH=.*?)```", page, re.DOTALL)
    (path.parent / "main.cpp").write_text(program)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", build], cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = network(torch.ones(1, 3, 224, 224))
    shape, mean = done.stdout.splitlines()
    assert shape == str(list(expected.shape)) and float(mean) == pytest.approx(expected.mean().item(), rel=1e-4)


def test_errors_name_the_argument(tmp_path):
    layer, x = sasa.RelativeSelfAttention(4, 8, 3, 2).eval(), torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.pt2"):
        sasa.export.to_aoti(layer, x, tmp_path / "a.so")
    with pytest.raises(ValueError, match="implementation: expected None or one of"):
        sasa.export.to_program(layer, x, tmp_path / "a.pt2", implementation="fast")
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        sasa.export.to_program(layer.train(), x, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


# --- batch norms ---


def statistics(network):
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias, std=0.1)
    return network.eval()


class Branch(nn.Module):
    """A convolution that is read twice, one that is called twice, and one whose norm follows at once."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.called_twice, self.plain = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        y = self.read_twice(x)
        y = self.norms[0](y) + y
        y = self.norms[1](self.called_twice(self.called_twice(y)))
        return self.norms[2](self.plain(y))


def test_folding_keeps_the_function():
    """Only what is safe is folded; the network given stays as it is."""
    resnet = sasa.convert(torchvision.models.resnet18(weights=None, num_classes=3), 3, 2)
    for network, left in ((Branch(), 2), (resnet, 16), (create_model("resnet14", 3, 3), 0)):
        network = statistics(network).double()
        before = copy.deepcopy(network.state_dict())
        folded = sasa.export.fold_batch_norms(network)
        x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), network(x), rtol=1e-9, atol=1e-9)
        assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        assert sasa.export.fold_batch_norms(network, inplace=True) is network


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_folding_names_what_is_wrong():
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        sasa.export.fold_batch_norms(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"model: expected a network that torch\.fx can trace, got Decides"):
        sasa.export.fold_batch_norms(Decides().eval())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        sasa.export.fold_batch_norms("resnet")


# --- the command ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """As ``sasa train`` writes them."""
    torch.manual_seed(0)
    network, path = create_model("sasa_resnet14", 3, 1, width=0.5), tmp_path_factory.mktemp("run") / "model.safetensors"
    facts = {"model": "sasa_resnet14", "model_options": {"width": 0.5}, "classes": ["a", "b", "c"], "in_chans": 1}
    facts |= {"image_size": 28, "crop_pct": 1.0, "mean": [0.5], "std": [0.25]}
    save_weights(statistics(network), path, facts)
    return path


def test_command(weights, tmp_path, capsys):
    from sasa.train import load_model

    out = tmp_path / "model.onnx"
    assert main(["export", str(weights), "--to", "onnx", "--out", str(out)]) == 0
    facts = {p.key: json.loads(p.value) for p in onnx.load(out).metadata_props if p.key in ("classes", "mean", "std")}
    assert facts == {"classes": ["a", "b", "c"], "mean": [0.5], "std": [0.25]}
    network, x = load_model(weights)[0], torch.randn(2, 1, 28, 28)
    (y,) = onnxruntime.InferenceSession(str(out)).run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), network(x), rtol=1e-3, atol=1e-3)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_command_compiles_packages(weights, tmp_path, capsys):
    """For one size: with sizes that vary, which have a test of their own, this takes the compiler 20 minutes."""
    from sasa.train import load_model

    out = tmp_path / "model.pt2"
    arguments = ["--to", "aoti", "--dynamic", "false", "--out", str(out)]
    assert main(["export", str(weights), *arguments]) == 0, capsys.readouterr().err
    run, network, x = torch._inductor.aoti_load_package(str(out)), load_model(weights)[0], torch.randn(2, 1, 28, 28)
    assert json.loads(run.get_metadata()["classes"]) == ["a", "b", "c"]
    with torch.no_grad():
        torch.testing.assert_close(run(x), network(x), rtol=1e-3, atol=1e-3)


def test_command_reports_mistakes(weights, tmp_path, capsys):
    out = str(tmp_path / "a.onnx")
    for arguments, words in (
        ([str(tmp_path / "no"), "--to", "onnx", "--out", out], "weights: expected model.safetensors"),
        ([str(weights), "--to", "onnx", "--out", str(tmp_path / "no" / "a")], "out: path: expected a file in a folder"),
        ([str(weights), "--to", "aoti", "--out", str(tmp_path / "a.so")], "path: expected a name that ends in .pt2"),
        (
            [str(weights), "--to", "onnx", "--out", out, "--implementation", "reference"],
            "implementation: expected none",
        ),
    ):
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_timm_reads_what_save_pretrained_wrote(tmp_path):
    """``timm.create_model("local-dir:FOLDER")``, with its weights, and with another classifier."""
    import timm

    network = timm.create_model("sasa_resnet26_convstem", num_classes=4, in_chans=1, kernel_size=3).eval()
    network.save_pretrained(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), network(x), rtol=0, atol=0)
        torch.testing.assert_close(type(network).from_pretrained(tmp_path)(x), network(x), rtol=0, atol=0)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2).num_classes == 2
