"""The judge of a stress run finds what it should find, and nothing in a clean history."""

import dataclasses
import json

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from services.stress import verdict
from services.stress.charts import Flag, Series, distribution, over_time
from services.stress.history import Answer, End, Line, Mark, Repair, from_lines, to_lines
from services.stress.other_weights import CHANGED_BYTES, write_other_weights
from services.stress.remains import broken_tree
from services.stress.report import quantile
from services.stress.verdict import Life, Remains, Tally, judge
from services.stress.workload import Question

EXPECTED = (11, 12, 13, 14)
QUESTION = Question(0, (5, 6), 4, 0.0, 1, shadow=False)
REPAIR = Repair("SILENT", "reroute", "stage-1", ("a", "b"), ("full",), 8, 2, 4, 0.5)


def clean(**changes) -> Answer:
    answer = Answer(
        0,
        0,
        "id-0",
        0.0,
        lines=[Line(0.1, 0, (11, 12), 7), Line(0.2, 2, (13,), 8), Line(0.3, 3, (14,), 8)],
        ends=[End(0.3, "length", 4, 2, (REPAIR,))],
        ended_at=0.4,
        again=EXPECTED,
    )
    return dataclasses.replace(answer, **changes)


def found(answer: Answer) -> Tally:
    return judge([answer], {0: EXPECTED}, {0: QUESTION})


def invariants(tally: Tally) -> list[str]:
    return [one.invariant for one in tally.violations]


def test_a_clean_history_has_no_violation():
    tally = found(clean())
    assert not tally.violations
    assert (tally.lost, tally.duplicated, tally.wrong, tally.hung) == (0, 0, 0, 0)


def test_a_second_stream_may_begin_anew_and_a_withdrawal_may_repeat():
    lines = [
        Line(0.1, 0, (11, 99), 7),
        Line(0.2, 1, (12,), 7, withdrawn_from=1),
        Line(0.3, 0, (11, 12, 13), 9, stream=1),
        Line(0.4, 3, (14,), 9, stream=1),
    ]
    answer = clean(lines=lines, ends=[End(0.4, "length", 4)], attached=[0, 0])
    assert answer.tokens == list(EXPECTED)
    assert not found(answer).violations
    assert [count for _at, count in answer.arrivals()] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "invariant", "counts"),
    [
        ({"lines": [Line(0.1, 0, (11, 12, 99, 14), 7)]}, "I1", (0, 0, 1, 0)),
        ({"lines": [Line(0.1, 0, (11, 12), 7), Line(0.2, 3, (14,), 7)]}, "I2", (2, 0, 1, 0)),
        (
            {"lines": [Line(0.1, 0, (11, 12), 7), Line(0.2, 1, (12, 13, 14), 7)]},
            "I2",
            (0, 1, 0, 0),
        ),
        ({"lines": [Line(0.1, 0, (11, 12, 13), 7)]}, "I8", (1, 0, 0, 0)),
        ({"lines": [Line(0.1, 0, (11, 12, 13, 14, 15), 7)]}, "I1", (0, 1, 0, 0)),
        ({"ends": []}, "I6", (0, 0, 0, 1)),
        ({"ends": [End(0.3, "length", 4), End(0.4, "length", 4)]}, "I2", (0, 0, 0, 0)),
        ({"ends": [End(0.3, "stop", 4)]}, "I1", (0, 0, 0, 0)),
        ({"ends": [End(0.3, "length", 5)]}, "I8", (0, 0, 0, 0)),
        ({"ends": [End(0.05, "length", 4)]}, "I2", (0, 0, 0, 0)),
        ({"again": (11, 12, 13, 99)}, "I2", (0, 0, 0, 0)),
        ({"ends": [], "error": "ROUTE_UNAVAILABLE"}, "I6", (0, 0, 0, 0)),
        (
            {
                "lines": [
                    Line(0.1, at, (EXPECTED[at],), epoch) for at, epoch in enumerate((7, 8, 8, 7))
                ]
            },
            "I4",
            (0, 0, 0, 0),
        ),
        (
            {"ends": [End(0.3, "length", 4, 2, (dataclasses.replace(REPAIR, cause=""),))]},
            "I9",
            (0, 0, 0, 0),
        ),
        ({"ends": [End(0.3, "length", 4, 2, (REPAIR,) * 9)]}, "I11", (0, 0, 0, 0)),
    ],
)
def test_what_is_wrong_is_found_and_counted(changes, invariant, counts):
    tally = found(clean(**changes))
    assert invariant in invariants(tally)
    assert (tally.lost, tally.duplicated, tally.wrong, tally.hung) == counts
    assert all(one.request_id == "id-0" for one in tally.violations)


def test_each_coordinator_has_its_own_budget_of_recoveries():
    again = dataclasses.replace(REPAIR, cause="COORDINATOR_RESTARTED", from_route=())
    repairs = (REPAIR,) * 8 + (again,) + (REPAIR,) * 7
    assert not found(clean(ends=[End(0.3, "length", 4, 2, repairs)])).violations
    one_more = End(0.3, "length", 4, 2, (*repairs, REPAIR))
    assert invariants(found(clean(ends=[one_more]))) == ["I11"]


def test_an_older_route_may_take_over_but_not_come_back():
    """The full worker's route is often older than the pipeline's."""
    lines = [Line(0.1, at, (EXPECTED[at],), epoch) for at, epoch in enumerate((8, 8, 7, 7))]
    assert not found(clean(lines=lines)).violations


def mark(fault: str, number: int = 0, *, fired: bool = True, path: str = "event:X") -> Mark:
    return Mark(number, fault, "stage-0", 1.0, 1.0, 2.0, fired, "seen", path)


def faults_of(marks: list[Mark], planned: dict[int, str]) -> list[str]:
    tally = Tally()
    verdict.judge_faults(marks, planned, tally)
    assert {one.invariant for one in tally.violations} <= {"S"}
    return [one.detail for one in tally.violations]


def test_a_fault_that_never_fired_or_was_never_answered_fails_the_run():
    marks = [mark("drop"), mark("sigkill", 1, fired=False), mark("delay", 2, path="")]
    texts = faults_of(marks, {0: "drop", 1: "sigkill", 2: "delay", 3: "reset"})
    assert len(texts) == 3
    assert "sigkill: 1 of 1 never fired: #1 (stage-0): seen" in texts[0]
    assert "delay: 1 of 1 fired, and no recovery path" in texts[1]
    assert "reset: 1 of 1 never fired: #3 was not reached" in texts[2]


def test_every_single_fault_has_to_fire_and_to_be_answered():
    """That others of its kind did is no excuse."""
    planned = dict.fromkeys(range(11), "sigkill")
    assert faults_of([mark("sigkill", number) for number in range(11)], planned) == []
    (text,) = faults_of([mark("sigkill")], planned)
    assert text.startswith("sigkill: 10 of 11 never fired: #1 was not reached; ")
    assert text.endswith("; and 7 more")
    idle = [mark("sigkill", number, fired=number != 4) for number in range(11)]
    assert faults_of(idle, planned) == ["sigkill: 1 of 11 never fired: #4 (stage-0): seen"]
    ignored = [mark("sigkill", number, path="" if number == 7 else "x") for number in range(11)]
    (text,) = faults_of(ignored, planned)
    assert "1 of 11 fired, and no recovery path was seen: #7" in text


def test_silence_counts_once_nothing_breaks_any_more_and_slow_answers_do_not():
    def silence_of(*at: float) -> list[str]:
        tally = Tally()
        lines = [Line(when, place, (EXPECTED[place],), 7) for place, when in enumerate(at)]
        verdict.judge_silence([clean(asked_at=5.0, lines=lines)], 100.0, 60.0, tally)
        return invariants(tally)

    assert silence_of(90.0, 155.0, 210.0, 265.0) == [], "slow, but never silent for a minute"
    assert silence_of(10.0, 99.0) == [], "faults were going on"
    assert silence_of(10.0, 155.0) == [], "only what came after the faults counts"
    assert silence_of(10.0, 161.0) == ["I6"]
    assert silence_of(110.0, 171.0) == ["I6"]
    assert silence_of(161.0) == ["I6"], "the first token is waited for as well"


def test_an_answer_is_waited_for_as_long_as_it_goes_on():
    ended = clean(lines=[Line(500.0, 0, (11,), 7)])
    slow = clean(asked_at=5.0, lines=[Line(170.0, 0, (11,), 7)], ended_at=None)
    silent = clean(asked_at=5.0, lines=[], ended_at=None)
    assert verdict.patience_until([ended, silent], 100.0, 60.0) == 160.0
    assert verdict.patience_until([ended, silent, slow], 100.0, 60.0) == 230.0
    assert verdict.patience_until([ended], 100.0, 60.0) == 160.0
    asked_late = clean(asked_at=120.0, lines=[], ended_at=None)
    assert verdict.patience_until([asked_late], 100.0, 60.0) == 180.0


def test_what_is_left_over_is_found():
    tally = Tally()
    verdict.judge_remains(Remains({"stage-0": 3}, 4, 1, 2, 5, {"id": "2 roots"}, ("late",)), tally)
    assert [str(one) for one in tally.violations] == [
        "I7: stage-0 still caches 3 positions",
        "I7: 4 in flight after the end",
        "I7: 1 running after the end",
        "I7: 2 queued after the end",
        "I7: 5 on routes after the end",
        "I9 request id: 2 roots",
        "I10: late",
    ]
    clean_tally = Tally()
    verdict.judge_remains(Remains({"stage-0": 0}), clean_tally)
    assert not clean_tally.violations


def test_memory_that_climbs_is_found_and_memory_that_settles_is_not():
    tally = Tally()
    climbing = tuple(100.0 + at for at in range(400))
    settling = tuple(min(100.0 + 10 * at, 400.0) for at in range(400))
    young = climbing[: verdict.RSS_SAMPLES_MIN - 1]
    lives = [Life("a", 1, climbing), Life("b", 2, settling), Life("c", 3, young)]
    verdict.judge_lives(lives, tally)
    assert [one.detail.split()[0] for one in tally.violations] == ["a"]


def test_work_that_comes_and_goes_is_no_growth_and_growth_under_it_is():
    """A worker holds more while it serves: here a fifth of the time at first, then four fifths."""
    at_work = [at % 5 == 0 if at < 200 else at % 5 != 0 for at in range(400)]
    busier = tuple(360.0 if works else 300.0 for works in at_work)
    leaking = tuple(held + at / 4 for at, held in enumerate(busier))
    assert verdict.rise(busier) == 0.0
    early, late = verdict.early_and_late(busier)
    assert late - early > verdict.RSS_RISE_MIB_MAX
    tally = Tally()
    verdict.judge_lives([Life("a", 1, leaking), Life("b", 2, busier)], tally)
    assert [one.detail.split()[0] for one in tally.violations] == ["a"]


@pytest.mark.parametrize("what", ["descriptors", "threads"])
def test_descriptors_and_threads_that_are_never_given_back_are_found(what):
    tally, flat = Tally(), (100.0,) * 400
    leaking = Life("a", 1, flat, **{what: tuple(20 + at for at in range(400))})
    steady = Life("b", 2, flat, **{what: tuple(20 + at % 30 for at in range(400))})
    verdict.judge_lives([leaking, steady], tally)
    assert [one.detail.split()[0] for one in tally.violations] == ["a"]
    assert what in tally.violations[0].detail


def test_frames_sent_again_beyond_the_budget_are_found():
    tally = Tally()
    counters = {"frames_retransmitted": 1000, "frames_checked": 1000}
    verdict.judge_retries(counters, 4, tally)
    assert not tally.violations
    verdict.judge_retries(counters, 1, tally)
    assert invariants(tally) == ["I11"]


def test_a_history_is_written_and_read_again_unchanged():
    answers, marks = [clean(), clean(again=None, error="X")], [mark("drop")]
    lines = list(to_lines(answers, marks))
    assert all(json.loads(line) for line in lines)
    assert from_lines(lines) == (answers, marks)


def traces(*spans: tuple[bytes, bytes]) -> bytes:
    data = TracesData()
    scope = data.resource_spans.add().scope_spans.add()
    for own, parent in spans:
        scope.spans.add(span_id=own, parent_span_id=parent, name=own.decode())
    return data.SerializeToString()


def test_spans_are_one_tree_or_it_is_said_why_not():
    assert broken_tree(traces((b"a", b""), (b"b", b"a"))) == ""
    assert "2 spans have no parent" in broken_tree(traces((b"a", b""), (b"b", b"")))
    assert "without their parent: b" in broken_tree(traces((b"a", b""), (b"b", b"x")))


def recovered(*, link: bytes = b"", kind: str = "interrupted", began_ms: int = 500) -> bytes:
    """A prefill of 100 ms, and a recovery that began then."""
    data = TracesData.FromString(traces((b"chat", b""), (b"work", b"chat"), (b"mend", b"chat")))
    _, work, mend = data.resource_spans[0].scope_spans[0].spans
    work.name, work.end_time_unix_nano = "prefill", 100 * 10**6
    mend.name, mend.start_time_unix_nano = "recovery replay", began_ms * 10**6
    if link:
        made = mend.links.add(span_id=link)
        made.attributes.add(key="mesh.link").value.string_value = kind
    return data.SerializeToString()


def test_a_recovery_links_to_the_work_that_it_interrupted_or_it_is_said():
    assert broken_tree(recovered(link=b"work")) == ""
    assert broken_tree(recovered(began_ms=100)) == "", "nothing had come back yet"
    missing = "recovery replay has no link to the work that it interrupted"
    assert broken_tree(recovered()) == missing
    assert broken_tree(recovered(link=b"work", kind="shared_steps")) == missing
    for elsewhere in (b"chat", b"lost"):
        assert "work that is not there" in broken_tree(recovered(link=elsewhere))


def test_other_weights_differ_in_one_file_and_leave_the_model_alone(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights = bytes(range(256)) * 4
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text("{}")
    copy = write_other_weights(model, tmp_path / "copy")
    changed = (copy / "model.safetensors").read_bytes()
    assert (model / "model.safetensors").read_bytes() == weights
    assert changed[:-CHANGED_BYTES] == weights[:-CHANGED_BYTES]
    assert all(
        a != b for a, b in zip(changed[-CHANGED_BYTES:], weights[-CHANGED_BYTES:], strict=True)
    )
    assert (copy / "config.json").read_text() == "{}"


def test_charts_are_svg_even_of_nothing():
    import xml.etree.ElementTree as ElementTree

    chart = over_time(
        "a < b",
        "s",
        [Series("x", [(0.0, 1.0), (2.0, 3.0)]), Series("y", [])],
        [Flag(1.0, "<kill>")],
    )
    for text in (chart, over_time("none", "s", []), distribution("d", "s", [0.1, 0.2]),
                 distribution("none", "s", [])):  # fmt: skip
        assert ElementTree.fromstring(text).tag.endswith("svg")


def test_quantiles_are_nearest_ranks():
    values = [float(at) for at in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99)) == (50.0, 99.0)
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([], 0.5) is None
