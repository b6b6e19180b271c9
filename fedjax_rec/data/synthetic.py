"""A seeded world with latent taste, a long tail and drifting time, for when no data set is at hand.

The generator is a topic model over sessions. Items belong to two of a few dozen topics and have a Zipf-Mandelbrot
popularity; a user mixes a few topics; a row is drawn from the user's topics or, now and then, from plain popularity,
and survives with a probability that fades with the distance from the item's moment in time. So collaborative filtering
has something to find that popularity has not, the head is long, and the newest rows differ from the oldest.
"""

from dataclasses import dataclass

import numpy as np

from fedjax_rec.data.interactions import Interactions

# Shape of the world. Chosen so that the default size has the activity and popularity curve of MovieLens 100K, and EASE
# its lead over popularity; tests/test_synthetic.py holds both.
_MOST_TOPICS, _NUM_GENRES = 24, 8
_ACTIVITY_SIGMA = 1.2  # of the log-normal number of rows beyond the smallest
_ZIPF_EXPONENT, _ZIPF_SHIFT = 1.6, 0.04  # weight of rank r of M items: (r / M + shift) ** -exponent
_TASTE_CONCENTRATION = 0.1  # Dirichlet; small = few topics a user
_BACKGROUND_PROB = 0.3  # rows drawn from plain popularity
_SESSION_FOCUS_PROB = 0.4  # rows that stay with the topic of their session
_ROWS_PER_SESSION = 15
_SPAN_SECONDS, _FIRST_SECOND = 3 * 365 * 86_400, 1_577_836_800  # three years from 2020-01-01
_FADE_SHARE, _FADE_FLOOR = 0.25, 0.3  # an item fades towards the floor at this share of the span
_BLOCK_USERS = 100_000  # bounds memory; part of the seed's meaning, so never tuned


@dataclass(frozen=True, eq=False)
class _World:
    num_topics: int
    topics: np.ndarray  # int32 [num_items, 2]
    moments: np.ndarray  # float32 [num_items], share of the span at which an item is most popular
    appeal: np.ndarray  # float32 [num_items], what everybody adds to a rating
    cumulative: np.ndarray  # float64 [3 num_items], ends of member weights, list l within (l, l + 1]
    members: np.ndarray  # int32 [3 num_items], item of each entry; list 0 is plain popularity, list 1 + t topic t


def synthetic(
    *,
    num_users: int = 943,
    num_items: int = 1682,
    num_interactions: int | None = None,
    min_per_user: int = 20,
    ratings: bool = False,
    seed: int = 0,
) -> Interactions:
    """Generates interactions; the same arguments give the same data.

    Args:
      num_users: clients; up to a million are practical.
      num_items: catalogue.
      num_interactions: about how many rows; None = 106 a user, as in MovieLens 100K, or a quarter of a small catalogue.
      min_per_user: no user has fewer rows; none has more than half the catalogue.
      ratings: also draw explicit ratings 1..5 from user, item and taste; else feedback is implicit.
      seed: of the world and of everybody in it.

    Returns:
      `Interactions` named "synthetic", with titles, 8 genres, timestamps in seconds (some tied, as in real logs) and
      the user attribute "favourite_genre".

    Raises:
      ValueError: when so many rows for each user do not fit the catalogue.
    """
    most = num_items // 2
    mean = (
        max(min_per_user, min(106, num_items / 4)) if num_interactions is None else num_interactions / max(num_users, 1)
    )
    if num_users < 1 or num_items < 2 or min_per_user < 1:
        raise ValueError(
            f"synthetic needs a user, two items and a row a user, and got num_users={num_users}, "
            f"num_items={num_items}, min_per_user={min_per_user}."
        )
    if not min_per_user <= mean <= most:
        raise ValueError(
            f"{mean:.4g} rows a user do not fit between min_per_user={min_per_user} and half of num_items={num_items}; "
            "change num_interactions, min_per_user or num_items."
        )
    world = _make_world(np.random.default_rng([seed, 0]), num_items)
    blocks = [
        _make_block(
            np.random.default_rng([seed, 1 + start]),
            world,
            min(_BLOCK_USERS, num_users - start),
            mean,
            min_per_user,
            most,
        )
        for start in range(0, num_users, _BLOCK_USERS)
    ]
    counts, items, times, stars, favourites = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    labels = np.arange(1, num_items + 1)
    genres = np.zeros((num_items, _NUM_GENRES), bool)
    genres[np.arange(num_items)[:, None], world.topics % _NUM_GENRES] = True
    return Interactions(
        name="synthetic",
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        item_ids=items,
        file_rows=np.arange(len(items)),
        num_items=num_items,
        timestamps=times,
        ratings=stars if ratings else None,
        user_labels=np.arange(1, num_users + 1),
        item_labels=labels,
        item_titles=np.char.add("Item ", labels.astype(str)),
        item_genres=genres,
        genre_names=tuple(f"genre {number}" for number in range(1, _NUM_GENRES + 1)),
        user_attributes={"favourite_genre": favourites},
    )


def _make_world(rng: np.random.Generator, num_items: int) -> _World:
    rank = rng.permutation(num_items)
    weight = ((rank + 1) / num_items + _ZIPF_SHIFT) ** -_ZIPF_EXPONENT
    num_topics = max(2, min(_MOST_TOPICS, num_items // 4))
    first = (rng.permutation(num_items) % num_topics).astype(np.int32)  # no topic is empty
    second = (first + rng.integers(1, num_topics, size=num_items, dtype=np.int32)) % num_topics
    topics = np.stack([first, second], axis=1)
    lists = np.concatenate([np.zeros(num_items, np.int32), 1 + first, 1 + second])
    weights = np.concatenate([weight, weight, 0.4 * weight])  # the second topic is a minor one
    order = np.argsort(lists, kind="stable")
    lists, weights = lists[order], weights[order]
    totals = np.bincount(lists, weights, minlength=1 + num_topics)
    ends = np.cumsum(weights) - (np.cumsum(totals) - totals)[lists]
    cumulative = lists + np.clip(ends / totals[lists], 0, 1)
    members = np.tile(np.arange(num_items, dtype=np.int32), 3)[order]
    # A popular item is liked a little better: a quarter of a star between head and tail.
    appeal = rng.normal(0, 0.35, num_items) + 0.25 * (1 - rank / num_items)
    moments = rng.random(num_items, np.float32)
    return _World(num_topics, topics, moments, appeal.astype(np.float32), cumulative, members)


def _make_block(rng, world: _World, num_users: int, mean: float, smallest: int, most: int) -> tuple[np.ndarray, ...]:
    """Rows per user, then items, seconds and stars of each row in user and time order, then favourite genres."""
    counts = _activity(rng, num_users, mean=mean, smallest=smallest, most=most)
    taste = rng.standard_gamma(_TASTE_CONCENTRATION, (num_users, world.num_topics)) + 1e-9
    taste /= taste.sum(axis=1, keepdims=True)
    taste_ends = (np.arange(num_users)[:, None] + np.minimum(np.cumsum(taste, axis=1), 1)).ravel()
    sessions = 1 + counts // _ROWS_PER_SESSION
    joined, stay = rng.random(num_users) * 0.9, rng.beta(0.5, 2.0, num_users)
    focus_offsets = np.cumsum(sessions) - sessions
    focus = _draw_topics(rng, taste_ends, np.repeat(np.arange(num_users), sessions), world.num_topics)

    def draw(users: np.ndarray, uniform: bool) -> tuple[np.ndarray, np.ndarray]:
        session = (rng.random(len(users)) * sessions[users]).astype(np.int64)
        when = joined[users] + (1 - joined[users]) * stay[users] * session / sessions[users]
        topics = np.where(
            rng.random(len(users)) < _SESSION_FOCUS_PROB,
            focus[focus_offsets[users] + session],
            _draw_topics(rng, taste_ends, users, world.num_topics),
        )
        lists = np.where(rng.random(len(users)) < _BACKGROUND_PROB, 0, 1 + topics)
        if uniform:
            items = rng.integers(len(world.moments), size=len(users), dtype=np.int32)
            alive = np.ones(len(users), bool)
        else:
            place = np.searchsorted(world.cumulative, lists + rng.random(len(users)), side="left")
            items = world.members[np.minimum(place, len(world.members) - 1)]
            fade = np.exp(-np.abs(when - world.moments[items]) / _FADE_SHARE)
            alive = rng.random(len(users)) < _FADE_FLOOR + (1 - _FADE_FLOOR) * fade
        return np.where(alive, items, -1), when

    users, items, when = _distinct_rows(draw, counts, len(world.moments))
    seconds = _FIRST_SECOND + (when * _SPAN_SECONDS).astype(np.int64) + rng.integers(0, 90, len(users)) * 20
    order = np.lexsort([seconds, users])
    users, items, seconds = users[order], items[order], seconds[order]
    match = taste[users, world.topics[items, 0]] + 0.4 * taste[users, world.topics[items, 1]]
    mood = rng.normal(0, 0.4, num_users)
    stars = 3.0 + mood[users] + world.appeal[items] + 1.4 * match + rng.normal(0, 0.85, len(users))
    stars = np.clip(np.rint(stars), 1, 5).astype(np.float32)
    return counts, items, seconds, stars, (np.argmax(taste, axis=1) % _NUM_GENRES).astype(np.int32)


def _activity(rng: np.random.Generator, num_users: int, *, mean: float, smallest: int, most: int) -> np.ndarray:
    """Log-normal rows per user between `smallest` and `most`, int64, with about the asked mean in every draw."""
    excess = rng.lognormal(0.0, _ACTIVITY_SIGMA, num_users)
    scale = (mean - smallest) / excess.mean()
    for _ in range(4):  # the cut at `most` takes rows away; give them back to the others
        counts = np.minimum(smallest + scale * excess, most)
        scale *= (mean - smallest) / max(counts.mean() - smallest, 1e-9)
    return np.rint(counts).astype(np.int64)


def _draw_topics(rng: np.random.Generator, taste_ends: np.ndarray, users: np.ndarray, num_topics: int) -> np.ndarray:
    place = np.searchsorted(taste_ends, users + rng.random(len(users)), side="left")
    return np.clip(place - users * num_topics, 0, num_topics - 1)


def _distinct_rows(draw, counts: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws until user `u` has `counts[u]` distinct items: users, items and times of the rows, in user order.

    Each pass draws for the users that still miss rows, twice what they miss. After eight passes a user with an unusual
    taste gets uniform items; counts stay below half the catalogue, so every pass at least halves what is missing.
    """
    missing, attempt = counts.copy(), 0
    open_users, open_items, open_when = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0)
    done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while missing.any():
        users = np.repeat(np.arange(len(counts)), np.where(missing > 0, 2 * missing + 4, 0))
        items, when = draw(users, attempt >= 8)
        alive = items >= 0
        users = np.concatenate([open_users, users[alive]])
        items, when = np.concatenate([open_items, items[alive]]), np.concatenate([open_when, when[alive]])
        # Of equal pairs the first drawn stays, and of too many pairs the first drawn too: no bias to small item ids.
        first = np.sort(np.unique(users * num_items + items, return_index=True)[1])
        first = first[np.argsort(users[first], kind="stable")]
        users, items, when = users[first], items[first], when[first]
        have = np.bincount(users, minlength=len(counts))
        place = np.arange(len(users)) - np.repeat(np.cumsum(have) - have, have)
        full = (missing > 0) & (have >= counts)
        ready = full[users] & (place < counts[users])
        done.append((users[ready], items[ready], when[ready]))
        still = ~full[users]
        open_users, open_items, open_when = users[still], items[still], when[still]
        missing = np.where((missing > 0) & ~full, counts - have, 0)
        attempt += 1
    users, items, when = (np.concatenate(parts) for parts in zip(*done, strict=True))
    order = np.argsort(users, kind="stable")
    return users[order], items[order].astype(np.int32), when[order]
