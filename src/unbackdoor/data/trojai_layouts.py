"""TrojAI's folder layouts: which there are, how their files are named, and telling which one a folder has.

Source: NIST's descriptions of the rounds (pages.nist.gov/trojai) and the code of its examples, as facts alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unbackdoor.errors import DataError, UnsupportedModel
from unbackdoor.types import InputKind

MODEL, TRUTH, METADATA, SCALE = "model.pt", "ground_truth.csv", "METADATA.csv", "scale_params.npy"

#: The files of settings, the first that is there.
CONFIGS = ("config.json", "reduced-config.json")

#: Folders of clean and of poisoned examples, by the rounds that call them so.
CLEAN_FOLDERS = ("clean-example-data", "clean_example_data", "example_data")
POISONED_FOLDERS = ("poisoned-example-data", "poisoned_example_data")

#: Where a root that was made here keeps fresh samples of each model, to judge by.
HELD_BACK = "held-back"

#: Folders of a round's root that all of its models share.
EMBEDDINGS, TOKENIZERS = "embeddings", "tokenizers"
#: Folders in a root that hold no models.
COMPANIONS = (EMBEDDINGS, TOKENIZERS, HELD_BACK)

_SUFFIXES: dict[str, InputKind] = {".png": "image", ".jpg": "image", ".txt": "text", ".npy": "features"}

Name = Literal["round1", "round2", "round3", "round4", "round5", "round6", "round11", "mitigation", "cyber"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the folders of a round look.

    Attributes:
        told: in words.
        kind: what the examples are.
        clean, poisoned: their folders; None where a round gives no poisoned ones.
        inside: the folder of the models in the root, "" where they lie in the root itself.
        config: the file of settings.
        upper: whether its keys are upper case.
        side: pixels of the pictures on disk; crop: of the middle that networks take, 0 for all of them.
        bgr: the networks take blue, green, red.
        stretched: each picture is stretched to its full range of values.
        labels_beside: labels stand in a JSON file beside each example.
        per_class: examples of each class that such folders hold, from, to.
    """

    name: Name
    told: str
    kind: InputKind
    clean: str
    poisoned: str | None
    inside: str = ""
    config: str = "config.json"
    upper: bool = False
    side: int = 0
    crop: int = 0
    bgr: bool = False
    stretched: bool = False
    labels_beside: bool = False
    per_class: tuple[int, int] = (2, 20)


def _image(name: Name, told: str, clean: str, poisoned: str | None, **more: Any) -> Layout:
    return Layout(name=name, told=told, kind="image", clean=clean, poisoned=poisoned, **more)


_OLD = {"side": 256, "crop": 224, "upper": True, "stretched": True, "per_class": (10, 20)}
_NEW = {"side": 256, "inside": "models", "labels_beside": True, "per_class": (2, 20)}

#: Every layout there is. Rounds 5 and 6 differ in their heads alone, and their folders are read alike.
LAYOUTS: dict[Name, Layout] = {
    "round1": _image(
        "round1", "round 1", "example_data", None, **{**_OLD, "side": 224, "bgr": True, "per_class": (20, 100)}
    ),
    "round2": _image("round2", "round 2", "example_data", None, **_OLD),
    "round3": _image("round3", "round 3", "clean_example_data", "poisoned_example_data", **_OLD),
    "round4": _image(
        "round4",
        "round 4",
        "clean_example_data",
        "poisoned_example_data",
        side=256,
        crop=224,
        per_class=(2, 5),
    ),
    "round5": Layout(
        name="round5",
        told="rounds 5 and 6",
        kind="text",
        clean="clean_example_data",
        poisoned="poisoned_example_data",
        inside="models",
        per_class=(10, 10),
    ),
    "round6": Layout(
        name="round6",
        told="rounds 5 and 6",
        kind="text",
        clean="clean_example_data",
        poisoned="poisoned_example_data",
        inside="models",
        per_class=(10, 10),
    ),
    "round11": _image("round11", "round 11", "clean-example-data", "poisoned-example-data", **_NEW),
    "mitigation": _image(
        "mitigation",
        "the mitigation round",
        "clean-example-data",
        "poisoned-example-data",
        **{**_NEW, "config": "reduced-config.json"},
    ),
    "cyber": Layout(
        name="cyber",
        told="a tabular cyber round",
        kind="features",
        clean="clean-example-data",
        poisoned="poisoned-example-data",
        inside="models",
        labels_beside=True,
        per_class=(10, 20),
    ),
}


def is_trojai_folder(path: Path) -> bool:
    """Whether a folder holds one model as TrojAI lays it out: ``model.pt`` beside examples, truth or settings."""
    if not (path / MODEL).is_file():
        return False
    return any((path / name).exists() for name in (TRUTH, *CONFIGS, *CLEAN_FOLDERS))


def find_models(root: Path) -> Iterator[Path]:
    """The folders of TrojAI models below ``root``, itself included, in natural order of their paths.

    Raises:
        DataError: there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; one with TrojAI models (id-00000000, ...) is needed")
    if is_trojai_folder(root):
        yield root
        return
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and not folder.is_symlink():
            yield from find_models(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings as plain JSON (jsonpickle's notes on classes are data like the rest); empty where there are none.

    Raises:
        DataError: the file is no JSON object.
    """
    for name in CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} holds a {type(content).__name__}; an object of settings is needed")
        return content
    return {}


def setting(config: Mapping[str, Any], *names: str) -> Any:
    """The first of the settings that is there, in either case; also within jsonpickle's ``py/state``."""
    inside = config.get("py/state")
    for part in (config, inside if isinstance(inside, dict) else {}):
        lowered = {str(key).lower(): value for key, value in part.items()}
        found = next((lowered[name] for name in names if lowered.get(name) is not None), None)
        if found is not None:
            return found
    return None


def layout_of(folder: Path, config: Mapping[str, Any]) -> tuple[Layout, Path]:
    """(the layout, the folder of clean examples).

    Raises:
        DataError: no examples, or of an unknown kind.
        UnsupportedModel: the examples label tokens, as in round 7.
    """
    clean = next((folder / name for name in CLEAN_FOLDERS if (folder / name).is_dir()), None)
    if clean is None:
        raise DataError(f"{folder} has no clean examples: none of {', '.join(CLEAN_FOLDERS)} is there")
    files = example_files(clean)
    if not files:
        raise DataError(f"{clean} holds no example; {', '.join(_SUFFIXES)} files are looked for")
    kind = _SUFFIXES[files[0].suffix.lower()]
    if kind == "features":
        return LAYOUTS["cyber"], clean
    if kind == "text":
        if any("tokenized" in file.stem for file in files):
            raise UnsupportedModel(
                f"{folder} recognises named entities, as in round 7: it labels every token, and a network that gives "
                "one class a text is needed"
            )
        return LAYOUTS["round5"], clean
    if "-" in clean.name:
        return LAYOUTS["round11" if (folder / CONFIGS[0]).is_file() else "mitigation"], clean
    if clean.name != "example_data":
        upper = any(key.isupper() for key in config)
        return LAYOUTS["round3" if upper else "round4"], clean
    return LAYOUTS["round1" if _width(files[0]) == LAYOUTS["round1"].side else "round2"], clean


def example_files(folder: Path) -> list[Path]:
    """Examples in natural order of their names."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name)])


def _width(picture: Path) -> int:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            return image.width
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{picture} cannot be read as a picture: {error}") from error


def describe_trojai(folder: Path) -> dict[str, str]:
    """What a folder is, in words, from its names and settings alone; the network is not read.

    Raises:
        DataError: there are no examples, or the settings are no JSON object.
        UnsupportedModel: it labels tokens (round 7).
    """
    config = read_config(folder)
    layout, clean = layout_of(folder, config)
    count = len(example_files(clean))
    poisoned = next((folder / name for name in POISONED_FOLDERS if (folder / name).is_dir()), None)
    told = {
        "layout": layout.told,
        "examples": f"{count} clean{'' if poisoned is None else f', {len(example_files(poisoned))} poisoned'}",
        "network": str(setting(config, "model_architecture") or "unknown"),
        "embedding": str(setting(config, "embedding_flavor") or ""),
    }
    return {key: value for key, value in told.items() if value}
