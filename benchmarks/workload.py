"""The work that every program in a speed comparison does: one round of federated logistic matrix factorisation.

A client holds its positive items and four uniform negatives for each, in one fixed shuffled order. The model is an
item table `[num_items, 32]`, an output vector `[32]` and a bias; the logit of item i is `items[i] @ out + bias`. A
client runs one epoch of SGD on the mean binary cross-entropy of batches of 256 in the given order (the last batch is
as long as what is left) and sends trained minus received parameters; the server adds the mean over clients (FedAvg:
McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data").

Only NumPy is imported here, because the programs of other frameworks import this file inside their own environments.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIM = 32
BATCH_SIZE = 256
LEARNING_RATE = 0.1
NUM_NEGATIVES = 4  # for each positive

ML_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"


@dataclass(frozen=True, eq=False)
class Workload:
    """Every client's examples of one local epoch, ragged, in the order in which they are trained on.

    Attributes:
      offsets: int64 `[num_clients + 1]`; client c owns the examples `offsets[c]:offsets[c + 1]`.
      item_ids: int32 `[num_examples]`, 0..num_items-1. An item may come up more than once in a client.
      labels: float32 `[num_examples]`, 1 = positive, 0 = negative.
      num_items: rows of the item table; may be more than the data names.
    """

    offsets: np.ndarray
    item_ids: np.ndarray
    labels: np.ndarray
    num_items: int

    @property
    def num_clients(self) -> int:
        """How many clients take part in every round."""
        return len(self.offsets) - 1

    @property
    def num_examples(self) -> int:
        """How many examples all clients hold together."""
        return len(self.item_ids)

    @property
    def sizes(self) -> np.ndarray:
        """How many examples each client holds, int64 `[num_clients]`."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) over all arrays and num_items: equal fingerprints mean equal work."""
        digest = hashlib.sha256(str(self.num_items).encode())
        for array in (self.offsets, self.item_ids, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields each client's `(item_ids int32 [n], labels float32 [n])`, in client order, without copying."""
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.item_ids[start:stop], self.labels[start:stop]


def clients(path: str | Path, *, num_items: int | None = None, seed: int = 0) -> Workload:
    """Reads a GroupLens `u.data` file (user, item, ...) and draws every client's examples.

    Users and items are numbered by their sorted original ids. Clients draw from one NumPy generator one after another
    (negatives, then the order), so the result is a function of the file, `num_items` and `seed` alone.

    Args:
      path: the `u.data` file.
      num_items: rows of the item table; negatives are uniform over it. None = as many as the file names.
      seed: seed of the negatives and of the order.

    Returns:
      The `Workload`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not numbers, or `num_items` is smaller than what the file names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; download {ML_100K_URL}, unpack it, and pass its u.data.")
    try:
        table = np.loadtxt(path, dtype=np.int64, usecols=(0, 1), ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is not a u.data file of whole numbers (user, item, ...) a line: {error}.") from error
    return _from_pairs(table[:, 0], table[:, 1], num_items=num_items, seed=seed)


def synthetic_clients(*, num_clients: int = 943, num_items: int = 1682, seed: int = 0) -> Workload:
    """Made-up clients of the shape of MovieLens 100K, for when there is no data: see `write_u_data` for the draw."""
    users, items = _synthetic_pairs(num_clients, num_items, seed)
    return _from_pairs(users, items, num_items=num_items, seed=seed)


def write_u_data(path: str | Path, *, num_clients: int = 943, num_items: int = 1682, seed: int = 0) -> None:
    """Writes a made-up `u.data` file, so that programs that only read a file can be tried without MovieLens.

    Lengths are log-normal with MovieLens 100K's median of 65, at least 20 and at most 737 and half of the items; a
    client's items are distinct, drawn by a long-tailed popularity (about 1 / rank). Every rating is 3, every time 0.

    Raises:
      ValueError: `num_clients` is less than 1 or `num_items` less than 40.
    """
    users, items = _synthetic_pairs(num_clients, num_items, seed)
    rows = np.stack([users + 1, items + 1, np.full_like(users, 3), np.zeros_like(users)], axis=1)
    np.savetxt(path, rows, fmt="%d", delimiter="\t")


def find_u_data(data_dir: str | Path) -> Path:
    """Returns `data_dir/u.data` or `data_dir/ml-100k/u.data`.

    Raises:
      FileNotFoundError: neither is there.
    """
    for candidate in (Path(data_dir) / "u.data", Path(data_dir) / "ml-100k" / "u.data"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"There is no u.data in {data_dir} or {data_dir}/ml-100k; download {ML_100K_URL} there.")


def initial_params(num_items: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters before round 0, float32: items `[num_items, DIM]` normal, out `[DIM]` 0.1, bias `[]` 0."""
    items = np.random.default_rng(seed).standard_normal((num_items, DIM), dtype=np.float32)
    return {"items": items, "out": np.full(DIM, 0.1, np.float32), "bias": np.zeros((), np.float32)}


def _from_pairs(users: np.ndarray, items: np.ndarray, *, num_items: int | None, seed: int) -> Workload:
    """Draws the examples of every user of the pairs, int64 `[num_positives]` each."""
    _, user_ids, counts = np.unique(users, return_inverse=True, return_counts=True)
    names, item_ids = np.unique(items, return_inverse=True)
    num_items = len(names) if num_items is None else num_items
    if num_items < len(names):
        raise ValueError(
            f"num_items={num_items} is smaller than the {len(names)} items in the data; pass at least that."
        )
    grouped = np.split(item_ids[np.argsort(user_ids, kind="stable")], np.cumsum(counts)[:-1])
    rng = np.random.default_rng(seed)
    examples = [_examples(positives, num_items, rng) for positives in grouped]
    return Workload(
        offsets=np.concatenate([[0], np.cumsum(counts * (1 + NUM_NEGATIVES))]).astype(np.int64),
        item_ids=np.concatenate([ids for ids, _ in examples]).astype(np.int32),
        labels=np.concatenate([labels for _, labels in examples]),
        num_items=num_items,
    )


def _examples(positives: np.ndarray, num_items: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One client's item ids and float32 labels, shuffled."""
    negatives = rng.integers(0, num_items, NUM_NEGATIVES * len(positives))
    ids = np.concatenate([positives, negatives])
    labels = (np.arange(len(ids)) < len(positives)).astype(np.float32)
    order = rng.permutation(len(ids))
    return ids[order], labels[order]


def _synthetic_pairs(num_clients: int, num_items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """0-based users and items, int64 `[num_positives]` each, grouped by user."""
    if num_clients < 1 or num_items < 40:
        raise ValueError(f"A made-up data set needs 1 client and 40 items, not {num_clients} and {num_items}.")
    rng = np.random.default_rng(seed)
    counts = np.clip(rng.lognormal(np.log(65), 1.0, num_clients).astype(np.int64), 20, min(737, num_items // 2))
    log_popularity = -np.log(np.arange(1, num_items + 1))
    # The top n of log-popularity plus Gumbel noise are n draws without replacement (Vieira 2014, "Gumbel-max trick").
    items = [np.argsort(-(log_popularity + rng.gumbel(size=num_items)))[:n] for n in counts]
    return np.repeat(np.arange(num_clients), counts), np.concatenate(items)
