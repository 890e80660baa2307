"""Small data sets with boxes."""

import pytest
from boxed import coco, voc


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory):
    """To be read only."""
    return coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture
def voc_folder(tmp_path):
    return voc(tmp_path / "voc")
