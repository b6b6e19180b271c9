"""Damaged, wrong or missing data end in a sentence with the line or the way out, or in a counted repair."""

import dataclasses
import gzip
import zipfile

import numpy as np
import pytest

from fedjax_rec.data import Interactions, from_rows, load, load_candidates, load_file, load_split, statistics


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    for name in ("FEDJAX_REC_DATA", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Names and places


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("movielens/100", "movielens/100k"),
        ("ml-100k", "movielens/100k"),
        ("synthetc", "synthetic"),
        ("gowala", "gowalla"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_and_lists_all(name, suggestion):
    with pytest.raises(
        ValueError, match=f"Unknown data set '{name}', did you mean '{suggestion}'.*movielens/latest-small"
    ):
        load(name)


def test_an_unknown_split_lists_all():
    with pytest.raises(ValueError, match="Unknown data set 'movielens/100k/u6', did you mean 'movielens/100k/u"):
        load_split("movielens/100k/u6")


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("synthetic", "num_usrs", "synthetic has no option 'num_usrs', did you mean 'num_users'"),
        ("movielens/1m", "strikt", "did you mean 'strict'"),
        ("gowalla", "strict", "gowalla has no option 'strict'; it has none"),
        ("rows.csv", "user_colum", "rows.csv has no option 'user_colum', did you mean 'user_column'"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(name, option, message):
    with pytest.raises(ValueError, match=message):
        load(name, **{option: 1})


@pytest.mark.parametrize(
    ("name", "checksum"),
    [
        ("100k", "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
        ("1m", "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    ],
)
def test_a_missing_movielens_prints_address_checksum_and_folder(tmp_path, name, checksum):
    with pytest.raises(FileNotFoundError) as caught:
        load(f"movielens/{name}", data_dir=tmp_path, download=False)
    for part in (f"https://files.grouplens.org/datasets/movielens/ml-{name}.zip", checksum, f"into {tmp_path}"):
        assert part in str(caught.value)


def test_a_download_without_tensorflow_says_so(monkeypatch):
    monkeypatch.setattr("fedjax_rec.data.tfds._has_tensorflow", lambda: False)
    with pytest.raises(FileNotFoundError, match=r"needs tensorflow .* and it is not installed") as caught:
        load("movielens/20m")
    assert "neither data_dir= nor FEDJAX_REC_DATA names a folder" in str(caught.value)


def test_other_missing_files_say_where_they_belong(tmp_path):
    for call in (lambda: load("gowalla", data_dir=tmp_path), lambda: load_split("gowalla")):
        with pytest.raises(
            FileNotFoundError, match=r"Download train.txt and test.txt from .*\n.* put them into .*/gowalla/"
        ):
            call()
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere does not exist"):
        load("movielens/100k", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*gone.csv"):
        load(tmp_path / "gone.csv")
    with pytest.raises(FileNotFoundError, match="There is no candidate file"):
        load_candidates(tmp_path / "gone.negative", from_rows([1], [1], name="one"))


def test_a_candidate_file_that_is_missing_says_where_it_belongs(tmp_path):
    write(tmp_path / "ml-1m" / "ratings.dat", "1::1::5::10\n")
    with pytest.raises(FileNotFoundError, match=r"put it beside ratings\.dat"):
        load_split("movielens/1m/ncf", data_dir=tmp_path)


def test_a_folder_of_another_release_is_not_taken_for_this_one(tmp_path):
    folder = tmp_path / "ml-latest-small"
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n1,1,4.0,10\n")
    assert load("movielens/latest-small", data_dir=folder).num_interactions == 1
    with pytest.raises(FileNotFoundError, match="movielens/25m"):
        load("movielens/25m", data_dir=folder, download=False)


# Damaged archives


def test_a_truncated_gzip_names_file_and_line(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{user}\t{item}\t5\t{time}" for user, item, time in rng.integers(1, 10**6, (20_000, 3))]
    whole = gzip.compress("\n".join(lines).encode())
    path = write(tmp_path / "rows.rating.gz", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows.rating.gz is a truncated or damaged gzip file: it ends in line \d{4}"):
        load(path)
    write(tmp_path / "rows.rating.gz", b"plain text")
    with pytest.raises(ValueError, match=r"it ends in line 1 .Not a gzipped file"):
        load(path)


def test_a_truncated_zip_names_the_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "1\t1\t5\t10\n" * 100)
    path = tmp_path / "ml-100k.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ml-100k.zip is not a whole zip file .* download it again"):
        load("movielens/100k", data_dir=tmp_path)
    path.write_bytes(whole.replace(b"1\t1\t5\t10\n1\t1", b"1\t1\t5\t10\n1\t2", 1))  # the checksum no longer fits
    with pytest.raises(ValueError, match=r"u\.data in .*ml-100k.zip is damaged"):
        load("movielens/100k", data_dir=tmp_path)


def test_a_movielens_cut_at_a_line_end_is_counted_and_refused_when_strict(tmp_path):
    write(tmp_path / "ml-1m" / "ratings.dat", "1::1::5::10\n1::2::5::10\n")
    assert load("movielens/1m", data_dir=tmp_path).repairs == {"rows fewer than published": 1_000_207}
    with pytest.raises(ValueError, match="has 2 rows and 1,000,209 were published"):
        load("movielens/1m", data_dir=tmp_path, strict=True)


# Lines that cannot be read

GOOD = "1\t5\t3\t10\n2\t6\t4\t20\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.rating", GOOD + "3\t7\t5\n4\t8\t5\t40\n", r"Line 3 of .*x.rating has 3 fields, and 4 separated by '\\t'"),
        ("x.rating", GOOD + "3\t7\t5\t30\t9\n", r"Line 3 of .*x.rating has 5 fields"),
        ("x.rating", GOOD + "\n3\t7\t5\t30\n", r"Line 3 of .*x.rating has 0 fields"),
        ("x.rating", "1,5,3,10\n", r"Line 1 of .*x.rating has 1 field .* pass separator="),
        ("x.dat", GOOD, r"Line 1 of .*x.dat has 1 field separated by '::'"),
        (
            "x.rating",
            GOOD + "3\t7\tfive\t30\n",
            r"Line 3 of .*x.rating has 'five' as its rating, which is not a number",
        ),
        ("x.rating", GOOD + "3\t7\t5\tnoon\n", r"Line 3 of .*x.rating has 'noon' as its timestamp"),
        ("x.csv", "user,item,rating\n1,2,3\n1,2\n", r"Line 3 of .*x.csv has 2 fields, and 3 separated by ','"),
        ("x.csv", "1,2,3\n4,5,6\n", r'holds only numbers and no column names; pass format="triplets"'),
        ("x.csv", "user;item\n1;2\n", r"No column of .*x.csv looks like user ids .*separated by ','.*separator="),
        ("x.csv", "user,title\n1,2\n", r"looks like item ids .columns: user, title"),
        ("x.csv", "user,user_id,item\n1,2,3\n", r"Several columns of .*x.csv look like a user: user, user_id"),
        ("x.csv", "user,item\n", "has a header and no line below it"),
        ("x.csv", "", "x.csv is empty"),
        ("x.inter", "user_id\titem_id\n1\t2\n", r"must be a typed header such as user_id:token, and holds 'user_id'"),
        ("x.txt", "1 2 3\n\n2 4\n", r"Line 2 of .*x.txt is empty"),
        ("x.txt", "1\n2\n", r"x.txt.* holds no usable interaction"),
        ("x.xlsx", "PK", r"The suffix '.xlsx' of x.xlsx does not tell its format"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, file, content, message):
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        load(path)
    assert not (tmp_path / "cache").exists()


def test_a_named_column_that_is_not_there_lists_those_that_are(tmp_path):
    path = write(tmp_path / "x.csv", "user,item\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'buyer'; its columns are user, item"):
        load(path, user_column="buyer")
    with pytest.raises(ValueError, match="has no column names; drop the"):
        load_file(write(tmp_path / "x.rating", GOOD), user_column="user")
    with pytest.raises(ValueError, match="Unknown format 'excel'; choose one of named"):
        load_file(path, format="excel")


def test_movielens_side_files_name_their_bad_line(tmp_path):
    folder = tmp_path / "ml-1m"
    write(folder / "ratings.dat", "1::1::5::10\n")
    write(folder / "movies.dat", "1::A::Drama\n2::B\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*movies.dat has 2 fields, and 3 separated by '::'"):
        load("movielens/1m", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("(1,5)\t6\n1\t5\t6\n", r"Line 2 of .* does not begin with \(user,item\)"),
        ("(1,5)\t77\n", "names item 77, which rows does not have .1 such entries"),
        ("(9,5)\t6\n", "names user 9, which rows does not have"),
    ],
)
def test_a_candidate_file_of_other_data_is_refused(tmp_path, content, message):
    data = from_rows([1, 2], [5, 6], name="rows")
    path = write(tmp_path / "x.negative", content)
    with pytest.raises(ValueError, match=message):
        load_candidates(path, data)
    with pytest.raises(ValueError, match="Unknown ids='rank'"):
        load_candidates(write(tmp_path / "y.negative", "(1,5)\t6\n"), data, ids="rank")


# Rows that can be mended


@pytest.mark.parametrize(
    ("bad_line", "repair"),
    [
        ("1,6,nan,20", "rows with unusable ratings dropped"),
        ("1,6,,20", "rows with unusable ratings dropped"),
        ("1,6,9,20", "rows with unusable ratings dropped"),
        ("1,6,-inf,20", "rows with unusable ratings dropped"),
        ("-1,6,3,20", "rows with user id below 0 dropped"),
        ("1,-6,3,20", "rows with item id below 0 dropped"),
        ("1,5,3,20", "duplicate rows dropped"),
        ("1,6,3,-20", "unusable timestamps set to unknown"),
        ("1,6,3,nan", "unusable timestamps set to unknown"),
    ],
)
def test_a_bad_row_is_counted_or_named_when_strict(tmp_path, bad_line, repair):
    path = write(tmp_path / "rows.csv", f"user,item,rating,timestamp\n1,5,4,30\n{bad_line}\n2,5,1,10\n")
    data = load(path, rating_range=(1, 5))
    assert data.repairs[repair] == 1
    assert data.num_interactions == (3 if "timestamps" in repair else 2)
    with pytest.raises(ValueError, match=r"Line 3 of .*rows.csv .*load with strict=False"):
        load(path, rating_range=(1, 5), strict=True)


def test_rows_without_an_id_are_counted(tmp_path):
    path = write(tmp_path / "rows.csv", "user,item\nann,x\n,y\nbob,\n")
    data = load(path)
    assert data.user_labels.tolist() == ["ann"]
    assert data.repairs == {"rows without user id dropped": 1, "rows without item id dropped": 1}


def test_of_duplicates_the_latest_stays_and_then_the_last_in_the_file():
    by_time = from_rows([1, 1, 1], [7, 7, 8], timestamps=[30, 20, 10], ratings=[1, 2, 3], name="times")
    assert (by_time.ratings.tolist(), by_time.file_rows.tolist()) == ([3, 1], [2, 0])
    by_row = from_rows([1, 1, 1], [7, 7, 8], ratings=[1, 2, 3], name="rows")
    assert (by_row.ratings.tolist(), by_row.file_rows.tolist()) == ([2, 3], [1, 2])
    assert by_time.repairs == by_row.repairs == {"duplicate rows dropped": 1}


def test_many_duplicates_in_a_wide_catalogue_are_found_by_sorting():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9000, 30_000), rng.integers(0, 9000, 30_000)  # more cells than are marked one by one
    users[20_000:], items[20_000:] = users[:10_000], items[:10_000]
    data = from_rows(users, items, name="wide")
    assert data.num_interactions == len(set(zip(users.tolist(), items.tolist(), strict=True)))
    assert data.repairs["duplicate rows dropped"] == 30_000 - data.num_interactions


def test_data_of_only_bad_rows_is_refused():
    with pytest.raises(ValueError, match=r"nothing holds no usable interaction \(2 rows read, repairs"):
        from_rows([1, 2], [1, 2], ratings=[np.nan, 7], rating_range=(1, 5), name="nothing")
    with pytest.raises(ValueError, match="ratings has 1 entries and needs 2"):
        from_rows([1, 2], [1, 2], ratings=[1], name="ragged")
    with pytest.raises(ValueError, match="one-dimensional"):
        from_rows([[1, 2]], [[1, 2]], name="square")


# The value itself


def parts(**changes):
    whole = from_rows([1, 2, 2], [1, 1, 2], timestamps=[1, 2, 3], name="whole")
    return {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_ids": np.array([0, 0, 1])}, "item_ids must be int32, and is int64"),
        ({"item_ids": np.array([0, 0, 2], np.int32)}, r"item_ids must lie in 0..1, and span 0..2"),
        ({"item_ids": np.array([0, 0, -1], np.int32)}, r"item_ids must lie in 0..1, and span -1..0"),
        ({"offsets": np.array([0, 2, 1])}, "offsets must rise from 0 to the 3 rows"),
        ({"timestamps": np.array([1, 2])}, "timestamps has 2 entries and needs 3"),
        ({"user_labels": np.array([1])}, "user_labels has 1 entries and needs 2"),
        ({"item_titles": np.array(["a"])}, "item_titles has 1 entries and needs 2"),
        ({"user_attributes": {"age": np.array([1, 2, 3])}}, r"user_attributes\['age'\] has 3 entries and needs 2"),
    ],
)
def test_interactions_refuse_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Interactions(**parts(**changes))


def test_interactions_cannot_be_changed_by_accident():
    data = Interactions(**parts(user_attributes={"age": np.array([1, 2])}))
    for values in (data.item_ids, data.offsets, data.user_ids, data.item_counts, data.user_attributes["age"]):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
    with pytest.raises(ValueError, match=r"take needs a bool mask \[3\], and got int64"):
        data.take(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="has no rows"):
        statistics(data.take(np.zeros(3, bool)))
