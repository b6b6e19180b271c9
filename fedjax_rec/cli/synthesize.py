"""`fedjax-rec synthesize`: virtual users in place of real ones, within a privacy budget, with a data card."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

ORDERED = "next-item"  # the generator whose virtual users have a time order

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Virtual users that may be handed out in place of real ones, and a card that says how far they carry.

    A generator is fitted to real users under user-level differential privacy; everything it learns is noised and
    charged to one budget, history lengths included. Virtual users are drawn from it, and written as a data set that
    every other command reads.

    fedjax-rec synthesize

    fedjax-rec synthesize --dataset movielens/1m --generator gram --epsilon 8 --users 6040 --out virtual.parquet

    fedjax-rec synthesize --epsilon inf --no-evaluate --out open.csv
    """

    dataset: str = "synthetic"
    """Data set or file of the real users, as for train --dataset."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    generator: Literal["gram", "vae", "gan", "next-item", "popularity"] = "gram"
    """gram: a low-rank Gaussian from one noised item-to-item matrix, the best under noise. vae, gan: neural generators.
    next-item: histories in time order from a noised chain. popularity: noised popularity alone, the baseline."""
    epsilon: float = 8.0
    """Budget for everything that is released, user-level; inf fits without privacy."""
    delta: float | None = None
    """Default: 1 / N^1.1 for N real users."""
    users: int | None = None
    """Number of virtual users. Default: as many as real ones are fitted on. More cost no privacy."""
    out: Path = Path("virtual.parquet")
    """Where to write them, .parquet or .csv; the card, its page, its public part and the ledger get names beside it."""
    ledger: Path | None = None
    """Ledger of what was released on these users before (ledger.json of a run): it counts against epsilon."""
    seed: int | None = None
    """Makes a rehearsal that can be repeated. Without it the noise comes from the operating system and is known to
    nobody, as it must be for data that are handed out."""
    evaluate: bool = True
    """Hold out 30 % of the users, fit on the rest, and measure utility and risk on those held out. --no-evaluate fits
    on everybody and measures nothing."""
    downstream: tuple[str, ...] = ("ease", "mf")
    """Recommenders to train on virtual users and test on real ones: ease, mf, mult_vae, markov."""
    overwrite: bool = False
    """Replace files that are there."""


def run(config: SynthesizeConfig) -> int:
    """Fits, draws, judges and writes; prints where the files are.

    Returns:
      0. Errors are raised as sentences, for `main` to print; then nothing is written.
    """
    import jax
    from rich.console import Console

    from fedjax_rec.data import load
    from fedjax_rec.privacy.ledger import Ledger
    from fedjax_rec.synthesis.plan import fit_generator, solve_phases, usual_delta
    from fedjax_rec.synthesis.virtual import virtual_users

    console = Console()
    _check(config)
    data = load(config.dataset, data_dir=config.data_dir)
    split, train = _hold_out(data, config)
    num_users = int(np.count_nonzero(train.counts_per_user))
    delta = usual_delta(num_users) if config.delta is None else config.delta
    method = method_by_name(config.generator)
    console.print(
        f"[bold]Virtual users[/] of {data.name} by {config.generator}: fitted on {num_users:,} users, "
        f"{train.num_items:,} items, {train.num_interactions:,} interactions",
        soft_wrap=True,
        highlight=False,
    )
    ledger = None if config.ledger is None else Ledger.load(config.ledger)
    if config.epsilon < math.inf:
        solved = solve_phases(
            method,
            num_users=num_users,
            num_items=train.num_items,
            epsilon=config.epsilon,
            delta=delta,
            ledger=ledger,
        )
        for name, found in solved.phases.items():
            rounds = len(found.noise_multipliers)
            console.print(
                f"  release  {name}: {rounds} x noise multiplier {found.last_noise_multiplier:.4g}, "
                f"epsilon {found.epsilon_alone:.3g} alone (user-level, add/remove one, delta {delta:.3g})",
                highlight=False,
                soft_wrap=True,
            )
    fit_key, draw_key = jax.random.split(_key(config.seed))
    with _progress(console) as show:
        fitted = fit_generator(
            method,
            train,
            epsilon=config.epsilon,
            delta=delta,
            key=fit_key,
            ledger=ledger,
            report=partial(show, "fitting"),
        )
        virtual = virtual_users(
            fitted.generator,
            fitted.lengths,
            num_users=num_users if config.users is None else config.users,
            key=draw_key,
            catalogue=data,
            report=partial(show, "drawing", said="virtual users"),
        )
        judged = None if split is None else _judge(config, split, virtual, fitted, partial(show, "judging"))
    paths = _write(config, data, train, virtual, fitted, judged, num_users)
    label = "no differential privacy" if fitted.spent is None else fitted.spent.sentence
    console.print(f"\n{label}", highlight=False, soft_wrap=True)
    if config.seed is not None and fitted.spent is not None:
        console.print(f"[yellow]note[/] The noise came from seed {config.seed}: a rehearsal, not for handing out.")
    for what, path in paths.items():
        console.print(f"{what:12} {path}", highlight=False, soft_wrap=True)
    return 0


def beside(out: Path) -> dict[str, Path]:
    """The files of one release, by what they are."""
    names = {
        "data": out.name,
        "public card": f"{out.stem}.public-card.json",
        "card": f"{out.stem}.card.json",
        "page": f"{out.stem}.card.html",
        "ledger": f"{out.stem}.ledger.json",
    }
    return {what: out.with_name(name) for what, name in names.items()}


def _check(config: SynthesizeConfig) -> None:
    """Everything that can be refused before any work."""
    from fedjax_rec.data.parquet import check_writable
    from fedjax_rec.synthesis.downstream import as_downstream

    check_writable(config.out)
    there = [str(path) for path in beside(config.out).values() if path.exists()]
    if there and not config.overwrite:
        raise FileExistsError(f"{', '.join(there)} exists already; choose another --out, or add --overwrite.")
    if not config.epsilon > 0:
        raise ValueError(f"--epsilon must be positive, or inf for no privacy; got {config.epsilon}.")
    if config.users is not None and config.users < 1:
        raise ValueError(f"--users must be at least 1; got {config.users}.")
    if config.ledger is not None and config.epsilon == math.inf:
        raise ValueError("--ledger needs a finite --epsilon: without a budget there is nothing to charge.")
    if config.evaluate:
        ordered = [recommender.name for recommender in as_downstream(config.downstream) if recommender.ordered]
        if ordered and config.generator != ORDERED:
            raise ValueError(
                f"--downstream {ordered[0]} learns from the order of items, and virtual users of --generator "
                f"{config.generator} have none; leave it out, or take --generator {ORDERED}."
            )


def _hold_out(data, config: SynthesizeConfig):
    """The split that judges the virtual users, or None; and the users that the generator sees."""
    from fedjax_rec.data import strong_generalization

    if not config.evaluate:
        return None, data
    num = data.num_users
    if num < 40:
        raise ValueError(
            f"{data.name} has {num} users, too few to hold out 30 % of them as a control group; add --no-evaluate."
        )
    split = strong_generalization(data, num_validation_users=num // 10, num_test_users=num // 5, seed=0)
    return split, split.train


def method_by_name(name: str):
    """A way to make virtual users with its default settings; imported where used, as each brings its own model."""
    if name == "gram":
        from fedjax_rec.synthesis.gram import gram_method as method
    elif name == "vae":
        from fedjax_rec.synthesis.vae import vae_method as method
    elif name == "gan":
        from fedjax_rec.synthesis.gan import gan_method as method
    elif name == "gan, no adversary":
        from fedjax_rec.synthesis.gan import gan_method

        return gan_method(adversarial=False)
    elif name == "next-item":
        from fedjax_rec.synthesis.next_item import next_item_method as method
    else:
        from fedjax_rec.synthesis.marginals import popularity_method as method
    return method()


def _key(seed: int | None):
    """A key from the seed, or from the operating system."""
    import jax
    import jax.numpy as jnp

    if seed is not None:
        return jax.random.key(seed)
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(os.urandom(8), np.uint32)), impl="threefry2x32")


@contextlib.contextmanager
def _progress(console: "Console") -> Iterator:
    """Two bars, of fitting and of drawing, on a terminal; a few lines where there is none."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console, disable=not console.is_terminal) as bar:
        tasks, last = {}, {}

        def show(name: str, done: int, total: int, said: str) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, said=said)
            bar.update(tasks[name], completed=done, total=total, said=said)
            fifth = 5 * done // max(total, 1)
            if not console.is_terminal and last.get(name) != fifth:
                last[name] = fifth
                console.print(f"{name:8} {done}/{total}  {said}", highlight=False, soft_wrap=True)

        yield show


def _write(config: SynthesizeConfig, data, train, virtual, fitted, judged, num_users: int) -> dict[str, Path]:
    """All files of the release, each whole or not at all, the data first: a card never lacks its data."""
    from fedjax_rec.data import write_interactions
    from fedjax_rec.reporting.card_page import comparison_panels, write_card_page
    from fedjax_rec.runs.stamp import stamp
    from fedjax_rec.synthesis.card import data_card, public_card, write_json

    paths = beside(config.out)
    panels = comparison_panels(train, virtual) if judged is not None else []
    write_interactions(paths["data"], virtual)
    card = data_card(
        fitted,
        virtual,
        source=data.name,
        num_users=num_users,
        noise_from="the operating system" if config.seed is None else f"seed {config.seed}",
        file=paths["data"],
        evaluation=None if judged is None else judged.to_dict(),
        stamp=stamp(seed=config.seed or 0, data_fingerprint=data.fingerprint),
    )
    write_json(paths["public card"], public_card(card))
    write_json(paths["card"], card)
    write_card_page(paths["page"], card, panels=panels, sections=_sections(judged))
    if fitted.spent is None:
        paths.pop("ledger")
    else:
        fitted.ledger.save(paths["ledger"], delta=fitted.spent.delta)
    return paths


def _judge(config: SynthesizeConfig, split, virtual, fitted, report):
    """Utility and risk, on users that the generator did not see."""
    from fedjax_rec.synthesis.report import evaluate_virtual

    gaussian = all(entry.sampler == "all" for entry in fitted.ledger.entries)
    return evaluate_virtual(
        split,
        virtual,
        privacy=fitted.spent,
        gaussian=gaussian,
        downstream=config.downstream,
        seed=config.seed or 0,
        report=report,
    )


def _sections(judged) -> list:
    """Utility and risk as a section of the page: the figures that decide, with what they mean."""
    if judged is None:
        return []
    from fedjax_rec.reporting.card_page import Section
    from fedjax_rec.synthesis.report import report_table

    sentences = (
        f"Judged on {judged.num_held_out_users:,} real users that the generator never saw; it saw "
        f"{judged.num_real_users:,}. Beside the virtual users stands the popularity sampler: users who know nothing "
        "but popularity and lengths, fitted without privacy, which is the least that a generator must beat.",
    )
    return [Section("Utility and risk", sentences, (report_table(judged),))]
