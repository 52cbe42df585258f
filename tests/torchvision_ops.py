"""Lets torchvision (and timm, which imports it) be imported beside a build of torch that its binary does not fit.

torchvision registers shape functions for its compiled operators when it is imported, which fails where those operators
could not be loaded, as with its default wheel on a CPU-only torch. The tests need its networks alone, none of which
calls these operators, so declaring them is enough. Import this module before torchvision.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_if_missing() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for binary in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


#: Kept for as long as the tests run: the operators go when it does.
LIBRARY = _declare_if_missing()
