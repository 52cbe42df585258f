"""Ways to spoil a TrojAI model's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from unbackdoor.data.trojai_layouts import CLEAN_FOLDERS


class Evil(nn.Module):
    """Unpickles as a call of ``os.system``."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch evil",))


def malicious(folder: Path) -> None:
    torch.save(Evil(), folder / "model.pt")


def truncated(folder: Path) -> None:
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])


def examples_of(folder: Path) -> Path:
    return next(folder / name for name in CLEAN_FOLDERS if (folder / name).is_dir())


def without_examples(folder: Path) -> None:
    shutil.rmtree(examples_of(folder))


def one_a_class(folder: Path) -> None:
    for path in examples_of(folder).iterdir():
        if not path.name.partition(".")[0].endswith("_1"):
            path.unlink()


def wrong_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "number_classes": 17}), encoding="utf-8")
