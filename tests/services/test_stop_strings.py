"""Stop strings: nothing of them is ever released, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.stop_strings import StopStrings


def one_by_one(text: str, stops: list[str]) -> tuple[str, str]:
    """The definition: read characters until one of the stop strings is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, ""


def in_pieces(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str]:
    watcher, released, start = StopStrings(stops), "", 0
    for cut in [*sorted(cuts), len(text)]:
        end = max(start, min(cut, len(text)))
        released += watcher.feed(text[start:end]).text
        assert text.startswith(released)
        start = end
    last = watcher.finish()
    return released + last.text, last.matched


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_the_result_does_not_depend_on_how_the_text_was_cut(text, stops, cuts):
    # What was released is never taken back, so equality here means that nothing ever leaked.
    assert in_pieces(text, stops, cuts) == one_by_one(text, stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "matched"),
    [
        (["Hello\n", "\nUs", "er: x"], ["\n\nUser:"], "Hello", "\n\nUser:"),
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        (["xab"], ["b", "ab"], "x", "ab"),
        (["aaa", "b"], ["aab"], "a", "aab"),
        (["no stop"], ["!"], "no stop", ""),
        (["half a st"], ["stop"], "half a st", ""),
    ],
)
def test_the_match_completed_first_wins_and_of_those_the_longest(pieces, stops, text, matched):
    watcher = StopStrings(stops)
    released = "".join(watcher.feed(piece).text for piece in pieces)
    last = watcher.finish()
    assert (released + last.text, last.matched) == (text, matched)


def test_after_a_match_nothing_is_released_any_more():
    watcher = StopStrings(["END"])
    assert watcher.feed("fine END not").text == "fine "
    assert watcher.feed("anything").text == ""
    assert watcher.finish().text == ""
