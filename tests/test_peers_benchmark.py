"""Risk: the side-by-side table counts warm-up, mixes programs up, hides a failure, or says what was not measured."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import peers, peers_table, workload
from benchmarks.contestants import CONTESTANTS, OURS, ProgramFailedError, command, environment
from benchmarks.peers import Config, measure, run, summarise

BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
STAMP = {"date": "d", "commit": "c", "processor": "p", "cpus": 2, "load": 0.1, "system": "s"}
STAMP |= {"turns": 2, "rounds": 3, "warmup": 1}


def quiet(words):
    """Progress that nobody reads."""


def recorded(arguments_seen, *, fails=()):
    """A `run` that starts nothing: it prints what programs print, with times that tell them apart."""

    def fake(arguments, *, environ, say):
        arguments_seen.append(arguments)
        module, items = arguments[2], int(arguments[arguments.index("--items") + 1])
        if module in fails:
            raise ProgramFailedError(f"{module} fell over")
        if module == "benchmarks.round":
            median = 0.25 if "--dp" in arguments else 0.125
            return [
                {
                    "items": items,
                    "median_s": median,
                    "device": "cpu",
                    "versions": {"jax": "9"},
                    "max_abs_difference": 1e-7,
                }
            ]
        seconds = {"fedjax": 4.0, "pfl": 8.0, "naive": 1.0}[module.rpartition(".")[2].split("_")[0]] * items
        warm = [{"round": r, "warmup": r < 1, "seconds": seconds if r else 1e9, "clients": 3} for r in range(3)]
        return [*warm, {"max_abs_difference": 2e-7}]

    return fake


def measured(contestants=CONTESTANTS, *, fails=(), items=(1, 10), turns=2):
    seen = []
    pythons = {contestant.name: Path("python") for contestant in contestants}
    config = Config(items=items, rounds=3, turns=turns)
    rows = measure(
        contestants, Path("/d/u.data"), config=config, pythons=pythons, say=quiet, run=recorded(seen, fails=fails)
    )
    return rows, seen


def test_programs_alternate_within_every_turn():
    _, seen = measured()
    order = [(arguments[2], "--dp" in arguments, int(arguments[arguments.index("--items") + 1])) for arguments in seen]
    one_turn = [(c.module, "--dp" in c.flags, items) for items in (1, 10) for c in CONTESTANTS]
    assert order == one_turn * 2


def test_peers_prove_their_work_in_the_first_turn_only():
    _, seen = measured()
    programs = [arguments for arguments in seen if "peer_programs" in arguments[2]]
    a_turn = 2 * sum("peer_programs" in contestant.module for contestant in CONTESTANTS)
    assert ["--check" in arguments for arguments in programs] == [True] * a_turn + [False] * a_turn


def test_our_command_keeps_to_its_contract():
    ours = command(BY_NAME[OURS], Path("/d/u.data"), python=Path("python"), items=1682, rounds=5, warmup=1, check=True)
    assert " ".join(ours) == "python -m benchmarks.round --dp --items 1682 --json --data-dir /d --repeats 5"
    open_round = command(
        BY_NAME["fedjax_rec"], Path("/d/u.data"), python=Path("python"), items=7, rounds=5, warmup=1, check=False
    )
    assert "--no-dp" in open_round
    assert "--dp" not in open_round


def test_medians_leave_warm_up_out_and_ratios_are_to_our_private_round():
    rows, _ = measured()
    results = {(result.name, result.items): result for result in summarise(CONTESTANTS, rows)}
    assert len(results) == 2 * len(CONTESTANTS)
    assert results["fedjax", 10].seconds == (40.0,) * 4  # two counted rounds in each of two turns
    assert results["fedjax", 10].times_ours == 160
    assert results["pfl", 1].times_ours == 32
    assert results["fedjax_rec", 1].times_ours == 0.5
    assert results[OURS, 1].times_ours == 1
    assert results[OURS, 1].seconds == (0.25, 0.25)
    assert results[OURS, 1].max_abs_difference == 1e-7
    assert results["naive", 1].clients == 3


def test_the_median_is_over_the_rounds_of_all_turns():
    times = [9.0, 1.0, 2.0, 100.0, 3.0]
    rows = [{"name": "naive", "items": 5, "turn": t % 2, "seconds": s, "warmup": False} for t, s in enumerate(times)]
    (result,) = summarise([BY_NAME["naive"]], rows)
    assert (result.median_s, result.seconds) == (3.0, (1.0, 2.0, 3.0, 9.0, 100.0))
    assert result.times_ours is None  # our round was not run


def test_a_failed_program_is_shown_and_the_others_are_measured():
    rows, _ = measured(fails={"benchmarks.peer_programs.pfl_round"})
    results = summarise(CONTESTANTS, rows)
    failed = [result for result in results if result.error]
    assert {result.name for result in failed} == {"pfl"}
    assert all(result.median_s is None and result.times_ours is None for result in failed)
    text = peers_table.markdown(CONTESTANTS, results, stamp=STAMP)
    assert "| pfl | user-level: clip + noise | - | - | - | - | - |" in text
    assert "**failed at 10 items**: benchmarks.peer_programs.pfl_round fell over" in text
    assert "| fedjax | none | 4.00 | 16x | 40.00 | 160x | 2e-07 |" in text


def test_the_table_has_equal_rows_and_says_where_it_was_measured():
    text = peers_table.markdown(CONTESTANTS, summarise(CONTESTANTS, measured()[0]), stamp=STAMP)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(CONTESTANTS)
    assert len({line.count("|") for line in table}) == 1
    assert "| fedjax_rec, private | user-level: clip + noise | 0.250 | 1.0x | 0.250 | 1.0x | 1e-07 |" in table
    for words in (
        "3 clients",
        "2 for each, of 3 rounds, the first 1 not counted",
        "p, 2 CPUs",
        "commit c; d.",
        "jax 9",
    ):
        assert words in text


def test_files_are_complete_small_and_the_same_for_the_same_results(tmp_path):
    results = summarise(CONTESTANTS, measured()[0])
    for folder in ("one", "two"):
        peers.write(tmp_path / folder, CONTESTANTS, results, stamp=STAMP)
    lines = [json.loads(line) for line in (tmp_path / "one" / "peers.jsonl").read_text().splitlines()]
    assert [(line["name"], line["items"], line["median_s"]) for line in lines] == [
        (result.name, result.items, result.median_s) for result in results
    ]
    assert all(line["commit"] == "c" for line in lines)
    picture = (tmp_path / "one" / "peers.svg").read_bytes()
    assert len(picture) < 100_000
    words = " ".join(ElementTree.fromstring(picture).itertext())
    for expected in ("10 items", "fedjax_rec, private", "40.00 s", "160x ours", "logarithmic"):
        assert expected in words
    assert picture == (tmp_path / "two" / "peers.svg").read_bytes()


def test_only_json_lines_are_kept_from_what_a_program_prints():
    said = []
    code = "print('Metrics'); print('{\"round\": 0, \"seconds\": 0.5, \"warmup\": true}'); print('  done {}')"
    rows = run([sys.executable, "-c", code], environ={}, say=said.append)
    assert rows == [{"round": 0, "seconds": 0.5, "warmup": True}]
    assert said == ["    round 0: 0.500 s (warm-up)"]


def test_a_program_sees_its_environment_variables_and_ours(monkeypatch):
    monkeypatch.setenv("OURS", "kept")
    code = "import json, os; print(json.dumps({'round': os.environ['OURS'] + os.environ['NPROC']}))"
    assert run([sys.executable, "-c", code], environ={"NPROC": "1"}, say=lambda words: None) == [{"round": "kept1"}]


def test_a_program_that_ends_badly_is_quoted():
    with pytest.raises(ProgramFailedError, match="ended with 1: ValueError: too small"):
        run([sys.executable, "-c", "raise ValueError('too small')"], environ={}, say=quiet)


def test_a_failed_installation_says_what_to_do_and_is_tried_again(tmp_path, monkeypatch):
    def create(folder, **options):
        python = Path(folder) / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text("#!/bin/sh\necho 'ERROR: no network' >&2\nexit 1\n")
        python.chmod(0o755)

    monkeypatch.setattr("benchmarks.contestants.venv.create", create)
    said = []
    for _ in range(2):
        with pytest.raises(ProgramFailedError, match=r"fedjax==0\.0\.17 .*ERROR: no network.*--only fedjax_rec naive"):
            environment(BY_NAME["fedjax"], tmp_path, say=said.append)
    assert len(said) == 2


def test_a_complete_environment_is_used_again(tmp_path):
    python = tmp_path / "fedjax" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "fedjax" / "installed.txt").write_text("fedjax==0.0.17")
    said = []
    assert environment(BY_NAME["fedjax"], tmp_path, say=said.append) == python
    assert said == []
    assert environment(BY_NAME["naive"], tmp_path, say=said.append) == Path(sys.executable)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Pass --data-dir"),
        (["--data-dir", "no/such/folder"], r"no u\.data in no/such/folder"),
        (["--smoke", "--warmup", "3"], "rounds=3 leaves nothing after warmup=3"),
    ],
)
def test_bad_arguments_end_with_a_sentence(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        peers.main(arguments)


def test_the_plain_loop_computes_the_reference_round(tmp_path):
    workload.write_u_data(tmp_path / "u.data", num_clients=6, num_items=120)
    line = command(
        BY_NAME["naive"], tmp_path / "u.data", python=Path(sys.executable), items=150, rounds=3, warmup=2, check=True
    )
    rows = run(line, environ={}, say=quiet)
    timed = [row for row in rows if "seconds" in row]
    assert [(row["round"], row["warmup"], row["clients"], row["items"]) for row in timed] == [
        (0, True, 6, 150),
        (1, True, 6, 150),
        (2, False, 6, 150),
    ]
    assert all(row["seconds"] > 0 for row in timed)
    (check,) = [row for row in rows if "max_abs_difference" in row]
    assert check["max_abs_difference"] < 1e-5
    assert set(check["versions"]) == {"python", "jax", "jaxlib", "numpy"}


def test_the_workload_needs_numpy_only():
    """The peers' environments hold neither this library nor its dependencies."""
    code = (
        "import sys, benchmarks.peer_programs.common; print([m for m in ('jax', 'scipy', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=peers.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
