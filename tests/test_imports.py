"""What ``import sasa`` needs: PyTorch and nothing else. Everything more is asked for by name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sasa

pytestmark = pytest.mark.slow

PACKAGE = Path(sasa.__file__).parent
EXTRAS = ("lightning", "pytorch_lightning", "timm", "torchvision", "torchmetrics", "torchinfo", "safetensors", "rich")
EXTRAS += (
    "matplotlib",
    "jsonargparse",
    "PIL",
    "yaml",
    "docstring_parser",
    "huggingface_hub",
    "tensorboard",
    "webdataset",
    "datasets",
    "onnxscript",
    "pycocotools",
)

WITH_TORCH_ALONE = f"""
import sys
import importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_TORCH_ALONE + code], capture_output=True, text=True
    )


def test_the_layer_runs_with_torch_alone():
    done = run("""
import torch, sasa
layer = sasa.RelativeSelfAttention(4, 8, 3, 2)
layer(torch.randn(1, 4, 5, 5)).sum().backward()
layer.attention_weights(torch.randn(1, 4, 5, 5))
sasa.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 8, 3)))
import sasa.export
sasa.export.fold_batch_norms(layer.eval())
from sasa.cli import main
raise SystemExit(main(["info"]))
""")
    assert done.returncode == 0, done.stderr
    assert "eager      plain PyTorch" in done.stdout


NEED_EXTRAS = {
    "import torch, sasa; sasa.RelativeSelfAttention(4, 8, 3, 2).summary(torch.randn(1, 4, 5, 5))": "models",
    "import sasa.models": "models",
    "from sasa.cli import main; raise SystemExit(main(['tables']))": "models",
    "import sasa.train": "train",
    "import sasa.viz": "viz",
    "import sasa.detection": "detection",
    "from sasa.cli import main; raise SystemExit(main(['train']))": "train",
    "from sasa.cli import main; raise SystemExit(main(['demo']))": "train",
    "from sasa.cli import main; raise SystemExit(main(['explore']))": "train",
}


def test_a_missing_extra_is_named():
    done = run(f"""
import contextlib, io, json
found = {{}}
for code in {list(NEED_EXTRAS)!r}:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            exec(code)
            status = 0
        except ImportError as error:
            status = str(error)
        except SystemExit as error:
            status = error.code
    found[code] = [status, said.getvalue()]
print(json.dumps(found))
""")
    assert done.returncode == 0, done.stderr
    for code, (status, said) in json.loads(done.stdout).items():
        assert status != 0, code
        assert f"pip install 'sasa-torch[{NEED_EXTRAS[code]}]'" in f"{status}{said}", code


def test_importing_sasa_imports_no_extra_and_nothing_slow():
    slow = {*EXTRAS, "triton", "torch.utils.flop_counter", "torch._inductor"}
    code = f"import sys, torch; before = set(sys.modules); import sasa; print({slow!r} & set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


ORDER = ("ops", "nn", "models", "train", "viz", "detection", "study", "explore", "export")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("order", ["import sasa, torch.utils.flop_counter", "import torch.utils.flop_counter, sasa"])
def test_flops_are_known_whichever_is_imported_first(order):
    code = f"""
{order}
import sys, torch
q = torch.zeros(1, 1, 4, 5, 5, requires_grad=True)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    sasa.local_attention(q, q, q, 3).sum().backward()
assert not any(getattr(finder, "_name", None) == "torch.utils.flop_counter" for finder in sys.meta_path), sys.meta_path
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(25 * 9 * 4 * (4 + 10)), done.stderr


ALLOWED = {
    "ops": (),
    "nn": ("ops",),
    "models": ("ops", "nn"),
    "viz": ("ops", "nn"),
    "train": ("ops", "nn", "models", "viz"),
    "detection": ("ops", "nn", "models", "train"),
    "study": ("ops", "nn", "models", "viz", "train"),
    "explore": ("ops", "nn", "models", "viz", "train"),
    "export": ("ops", "nn", "models", "train"),
}


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    for path in (PACKAGE / folder).glob("**/*.py"):
        to_package = len(path.relative_to(PACKAGE).parts)  # dots that lead out of the folder
        for node in ast.walk(ast.parse(path.read_text())):
            outside = isinstance(node, ast.ImportFrom) and node.level == to_package
            if outside and node.module and not node.module.startswith("_"):
                imported = node.module.partition(".")[0]
                assert imported in ALLOWED[folder], f"{path.name} of {folder} imports {imported}"
