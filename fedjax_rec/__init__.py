"""Federated recommenders with honest differential privacy, at accelerator speed.

A client is a pure function, a round is its vmap, everything done to an update is one link of a chain, and epsilon is a
number you can ask for.
"""

# Data: interactions -> split -> one padded, bucketed row set per client.
from fedjax_rec.data import (
    Interactions,
    Split,
    leave_one_out,
    load,
    ratio_split,
    shown_at_test,
    strong_generalization,
    write_interactions,
)
from fedjax_rec.data.clients import ClientData, client_data, client_data_from_examples
from fedjax_rec.data.criteo import read_criteo
from fedjax_rec.data.mind import mind_clients, read_mind
from fedjax_rec.data.negatives import Negatives

# isort: split
# Methods, one line a file.
from fedjax_rec.algorithms.apfl import apfl, apfl_score
from fedjax_rec.algorithms.cofedrec import cofedrec
from fedjax_rec.algorithms.ditto import ditto, ditto_score
from fedjax_rec.algorithms.dpals import dpals, dpals_score
from fedjax_rec.algorithms.fcf import fcf, fcf_score
from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.algorithms.fedgan import fedgan
from fedjax_rec.algorithms.fedkd import fedkd, fedkd_score
from fedjax_rec.algorithms.fedmf import fedmf
from fedjax_rec.algorithms.fedncf import fedncf
from fedjax_rec.algorithms.fednova import fednova
from fedjax_rec.algorithms.fedprox import fedprox
from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.algorithms.fedrec import fedrec
from fedjax_rec.algorithms.fedrecon import fedrecon, reconstruct
from fedjax_rec.algorithms.fedsequence import fedsequence, fedsequence_score
from fedjax_rec.algorithms.fedvae import fedvae, fedvae_score
from fedjax_rec.algorithms.gpfedrec import gpfedrec, private_tower
from fedjax_rec.algorithms.item_counts import item_counts, item_counts_score
from fedjax_rec.algorithms.local_only import local_only, local_score
from fedjax_rec.algorithms.pfedrec import personal_scorer, pfedrec
from fedjax_rec.algorithms.prediction_exchange import prediction_exchange
from fedjax_rec.algorithms.scaffold import scaffold
from fedjax_rec.algorithms.server_encoder import server_encoder
from fedjax_rec.algorithms.silo_dpsgd import silo_dpsgd

# isort: split
# Models, and what a method is made of.
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.uploads import own_score
from fedjax_rec.models.base import Examples, Model, Shared, View
from fedjax_rec.models.centralised import centralised
from fedjax_rec.models.cfgan import cfgan_scorer, train_cfgan
from fedjax_rec.models.markov import markov_scorer, markov_weights
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.mult_vae import mult_vae, mult_vae_scorer
from fedjax_rec.models.neural_cf import gmf, mlp, neumf
from fedjax_rec.models.rec_vae import rec_vae, rec_vae_scorer
from fedjax_rec.models.vae_training import train_mult_vae

# isort: split
# Large recommenders: what comes next, item sides of ids and content, adapters, text, clicks.
from fedjax_rec.models.bert4rec import bert4rec
from fedjax_rec.models.class_sums import class_means, class_sums, dp_class_sums, name_space
from fedjax_rec.models.clicks import client_clicks, with_user_values
from fedjax_rec.models.content import Modality, content_tower, load_vectors
from fedjax_rec.models.cross_network import dcn_v2
from fedjax_rec.models.deep_fm import deep_fm, factorization_machine, logistic_regression
from fedjax_rec.models.history_factors import history_factors
from fedjax_rec.models.hstu import hstu
from fedjax_rec.models.items import ItemTower, id_table
from fedjax_rec.models.labelled_vectors import LabelledVectors, deal
from fedjax_rec.models.lora import init_lora, with_lora
from fedjax_rec.models.news import impression_loss, nrms
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import SequenceModel, sequence_scorer
from fedjax_rec.models.sequence_losses import binary_cross_entropy, full_cross_entropy, gbce, sampled_softmax
from fedjax_rec.models.sequence_training import train_sequence
from fedjax_rec.models.two_tower import two_tower
from fedjax_rec.text.encoder import TextEncoder, embed_texts, find_encoder, load_encoder
from fedjax_rec.text.head import head_scores, linear_head
from fedjax_rec.text.sentiment140 import read_sentiment140

# isort: split
# Devices: tiers of one model, rounds that do not wait; from a teacher to a student that a device can hold.
from fedjax_rec.compression.post_training import dequantize, quantize_params
from fedjax_rec.distillation.fusion import fuse
from fedjax_rec.distillation.losses import kl, ranking, relaxed_ranking
from fedjax_rec.distillation.private import NoisyRounds, distill_private
from fedjax_rec.distillation.student import distilled
from fedjax_rec.distillation.teacher import ensemble, linear_teacher, sequence_teacher, vae_teacher
from fedjax_rec.federated.asynchronous import stragglers, with_staleness
from fedjax_rec.federated.device_times import DeviceTimes, arrival_sampler, simulate_arrivals
from fedjax_rec.federated.tiers import Tier, axes_of_size, named_axes, with_tiers

# isort: split
# Rounds: cohort, chain of update transforms, compiled training.
from fedjax_rec.federated.cohort import Sampler, fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.lazy_rounds import lazy_rounds
from fedjax_rec.federated.round import RoundKeys, Rounds, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.sparse_server import sparse_sgd
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, Summation, UpdateTransform, Wire, chain

# isort: split
# Privacy: clips and noises, links of the chain.
from fedjax_rec.privacy.adafest import adafest
from fedjax_rec.privacy.adaptive_clip import adaptive_clip, user_level_adaptive_clip
from fedjax_rec.privacy.correlated import best_bands, correlated_noise, published, user_level_correlated
from fedjax_rec.privacy.discrete import discrete_gaussian_noise, round_to_grid, skellam_noise
from fedjax_rec.privacy.group_clip import clip_by_group_norm
from fedjax_rec.privacy.laplace import clip_by_l1_norm, laplace_noise
from fedjax_rec.privacy.local_noise import charge_local, local_gaussian, local_laplace, shuffled_spent
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp
from fedjax_rec.privacy.privunit import privunit
from fedjax_rec.privacy.randomized_response import k_randomized_response, randomized_response
from fedjax_rec.privacy.schedule import calibrate_schedule, geometric, scheduled_gaussian
from fedjax_rec.privacy.select_rows import head_items, select_rows
from fedjax_rec.privacy.strategies import banded_toeplitz, tree

# isort: split
# Privacy: single releases, accounting, ledger, budget, private choices, audits.
from fedjax_rec.evaluation.private import PrivateEarlyStopping, release_metrics
from fedjax_rec.models.dp_ease import dp_ease_scorer, dp_ease_weights
from fedjax_rec.models.dp_gram import dp_gram
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.privacy import Budget, Ledger, calibrate_noise_multiplier, epsilon_curve, privacy_spent
from fedjax_rec.privacy.audit import audit_rounds
from fedjax_rec.privacy.budget import Phase, Plan, solve
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.privacy.pate import confident_gnmax
from fedjax_rec.privacy.renyi_filter import RenyiFilter
from fedjax_rec.privacy.selection import select_privately

# isort: split
# Sums that hide uploads, bytes on the wire, and servers that look at each upload.
from fedjax_rec.compression.drive import drive
from fedjax_rec.compression.half import half_precision_download, half_precision_upload
from fedjax_rec.compression.item_subset import item_subset
from fedjax_rec.compression.low_rank import low_rank
from fedjax_rec.compression.quantize import quantize
from fedjax_rec.compression.rand_k import rand_k
from fedjax_rec.compression.sketch import count_sketch
from fedjax_rec.compression.top_k import top_k
from fedjax_rec.security.crypto_sum import crypto_secure_sum
from fedjax_rec.security.distributed import discrete_gaussian_shares, skellam_shares, without_colluders
from fedjax_rec.security.encrypted import encrypted_sum
from fedjax_rec.security.fltrust import fltrust
from fedjax_rec.security.ring import fixed_point, ring_sum
from fedjax_rec.security.robust import clip_by_row_norm, krum, median, multi_krum, trimmed_mean
from fedjax_rec.security.simulated import simulated_secure_sum, simulated_sum

# isort: split
# Attacks: what uploads give away, and what malicious clients do.
from fedjax_rec.attacks.attributes import infer_attributes
from fedjax_rec.attacks.fake_users import fake_profiles, with_fake_users
from fedjax_rec.attacks.generator_membership import generator_membership
from fedjax_rec.attacks.interactions import infer_interactions
from fedjax_rec.attacks.poisoned_uploads import a_hum, adaptive, explicit_boosting, fedrecattack
from fedjax_rec.attacks.poisoning import poisoned
from fedjax_rec.attacks.poisoning_targets import exposure, target_cases
from fedjax_rec.attacks.rating_inversion import invert_ratings
from fedjax_rec.attacks.reidentification import reidentify
from fedjax_rec.attacks.singling_out import group_risks
from fedjax_rec.attacks.uniqueness import uniqueness
from fedjax_rec.attacks.uploads import observed_uploads, secure_sums
from fedjax_rec.security.padding import pad_rows

# isort: split
# Virtual users: histories drawn from what was released.
from fedjax_rec.synthesis.gan import gan_method
from fedjax_rec.synthesis.generator import Generator, draw_histories
from fedjax_rec.synthesis.gram import gram_method
from fedjax_rec.synthesis.lengths import dp_lengths
from fedjax_rec.synthesis.marginals import popularity_method
from fedjax_rec.synthesis.methods import Method as GeneratorMethod
from fedjax_rec.synthesis.next_item import next_item_method
from fedjax_rec.synthesis.plan import fit_generator
from fedjax_rec.synthesis.report import evaluate_virtual
from fedjax_rec.synthesis.vae import vae_method
from fedjax_rec.synthesis.virtual import virtual_users

# isort: split
# Anonymised releases.
from fedjax_rec.anonymization.apply import anonymize
from fedjax_rec.anonymization.item_sets import enforce_km, km_anonymity
from fedjax_rec.anonymization.microaggregation import microaggregate
from fedjax_rec.anonymization.policy import read_policy
from fedjax_rec.anonymization.pseudonyms import pseudonymize
from fedjax_rec.anonymization.randomized_sets import randomize_sets
from fedjax_rec.anonymization.replacement import replace_items
from fedjax_rec.anonymization.risk import risk_report
from fedjax_rec.anonymization.tables import anonymize_table, anonymize_users, k_anonymity, l_diversity, t_closeness

# isort: split
# Why this item: what each item of a history contributes.
from fedjax_rec.interpretation.deletion import deletion_area, deletion_curve
from fedjax_rec.interpretation.explain import explain, recommend
from fedjax_rec.interpretation.gradients import integrated_gradients
from fedjax_rec.interpretation.refit import Refit, refitted_history_model
from fedjax_rec.interpretation.removal import removals
from fedjax_rec.interpretation.shapley import exact_shapley, sampled_shapley
from fedjax_rec.interpretation.value import linear_history_model, sequence_history_model

# isort: split
# Evaluation.
from fedjax_rec.evaluation import Evaluation, cases, client_scorer, evaluate, expect_sampled
from fedjax_rec.evaluation.clicks import auc, logloss, user_auc
from fedjax_rec.evaluation.fairness import mdac
from fedjax_rec.evaluation.impressions import impression_metrics

__version__ = "0.1.0"
