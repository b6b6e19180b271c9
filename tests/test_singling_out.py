"""Risk: what is known of everybody is called a leak, or a leak passes for what is known of everybody."""

import dataclasses

import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.attacks.singling_out import (
    attribute,
    group_risks,
    linkability,
    risk,
    secret_item,
    singling_out,
    wilson,
)
from fedjax_rec.data.synthetic import synthetic
from fedjax_rec.reporting.formatting import Estimate
from fedjax_rec.synthesis.populations import popularity_sampler, take_users

WORLD = synthetic(num_users=400, num_items=80, num_interactions=5000, min_per_user=6, seed=2)


def groups(seed=0):
    order = np.random.default_rng(seed).permutation(400)
    return [take_users(WORLD, order[start : start + 130]) for start in (0, 130, 260)]


def test_intervals_are_wilsons():
    assert wilson(0, 10) == Estimate(0.0, 0.0, pytest.approx(0.2775, abs=1e-4))
    half = wilson(5, 10)
    assert (half.low, half.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 0) == Estimate(0.0, 0.0, 1.0)


def test_risk_is_what_the_attack_adds_to_the_control():
    exact = [Estimate(x, x, x) for x in (0.6, 0.2)]
    assert risk(*exact) == Estimate(pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))
    wide = risk(Estimate(0.6, 0.5, 0.7), Estimate(0.2, 0.1, 0.3))
    # d risk / d attack = 1 / 0.8 and d risk / d control = -0.4 / 0.64
    assert wide.low == pytest.approx(0.5 - np.hypot(0.1 / 0.8, 0.1 * 0.4 / 0.64))
    assert risk(Estimate(1.0, 0.9, 1.0), Estimate(0.2, 0.1, 0.3)).value == pytest.approx(1.0)
    assert risk(Estimate(0.5, 0.4, 0.6), Estimate(1.0, 0.9, 1.0)) == Estimate(0.0, -1.0, 1.0)
    assert risk(Estimate(0.0, 0.0, 0.1), Estimate(0.99, 0.9, 1.0)).value == -1.0


def test_singling_out_by_hand():
    members = interactions([[0, 1], [0, 2], [0, 3], [0, 4]], num_items=6)
    others = interactions([[0, 5], [0, 4]], num_items=6)
    virtual = interactions([[0, 1], [0, 4], [0, 5]], num_items=6)
    found = singling_out(members, others, virtual)
    # Item 1 is one member's; item 4 one member's and one other's; item 5 no member's.
    assert found.attack.value == pytest.approx(2 / 3)
    assert found.num_attacks == 3
    # Of six people four are members: P(one holder is a member) = 2/3, P(one of two is) = 2 (4/6) (2/5) = 8/15.
    assert found.control.value == pytest.approx((2 / 3 + 8 / 15 + 2 / 3) / 3)


def test_copies_are_singled_out_linked_and_told_by():
    members, others, _ = groups()
    found = {each.name: each for each in group_risks(members, others, members)}
    for name, least in {
        "singling out": 0.9,
        "linkability": 0.6,
        "secret item from the nearest virtual user": 0.8,
    }.items():
        assert found[name].risk.value > least, name
        assert found[name].risk.low > 0, name
    model = found["secret item from EASE trained on virtual users"]
    assert model.attack.value > model.control.value > 0
    told = found["attribute favourite_genre"]
    assert told.attack.value > told.control.value
    assert all(each.baseline.value < each.attack.value for each in found.values())


@pytest.mark.parametrize("kind", ["fresh users", "popularity"])
def test_virtual_users_that_know_nothing_are_no_risk(kind):
    values, inside = {}, []
    for seed in range(6):
        members, others, fresh = groups(seed)
        virtual = fresh if kind == "fresh users" else popularity_sampler(fresh, num_users=130, seed=seed)
        for each in group_risks(members, others, virtual, seed=seed):
            values.setdefault(each.name, []).append(each.risk.value)
            inside.append(each.risk.low <= 0 <= each.risk.high)
    assert np.mean(inside) > 0.85
    for name, found in values.items():
        assert abs(np.mean(found)) < 0.08, name


def test_what_everybody_shares_is_no_risk_however_well_it_is_told():
    # Every user has items 0..4, so a hidden one is always among the ten named: of members and of others alike.
    users = interactions([[0, 1, 2, 3, 4, 5 + u % 3] for u in range(40)], num_items=20)
    members, others, virtual = (take_users(users, np.arange(start, start + 12)) for start in (0, 12, 24))
    found = secret_item(members, others, virtual, model=False)
    assert found.attack.value == found.control.value == 1.0
    assert found.risk.value == 0.0


def test_attributes_are_told_from_neighbours_and_only_where_both_have_them():
    rows = [[0, 1, 2]] * 20 + [[5, 6, 7]] * 20
    users = interactions(rows, num_items=8)
    users = dataclasses.replace(users, user_attributes={"gender": np.repeat(["F", "M"], 20)})
    members, others, virtual = (take_users(users, np.arange(start, 40, 3)) for start in range(3))
    found = attribute(members, others, virtual, name="gender")
    assert (found.attack.value, found.control.value, found.risk.value) == (1.0, 1.0, 0.0)
    assert found.baseline.value < 0.6
    plain = dataclasses.replace(virtual, user_attributes={})
    assert "attribute gender" not in {each.name for each in group_risks(members, others, plain)}


def test_halves_of_one_user_are_linked_and_those_of_two_are_not():
    users = interactions([list(range(6 * u, 6 * u + 6)) for u in range(20)], num_items=120)
    members, others = take_users(users, np.arange(10)), take_users(users, np.arange(10, 20))
    found = linkability(members, others, members)
    assert found.attack.value > 0.9
    assert found.baseline.value < 0.2
    assert found.risk.low > 0


def test_missing_groups_and_other_catalogues_are_refused():
    members, others, _ = groups()
    with pytest.raises(ValueError, match="hold whole users out"):
        group_risks(members, take_users(others, np.arange(0)), members)
    with pytest.raises(ValueError, match="no virtual user with a row"):
        group_risks(members, others, interactions([[]], num_items=80))
    with pytest.raises(ValueError, match="another catalogue"):
        group_risks(members, others, interactions([[88]], num_items=99))
