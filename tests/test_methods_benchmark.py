"""Risk: the table of methods at scale hides a refusal, times another population, or mixes runs that do not compare."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import methods

LARGE = methods.World(SimpleNamespace(num_clients=100_000, num_items=50_000), 0.01, 8 * 2**30)
LINE = {
    "method": "fedavg",
    "users": 100_000,
    "items": 50_000,
    "rows_per_user": 64,
    "cohort_size": 1000,
    "max_gib": 8.0,
    "repeats": 5,
    "private_bytes": 12_800_000,
    "server_bytes": 6_600_000,
    "median_s": 0.25,
    "clients_per_s": 4000.0,
    "peak_memory_bytes": 2**30,
    "load": 1.0,
    "commit": "c" * 40,
    "device": "cpu",
}


@pytest.mark.parametrize("name", ["local_only", "fedrap"])
def test_a_private_table_for_each_of_100_000_clients_is_refused_before_it_is_made(name):
    """100,000 clients x 50,000 items x 32 numbers x 4 bytes."""
    with pytest.raises(ValueError, match="takes 640000000000 bytes in all"):
        methods.METHODS[name](LARGE)


def test_every_client_has_its_number_of_distinct_items():
    (bucket,) = methods.population(num_users=300, num_items=90, rows_per_user=64).buckets
    assert bucket.item_ids.shape == (300, 64)
    assert all(len(np.unique(row)) == 64 for row in bucket.item_ids)
    assert (bucket.item_ids.min(), bucket.item_ids.max()) == (0, 89)


def test_each_outcome_is_in_the_table():
    refused = {key: LINE[key] for key in ("users", "items", "max_gib")} | {
        "method": "x",
        "refused": "It takes 9 bytes.",
    }
    over = LINE | {"method": "y", "peak_memory_bytes": 9 * 2**30}
    failed = {"method": "z", "failed": "-9: killed"}
    rows = [row[3:] for row in methods.make_table([LINE, refused, over, failed]).rows]
    assert rows[0] == ("0.25", "4,000", "1.00", "fits")
    assert rows[1][-1] == "refused: It takes 9 bytes."
    assert rows[2][-2:] == ("9.00", "over 8 GiB")
    assert rows[3][-1] == "failed: -9: killed"


def test_only_lines_of_one_setting_share_a_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "in_its_own_process", lambda name, args: LINE | {"method": name})
    other = LINE | {"method": "pfedrec", "users": 10}
    old = LINE | {"method": "fedncf", "median_s": 77.0}
    (tmp_path / "methods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (other, old)))
    assert methods.main(["--method", "fedncf", "--method", "fedavg"]) == 0
    page = (tmp_path / "methods.md").read_text()
    assert page in capsys.readouterr().out
    shown = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| fed") or "pfedrec" in line]
    assert shown == ["fedavg", "fedncf"]
    assert "77" not in page
    assert len((tmp_path / "methods.jsonl").read_text().splitlines()) == 4
