"""What a way to make virtual users is: what it wants to release, and how it fits a generator to those releases."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.synthesis.generator import Generator

Report = Callable[[int, int, str], None]
"""``(step, total, text)``: how far fitting is."""


class Method(NamedTuple):
    """A way to make virtual users.

    Attributes:
      name: "gram", "vae", "gan", ...
      phases: ``(num_users, num_items) -> phases``, both public: the releases that fitting makes, with weights that say
        how their noise multipliers relate. The scale is solved for (`budget.solve`) so that all of them, and the
        histogram of history lengths, stay within one epsilon together.
      fit: ``(train, noise, key, report) -> Generator``. ``noise`` has, by phase name, the noise multipliers of its
        rounds, float64 ``[rounds]``; zeros fit without privacy. ``key`` is a secret of the fit: it seeds the noise.
    """

    name: str
    phases: Callable[[int, int], tuple[Phase, ...]]
    fit: Callable[[Interactions, Mapping[str, np.ndarray], jax.Array, Report], Generator]


def quiet(step: int, total: int, text: str) -> None:
    """A `Report` that says nothing."""
    del step, total, text
