"""The step grammar: text -> steps -> characters -> tokens."""
import pytest

from sd.steps import Trace, parse, render, token_span
from sd.llm.tokenizer import Tokenizer
from sd.problems import EMBEDDED

TRACE = ("<step_1> 7*8=56 </step_1>\n<step_2> 6*9=54 </step_2>\n"
         "<step_3> 56+54=110 </step_3>\n<answer> 110 </answer>")


def test_render_writes_the_house_format_and_parse_reads_it_back():
    texts = ["7*8=56", "6*9=54", "56+54=110"]
    assert render(texts, "110") == TRACE
    trace = parse(TRACE)
    assert [s.text for s in trace.steps] == texts
    assert trace.answer.text == "110" and all(s.closed for s in [*trace.steps, trace.answer])
    assert TRACE[trace.steps[1].start:trace.steps[1].end] == "<step_2> 6*9=54 </step_2>"


@pytest.mark.parametrize("text, steps, answer", [
    ("", [], None),
    ("no tags at all", [], None),
    ("so <step_1> a </step_1> and then <answer> 3 </answer> bye",                   # text outside
     [("a", True)], ("3", True)),
    ("<step_1> a <step_2> b </step_2>", [("a", False), ("b", True)], None),         # forgot the tag
    ("<step_1> a </step_1>\n<step_2> b", [("a", True), ("b", False)], None),        # out of tokens
    ("<step_1> a </step_1><answer> 4", [("a", True)], ("4", False)),
    ("<answer> 1 </answer> <answer> 2 </answer>", [], ("2", True)),                 # the last one wins
    ("<answer> 1 </answer>, as in <answer> ... </answer> or <answer>", [], ("1", True)),    # only mentioned
    ("</step_3> </answer> <step_1> a </step_1> </step_1>", [("a", True)], None),    # stray closing tags
    ("<step_1> a </step_2>", [("a", False)], None),
    ("<step_> x </step_> <step_12345> y <STEP_1> z", [], None),                     # not tags
])
def test_parse_of_hand_written_traces(text, steps, answer):
    trace = parse(text)
    assert [(s.text, s.closed) for s in trace.steps] == steps
    assert (trace.answer and (trace.answer.text, trace.answer.closed)) == answer
    assert isinstance(trace, Trace)


def test_a_megabyte_of_opening_tags_is_parsed_in_one_pass():
    steps = parse("<step_1>" * 131_072).steps
    assert len(steps) == 131_072 and not any(s.closed or s.text for s in steps)


@pytest.mark.parametrize("start, end, span", [
    (0, 2, (0, 1)), (2, 4, (1, 2)), (2, 5, (1, 3)),
    (5, 6, (3, 3)),             # begins inside a token that the span before has taken
    (1, 3, (1, 2)), (0, 6, (0, 3)), (3, 3, (2, 2)),
])
def test_a_straddling_token_belongs_to_the_side_on_which_it_starts(start, end, span):
    assert token_span(["ab", "cd", "ef"], start, end) == span


def test_with_the_embedded_tokenizer_the_spans_of_the_steps_cover_just_their_tokens():
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.json")
    pieces = tokenizer.pieces(tokenizer.encode(TRACE) + list(tokenizer.eos))
    trace = parse(TRACE)
    covered = [pieces[slice(*token_span(pieces, s.start, s.end))] for s in [*trace.steps, trace.answer]]
    assert covered == [
        ["<step_1> ", "7", "*", "8", "=", "5", "6", " </step_1>\n<step_2> "],
        ["6", "*", "9", "=", "5", "4", " </step_2>\n<step_3> "],
        ["5", "6", "+", "5", "4", "=", "1", "1", "0", " </step_3>\n<answer> "],
        ["1", "1", "0", " </answer>"]]
