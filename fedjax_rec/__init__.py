"""Federated recommenders with honest differential privacy, at accelerator speed.

A client is a pure function, a round is its vmap, everything done to an update is one link of a chain, and epsilon is a
number you can ask for.
"""

# Data: interactions -> split -> one padded, bucketed row set per client.
from fedjax_rec.data import Interactions, Split, leave_one_out, load, ratio_split, strong_generalization
from fedjax_rec.data.clients import ClientData, client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives

# isort: split
# Models and methods.
from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.algorithms.silo_dpsgd import silo_dpsgd
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.models.base import Examples, Model, Shared, View
from fedjax_rec.models.matrix_factorization import matrix_factorization

# isort: split
# Rounds: cohort, chain of update transforms, compiled training.
from fedjax_rec.federated.cohort import Sampler, fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, Rounds, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UpdateTransform, chain

# isort: split
# Privacy: mechanisms (links of the chain), accounting, ledger and budget.
from fedjax_rec.privacy import Budget, Ledger, calibrate_noise_multiplier, epsilon_curve, privacy_spent
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp

# isort: split
# Evaluation.
from fedjax_rec.evaluation import Evaluation, cases, client_scorer, evaluate, expect_sampled

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Budget",
    "ClientData",
    "ClientOutput",
    "Evaluation",
    "Examples",
    "Interactions",
    "Ledger",
    "Model",
    "Negatives",
    "RoundKeys",
    "Rounds",
    "Rows",
    "Sampler",
    "ServerState",
    "Shared",
    "Split",
    "UpdateTransform",
    "View",
    "calibrate_noise_multiplier",
    "cases",
    "chain",
    "client_data",
    "client_data_from_examples",
    "client_scorer",
    "clip_by_global_norm",
    "epsilon_curve",
    "evaluate",
    "expect_sampled",
    "fedavg",
    "fedsgd",
    "fixed_size",
    "full_participation",
    "gaussian_noise",
    "leave_one_out",
    "load",
    "make_rounds",
    "matrix_factorization",
    "poisson",
    "privacy_spent",
    "ratio_split",
    "silo_dpsgd",
    "strong_generalization",
    "user_level_dp",
]
