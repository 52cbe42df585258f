"""The documentation names what there is: tables and trees that would otherwise drift from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unbackdoor import errors, specs
from unbackdoor.evaluation.checks import FLAGS
from unbackdoor.models.formats import PRESETS

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_flag_has_its_row() -> None:
    rows = [
        f"| `{name}` | {flag.raised_if} | {flag.means} | {'yes' if flag.serious else 'no'} |"
        for name, flag in FLAGS.items()
    ]
    table = text("docs/metrics.md").split("## Flags")[1]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


@pytest.mark.parametrize("name", specs.names("defense"))
def test_every_defense_has_a_card_with_its_presets(name: str) -> None:
    card = text(f"docs/methods/{name}.md")
    for preset in specs.presets_of(specs.lookup("defense", name)):
        assert preset == "default" or preset in card
    for heading in ("**Idea.**", "**Source.**", "## Deviations", "## Costs", "## When it fails"):
        assert heading in card
    assert f"](docs/methods/{name}.md)" in text("README.md")
    assert f"methods/{name}.md" in text("mkdocs.yml")


def test_the_exception_tree_is_drawn_as_it_is() -> None:
    page = text("docs/concepts/architecture.md")
    tree = page[page.index("```\nUnbackdoorError") :].split("```")[1]
    drawn = {}
    above = ["UnbackdoorError"]
    for line in tree.splitlines():
        found = re.match(r"([│ ]*)[├└]── (\w+)", line)
        if found:
            depth = len(found[1]) // 4 + 1
            drawn[found[2]] = above[depth - 1]
            above[depth:] = [found[2]]
    real = {
        name: thing.__bases__[0].__name__
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, errors.UnbackdoorError) and name != "UnbackdoorError"
    }
    assert drawn == real


def test_every_input_format_is_named() -> None:
    page = text("docs/input-formats.md")
    assert [name for name in PRESETS if f"`{name}`" not in page] == []


def test_every_page_is_reachable() -> None:
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r": (\S+\.md)", text("mkdocs.yml")))
    assert pages == listed
