"""Risk: the secure-sum demo shows another sum than the protocol's, or a traceback where no sum comes out."""

import json

import pytest
import tyro

from fedjax_rec.cli.secagg import SecAggDemoConfig, run


def demo(*flags):
    return run(tyro.cli(SecAggDemoConfig, args=["demo", *flags]))


def test_json_is_the_sum_and_what_it_took(capsys):
    assert demo("--clients", "6", "--words", "4", "--dropouts", "0.34", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["equals_plain_sum"] is True
    assert sorted(answer["dropped"].values()) == ["unmask", "upload"]
    gone = {int(client) for client, stage in answer["dropped"].items() if stage == "upload"}
    assert set(answer["survivors"]) == set(range(6)) - gone
    assert all(abs(number) <= 9 * 5 for number in answer["sum"])
    assert (answer["degree"], answer["threshold"]) == (5, 4)
    assert answer["stages"]["upload"]["messages_up"] == 5
    assert sum(answer["bytes_up"].values()) == sum(stage["bytes_up"] for stage in answer["stages"].values())
    assert answer["server_view"]["num_self_seeds"] == 5
    assert answer["server_view"]["num_mask_keys"] == 1


def test_readers_see_the_stages_both_vectors_and_what_is_not_promised(capsys):
    assert demo("--clients", "5", "--dropouts", "0.2") == 0
    text = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["secure sum"].split()[2:] == lines["plain sum"].split()[2:]
    assert "They are the same, bit for bit." in text
    had = [line for line in text.splitlines() if line.startswith("Client ")]
    assert len(had) == 1
    assert lines["the server sees"].split()[3:] != had[0].split()[3:]
    for stage in ("keys", "shares", "upload", "consistency", "unmask"):
        assert text.count(stage) >= 2
    for words in (
        "a server that deviates",
        "3 or more of the 5",
        "Differential privacy",
        "wrong masks",
        "masks hide values",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--clients", "0"), "at least one client"),
        (("--dropouts", "1.5"), "dropouts from 0 to 1"),
        (("--clients", "1"), "A cohort of 1 gets no secure sum"),
        (("--words", "0"), "num_words must be at least 1"),
        (("--dropouts", "0.6", "--stage", "upload"), "4 uploaded; the threshold is 6"),
        (("--threshold", "3"), "give both or neither"),
        (("--degree", "3", "--clients", "40"), "degree must be even"),
    ],
)
def test_a_request_that_gives_no_sum_is_one_sentence(capsys, flags, says):
    assert demo(*flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedjax-rec secagg: ")
    assert says in err
    assert err.count("\n") == 1
