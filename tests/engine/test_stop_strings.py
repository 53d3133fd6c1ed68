"""Stop strings, against an oracle that looks at the text character by character."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from llama_fast.engine.stop_strings import StopStrings

LETTERS = "ab"


def oracle(text: str, stops: list[str], counts_after: int = 0) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first, of those that end after so many characters; and which it is."""
    for end in range(counts_after + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    text=st.text(LETTERS, max_size=24),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
    min_pieces=st.integers(0, 4),
    include=st.booleans(),
)
@example("abc", ["abc", "b"], [], 0, False)  # in one piece "" and "abc" would be found
@example("abc", ["bc", "abc"], [1], 0, True)
@example("aaab", ["aa"], [2], 1, False)
def test_any_cut_gives_the_same(text, stops, cuts, min_pieces, include) -> None:
    pieces = pieces_of(text, cuts)
    counts_after = len("".join(pieces[:min_pieces]))
    found = oracle(text, stops, counts_after)
    expected = text if found is None else text[: found[0] + len(found[1]) * include]

    matcher = StopStrings(stops, include=include)
    given, read = "", ""
    for i, piece in enumerate(pieces):
        given += matcher.push(piece, may_end=i >= min_pieces)
        read += piece
        if matcher.found is None:
            # what is held back is the start of a stop string, and the longest
            held = read[len(given) :]
            starts = [n for n in range(len(read) + 1) for stop in stops if read.endswith(stop[:n]) and n < len(stop)]
            assert given + held == read and len(held) == max(starts, default=0)
        else:
            assert given == expected
    assert given + matcher.flush() == expected
    assert matcher.found == (None if found is None else found[1])


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:", "###"])
    assert [matcher.push(piece) for piece in ("a\n", "\nUs", "ed #", "#!", "# x")] == [
        "a",
        "",
        "\n\nUsed ",
        "##!",
        "# x",
    ]


def test_after_a_stop_string_there_is_no_more_text() -> None:
    matcher = StopStrings(["."])
    assert [matcher.push(piece) for piece in ("one", "two. th", "ree.")] == ["one", "two", ""]
    assert matcher.found == "." and matcher.flush() == ""
