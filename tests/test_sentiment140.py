"""Risk: a damaged row becomes somebody's message, or a message moves to another user."""

import numpy as np
import pytest

from experiments.sentiment import generated_messages
from fedjax_rec.text.sentiment140 import of_users, read_sentiment140

ROWS = """\
"0","1","Mon Apr 06","NO_QUERY","bea","so sad, really"
"4","2","Mon Apr 06","NO_QUERY","al","she said ""yes"" \xe9"
"2","3","Mon Apr 06","NO_QUERY","al","a fact"
"4","4","Mon Apr 06","NO_QUERY","bea","two
lines"
"0","5","Mon Apr 06","NO_QUERY","al"
"7","6","Mon Apr 06","NO_QUERY","al","no such polarity"
"0","7","Mon Apr 06","NO_QUERY"," ","nobody's"
"0","8","Mon Apr 06","NO_QUERY","cy"," "

"0","9","Mon Apr 06","NO_QUERY","cy","\0bad day"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "messages.csv"
    path.write_bytes(ROWS.encode("latin-1"))
    return path


def test_what_is_a_message_and_what_is_counted(file):
    found = read_sentiment140(file)
    assert found.texts == ["so sad, really", 'she said "yes" é', "two\nlines", "bad day"]
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.user_names == ["al", "bea", "cy"]
    assert found.user_ids.tolist() == [1, 0, 1, 2]
    assert (found.num_neutral, found.num_malformed) == (1, 5)
    assert read_sentiment140(file, max_rows=2).texts == found.texts[:2]


def test_users_keep_their_messages_under_new_numbers(file):
    some = of_users(read_sentiment140(file), np.array([2, 1]))
    assert some.user_names == ["cy", "bea"]
    assert list(zip(some.texts, some.user_ids.tolist(), strict=True)) == [
        ("so sad, really", 1),
        ("two\nlines", 1),
        ("bad day", 0),
    ]
    assert some.labels.tolist() == [0, 1, 0]


def test_a_file_that_is_missing_or_another(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere.csv; name a CSV of Sentiment140"):
        read_sentiment140(tmp_path / "nowhere.csv")
    other = tmp_path / "ratings.csv"
    other.write_text("userId,movieId,rating\n1,2,3.5\n")
    with pytest.raises(ValueError, match="no usable row: 2 malformed, 0 neutral"):
        read_sentiment140(other)


def test_generated_users_differ_in_style_and_say_what_they_mean_or_its_opposite():
    found = generated_messages(num_users=60, per_user=8, seed=0)
    assert np.bincount(found.user_ids).tolist() == [8] * 60
    assert 0.35 < found.labels.mean() < 0.65
    glad = np.array(
        [any(word in text for word in ("love", "enjoyed", "adore", "happy", "grateful")) for text in found.texts]
    )
    ironic = np.array(["can not say" in text for text in found.texts])
    np.testing.assert_array_equal(glad ^ ironic, found.labels == 1)
    assert 0.05 < ironic.mean() < 0.5
    ends = [
        {text[-2:] for text, user in zip(found.texts, found.user_ids, strict=True) if user == one} for one in range(60)
    ]
    assert sum(len(end) == 1 for end in ends) > 20
    again = generated_messages(num_users=60, per_user=8, seed=0)
    assert again.texts == found.texts
