"""Risk: a chain that cannot be accounted for runs all the same, or is accounted as another one."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import (
    UNBOUNDED,
    Bound,
    UpdateTransform,
    Wire,
    chain,
    plain_wire,
    scale,
    select_update,
)
from fedjax_rec.models.matrix_factorization import linear_scorer, matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp

NUM_CLIENTS, NUM_ITEMS = 4, 5
DP = user_level_dp(l2_clip_norm=0.5, noise_multiplier=2.0)


def population(num_shards=1):
    examples = [(np.arange(n) % NUM_ITEMS, np.ones(n)) for n in (1, 2, 2, 7)]
    return client_data_from_examples(examples, num_items=NUM_ITEMS, num_shards=num_shards)


def algorithm(**options):
    return fedavg(linear_scorer(NUM_ITEMS, dim=2), client_optimizer=optax.sgd(0.1), **options)


def rounds(transforms=DP, sampler=None, data=None, method=None, **options):
    sampler = full_participation(NUM_CLIENTS) if sampler is None else sampler
    return make_rounds(method or algorithm(), transforms, sampler, data or population(), **options)


# What a chain says about privacy.


def test_the_event_is_stddev_over_clip():
    assert DP.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(2.0)
    assert chain(clip_by_global_norm(4.0), gaussian_noise(1.0)).dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(
        0.25
    )
    assert chain(clip_by_global_norm(4.0)).dp_event(UNBOUNDED, 0) is None
    assert chain().dp_event(UNBOUNDED, 0) is None


def test_every_link_before_the_noise_changes_the_bound_that_it_relies_on():
    tighter = chain(clip_by_global_norm(4.0), scale(-0.5), gaussian_noise(1.0))
    assert tighter.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(0.5)
    looser = chain(clip_by_global_norm(4.0), scale(10.0), gaussian_noise(1.0))
    assert looser.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(1 / 40)
    assert chain(scale(3.0), clip_by_global_norm(2.0)).sensitivity(UNBOUNDED) == Bound(l2=2.0)
    assert chain(clip_by_global_norm(2.0), scale(3.0)).sensitivity(UNBOUNDED) == Bound(l2=6.0)
    assert scale(3.0).sensitivity(UNBOUNDED) == UNBOUNDED


def test_chains_compose():
    inner = chain(clip_by_global_norm(2.0), scale(0.5))
    outer = chain(chain(), inner, chain(), gaussian_noise(3.0))
    assert outer.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(3.0)
    assert chain(clip_by_global_norm(2.0), chain(scale(3.0))).sensitivity(UNBOUNDED) == Bound(l2=6.0)


def test_links_run_left_to_right_on_clients_and_right_to_left_on_the_server():
    def tag(number):
        return UpdateTransform(
            client=lambda update, state, key: (update * 10 + number, {}),
            server=lambda total, state, key: (total * 10 + number, state),
        )

    links = chain(tag(1), tag(2), tag(3))
    state = links.init(None)
    assert links.client(0, state, jax.random.key(0))[0] == 123
    assert links.server(0, state, jax.random.key(0))[0] == 321


def test_links_get_their_own_state_key_and_metrics():
    def link(name, start):
        return UpdateTransform(
            init=lambda params: jnp.float32(start),
            client=lambda update, state, key: (update, {name: state + jax.random.uniform(key)}),
            server=lambda total, state, key: (total, state + 1 + jax.random.uniform(key)),
        )

    links = chain(link("a", 10.0), link("b", 10.0))
    state = links.init(None)
    _, metrics = links.client(jnp.ones(2), state, jax.random.key(0))
    _, new = links.server(jnp.ones(2), state, jax.random.key(1))
    values = [float(x) for x in (*metrics.values(), *(x - 1 for x in new))]
    assert list(metrics) == ["a", "b"]
    assert all(10 <= x < 11 for x in values)
    assert len(set(values)) == 4


def test_linear_needs_every_link():
    bent = UpdateTransform(linear=False)
    assert DP.linear
    assert not chain(clip_by_global_norm(1.0), bent, gaussian_noise(1.0)).linear


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ([gaussian_noise(1.0)], "bounds the update"),
        ([gaussian_noise(1.0), clip_by_global_norm(1.0)], "bounds the update"),
        ([scale(0.5), gaussian_noise(1.0)], "bounds the update"),
        ([clip_by_global_norm(1.0), gaussian_noise(1.0), gaussian_noise(1.0)], "2 links"),
        ([DP, DP], "2 links"),
        ([clip_by_global_norm(1.0), gaussian_noise(1.0), scale(10.0)], "noise last"),
        ([DP, scale(1.5)], "noise last"),
    ],
)
def test_chains_without_a_meaning_refuse(links, words):
    with pytest.raises(ValueError, match=words):
        chain(*links)


def test_a_link_after_the_noise_may_lower_the_bound():
    assert chain(DP, scale(0.5)).dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(
        2.0
    )  # an upper bound on what runs


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan, 1e-30, 1e30])
def test_clip_norms_out_of_range_refuse(bad):
    with pytest.raises(ValueError, match=r"l2_clip_norm must be .* got"):
        clip_by_global_norm(bad)


@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_noise_out_of_range_refuses(bad):
    with pytest.raises(ValueError, match="standard deviation"):
        gaussian_noise(bad)
    with pytest.raises(ValueError, match=r"noise_multiplier|standard deviation"):
        user_level_dp(l2_clip_norm=1.0, noise_multiplier=bad)


# What a round says about privacy.


def test_the_rounds_event_is_the_samplers_of_the_chains():
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    made = rounds(sampler=poisson(NUM_CLIENTS, cohort_size=3))
    assert (made.releases(0, 1)[0][0], made.relation) == (
        dp_accounting.PoissonSampledDpEvent(0.75, gaussian),
        "add_or_remove_one",
    )
    made = rounds(sampler=fixed_size(NUM_CLIENTS, cohort_size=3))
    event = dp_accounting.SampledWithoutReplacementDpEvent(NUM_CLIENTS, 3, gaussian)
    assert (made.releases(0, 1)[0][0], made.relation) == (event, "replace_one")
    made = rounds()
    assert (made.releases(0, 1)[0][0], made.relation) == (gaussian, "add_or_remove_one")
    assert not rounds(chain(clip_by_global_norm(1.0))).private


def test_weights_without_a_public_bound_are_refused_with_dp():
    unbounded = algorithm(weigh_by_examples=True, mean_examples=3.0)
    with pytest.raises(ValueError, match="max_examples"):
        rounds(method=unbounded)
    rounds(chain(clip_by_global_norm(1.0)), method=unbounded)
    rounds(method=algorithm(weigh_by_examples=True, max_examples=3))
    with pytest.raises(ValueError, match="max_examples"):
        algorithm(weigh_by_examples=True)


def test_single_uploads_are_refused_with_dp():
    individual = algorithm()._replace(individual=True)
    with pytest.raises(ValueError, match="single uploads"):
        rounds(method=individual)
    rounds(chain(), method=individual)


def test_parts_that_do_not_fit_refuse():
    with pytest.raises(ValueError, match="laid out for 2 devices and the mesh has 1"):
        rounds(data=population(num_shards=2))
    with pytest.raises(ValueError, match="draws from 9 clients and the population has 4"):
        rounds(sampler=poisson(9, cohort_size=3))


@pytest.mark.parametrize("bad", [0, -1, 4])
def test_the_number_of_rounds_is_checked(bad):
    made = rounds(span_size=3)
    with pytest.raises(ValueError, match=f"between 1 and span_size=3; got {bad}"):
        made.run(*made.init(jax.random.key(0)), RoundKeys(*(jax.random.key(i) for i in range(3))), bad)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_client_optimizers_with_state_for_rows_refuse(optimizer):
    with pytest.raises(ValueError, match="keeps state for item rows"):
        fedavg(linear_scorer(NUM_ITEMS), client_optimizer=optimizer)


def test_bpr_without_negatives_refuses():
    method = fedsgd(matrix_factorization(NUM_ITEMS, loss="bpr"), server_optimizer=optax.sgd(1.0))
    with pytest.raises(ValueError, match="negatives"):
        rounds(method=method)


def test_other_arguments_that_make_no_sense_refuse():
    with pytest.raises(ValueError, match="local_epochs must be at least 1; got 0"):
        algorithm(local_epochs=0)
    with pytest.raises(ValueError, match="logistic, bpr, squared; got 'hinge'"):
        matrix_factorization(NUM_ITEMS, loss="hinge")


# The small tools on updates.


def test_weights_scale_the_update():
    """n_k / mean, or min(n_k, b) / b, on top of the same training; lengths are 1, 2, 2 and 7."""
    client = jax.tree.map(lambda x: jnp.asarray(x[-1]), population().buckets[-1])
    assert client.length == 7

    def update(**weights):
        method = algorithm(**weights)
        shared = method.init(jax.random.key(0)).shared
        return to_dense(method.client_update(shared, (), client, jnp.int32(1), jax.random.key(1)).update)

    plain = update()
    by_mean = update(weigh_by_examples=True, mean_examples=3.0)
    capped = update(weigh_by_examples=True, max_examples=14)
    for weighted, factor in ((by_mean, 7 / 3), (capped, 0.5)):
        jax.tree.map(lambda a, b, f=factor: np.testing.assert_allclose(a, f * b, rtol=1e-6), weighted, plain)


def test_select_and_scale_keep_rows_apart_from_numbers():
    update = {"rows": Rows(jnp.array([1, 3]), jnp.array([[np.nan], [2.0]]), 4), "dense": jnp.array([np.inf])}
    dropped = to_dense(select_update(jnp.array(False), update))
    assert not any(np.any(x) for x in jax.tree.leaves(dropped))
    scaled, _ = scale(3.0).client(update, (), None)
    np.testing.assert_array_equal(scaled["rows"].ids, [1, 3])
    np.testing.assert_array_equal(scaled["rows"].values, [[np.nan], [6.0]])


def test_traffic_is_counted():
    update = {"rows": Rows(jnp.zeros(5, jnp.int32), jnp.zeros((5, 2)), 100), "dense": jnp.zeros(3)}
    assert plain_wire(update).total == 32 * (5 + 10 + 3)
    halve = UpdateTransform(upload=lambda wire, update: Wire(wire.numbers / 2, side_bits=wire.side_bits / 2))
    made = rounds(chain(halve, halve), data=population())
    # Compact rows of two length buckets or more: what the padded rows of each client hold, 2 numbers and an id a row,
    # and 3 dense numbers.
    sent = [32 * (b.row_ids.shape[1] * 3 + 3) for b in population().buckets for _ in b.client_id]
    assert made.download_bits == np.mean(sent)
    assert made.upload_bits == np.mean(sent) / 4
