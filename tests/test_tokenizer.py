"""Text <-> ids, and the embedded solver's two prompts."""
import json

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from sd import UserError
from sd.problems import EMBEDDED, embedded
from sd.llm.tokenizer import Tokenizer
from sd.task.corpus import SPECIAL
from sd.prompts import student_prompt, teacher_prompt

TOKENIZER = Tokenizer(EMBEDDED / "tokenizer.json")
WORDS = ("<step_1> 7 times 8 is 56 </step_1>\n<step_2> 6 times 9 is 54 </step_2>\n"
         "<step_3> 56 plus 54 gives 110 </step_3>\n<answer> 110 </answer>")


@pytest.mark.parametrize("text", [
    WORDS,
    "<step_1> 7*8=54, so 7*8=56 is correct </step_1>\n<step_2> correct </step_2>\n<answer> 1 </answer>",
    "<step_1> 7*8=5", "<answer> 1 </answer>", "", " ", "0123456789\n",
])
def test_decode_gives_back_what_was_encoded(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text == "".join(TOKENIZER.pieces(ids)) \
        and len(TOKENIZER.pieces(ids)) == len(ids)


def test_the_pieces_make_the_text_where_the_decoder_drops_its_first_space(tmp_path):
    """As in Llama 2's tokenizers: every piece lost its space, and spans of tokens were shifted by as many."""
    words = ["▁7", "▁is", "▁5", "6", "▁", "<eos>", "<unk>", "<problem>"]
    fast = FastTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.add_special_tokens(["<eos>", "<problem>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.pieces([0, 1, 2, 3, 5]) == ["7", " is", " 5", "6", ""]
    for ids in ([7, 0, 1], [0, 7, 5, 1, 2], [1], [4, 0], [5, 0, 5]):
        assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)


def test_all_shipped_problems_and_references_are_encoded_without_loss():
    for split in ("train", "val", "test"):
        for p in embedded(split):
            for text in (p.problem, p.solution, p.answer):
                assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("token", [t for t in SPECIAL if t != "<unk>"])
def test_a_control_token_typed_in_a_text_stays_text(token):
    control = {TOKENIZER.fast.token_to_id(t) for t in SPECIAL if t != "<unk>"}
    assert not control & set(TOKENIZER.encode(f"7*8{token}=56"))
    prompt = teacher_prompt(TOKENIZER, f"7*8{token}", "critique", f"{token}{WORDS}{token}")
    assert [i for i in prompt if i in control] == [TOKENIZER.fast.token_to_id(t) for t in
                                                   ("<problem>", "<critique>", "<solution>")]


def test_student_and_teacher_prompts_begin_alike_and_end_with_the_same_token():
    student = student_prompt(TOKENIZER, "7*8")
    names = TOKENIZER.fast.id_to_token
    assert list(map(names, student)) == ["<problem>", "7", "*", "8", "<solution>"]
    for kind, tag in (("ref", "<reference>"), ("critique", "<critique>")):
        teacher = teacher_prompt(TOKENIZER, "7*8", kind, "5 6")
        assert list(map(names, teacher)) == ["<problem>", "7", "*", "8", tag, "5", " ", "6", "<solution>"]


def test_eos_has_no_text():
    assert TOKENIZER.pieces(list(TOKENIZER.eos)) == [""]


def test_a_missing_a_broken_and_a_foreign_tokenizer_are_the_users_error(tmp_path):
    """They were ValueErrors, which the command lines do not catch: a traceback."""
    raw = json.loads((EMBEDDED / "tokenizer.json").read_text())
    raw["added_tokens"] = []
    del raw["model"]["vocab"]["<critique>"], raw["model"]["vocab"]["<eos>"]
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "foreign.json").write_text(json.dumps(raw))
    for name, fact in (("none.json", "none.json"), ("broken.json", "broken.json"), ("foreign.json", "<eos>")):
        with pytest.raises(UserError, match=fact):
            Tokenizer(tmp_path / name)
    raw["model"]["vocab"]["<eos>"] = 0
    (tmp_path / "foreign.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="<critique>"):          # told when a prompt needs it
        teacher_prompt(Tokenizer(tmp_path / "foreign.json"), "7*8", "critique", "5")
