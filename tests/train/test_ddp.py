"""N processes do what one would: two real ones on gloo against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unbraid.audio import read_audio
from unbraid.records import read_rows
from unbraid.run_directory import RunDirectory

pytestmark = pytest.mark.ddp


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    ended = torchrun(str(Path(__file__).parent / "two_ranks.py"), str(out))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    "case", ["even", "uneven", "micro_batches", "filtered", "nothing_left", "rescued", "rescued_without_a_rank"]
)
def test_two_ranks_take_the_step_of_one_process_on_the_joined_batch(ranks, case):
    for seen in ranks:
        assert seen[case]["distance"] < 1e-6
        assert seen[case]["norms"][0] == pytest.approx(seen[case]["norms"][1], rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("any_distribution", 1e-6), ("any_distribution_float32", 1e-5)])
def test_any_distribution_of_weighted_and_filtered_examples_gives_the_same_step(ranks, dtype, tolerance):
    assert len(ranks[0][dtype]) == 12
    assert max(ranks[0][dtype] + ranks[1][dtype]) < tolerance


@pytest.mark.parametrize("where", ["memory", "memory_backward"])
def test_out_of_memory_on_one_rank_makes_all_cut_their_batches_and_the_step_is_the_same(ranks, where):
    for seen in ranks:
        assert seen[where]["outcomes"] == ["trained", "trained"]
        assert seen[where]["pieces"] == [4, 4, 4]
        assert seen[where]["distance"] < 1e-6


def test_steps_launched_ahead_are_not_applied_before_the_step_that_ran_out_of_memory(ranks):
    for seen in ranks:
        assert seen["memory_ahead"]["steps"] == [[step, "trained", 0.5 / step] for step in range(1, 6)]
        assert seen["memory_ahead"]["pieces"] == 2
        assert seen["memory_ahead"]["launched_ahead"] > 0
        assert seen["memory_ahead"]["distance"] < 1e-12


def test_a_bad_gradient_is_blamed_on_its_own_example_and_on_no_other_rank(ranks):
    assert ranks[0]["bad_gradient"] == {"outcome": "nonfinite_gradient", "items": []}
    assert ranks[1]["bad_gradient"] == {"outcome": "nonfinite_gradient", "items": [[1, 1]]}


def test_two_ranks_equal_one_process_to_1e_5_in_float32(ranks):
    assert ranks[0]["float32"]["distance"] < 1e-5


def test_a_filtered_rank_takes_part_with_weight_zero(ranks):
    assert ranks[0]["nothing_left"]["n"] == ranks[1]["nothing_left"]["n"] == 4


def test_nan_on_one_rank_makes_all_ranks_skip_the_step(ranks):
    for seen in ranks:
        assert (seen["nan"]["outcome"], seen["nan"]["unmoved"], seen["nan"]["next"]) == (
            "nonfinite_loss",
            True,
            "trained",
        )
        assert seen["nan"]["difference"] is None
        assert len(seen["nan"]["norms"]) == 2
    assert ranks[0]["nan"]["norms"] == ranks[1]["nan"]["norms"]


def test_weights_are_bit_equal_after_fifty_steps_on_different_data(ranks):
    assert [seen["fifty"]["agreed"] for seen in ranks] == [None, None]


def test_a_weight_that_differs_by_a_thousandth_is_found_and_named(ranks):
    assert [seen["fifty"]["found"] for seen in ranks] == ["2.weight", "2.weight"]


def test_a_rank_without_memory_for_one_example_makes_all_ranks_skip_the_step(ranks):
    assert [seen["no_memory"] for seen in ranks] == [{"outcome": "out_of_memory", "unmoved": True}] * 2


def test_a_bad_example_of_one_rank_is_reported_by_it_and_by_the_main_process(ranks):
    for seen in ranks:
        assert [[code, rank] for code, rank, _ in seen["bad_example"]["events"]] == [["STEP_SKIPPED_NONFINITE_LOSS", 1]]
        assert seen["bad_example"]["events"][0][2]["items"] == [["train", 1, 6]]


def test_weights_that_drift_apart_are_named_and_end_the_run_within_the_interval(ranks):
    for seen in ranks:
        assert seen["drift"]["steps"] == 40
        assert "hold different weights (first in 2.weight)" in seen["drift"]["ended"]
    assert ranks[0]["drift"]["events"] == [["RANKS_DIFFER", 0, {"first": "2.weight"}]]


def test_the_slow_rank_and_its_slow_section_are_named_once(ranks):
    assert [[code, rank, evidence["section"]] for code, rank, evidence in ranks[0]["slow"]["events"]] == [
        ["SLOW_RANK", 1, "forward"]
    ]
    assert ranks[0]["slow"]["events"][0][2]["factor"] > 1.5
    assert ranks[0]["slow"]["ended"] == ranks[0]["signal"]["ended"] == ""


def test_a_signal_that_strikes_while_the_ranks_agree_is_not_lost(ranks):
    for seen in ranks:
        assert (seen["signal"]["steps"], seen["signal"]["agreed"]) == (7, 15)


def test_agreement(ranks):
    for seen in ranks:
        assert seen["any"] == [True, False]
        assert seen["from_main"] == {"rank": 0}
        assert seen["largest"] == [1.0, 0.0]
        assert seen["gathered"] == [[[1, "b"]], []]


def test_no_thread_of_the_group_outlives_it(ranks):
    for seen in ranks:
        assert seen["threads"]
        assert [name for name in seen["threads"] if "gloo" in name] == []


@pytest.mark.slow
def test_torchrun_trains_like_one_process_and_each_can_resume_the_others_run(recipe_file, tmp_path):
    file = recipe_file('[clip]\nname = "autoclip"\n')
    two, one, mixed = (tmp_path / name for name in ("two", "one", "mixed"))

    def both(path, *extra):
        ended = torchrun("-m", "unbraid", "train", str(file), "--run-dir", str(path), *extra)
        assert ended.returncode == 0, ended.stderr[-3000:]

    def alone(path, *extra):
        command = [sys.executable, "-m", "unbraid", "train", str(file), "--run", str(path), *extra]
        subprocess.run(command, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})

    both(two)
    alone(one)
    both(mixed, "--set", "train.max_steps=4")
    alone(mixed, "--resume")

    losses = {path.name: [row["loss"] for row in read_rows(RunDirectory(path).steps)[0]] for path in (two, one, mixed)}
    assert len(losses["two"]) == len(losses["mixed"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-4)
    assert losses["mixed"] == pytest.approx(losses["one"], abs=1e-4)
    rows = [read_rows(RunDirectory(path).validation)[0][-1] for path in (two, one)]
    assert rows[0]["si_sdr"] == pytest.approx(rows[1]["si_sdr"], abs=1e-3)
    assert rows[0]["orders"] == rows[1]["orders"]
    assert rows[0]["item_si_sdri"] == pytest.approx(rows[1]["item_si_sdri"], abs=2e-3)
    audio_files = [
        sorted(file.relative_to(run / "audio") for file in (run / "audio").rglob("*.*")) for run in (two, one)
    ]
    assert audio_files[0] == audio_files[1]
    assert Path("step-000006", "001-estimate-2.wav") in audio_files[0]  # of the second process
    reference = Path("audio", "001-reference-1.wav")
    assert np.array_equal(read_audio(two / reference)[0], read_audio(one / reference)[0])
