"""Every way into `load` gives the same data, and the cache never gives other data than its source."""

import csv
import gzip
import hashlib
import importlib.resources
import importlib.resources.abc
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedjax_rec.data import from_rows, load, load_candidates, load_file, statistics, tfds

# user, item, rating, timestamp; user 9 and item 30 sort after 10 and 4 as text, so labels must sort as numbers.
ROWS = [(10, 30, 4, 50), (9, 4, 5, 60), (10, 4, 3, 40), (9, 30, 1, 60), (9, 7, 2, 10), (10, 7, 5, 50)]
DATA_NAMES = ("FEDJAX_REC_DATA", "TFDS_DATA_DIR")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine with no data set and an empty cache."""
    for name in DATA_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def reference():
    users, items, ratings, times = np.array(ROWS).T
    return from_rows(users, items, ratings=ratings, timestamps=times, name="rows")


def write_100k(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    flags = {4: 1, 7: 2, 30: 18}
    lines = []
    for item in (4, 7, 30):
        genres = "|".join(str(int(place in (flags[item], 5))) for place in range(19))
        lines.append(f"{item}|Été {item} (1995)|01-Jan-1995||http://example.org/{item}|{genres}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    (folder / "u.genre").write_text("".join(f"g{place}|{place}\n" for place in range(19)) + "\n")
    (folder / "u.user").write_text("9|24|M|writer|85711\n10|53|F|other|T8H1N\n11|1|F|none|0\n")
    return folder


def zip_folder(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in folder.iterdir():
            archive.write(entry, f"{folder.name}/{entry.name}")
    return target


def test_movielens_100k_reads_alike_from_folder_parent_zip_and_environment(alone, monkeypatch):
    folder = write_100k(alone / "data" / "ml-100k")
    zipped = zip_folder(folder, alone / "ml-100k.zip")
    monkeypatch.setenv("FEDJAX_REC_DATA", str(alone / "data"))
    found = [load("movielens/100k", data_dir=place) for place in (folder, folder.parent, zipped, alone, None)]
    for data in found:
        assert data.fingerprint == reference().fingerprint
        assert data.user_labels.tolist() == [9, 10]
        assert data.item_titles.tolist() == ["Été 4 (1995)", "Été 7 (1995)", "Été 30 (1995)"]
        assert [data.genre_names[genre] for genre in np.flatnonzero(data.item_genres[2])] == ["g5", "g18"]
        assert {key: values.tolist() for key, values in data.user_attributes.items()} == {
            "gender": ["M", "F"],
            "occupation": ["writer", "other"],
            "zip_code": ["85711", "T8H1N"],
            "age": [24, 53],
        }
        assert data.repairs == {"rows fewer than published": 100_000 - 6}


def test_rows_are_in_time_order_with_ties_in_file_order():
    data = reference()
    assert data.item_labels[data.items_of(0)].tolist() == [7, 4, 30]  # user 9: 10, then 60 and 60
    assert data.item_labels[data.items_of(1)].tolist() == [4, 30, 7]
    assert data.file_rows.tolist() == [4, 1, 3, 2, 0, 5]


def test_movielens_1m_keeps_unknown_ratings_and_times_of_an_assembled_file(alone):
    folder = alone / "ml-1m"
    folder.mkdir()
    lines = ["1::5::0::0", "1::6::3::0", "1::7::4::20", "2::5::0::30"]
    (folder / "ratings_partial.dat.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "movies.dat").write_bytes(
        "5::Né (1999)::Drama|War\n6::B::Comedy\n7::C::War\n8::D::Drama\n".encode("latin-1")
    )
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    data = load("movielens/1m", data_dir=folder)
    np.testing.assert_array_equal(data.ratings, [np.nan, 3, 4, np.nan])
    assert data.timestamps.tolist() == [0, 0, 20, 30]
    assert data.repairs["ratings unknown"] == 2
    assert data.repairs["timestamps unknown"] == 2
    assert data.num_items == 3
    assert data.item_titles[0] == "Né (1999)"
    assert data.genre_names == ("Comedy", "Drama", "War")
    assert data.user_attributes["occupation"].tolist() == ["K-12 student", "self-employed"]


def test_later_movielens_reads_quoted_titles_and_half_stars(alone):
    folder = alone / "ml-latest-small"
    folder.mkdir()
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\r\n1,2,4.5,100\r\n1,3,0.5,90\r\n")
    movies = 'movieId,title,genres\n2,"City, The (1998)",Drama|IMAX\n3,Plain,(no genres listed)\n'
    (folder / "movies.csv").write_text(movies)
    data = load("movielens/latest-small", data_dir=alone)
    assert data.item_titles.tolist() == ["City, The (1998)", "Plain"]
    assert data.ratings.tolist() == [0.5, 4.5]
    assert data.genre_names == ("Drama", "IMAX")
    assert not data.item_genres[1].any()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".inter", ".rating", ".dat"])
def test_every_file_format_gives_the_same_data(tmp_path, suffix, zipped):
    separator = {".csv": ",", ".dat": "::"}.get(suffix, "\t")
    header = {
        ".csv": 'userId,"movie_id",rating,time',
        ".tsv": "user_id\titem\tstars\ttimestamp",
        ".inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    }
    lines = [header[suffix]] if suffix in header else []
    lines += [separator.join(map(str, row)) for row in ROWS]
    path = tmp_path / f"rows{suffix}{'.gz' * zipped}"
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert load(path, cache=False).fingerprint == reference().fingerprint


def test_columns_are_found_by_name_and_in_any_place(tmp_path):
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "when", "buyer", "asin"])
        writer.writerows([["good, very", "30", "zoé", "B1"], ['he said "no"', "20.5", "ann", "B2"]])
    data = load(path, cache=False, user_column="buyer", timestamp_column="when")
    assert data.user_labels.tolist() == ["ann", "zoé"]
    assert data.item_labels.tolist() == ["B1", "B2"]
    assert data.timestamps.tolist() == [20, 30]
    assert data.ratings is None


def test_lists_of_items_read_in_file_order(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("0 5 3 9\n2\n1 3\n")
    data = load(path, cache=False)
    assert data.item_labels[data.items_of(0)].tolist() == [5, 3, 9]
    assert data.timestamps is None
    assert data.repairs == {"users without items dropped": 1}


def test_ids_that_only_look_like_numbers_stay_text():
    data = from_rows(["007", "7", "+7"], ["1", "2", "3"], name="agents")
    assert data.user_labels.tolist() == ["+7", "007", "7"]
    assert data.item_labels.tolist() == [1, 2, 3]


def test_candidate_file_maps_labels_and_first_appearances(tmp_path):
    path = tmp_path / "x.negative.gz"
    path.write_bytes(gzip.compress(b"(9,7)\t4\t30\n"))
    by_label = load_candidates(path, reference())
    assert by_label.test_items.tolist() == [1, 3]  # user 10 has no line: padded with num_items
    assert by_label.negatives.tolist() == [[0, 2], [3, 3]]
    path.write_bytes(gzip.compress(b"(1,2)\t0\n(0,1)\t2\t0\n"))  # user 9 and item 7 came second and third
    by_place = load_candidates(path, reference(), ids="first_appearance")
    assert by_place.test_items.tolist() == [1, 0]
    assert by_place.negatives.tolist() == [[2, 3], [1, 2]]


def test_the_cache_answers_until_the_source_changes(alone, monkeypatch):
    folder = write_100k(alone / "ml-100k")
    first = load("movielens/100k", data_dir=alone)
    entries = list((alone / "cache" / "fedjax_rec").iterdir())
    assert [entry.suffix for entry in entries] == [".npz"]
    with monkeypatch.context() as without_parser:
        without_parser.setattr("fedjax_rec.data.sources.read_release", None)
        again = load("movielens/100k", data_dir=alone)
    assert again.fingerprint == first.fingerprint
    assert again.item_titles.tolist() == first.item_titles.tolist()
    assert again.user_attributes["age"].tolist() == first.user_attributes["age"].tolist()
    assert (again.genre_names, again.repairs) == (first.genre_names, first.repairs)
    with (folder / "u.data").open("a") as file:
        file.write("9\t31\t5\t70\n")
    assert load("movielens/100k", data_dir=alone).num_interactions == len(ROWS) + 1


def test_a_damaged_cache_file_is_built_again_and_says_so(alone):
    write_100k(alone / "ml-100k")
    load("movielens/100k", data_dir=alone)
    (entry,) = (alone / "cache" / "fedjax_rec").iterdir()
    whole = entry.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip"):
        entry.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged .* it is built again"):
            assert load("movielens/100k", data_dir=alone).fingerprint == reference().fingerprint
        assert entry.read_bytes() == whole


def test_a_cache_folder_that_cannot_be_written_costs_only_time(alone):
    write_100k(alone / "ml-100k")
    (alone / "blocked").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached"):
        data = load("movielens/100k", data_dir=alone, cache_dir=alone / "blocked")
    assert data.fingerprint == reference().fingerprint


@pytest.fixture
def prepared(alone, monkeypatch):
    """Six ratings written by TFDS's own MovieLens builder as ArrayRecord, without download and without TensorFlow."""
    # TFDS 4.9.10 imports this backport when it builds, without requiring it; the standard library has the same names.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    monkeypatch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
    from tensorflow_datasets.structured.movielens import Movielens

    def examples():
        for place, (user, item, rating, time) in enumerate(ROWS):
            yield (
                place,
                {
                    "movie_id": str(item),
                    "movie_title": f"Title {item}",
                    "movie_genres": ["Drama", "War"] if item == 7 else [],
                    "user_id": str(user),
                    "user_rating": float(rating),
                    "timestamp": time,
                    "user_gender": user == 9,
                    "bucketized_user_age": 25.0,
                    "raw_user_age": 24.0 + user,
                    "user_occupation_label": "writer",
                    "user_occupation_text": "writer",
                    "user_zip_code": "T8H1N",
                },
            )

    monkeypatch.setattr(Movielens, "_split_generators", lambda self, downloads: {"train": examples()})
    monkeypatch.setattr("fedjax_rec.data.tfds._has_tensorflow", lambda: True)
    tfds.prepare("movielens/100k", alone / "tfds")
    return alone / "tfds"


def test_a_prepared_tfds_data_set_reads_like_the_original(prepared, monkeypatch):
    monkeypatch.setattr("fedjax_rec.data.tfds._has_tensorflow", lambda: False)
    data = load("movielens/100k", data_dir=prepared)
    assert "tensorflow" not in sys.modules
    assert data.fingerprint == reference().fingerprint
    assert data.item_titles.tolist() == ["Title 4", "Title 7", "Title 30"]
    assert [data.genre_names[genre] for genre in np.flatnonzero(data.item_genres[1])] == ["Drama", "War"]
    assert data.user_attributes["gender"].tolist() == ["M", "F"]
    assert data.user_attributes["age"].tolist() == [33, 34]
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load("movielens/100k").fingerprint == data.fingerprint


def test_statistics_of_a_hand_counted_table():
    facts = statistics(reference())
    assert (facts.num_users, facts.num_items, facts.num_interactions, facts.density) == (2, 3, 6, 1.0)
    assert (facts.activity_p10, facts.activity_p50, facts.activity_max) == (3, 3, 3)
    assert (facts.popularity_gini, facts.head_share) == (0, pytest.approx(1 / 3))
    assert facts.tied_latest_users == 2
    assert (facts.first_timestamp, facts.last_timestamp) == (10, 60)
    assert facts.days == pytest.approx(50 / 86_400)
    assert facts.mean_rating == pytest.approx(20 / 6)
    lopsided = statistics(from_rows([1, 2, 3, 4], [1, 1, 1, 2], name="lopsided"))
    assert lopsided.popularity_gini == pytest.approx(0.25)  # |3 - 1| / (2 * 2 items * mean 2)
    assert (lopsided.days, lopsided.mean_rating, lopsided.tied_latest_users) == (None, None, 0)


def test_movielens_100k_is_the_published_file(data_dir):
    data = load("movielens/100k", data_dir=data_dir, cache=False)
    original = (data_dir / "ml-100k" / "u.data").read_bytes()
    assert hashlib.md5(original).hexdigest() == "6e47046882bad158b0efbb84cd5cb987"
    facts = statistics(data)
    assert (facts.num_users, facts.num_items, facts.num_interactions) == (943, 1682, 100_000)
    assert facts.tied_latest_users == 415
    assert facts.repairs == {}
    assert data.item_titles[data.item_labels == 1] == "Toy Story (1995)"
    assert len(data.genre_names) == 19


def test_movielens_1m_and_latest_small_have_their_published_sizes(data_dir):
    million = load("movielens/1m", data_dir=data_dir, cache=False)
    assert (million.num_users, million.num_items, million.num_interactions) == (6040, 3706, 1_000_209)
    complete = load_file(data_dir / "ml-1m" / "ratings_users_1_2999.dat.gz")
    assert complete.num_interactions == 487_650
    assert not np.isnan(million.ratings[million.user_ids < 2999]).any()
    small = load("movielens/latest-small", data_dir=data_dir, cache=False)
    assert (small.num_users, small.num_items, small.num_interactions) == (610, 9724, 100_836)
