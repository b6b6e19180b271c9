"""Splits and candidates as files that others can read, and a hash that says whether they are still the same.

A folder holds `split.csv` (part, user, item and row of the data file a line), `candidates.negative` if there are
candidates (`(user,item) negative negative ...`, the format of He et al., 2017, "Neural Collaborative Filtering"), and
`split.json` with the rule, the fingerprint and the sha256 of both files. The rows are the data set's own, so its
licence holds for them: share the hash, or the file where the licence allows it.
"""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np

from fedjax_rec.data.files import load_candidates
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split, with_candidates
from fedjax_rec.data.ties import label_hash, mix64, seed_salt

PARTS = ("train", "validation", "test", "history")
ROWS, CANDIDATES, ABOUT = "split.csv", "candidates.negative", "split.json"


def draw_candidates(split: Split, *, num_negatives: int = 99, seed: int = 0) -> Split:
    """The same split with negatives for each user's test item, drawn once from the items the user never touched.

    Uniform and without replacement: the items whose seeded hash with the user is smallest, on every platform the same.
    Rank them with `evaluation.evaluate_candidates`; `expect_sampled` gives the mean over all such draws.

    Args:
      split: with test rows.
      num_negatives: negatives a user; users with fewer untouched items get all of them.
      seed: of the hash.

    Raises:
      ValueError: if ``num_negatives`` is not between 1 and the catalogue's size.
    """
    if not 1 <= num_negatives <= split.num_items:
        raise ValueError(f"num_negatives must be between 1 and the {split.num_items} items; got {num_negatives}.")
    users = mix64(label_hash(split.train.user_labels) + seed_salt(seed))
    items = label_hash(split.train.item_labels)
    candidates = np.full((split.num_users, num_negatives), split.num_items, np.int32)
    parts = [getattr(split, part) for part in PARTS]
    for user in np.unique(split.test.user_ids):
        order = np.argsort(mix64(users[user] ^ items), kind="stable")
        touched = np.concatenate([p.item_ids[p.offsets[user] : p.offsets[user + 1]] for p in parts])
        drawn = order[~np.isin(order, touched)][:num_negatives]
        candidates[user, : len(drawn)] = drawn
    return with_candidates(split, candidates)


def freeze(split: Split, folder: str | Path) -> str:
    """Writes a split, and its candidates if it has some, to a folder that is empty or not there yet.

    Returns:
      The split's fingerprint (sha256, hex), which `load_frozen` will ask for.

    Raises:
      FileExistsError: if the folder holds something.
      ValueError: for candidates of users without a test item, or with several.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a frozen split is never overwritten. Choose another folder.")
    with open(folder / ROWS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("part", "user", "item", "file_row"))
        for name in PARTS:
            part = getattr(split, name)
            labels = part.user_labels[part.user_ids], part.item_labels[part.item_ids]
            writer.writerows(zip([name] * part.num_interactions, *labels, part.file_rows, strict=True))
    if split.candidates is not None:
        (folder / CANDIDATES).write_text(_candidate_lines(split), encoding="utf-8")
    about = {"rule": split.rule, "tie_rule": split.tie_rule, "seed": split.seed, "data": split.train.name}
    about |= {"fingerprint": split.fingerprint, "repairs": dict(split.repairs), "sha256": _hashes(folder)}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return split.fingerprint


def load_frozen(folder: str | Path, interactions: Interactions) -> Split:
    """Reads a frozen split back onto the data set that it was made of.

    Args:
      folder: as given to `freeze`.
      interactions: the same data set, loaded as it was then.

    Raises:
      FileNotFoundError: if there is no frozen split.
      ValueError: if a file was changed, a row is not in the data, or the fingerprint is another one.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"There is no frozen split in {folder}: {ABOUT} is missing.")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    found = _hashes(folder)
    for name in sorted(about["sha256"].keys() | found.keys()):
        if found.get(name) != about["sha256"].get(name):
            raise ValueError(f"{folder / name} is missing, new or changed: its sha256 is not the one in {ABOUT}.")
    with open(folder / ROWS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    place = {row: index for index, row in enumerate(interactions.file_rows.tolist())}
    part_of = np.full(interactions.num_interactions, -1)
    users, items = interactions.user_labels[interactions.user_ids], interactions.item_labels[interactions.item_ids]
    for line, row in enumerate(rows, start=2):
        index = place.get(int(row["file_row"]))
        if index is None or (str(users[index]), str(items[index])) != (row["user"], row["item"]):
            raise ValueError(
                f"Line {line} of {folder / ROWS} names user {row['user']}, item {row['item']} in row {row['file_row']} "
                f"of the data; {interactions.name} has another or none there. Load the data as they were loaded then."
            )
        part_of[index] = PARTS.index(row["part"])
    parts = (interactions.take(part_of == code) for code in range(len(PARTS)))
    split = Split(*parts, rule=about["rule"], tie_rule=about["tie_rule"], seed=about["seed"], repairs=about["repairs"])
    if (folder / CANDIDATES).is_file():
        negatives = load_candidates(folder / CANDIDATES, interactions).negatives
        split = with_candidates(split, negatives)
    if split.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"The split in {folder} was frozen with fingerprint {about['fingerprint'][:12]}, and these data give "
            f"{split.fingerprint[:12]}: ratings, times or ids of {interactions.name} differ from what they were."
        )
    return split


def _candidate_lines(split: Split) -> str:
    lines = []
    users, items = split.train.user_labels, split.train.item_labels
    counts = np.diff(split.test.offsets)
    listed = np.flatnonzero((split.candidates < split.num_items).any(axis=1))
    for user in listed:
        if counts[user] != 1:
            raise ValueError(f"User {users[user]} has candidates and {counts[user]} test items; the file wants one.")
        positive = items[split.test.item_ids[split.test.offsets[user]]]
        negatives = split.candidates[user][split.candidates[user] < split.num_items]
        lines.append(" ".join([f"({users[user]},{positive})", *(str(items[i]) for i in negatives)]))
    return "\n".join(lines) + "\n"


def _hashes(folder: Path) -> dict[str, str]:
    files = [folder / name for name in (ROWS, CANDIDATES) if (folder / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
