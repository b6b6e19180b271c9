"""Shadow models: the same training over and over, on random halves of the users, by the real round.

A membership attack is calibrated on models whose members it knows. Every model here, target or shadow, is trained on
its own coins: each user is in with probability 1/2, and each of some chosen interactions of a user who is in, too. All
run one compiled program: who is in is an argument, as a population of the same shapes with other contents.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import Client, ClientData
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.federated.round import RoundKeys, Rounds

# Side by side, models wait for the largest cohort among them, and on two CPU cores none of them is any faster for it:
# 0.14 to 0.23 s a round and model instead of 0.10 to 0.12 (MovieLens 100K, 4 to 8 models).
AT_ONCE = {"cpu": 1}
ACCELERATOR_AT_ONCE = 8
RESERVED_USERS_SHARE = 0.15
MEMBER_SHARE = (1 - RESERVED_USERS_SHARE) / 2  # of the users, in expectation


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """Which users and interactions each model was trained on.

    Attributes:
      users: bool ``[models, users]``, who was in.
      rows: bool ``[models, rows]``, which interactions were in: a part of those of the users who were in.
      core: bool ``[rows]``, in whenever their user is: what a user-level attack holds of the user.
      tossed: bool ``[rows]``, in with probability 1/2 whenever their user is: targets of the interaction-level attack.
      reserved: bool ``[rows]``, never in: the interaction-level attack's population.
      reserved_users: bool ``[users]``, never in: the user-level attack's population.
    """

    users: np.ndarray
    rows: np.ndarray
    core: np.ndarray
    tossed: np.ndarray
    reserved: np.ndarray
    reserved_users: np.ndarray


def toss_coins(
    train: Interactions,
    *,
    num_models: int,
    seed: int,
    tossed_share: float = 0.2,
    reserved_share: float = 0.1,
    reserved_users_share: float = RESERVED_USERS_SHARE,
) -> Design:
    """Independent fair coins for every model: what an attack scores is then exactly the game that DP bounds.

    Halves of equal size would be easier to balance, but a target's coin could then be told from the shadows' coins.

    Args:
      train: all interactions.
      num_models: targets and shadows together.
      seed: of the coins and roles.
      tossed_share, reserved_share: of each user's interactions; the rest is its core.
      reserved_users_share: of the users.

    Raises:
      ValueError: for fewer than 4 models, which calibrate nothing.
    """
    if num_models < 4:
        raise ValueError(f"An attack needs at least 4 models, one as target and 3 as shadows; got {num_models}.")
    rng = np.random.default_rng(seed)
    luck, user = rng.random(train.num_interactions), train.user_ids
    rank = np.empty(train.num_interactions)  # place of each row among its user's, at random, in (0, 1)
    rank[np.lexsort([luck, user])] = np.arange(train.num_interactions) - train.offsets[:-1][user] + 0.5
    rank /= np.maximum(train.counts_per_user, 1)[user]
    reserved, tossed = rank > 1 - reserved_share, (rank > 1 - reserved_share - tossed_share)
    tossed &= ~reserved
    reserved_users = rng.random(train.num_users) < reserved_users_share
    users = (rng.random((num_models, train.num_users)) < 0.5) & ~reserved_users
    coins = rng.random((num_models, train.num_interactions)) < 0.5
    core = ~reserved & ~tossed
    rows = users[:, user] & (core | (tossed & coins))
    return Design(users, rows, core, tossed, reserved, reserved_users)


def only_train(train: Interactions) -> Split:
    """A split that withholds nothing, as the attack trains on everyone's rows."""
    nothing = train.take(np.zeros(train.num_interactions, bool))
    return Split(train, nothing, nothing, nothing, rule="everything in train", candidates=None)


def keep_rows(buckets: tuple[Client, ...], keep: jax.Array, offsets: np.ndarray) -> tuple[Client, ...]:
    """The population with only some of its interactions, in buckets of the same shapes.

    What negatives avoid shrinks along with it: nothing of a left-out interaction remains.

    Args:
      buckets: of `client_data`, laid out from the same rows.
      keep: bool ``[rows]``.
      offsets: int ``[users + 1]``, where each user's rows start.
    """
    starts = jnp.asarray(np.append(offsets[:-1], 0), jnp.int32)
    return tuple(_keep_in_bucket(bucket, keep, starts) for bucket in buckets)


def _keep_in_bucket(bucket: Client, keep: jax.Array, starts: jax.Array) -> Client:
    if bucket.slots is not None:
        raise ValueError("Interactions are left out of clients laid out with client_data(...), not of given examples.")

    def one(client):
        place = jnp.arange(client.item_ids.shape[0])
        real = (place < client.length) & keep.at[starts[client.client_id] + place].get(mode="fill", fill_value=False)
        order = jnp.argsort(~real, stable=True)
        real, length = real[order], real.sum().astype(jnp.int32)
        items = jnp.where(real, client.item_ids[order], client.num_items)
        width = client.excluded.shape[0]
        excluded = jnp.sort(jnp.pad(items, (0, max(width - len(items), 0)), constant_values=client.num_items))[:width]
        labels = jnp.where(real, client.labels[order], 0.0)
        return dataclasses.replace(
            client, length=length, item_ids=items, labels=labels, excluded=excluded, num_excluded=length
        )

    return jax.vmap(one)(bucket)


def train_models(
    rounds: Rounds,
    clients: ClientData,
    train: Interactions,
    design: Design,
    *,
    measure: Callable[[Any, Any], Any],
    record: Any,
    num_rounds: tuple[int, ...],
    span_size: int,
    key: jax.Array,
    at_once: int | None = None,
) -> dict[int, Any]:
    """Trains every model of a design and keeps what an attacker measures of what the server releases.

    Args:
      rounds: made for ``clients``. Who is out stays in the id space with no data, and adds nothing to any sum. Cohorts
        are drawn from all, so a member takes part, and noise is added, as in the run that is attacked; divide by the
        members that a cohort has in expectation, ``sampler._replace(expected_size=...)``, to keep the server's step.
      clients: what the rounds were made for, with the rule "strict" for negatives.
      train: whose rows the clients hold.
      design: who is in.
      measure: ``(Shared, record) -> arrays``, what an attacker sees in what is released after each of ``num_rounds``.
      record: arrays that ``measure`` reads beside, such as the candidates' data; not compiled into it.
      num_rounds: rounds after which to measure, ascending.
      span_size: of the rounds.
      key: of initial parameters, cohorts, client draws and noise; each model has its own.
      at_once: models that train side by side, by a vmap; chosen for the backend by default.

    Returns:
      For each of ``num_rounds``, what ``measure`` gives with a leading ``[models]`` axis, as NumPy arrays.
    """
    if clients.exclusion != "strict":
        raise ValueError(f"Negatives must avoid what is in training and nothing else; got {clients.exclusion!r}.")
    num_models, found = len(design.users), {reached: [] for reached in num_rounds}
    at_once = at_once or AT_ONCE.get(jax.default_backend(), ACCELERATOR_AT_ONCE)
    prepare = jax.jit(partial(keep_rows, offsets=train.offsets))
    init, measure, buckets = jax.jit(rounds.init), jax.jit(measure), jax.device_put(clients.buckets)

    def trained(keep, key):
        init_key, cohort_key, client_key, noise_key = jax.random.split(key, 4)
        population, results, done = prepare(buckets, keep), {}, 0
        state, private = init(init_key)
        keys = RoundKeys(cohort_key, client_key, noise_key)
        for reached in num_rounds:
            while done < reached:
                span = min(span_size, reached - done)
                state, private, _ = rounds.run(state, private, keys, span, population=population)
                done += span
            results[reached] = measure(state.shared, record)
        return results

    for first in range(0, num_models, at_once):
        some = np.arange(first, min(first + at_once, num_models))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(some, jnp.uint32))
        args = jnp.asarray(design.rows[some]), keys
        if len(some) == 1:
            results = jax.tree.map(lambda x: x[None], trained(*(x[0] for x in args)))
        else:
            results = jax.vmap(trained)(*args)
        for reached, value in results.items():
            found[reached].append(jax.tree.map(np.asarray, value))
    return {reached: jax.tree.map(lambda *x: np.concatenate(x), *parts) for reached, parts in found.items()}
