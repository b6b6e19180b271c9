"""What is this client: a woman, under thirty? Inferred from uploads, or from a released item table and a few items.

The attacker knows the attribute of some clients (its own accounts, or people who told) and learns from what it sees of
them; it is scored on the others. Each client is scored once, by a model that has seen none of its fold. Beside the
area under the curve stand the majority class and a control: the same attack on shuffled labels, which must find
nothing.
"""

from typing import NamedTuple

import numpy as np

from fedjax_rec.attacks.item_sets import named_items
from fedjax_rec.attacks.ridge import fit_ridge
from fedjax_rec.attacks.roc import Roc, roc
from fedjax_rec.attacks.uploads import Uploads, joined_rows
from fedjax_rec.data.interactions import Interactions


class Inferred(NamedTuple):
    """How well an attribute was inferred.

    Attributes:
      curve: with ``auc`` and ``auc_error``, the mean over folds and its standard error.
      accuracy: share of clients right, where as many are called positive as are known to be.
      majority: what calling everybody the commoner class gets right.
      control: of the same attack on labels shuffled over the clients.
    """

    curve: Roc
    accuracy: float
    majority: float
    control: Roc


def binary_attributes(interactions: Interactions, *, age: int = 30) -> dict[str, np.ndarray]:
    """Attributes of users as yes or no, bool ``[users]`` each: "gender" (woman) and "age" (below ``age`` years).

    Empty for a data set without user attributes; users without an entry count as no.

    Args:
      interactions: such as MovieLens 100K or 1M.
      age: in years; MovieLens 1M has age groups that start at 1, 18, 25, 35, 45, 50 and 56.
    """
    found = {}
    if "gender" in interactions.user_attributes:
        found["gender"] = np.asarray(interactions.user_attributes["gender"]) == "F"
    if "age" in interactions.user_attributes:
        ages = np.asarray(interactions.user_attributes["age"])
        found["age"] = (ages > 0) & (ages < age)
    return found


def upload_features(uploads: Uploads) -> np.ndarray:
    """What one upload says of a client, float32 ``[uploads, 2 items]``: the rows it names, and each row's residual.

    Both parts are scaled to norm 1, so that long histories and large clips weigh no more than short ones. The residual
    is the bias's change, which for matrix factorisation is the error of the item's score. Where every row was sent, as
    with noise on the whole table, the first part says nothing.

    Args:
      uploads: of clients, or of the sums that they are in.
    """
    named = named_items(uploads).astype(np.float32)
    residual = joined_rows(uploads)[:, :, 0]
    return np.concatenate([_unit(named), _unit(residual)], axis=1)


def item_features(items: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
    """What a few known items say of a client, without and with a released table, float32 ``[clients, features]``.

    The attacker sees no upload, only the released table, and knows some items of each client from elsewhere. A table
    says which items are alike, so what is known of one serves for the others.

    Args:
      items: bool ``[clients, items]``, those that the attacker knows.
      table: float32 ``[items, dim]``, released; None for the items themselves.
    """
    indicators = _unit(items.astype(np.float32))
    if table is None:
        return indicators
    centred = table - table.mean(0)
    return _unit(items.astype(np.float32) @ (centred / np.maximum(centred.std(), 1e-12)))


def infer_attributes(
    features: np.ndarray, labels: dict[str, np.ndarray], *, seed: int, groups: np.ndarray, num_folds: int = 5
) -> dict[str, Inferred]:
    """Learns attributes from some clients and scores the others, fold by fold.

    Args:
      features: float ``[clients, features]``.
      labels: bool ``[clients]`` each, by name.
      seed: of folds and of the control's shuffle.
      groups: int ``[clients]``, clients that stay in one fold together: the members of a sum, or each its own.
      num_folds: at least 2.

    Raises:
      ValueError: if all clients have the same label.
    """
    for name, column in labels.items():
        if column.all() or not column.any():
            raise ValueError(f"All {len(column)} clients have the same {name}, so there is nothing to infer.")
    rng = np.random.default_rng(seed)
    truth = np.stack(list(labels.values()), axis=1)
    targets = np.concatenate([truth, rng.permutation(truth)], axis=1)  # the control keeps whole people
    names, places = np.unique(groups, return_inverse=True)
    fold_of = rng.permutation(np.arange(len(names)) % num_folds)[places]
    scores = np.zeros(targets.shape)
    for fold in range(num_folds):
        out = fold_of == fold
        scores[out] = fit_ridge(features[~out], targets[~out].astype(np.float64))(features[out])
    curves = [_over_folds(*columns, fold_of) for columns in zip(scores.T, targets.T, strict=True)]
    found = {}
    for place, (name, column) in enumerate(labels.items()):
        called = scores[:, place] >= np.sort(scores[:, place])[::-1][column.sum() - 1]
        majority = float(max(column.mean(), 1 - column.mean()))
        found[name] = Inferred(curves[place], float((called == column).mean()), majority, curves[len(labels) + place])
    return found


def _over_folds(scores: np.ndarray, labels: np.ndarray, fold_of: np.ndarray) -> Roc:
    folds = np.unique(fold_of)
    return roc([scores[fold_of == fold] for fold in folds], [labels[fold_of == fold] for fold in folds])


def _unit(table: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return (table / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
