"""DRIVE: one bit a number."""

import jax.numpy as jnp

from fedjax_rec.compression.flat import ravel_update, update_size
from fedjax_rec.compression.rotation import block_size, rotate, rotate_back, rotated_size
from fedjax_rec.federated.transforms import Bound, UpdateTransform


def drive(*, unbiased: bool = True) -> UpdateTransform:
    """Sends the signs of a client's rotated update, and one scale for each block of it.

        decoded x = R^T (S sign(R x)),    S = ||R x||_2^2 / ||R x||_1    (unbiased),
                                          S = ||R x||_1 / B              (least error),      B numbers in the block

    Vargaftik et al., 2021, "DRIVE: One-bit Distributed Mean Estimation". The first S makes the decoded update unbiased
    over rotations drawn uniformly, with an error of ``(pi / 2 - 1) ||x||^2 = 0.571 ||x||^2`` that the mean over clients
    averages out. The second has the least error for one client, ``(1 - 2 / pi) ||x||^2 = 0.363 ||x||^2``, and shrinks
    the update by about 2 / pi, which no mean repairs; a server's learning rate may.

    Differs from the paper: the randomised Hadamard rotation stands for a uniform one, as in the authors' experiments.
    The inner product of the decoded update with the update is ``||x||^2`` under any rotation, so what bias the first S
    leaves is orthogonal to the update. It cannot be seen where the 256 numbers of a block resemble normal ones, and
    is large where two or three outweigh all others: 0.3 of the norm for (1, 0.3, 0, 0, ...). And long updates are
    rotated in blocks (`rotation`), each with a scale of its own, which costs an eighth of a bit a number.

    The rotation is public and of the round. The scale is the client's own, so what clients send cannot be summed before
    it is decoded: not linear. No error is fed back into later rounds: a client that is sampled now and then would feed
    it back when it is stale.

    Guarantee: the scale of least error never lengthens an update (``sqrt(B) S = ||R x||_1 / sqrt(B) <= ||x||``), so the
    L2 bound of a clip before it holds after it, up to float32 rounding. The unbiased scale lengthens by a quarter as a
    rule and by sqrt(B) at worst, so it has no bound: a clip must follow it before any noise ("clip last, on the decoded
    vector"). An update that is not finite is not finite after it, for that clip to drop.

    Args:
      unbiased: which S.
    """

    def prepare(state, context, key):
        del state, context
        return key

    def client(update, rotation_key, key):
        del key
        vector, unravel = ravel_update(update)
        rotated = rotate(vector, rotation_key).reshape(block_size(vector.size), -1)
        l1 = jnp.sum(jnp.abs(rotated), axis=0, keepdims=True)
        if unbiased:
            scale = jnp.sum(jnp.square(rotated), axis=0, keepdims=True) / jnp.where(l1 == 0, 1.0, l1)
        else:
            scale = l1 / rotated.shape[0]
        decoded = jnp.where(rotated < 0, -scale, scale).reshape(-1)
        return unravel(rotate_back(decoded, rotation_key, vector.size)), {}

    def server(total, rotation_key, key):
        del rotation_key, key
        return total, ()

    def sensitivity(bound):
        if unbiased or bound.noised:
            return Bound(noised=bound.noised)
        return Bound(l2=bound.l2 * (1 + 1e-5))

    def upload(wire, update):
        size = update_size(update)
        num_scales = rotated_size(size) // block_size(size)
        return wire._replace(numbers=float(rotated_size(size)), bits=1.0, side_bits=wire.side_bits + 32.0 * num_scales)

    return UpdateTransform(
        prepare=prepare, client=client, server=server, sensitivity=sensitivity, upload=upload, linear=False
    )
