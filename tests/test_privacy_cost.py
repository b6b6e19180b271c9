"""Risk: the cost of privacy is compared at unequal epsilons, a refusal is hidden, a sentence belies its numbers."""

import json

import pytest

from experiments import privacy_cost
from experiments._mechanisms import EPSILON, MECHANISMS, SCHEDULE, World, noise_of, spent
from fedjax_rec.federated.transforms import UNBOUNDED

STAMP = {
    "commit": "c" * 40,
    "dirty": False,
    "device_kind": "cpu",
    "platform": "Linux",
    "cpu_count": 2,
    "utc_time": "2026",
}
LINE = {
    "mechanism": "none",
    "items": 3706,
    "dim": 32,
    "state_bytes": 0,
    "before_bytes": 2**28,
    "peak_memory_bytes": 2**30,
    "median_s": 0.5,
    "none_s": 0.4,
    "ratio": 1.0,
    "cpu_ratio": 1.0,
    "cpu_ratio_quartiles": [0.97, 1.0, 1.04],
    "turns": 9,
    "compile_s": 3.0,
    "epsilon": None,
    "load": 1.5,
    "stamp": STAMP,
}
TINY = World(items=500, dim=4)


def line(mechanism, **changes):
    return LINE | {"mechanism": mechanism, "epsilon": 4.0} | changes


def test_every_chain_spends_the_same_epsilon():
    """From the events of the chains, not from those that calibrated them."""
    for name, mechanism in MECHANISMS.items():
        if name == "scheduled Gaussian":  # twenty levels of noise take the accountant half a minute
            continue
        epsilon = spent(mechanism, mechanism.links(TINY, noise_of(mechanism)))
        if mechanism.event is None:
            assert epsilon is None, name
        else:
            assert 0.998 * EPSILON <= epsilon <= EPSILON, name


def test_the_schedule_runs_as_it_was_calibrated():
    mechanism = MECHANISMS["scheduled Gaussian"]
    links = mechanism.links(TINY, 0.9)
    for index in (0, 7, len(SCHEDULE) - 1):
        ran, calibrated = links.dp_event(UNBOUNDED, index), mechanism.event(0.9, index)
        assert ran.noise_multiplier == pytest.approx(calibrated.noise_multiplier)


def test_the_kept_lines_have_one_epsilon():
    kept = (privacy_cost.RESULTS / "privacy_cost.jsonl").read_text("utf-8").splitlines()
    measured = [x for x in map(json.loads, kept) if "ratio" in x]
    assert {x["mechanism"] for x in measured} == set(MECHANISMS)
    for x in measured:
        assert (x["epsilon"] is None) == (MECHANISMS[x["mechanism"]].event is None)
        assert x["epsilon"] is None or 0.998 * EPSILON <= x["epsilon"] <= EPSILON


def test_the_page_shows_each_outcome_and_its_sentences_follow_the_numbers():
    sentence = "Noise on every entry makes a client's update 132,000,000 bytes."
    refused = {k: LINE[k] for k in ("items", "dim", "load", "stamp")} | {"mechanism": "PrivUnit", "refused": sentence}
    died = refused | {"mechanism": "Laplace", "refused": None, "failed": "stopped after 120 s"}
    lines = [LINE, line("Gaussian", cpu_ratio=99.0), line("Gaussian", cpu_ratio=1.5)]
    lines += [line("AdaFEST", cpu_ratio=1.25), refused, died]
    lines += [line("Skellam", cpu_ratio=7.5, peak_memory_bytes=3 * 2**30)]
    page = privacy_cost.write_page(lines)
    assert f"refused: {sentence}" in page
    assert "failed: stopped after 120 s" in page
    assert "of 3 private mechanisms that ran, the most expensive is Skellam, 7.5 times" in page
    assert "the cheapest is AdaFEST, 1.25 times" in page
    assert "Gaussian noise takes 1.5 times, AdaFEST 1.25." in page
    assert "Most memory: Skellam, 2.00 GiB above none. Refused: PrivUnit." in page
    assert "Epsilons of the chains that ran: 4.000 to 4.000" in page
    assert "99" not in page  # an older line of the same row
    assert "Skellam" in privacy_cost.to_svg(privacy_cost.picture(privacy_cost.newest(lines)))


def test_what_does_not_fit_is_refused_with_its_bytes():
    privacy_cost._check_memory(640_000_000, 0, 8.0)
    with pytest.raises(ValueError, match="a chain's state of 4,480,000,000 need about 18,560,000,000"):
        privacy_cost._check_memory(640_000_000, 7 * 640_000_000, 8.0)


def test_smoke_keeps_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(privacy_cost, "RESULTS", tmp_path / "results")
    assert privacy_cost.main(["--smoke", "--mechanism", "Gaussian"]) == 0
    page = capsys.readouterr().out
    assert "## 500 items of dim 4" in page
    assert "the most expensive is Gaussian" in page
    assert not (tmp_path / "results").exists()
