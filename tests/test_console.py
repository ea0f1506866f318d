import pytest

from unbraid.console import TrainingStatus, progress_bar, show_training
from unbraid.records import StepRecord, ValidationRecord


def step(n, loss, outcome="trained"):
    trained = outcome == "trained"
    counts = (4 * trained, 0, 0 if trained else 1)
    return StepRecord(n, 0, outcome, loss, 8.0, 5.0, 1e-3, 1.0, *counts, clipped=trained, seconds=1.0)


def test_skipped_steps_are_not_in_the_mean():
    status = TrainingStatus()
    for record in (step(1, 26.8), step(2, 30.1), step(3, float("nan"), "nonfinite_loss"), step(4, 0.0, "over_limit")):
        status.add(record)

    assert "loss 28.45" in status.text()
    assert "skipped 2" in status.text()


def test_filtered_batches_are_counted_apart_from_faults():
    status = TrainingStatus()
    status.add(step(1, -31.0, "all_filtered"))

    assert "skipped 0" in status.text()
    assert "all filtered 1" in status.text()


def test_clipped_share_and_validation_are_shown():
    status = TrainingStatus()
    status.add(step(1, 1.0))
    status.add(ValidationRecord(1, 2.0, 1.5, 3.25, 10, True, 1e-3))

    assert "clipped 100%" in status.text()
    assert "valid SI-SDRi +3.25 dB" in status.text()


def test_without_a_terminal_progress_is_printed_in_plain_lines(capsys):
    with progress_bar("talkers", 4) as advance:
        for done in range(5):
            advance(done, f"{done} of 4")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "talkers   0 %  0 of 4"
    assert lines[-1] == "talkers 100 %  4 of 4"


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_only_the_first_of_several_processes_prints(rank, shown, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    consumed = []

    def records():
        for n in (1, 2):
            consumed.append(n)
            yield step(n, 1.0)

    show_training(records(), max_steps=2, max_minutes=0)

    assert consumed == [1, 2]
    assert bool(capsys.readouterr().out) is shown


def test_a_validation_is_printed_with_the_line_of_the_doctor(capsys):
    records = [step(1, 1.0), ValidationRecord(1, 2.0, 1.5, 3.25, 10, True, 1e-3)]

    show_training(records, max_steps=2, max_minutes=0, doctor_line=lambda: "doctor: healthy")

    assert "step 1  valid SI-SDRi +3.25 dB  doctor: healthy" in capsys.readouterr().out.splitlines()
