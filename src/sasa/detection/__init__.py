"""Detection: boxes in the layouts of COCO and Pascal VOC, trained and evaluated by the engine of ``sasa.train``.

Needs the extra ``detection``; pycocotools is imported on use.
"""

from __future__ import annotations

from .._extras import check_installed

check_installed(("pycocotools",), "detection")

from .coco import Annotations, read_coco  # noqa: E402
from .problems import Problems  # noqa: E402
from .source import open_boxes  # noqa: E402
from .voc import voc_to_coco  # noqa: E402

__all__ = ["Annotations", "Problems", "open_boxes", "read_coco", "voc_to_coco"]
