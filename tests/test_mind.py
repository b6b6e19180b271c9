"""Risk: news, clicks or impressions of a MIND folder land at other users or ids, or damage is read without a word."""

import numpy as np
import pytest

from experiments._news_world import TOPICS, generate_mind
from fedjax_rec.data.mind import mind_clients, read_mind

NEWS = """N3\tsports\tgolf\tA "title\twith abstract\thttps://x\t[]\t[]
N1\tnews\tworld\tOther title\t\t\t\t
N2\tnews\tworld\tThird\t\t\t\t
"""
BEHAVIOURS = """1\tU9\t11/11/2019 9:05:58 AM\tN1 N3\tN2-1 N3-0
2\tU2\t11/12/2019 6:11:30 PM\t\tN1-0 N2-0 N3-1
3\tU9\t11/13/2019 6:11:30 PM\tN1 N3\tN1-1
"""


def write(folder, *, news=NEWS, behaviours=BEHAVIOURS):
    folder.mkdir(exist_ok=True)
    (folder / "news.tsv").write_text(news)
    (folder / "behaviors.tsv").write_text(behaviours)
    return folder


def test_everything_lands_where_it_belongs(tmp_path):
    mind = read_mind(write(tmp_path / "train"))
    assert (mind.name, mind.num_news, mind.num_users, mind.num_impressions) == ("train", 3, 2, 3)
    assert mind.news_labels.tolist() == ["N1", "N2", "N3"]
    assert mind.titles.tolist() == ["Other title", "Third", 'A "title']
    assert mind.categories.tolist() == ["news", "news", "sports"]
    assert mind.subcategories.tolist() == ["world", "world", "golf"]
    assert mind.user_labels.tolist() == ["U2", "U9"]
    assert mind.history_of(0).tolist() == []
    assert mind.history_of(1).tolist() == [0, 2]
    assert mind.impression_users.tolist() == [1, 0, 1]
    assert mind.impression_times[1] == "11/12/2019 6:11:30 PM"
    shown, clicked = mind.shown_in(0)
    assert (shown.tolist(), clicked.tolist()) == ([1, 2], [True, False])
    assert {key: value for key, value in mind.repairs.items() if value} == {"users without history": 1}
    with pytest.raises(ValueError, match="read-only"):
        mind.clicked[0] = False


def test_repairs_are_counted(tmp_path):
    good = BEHAVIOURS * 60
    damaged = "4\tU9\t11/14/2019\tN1 N7\tN2-1 N8-0 N3-2 N1 N3-0\n5\tU4\t11/14/2019\tN1\tN8-0\n6\tU5\tbroken\n"
    mind = read_mind(write(tmp_path / "train", behaviours=good + damaged))
    assert mind.repairs == {
        "malformed lines dropped": 1,
        "unknown news in histories dropped": 1,
        "unknown shown news dropped": 2,
        "shown news without -0 or -1 dropped": 2,
        "impressions without news dropped": 1,
        "users without history": 1,
        "impressions with another history": 1,
    }
    assert mind.shown_in(180)[0].tolist() == [1, 2]
    assert mind.num_impressions == 181
    assert mind.history_of(2).tolist() == [0, 2]  # the longest


def test_refusals_name_the_line(tmp_path):
    with pytest.raises(ValueError, match=r"Line 2 of .*news.tsv has 2 fields"):
        read_mind(write(tmp_path / "a", news="N1\ta\tb\tc\nN2\tshort\n"))
    with pytest.raises(ValueError, match=r"Line 2 of .*behaviors.tsv has 3 fields.*1 of 4 lines"):
        read_mind(
            write(tmp_path / "b", behaviours="1\tU1\tt\tN1\tN1-1\n2\tU1\tt\n" + BEHAVIOURS[:-1].split("\n", 1)[1])
        )
    with pytest.raises(FileNotFoundError, match=r"news\.tsv"):
        read_mind(tmp_path / "c")
    with pytest.raises(ValueError, match="max_history"):
        mind_clients(read_mind(write(tmp_path / "d")), max_history=0)


def test_histories_as_interactions(tmp_path):
    mind = read_mind(write(tmp_path / "train", behaviours="1\tU1\tt\tN3 N1 N3 N2\tN1-1\n2\tU2\tt\t\tN1-0\n"))
    histories = mind.histories
    assert histories.items_of(0).tolist() == [2, 0, 1]
    assert histories.counts_per_user.tolist() == [3, 0]
    assert histories.item_titles[2] == 'A "title'
    clicks = read_mind(write(tmp_path / "dev")).clicks
    assert clicks.items_of(0).tolist() == [2]
    assert clicks.items_of(1).tolist() == [0, 2, 1]


def test_clients_hold_histories_and_impressions(tmp_path):
    """Labels tell the history, and for each impression what was clicked and what was not."""
    clients = mind_clients(read_mind(write(tmp_path / "train")), num_buckets=1)
    (bucket,) = clients.buckets
    by_user = {int(u): row for row, u in enumerate(bucket.client_id)}
    row = by_user[1]
    assert bucket.item_ids[row].tolist() == [0, 2, 1, 2, 0]
    assert bucket.labels[row].tolist() == [0, 0, 1, -1, 2]
    row = by_user[0]
    assert bucket.item_ids[row].tolist() == [0, 1, 2, 3, 3]
    assert bucket.labels[row].tolist() == [-1, -1, 1, 0, 0]
    short = mind_clients(
        read_mind(tmp_path / "train"), max_history=1, max_impressions=1, max_shown=1, num_buckets=1
    ).buckets[0]
    row = {int(u): row for row, u in enumerate(short.client_id)}[1]
    assert (short.item_ids[row].tolist(), short.labels[row].tolist()) == ([2, 1], [0, 1])


def test_the_made_up_folder_reads_as_one_and_has_tastes(tmp_path):
    generate_mind(tmp_path, seed=0, num_users=40, num_news=80)
    train = read_mind(tmp_path / "train", news_of=[tmp_path / "dev"])
    dev = read_mind(tmp_path / "dev", news_of=[tmp_path / "train"])
    assert train.news_labels.tolist() == dev.news_labels.tolist()
    assert not any(train.repairs.values())
    assert set(train.categories) <= set(TOPICS)
    old = read_mind(tmp_path / "train")
    assert old.num_news < train.num_news == 80
    assert np.isin(dev.news_labels[dev.shown_news], old.news_labels).mean() < 0.9  # and shows news that train has not
    known = 0
    for impression in range(dev.num_impressions):
        shown, clicked = dev.shown_in(impression)
        before = dev.categories[dev.history_of(dev.impression_users[impression])]
        assert clicked.sum() == 1
        known += dev.categories[shown[clicked][0]] in before
    assert known / dev.num_impressions > 0.75
