"""Reader of Sentiment140-format files: short messages, the sentiment of each, and who wrote it.

Go, Bhayani and Huang, 2009, "Twitter Sentiment Classification using Distant Supervision": CSV without a header, in
latin-1, with columns polarity (0 negative, 2 neutral, 4 positive), id, date, query, user, text. Its users are real
clients, which few data sets of text have.
"""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_COLUMNS = 6
_LABELS = {"0": 0, "4": 1}


class Messages(NamedTuple):
    """Messages in the order of the file.

    Attributes:
      texts: one a row.
      labels: int32 ``[rows]``, 1 = positive.
      user_ids: int32 ``[rows]``, users numbered in the order of their names.
      user_names: as in the file.
      num_neutral: rows of polarity 2, left out.
      num_malformed: rows with other columns or polarities, without a user or a text, left out.
    """

    texts: list[str]
    labels: np.ndarray
    user_ids: np.ndarray
    user_names: list[str]
    num_neutral: int
    num_malformed: int


def read_sentiment140(file: str | os.PathLike, *, max_rows: int | None = None) -> Messages:
    """Reads a file; rows that cannot be used are counted, not guessed at.

    Args:
      file: the CSV.
      max_rows: stop after so many usable rows. The published file is sorted by polarity, so that its start is all
        negative: take rows of some users with `of_users` instead, unless the file is shuffled.

    Raises:
      FileNotFoundError: a sentence, if there is no such file.
      ValueError: a sentence, if it has no usable row.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}; name a CSV of Sentiment140, such as training.1600000.processed.noemoticon.csv."
        )
    texts, labels, users = [], [], []
    num_neutral = num_malformed = 0
    with open(file, encoding="latin-1", newline="") as lines:
        for row in csv.reader(line.replace("\0", "") for line in lines):
            if len(row) != NUM_COLUMNS or not row[4].strip() or not row[5].strip():
                num_malformed += 1
            elif row[0] == "2":
                num_neutral += 1
            elif row[0] not in _LABELS:
                num_malformed += 1
            else:
                texts.append(row[5].strip())
                labels.append(_LABELS[row[0]])
                users.append(row[4].strip())
                if len(texts) == max_rows:
                    break
    if not texts:
        raise ValueError(
            f"{file} has no usable row: {num_malformed} malformed, {num_neutral} neutral. A row is polarity (0 or 4), "
            "id, date, query, user, text."
        )
    names, user_ids = np.unique(users, return_inverse=True)
    return Messages(
        texts, np.array(labels, np.int32), user_ids.astype(np.int32), names.tolist(), num_neutral, num_malformed
    )


def of_users(messages: Messages, users: np.ndarray) -> Messages:
    """The rows of some users, who are numbered anew in the given order.

    Args:
      messages: all.
      users: int ``[n]``, distinct user ids.
    """
    number = np.full(len(messages.user_names), -1, np.int32)
    number[users] = np.arange(len(users))
    rows = np.flatnonzero(number[messages.user_ids] >= 0)
    return messages._replace(
        texts=[messages.texts[row] for row in rows],
        labels=messages.labels[rows],
        user_ids=number[messages.user_ids[rows]],
        user_names=[messages.user_names[user] for user in users],
    )
