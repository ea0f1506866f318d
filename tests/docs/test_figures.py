"""The figures in the README and in the docs are those of benchmarks/results."""

import json
import re

from documents import DOCUMENTS, ROOT, unwrapped

BENCHMARKS = unwrapped("docs/benchmarks.md")
README = unwrapped("README.md")


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_demo_reached_what_was_measured():
    measured = results("demo")
    si_sdri = "SI-SDRi {} ± {} dB".format(*measured["test"]["si_sdri"])
    sdri = "SDRi {} ± {} dB".format(*measured["test"]["sdri"])

    for text in (README, BENCHMARKS):
        assert re.search(r"SI-SDRi \S+ ± \S+ dB", text)[0] == si_sdri
        assert measured["date"] in text
        assert measured["machine"].split(",")[0] in text
        assert f"{measured['command_seconds'] / 60:.1f} minutes" in text
        assert f"on {measured['test_items']} mixtures" in text
    assert f"{si_sdri} and {sdri} on" in BENCHMARKS


def test_real_speakers_reached_what_was_measured():
    measured = results("real_talkers_15_minutes")

    assert "reached SI-SDRi {} ± {} dB on".format(*measured["test"]["si_sdri"]) in BENCHMARKS
    assert f"for {measured['training_minutes']:.0f} minutes on the same machine" in BENCHMARKS
    assert measured["machine"] == results("demo")["machine"]
    assert measured["date"] in BENCHMARKS


def test_the_cost_of_a_step_is_what_was_measured():
    measured = results("step_overhead")
    ratios = [result["median_ratio"] for result in measured["results"]]
    edges = [edge for result in measured["results"] for edge in result["interval_95"]]

    section = BENCHMARKS.split("## Cost of the step")[1]
    assert f"{min(ratios):.3f} to {max(ratios):.3f} times the CPU time" in section
    assert f"intervals from {min(edges):.3f} to {max(edges):.3f}" in section
    assert {result["pairs"] for result in measured["results"]} == {30}
    assert "medians of 30 interleaved pairs" in section
    assert measured["date"] in section


def test_the_speeds_are_those_that_were_measured():
    measured = results("against_peers")

    def times(piece, how, kind="like"):
        ratios = next(race["ratios"] for race in measured[piece]["races"] if f"ours {how}" in race["ratios"])
        return f"{ratios[f'ours {how}'][kind]['median']:.2f}"

    losses = ", ".join(times(f"pit_{n}", "fp32") for n in (2, 3, 5, 8, 16))
    table = DOCUMENTS["docs/benchmarks.md"].split("## Speed")[1]
    assert re.findall(r"^\| .* \| ([\d., ]+) \|$", table, flags=re.MULTILINE) == [
        times("sepformer_step", "bf16 compiled"),
        times("sepformer_step", "fp32"),
        times("sepformer_small_step", "bf16 compiled"),
        times("sepformer_small_step", "fp32 compiled"),
        times("conv_tasnet_step", "bf16 compiled", "best"),
        times("conv_tasnet_step", "fp32 compiled"),
        times("conv_tasnet_step", "fp32"),
        times("dprnn_step", "bf16 compiled"),
        times("dprnn_step", "fp32 compiled"),
        times("conv_tasnet_30s", "bf16 compiled", "best"),
        times("conv_tasnet_30s", "fp32 compiled"),
        times("dprnn_30s", "bf16"),
        times("dprnn_30s", "fp32"),
        times("bs_roformer_30s", "bf16 compiled"),
        times("bs_roformer_30s", "fp32 compiled"),
        losses,
        f"{times('clip_and_adam', 'default')}, {times('clip_and_adam', 'default', 'best')}",
    ]
    assert {piece["date"] for piece in measured.values()} == {"2026-11-22"}
    assert {piece["threads"] for piece in measured.values()} == {1}


def test_the_time_to_compile_is_what_was_measured():
    first_step = results("against_peers")["sepformer_small_first_step"]["races"][0]["measured"]
    seconds = [round(first_step[who]["median"]) for who in ("ours regions", "ours whole", "speechbrain whole")]

    section = BENCHMARKS.split("### Time to compile")[1]
    quoted = re.search(
        r"took (\d+) s when .*? regions .*? and (\d+) s as a whole; .*? took (\d+) s as a whole \(once", section
    )
    assert [int(number) for number in quoted.groups()] == seconds


def test_the_memory_of_a_step_is_what_was_measured():
    memory = results("against_peers")["sepformer_memory"]["races"][0]["measured"]
    names = ("ours fp32", "speechbrain fp32", "ours bf16", "speechbrain bf16")
    names += ("ours fp32 checkpoint", "ours bf16 checkpoint")

    section = BENCHMARKS.split("### Memory")[1].split("###")[0]
    assert re.findall(r"\d+\.\d", section) == [f"{memory[name]['median'] / 2**30:.1f}" for name in names]


def test_a_sepformer_on_half_a_minute_is_what_was_measured():
    piece = results("against_peers_epyc")["sepformer_small_30s"]
    ratios = {who: ratio["like"]["median"] for who, ratio in piece["races"][0]["ratios"].items()}

    section = BENCHMARKS.split("### SepFormer on half a minute")[1].split("###")[0]
    assert f"took {ratios['ours fp32 compiled']:.2f} times as long as ours compiled" in section
    assert f"and {ratios['ours fp32']:.2f} times as long as ours not compiled" in section
    assert piece["date"] in section


def test_the_page_answers_as_fast_as_was_measured():
    measured = results("dashboard")
    requests = [times for name, times in measured.items() if name.endswith("_ms") and name != "notification_ms"]

    section = BENCHMARKS.split("## Dashboard")[1]
    assert measured["steps"] == 1_000_000
    assert f"within {max(times['median'] for times in requests):.0f} ms" in section
    assert f"at most {max(times['max'] for times in requests):.0f} ms)" in section
    assert f"holds {measured['memory_after_mib']} MiB" in section
    assert f"{measured['notification_ms']['median'] / 1000:.2f} s after it was written" in section
    assert measured["date"] in section


def test_the_lead_in_a_quarter_of_an_hour_is_what_was_measured():
    measured = results("learning")

    for arm in ("ours", "asteroid"):
        means = [measured["runs"][f"{arm} {seed}"]["si_sdri"]["mean"] for seed in (0, 1)]
        assert f"reached {'SI-SDRi ' if arm == 'ours' else ''}{' and '.join(map(str, means))} dB" in BENCHMARKS
    for lead in measured["ahead_of_asteroid_db"].values():
        assert f"{lead['mean']} ± {lead['half_95_over_mixtures']} dB ahead" in BENCHMARKS


def test_no_other_page_states_a_figure_of_ours():
    """A measured figure carries ± or the date of a measurement, and belongs on the page where it is checked."""
    checked = {"README.md", "docs/benchmarks.md"}
    learn = {name for name in DOCUMENTS if name.startswith("docs/learn/")}  # checked in tests/textbook and tests/lab

    for name in DOCUMENTS.keys() - checked - learn:
        assert not re.search(r"±|\b20\d\d-\d\d-\d\d\b|\d dB\b.*\bin \d+ minutes", DOCUMENTS[name]), name
