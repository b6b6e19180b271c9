"""Risk: a split or candidate file is another one than the results were made with, and nobody notices."""

import json

import numpy as np
import pytest

from fedjax_rec.cli.main import main
from fedjax_rec.data import draw_candidates, freeze, leave_one_out, load, load_frozen
from fedjax_rec.data.frozen import ABOUT, CANDIDATES, ROWS
from fedjax_rec.evaluation.protocol import PFEDREC_PAPER


@pytest.fixture(scope="module")
def data():
    return load("synthetic", num_users=30, num_items=80)


@pytest.mark.parametrize("with_negatives", [False, True])
def test_a_frozen_split_comes_back_the_same(data, tmp_path, with_negatives):
    split = leave_one_out(data, tie_rule="file_first")
    split = draw_candidates(split, num_negatives=20) if with_negatives else split
    assert freeze(split, tmp_path / "split") == split.fingerprint
    back = load_frozen(tmp_path / "split", data)
    assert back.fingerprint == split.fingerprint
    assert (back.rule, back.tie_rule, back.seed, back.repairs) == (
        split.rule,
        split.tie_rule,
        split.seed,
        split.repairs,
    )
    assert PFEDREC_PAPER.fingerprint(back) == PFEDREC_PAPER.fingerprint(split)
    np.testing.assert_array_equal(back.test.item_ids, split.test.item_ids)


def test_every_row_is_listed(data, tmp_path):
    freeze(leave_one_out(data), tmp_path / "split")
    lines = (tmp_path / "split" / ROWS).read_text().splitlines()
    assert len(lines) == 1 + data.num_interactions
    assert {line.split(",")[0] for line in lines[1:]} == {"train", "validation", "test"}


def test_candidates_are_untouched_items_drawn_uniformly(data):
    split = draw_candidates(leave_one_out(data), num_negatives=20)
    for user in range(data.num_users):
        own = data.item_ids[data.offsets[user] : data.offsets[user + 1]]
        drawn = split.candidates[user]
        assert len(set(drawn)) == 20
        assert not np.isin(drawn, own).any()
    other = draw_candidates(leave_one_out(data), num_negatives=20, seed=1)
    assert split.fingerprint != other.fingerprint
    draws = [draw_candidates(split, num_negatives=20, seed=seed).candidates[0] for seed in range(300)]
    counts = np.bincount(np.concatenate(draws), minlength=80)
    free = counts[counts > 0]
    assert len(free) == 80 - np.diff(data.offsets)[0]
    expected = 300 * 20 / len(free)
    assert np.square(free - expected).sum() / expected < 2 * len(free)  # chi-square with about as many degrees
    with pytest.raises(ValueError, match="between 1 and the 80 items; got 0"):
        draw_candidates(split, num_negatives=0)


def test_whatever_was_changed_is_named(data, tmp_path):
    split = draw_candidates(leave_one_out(data), num_negatives=5)
    folder = tmp_path / "split"
    freeze(split, folder)
    with pytest.raises(FileExistsError, match="never overwritten"):
        freeze(split, folder)
    with pytest.raises(FileNotFoundError, match=r"split\.json is missing"):
        load_frozen(tmp_path, data)
    with pytest.raises(ValueError, match="has another or none there"):
        load_frozen(folder, load("synthetic", num_users=30, num_items=80, seed=1))
    for name in (ROWS, CANDIDATES):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "x")
        with pytest.raises(ValueError, match=rf"{name} is missing, new or changed"):
            load_frozen(folder, data)
        (folder / name).write_text(text)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="was frozen with fingerprint 000000000000"):
        load_frozen(folder, data)


def test_from_the_command_line(tmp_path, capsys):
    folder = tmp_path / "split"
    assert main(["data", "synthetic", "--freeze", str(folder)]) == 0
    said = capsys.readouterr().out
    back = load_frozen(folder, load("synthetic"))
    assert f"Frozen in {folder}: {back.fingerprint}" in said
    assert back.candidates.shape[1] == 99
    assert main(["data", "synthetic", "--freeze", str(folder)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["data", "synthetic", "--freeze", str(tmp_path / "other"), "--protocol", "strict"]) == 2
    assert "--protocol must be one of pfedrec_paper" in capsys.readouterr().err
