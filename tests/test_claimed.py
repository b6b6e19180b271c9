"""Risk: the study of claimed epsilons misstates a recipe or its cost, or calls a fault seen that no audit has shown."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_audit import verdict as result_of

from experiments import _claims, _recipes, claimed, harness
from experiments._claims import DELTA, RECIPES
from fedjax_rec.federated.cohort import poisson
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy import privacy_spent
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, global_norm

BY_NAME = {recipe.name: recipe for recipe in RECIPES}

# Epsilons computed outside of this package, with dp-accounting and the analytic Gaussian alone.
REFERENCE = {
    "control: clip, Gaussian noise, Poisson": (6.2657, 6.2657),
    "mean weighted by examples": (4.3772, "none exists"),
    "divided by the realised cohort": (4.3772, "grows with the table"),
    "clip norm 1 given as the norm's order": (4.3772, 4.3772),
    "every client once an epoch, as Poisson": (6.0216, 28.3735),
    "Poisson cohorts cut at 256": (6.2657, 27.478),
    "Poisson cohorts cut at 288": (6.2657, 10.2648),
    "Poisson cohorts cut at 320": (6.2657, 6.3061),
    "twenty randomised answers counted as one": (1.0, 19.9967),
    "add-or-remove noise, replace-one account": (2.1332, 4.9524),
}


def an_update(values, num_rows=40):
    values = jnp.asarray(values, jnp.float32)
    return Shared({"item": Rows(jnp.arange(len(values)), values[:, None], num_rows)}, {})


def size_after(link, update) -> float:
    return float(global_norm(link.client(update, (), jax.random.key(0))[0]))


@pytest.mark.parametrize("name", REFERENCE)
def test_claimed_and_valid_epsilons(name):
    found = BY_NAME[name].claimed(), BY_NAME[name].true()
    for value, reference in zip(found, REFERENCE[name], strict=True):
        assert value == (reference if isinstance(reference, str) else pytest.approx(reference, rel=1e-3))


def test_draws_with_replacement_cost_what_poisson_does_when_nobody_is_drawn_twice_and_more_otherwise():
    settings = {"num_rounds": 3, "delta": DELTA, "interval": 2e-2}
    event = _claims.sampled_gaussian(1 / 50, 1.0, 3)
    once = _recipes.with_replacement_epsilon(1.0, num_clients=50, cohort_size=1, **settings)
    assert once == pytest.approx(privacy_spent(event, delta=DELTA).epsilon, rel=5e-3)
    twenty = _recipes.with_replacement_epsilon(1.0, num_clients=1000, cohort_size=20, **settings)
    assert twenty > 1.05 * once


# The links.


def test_who_is_drawn_how_often():
    n, size = 40, 20
    sampler, link = _recipes.with_replacement(n, cohort_size=size), _recipes.as_often_as_drawn(n, cohort_size=size)
    cohorts = jax.jit(jax.vmap(lambda t: sampler.draw(jax.random.key(1), t)))(jnp.arange(2000))
    update = an_update([1.0])
    count = jax.jit(jax.vmap(lambda key: link.client(update, (), key)[0].tables["item"].values[0, 0]))
    times = count(jax.random.split(jax.random.key(2), 20_000))
    assert cohorts.mean() == pytest.approx(1 - (1 - 1 / n) ** size, rel=0.02)
    assert set(np.asarray(times).tolist()) > {1.0, 2.0}
    assert cohorts.mean() * times.mean() == pytest.approx(size / n, rel=0.03)
    assert link.sensitivity(UNBOUNDED) == UNBOUNDED


def test_a_cut_cohort_is_a_subset_of_a_poisson_one_and_never_above_its_capacity():
    cut = _recipes.cut_poisson(60, cohort_size=20, capacity=15)
    rounds = jnp.arange(300)
    samplers = (cut, poisson(60, cohort_size=20))
    drawn, uncut = jax.jit(jax.vmap(lambda t: [s.draw(jax.random.key(3), t) for s in samplers]))(rounds)
    assert not np.any(drawn & ~uncut)
    np.testing.assert_array_equal(drawn.sum(1), np.minimum(uncut.sum(1), 15))
    share = np.asarray(drawn).mean(0)
    assert np.all(np.abs(share - share.mean()) < 5 * np.sqrt(0.25 / 300))  # who is cut is random


@pytest.mark.parametrize("values", [[1e6, 0, 0, 0], [3.0, 3, 3, 3], [0.1, 0, 0, 0], [0.0, 0, 0, 0]])
def test_the_norm_of_a_wrong_order_bounds_the_right_norm_only_up_to_order_two(values):
    update, right = an_update(values), math.hypot(*values)
    one, two, ten = (_recipes.clip_by_norm_of_order(c) for c in (1.0, 2.0, 10.0))
    assert size_after(one, update) <= 1 + 1e-6
    assert size_after(two, update) == pytest.approx(min(2, right), rel=1e-5, abs=1e-6)
    assert size_after(ten, update) <= 10 * _recipes.order_factor(10.0, 4) * (1 + 1e-5)
    assert _recipes.order_factor(1.0, 4) == _recipes.order_factor(2.0, 4) == 1


def test_the_largest_update_that_a_wrong_order_lets_through():
    ten = _recipes.clip_by_norm_of_order(10.0)
    assert size_after(ten, an_update([50.0] * 16)) == pytest.approx(10 * 16**0.4, rel=1e-4)
    assert size_after(ten, an_update([math.nan, 1.0])) == 0


def test_weights_multiply_what_the_clip_left():
    weighted = _recipes.weighted_by_examples(2.0)
    update, _ = clip_by_global_norm(1.0).client(an_update([5.0] * 6), (), jax.random.key(0))
    assert size_after(weighted, update) == pytest.approx(3.0, rel=1e-5)
    assert size_after(_recipes.only_finite(), an_update([1e6])) == pytest.approx(1e6)
    assert size_after(_recipes.only_finite(), an_update([math.inf])) == 0


def test_the_noise_is_divided_at_every_call_but_the_first():
    link = _recipes.gaussian_noise_divided_again(2.0, divisor=10.0)
    total = {"a": jnp.zeros(4000), "b": jnp.zeros(4000)}
    state, scales = link.init(total), []
    for key in jax.random.split(jax.random.key(4), 2):
        noised, state = link.server(total, state, key)
        scales += [float(noised[name].std()) for name in total]
    np.testing.assert_allclose(scales, [2.0, 0.2, 0.02, 0.002], rtol=0.05)
    assert chain(clip_by_global_norm(1.0), link).dp_event(UNBOUNDED, 7).noise_multiplier == 2  # what it claims
    assert _recipes.divided_again_multiplier(2.0, divisor=10, num_calls=2) == pytest.approx((1 / 4 + 25) ** -0.5)


# Verdicts and page.


@pytest.mark.parametrize(
    ("changes", "claim", "true", "expected"),
    [
        ({}, 2.0, 2.0, claimed.HOLDS),
        ({}, 2.0, 7.0, claimed.UNSEEN),
        ({}, 2.0, "none exists", claimed.UNSEEN),
        ({"lower_bound": 2.1}, 2.0, "none exists", claimed.SEEN),
        ({"lower_bound_fdp": 2.6}, 2.0, 3.0, claimed.SEEN),
        ({"lower_bound": 2.1}, 2.0, 2.0, claimed.FALSE_ALARM),
        ({"lower_bound": 3.5}, None, "none exists", claimed.SHOWN),
    ],
)
def test_a_verdict_needs_both_the_audit_and_the_truth(changes, claim, true, expected):
    assert claimed.verdict(result_of(**changes), claim, true) == expected


def a_line(name, *, found=None, **audit):
    values = {"claimed": 4.377178, "true": found or 9.0}
    kept = {"lower_bound": 0.456, "lower_bound_fdp": 2.345, "gaussian_epsilon": 1.871, "num_canaries": 500}
    kept |= {"num_rounds": 2, "confidence": 0.95, "most_visible": 3.0, "sampler": "all", "worst": "many rows"}
    kept |= {"passed": True, "claimed": 1.871, "true": 6.0, "verdict": claimed.UNSEEN} | audit
    made = {"commit": "c" * 40, "device_kind": "cpu", "versions": {"dp-accounting": "0.6.0"}}
    return {"row": name, "seed": 0, "values": values, "audit": kept, "seconds": 3.0, "stamp": made}


def test_the_page_is_made_of_the_newest_lines_and_hides_nothing(tmp_path, monkeypatch, capsys):
    names = [recipe.name for recipe in RECIPES[:5]]
    lines = [
        a_line(names[0], verdict=claimed.SEEN),
        a_line(names[0], true=1.871, verdict=claimed.HOLDS),
        a_line(names[1], found="none exists", claimed=None, true="none exists", verdict=claimed.SHOWN),
        a_line(names[3], verdict=claimed.SEEN, passed=False),
        a_line(names[4]),
    ]
    for module in (harness, claimed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "claimed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert claimed.main(["--only-page"]) == 0
    page = (tmp_path / "claimed.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert "In 1 of 2 audited rows that claim less than is valid the audit refutes the claim" in page
    assert f"not visible to audits of this size: {names[4]!r}" in page
    assert "refuted by the curve: 2.34 against 1.88" in page  # a lower bound is rounded down, a claim up
    assert "| 0.45 " in page
    assert "| no number" in page
    assert len(re.findall(r"^\| control", page, flags=re.M)) == 2
    for part in ("User-level", "δ = 1e-5", "neighbours", "sampling", "commit cccccccccccc", "device cpu"):
        assert part in page, part
    assert r"$\varepsilon$" in (tmp_path / "claimed.tex").read_text(encoding="utf-8")

    alarm = a_line(names[0], true=1.871, verdict=claimed.FALSE_ALARM, passed=False, lower_bound=2.0)
    with open(tmp_path / "claimed.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(alarm) + "\n")
    assert claimed.main(["--only-page"]) == 1
    assert f"FALSE ALARMS: {names[0]!r}" in capsys.readouterr().out


def test_a_row_through_the_rounds(monkeypatch):
    """Noise that is not clipped for, seen by few canaries; and every audit claims what its row says it does."""
    monkeypatch.setattr("fedjax_rec.federated.round._compiler_options", lambda: {"xla_backend_optimization_level": 0})
    line = claimed.measure(RECIPES[2], 0, num_canaries=200)
    assert line["values"] == {"claimed": "LDP, no ε", "true": "none exists"}
    assert line["audit"]["lower_bound"] >= line["audit"]["most_visible"] > 1.5
    assert line["audit"]["verdict"] == claimed.SHOWN
    json.dumps(line)
    audit = BY_NAME["mean weighted by examples"].audit(100)
    assert audit.transforms.dp_event(UNBOUNDED, 0) == _claims.noised().dp_event(UNBOUNDED, 0)
    right = chain(clip_by_global_norm(_claims.CLIP), gaussian_noise(_claims.NOISE * _claims.CLIP))
    assert right.dp_event(UNBOUNDED, 0).noise_multiplier == _claims.NOISE
