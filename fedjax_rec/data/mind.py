"""Reader of MIND folders: news with titles, what users clicked, and which news each impression showed.

Wu et al., 2020, "MIND: A Large-scale Dataset for News Recommendation". A folder has two tables, separated by tabs:

    behaviors.tsv   impression id, user id, time, clicked news before (by blanks), shown news as ID-1 (clicked) or ID-0
    news.tsv        news id, category, subcategory, title, abstract, url, entities of the title, of the abstract

A user has one history here, the longest of its impressions': in the published parts it does not grow within a part.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedjax_rec.data.clients import ClientData, client_data_from_examples
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.tables import decode

_NEWS_FIELDS, _BEHAVIOUR_FIELDS = 4, 5
_MOST_BAD_LINES = 0.01


@dataclass(frozen=True, eq=False)
class Mind:
    """One part of MIND (train or dev) over a catalogue. All arrays are read-only.

    Attributes:
      name: of the folder.
      news_labels: str ``[num_news]``, ids as in the files, ascending; news i is row i.
      titles: str ``[num_news]``.
      categories: str ``[num_news]``.
      subcategories: str ``[num_news]``.
      user_labels: str ``[num_users]``, ascending.
      history_offsets: int64 ``[num_users + 1]``, where each user's history starts.
      history_news: int32, clicked news of the histories, oldest first.
      impression_users: int32 ``[num_impressions]``.
      impression_times: str ``[num_impressions]``, as in the file.
      shown_offsets: int64 ``[num_impressions + 1]``, where the news of each impression start.
      shown_news: int32, news of the impressions.
      clicked: bool, beside ``shown_news``.
      repairs: counted repairs made while reading.
    """

    name: str
    news_labels: np.ndarray
    titles: np.ndarray
    categories: np.ndarray
    subcategories: np.ndarray
    user_labels: np.ndarray
    history_offsets: np.ndarray
    history_news: np.ndarray
    impression_users: np.ndarray
    impression_times: np.ndarray
    shown_offsets: np.ndarray
    shown_news: np.ndarray
    clicked: np.ndarray
    repairs: Mapping[str, int]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def num_news(self) -> int:
        """Size of the catalogue."""
        return len(self.news_labels)

    @property
    def num_users(self) -> int:
        """Users with at least one impression."""
        return len(self.user_labels)

    @property
    def num_impressions(self) -> int:
        """Impressions that were kept."""
        return len(self.impression_users)

    def history_of(self, user: int) -> np.ndarray:
        """Clicked news of one user, oldest first, int32 ``[n]``."""
        return self.history_news[self.history_offsets[user] : self.history_offsets[user + 1]]

    def shown_in(self, impression: int) -> tuple[np.ndarray, np.ndarray]:
        """News of one impression, int32 ``[n]``, and which were clicked, bool ``[n]``."""
        here = slice(self.shown_offsets[impression], self.shown_offsets[impression + 1])
        return self.shown_news[here], self.clicked[here]

    @property
    def histories(self) -> Interactions:
        """The histories as rows in their order; a news that a user clicked again counts at its first place only."""
        return self._rows([self.history_of(user) for user in range(self.num_users)])

    @property
    def clicks(self) -> Interactions:
        """As `histories`, with what users clicked in the impressions of this part behind them."""
        owner = np.repeat(self.impression_users, np.diff(self.shown_offsets))[self.clicked]
        order = np.argsort(owner, kind="stable")
        clicked = self.shown_news[self.clicked][order]
        starts = np.searchsorted(owner[order], np.arange(self.num_users + 1))
        own = [clicked[a:b] for a, b in itertools.pairwise(starts)]
        return self._rows([np.concatenate([self.history_of(user), own[user]]) for user in range(self.num_users)])

    def _rows(self, lists: Sequence[np.ndarray]) -> Interactions:
        kept = [items[np.sort(np.unique(items, return_index=True)[1])] for items in lists]
        offsets, item_ids = _ragged(kept, np.int32)
        return Interactions(
            name=self.name,
            offsets=offsets,
            item_ids=item_ids,
            file_rows=np.arange(len(item_ids)),
            num_items=self.num_news,
            timestamps=None,
            ratings=None,
            user_labels=self.user_labels,
            item_labels=self.news_labels,
            item_titles=self.titles,
        )


def read_mind(folder: str | Path, *, news_of: Sequence[str | Path] = ()) -> Mind:
    """Reads a MIND folder.

    Repairs, counted: lines of behaviors.tsv with too few fields (refused when more than 1 %), news that no news.tsv
    lists, shown news without -0 or -1, impressions that nothing is left of. Counted only: users without history, and
    impressions whose history is not their user's longest.

    Args:
      folder: with behaviors.tsv and news.tsv.
      news_of: further folders whose news.tsv joins the catalogue. Parts that are read with each other's folders have
        the same news ids.

    Raises:
      FileNotFoundError: a sentence, if a file is missing.
      ValueError: naming the line that cannot be read.
    """
    folder = Path(folder)
    news = {}
    for source in (folder, *map(Path, news_of)):
        _read_news(source / "news.tsv", news)
    labels = sorted(news)
    if not labels:
        raise ValueError(f"{folder / 'news.tsv'} lists no news.")
    number = {label: place for place, label in enumerate(labels)}
    lines, bad_lines = _read_behaviours(folder / "behaviors.tsv")

    repairs = {"malformed lines dropped": bad_lines}
    repairs |= dict.fromkeys(("unknown news in histories dropped", "unknown shown news dropped"), 0)
    repairs |= dict.fromkeys(("shown news without -0 or -1 dropped", "impressions without news dropped"), 0)
    histories, users, times, shown, clicks = {}, [], [], [], []
    raw_histories = []
    for user, time, history, impressions in lines:
        clicked_before = [number[label] for label in history if label in number]
        repairs["unknown news in histories dropped"] += len(history) - len(clicked_before)
        items, marks = [], []
        for entry in impressions:
            label, dash, mark = entry.rpartition("-")
            if not dash or mark not in ("0", "1"):
                repairs["shown news without -0 or -1 dropped"] += 1
            elif label not in number:
                repairs["unknown shown news dropped"] += 1
            else:
                items.append(number[label])
                marks.append(mark == "1")
        if len(clicked_before) >= len(histories.get(user, ())):
            histories[user] = clicked_before
        raw_histories.append((user, clicked_before))
        if not items:
            repairs["impressions without news dropped"] += 1
            continue
        users.append(user)
        times.append(time)
        shown.append(items)
        clicks.append(marks)
    repairs["users without history"] = sum(not history for history in histories.values())
    repairs["impressions with another history"] = sum(histories[user] != history for user, history in raw_histories)
    user_labels = sorted(histories)
    user_number = {label: place for place, label in enumerate(user_labels)}
    history_offsets, history_news = _ragged([histories[label] for label in user_labels], np.int32)
    shown_offsets, shown_news = _ragged(shown, np.int32)
    columns = [np.array([news[label][place] for label in labels]) for place in range(3)]
    return Mind(
        name=folder.name,
        news_labels=np.array(labels),
        categories=columns[0],
        subcategories=columns[1],
        titles=columns[2],
        user_labels=np.array(user_labels, dtype=str),
        history_offsets=history_offsets,
        history_news=history_news,
        impression_users=np.array([user_number[user] for user in users], np.int32),
        impression_times=np.array(times, dtype=str),
        shown_offsets=shown_offsets,
        shown_news=shown_news,
        clicked=_ragged(clicks, bool)[1],
        repairs=repairs,
    )


def mind_clients(
    mind: Mind, *, max_history: int = 50, max_impressions: int = 20, max_shown: int = 50, num_buckets: int = 5
) -> ClientData:
    """Users as clients whose examples are their history and their impressions, for `impression_loss`.

    Labels: 0 = of the history; k = clicked in the user's k-th impression; -k = shown there and not clicked.

    Args:
      mind: a part.
      max_history: news of a history, the newest.
      max_impressions: of a user, the first in the file.
      max_shown: news of an impression; the clicked ones are kept, then the first of the others.
      num_buckets: see `client_data`.

    Raises:
      ValueError: for bounds below 1 or no users.
    """
    if min(max_history, max_impressions, max_shown) < 1:
        raise ValueError(
            "max_history, max_impressions and max_shown must be at least 1; got "
            f"{max_history}, {max_impressions}, {max_shown}."
        )
    order = np.argsort(mind.impression_users, kind="stable")
    starts = np.searchsorted(mind.impression_users[order], np.arange(mind.num_users + 1))
    examples = []
    for user in range(mind.num_users):
        history = mind.history_of(user)[-max_history:]
        items, labels = [history], [np.zeros(len(history))]
        for number, impression in enumerate(order[starts[user] : starts[user + 1]][:max_impressions], start=1):
            shown, clicked = mind.shown_in(impression)
            kept = np.sort(np.argsort(~clicked, kind="stable")[:max_shown])
            items.append(shown[kept])
            labels.append(np.where(clicked[kept], number, -number))
        examples.append((np.concatenate(items), np.concatenate(labels)))
    return client_data_from_examples(examples, num_items=mind.num_news, num_buckets=num_buckets)


def _read_news(file: Path, news: dict[str, tuple[str, str, str]]) -> None:
    for place, line in enumerate(_lines(file), start=1):
        fields = line.split("\t")
        if len(fields) < _NEWS_FIELDS or not fields[0]:
            raise ValueError(
                f"Line {place} of {file} has {len(fields)} fields separated by tabs, and at least {_NEWS_FIELDS} are "
                "needed (news id, category, subcategory, title); mend or remove it."
            )
        news.setdefault(fields[0], (fields[1], fields[2], fields[3]))


def _read_behaviours(file: Path) -> tuple[list[tuple[str, str, list[str], list[str]]], int]:
    """(user, time, history, shown) of each good line, and how many lines were not."""
    good, first_bad, lines = [], None, _lines(file)
    for place, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != _BEHAVIOUR_FIELDS or not fields[1]:
            first_bad = first_bad or (place, len(fields))
            continue
        good.append((fields[1], fields[2], fields[3].split(), fields[4].split()))
    bad = len(lines) - len(good)
    if bad > _MOST_BAD_LINES * len(lines):
        place, found = first_bad
        raise ValueError(
            f"Line {place} of {file} has {found} fields separated by tabs, and {_BEHAVIOUR_FIELDS} are needed "
            f"(impression id, user id, time, history, shown news); {bad} of {len(lines)} lines are like that, more "
            f"than {_MOST_BAD_LINES:.0%}. Is it another file?"
        )
    return good, bad


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. A MIND folder holds behaviors.tsv and news.tsv, as in the unpacked "
            "MINDsmall_train.zip; download it from the data set's page, since its licence does not allow copies."
        )
    text = decode(file.read_bytes()).replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def _ragged(lists: Sequence[Sequence], dtype) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return offsets, np.array([value for values in lists for value in values], dtype)
