"""Item tables that each client keeps for itself: how many bytes they take, and rows added to them in place."""

from typing import Any

import jax

from fedjax_rec.federated.rows import Rows, add_update

MAX_PRIVATE_BYTES = 8 * 2**30
FLOAT_BYTES = 4


def private_bytes(num_clients: int, num_items: int, dim: int) -> int:
    """Bytes of one float32 table ``[num_items, dim]`` for each client."""
    return num_clients * num_items * dim * FLOAT_BYTES


def check_private_bytes(num_clients: int, tables: dict[str, Any], max_private_bytes: int) -> None:
    """Refuses private tables that do not fit.

    Args:
      num_clients: clients in the population.
      tables: one client's private tables (arrays or ``jax.ShapeDtypeStruct``), ``[num_items, dim]`` each.
      max_private_bytes: most bytes that the tables of all clients may take together.

    Raises:
      ValueError: with the number of bytes, if it is larger.
    """
    needed = sum(private_bytes(num_clients, *table.shape) for table in tables.values())
    if needed > max_private_bytes:
        shapes = ", ".join(f"{name} {list(table.shape)}" for name, table in tables.items())
        raise ValueError(
            f"A private item table for each of {num_clients} clients ({shapes}, float32) takes {needed} bytes in all, "
            f"more than max_private_bytes={max_private_bytes}. Use a smaller dim or fewer clients or items, or raise "
            "max_private_bytes if the device has the memory."
        )


def add_to_tables(tables: dict[str, jax.Array], rows: dict[str, Rows]) -> dict[str, jax.Array]:
    """One client's private tables after training: its trained rows added to them."""
    return {name: add_update(table, rows[name]) for name, table in tables.items()}
