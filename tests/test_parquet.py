"""Risk: a data set that was written reads back as another one, or a bad file is taken for a good one."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedjax_rec.data import from_rows, load, write_interactions


@pytest.fixture
def rated():
    data = from_rows(
        [7, 7, 9, 9, 12],
        ["a", "b", "b", "c, d", "a"],
        ratings=[1.0, 5.0, 0.0, 2.5, 4.0],
        timestamps=[30, 10, 5, 5, 8],
        unknown_rating=0.0,
        name="rated",
    )
    return dataclasses.replace(
        data, user_attributes={"age": np.array([20, 30, 40]), "zip": np.array(["1*", "2*", "3*"])}
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_what_is_written_is_read_back(rated, tmp_path, suffix):
    if suffix == ".csv":
        with pytest.raises(ValueError, match=r"unknown ratings.*write \.parquet"):
            write_interactions(tmp_path / "x.csv", rated)
        rated = dataclasses.replace(rated, ratings=np.nan_to_num(rated.ratings, nan=3.0))
    path = write_interactions(tmp_path / "new" / f"rated{suffix}", rated)
    found = load(path, cache=False)
    for key in ("offsets", "item_ids", "timestamps", "user_labels", "item_labels"):
        np.testing.assert_array_equal(getattr(found, key), getattr(rated, key))
    if suffix == ".parquet":
        assert {key: list(v) for key, v in found.user_attributes.items()} == {
            "age": [20, 30, 40],
            "zip": ["1*", "2*", "3*"],
        }
    np.testing.assert_array_equal(found.ratings, rated.ratings)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half-written is left


def test_implicit_rows_have_no_more_columns_than_they_need(rated, tmp_path):
    implicit = dataclasses.replace(rated, ratings=None, timestamps=None, user_attributes={})
    path = write_interactions(tmp_path / "x.parquet", implicit)
    assert pq.read_table(path).column_names == ["user", "item"]
    assert load(path, cache=False).ratings is None


def test_columns_by_any_known_name_times_and_nulls(tmp_path):
    path = tmp_path / "other.parquet"
    when = pa.array([1_000_000, None, 3_000_000], pa.timestamp("us"))
    pq.write_table(
        pa.table({"userId": pa.array([1, 2, None]), "movieId": ["x", "y", "z"], "rating": [1.0, 2.0, 3.0], "ts": when}),
        path,
    )
    found = load(path, cache=False)
    assert found.num_interactions == 2
    assert found.repairs["rows without user id dropped"] == 1
    assert sorted(found.timestamps.tolist()) == [0, 1]
    assert found.user_labels.tolist() == ["1", "2"]
    with pytest.raises(ValueError, match="has no user id"):
        load(path, cache=False, strict=True)


def test_refusals(rated, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.parquet or \.csv"):
        write_interactions(tmp_path / "x.json", rated)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="no Parquet file, or damaged"):
        load(tmp_path / "broken.parquet", cache=False)
    pq.write_table(pa.table({"who": [1], "item": [2]}), tmp_path / "named.parquet")
    with pytest.raises(ValueError, match=r"No column of .* looks like user ids"):
        load(tmp_path / "named.parquet", cache=False)
    assert load(tmp_path / "named.parquet", cache=False, user_column="who").num_interactions == 1
    pq.write_table(pa.table({"user": [1], "item": [2], "rating": ["good"]}), tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="holds no numbers"):
        load(tmp_path / "words.parquet", cache=False)
