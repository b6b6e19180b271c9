"""Risk: a release that the ledger forgets, alters on disk, mixes with another unit, or admits beyond the budget."""

import json
import math

import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    ZCDpEvent,
)
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, RepeatAndSelectDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.events import EVENT_TYPES, describe, from_dict, to_dict
from fedjax_rec.privacy.ledger import Budget, BudgetExceeded, Ledger, affordable_rounds
from fedjax_rec.privacy.skellam import SkellamDpEvent

ROUND = PoissonSampledDpEvent(256 / 6040, GaussianDpEvent(1.2))

positive = st.floats(1e-3, 1e6)
probability = st.floats(0.0, 1.0)
whole = st.integers(1, 10**6)
leaves = st.one_of(
    st.just(NoOpDpEvent()),
    st.just(NonPrivateDpEvent()),
    st.builds(GaussianDpEvent, st.one_of(positive, st.just(math.inf), st.integers(0, 5))),
    st.builds(LaplaceDpEvent, positive),
    st.builds(DiscreteLaplaceDpEvent, positive, whole),
    st.builds(RandomizedResponseDpEvent, probability, whole),
    st.builds(ZCDpEvent, positive, positive),
    st.builds(SkellamDpEvent, positive, positive, positive),
    st.builds(TruncatedSubsampledGaussianDpEvent, whole, probability, whole, positive),
)
events = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(SelfComposedDpEvent, inner, whole),
        st.builds(ComposedDpEvent, st.lists(inner, max_size=3)),
        st.builds(PoissonSampledDpEvent, probability, inner),
        st.builds(lambda n, event: SampledWithoutReplacementDpEvent(n + 5, n, event), whole, inner),
        st.builds(RepeatAndSelectDpEvent, inner, st.floats(1, 50), st.sampled_from([0.0, 1.0, math.inf])),
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(events)
def test_every_event_survives_json_unchanged(event):
    text = json.dumps(to_dict(event), allow_nan=False)
    assert from_dict(json.loads(text)) == event
    assert describe(event)


def test_the_round_trip_covers_every_event_type():
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(events)
    def collect(event):
        seen.update(name for name in EVENT_TYPES if name in json.dumps(to_dict(event)))

    collect()
    assert seen == set(EVENT_TYPES)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("Gaussian", "object"),
        ({"type": "GaussDpEvent"}, "no known event"),
        ({"type": ["GaussianDpEvent"]}, "no known event"),
        ({"type": "GaussianDpEvent"}, "exactly the fields"),
        ({"type": "GaussianDpEvent", "noise_multiplier": 1.0, "clip": 2.0}, "exactly the fields"),
        ({"type": "GaussianDpEvent", "noise_multiplier": "1.0"}, "must be a number"),
        ({"type": "GaussianDpEvent", "noise_multiplier": True}, "must be a number"),
        ({"type": "GaussianDpEvent", "noise_multiplier": -1}, "at least 0"),
        ({"type": "SelfComposedDpEvent", "event": 3, "count": 2}, "does not fit"),
        ({"type": "ComposedDpEvent", "events": [3]}, "must hold DpEvents"),
        ({"type": "SelfComposedDpEvent", "event": {"type": "NoOpDpEvent"}, "count": 1.5}, "integer"),
    ],
)
def test_a_damaged_event_is_a_sentence(data, match):
    with pytest.raises(ValueError, match=match):
        from_dict(data)


@pytest.fixture
def ledger():
    one = Ledger().record(GaussianDpEvent(5.0), phase="popularity", released="item counts")
    one = one.record(ROUND, phase="training", released="sum of updates", sampler="poisson", count=300)
    two = PoissonSampledDpEvent(256 / 6040, GaussianDpEvent(2.0))
    one = one.record(two, phase="distillation", released="sum of logits", sampler="poisson", count=50)
    return one.record(LaplaceDpEvent(10.0), phase="popularity", released="number of users")


def test_phases_are_composed_jointly(ledger):
    spent = ledger.spent(1e-5)
    assert spent.epsilon == pytest.approx(3.651, rel=1e-3)
    assert (spent.unit, spent.relation, spent.accountant) == ("user", "add_or_remove_one", "PLD")
    apart = sum(ledger.phase(name).spent(1e-5).epsilon for name in ("popularity", "training", "distillation"))
    assert spent.epsilon < apart


def test_a_thousand_equal_rounds_are_one_entry():
    ledger = Ledger()
    for _ in range(1000):
        ledger = ledger.record(ROUND, phase="training", released="sum of updates", sampler="poisson")
    (entry,) = ledger.entries
    assert entry.count == 1000
    ledger = ledger.record(ROUND, phase="finetuning", released="sum of updates", sampler="poisson")
    assert [entry.count for entry in ledger.entries] == [1000, 1]
    assert ledger.spent(1e-5) == privacy_spent(SelfComposedDpEvent(ROUND, 1001), delta=1e-5)


def test_recording_leaves_the_old_ledger_alone(ledger):
    before = ledger.entries
    ledger.record(ROUND, phase="training", released="sum of updates")
    assert ledger.entries == before


def test_units_and_relations_do_not_mix(ledger):
    with pytest.raises(ValueError, match="unit is 'user', and a release with 'example'"):
        ledger.record(ROUND, phase="training", released="gradients", unit="example")
    with pytest.raises(ValueError, match="relation is 'add_or_remove_one'"):
        ledger.record(ROUND, phase="training", released="sum", relation="replace_one")
    with pytest.raises(ValueError, match="trust model"):
        Ledger(trust_model="hope")
    with pytest.raises(ValueError, match="count"):
        ledger.record(ROUND, phase="training", released="sum", count=0)


def test_a_release_without_noise_makes_epsilon_infinite_and_is_shown_as_such(ledger):
    ledger = ledger.record(NonPrivateDpEvent(), phase="evaluation", released="validation metric", count=3)
    assert ledger.spent(1e-5).epsilon == math.inf
    assert json.loads(ledger.to_json(delta=1e-5))["spent"]["epsilon"] == "inf"
    assert list(ledger.rows())[-1]["mechanism"] == "release without noise"


# --- on disk ------------------------------------------------------------------------------------------------------


def test_a_ledger_survives_its_file(ledger, tmp_path):
    path = tmp_path / "ledger.json"
    ledger.save(path, delta=1e-5)
    assert Ledger.load(path) == ledger
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    assert document["entries"][1]["event"]["event"] == {"type": "GaussianDpEvent", "noise_multiplier": 1.2}
    assert document["spent"]["epsilon"] == pytest.approx(3.651, rel=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_a_full_disk_leaves_the_old_ledger(ledger, tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    Ledger().save(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedjax_rec.privacy.ledger.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.save(path)
    assert Ledger.load(path) == Ledger()
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def edited(**changes):
    return lambda document: document | changes


def with_entry(**changes):
    return lambda document: document | {"entries": [document["entries"][0] | changes, *document["entries"][1:]]}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (with_entry(count=2), "changed after it was written"),
        (edited(relation="replace_one"), "changed after it was written"),
        (lambda document: document | {"entries": document["entries"][:-1]}, "changed after it was written"),
        (edited(fingerprint=None), "changed after it was written"),
        (edited(schema_version=9), "schema version 9"),
        (edited(unit="household"), "unit of privacy"),
        (edited(entries=5), "damaged"),
        (edited(entries=["training"]), "damaged"),
        (with_entry(count="many"), "count must be a positive integer"),
        (with_entry(phase=3), "phase of an entry must be text"),
        (with_entry(event={"type": "GaussianDpEvent", "noise_multiplier": -1}), "at least 0"),
        (lambda document: {k: v for k, v in document.items() if k != "trust_model"}, "'trust_model' is missing"),
        (lambda document: [document], "no ledger"),
    ],
)
def test_a_hand_edited_file_is_refused_with_a_sentence(ledger, tmp_path, edit, match):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(edit(json.loads(ledger.to_json()))))
    with pytest.raises(ValueError, match=match) as error:
        Ledger.load(path)
    assert "ledger.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "ledger", '{"schema_version": 1, "entries": ['])
def test_a_truncated_file_is_refused_with_a_sentence(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not JSON, at line 1.*Restore"):
        Ledger.load(path)


# --- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_stops_before_the_release_that_would_exceed_it(ledger):
    budget = Budget(epsilon=4.0, delta=1e-5)
    rounds = affordable_rounds(ledger, ROUND, budget)
    assert rounds > 1
    full = ledger.record(ROUND, phase="training", released="sum of updates", count=rounds)
    assert full.spent(1e-5).epsilon <= 4.0
    assert budget.allows(ledger, ROUND, count=rounds)
    assert not budget.allows(full, ROUND)
    with pytest.raises(BudgetExceeded, match="above the budget of 4; nothing released"):
        budget.require(full, ROUND)
    budget.require(ledger, ROUND, count=rounds)
    assert affordable_rounds(full, ROUND, budget) == 0


def test_no_budget_allows_a_release_without_noise_except_an_infinite_one(ledger):
    assert not Budget(epsilon=100.0, delta=1e-5).allows(ledger, NonPrivateDpEvent())
    assert Budget(epsilon=math.inf, delta=1e-5).allows(ledger, NonPrivateDpEvent())
    assert affordable_rounds(ledger, ROUND, Budget(epsilon=math.inf, delta=1e-5), limit=9) == 9


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_must_make_sense(epsilon, delta):
    with pytest.raises(ValueError, match=r"budget's epsilon|delta"):
        Budget(epsilon=epsilon, delta=delta)
