"""A clip norm for each group of an update's leaves, such as item tables and dense layers, under one noise."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, scale_update, select_update
from fedjax_rec.privacy.mechanisms import check_clip_norm, global_norm, merge_rows, shrink_factor

Path = tuple[str, ...]
"""Where a leaf is in an update: ``("tables", "item")``, ``("dense", "out")``."""


def clip_by_group_norm(
    norms: Mapping[str, float],
    *,
    group_of: Callable[[Path], str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> UpdateTransform:
    """Clips each group of leaves at a norm of its own, and hands the noise updates of joint norm 1.

    Group g of a client's update is clipped at C_g and multiplied by ``w_g / C_g``; the server, after the noise,
    multiplies by ``C_g / w_g``. With noise of multiplier z after it, group g of the sum carries noise of standard
    deviation ``z C_g / w_g``, which is ``z C_g sqrt(G)`` for G groups of equal weights: a table whose updates are short
    is not drowned in the noise of one whose updates are long (McMahan et al., 2018, "A General Approach to Adding
    Differential Privacy to Iterative Training Procedures").

    Guarantee: whatever a client computes, what it adds to the sum has a joint L2 norm of at most
    ``sqrt(sum w_g^2) = 1``, up to float32 rounding. If any group is not finite, the update becomes a zero update, and
    the metric ``nonfinite`` counts it; ``clipped/g`` is the share of the cohort whose group g was scaled down.

    Args:
      norms: ``{group: C_g}``, in units of the update, each in [1e-12, 1e12].
      group_of: the group of the leaf at a path. By default the group whose name is in the path, so names such as
        "tables" and "dense", or those of single tables, need no function.
      weights: ``{group: w_g}``, positive, with squares that sum to 1: the shares of the budget. Equal by default.

    Raises:
      ValueError: for numbers out of range, weights of other groups, or, when the update's shape is known, a leaf that
        is in none of the groups or in several, or a group without a leaf.
    """
    if not norms:
        raise ValueError("clip_by_group_norm needs at least one group, such as {'tables': 0.5, 'dense': 0.1}.")
    for group, norm in norms.items():
        check_clip_norm(f"The clip norm of group {group!r}", norm)
    weights = weights or {group: 1 / math.sqrt(len(norms)) for group in norms}
    if set(weights) != set(norms):
        raise ValueError(
            f"The weights are for {sorted(weights)} and the norms for {sorted(norms)}; name the same groups."
        )
    total_share = sum(weight**2 for weight in weights.values())
    if not all(weight > 0 for weight in weights.values()) or abs(total_share - 1) > 1e-6:
        raise ValueError(f"The weights must be positive and their squares sum to 1; got {dict(weights)}.")
    # Exactly 1, for weights that were given with six digits.
    shares = {group: weight / math.sqrt(total_share) for group, weight in weights.items()}
    groups_of = _grouping(tuple(norms), group_of)

    def client(update, state, key):
        del state, key
        update = merge_rows(update)
        groups = groups_of(update)
        leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
        norm = {g: global_norm([x for x, own in zip(leaves, groups, strict=True) if own == g]) for g in norms}
        factor = {g: shrink_factor(norm[g], norms[g]) * (shares[g] / norms[g]) for g in norms}
        finite = jnp.all(jnp.isfinite(jnp.stack(list(norm.values()))))
        scaled = [scale_update(x, factor[g]) for x, g in zip(leaves, groups, strict=True)]
        update = select_update(finite, jax.tree.unflatten(structure, scaled))
        metrics = {f"clipped/{g}": (finite & (norm[g] > norms[g])).astype(jnp.float32) for g in norms}
        metrics |= {f"update_norm/{g}": jnp.where(finite, norm[g], 0.0) for g in norms}
        return update, metrics | {"nonfinite": (~finite).astype(jnp.float32)}

    def server(total, state, key):
        del key
        leaves, structure = jax.tree.flatten(total)
        back = [x * (norms[g] / shares[g]) for x, g in zip(leaves, groups_of(total), strict=True)]
        return jax.tree.unflatten(structure, back), state

    return UpdateTransform(client=client, server=server, sensitivity=lambda bound: Bound(l2=1.0))


def _grouping(names: tuple[str, ...], group_of: Callable[[Path], str] | None) -> Callable[[Any], list[str]]:
    """A function from an update, or a sum of updates, to the group of each of its leaves."""

    def by_name(path: Path) -> str:
        found = [name for name in names if name in path]
        if len(found) != 1:
            raise ValueError(
                f"The leaf {'/'.join(path)} is in {len(found)} of the groups {list(names)}; name one part of the path "
                "of every leaf, or give group_of."
            )
        return found[0]

    def groups_of(update: Any) -> list[str]:
        leaves = jax.tree_util.tree_flatten_with_path(update, is_leaf=is_rows)[0]
        paths = [tuple(_name(entry) for entry in path) for path, _ in leaves]
        groups = [(group_of or by_name)(path) for path in paths]
        if set(groups) != set(names):
            raise ValueError(
                f"The leaves {', '.join('/'.join(path) for path in paths)} are of the groups {sorted(set(groups))}, "
                f"and clip norms are given for {sorted(names)}; give one for each group that there is."
            )
        return groups

    return groups_of


def _name(entry: Any) -> str:
    """One step of a leaf's path: a field's name, a key, or a place."""
    return str(next(getattr(entry, kind) for kind in ("name", "key", "idx") if hasattr(entry, kind)))
