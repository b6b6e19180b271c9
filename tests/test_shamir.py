"""Risk: shares that rebuild another secret, or fewer than t shares that give it away."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.security.shamir import PRIME, SHARE_BYTES, reconstruct, split

SECRET = bytes(range(32))


def entropy(seed):
    return np.random.default_rng(seed).bytes


def test_the_field_is_one():
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29):  # Miller and Rabin's test
        powers = [pow(base, odd * 2**i, PRIME) for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers
    assert PRIME > 2**256


@settings(max_examples=60, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32]),
    holders=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_any_t_holders_rebuild_the_secret(secret, holders, data):
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split(secret, threshold=threshold, holders=holders, entropy=entropy(0))
    some = data.draw(st.permutations(holders))[: data.draw(st.integers(threshold, len(holders)))]
    assert reconstruct({holder: shares[holder] for holder in some}) == secret


def test_fewer_than_t_holders_get_noise():
    """With t - 1 shares any secret is as likely: what they rebuild changes with the coins, and is not the secret."""
    found = set()
    for seed in range(20):
        shares = split(SECRET, threshold=4, holders=range(4), entropy=entropy(seed))
        for some in itertools.combinations(shares, 3):
            found.add(reconstruct({holder: shares[holder] for holder in some}))
    assert len(found) == 20 * 4
    assert SECRET not in found


def test_a_share_is_uniform_whatever_the_secret():
    """The top byte of shares of one secret: chi-squared on 16 bins, at a secret of all zeros."""
    coins = entropy(2)
    tops = [split(bytes(32), threshold=2, holders=(0, 1), entropy=coins)[0][31] >> 4 for _ in range(3200)]
    counts = np.bincount(tops, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 44  # 0.9999 quantile at 15 degrees of freedom


@pytest.mark.parametrize("holder", range(5))
def test_one_wrong_share_changes_the_secret_even_among_more_than_t(holder):
    shares = split(SECRET, threshold=3, holders=range(5), entropy=entropy(1))
    shares[holder] = bytes([shares[holder][0] ^ 1]) + shares[holder][1:]
    with contextlib.suppress(ValueError):
        assert reconstruct(shares) != SECRET


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secret": bytes(31)}, "32 bytes; got 31"),
        ({"threshold": 0}, "from 1 to 3"),
        ({"threshold": 4}, "from 1 to 3"),
        ({"holders": (1, 1, 2)}, "distinct"),
        ({"holders": (-1, 1, 2)}, "distinct"),  # its share would be the secret itself
        ({"holders": ()}, "at least one"),
    ],
)
def test_split_refuses(change, says):
    with pytest.raises(ValueError, match=says):
        split(**({"secret": SECRET, "threshold": 2, "holders": (0, 1, 2), "entropy": entropy(0)} | change))


def test_reconstruct_refuses():
    with pytest.raises(ValueError, match="at least one"):
        reconstruct({})
    with pytest.raises(ValueError, match="holder 7 gave 3"):
        reconstruct({1: bytes(SHARE_BYTES), 7: b"abc"})
    with pytest.raises(ValueError, match="do not belong to one secret"):
        reconstruct({1: (PRIME - 1).to_bytes(SHARE_BYTES, "little")})
