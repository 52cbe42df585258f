"""The record reads back equal; the page is whole, the same each time, asks for nothing and escapes everything."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import report_examples as examples
from unbackdoor.errors import DataError, OutputExists
from unbackdoor.evaluation.checks import Flag
from unbackdoor.report import Report, render, wording
from unbackdoor.report.record import jsonable
from unbackdoor.types import Epoch, Phase, Trace, UnitScores

ALL = {
    "seam": examples.seam_like,
    "ulrl": examples.ulrl_like,
    "head-only": examples.head_only,
    "destroyed": examples.destroyed,
}
EVIL = "<script>alert(1)</script>\"'--> $x_{\\frac$ &amp; </style> 猫 \x07\nnew"


class Page(HTMLParser):
    """Counts tags, collects ids, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open, self.text, self.attributes = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def shown(page):
    return " ".join(" ".join(page.text).split())


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_reading_back_gives_an_equal_report(make, tmp_path):
    report = make()
    path = report.save(tmp_path / "deep" / "report.json")
    assert Report.load(path) == report
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


finite = st.floats(allow_nan=False)
words = st.text(max_size=8)
epochs = st.builds(
    Epoch,
    index=st.integers(0, 99),
    loss=finite,
    accuracy=st.floats(0, 1),
    lr=finite,
    images=st.integers(0, 10**9),
    seconds=st.floats(0, 1e6),
    terms=st.dictionaries(words, finite, max_size=2),
    measured=st.dictionaries(words, finite, max_size=2),
)
scores = st.builds(
    UnitScores,
    layer=words,
    scores=st.tuples(finite, finite),
    median=finite,
    mad=finite,
    deviations=st.tuples(finite, finite),
    flagged=st.lists(st.integers(0, 1), max_size=2).map(tuple),
)
traces = st.builds(
    Trace,
    phases=st.lists(st.builds(Phase, name=words, epochs=st.lists(epochs, max_size=2).map(tuple)), max_size=2).map(
        tuple
    ),
    scores=st.lists(scores, max_size=2).map(tuple),
    heads=st.lists(scores, max_size=2).map(tuple),
    values=st.dictionaries(
        words, st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), words, st.booleans())
    ),
    notes=st.lists(words, max_size=2).map(tuple),
)


@settings(max_examples=40, deadline=None)
@given(traces)
def test_any_trace_survives_the_file(trace):
    report = examples.seam_like().model_copy(update={"trace": trace})
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    kinds = [type(v) for v in report.trace.values.values()]
    assert [type(v) for v in again.trace.values.values()] == kinds


def test_a_record_cannot_be_changed_and_knows_its_fields():
    report = examples.seam_like()
    with pytest.raises(ValidationError):
        report.verdict = "destroyed"
    with pytest.raises(ValidationError):
        Report.model_validate({**report.model_dump(), "more": 1})
    # Whoever changes the shape of the file has to raise its version, and this list with it.
    assert list(json.loads(report.model_dump_json())) == [
        "schema_version", "created", "verdict", "model", "samples", "measured", "method", "before", "after", "trace",
        "weights", "cost", "versions", "flags", "attack", "canaries", "audit", "notes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "created"),
    ],
)
def test_what_is_no_report_is_refused(content, message, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        Report.load(path)


def test_nothing_is_overwritten_unasked_and_nothing_half_written(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("mine")
    with pytest.raises(OutputExists, match=r"report\.json"):
        examples.seam_like().save(path)
    assert path.read_text() == "mine"
    examples.seam_like().save(path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_fields_become_plain_json():
    assert jsonable({"a": (1, (2.5, None)), 3: {"x"}, "p": math}) == {"a": [1, [2.5, None]], "3": ["x"], "p": str(math)}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_the_page_is_well_formed_self_contained_and_deterministic(make):
    text = render(make())
    assert text == render(make())
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value
    assert not re.search(r"url\((?!#)", text)
    assert "<metadata" not in text
    assert "#0a0b0" not in text  # every placeholder colour was replaced
    # References inside of the figures point at something.
    for target in re.findall(r'(?:href="|url\()#([\w-]+)', text):
        assert target in page.ids


def test_every_drawing_is_described_and_every_table_has_headers():
    text = render(examples.head_only())
    for drawing in re.findall(r'<div class="drawing"[^>]*>', text):
        assert re.search(r'role="img" aria-label="[^"]{20,}"', drawing)
    for table in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL):
        assert '<th scope="col"' in table
        assert '<th scope="row"' in table
    assert text.count("<img") == text.count('alt="') == 12


def test_what_strangers_wrote_is_escaped():
    report = examples.seam_like()
    names = tuple(f"{EVIL}{i}" for i in range(10))
    phases = tuple(Phase(EVIL, p.epochs) for p in report.trace.phases)
    layer = UnitScores(EVIL, (1.0, 2.0), 1.0, 0.1, (0.0, 6.7), (1,))
    evil = report.model_copy(
        update={
            "model": report.model.model_copy(update={"name": EVIL, "path": EVIL, "architecture": EVIL}),
            "samples": report.samples.model_copy(update={"class_names": names}),
            "method": report.method.model_copy(update={"spec": EVIL, "fields": {EVIL: EVIL}}),
            "trace": Trace(phases, (layer, layer), {EVIL: EVIL}, (EVIL,), heads=(layer,)),
            "flags": (Flag(EVIL, EVIL, True), Flag(EVIL, EVIL, False)),
        }
    )
    text = render(evil)
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert text.count("</style>") == text.count("<style")
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "alert(1)" in shown(page)  # shown as the text it is


def test_the_story_is_told_in_order_and_the_numbers_are_those_of_the_record():
    report = examples.seam_like()
    page = render(report)
    text = shown(Page(page))
    assert re.findall(r"<h[12][^>]*>(.*?)</h[12]>", page) == [
        "The backdoor is gone, and the network still works.",
        "What was loaded",
        "What was done",
        "The evidence",
        "The known trigger",
        "Inside the network",
        "What it cost",
        "What remains uncertain",
    ]
    for rate in (report.before.accuracy, report.after.accuracy, report.before.asr, report.after.asr):
        assert f"{rate.value:.1%}" in text
    assert "seam(forget_epochs=30)" in text
    assert "11,171,146" in text


def test_without_a_trigger_the_page_says_that_nothing_is_proven():
    text = shown(Page(render(examples.ulrl_like())))
    assert "not proven" in text[: text.index("What was loaded")]
    assert "nothing in this report shows that a backdoor was there, or that it is gone" in text
    assert "set aside before the defense started" in text


def test_canaries_are_told_of_and_those_that_did_not_take_do_not_count():
    text = shown(Page(render(examples.with_canaries())))
    assert "2 known backdoors were planted in a copy" in text
    assert "left the worst of them working on 31.0% of the images; 1 of 2 fell to 10% or below" in text
    assert "One more did not take and says nothing" in text
    assert "badnets(target=5, size=2, corner=top-left)" in text
    assert "wanet(target=7, s=2.0) (did not take)" in text
    assert "sig was left out." in text
    assert "tends to sit deeper" in text
    assert "Backdoors planted to be removed" not in shown(Page(render(examples.ulrl_like())))


def test_canaries_of_which_none_took_show_nothing():
    report = examples.with_canaries()
    assert report.canaries is not None
    alone = dataclasses.replace(report.canaries, canaries=report.canaries.canaries[2:])
    text = shown(Page(render(report.model_copy(update={"canaries": alone}))))
    assert "None of the known backdoors that were planted in a copy took" in text


def test_a_destroyed_model_is_called_so_at_the_top_in_red():
    text = render(examples.destroyed())
    page = shown(Page(text))
    assert '<body class="bad">' in text
    assert "The network was destroyed. Do not use it." in page[: page.index("What was loaded")]
    assert "still works" not in page


@pytest.mark.parametrize("source", ["test", "held_out", "given"])
def test_the_reader_learns_which_samples_were_measured(source):
    report = examples.seam_like()
    report = report.model_copy(update={"measured": report.measured.model_copy(update={"source": source})})
    assert ("optimistic" in wording.measured_on(report)) == (source == "given")
    assert wording.measured_on(report) in shown(Page(render(report)))


def test_serious_flags_stand_before_the_figures():
    flag = Flag("accuracy_at_chance", "accuracy is 10% of 50", True)
    text = shown(Page(render(examples.seam_like().model_copy(update={"flags": (flag,), "verdict": "unproven"}))))
    assert text.index("Accuracy is 10% of 50.") < text.index("What was loaded")
    assert "Nothing can be said" in text
    assert "still works" not in text


def test_a_bare_record_makes_a_page_too():
    """No phase, no score, no changed weight, classes without samples, and numbers that are not finite."""
    base = examples.seam_like()
    after = base.after.__class__(base.after.accuracy, None, (None, *base.after.per_class[1:]), base.after.confusion)
    nan = float("nan")
    epoch = Epoch(0, nan, 0.5, 1e-3, 10, 0.1, {}, {"held_out_accuracy": nan, "held_out_loss": float("inf")})
    layer = UnitScores("head", (1.0, 1.0), 1.0, 0.0, (float("inf"), nan), ())
    bare = base.model_copy(update={"trace": Trace(), "weights": (), "after": after, "attack": None})
    odd = bare.model_copy(update={"trace": Trace((Phase("a", (epoch,)), Phase("empty", ())), (layer, layer))})
    assert "figure-curves-accuracy" not in Page(render(bare)).ids
    assert "figure-curves-accuracy" in Page(render(odd)).ids


@pytest.mark.parametrize("layers", [1, 3])
def test_attention_heads_are_drawn_apart_from_units(layers):
    report = examples.ulrl_like()
    apart = UnitScores("blocks.0.attention", (1.0, 1.1, 6.0, 0.9), 1.0, 0.1, (0.0, 0.7, 33.7, 0.7), (2,))
    heads = (apart, *(dataclasses.replace(apart, layer=f"blocks.{i}.attention", flagged=()) for i in range(1, layers)))
    assert "figure-head-scores" not in Page(render(report)).ids
    page = Page(render(report.model_copy(update={"trace": dataclasses.replace(report.trace, heads=heads)})))
    assert {"figure-unit-scores", "figure-head-scores"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert f"{4 * layers} heads in {'one layer' if layers == 1 else '3 layers'} of attention" in shown(page)
    assert "Standing out: blocks.0.attention: 2. " in shown(page)


def test_the_key_names_only_the_lines_that_are_drawn():
    report = examples.seam_like()
    unmeasured = tuple(
        Phase(p.name, tuple(Epoch(e.index, e.loss, e.accuracy, e.lr, e.images, e.seconds) for e in p.epochs))
        for p in report.trace.phases
    )
    assert render(report).count("on the held-out share") == 2
    assert "on the held-out share" not in render(report.model_copy(update={"trace": Trace(unmeasured)}))


def test_the_key_calls_held_out_only_what_is():
    report = examples.seam_like()
    first = report.trace.phases[0].epochs[0]

    def page(*names: str) -> str:
        phases = tuple(
            Phase(n, (dataclasses.replace(first, measured={f"{n}_accuracy": 0.5, f"{n}_loss": 1.0}),)) for n in names
        )
        return render(report.model_copy(update={"trace": Trace(phases)}))

    assert page("held_out", "training").count("on the held-out share, or at an epoch") == 2
    for name in ("training", "forget_set", "recover_set", "something_else"):
        assert "on the held-out share" not in page(name)
    assert page("something_else").count("on something else") == 2


def test_many_short_phases_are_numbered_and_the_key_says_which_is_which():
    report = examples.seam_like()
    first = report.trace.phases[0].epochs[:1]
    many = tuple(Phase(f"attempt {i} at forgetting", first) for i in range(9))
    text = shown(Page(render(report.model_copy(update={"trace": Trace(many)}))))
    assert "3 attempt 2 at forgetting" in text
