"""Times the benchmark's round in pfl (Granqvist et al. 2024, "pfl-research"), with its central Gaussian mechanism.

    python -m venv .venv && .venv/bin/pip install torch==2.13.0 'pfl[pytorch]==0.6.0'
    .venv/bin/python -m benchmarks.peer_programs.pfl_round U_DATA --items 1682 --rounds 6  # from the repository root

Every round clips each client's update to a joint l2 norm of 1 and adds noise of standard deviation 1 to the sum once.
"""

import os
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism

from benchmarks import numpy_reference, workload
from benchmarks.peer_programs.common import Report, arguments


class LogisticFactors(torch.nn.Module):
    """The workload's model; pfl asks for a module with `loss` and `metrics`."""

    def __init__(self, params: dict[str, np.ndarray]):
        super().__init__()
        self.items = torch.nn.Embedding.from_pretrained(torch.tensor(params["items"]), freeze=False)
        self.out = torch.nn.Linear(workload.DIM, 1)
        self.out.weight.data = torch.tensor(params["out"])[None, :]
        self.out.bias.data = torch.tensor(params["bias"])[None]
        self.cross_entropy = torch.nn.BCEWithLogitsLoss()

    def loss(self, x, y, is_eval=False):
        """Mean binary cross-entropy of the items x `[n]` with labels y `[n]`."""
        return self.cross_entropy(self.out(self.items(x))[:, 0], y)

    @torch.no_grad()
    def metrics(self, x, y):
        """The same loss as a pfl metric."""
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}

    def params(self) -> dict[str, np.ndarray]:
        """The parameters by the workload's names."""
        leaves = {"items": self.items.weight, "out": self.out.weight[0], "bias": self.out.bias[0]}
        return {name: leaf.detach().cpu().numpy() for name, leaf in leaves.items()}


class Stopwatch(TrainingProcessCallback):
    """Hands each round's seconds to `tell(number, seconds)`; a callback is how pfl says that a round has ended."""

    def __init__(self, tell):
        self.tell = tell
        self.start = time.perf_counter()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Called by pfl when the server has applied the round's update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.tell(central_iteration, now - self.start)
        self.start = time.perf_counter()
        return False, Metrics()


def train(users: dict[int, tuple[torch.Tensor, torch.Tensor]], net: LogisticFactors, *, rounds: int, dp: bool, tell):
    """Trains `net` in place for some rounds in which every user takes part, with or without clipping and noise."""
    gaussian = CentrallyAppliedPrivacyMechanism(GaussianMechanism(clipping_bound=1.0, relative_noise_stddev=1.0))
    sampler = get_user_sampler("minimize_reuse", list(users))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,  # pfl evaluates in round 0 all the same, which is a warm-up round
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=FederatedDataset(lambda user: Dataset(raw_data=users[user]), sampler),
            val_data=None,
            postprocessors=[WeightByUser(), gaussian] if dp else [WeightByUser()],
        ),
        model=PyTorchModel(
            net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=workload.LEARNING_RATE, local_num_epochs=1, local_batch_size=workload.BATCH_SIZE
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=10_000),
        callbacks=[Stopwatch(tell)],
    )


def main() -> None:
    """Prints one JSON line a round."""
    options = arguments(__doc__)
    # Every CPU: no slower than one thread on a small table, and much faster on a large one, if the machine is quiet.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    work = workload.clients(options.u_data, num_items=options.items)
    params = workload.initial_params(work.num_items)
    users = {c: (torch.tensor(ids, dtype=torch.long), torch.tensor(labels)) for c, (ids, labels) in enumerate(work)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report = Report("pfl", options, device=device, packages=("pfl", "torch", "numpy"))

    if options.check:
        net = LogisticFactors(params)
        train(users, net, rounds=1, dp=False, tell=lambda number, seconds: None)
        report.check(net.params(), numpy_reference.fedavg_round(params, work))

    def tell(number: int, seconds: float) -> None:
        report.round(number=number, seconds=seconds, clients=len(users), items=work.num_items)

    train(users, LogisticFactors(params), rounds=options.rounds, dp=True, tell=tell)


if __name__ == "__main__":
    main()
