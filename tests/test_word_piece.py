"""Risk: a text becomes other tokens than the encoder was trained on, which nothing downstream would notice."""

import os
from pathlib import Path

import numpy as np
import pytest

from fedjax_rec.text.word_piece import WordPiece, read_vocabulary, words

PIECES = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "play",
    "##ing",
    "##in",
    "##g",
    "pla",
    "##s",
    "the",
    "(",
    ")",
    "cafe",
    "un",
)
TOKENIZER = WordPiece({piece: row for row, piece in enumerate(PIECES)})


# From the tokenizer.json of all-MiniLM-L6-v2, by Hugging Face's own program.
KNOWN = {
    "Amélie (Fabuleux destin d'Amélie Poulain, Le) (2001)": [
        *(101, 25285, 1006, 6904, 8569, 2571, 5602, 4078, 7629, 1040, 1005, 25285),
        *(13433, 7068, 2378, 1010, 3393, 1007, 1006, 2541, 1007, 102),
    ],
    "日本語 mixed漢字text": [101, 1864, 1876, 1950, 3816, 1904, 100, 3793, 102],
    "$9.99 @home ^_^ ~ `x`": [101, 1002, 1023, 1012, 5585, 1030, 2188, 1034, 1035, 1034, 1066, 1036, 1060, 1036, 102],
    "tab\tnew\nline\xa0nbsp\u200bzero\x00nul": [101, 21628, 2047, 2240, 1050, 5910, 2361, 6290, 2239, 5313, 102],
}


def tokens(text, max_tokens=32):
    ids, mask = TOKENIZER.encode([text], max_tokens)
    return [PIECES[place] for place in ids[0][mask[0]]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Toy Story (1995)", ["toy", "story", "(", "1995", ")"]),
        ("Amélie CAFÉ naïve", ["amelie", "cafe", "naive"]),
        ("d'Amélie—100% $9.99 a_b", ["d", "'", "amelie", "—", "100", "%", "$", "9", ".", "99", "a", "_", "b"]),
        ("mixed漢字text", ["mixed", "漢", "字", "text"]),
        ("tab\tnew\nline\u00a0space", ["tab", "new", "line", "space"]),
        ("nul\x00\ufffd\u200bgone", ["nulgone"]),
        ("[CLS]", ["[", "cls", "]"]),
        ("", []),
    ],
)
def test_texts_fall_into_words_as_bert_has_it(text, expected):
    assert words(text) == expected


def test_a_cased_vocabulary_keeps_letters_and_accents():
    assert words("Amélie, CAFÉ", lower_case=False) == ["Amélie", ",", "CAFÉ"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("playing plays", ["play", "##ing", "play", "##s"]),  # the longest piece first: not pla, not ##in ##g
        ("the (Café)", ["the", "(", "cafe", ")"]),
        ("unplay", ["[UNK]"]),  # the whole word is unknown, not its rest
        ("s", ["[UNK]"]),  # an inner piece does not begin a word
        ("play" + 97 * "s", ["[UNK]"]),
        ("play" + 96 * "s", ["play", *96 * ["##s"]]),
    ],
)
def test_words_fall_into_the_longest_pieces(text, expected):
    assert tokens(text, 200) == ["[CLS]", *expected, "[SEP]"]


def test_a_long_text_keeps_its_beginning_and_its_end_mark_and_padding_is_masked():
    ids, mask = TOKENIZER.encode(["the play the play the", "the", ""], 4)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(ids, [[2, 10, 4, 3], [2, 10, 3, 0], [2, 3, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])


def test_a_vocabulary_is_read_in_the_order_of_its_lines(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_bytes("[PAD]\r\na\r\n\u2028\n##b\n".encode())  # a line separator is a piece, not a line's end
    assert read_vocabulary(file) == {"[PAD]": 0, "a": 1, "\u2028": 2, "##b": 3}


def test_ids_are_those_of_the_tokenizer_that_came_with_the_weights():
    folder = os.environ.get("FEDJAX_REC_TEXT_ENCODER")
    if not folder:
        pytest.skip("set FEDJAX_REC_TEXT_ENCODER to a folder of all-MiniLM-L6-v2 to compare with its own tokenizer")
    tokenizer = WordPiece(read_vocabulary(Path(folder) / "vocab.txt"))
    for text, expected in KNOWN.items():
        ids, mask = tokenizer.encode([text], 64)
        assert ids[0][mask[0]].tolist() == expected, text
