"""Risk: an implementation that leaks more than it claims passes its audit, or a right one is called a bug."""

import io
import math
import tokenize
from pathlib import Path

import dp_accounting
import jax
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from jax_privacy.auditing import CanaryScoreAuditor
from seeded_bugs import BUGS, NOISE, RIGHTS, ROUNDS, Audited

import fedjax_rec
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.transforms import chain
from fedjax_rec.privacy.audit import (
    AuditResult,
    Finding,
    audit_rounds,
    find,
    gaussian_delta,
    gaussian_envelope,
    make_audit,
)
from fedjax_rec.privacy.canaries import Layout
from fedjax_rec.privacy.group_clip import clip_by_group_norm
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

PACKAGE = Path(fedjax_rec.__file__).parent


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    """Rounds that run a few times: less optimised, they compile in half the time."""
    monkeypatch.setattr("fedjax_rec.federated.round._compiler_options", lambda: {"xla_backend_optimization_level": 0})


def auditor_of(audited: Audited, *, num_canaries=None, crowd=None):
    n = num_canaries or audited.num_canaries
    return make_audit(
        audited.transforms,
        audited.sampler(n),
        num_rounds=audited.num_rounds,
        num_canaries=n,
        num_crowd_runs=300 if (audited.crowd if crowd is None else crowd) else 0,
        make=audited.make,
    )


def test_right_code_passes_for_nearly_every_seed():
    """At most 5 false alarms in 100, where the noise is exactly what the claim needs."""
    audit = auditor_of(RIGHTS["all"], num_canaries=400)
    results = [audit(jax.random.key(seed)) for seed in range(100)]
    assert sum(result.passed for result in results) >= 95
    exact = dp_accounting.get_epsilon_gaussian(NOISE / math.sqrt(ROUNDS), 1e-5)
    assert results[0].claimed_epsilon == pytest.approx(exact, rel=1e-3)
    assert len({result.findings for result in results}) == 100  # every seed is another run


@pytest.mark.parametrize("name", ["poisson", "fixed_size", "in_turn"])
def test_right_code_passes_under_every_sampler(name):
    result = auditor_of(RIGHTS[name], num_canaries=800, crowd=name == "poisson")(jax.random.key(1))
    assert result.passed, result.sentence
    assert result.sentence.startswith("No bug seen: 800 canary clients in "), result.sentence


@pytest.mark.parametrize("name", BUGS)
def test_every_seeded_bug_is_rejected(name):
    audit = auditor_of(BUGS[name])
    result = audit(jax.random.key(0))
    assert not result.passed, result.sentence
    assert result.sentence.startswith("A bug: ")
    assert result.worst.num_correct > 0.7 * result.worst.num_guesses


def test_small_populations_are_pooled_and_tables_have_the_chains_names():
    """30 clients; a clip that knows its tables by name, and without noise: still found, in either table."""
    noise = gaussian_noise(3.0)
    chained = chain(
        clip_by_group_norm({"item": 0.1, "bias": 0.2}), noise._replace(server=lambda total, *_: (total, ()))
    )
    result = audit_rounds(
        chained,
        full_participation(30),
        num_rounds=2,
        num_canaries=300,
        num_crowd_runs=0,
        layout=Layout(tables=("item", "bias"), rows=3, dense=0),
        key=jax.random.key(0),
    )
    assert [finding.num_canaries for finding in result.findings] == [300] * 6
    assert not result.passed


def test_nothing_to_audit_is_said():
    key = jax.random.key(0)
    for transforms in (clip_by_global_norm(1.0), chain(clip_by_global_norm(1.0), gaussian_noise(0.0))):
        with pytest.raises(ValueError, match="there is nothing to audit: the chain adds no noise"):
            audit_rounds(transforms, full_participation(200), num_rounds=1, num_canaries=200, key=key)
    with pytest.raises(ValueError, match="at least 100 canaries"):
        auditor_of(RIGHTS["all"], num_canaries=50)
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        audit_rounds(chain(), full_participation(200), num_rounds=1, delta=0.0, key=key)


def verdict(**changes) -> AuditResult:
    finding = Finding("huge norm", 5000, 1250, 700, 0.4)
    values = {
        "claimed_epsilon": 2.0,
        "lower_bound": 0.4,
        "lower_bound_fdp": 0.6,
        "gaussian_epsilon": 2.5,
        "delta": 1e-5,
    }
    sizes = {"num_canaries": 5000, "num_rounds": 1, "confidence": 0.95, "most_visible": 3.5}
    return AuditResult(**values | sizes | {"worst": finding, "findings": (finding,)} | changes)


@pytest.mark.parametrize(
    ("changes", "passed", "words"),
    [
        ({}, True, "No bug seen: 5,000 canary clients in 1 round show an epsilon of at least 0.4 (95 % confidence)"),
        ({"claimed_epsilon": 8.0}, True, "Nothing learned: 5,000 canary clients in 1 round could have shown"),
        ({"lower_bound": 2.1}, False, "A bug: 5,000 canary clients in 1 round show that epsilon is at least 2.1"),
        ({"lower_bound": math.inf}, False, "show that epsilon is infinite"),
        ({"lower_bound_fdp": 2.2}, True, "No bug seen"),  # it is compared with the Gaussian curve, not with the claim
        ({"lower_bound_fdp": 2.6}, False, "no Gaussian mechanism of epsilon below 2.6 has"),
        ({"lower_bound_fdp": 9.0, "gaussian_epsilon": math.inf}, True, "No bug seen"),
    ],
)
def test_the_verdict_says_what_it_is(changes, passed, words):
    result = verdict(**changes)
    assert result.passed == passed
    assert words in result.sentence


# The bounds by themselves.


def test_the_lower_bound_holds_where_the_theorem_is_tight():
    """Randomised response with known epsilon: the bound may be above it in 5 % of the trials, and comes near it."""
    rng, epsilon, above, bounds = np.random.default_rng(0), 1.0, 0, []
    for _ in range(200):
        coins = rng.random(2000) < 0.5
        right = rng.random(2000) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(coins == right, 1.0, 0.0) + 1e-9 * rng.random(2000)
        bounds.append(find(coins, scores, "answers", 0.05, 1e-9).lower_bound)
        above += bounds[-1] > epsilon
    assert above <= 10 + 2 * math.sqrt(10)
    assert np.median(bounds) > 0.7


def test_all_scores_lost_is_the_worst_finding():
    coins = np.arange(200) % 2 == 0
    assert find(coins, np.full(200, np.inf), "lost", 0.05, 1e-5).lower_bound == math.inf


def test_the_gaussian_envelope_covers_the_curve():
    gaussian = dp_accounting.GaussianDpEvent(3.0)
    many = dp_accounting.SelfComposedDpEvent(gaussian, 9)
    assert gaussian_envelope(gaussian) == pytest.approx(1 / 3, rel=1e-6)
    assert gaussian_envelope(gaussian, relation="replace_one") == pytest.approx(2 / 3, rel=1e-6)
    assert gaussian_envelope(many) == pytest.approx(1.0, rel=1e-2)
    curves = {
        dp_accounting.LaplaceDpEvent(1.5): pld.from_laplace_mechanism(1.5, value_discretization_interval=1e-3),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)): pld.from_gaussian_mechanism(
            1.0, sampling_prob=0.1, value_discretization_interval=1e-3
        ),
    }
    for event, curve in curves.items():
        mu, epsilons = gaussian_envelope(event), np.linspace(0.01, 4, 37)
        assert np.all(gaussian_delta(epsilons, mu) >= curve.get_delta_for_epsilon(epsilons) - 1e-9)
        closer = gaussian_delta(np.linspace(0, 4, 400), mu / 1.1)
        assert np.any(closer < curve.get_delta_for_epsilon(np.linspace(0, 4, 400)))
    without_curve = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(4.0))
    assert gaussian_envelope(without_curve, relation="replace_one") == math.inf


# jax_privacy has one bound that must not be used.


def names_in(source: str) -> set[str]:
    """Names and attributes of the code; words of comments and docstrings do not count."""
    return {token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == 1}


def test_the_bound_from_gaussian_dp_is_used_nowhere():
    assert names_in("x = auditor.epsilon_from_gdp(0.05)  # a comment") >= {"epsilon_from_gdp"}
    for path in PACKAGE.rglob("*.py"):
        assert "epsilon_from_gdp" not in names_in(path.read_text(encoding="utf-8")), path


def test_why_it_is_not():
    """Scores that know nothing of the coins, so epsilon is 0: it says above 1 nearly always, the others 0."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(10):
        auditor = CanaryScoreAuditor(rng.normal(size=500), rng.normal(size=500))
        found.append(auditor.epsilon_from_gdp(0.05, 1e-5))
        assert auditor.epsilon_one_run(0.05, 1e-5) < 0.3
    assert np.median(found) > 2
