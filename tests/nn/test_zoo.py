"""A dozen networks of the zoo that are built in different ways; ``make zoo`` takes all of them."""

import json

import pytest
import torch

from tests.zoo import check
from tests.zoo.networks import OPEN, networks
from tests.zoo.table import FILE, PAGE, page

pytestmark = pytest.mark.slow

NETWORKS = networks(OPEN)
TRIED = [
    "timm/convnextv2_atto",  # depthwise, and a patch embedding in every stage
    "timm/cs3darknet_focus_s",
    "timm/dla46x_c",
    "timm/edgenext_xx_small",
    "timm/lambda_resnet26t",  # has local attention of its own
    "timm/resnext26ts",  # grouped
    "timm/tinynet_e",
    "torchvision/googlenet",  # auxiliary heads in training
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "torchvision/swin_t",  # a patch embedding and nothing else
]


@pytest.fixture(autouse=True)
def _as_in_the_zoo():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # other people's networks use what has no deterministic gradient
    yield
    torch.set_num_threads(threads)


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:model. [0-9]+ converted to attention:UserWarning")  # few of many
@pytest.mark.parametrize("name", TRIED)
def test_converted_networks_keep_their_sizes_train_and_load(name):
    assert check.converted(NETWORKS[name])["converted"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRIED)
def test_networks_with_their_function_kept_compute_the_same(name):
    assert check.kept(NETWORKS[name])["kept"]


def test_the_page_is_that_of_the_committed_results():
    assert PAGE.read_text() == page(json.loads(FILE.read_text()))
