"""Risk: two parts whose guarantees exclude each other run together, and a report claims both."""

import dp_accounting
import jax
import optax
import pytest

import fedjax_rec as fr
from fedjax_rec.federated.releases import check_pair, releases
from fedjax_rec.privacy.randomized_response import randomized_response

NUM_CLIENTS = 12
CLIP = fr.clip_by_global_norm(1.0)
NOISED = fr.user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
POINTS = fr.fixed_point(largest=1.0, max_clients=NUM_CLIENTS)
BOUNDED = fr.chain(CLIP, fr.fixed_point(largest=1.0, max_clients=NUM_CLIENTS, num_numbers=200))
EVERYONE = fr.full_participation(NUM_CLIENTS)
REPLACED = fr.full_participation(NUM_CLIENTS, relation="replace_one")
SAMPLED = fr.poisson(NUM_CLIENTS, cohort_size=4)
ROBUST = {
    "median": lambda: fr.median(min_support=1, max_clients=NUM_CLIENTS),
    "trimmed mean": lambda: fr.trimmed_mean(0.1, min_support=1, max_clients=NUM_CLIENTS),
    "krum": lambda: fr.krum(1, max_clients=NUM_CLIENTS),
    "multi-krum": lambda: fr.multi_krum(1, 3, max_clients=NUM_CLIENTS),
}
SECURE = {
    "simulated": lambda **more: fr.simulated_secure_sum(degree=4, threshold=3, **more),
    "crypto": lambda **more: fr.crypto_secure_sum(session="test", degree=4, threshold=3, **more),
    "encrypted": lambda **more: fr.encrypted_sum(bits=16, max_clients=NUM_CLIENTS, **more),
}


@pytest.fixture(scope="module")
def clients():
    return fr.client_data(fr.leave_one_out(fr.load("synthetic", num_users=NUM_CLIENTS, num_items=40, seed=0)))


def make(clients, transforms, sampler=EVERYONE, **settings):
    model = fr.matrix_factorization(clients.num_items, dim=4)
    algorithm = fr.fedavg(model, client_optimizer=optax.sgd(0.1), **settings)
    return fr.make_rounds(algorithm, transforms, sampler, clients)


@pytest.mark.parametrize("secure", SECURE)
@pytest.mark.parametrize("rule", ROBUST)
def test_rules_that_look_at_single_uploads_and_sums_that_hide_them(secure, rule):
    with pytest.raises(ValueError, match="single uploads"):
        fr.chain(POINTS, SECURE[secure](), ROBUST[rule]())


@pytest.mark.parametrize("secure", SECURE)
@pytest.mark.parametrize(
    "link", [fr.top_k(0.1), fr.drive(), fr.quantize(4)], ids=["top-k", "drive", "quantiser with a scale of its own"]
)
def test_uploads_that_are_decoded_one_by_one_and_sums_that_hide_them(secure, link):
    with pytest.raises(ValueError, match=r"before anything is decoded.*rand_k"):
        fr.chain(link, POINTS, SECURE[secure]())


@pytest.mark.parametrize("rule", ROBUST)
def test_central_noise_after_a_rule_without_a_lipschitz_bound(clients, rule):
    with pytest.raises(ValueError, match="no Lipschitz bound"):
        make(clients, fr.chain(NOISED, ROBUST[rule]()))


@pytest.mark.parametrize(
    ("sampler", "links", "words"),
    [
        (SAMPLED, [SECURE["simulated"]], "replace_one"),
        (EVERYONE, [SECURE["simulated"]], "replace_one"),
        (fr.fixed_size(NUM_CLIENTS, cohort_size=6), [SECURE["simulated"]], "shares, of which the bound needs 10"),
        (REPLACED, [SECURE["simulated"]], "Give the secure sum min_clients=10"),
    ],
    ids=["sampled by coins", "add or remove", "too small a cohort", "sums of too few let through"],
)
def test_noise_in_shares_without_what_its_bound_needs(sampler, links, words):
    shares = fr.skellam_shares(100.0, min_clients=10)
    with pytest.raises(ValueError, match=words):
        check_pair(fr.chain(BOUNDED, shares, *[link() for link in links]), sampler)


def test_noise_in_shares_that_gains_from_sampling():
    links = fr.chain(BOUNDED, fr.skellam_shares(100.0, min_clients=6), SECURE["simulated"](min_clients=6))
    check_pair(links, REPLACED)
    with pytest.raises(ValueError, match="Sampling has a bound"):
        check_pair(links, fr.fixed_size(NUM_CLIENTS, cohort_size=8))


def test_noise_in_shares_on_what_is_not_rounded_or_not_bounded():
    for links in ((CLIP,), (POINTS,), (CLIP, POINTS)):
        with pytest.raises(ValueError, match="needs integers of bounded norm"):
            check_pair(fr.chain(*links, fr.skellam_shares(10.0, min_clients=3)), REPLACED)


def test_local_and_central_noise_claimed_as_one():
    both = fr.chain(CLIP, fr.local_gaussian(5.0), fr.gaussian_noise(1.0))
    with pytest.raises(ValueError, match="noise of their own"):
        check_pair(both, EVERYONE)


def test_two_noises_in_one_chain():
    with pytest.raises(ValueError, match="2 links of this chain add noise"):
        fr.chain(NOISED, fr.gaussian_noise(1.0))
    reports = [randomized_response(1.0, num_items=5, num_reports=5) for _ in range(2)]
    with pytest.raises(ValueError, match="2 links of this chain add noise"):
        fr.chain(*reports)


def test_cohorts_that_no_coin_decides_are_not_accounted_as_poisson_ones():
    for sampler in (EVERYONE, REPLACED, fr.in_turn(NUM_CLIENTS, num_groups=3)):
        for event, _ in releases(NOISED, sampler, 0, 6):
            assert not isinstance(event, dp_accounting.PoissonSampledDpEvent)


def test_weights_that_depend_on_data_without_a_bound(clients):
    with pytest.raises(ValueError, match="no public bound"):
        make(clients, NOISED, weigh_by_examples=True, mean_examples=10.0)


def test_a_method_that_looks_at_single_uploads_and_a_secure_sum(clients):
    model = fr.private_tower(clients.num_items, dim=4)
    algorithm = fr.gpfedrec(model, num_clients=clients.num_clients, num_items=clients.num_items)
    with pytest.raises(ValueError, match="shows the server none"):
        fr.make_rounds(algorithm, fr.chain(POINTS, SECURE["simulated"]()), EVERYONE, clients)


@pytest.mark.parametrize("secure", SECURE)
def test_sums_that_fail_for_lack_of_the_one_who_is_to_be_hidden(secure):
    """Whether there is a sum would tell who is there: no noise on the sum hides that."""
    enough, short = (fr.chain(BOUNDED, fr.gaussian_noise(1.0), SECURE[secure](min_clients=m)) for m in (11, 12))
    check_pair(enough, EVERYONE)
    check_pair(short, REPLACED)
    for links, sampler in ((short, EVERYONE), (enough, SAMPLED)):
        with pytest.raises(ValueError, match="whether there is a sum"):
            check_pair(links, sampler)
    dropping = fr.chain(BOUNDED, fr.gaussian_noise(1.0), SECURE[secure](min_clients=4, dropout_prob=0.1))
    check_pair(dropping, REPLACED)
    with pytest.raises(ValueError, match="may drop out"):
        check_pair(dropping, EVERYONE)


def test_large_poisson_cohorts_may_refuse_small_sums():
    big = fr.poisson(10_000, cohort_size=400)
    links = fr.chain(BOUNDED, fr.gaussian_noise(1.0), fr.simulated_secure_sum(degree=4, threshold=3, min_clients=200))
    check_pair(links, big)


def test_sums_that_could_overflow():
    with pytest.raises(ValueError, match=r"room for 12 to 21 bits"):
        fr.fixed_point(largest=1.0, max_clients=1025, bits=22)
    with pytest.raises(ValueError, match="at most 16 bits"):
        fr.encrypted_sum(bits=18, max_clients=943)


def test_a_sum_taken_on_the_host_and_a_mesh(clients):
    mesh = jax.make_mesh((1,), ("clients",))
    model = fr.matrix_factorization(clients.num_items, dim=4)
    algorithm = fr.fedavg(model, client_optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="taken on the host"):
        fr.make_rounds(algorithm, fr.chain(POINTS, SECURE["crypto"]()), EVERYONE, clients, mesh=mesh)
