"""FedDF: models of clients, clusters or silos become one by what they say together about histories of nobody.

    student starts as  mean_k params_k    and learns    softmax( sum_k share_k logits_k / T )    on public histories.

Averages of parameters lose what models trained on different data know; averages of their logits do not. Lin, Kong,
Stich and Jaggi, 2020, "Ensemble Distillation for Robust Model Fusion in Federated Learning". Histories without people
are those of a generator of virtual users (`synthesis`): the server has no others.

The server sees each model by itself here. Where it may not, as under central privacy or secure sums, there is nothing
to fuse; models of silos that were trained with `silo_dpsgd`, or others that their owners release, may be.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.distillation.losses import ScoreLoss
from fedjax_rec.distillation.student import distilled
from fedjax_rec.distillation.teacher import ensemble, sequence_teacher
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.models.sequence_losses import SequenceLoss
from fedjax_rec.models.sequence_training import train_sequence


def fuse(
    make: Callable[[SequenceLoss | None], SequenceModel],
    models: Sequence[Shared],
    histories: Interactions,
    loss: ScoreLoss,
    *,
    seed: int,
    num_epochs: int,
    weights: Sequence[float] | None = None,
    **training,
) -> Shared:
    """One set of parameters in place of several, of one architecture.

    Args:
      make: makes the model from its loss, such as ``lambda loss: sasrec(items, loss=loss)``.
      models: parameters, each trained by its owner.
      histories: virtual or public, in time order.
      loss: of scores, from `losses`.
      seed: of the order of histories.
      num_epochs: passes over them.
      weights: of the models, such as the numbers of their users; None = all alike.
      **training: more of `train_sequence`: batch_size, learning_rate, validate, ...

    Raises:
      ValueError: for no models, or weights that are not positive or as many.
    """
    plain = make(None)
    teacher = ensemble([sequence_teacher(plain, params) for params in models], weights=weights)
    shares = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
    shares = [float(share) for share in shares / shares.sum()]
    mean = jax.tree.map(lambda *leaves: sum(s * x for s, x in zip(shares, leaves, strict=True)), *models)
    student = make(distilled(teacher, loss, weight=1.0))._replace(init=lambda key: mean)
    return train_sequence(student, histories, seed=seed, num_epochs=num_epochs, **training)
