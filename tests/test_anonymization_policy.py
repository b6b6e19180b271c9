"""Risk: a policy file is misread, a step is skipped or told wrongly, or the map from users to records is off by one."""

import dataclasses
import json

import numpy as np
import pytest

from fedjax_rec.anonymization.apply import anonymize, popularity_users
from fedjax_rec.anonymization.policy import EXAMPLE, Policy, describe, parse_policy, read_policy
from fedjax_rec.anonymization.pseudonyms import new_key
from fedjax_rec.anonymization.risk import information_loss, risk_report, without_nan
from fedjax_rec.attacks.reidentification import reidentify
from fedjax_rec.data import load, synthetic
from fedjax_rec.data.interactions import from_rows


@pytest.fixture(scope="module")
def world():
    data = synthetic(num_users=160, num_items=80, num_interactions=4000, min_per_user=12, ratings=True, seed=1)
    rng = np.random.default_rng(0)
    people = {
        "age": rng.integers(18, 60, 160),
        "zip_code": rng.integers(10_000, 10_400, 160).astype(str),
        "gender": np.where(rng.random(160) < 0.3, "F", "M"),
        "occupation": rng.choice(["artist", "doctor", "student"], 160),
        "shoe_size": rng.integers(36, 46, 160),
    }
    return dataclasses.replace(data, user_attributes=people)


def same_rows(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("offsets", "item_ids", "ratings", "timestamps", "user_labels")
    )


def test_the_example_is_a_policy_and_every_section_of_it_is_known(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    policy = read_policy(path)
    assert (policy.attributes.k, policy.times.to, policy.items.m, policy.replacement.share) == (5, "month", 2, 0.2)
    assert policy.pseudonyms is not None
    assert json.loads(json.dumps(describe(policy)))["attributes"]["hierarchies"]["age"][1] == "bands of 5"
    for name in ("microaggregation", "randomized_response"):
        part = EXAMPLE.split(f"# [{name}]")[1].split("\n\n")[0]  # the sections in comments are right as well
        lines = [line.removeprefix("# ") for line in part.splitlines()[1:] if line]
        assert getattr(parse_policy("\n".join([f"[{name}]", *lines])), name) is not None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[item]\nk = 3", r"no section 'item', did you mean 'items'\?"),
        ("[items]\nkk = 3", r"\[items\] has no key 'kk', did you mean 'k'\?"),
        ("[items]\nm = 2", r"\[items\] needs the key 'k'"),
        ("[items]\nk = true", r"\[items\] k must be a whole number from 2 on, and is True"),
        ("[times]\nto = 'months'", "one of hour, day, week, month, quarter, year, none, and is 'months'"),
        ("[replacement]\nshare = 0", "above 0, up to 1, and is 0"),
        ("[randomized_response]\nepsilon_per_item = inf", "a number above 0, and is inf"),
        ("[microaggregation]\nk = 3\n[replacement]\nshare = 0.5", "keep one"),
        ("[attributes]\nk = 3\n[attributes.hierarchies]\nage = { bands = [5, 7] }", "age: Band widths"),
        ("[attributes]\nk = 3\n[attributes.hierarchies]\nage = { bands = 5 }", "age must be"),
        ("[attributes]\nk = 3\n[attributes.hierarchies]\nage = { band = [5] }", "age must be"),
        (
            "[attributes]\nk = 3\n[attributes.hierarchies]\nzip = 'movielens'",
            "no built-in hierarchy for the column 'zip'",
        ),
        ("[attributes]\nk = 3\nl = 2\n[attributes.hierarchies]\nage = 'movielens'", "name it with the key 'sensitive'"),
        ("[attributes]\nk = 3\nsensitive = 'age'\n[attributes.hierarchies]\nage = 'movielens'", "drop its hierarchy"),
        (
            "[microaggregation]\nk = 2\n[attributes]\nk = 3\n[attributes.hierarchies]\nage = 'movielens'",
            "drops the users",
        ),
        ("[microaggregation]\nk = 3\nmin_members = 4", "k = 3 members are fewer than min_members = 4"),
        ("items = 3", "must be a section"),
        ("", "has no section"),
        ("[items", "is no TOML"),
    ],
)
def test_mistakes_are_sentences_with_the_file(tmp_path, text, sentence):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence) as caught:
        read_policy(path)
    assert str(caught.value).startswith(str(path))


def test_what_the_data_cannot_meet_is_refused_before_any_work(world):
    with pytest.raises(ValueError, match=r"names 'zipcode', .* did you mean 'zip_code'"):
        anonymize(world, parse_policy("[attributes]\nk = 2\n[attributes.hierarchies]\nzipcode = 'suppression'"), seed=0)
    bare = dataclasses.replace(world, user_attributes={})
    with pytest.raises(ValueError, match="They have none at all"):
        anonymize(bare, parse_policy("[attributes]\nk = 2\n[attributes.hierarchies]\nage = 'movielens'"), seed=0)
    for section in ("microaggregation", "items"):
        with pytest.raises(ValueError, match="k = 161 is more than the 160 users"):
            anonymize(world, parse_policy(f"[{section}]\nk = 161"), seed=0)
    with pytest.raises(ValueError, match=r"virtual users of x\.parquet; load them"):
        anonymize(world, parse_policy("[replacement]\nshare = 0.5\nvirtual = 'x.parquet'"), seed=0)


def test_all_steps_and_the_truth(world):
    policy = parse_policy(
        "[attributes]\nk = 4\nsensitive = 'occupation'\nl = 2\nmax_suppressed_share = 0.1\n"
        "[attributes.hierarchies]\nage = { bands = [10, 20] }\ngender = 'suppression'\n"
        "[times]\nto = 'month'\n[ratings]\nto = 'liked'\n[replacement]\nshare = 0.25\n"
        "[items]\nk = 3\nm = 1\n[pseudonyms]"
    )
    made = anonymize(world, policy, key=new_key(), seed=3)
    released, truth = made.interactions, made.truth
    names = [step["step"] for step in made.steps]
    assert names == ["attributes", "times", "ratings", "replacement", "items", "pseudonyms"]
    assert set(released.user_attributes) == {"age", "gender", "occupation"}  # shoe sizes are not released
    left_out = made.steps[0]["users_left_out"]
    assert np.count_nonzero(truth < 0) == left_out == world.num_users - released.num_users
    kept = np.flatnonzero(truth >= 0)
    assert sorted(truth[kept]) == list(range(released.num_users))
    # Each record is its user's: the sensitive attribute is as it was, and most items too.
    assert np.array_equal(
        released.user_attributes["occupation"][truth[kept]], world.user_attributes["occupation"][kept]
    )
    for user in kept[:20]:
        mine, theirs = set(world.items_of(user)), set(released.items_of(truth[user]))
        assert len(mine & theirs) >= 0.6 * len(mine)
    assert set(np.unique(released.ratings)) <= {0.0, 1.0}
    assert all(len(label) == 32 for label in released.user_labels)
    assert not np.isin(released.user_labels, world.user_labels.astype(str)).any()


def test_pseudonyms_alone_change_labels_and_nothing_else(world):
    made = anonymize(world, parse_policy("[pseudonyms]"), key=new_key(), seed=0)
    for user in range(0, world.num_users, 7):
        assert set(made.interactions.items_of(made.truth[user])) == set(world.items_of(user))
    assert made.interactions.user_attributes == {}
    assert reidentify(world, made.interactions, made.truth).top1 == reidentify(world, world).top1


def test_the_same_seed_is_the_same_release_and_another_is_not(world):
    policy = parse_policy("[replacement]\nshare = 0.5")
    first, again, other = (anonymize(world, policy, seed=seed).interactions for seed in (1, 1, 2))
    assert same_rows(first, again)
    assert not same_rows(first, other)


def test_popularity_users_have_the_lengths_and_the_popularity(world):
    virtual = popularity_users(world, seed=0)
    np.testing.assert_array_equal(virtual.counts_per_user, world.counts_per_user)
    assert np.corrcoef(virtual.item_counts, world.item_counts)[0, 1] > 0.9
    shared = np.mean([len({*virtual.items_of(u)} & {*world.items_of(u)}) for u in range(50)])
    assert shared < 0.7 * world.counts_per_user[:50].mean()


def test_virtual_users_of_a_file_are_brought_onto_the_catalogue_or_refused(world):
    users, items = world.user_ids[::2], world.item_labels[world.item_ids[::2]]
    policy = parse_policy('[replacement]\nshare = 0.5\nvirtual = "people.csv"')
    found = anonymize(world, policy, virtual=from_rows(users, items, name="people.csv"), seed=0).interactions
    np.testing.assert_array_equal(found.item_labels, world.item_labels)
    assert not same_rows(found, world)
    other = from_rows([*users, 999], [*items, 12345], name="people.csv")
    with pytest.raises(ValueError, match="drawn from another catalogue"):
        anonymize(world, policy, virtual=other, seed=0)


def test_information_loss_by_hand():
    original = from_rows([1, 1, 2, 2, 3], [1, 2, 1, 3, 1], name="small")
    released = from_rows([7, 7, 8, 8, 8], [1, 2, 1, 2, 3], name="release")
    loss = information_loss(original, released, np.array([0, 1, -1]))
    assert loss["users_left_out"] == 1
    assert loss["interactions_lost"] == pytest.approx(1 / 5)
    assert loss["interactions_added"] == pytest.approx(1 / 5)  # user 2 got item 2
    assert loss["jaccard_distance"] == pytest.approx(np.mean([0, 1 / 3, 1]))
    assert loss["popularity_distance"] == pytest.approx((1 / 5 + 1 / 5 + 0) / 2)


def test_the_report_compares_before_and_after(world):
    policy = parse_policy("[microaggregation]\nk = 4\n[pseudonyms]")
    made = anonymize(world, policy, seed=0)
    told = []
    report = risk_report(world, made, policy, num_targets=None, num_known=6, l2s=(100.0,), report=told.append)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for setting, found in report["after"]["reidentification"].items():
        before = report["before"]["reidentification"][setting]
        assert found["top1"] <= 1 / 4 + 2 * found["top1_error"]
        assert found["top1"] < before["top1"]
        assert found["published_score"]["top1"] <= found["top1"]
        assert found["matched"] == 0
    assert report["before"]["uniqueness"]["12"]["share"] > 0.9
    assert report["after"]["uniqueness"]["12"]["share"] == 0
    assert 0.3 < report["downstream"]["ratio"] < 1.1
    assert report["downstream"]["ratio_low"] <= report["downstream"]["ratio"] <= report["downstream"]["ratio_high"]
    assert "EASE on anonymised data" in told
    assert without_nan({"a": (float("nan"), np.float32(1))}) == {"a": [None, 1.0]}


def test_two_promises_are_not_made_at_once():
    with pytest.raises(ValueError, match="keep one"):
        Policy(microaggregation=object(), randomized_response=object())


@pytest.mark.parametrize("k", [2, 5])
def test_micro_aggregation_of_movielens_names_one_in_k(data_dir, k):
    data = load("movielens/100k", data_dir=data_dir)
    made = anonymize(data, parse_policy(f"[microaggregation]\nk = {k}\n[pseudonyms]"), seed=0)
    for power in (0.0, 0.25):
        found = reidentify(data, made.interactions, made.truth, length_power=power)
        assert found.top1 <= 1 / k + 2 * found.top1_error
        assert found.top1 > 0.1 / k  # and the attack is not broken
