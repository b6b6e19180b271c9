"""Risk: a table is called k-anonymous, l-diverse or t-close and is not, or is generalised more than it needs."""

import itertools
import math

import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, record
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.anonymization.degrees import class_ids, distances, histograms, k_anonymity, l_diversity, t_closeness
from fedjax_rec.anonymization.hierarchies import (
    OCCUPATION_GROUPS,
    bands,
    groups,
    movielens_hierarchies,
    prefixes,
    suppression,
)
from fedjax_rec.anonymization.losses import generalisation_loss
from fedjax_rec.anonymization.tables import anonymize_table, anonymize_users

# Nine rows in three classes of three, with salaries 3..11: worked by hand below.
SALARIES = {
    "zip": np.repeat(["476**", "4790*", "4760*"], 3),
    "age": np.repeat(["2*", ">=40", "3*"], 3),
    "salary": np.array([3, 4, 5, 6, 11, 8, 7, 9, 10]),
    "disease": np.array(["ulcer", "gastritis", "cancer", "gastritis", "flu", "flu", "flu", "flu", "cancer"]),
}
KEYS = ("zip", "age")


def test_k_is_the_smallest_class():
    table = {"a": np.array([1, 1, 1, 2, 2]), "b": np.array(["x", "x", "y", "y", "y"])}
    assert k_anonymity(table, ["a"]) == 2
    assert k_anonymity(table, ["b"]) == 2
    assert k_anonymity(table, ["a", "b"]) == 1
    assert k_anonymity(SALARIES, KEYS) == 3


def test_l_counts_values_or_their_entropy():
    assert l_diversity(SALARIES, KEYS, "salary") == 3
    assert l_diversity(SALARIES, KEYS, "disease") == 2
    # Classes two and three: one value twice, another once. Entropy log 3 - (2/3) log 2.
    assert l_diversity(SALARIES, KEYS, "disease", "entropy") == pytest.approx(3 / 2 ** (2 / 3))
    assert l_diversity(SALARIES, KEYS, "salary", kind="entropy") == pytest.approx(3)


def test_t_is_the_earth_movers_distance_by_hand():
    # Class one has salaries 3, 4, 5, a third each where the table has a ninth. The cumulative gaps are 2, 4, 6, 5, 4,
    # 3, 2, 1 ninths, in sum 3, over 8 steps: 0.375, as Li, Li and Venkatasubramanian print in their example.
    assert t_closeness(SALARIES, KEYS, "salary", ordered=True) == pytest.approx(0.375)
    # Equal distances: class one has three of nine values, so two thirds of the mass is elsewhere.
    assert t_closeness(SALARIES, KEYS, "salary") == pytest.approx(2 / 3)
    # Diseases: ulcer 1/9, gastritis 2/9, cancer 2/9, flu 4/9. Class one, a third each of three: flu's 4/9 is moved.
    assert t_closeness(SALARIES, KEYS, "disease") == pytest.approx(4 / 9)
    assert t_closeness({"a": np.zeros(4), "s": np.arange(4)}, ["a"], "s") == 0


def test_each_class_has_its_distance():
    """Class two, salaries 6, 8, 11: cumulative gaps 1, 2, 3, 1, 2, 0, 1, 2 ninths, in sum 12/9 over 8 steps."""
    per_class = distances(histograms(class_ids(SALARIES, ["zip"]), np.argsort(np.argsort(SALARIES["salary"]))), True)
    assert per_class[[0, 2]].tolist() == pytest.approx([0.375, 1 / 6])  # "476**" and "4790*"


def test_hierarchies_are_public_nested_and_end_in_a_star():
    ages = np.array([0, 7, 18, 24, 25, 61])
    age = bands("age", (5, 10, 20), unknown=0)
    assert age.levels[1].apply(ages).tolist() == ["unknown", "5-9", "15-19", "20-24", "25-29", "60-64"]
    assert age.levels[3].apply(ages).tolist() == ["unknown", "0-19", "0-19", "20-39", "20-39", "60-79"]
    codes = np.array(["94043-2117", "T8H1N", "", "94"])
    zips = prefixes("zip_code", (4, 3, 2, 1))
    assert zips.levels[1].apply(codes).tolist() == ["9404*", "T8H1*", "unknown", "94*"]
    assert zips.levels[4].apply(codes).tolist() == ["9*", "T*", "unknown", "9*"]
    work = groups("occupation", OCCUPATION_GROUPS)
    assert work.levels[1].apply(np.array(["lawyer", "K-12 student", "wizard"])).tolist() == [
        "health and law",
        "learning",
        "other",
    ]
    columns = {
        "age": np.arange(100),
        "zip_code": np.array([f"{n:05d}" for n in (*range(30), *range(30, 100_000, 997))]),
        "occupation": np.array([*OCCUPATION_GROUPS, "other"]),
        "gender": np.array(["F", "M"]),
    }
    for name, hierarchy in movielens_hierarchies().items():
        levels = [level.apply(columns[name]) for level in hierarchy.levels]
        assert np.array_equal(levels[0], columns[name].astype(str))
        assert set(levels[-1]) == {"*"}
        for low, high in itertools.pairwise(levels):
            assert len(set(zip(low, high, strict=True))) == len(set(low)), f"{name} is not nested"
            assert len(set(high)) < len(set(low))


def test_information_loss_of_values():
    exact = np.array([1, 2, 3, 4, 4])
    assert generalisation_loss(exact, exact).tolist() == [0] * 5
    assert generalisation_loss(exact, np.array(["a", "a", "b", "b", "b"])).tolist() == pytest.approx([1 / 3] * 5)
    assert generalisation_loss(exact, np.full(5, "*")).tolist() == [1] * 5
    assert generalisation_loss(np.ones(3), np.full(3, "*")).tolist() == [0] * 3


AGES = np.array([21, 22, 23, 24, 31, 32, 33, 34])
PEOPLE = {"age": AGES, "gender": np.array(list("FFFFMMMM")), "zip_code": np.array(["13053"] * 4 + ["14850"] * 4)}
HIERARCHIES = {"age": bands("age", (5, 10, 20)), "gender": suppression("gender")}


def test_a_table_is_generalised_as_little_as_will_do():
    found = anonymize_table(PEOPLE, hierarchies=HIERARCHIES, k=4, max_suppressed_share=0)
    assert found.levels == {"age": 1, "gender": 0}  # 20-24 and 30-34; gender says nothing more
    assert found.columns["age"].tolist() == ["20-24"] * 4 + ["30-34"] * 4
    assert found.columns["zip_code"].tolist() == PEOPLE["zip_code"].tolist()  # no quasi-identifier: copied
    assert (found.k, found.l, found.t) == (4, None, None)
    assert found.information_loss == pytest.approx(np.mean([3 / 7, 0]))
    everything = anonymize_table(PEOPLE, hierarchies=HIERARCHIES, k=8)
    assert everything.k == 8
    assert set(everything.columns["age"]) == {"20-39"}
    assert set(everything.columns["gender"]) == {"*"}
    untouched = anonymize_table(PEOPLE, hierarchies=HIERARCHIES, k=1)
    assert untouched.information_loss == 0


def test_suppression_goes_up_to_its_share_and_no_further():
    ages = np.r_[np.repeat([20, 40], 10), 99]
    table, hierarchies = {"age": ages, "job": np.array([*"ab" * 10, "c"])}, {"age": bands("age", (5, 10))}
    found = anonymize_table(table, hierarchies=hierarchies, k=5, sensitive="job", max_suppressed_share=0.05)
    assert np.flatnonzero(found.suppressed).tolist() == [20]
    assert found.columns["age"][20] == found.columns["job"][20] == "*"
    assert (found.k, found.levels["age"]) == (10, 0)
    assert (found.l, found.t) == (2, 0)
    assert found.information_loss == pytest.approx(1 / 21)
    strict = anonymize_table(table, hierarchies=hierarchies, k=5, sensitive="job", max_suppressed_share=0.04)
    assert strict.levels["age"] == 3
    assert not strict.suppressed.any()


def test_the_cheapest_of_the_minimal_choices_is_taken():
    """Either column alone will do: ages in bands lose a third, towns all of theirs."""
    table = {"age": np.repeat([20, 21, 40, 41], 2), "town": np.array([*"ab" * 4])}
    both = {"age": bands("age", (5,)), "town": suppression("town")}
    found = anonymize_table(table, hierarchies=both, k=2, max_suppressed_share=0)
    assert found.levels == {"age": 1, "town": 0}
    assert found.information_loss == pytest.approx(1 / 6)


def test_a_class_that_goes_moves_the_distribution_that_the_others_are_held_to():
    """Ones are 36 of 44, class b (6 of 10) is .218 off; without class c (0 of 4) they are 36 of 40, and b .3 off."""
    table = {"a": np.array([*"a" * 30, *"b" * 10, *"c" * 4]), "s": np.repeat([1, 1, 0, 0], [30, 6, 4, 4])}
    options = {"hierarchies": {"a": suppression("a")}, "k": 1, "t": 0.25, "sensitive": "s"}
    found = anonymize_table(table, **options, max_suppressed_share=0.4)
    assert found.suppressed.tolist() == [False] * 30 + [True] * 14
    assert found.t == 0
    assert anonymize_table(table, **options, max_suppressed_share=0.2).levels == {"a": 1}


def test_a_value_that_goes_makes_the_steps_between_the_others_larger():
    """Only the small class has value 2: with it 0 and 1 are half of the range apart, without it all of it."""
    table = {
        "a": np.array([*"a" * 10, *"b" * 10, *"c" * 2]),
        "s": np.repeat([1, 0, 1, 0, 2], [3, 7, 7, 3, 2]),
    }
    found = anonymize_table(
        table, hierarchies={"a": suppression("a")}, k=3, t=0.15, sensitive="s", ordered=True, max_suppressed_share=0.1
    )
    assert found.t <= 0.15
    assert found.levels == {"a": 1}


@st.composite
def tables(draw):
    rows = draw(st.integers(4, 24))
    column = st.lists(st.integers(0, 39), min_size=rows, max_size=rows)
    return {name: np.array(draw(column)) // size for name, size in (("a", 1), ("b", 10), ("s", 8))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tables(),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from(["distinct", "entropy"]),
    st.booleans(),
)
def test_what_is_asked_for_is_reached_and_minimal(table, k, share, kind, ordered):
    least, t = min(2, len(set(table["s"]))), 0.5
    hierarchies = {"a": bands("a", (5, 10)), "b": suppression("b")}
    options = {"sensitive": "s", "kind": kind, "ordered": ordered, "max_suppressed_share": share}
    one_class = {"a": np.zeros_like(table["a"]), "b": table["b"] * 0, "s": table["s"]}
    if (
        l_diversity(one_class, "ab", "s", kind) < least - 1e-9
    ):  # the top of the lattice, which all else can fall back on
        return
    found = anonymize_table(table, hierarchies=hierarchies, k=k, l=least, t=t, **options)
    left = ~found.suppressed
    rest = {name: column[left] for name, column in found.columns.items()} | {"s": table["s"][left]}
    assert k_anonymity(rest, "ab") == found.k >= k
    assert l_diversity(rest, "ab", "s", kind) == found.l >= least - 1e-9
    assert t_closeness(rest, "ab", "s", ordered) == found.t <= t + 1e-9
    assert found.suppressed.mean() <= share
    levels = tuple(found.levels.values())
    for lower in itertools.product(*(range(level + 1) for level in levels)):
        if lower != levels and share == 0:
            coarse = {n: hierarchies[n].levels[level].apply(table[n]) for n, level in zip("ab", lower, strict=True)}
            coarse["s"] = table["s"]
            assert (
                k_anonymity(coarse, "ab") < k
                or l_diversity(coarse, "ab", "s", kind) < least - 1e-9
                or t_closeness(coarse, "ab", "s", ordered) > t + 1e-9
            ), f"{lower} would have done, and {levels} was taken"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables())
def test_degrees_agree_with_a_slow_reading_of_their_definitions(table):
    classes = [np.flatnonzero((table["a"] == a) & (table["b"] == b)) for a in range(40) for b in range(4)]
    classes = [rows for rows in classes if len(rows)]
    values = sorted(set(table["s"].tolist()))
    shares = [[np.mean(table["s"][rows] == value) for value in values] for rows in classes]
    whole = [np.mean(table["s"] == value) for value in values]
    assert k_anonymity(table, "ab") == min(map(len, classes))
    assert l_diversity(table, "ab", "s") == min(len(set(table["s"][rows])) for rows in classes)
    entropies = [-sum(p * math.log(p) for p in one if p) for one in shares]
    assert l_diversity(table, "ab", "s", "entropy") == pytest.approx(math.exp(min(entropies)))
    gaps = [[p - q for p, q in zip(one, whole, strict=True)] for one in shares]
    assert t_closeness(table, "ab", "s") == pytest.approx(max(sum(map(abs, gap)) / 2 for gap in gaps))
    steps = max(len(values) - 1, 1)
    moved = [sum(abs(sum(gap[: i + 1])) for i in range(len(gap))) / steps for gap in gaps]
    assert t_closeness(table, "ab", "s", ordered=True) == pytest.approx(max(moved))


def test_users_are_anonymous_and_suppressed_ones_are_gone():
    ages = np.array([20, 20, 20, 99, 40, 40, 40])
    world = make_interactions([[0, 1]] * 7, attributes={"age": ages, "hobby": np.arange(7)})
    found = anonymize_users(world, hierarchies={"age": bands("age", (5,))}, k=3, max_suppressed_share=0.2)
    assert found.interactions.user_labels.tolist() == [10, 20, 30, 50, 60, 70]
    assert list(found.interactions.user_attributes) == ["age"]  # a column nobody generalised is not handed out
    assert k_anonymity(found.interactions.user_attributes, ["age"]) == 3
    assert record(found.interactions, 3) == record(world, 4)
    assert_nothing_old(found.interactions, world)
    paid = make_interactions([[0, 1]] * 7, attributes={"age": ages, "salary": np.arange(7)})
    found = anonymize_users(
        paid, hierarchies={"age": bands("age", (5,))}, k=3, l=3, sensitive="salary", max_suppressed_share=0.2
    )
    assert found.interactions.user_attributes["salary"].tolist() == [0, 1, 2, 4, 5, 6]
    assert found.table.l == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 9}, "k must lie between 1 and the 8 rows"),
        ({"k": 0}, "got 0"),
        ({"k": 2, "l": 2}, "name it, or leave them out"),
        ({"k": 2, "l": 3, "sensitive": "zip_code"}, "between 1 and the 2 values of 'zip_code'; got 3"),
        ({"k": 2, "t": 1.5, "sensitive": "zip_code"}, "t must lie between 0 and 1; got 1.5"),
        ({"k": 2, "sensitive": "gender"}, "sensitive and a quasi-identifier"),
        ({"k": 2, "sensitive": "salary"}, "no column 'salary'; it has 'age', 'gender', 'zip_code'"),
        ({"k": 2, "max_suppressed_share": 1.0}, "below 1; got 1.0"),
        ({"k": 2, "sensitive": "zip_code", "kind": "recursive"}, "'recursive'"),
        ({"k": 5, "l": 2, "kind": "entropy", "sensitive": "rare"}, "No generalisation reaches k=5, l=2"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    table = PEOPLE | ({"rare": np.array([0] * 7 + [1])} if options.get("sensitive") == "rare" else {})
    with pytest.raises(ValueError, match=sentence):
        anonymize_table(table, hierarchies=HIERARCHIES, **options)


def test_bad_columns_are_refused():
    with pytest.raises(ValueError, match="no column 'height'"):
        k_anonymity(PEOPLE, ["height"])
    with pytest.raises(ValueError, match="at least one quasi-identifier"):
        k_anonymity(PEOPLE, [])
    with pytest.raises(ValueError, match="NaN"):
        k_anonymity({"a": np.array([1.0, np.nan])}, ["a"])
    with pytest.raises(ValueError, match="at least one row"):
        k_anonymity({"a": np.array([])}, ["a"])
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        k_anonymity({"a": np.zeros(2), "b": np.zeros(3)}, ["a", "b"])
    with pytest.raises(ValueError, match="has 3 rows and the others 2"):
        l_diversity({"a": np.zeros(2), "b": np.zeros(3)}, ["a"], "b")
    with pytest.raises(ValueError, match="'age' must hold whole numbers"):
        anonymize_table({"age": np.array(["old", "young"])}, hierarchies={"age": bands("age", (5,))}, k=1)
    with pytest.raises(ValueError, match="no column 'age'"):
        anonymize_users(make_interactions([[0], [1]]), hierarchies={"age": bands("age", (5,))}, k=1)


def test_bad_hierarchies_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        bands("age", (5, 7))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        prefixes("zip", (1, 2))
    many = {name: bands(name, (2, 4, 8, 16, 32, 64)) for name in "abcdef"}
    with pytest.raises(ValueError, match="fewer columns or levels"):
        anonymize_table({name: np.arange(4) for name in "abcdef"}, hierarchies=many, k=2)
