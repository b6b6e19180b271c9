"""A small made-up MIND: news of topics, with titles of the topics' words, and users who like some topics.

Written in MIND's own format (Wu et al., 2020, "MIND: A Large-scale Dataset for News Recommendation"), so that whatever
reads the real data set runs on it. Its figures say nothing about the real one.
"""

from pathlib import Path

import numpy as np

TOPICS = {
    "sports": "match team league coach goal season striker final defeat transfer stadium injury",
    "finance": "market shares bank profit inflation bonds merger rates dollar budget dividend debt",
    "health": "vaccine clinic diet patients doctors sleep virus therapy surgery vitamins allergy fever",
    "travel": "beach airline hotel island passport cruise mountain hostel luggage museum itinerary visa",
    "music": "album concert guitar festival singer chorus vinyl orchestra drummer lyrics remix encore",
    "weather": "storm snow flood drought heatwave forecast tornado rain frost hurricane lightning hail",
    "food": "recipe oven bakery noodles pepper vineyard chef dessert roast spices kitchen brunch",
    "cars": "engine hybrid sedan brakes dealership mileage pickup recall battery tyres diesel coupe",
}
COMMON = "new after says year how why before first best what report today people week"


def generate_mind(
    folder: Path,
    *,
    seed: int,
    num_users: int = 200,
    num_news: int = 240,
    new_share: float = 0.2,
    impressions_per_user: int = 4,
    shown_size: int = 10,
) -> None:
    """Writes folder/train and folder/dev, each with behaviors.tsv and news.tsv.

    Users have two topics that they mostly click. An impression shows one news that the user clicks, drawn by taste, and
    others, drawn by nobody's. Some news are new in dev: no training click can be of them.

    Args:
      folder: made if it is not there.
      seed: of everything.
      num_users: in both parts.
      num_news: in both parts together.
      new_share: of the news that only dev shows.
      impressions_per_user: in train; dev has half as many.
      shown_size: news of an impression.
    """
    rng = np.random.default_rng(seed)
    names = list(TOPICS)
    topic = rng.integers(len(names), size=num_news)
    is_new = np.arange(num_news) >= num_news * (1 - new_share)
    labels = [f"N{i:05d}" for i in rng.permutation(num_news)]
    lines = [
        f"{labels[i]}\t{names[topic[i]]}\tmade-up\t{_title(rng, names[topic[i]])}\t\t\t[]\t[]" for i in range(num_news)
    ]
    tastes = np.full((num_users, len(names)), 0.25)
    for user in range(num_users):
        tastes[user, rng.choice(len(names), 2, replace=False)] = 8.0
    old = np.flatnonzero(~is_new)
    histories = [_clicks(rng, tastes[u], topic, old, rng.integers(3, 15)) for u in range(num_users)]
    parts = {"train": (old, impressions_per_user), "dev": (np.arange(num_news), -(-impressions_per_user // 2))}
    for part, (pool, count) in parts.items():
        rows = []
        for user, number in np.ndindex(num_users, count):
            (clicked,) = _clicks(rng, tastes[user], topic, pool, 1)
            others = rng.choice(np.setdiff1d(pool, clicked), shown_size - 1, replace=False)
            shown = rng.permutation([f"{labels[clicked]}-1", *(f"{labels[i]}-0" for i in others)])
            before = " ".join(labels[i] for i in histories[user])
            time = f"11/{11 + number % 4}/2019 {9 + number % 12}:{user % 60:02d}:00 AM"
            rows.append(f"{len(rows) + 1}\tU{user:04d}\t{time}\t{before}\t{' '.join(shown)}")
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "behaviors.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        listed = [line for line, new in zip(lines, is_new, strict=True) if part == "dev" or not new]
        (folder / part / "news.tsv").write_text("\n".join(listed) + "\n", encoding="utf-8")


def _title(rng, name: str) -> str:
    words = [*rng.choice(TOPICS[name].split(), 3, replace=False), *rng.choice(COMMON.split(), 3, replace=False)]
    return " ".join(rng.permutation(words)).capitalize()


def _clicks(rng, taste, topic, pool, count) -> np.ndarray:
    weights = taste[topic[pool]]
    return rng.choice(pool, count, replace=False, p=weights / weights.sum())
