"""The report of a run: self-contained, safe against hostile names, honest about what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event

from fedjax_rec.privacy.ledger import TRUST_MODELS, Ledger
from fedjax_rec.reporting import plots, style
from fedjax_rec.reporting.figures import inline_svg
from fedjax_rec.reporting.formatting import TIMES
from fedjax_rec.reporting.html import write_report
from fedjax_rec.reporting.run_files import read_run

PRIVACY = {
    "epsilon": 7.9812,
    "delta": 1e-4,
    "unit": "user",
    "relation": "add_or_remove_one",
    "sampler": "poisson",
    "accountant": "PLD",
    "trust_model": "central",
    "noise_multiplier": 1.2,
    "l2_clip_norm": 0.5,
    "sampling_prob": 0.0997,
    "rounds": 300,
}


def made_up_run(*, private: bool = True, name: str = "movielens/100k") -> dict[str, object]:
    """The contents of a run's files, with plausible curves drawn from a formula."""
    rng = np.random.default_rng(0)
    rounds = np.arange(1, 301)
    quality = 0.082 * (1 - np.exp(-rounds / 60)) + rng.normal(0, 0.0006, rounds.size)
    metrics = [
        {
            "round": int(number),
            "seconds": round(0.11 * int(number), 3),
            "loss": float(0.40 + 0.29 * np.exp(-number / 50) + rng.normal(0, 0.004)),
            "rounds_per_s": 9.1,
            "epsilon": float(7.9812 * (0.12 + 0.88 * np.sqrt(number / 300))) if private else None,
            "validation": {"ndcg@10": float(quality[number - 1]), "hit@10": 0.15} if number % 10 == 0 else None,
        }
        for number in rounds
    ]
    per_user = np.where(rng.random(943) < 0.82, 0.0, rng.choice(1 / np.log2(np.arange(2, 12)), 943))
    counts, edges = np.histogram(per_user, bins=20, range=(0, 1))
    tail = np.concatenate([[0.0], np.cumsum(np.arange(1, 101) ** -1.4)])
    data_tail = np.concatenate([[0.0], np.cumsum(np.arange(1, 101) ** -0.9)])
    config = {
        "dataset": name,
        "algorithm": "fedmf",
        "rounds": 300,
        "cohort": {"sampler": "poisson", "size": 94},
        "model": {"dim": 16, "loss": "bpr"},
        "client": {"learning_rate": 0.1, "local_epochs": 1, "batch_size": 64},
        "privacy": {"epsilon": 8.0, "delta": 1e-4, "l2_clip_norm": 0.5} if private else None,
        "seed": 0,
    }
    ledger = Ledger()
    if private:
        counts_event = dp_event.GaussianDpEvent(12.0)
        round_event = dp_event.PoissonSampledDpEvent(0.0997, dp_event.GaussianDpEvent(1.2))
        ledger = ledger.record(counts_event, phase="popularity", released="item counts, clipped per user")
        ledger = ledger.record(
            round_event, phase="training", released="the item table after every round", sampler="poisson", count=300
        )
    result = {
        "algorithm": "fedmf",
        "test": {"ndcg@10": 0.0812, "hit@10": 0.1569, "recall@20": 0.2344, "coverage@10": 0.2117, "mrr": 0.0711},
        "interval": {"ndcg@10": [0.0704, 0.0923]},
        "baselines": {
            "popularity": {
                "ndcg@10": 0.0567,
                "hit@10": 0.1103,
                "recall@20": 0.1803,
                "coverage@10": 0.0541,
                "mrr": 0.0502,
            },
            "non_private": {
                "ndcg@10": 0.0914,
                "hit@10": 0.1761,
                "recall@20": 0.267,
                "coverage@10": 0.2913,
                "mrr": 0.0786,
            },
        },
        "privacy": PRIVACY if private else None,
        "per_user": {
            "ndcg@10": {
                "mean": float(per_user.mean()),
                "p10": float(np.percentile(per_user, 10)),
                "p50": float(np.percentile(per_user, 50)),
                "p90": float(np.percentile(per_user, 90)),
                "worst_decile_mean": 0.0,
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            }
        },
        "exposure": {
            "cumulative_share": (tail / tail[-1]).tolist(),
            "interactions_cumulative_share": (data_tail / data_tail[-1]).tolist(),
            "coverage@10": 0.2117,
        },
        "cost": {
            "uplink_bytes_per_client_round": 12_380.0,
            "downlink_bytes_per_client_round": 12_380.0,
            "uplink_bytes_total": 349_000_000,
            "clients_per_s": 861.4,
            "padding_waste": 0.1834,
            "compile_s": 2.31,
            "rounds_per_s": 9.13,
        },
        "groups": {
            "activity quartile": {"1 (fewest)": 0.0904, "2": 0.0855, "3": 0.0790, "4 (most)": 0.0701},
            "gender": {"F": 0.0768, "M": 0.0830},
        },
        "warnings": [],
        "dataset": {
            "name": name,
            "num_users": 943,
            "num_items": 1682,
            "num_interactions": 100_000,
            "fingerprint": "ab" * 32,
        },
        "split": {"rule": "leave_one_out", "tie_rule": "hash", "seed": 0, "fingerprint": "3f9c0d" * 10},
        "best_round": 290,
        "rounds": 300,
        "seconds": 36.2,
        "stamp": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "versions": {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6"},
            "device_kind": "cpu",
            "device_count": 1,
            "seed": 0,
            "data_fingerprint": "ab" * 32,
            "utc_time": "2026-01-02T03:04:05+00:00",
        },
    }
    if private:
        result["baselines"]["dp_popularity"] = {
            **{"ndcg@10": 0.0561, "hit@10": 0.1092, "recall@20": 0.1791, "coverage@10": 0.0559, "mrr": 0.0497},
            "privacy": {
                "epsilon": 0.371,
                "delta": 1e-4,
                "unit": "user",
                "relation": "add_or_remove_one",
                "sampler": "all",
            },
        }
        result["warnings"].append("delta = 1e-4 is only 11 times below 1/users = 1.06e-3.")
    else:
        del result["baselines"]["non_private"]
    ledger_file = json.loads(ledger.to_json())
    if private:
        ledger_file["spent"] = {name: PRIVACY[name] for name in ("epsilon", "delta", "accountant", "unit", "relation")}
    return {"config.json": config, "metrics.jsonl": metrics, "ledger.json": ledger_file, "result.json": result}


def write_run(folder: Path, files: dict[str, object]) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def report_of(folder: Path, files: dict[str, object]) -> str:
    """The text of the report of such a run."""
    return write_report(write_run(folder, files)).read_text(encoding="utf-8")


def svgs(page: str) -> list[str]:
    """The inline figures of a page."""
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def plain(page: str) -> str:
    """The words of a page, without figures, tags and style."""
    text = re.sub(r"<(svg|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", text).replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_of(tmp_path_factory.mktemp("run"), made_up_run())


def test_the_report_loads_nothing(page: str):
    assert not re.search(r"https?:|//[a-z]", page), "no address at all, so nothing can be fetched"
    assert "<script" not in page
    assert not re.search(r"<(link|img|iframe|object|embed)\b|@import|@font-face|javascript:|\bon\w+=", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_the_report_says_what_a_reader_needs(page: str):
    words = plain(page)
    for expected in (
        "movielens/100k · fedmf",
        "943 users · 1,682 items · 100,000 interactions",
        ".0812 .0704 to .0923, bootstrap over users",
        f"1.43{TIMES} popularity: .0567",
        "7.99 user-level, add/remove one, Poisson, δ = 1e-4",
        "300 best on validation: round 290",
        "12.4 kB of one client in one round",
        "popularity (user-level DP): ε = 0.38 (user-level, add/remove one, all clients, δ = 1e-4)",
        TRUST_MODELS["central"],
        "without noise",
        "the item table after every round Poisson(0.0997, Gaussian(1.2)) 300 user-level add/remove one Poisson",
        "clients a second 861.4",
        "padding waste 18.3 %",
        "client.local_epochs 1",
        "commit 0123456789abcdef",
        "1 (fewest)",
    ):
        assert expected in words


def test_the_report_has_all_six_figures_and_each_is_small(page: str):
    figures = svgs(page)
    assert [re.search(r'aria-label="([^"]*)"', svg)[1] for svg in figures] == [
        "Quality", "Privacy spent", "Quality for privacy", "Loss", "Users", "Items",
    ]  # fmt: skip
    assert max(len(svg.encode()) for svg in figures) < 100_000


def test_figures_follow_the_page(page: str):
    for svg in svgs(page):
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a fixed colour would not turn with the page in the dark"
        assert "font-family" not in svg
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in re.findall(r'href="(#[^"]*)"', page)} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_hostile_names_are_only_shown(tmp_path: Path):
    hostile = '</title><script>alert("x")</script> $\\frac{1}{ & "quoted"'
    files = made_up_run(name=hostile)
    files["result.json"]["warnings"] = ["<img src=x onerror=alert(1)>"]
    files["config.json"]["<b>key</b>"] = "<svg onload=alert(2)>"
    files["ledger.json"]["entries"][0]["released"] = "<iframe src=//evil>"
    files["result.json"]["groups"] = {"<i>group</i>": {"<u>part</u>": 0.5}}
    files["result.json"]["test"] = {"<em>metric</em>": 0.5}
    files["metrics.jsonl"][9]["validation"] = {"$\\frac$ <em>metric</em>": 0.5}
    text = report_of(tmp_path, files)
    assert not re.search(r"<(script|img|iframe|b>key|i>group|u>part|em|svg onload)", text)
    assert "&lt;script&gt;" in text
    inline = inline_svg(style.to_svg(plots.loss_curve([1, 2], [0.7, 0.6])), name="loss", title='"><script>')
    assert "<script" not in inline
    assert inline.startswith('<svg viewBox="0 0 360 216" role="img" aria-label="&#34;&gt;&lt;script&gt;">')


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "ledger.json", "result.json"])
def test_a_run_without_one_of_its_files_is_still_reported(tmp_path: Path, missing: str):
    files = made_up_run()
    del files[missing]
    assert f"There is no {missing}" in plain(report_of(tmp_path, files))


def test_a_killed_run_reports_what_it_has(tmp_path: Path):
    files = made_up_run()
    del files["result.json"]
    files["metrics.jsonl"] = files["metrics.jsonl"][:137]
    folder = write_run(tmp_path, files)
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"round": 138, "loss": 0.4')  # cut off in the middle of a line
    words = plain(write_report(folder).read_text())
    assert "Unfinished: the last logged round is 137 of 300." in words
    assert "1 of 138 lines of metrics.jsonl cannot be read" in words
    assert "There are no test metrics yet" in words
    assert re.search(r"ε so far 5\.\d\d user-level, add/remove one, Poisson, δ = 1e-4", words)


def test_damaged_files_are_named(tmp_path: Path):
    folder = write_run(tmp_path, made_up_run())
    (folder / "result.json").write_text('{"test": {"ndcg')
    (folder / "ledger.json").write_text("")
    words = plain(write_report(folder).read_text())
    assert "result.json cannot be read" in words
    assert "ledger.json cannot be read" in words


@pytest.mark.parametrize(
    "result",
    [
        {"test": {"ndcg@10": 0.1}},
        {"test": {"rmse": 0.9}, "privacy": {"epsilon": 8.0}},
        {"test": None, "cost": [], "groups": {"g": {}}},
    ],
)
def test_a_result_with_few_of_its_parts_is_reported(tmp_path: Path, result: dict):
    files = {"result.json": result, "metrics.jsonl": [{"round": 1, "epsilon": 0.5}, {"loss": 1.0}]}
    words = plain(report_of(tmp_path, files))
    assert "The run has no per-user metrics." in words
    assert "Not drawn: unit, relation, sampler or δ of its ε is not recorded." in words
    assert "not shown: unit, relation, sampler or delta is not recorded" in words


def test_a_ledger_that_spent_more_than_the_result_says_is_a_warning(tmp_path: Path):
    files = made_up_run()
    files["ledger.json"]["spent"]["epsilon"] = 9.5
    assert "all releases of the ledger together cost 9.50" in plain(report_of(tmp_path, files))


def test_a_run_without_privacy_says_so(tmp_path: Path):
    words = plain(report_of(tmp_path, made_up_run(private=False)))
    assert "privacy none no differential privacy" in words
    assert "This run has no differential privacy." in words
    assert "What ε covers" not in words


def test_a_resumed_round_counts_once(tmp_path: Path):
    files = {"metrics.jsonl": [{"round": 1, "loss": 3.0}, {"round": 2, "loss": 2.0}, {"round": 1, "loss": 1.0}]}
    rows = read_run(write_run(tmp_path, files)).metrics
    assert [(row["round"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0)]


def test_a_missing_or_foreign_folder_is_a_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"There is no run directory '.*nowhere'"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        write_report(tmp_path)


def test_an_old_report_is_replaced_whole(tmp_path: Path):
    folder = write_run(tmp_path, made_up_run())
    (folder / "report.html").write_text("old")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text().startswith("<!doctype html>")
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "config.json", "ledger.json", "metrics.jsonl", "report.html", "result.json",
    ]  # fmt: skip


def test_long_series_stay_small_and_keep_their_peaks():
    rounds = np.arange(100_000)
    losses = np.random.default_rng(0).normal(0.5, 0.01, rounds.size)
    losses[54_321], losses[77_777] = 0.9, 0.1
    assert len(style.to_svg(plots.loss_curve(rounds, losses))) < 50_000
    x, y = style.thin_out(rounds, losses)
    assert len(x) <= style.MAX_POINTS
    assert (x[0], x[-1]) == (0, 99_999)
    assert {0.9, 0.1} <= set(y)


def test_the_same_figure_is_the_same_file():
    first, second = (style.to_svg(plots.epsilon_curve([1, 2, 3], [0.5, 0.7, 0.9], budget=1.0)) for _ in range(2))
    assert first == second


def test_curves_take_one_point_gaps_and_zeros():
    for figure in (
        plots.quality_curve([10], [0.0], metric="ndcg@10", references={}, best_round=10),
        plots.quality_curve([1, 2, 3], [0.1, float("nan"), 0.2], metric="ndcg@10", references={"popularity": 0.15}),
        plots.quality_against_epsilon([0.5], [0.1], metric="ndcg@10", references={}),
        plots.epsilon_curve([1], [0.0]),
        plots.loss_curve([1, 2], [0.7, 0.7]),
        plots.loss_curve([1, 2, 3], [0.7, 1e9, float("inf")]),
        plots.epsilon_curve([1, 2], [float("inf"), float("inf")], budget=8.0),
        plots.user_histogram([0.0, 1.0], [0], metric="ndcg@10", percentiles={}),
        plots.exposure_curve([0.0, 1.0]),
    ):
        assert "<svg" in style.to_svg(figure)


def test_the_data_figure_in_both_formats():
    rng = np.random.default_rng(0)
    figure = plots.activity_popularity(
        rng.zipf(1.5, 200_000).clip(max=9254), np.concatenate([rng.zipf(1.4, 50_000), [0]])
    )
    svg = style.to_svg(figure)
    assert len(svg) < 100_000
    assert "1 items without any" in svg
    assert style.to_png(figure).startswith(b"\x89PNG")


def test_a_data_set_without_interactions_cannot_be_drawn():
    with pytest.raises(ValueError, match="none of the 3 users has an interaction"):
        plots.activity_popularity(np.zeros(3, int), np.ones(2, int))


def test_labels_keep_their_distance_and_order():
    placed = style.spread([0.5, 0.51, 0.9, 0.49], gap=0.1)
    assert np.diff(np.sort(placed)) == pytest.approx([0.1, 0.1, 0.3])
    assert np.argsort(placed).tolist() == [3, 0, 1, 2]
    assert style.spread([0.1, 0.5], gap=0.1) == [0.1, 0.5]
