"""What the clients of a run send and how it is added up: compression, fixed-point numbers, and the way of the sum."""

import math

from fedjax_rec.compression.drive import drive
from fedjax_rec.compression.half import half_precision_download
from fedjax_rec.compression.item_subset import item_subset
from fedjax_rec.compression.low_rank import low_rank
from fedjax_rec.compression.quantize import quantize
from fedjax_rec.compression.rand_k import rand_k
from fedjax_rec.compression.sketch import count_sketch
from fedjax_rec.compression.top_k import top_k
from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.releases import surely_more
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.runs.config import TrainConfig, UploadConfig
from fedjax_rec.security.crypto_sum import crypto_secure_sum
from fedjax_rec.security.encrypted import encrypted_sum
from fedjax_rec.security.ring import fixed_point, ring_sum
from fedjax_rec.security.simulated import simulated_secure_sum

# Standard deviations of the noise in a sum that fit into the signed range of one client's number.
_NOISE_IN_RANGE = 4.0
DEFAULT_LARGEST = 1.0
DEFAULT_BITS, DEFAULT_BITS_WITH_SHARES = 16, 18


def compression(settings: UploadConfig, *, num_items: int) -> UpdateTransform:
    """The links that make uploads and downloads smaller; ``chain()`` for none."""
    share = settings.share
    links = []
    if settings.download != "float32":
        links.append(half_precision_download(settings.download))
    match settings.compression:
        case "quantize":
            links.append(quantize(settings.quantize_bits))
        case "drive":
            links.append(drive())
        case "top_k":
            links.append(top_k(share))
        case "rand_k":
            links.append(rand_k(share))
        case "count_sketch":
            links.append(count_sketch(max(1, math.ceil(share * num_items))))
        case "low_rank":
            links.append(low_rank(settings.rank, all_rows=settings.sum != "float"))
        case "item_subset":
            links.append(item_subset(share))
    return chain(*links)


def in_fixed_point(
    config: TrainConfig,
    sampler: Sampler,
    *,
    num_numbers: int | None,
    l2_norm: float = math.inf,
    shares_noise: float = 0.0,
) -> UpdateTransform:
    """Fixed-point numbers, unless uploads are added as floats.

    Args:
      config: of the run.
      sampler: of the cohorts.
      num_numbers: most numbers in what a client sends; None without noise.
      l2_norm: bound on it.
      shares_noise: noise multiplier of noise in shares, which has to fit into the range; 0 without.
    """
    settings = config.upload
    if settings.sum == "float":
        return chain()
    largest = settings.largest
    if largest is None:
        largest = DEFAULT_LARGEST if math.isinf(l2_norm) else l2_norm * max(1.0, _NOISE_IN_RANGE * shares_noise)
    return fixed_point(
        largest=largest,
        max_clients=most_clients(sampler),
        bits=bits(config),
        rounding=settings.rounding,
        rotation=settings.rotation,
        num_numbers=num_numbers,
        count_clipped=math.isinf(l2_norm),
    )


def way_to_sum(config: TrainConfig, sampler: Sampler) -> UpdateTransform:
    """The last link: how integers are added up; ``chain()`` where uploads are floats."""
    settings, least = config.upload, least_clients(config, sampler)
    dropout = {"min_clients": least, "dropout_prob": settings.dropout_prob}
    expected = max(2, round(sampler.expected_size))
    match settings.sum:
        case "ring":
            return ring_sum()
        case "simulated":
            return simulated_secure_sum(degree=settings.degree, num_clients=expected, **dropout)
        case "crypto":
            return crypto_secure_sum(
                session=f"seed {config.seed}", degree=settings.degree, num_clients=expected, **dropout
            )
        case "encrypted":
            return encrypted_sum(bits=bits(config), max_clients=most_clients(sampler), **dropout)
    return chain()


def bits(config: TrainConfig) -> int:
    """Bits of one client's number."""
    default = DEFAULT_BITS_WITH_SHARES if config.privacy.in_shares else DEFAULT_BITS
    return default if config.upload.bits is None else config.upload.bits


def least_clients(config: TrainConfig, sampler: Sampler) -> int:
    """Survivors below which there is no sum."""
    settings, expected = config.upload, sampler.expected_size
    if settings.min_clients is not None:
        return settings.min_clients
    if config.privacy.in_shares:
        return max(2, math.floor((1 - settings.planned_dropout) * expected + 1e-9))
    # Of cohorts that coins decide, less than half where one client more or less could decide whether there is a sum.
    return next((least for least in range(int(expected / 2), 2, -1) if surely_more(sampler, least)), 2)


def most_clients(sampler: Sampler) -> int:
    """Clients that a cohort cannot exceed, or exceeds with a probability below 1e-12 where coins decide."""
    expected = sampler.expected_size
    if "poisson" not in sampler.name:
        return math.ceil(expected)
    return math.ceil(expected + 7.5 * math.sqrt(expected) + 18)


def describe_uploads(config: TrainConfig, sampler: Sampler) -> str:
    """What clients send and how it is added up, in words."""
    settings = config.upload
    smaller = "" if settings.compression == "none" else f", {settings.compression}"
    if settings.sum == "float":
        return f"added as floats{smaller}"
    ways = {
        "ring": "added modulo 2^32 in the open",
        "simulated": "in a simulated secure sum",
        "crypto": "in a secure sum",
        "encrypted": "encrypted",
    }
    least = "" if settings.sum == "ring" else f" of at least {least_clients(config, sampler)} clients"
    return f"{ways[settings.sum]}{least}, {bits(config)} bits a number{smaller}"
