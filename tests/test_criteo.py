"""Risk: a click log is read askew: columns shifted, missing taken for zero, or a hash that changes or mixes columns."""

import gzip

import numpy as np
import pytest

from experiments._criteo import fields_of, split_of
from fedjax_rec.data.criteo import (
    NUM_CATEGORIES,
    NUM_INTEGERS,
    frequent_categories,
    hash_categories,
    place_categories,
    read_criteo,
)
from fedjax_rec.data.silos import silo_data
from fedjax_rec.models.fields import dense_values


def line(label="0", integers=None, categories=None):
    integers, categories = integers or {}, categories or {}
    cells = [label, *(integers.get(i, "") for i in range(NUM_INTEGERS))]
    return "\t".join([*cells, *(categories.get(c, "") for c in range(NUM_CATEGORIES))]) + "\n"


def sample(num_rows, seed=0):
    """A generated log: integers with a long tail, categories of a few words, a tenth of all missing."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        integers = {i: str(int(rng.geometric(0.1)) - 2) for i in range(NUM_INTEGERS) if rng.random() > 0.1}
        words = {c: f"{int(rng.zipf(1.5)) % 1000 * 7919:08x}" for c in range(NUM_CATEGORIES) if rng.random() > 0.1}
        lines.append(line(str(int(rng.random() < 0.3)), integers, words))
    return lines


def test_cells_land_in_their_columns_and_missing_is_not_zero(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text(line("1", {0: "5", 12: "-2"}, {0: "68fd1e64", 25: "0"}) + line("0", {1: "0"}, {25: "ffffffff"}))
    rows = read_criteo(file)
    assert rows.labels.tolist() == [1, 0]
    assert len(rows) == 2
    assert (rows.integers[0, 0], rows.integers[0, 12], rows.integers[1, 1]) == (5, -2, 0)
    assert np.isnan(rows.integers).sum() == 2 * NUM_INTEGERS - 3
    assert (rows.categories[0, 0], rows.categories[0, 25], rows.categories[1, 25]) == (0x68FD1E64, 0, 0xFFFFFFFF)
    assert (rows.categories == -1).sum() == 2 * NUM_CATEGORIES - 3
    assert rows.repairs == {}


def test_gzip_and_the_first_lines_only(tmp_path):
    lines = sample(30)
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("".join(lines))
    packed.write_bytes(gzip.compress("".join(lines).encode()))
    whole, same, few = read_criteo(plain), read_criteo(packed), read_criteo(packed, max_rows=7)
    for name in ("labels", "integers", "categories"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(same, name))
        np.testing.assert_array_equal(getattr(whole, name)[:7], getattr(few, name))
    np.testing.assert_array_equal(whole.part(3, 5).categories, whole.categories[3:5])


def test_repairs_are_counted(tmp_path):
    file = tmp_path / "bad.txt"
    bad = line("1", {0: "seven", 1: "3.5", 2: "-"}, {0: "xyz", 1: "123456789"})
    file.write_text(line("?") + bad + line("0") + line(""))
    rows = read_criteo(file)
    assert rows.labels.tolist() == [1, 0]
    assert np.isnan(rows.integers).all()
    assert (rows.categories == -1).all()
    assert rows.repairs == {
        "rows without a label of 0 or 1 dropped": 2,
        "unusable integers set to missing": 3,
        "unusable categories set to missing": 2,
    }


def test_what_is_no_such_file_is_refused_by_its_line(tmp_path):
    file = tmp_path / "bad.txt"
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing"):
        read_criteo(tmp_path / "missing.txt")
    file.write_text(line() + line() + "1\t2\t3\n")
    with pytest.raises(ValueError, match=r"Line 3 of .* has 3 columns and needs 40"):
        read_criteo(file)
    file.write_text(line() + line().partition("\t")[2])
    with pytest.raises(ValueError, match=r"Line 2 .* has 39 columns .* test file, which has no labels"):
        read_criteo(file)
    for text in ("", line("?")):
        file.write_text(text)
        with pytest.raises(ValueError, match="no usable row"):
            read_criteo(file)
    with pytest.raises(ValueError, match="max_rows"):
        read_criteo(file, max_rows=0)


def test_buckets_are_fixed_spread_and_differ_by_column():
    categories = np.tile(np.arange(2000, dtype=np.int64)[:, None] * 4093, (1, NUM_CATEGORIES))
    categories[0, 3] = -1
    buckets = hash_categories(categories, 50)
    assert buckets[0, 3] == -1
    assert (buckets[:, 0] >= 0).all()
    assert buckets.max() < 50
    counts = np.bincount(buckets[:, 0], minlength=50)
    assert 0 < counts.min() <= counts.max() < 2.5 * counts.mean()
    assert np.mean(buckets[1:, 0] == buckets[1:, 1]) < 0.06  # 1 / 50 by chance
    with_python = [[bucket_of(0x68FD1E64, 0, 1000), bucket_of(7, 1, 1000), bucket_of(0xFFFFFFFF, 2, 1000)]]
    assert hash_categories(np.array([[0x68FD1E64, 7, 0xFFFFFFFF]]), 1000).tolist() == with_python
    assert with_python[0][:2] == [294, 57]  # fixed for all time: a model trained yesterday reads the rows of today
    with pytest.raises(ValueError, match="num_buckets must be at least 1; got 0"):
        hash_categories(categories, 0)


def bucket_of(category, column, num_buckets):
    """The same with Python's unbounded integers."""
    factor, modulus = 0x9E3779B97F4A7C15, 2**64
    mixed = (category + (column << 32)) * factor % modulus
    mixed = (mixed ^ (mixed >> 32)) * factor % modulus
    return (mixed >> 32) % num_buckets


def test_rare_new_and_missing_categories(tmp_path):
    file = tmp_path / "train.txt"
    words = ["a", "b", "a", "", "c", "b", "a"]
    file.write_text("".join(line("0", {}, {0: word} if word else {}) for word in words))
    rows = read_criteo(file)
    frequent = frequent_categories(rows, min_count=2)
    assert [len(words) for words in frequent] == [2] + [0] * (NUM_CATEGORIES - 1)
    places = place_categories(rows.categories, frequent)
    assert places[:, 0].tolist() == [0, 1, 0, -1, 2, 1, 0]
    assert place_categories(np.full((1, NUM_CATEGORIES), 0xFFFFFFFF), frequent)[0, :2].tolist() == [2, 0]
    with pytest.raises(ValueError, match="min_count must be at least 1"):
        frequent_categories(rows, min_count=0)


def test_a_log_becomes_fields_and_silos_of_contiguous_blocks(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("".join(sample(50)))
    rows = read_criteo(file)
    fields, batch = fields_of(rows, hash_categories(rows.categories, 5), [5] * NUM_CATEGORIES)
    assert (fields.num_fields, fields.num_rows) == (39, 13 + 26 * 5)
    np.testing.assert_array_equal((batch.values != 0).sum(1) <= 39, True)
    dense = dense_values(fields, batch)
    np.testing.assert_allclose(
        dense[:, :13], np.nan_to_num(np.sign(rows.integers) * np.log1p(abs(rows.integers))), rtol=1e-6
    )
    assert dense[:, 13:].sum() == (rows.categories >= 0).sum()
    split = split_of(rows, 4)
    (bucket,) = silo_data(split, np.arange(4), use_ratings=True).clients.buckets
    assert sorted(bucket.item_ids.reshape(-1).tolist()) == list(range(40))
    assert all(np.diff(ids).tolist() == [1] * 9 for ids in bucket.item_ids)
    np.testing.assert_array_equal(bucket.labels, rows.labels[bucket.item_ids])
    assert split.validation.item_ids.tolist() == list(range(40, 45))
    assert split.test.item_ids.tolist() == list(range(45, 50))
