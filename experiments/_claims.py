"""The rows of the study of claimed and true epsilons: recipes, what they claim, what they cost, how to audit them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent, dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant

from experiments import _recipes as recipes
from experiments._recipes import sampled_gaussian
from experiments.ldp import laplace_on_uploads
from fedjax_rec.federated.cohort import Sampler, full_participation, in_turn, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.privacy import privacy_spent
from fedjax_rec.privacy.canaries import Layout
from fedjax_rec.privacy.local_noise import local_gaussian
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp
from fedjax_rec.privacy.randomized_response import randomized_response

DELTA = 1e-5
ADD, REPLACE, ZEROS = "add_or_remove_one", "replace_one", "zeros_instead"
NONE = "none exists"

# Everyone in every round, at the size of MovieLens 100K.
EVERYONE = {"num_users": 943, "num_numbers": 1682 * 32, "noise_multiplier": 10.0, "num_rounds": 100}
MEAN_RATINGS, MOST_RATINGS = 100_000 / 943, 737  # of a user of MovieLens 100K
# Cohorts, at the size of MovieLens 1M.
USERS, COHORT, ROUNDS = 6040, 256, 500
GROUPS, EPOCHS = 24, 20
CAPACITIES = (256, 288, 320)
NUM_BITS = 20

CLIP, NOISE, FEW = 0.5, 3.0, 2  # of the audits with everyone in every round: epsilon 1.87


@dataclass(frozen=True)
class Audit:
    """A run that is small enough to be audited.

    Attributes:
      transforms: the recipe.
      sampler: who takes part, of ``num_canaries`` clients or of fewer, whose runs are then pooled.
      num_rounds: of the run.
      true: what these rounds cost by the accountant: an event, an epsilon, or why there is none.
      claimed: what they are said to cost; "chain" for what its links and sampler declare, None if nothing is claimed.
      layout: of the canaries' updates.
      crowd: whether canaries in a crowd are tried too.
      make: the round code.
    """

    transforms: UpdateTransform
    sampler: Sampler
    num_rounds: int
    true: DpEvent | float | str
    claimed: DpEvent | float | str | None = "chain"
    layout: Layout = field(default_factory=Layout)
    crowd: bool = False
    make: Callable = make_rounds


@dataclass(frozen=True)
class Recipe:
    """A row.

    Attributes:
      name: of the row.
      does: what the recipe does, and where it is seen.
      truth: what its cost really is, and why.
      run: the settings of the run that the two epsilons are of, in words.
      relation: what neighbours are; of `ZEROS`, only numbers are asked for.
      claimed: epsilon as its users compute it, or words.
      true: epsilon that is valid for what runs, or words.
      audit: ``num_clients -> Audit``; None if another row's audit is this one's.
      num_canaries: of the audit.
    """

    name: str
    does: str
    truth: str
    run: str
    relation: str
    claimed: Callable[[], float | str]
    true: Callable[[], float | str]
    audit: Callable[[int], Audit] | None
    num_canaries: int = 5000


def epsilon(cost: DpEvent | float | str, relation: str = ADD) -> float | str:
    """An event's epsilon at `DELTA`; numbers and words as they are."""
    if not isinstance(cost, DpEvent):
        return cost
    return privacy_spent(cost, delta=DELTA, relation=relation).epsilon


def everyone(noise_multiplier: float = EVERYONE["noise_multiplier"]) -> float:
    """Epsilon of the run with everyone in every round."""
    return epsilon(sampled_gaussian(1, noise_multiplier, EVERYONE["num_rounds"]))


def cohorts() -> float:
    """Epsilon of the run with Poisson cohorts."""
    return epsilon(sampled_gaussian(COHORT / USERS, 1.0, ROUNDS))


def noised(*links: UpdateTransform) -> UpdateTransform:
    """Links between the clip and the noise of an audit with everyone in every round."""
    return chain(clip_by_global_norm(CLIP), *links, gaussian_noise(NOISE * CLIP))


def few(noise_multiplier: float) -> DpEvent:
    """What such an audit's rounds cost."""
    return sampled_gaussian(1, noise_multiplier, FEW)


def laplace_audit(scale: float, n: int) -> Audit:
    links = chain(recipes.only_finite(), laplace_on_uploads(scale, n))
    return Audit(links, full_participation(n, relation=REPLACE), 1, NONE, None, layout=Layout(dense=0))


def weighted_audit(n: int) -> Audit:
    rows = Layout().rows
    mean = rows * MEAN_RATINGS / MOST_RATINGS  # so a canary's weight is that of the largest client
    weighted = recipes.weighted_by_examples(mean)
    return Audit(noised(weighted), full_participation(n), FEW, few(NOISE * mean / rows), layout=Layout(dense=0))


def with_replacement_audit(n: int) -> Audit:
    size, rounds, noise = n // 2, 4, 2.0
    often = recipes.as_often_as_drawn(n, cohort_size=size)
    true = recipes.with_replacement_epsilon(noise, num_clients=n, cohort_size=size, num_rounds=rounds, delta=DELTA)
    links = chain(clip_by_global_norm(CLIP), often, gaussian_noise(noise * CLIP))
    return Audit(links, recipes.with_replacement(n, cohort_size=size), rounds, true)


def divided_again_audit(first_call: int, n: int) -> Audit:
    divisor, rounds = EVERYONE["num_users"], FEW - first_call
    noise = recipes.gaussian_noise_divided_again(NOISE * CLIP, divisor=divisor, first_call=first_call)
    last = NOISE * divisor**-first_call
    true = GaussianDpEvent(recipes.divided_again_multiplier(last, divisor=divisor, num_calls=rounds))
    links = chain(clip_by_global_norm(CLIP), noise)
    return Audit(links, full_participation(n), rounds, true, few(NOISE), layout=Layout(dense=0))


def realised_audit(n: int) -> Audit:
    words = "grows with the table"
    make = recipes.divided_by_the_realised_cohort
    return Audit(noised(), full_participation(n), FEW, words, crowd=True, make=make)


def order_audit(clip_norm: float, n: int) -> Audit:
    rows = Layout().rows
    links = chain(recipes.clip_by_norm_of_order(clip_norm), gaussian_noise(NOISE * clip_norm))
    true = few(NOISE / recipes.order_factor(clip_norm, rows))
    return Audit(links, full_participation(n), FEW, true, layout=Layout(dense=0))


def epoch_audit(n: int) -> Audit:
    groups = min(64, n)
    claimed = sampled_gaussian(1 / groups, 1.0, groups)
    links = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=1.0)
    return Audit(links, in_turn(n, num_groups=groups), groups, GaussianDpEvent(1.0), claimed)


def cut(num_users: int, cohort: int, capacity: int, noise_multiplier: float, num_rounds: int) -> DpEvent:
    """What Poisson cohorts that are cut at a capacity cost."""
    once = dp_event.TruncatedSubsampledGaussianDpEvent(num_users, cohort / num_users, capacity, noise_multiplier)
    return SelfComposedDpEvent(once, num_rounds)


def cut_audit(n: int) -> Audit:
    cohort, noise, rounds = n // 10, 1.2, 8
    links = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=noise)
    sampler = recipes.cut_poisson(n, cohort_size=cohort, capacity=cohort)
    return Audit(links, sampler, rounds, cut(n, cohort, cohort, noise, rounds))


def one_bit() -> DpEvent:
    """Randomised response of epsilon 1 for one bit: it is replaced by a fair coin with this probability."""
    return dp_event.RandomizedResponseDpEvent(2 / (1 + math.e), 2)


def count_ignored() -> float:
    """What dp-accounting's accountant of privacy loss distributions answers for all the bits."""
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(one_bit(), NUM_BITS).get_epsilon(DELTA))


def bits_audit(n: int) -> Audit:
    del n  # one client a run: its own report is what is released
    links = randomized_response(1.0, num_items=NUM_BITS, num_reports=1)
    true = SelfComposedDpEvent(one_bit(), NUM_BITS)
    layout = Layout(rows=NUM_BITS, dense=0)
    return Audit(links, full_participation(1, relation=REPLACE), 1, true, count_ignored(), layout=layout)


def without_replacement(noise_multiplier: float) -> DpEvent:
    """What cohorts of a fixed size cost; the accountant doubles the sensitivity."""
    once = dp_event.SampledWithoutReplacementDpEvent(USERS, COHORT, GaussianDpEvent(noise_multiplier))
    return SelfComposedDpEvent(once, ROUNDS)


def doubled_audit(n: int) -> Audit:
    noise = 3.0
    links = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=noise)
    sampler = full_participation(n, relation=REPLACE)
    return Audit(links, sampler, FEW, few(noise), few(2 * noise), layout=Layout(rows=4, dense=0))


def control_audit(n: int) -> Audit:
    noise, rounds = 1.2, 8
    links = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=noise)
    return Audit(links, poisson(n, cohort_size=n / 10), rounds, sampled_gaussian(0.1, noise, rounds), crowd=True)


LOCAL_NOISE, LOCAL_ROUNDS = 8.0, 50


def one_round_audit(n: int) -> Audit:
    del n  # as above
    links = chain(clip_by_global_norm(CLIP), local_gaussian(LOCAL_NOISE * CLIP))
    sampler = full_participation(1, relation=REPLACE)
    one, all_rounds = (sampled_gaussian(1, LOCAL_NOISE, rounds) for rounds in (1, LOCAL_ROUNDS))
    claimed = epsilon(one, REPLACE)
    return Audit(links, sampler, LOCAL_ROUNDS, all_rounds, claimed, layout=Layout(rows=4, dense=0))


def divided_again() -> str:
    """The cost of the first two rounds alone."""
    noise = recipes.divided_again_multiplier(EVERYONE["noise_multiplier"], divisor=EVERYONE["num_users"], num_calls=2)
    return f"{epsilon(GaussianDpEvent(noise)):,.0f} after 2 rounds"


ALL_RUN = "all clients, 100 rounds, noise 10 clip norms"
COHORT_RUN = f"{COHORT} of {USERS} expected, {ROUNDS} rounds, noise 1 clip norm"


def recipe_of_order(clip_norm: float, does: str, truth: str) -> Recipe:
    factor = recipes.order_factor(clip_norm, EVERYONE["num_numbers"])
    return Recipe(
        f"clip norm {clip_norm:g} given as the norm's order", does, truth, ALL_RUN, ADD,
        everyone, lambda: everyone(EVERYONE["noise_multiplier"] / factor), partial(order_audit, clip_norm),
    )  # fmt: skip


def recipe_of_capacity(capacity: int) -> Recipe:
    first = capacity == CAPACITIES[0]
    does = (
        "Cohorts are drawn by Poisson sampling and cut to a capacity, for arrays of fixed size; the account is that of "
        "Poisson sampling without a cut."
    )
    truth = (
        "Where a cohort is full, who joins it pushes another out, and the sum moves by two clip norms. The bound is "
        "that of dp_accounting's TruncatedSubsampledGaussianDpEvent; a quarter above the expected size is enough. This "
        "audit cannot see it: a canary owns its rows, who is pushed out changes somebody else's, and a canary that the "
        "coin leaves out keeps its place in the cohort."
    )
    return Recipe(
        f"Poisson cohorts cut at {capacity}", does if first else "", truth if first else "", COHORT_RUN, ADD, cohorts,
        lambda: epsilon(cut(USERS, COHORT, capacity, 1.0, ROUNDS)), cut_audit if first else None,
    )  # fmt: skip


def recipe_of_laplace(scale: float, does: str = "", truth: str = "") -> Recipe:
    return Recipe(
        f"Laplace noise {scale:g} on uploads, not clipped", does, truth, "all clients, any number of rounds", REPLACE,
        lambda: "LDP, no ε", lambda: NONE, partial(laplace_audit, scale), 1000,
    )  # fmt: skip


RECIPES = (
    Recipe(
        "control: clip, Gaussian noise, Poisson",
        "Updates clipped to a joint L2 norm, noise once on the sum, Poisson cohorts, division by the expected size.",
        "What is claimed is what is accounted.",
        COHORT_RUN, ADD, cohorts, cohorts, control_audit,
    ),
    recipe_of_laplace(
        0.1,
        'Every client adds Laplace noise to its item table before it uploads it, and this is called local differential '
        'privacy (Zhang et al., 2023, "Dual Personalization on Federated Recommendation", as others quote it).',
        "Nothing bounds what is uploaded, so the noise hides nothing of a client whose table is far from the others'; "
        "any distance well above the noise will do. The audit is of the sum over 1,000 clients, which carries the "
        "noise of all, and a single upload shows no less; updates that are not finite are left out, as a server might.",
    ),
    recipe_of_laplace(0.5),
    Recipe(
        "mean weighted by examples",
        "Updates are clipped and averaged with weights proportional to a client's number of examples; the noise is "
        "that of a plain mean. So does a widely used federated framework.",
        "A client's weight multiplies what it can change, and nothing bounds the weight. The audit gives its canaries "
        "the weight of the largest client of MovieLens 100K, 737 ratings where the mean is 106.",
        ALL_RUN, ADD, everyone, lambda: NONE, weighted_audit,
    ),
    Recipe(
        "fixed cohorts drawn with replacement",
        "A fixed number of draws with replacement makes a cohort, and a client drawn twice counts twice; the account "
        "is that of Poisson sampling. So does a research framework for federated learning.",
        "The number of draws of one client is binomial. The bound is of that mixture of Gaussians, for a client that "
        "sends zeros instead; with any other update in its place it would be larger. What the audit misses is in the "
        "few clients that are drawn twice or more.",
        COHORT_RUN, ZEROS, cohorts,
        lambda: recipes.with_replacement_epsilon(
            1.0, num_clients=USERS, cohort_size=COHORT, num_rounds=ROUNDS, delta=DELTA
        ),
        with_replacement_audit,
    ),
    Recipe(
        "noise scale divided again at every call",
        "The scale is divided by the cohort's size to turn noise for a sum into noise for a mean, and the "
        "quotient is stored where the scale was. Seen in the code of a widely used federated framework.",
        "The second call has a noise smaller by that factor, the third by its square. The figure is of the first two "
        "rounds, one table and 943 clients; no later round has any noise to speak of. An audit of both rounds does not "
        "see it, as its scores add rounds up and so keep the noise of the first; one of the second round alone does.",
        ALL_RUN, ADD, everyone, divided_again, partial(divided_again_audit, 0),
    ),
    Recipe(
        "the same, its second round alone", "", "", "round 2 of that run; the claim is of all rounds", ADD, everyone,
        lambda: epsilon(GaussianDpEvent(EVERYONE["noise_multiplier"] / EVERYONE["num_users"])),
        partial(divided_again_audit, 1),
    ),
    Recipe(
        "divided by the realised cohort",
        "The noised sum is divided by the number of clients, or examples, that came. So do widely used libraries for "
        "private training, for batches of examples.",
        "The size of the noise in rows that nobody touched tells how many came, and so whether one more did. What that "
        "shows grows with the size of the table, so no ε holds for all tables. With another client in its place "
        "instead of none the size is the same, and the fault is gone.",
        ALL_RUN, ADD, everyone, lambda: "grows with the table", realised_audit, 1000,
    ),
    recipe_of_order(
        10.0,
        "The clip norm C is passed where the order of the norm belongs, so updates are scaled to a C-norm of at most "
        "C, and C is thought to bound the L2 norm. Seen in the code of a widely used federated framework.",
        "For C above 2 the L2 norm of d equal numbers is up to C d^(1/2 - 1/C) then: here d = 1682 x 32, in the audit "
        "the 16 rows of a canary. For C of 2 or less no such norm is below the L2 norm, so the claim holds by luck, "
        "and updates are clipped far more than was meant.",
    ),
    recipe_of_order(1.0, "", ""),
    Recipe(
        "every client once an epoch, as Poisson",
        "Clients, or examples, are dealt out into batches so that each takes part once an epoch, and the account is "
        "that of Poisson sampling (Chua et al., 2024, \"How Private are DP-SGD Implementations?\").",
        "Without secret coins nothing is amplified: an epoch costs a client one release without sampling. The bound "
        "makes no use of a secret order of the batches. Here groups take turns.",
        f"{GROUPS} batches, {EPOCHS} epochs, noise 1 clip norm", ADD,
        lambda: epsilon(sampled_gaussian(1 / GROUPS, 1.0, GROUPS * EPOCHS)),
        lambda: epsilon(sampled_gaussian(1, 1.0, EPOCHS)),
        epoch_audit,
    ),
    *(recipe_of_capacity(capacity) for capacity in CAPACITIES),
    Recipe(
        "twenty randomised answers counted as one",
        "A client answers 20 bits by randomised response with ε = 1 each, and the account of all is asked of "
        "dp-accounting's PLDAccountant, which ignores the count of this event (computed here with the version of the "
        "stamp).",
        "Another history may turn every bit, so the answers add up. The audit is of one client's own report.",
        "20 bits, one report", REPLACE,
        count_ignored, lambda: epsilon(SelfComposedDpEvent(one_bit(), NUM_BITS), REPLACE), bits_audit, 400,
    ),
    Recipe(
        "add-or-remove noise, replace-one account",
        "Cohorts have a fixed size, which has a bound under replace-one only, and the accountant is given the noise "
        "over one clip norm.",
        "Replacing a client moves the sum by two clip norms, so the noise is half of what was said. The audit is of a "
        "cohort of everyone, where no sampling blurs the factor.",
        f"{COHORT} of {USERS}, {ROUNDS} rounds, noise 4 clip norms", REPLACE,
        lambda: epsilon(without_replacement(8.0), REPLACE), lambda: epsilon(without_replacement(4.0), REPLACE),
        doubled_audit, 20_000,
    ),
    Recipe(
        "the ε of one report for all rounds",
        "Every client clips its update and adds Gaussian noise to it, by a formula for one release, in every round; "
        "that release's ε is quoted for the run.",
        "Reports of the same client compose. The audit is of one client's own reports.",
        f"{LOCAL_ROUNDS} rounds, noise {LOCAL_NOISE:g} clip norms a client", REPLACE,
        lambda: epsilon(sampled_gaussian(1, LOCAL_NOISE, 1), REPLACE),
        lambda: epsilon(sampled_gaussian(1, LOCAL_NOISE, LOCAL_ROUNDS), REPLACE),
        one_round_audit, 400,
    ),
)  # fmt: skip
