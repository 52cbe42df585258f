"""The documentation names what there is: tables and trees that would otherwise drift from the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import adaptive_table
import attack_table
import audit_tables
import defense_table
import fit_speed
import generative
import harness_overhead
import ntk_tables
import plan_table
import real_runs
import sweep_models
import trigger_speed
import write_cards
from factories import linear, samples
from unbackdoor import errors, specs
from unbackdoor.cli.app import app
from unbackdoor.defenses.seam import SEAM
from unbackdoor.evaluation.checks import FLAGS
from unbackdoor.models.formats import PRESETS

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))


def fenced(page: str, language: str) -> list[str]:
    """The blocks of code of that language ("" for those without one)."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[Any]:
    """Every call of a program that the pages show, as (page, words)."""
    found = []
    for page in PAGES:
        for block in fenced(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(f"{program} "):
                    words = shlex.split(line, comments=True)[len(program.split()) :]
                    found.append(pytest.param(words, id=f"{page}: {' '.join(words)}"))
    return found


def test_every_flag_has_its_row() -> None:
    rows = [
        f"| `{name}` | {flag.raised_if} | {flag.means} | {'yes' if flag.serious else 'no'} |"
        for name, flag in FLAGS.items()
    ]
    table = text("docs/metrics.md").split("## Flags")[1]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


def test_the_cards_are_what_the_docstrings_say() -> None:
    """Every defense's page, the tables and the menu: ``scripts/write_cards.py`` writes them."""
    stale = [str(p) for p, wanted in write_cards.wanted().items() if p.read_text(encoding="utf-8") != wanted]
    assert stale == []


def test_a_card_without_a_part_is_refused() -> None:
    class Unfinished:
        """Name: what it does.

        An idea.

        Source: somewhere.

        Attributes:
            none
        """

    with pytest.raises(ValueError, match="Unfinished: the docstring lacks Deviations, Costs, Fails"):
        write_cards.Card.of("unfinished", Unfinished)


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


@pytest.mark.parametrize("words", commands("unbackdoor"))
def test_every_command_shown_is_one_that_the_program_takes(words: list[str]) -> None:
    program: Any = typer.main.get_command(app)
    command = program.commands[words[0]]
    given = command.make_context(words[0], words[1:]).params  # raises on what the command does not take
    for option, kind in (("method", "defense"), ("trigger", "attack"), ("spec", "attack")):
        for spec in [given[option]] if isinstance(given.get(option), str) else given.get(option) or ():
            specs.build(kind, spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", commands("python"))
def test_every_benchmark_shown_has_the_options_shown(words: list[str]) -> None:
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    options = [word for word in words[1:] if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []


def test_every_line_of_make_shown_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    shown = re.findall(r"^make ([a-z -]+?)(?: +#.*)?$", "".join(text(p) for p in (*PAGES, "CONTRIBUTING.md")), re.M)
    assert {"demo", "test"} <= set(shown)
    assert {target for line in shown for target in line.split()} <= targets


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_lines_of_python_do_what_they_say(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = fenced(page, "python")[0]
    assert block.count("unbackdoor.clean(") == 1
    assert len(block.strip().splitlines()) == 5  # an import, an empty line, three lines
    names = {"model": linear(), "samples": samples(40), "test_samples": samples(40, seed=1)}
    # The method alone is replaced, by one that runs in a moment.
    exec(compile(block.replace('"seam"', '"ft(epochs=1)"'), page, "exec"), names)
    assert capsys.readouterr().out.strip() in ("unproven", "destroyed", "unchanged")
    assert (tmp_path / "cleaned" / "report.html").is_file()


def settings_table() -> list[str]:
    """SEAM's settings that some preset changes, a column a preset."""

    def shown(value: object) -> str:
        if isinstance(value, tuple):
            return ", ".join(map(shown, value)) or "∅"
        if value is None:
            return "∅"
        return (
            f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
        )

    columns = {"default": SEAM(), **{name: SEAM(**preset) for name, preset in SEAM.PRESETS.items()}}
    rows = [["", *(f"`{name}`" for name in columns)], ["---"] * (len(columns) + 1)]
    for field in dataclasses.fields(SEAM):
        values = [shown(getattr(settings, field.name)) for settings in columns.values()]
        if len(set(values)) > 1:
            rows.append([f"`{field.name}`", *values])
    return [f"| {' | '.join(row)} |".replace("| --- ", "|---").replace("--- |", "---|") for row in rows]


def test_the_presets_of_seam_are_shown_as_they_are() -> None:
    page = text("docs/methods/seam.md").split("<!-- settings -->")[1].split("\n## ")[0]
    assert page.strip().splitlines() == settings_table()


@pytest.mark.parametrize(
    ("benchmark", "page"),
    [
        (real_runs, "docs/results.md"),
        (defense_table, "docs/results.md"),
        (trigger_speed, "docs/attacks.md"),
        (attack_table, "docs/attacks.md"),
        (adaptive_table, "docs/attacks.md"),
        (ntk_tables, "docs/analysis.md"),
        (audit_tables, "docs/evidence.md"),
        (sweep_models, "docs/benchmark.md"),
        (harness_overhead, "docs/benchmark.md"),
        (fit_speed, "docs/results.md"),
        (generative, "docs/text.md"),
        (plan_table, "docs/benchmark.md"),
    ],
    ids=[
        "real runs",
        "defenses",
        "trigger speed",
        "attacks",
        "adaptive attackers",
        "forgetting",
        "audit",
        "many models",
        "overhead",
        "fit speed",
        "generative models",
        "plan",
    ],
)
def test_the_tables_are_what_the_records_say(benchmark: Any, page: str) -> None:
    for name, table in benchmark.tables(ROOT / "benchmarks" / "records").items():
        assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end: {name} -->" in text(page), f"{page}: {name}"


def test_the_marks_for_results_are_there() -> None:
    marks = re.findall(r"<!-- table: (\S+) -->", text("docs/results.md"))
    assert marks == ["mnist", "cifar10", "defenses", "third-party", "fit-speed", "scratch"]


def test_the_page_on_attacks_has_a_row_for_each() -> None:
    page = text("docs/attacks.md").partition("## What they look like")[0]
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(named) == specs.names("attack")


def test_the_page_on_texts_has_a_row_for_each_of_its_attacks() -> None:
    named = re.findall(r"^\| `(\w+)` \|", text("docs/text.md").partition("## Attacks on texts")[2], re.MULTILINE)
    assert sorted(named) == specs.names("text-attack")
