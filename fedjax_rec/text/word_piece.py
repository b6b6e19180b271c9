"""BERT's tokens: words split at spaces and punctuation, then into the longest known pieces.

Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; pieces of Wu et
al., 2016, "Google's Neural Machine Translation System". Names of special tokens in a text are read as plain text.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_MAX_LETTERS = 100  # a longer word is unknown, as in BERT
_CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F))
_CJK += ((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


@dataclass(frozen=True, eq=False)
class WordPiece:
    """A vocabulary, and how words are looked up in it.

    Attributes:
      vocabulary: id of each piece; inner pieces begin with "##". Has [PAD], [UNK], [CLS] and [SEP].
      lower_case: letters are lower-cased and lose their accents first.
    """

    vocabulary: dict[str, int]
    lower_case: bool = True
    _split_before: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 and mask bool, both ``[len(texts), max_tokens]``; a longer text keeps its beginning."""
        pad, cls, sep = (self.vocabulary[name] for name in ("[PAD]", "[CLS]", "[SEP]"))
        ids = np.full((len(texts), max_tokens), pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, text in enumerate(texts):
            pieces = [piece for word in words(text, self.lower_case) for piece in self._pieces(word)]
            tokens = [cls, *pieces[: max_tokens - 2], sep]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return ids, mask

    def _pieces(self, word: str) -> tuple[int, ...]:
        if word not in self._split_before:
            self._split_before[word] = self._split(word)
        return self._split_before[word]

    def _split(self, word: str) -> tuple[int, ...]:
        unknown, found, start = (self.vocabulary["[UNK]"],), [], 0
        if len(word) > _MAX_LETTERS:
            return unknown
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = self.vocabulary.get(("##" if start else "") + word[start:end])
                if piece is not None:
                    break
            else:
                return unknown
            found.append(piece)
            start = end
        return tuple(found)


def words(text: str, lower_case: bool = True) -> list[str]:
    """Words, each punctuation mark and each Chinese character by itself; control characters are dropped."""
    text = unicodedata.normalize("NFD", text.lower()) if lower_case else text
    return "".join(_place(letter, lower_case) for letter in text).split()


def _place(letter: str, lower_case: bool) -> str:
    code, category = ord(letter), unicodedata.category(letter)
    if letter in "\t\n\r" or category == "Zs":
        return " "
    if category[0] == "C" or code == 0xFFFD or (lower_case and category == "Mn"):
        return ""
    mark = category[0] == "P" or (33 <= code < 127 and not letter.isalnum())
    return f" {letter} " if mark or any(low <= code <= high for low, high in _CJK) else letter


def read_vocabulary(path: Path) -> dict[str, int]:
    """Ids of a vocab.txt: one piece a line, in order."""
    return {
        piece: row for row, piece in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    }
