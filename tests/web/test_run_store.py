"""Runs are found below folders and listed."""

from runs import write_run

from unbraid.web.run_store import RunStore, find_runs


def test_runs_are_found_below_a_folder_and_links_are_not_followed(tmp_path):
    one = write_run(tmp_path / "runs" / "one", n_steps=3)
    two = write_run(tmp_path / "runs" / "deep" / "two", n_steps=3)
    write_run(tmp_path / "elsewhere", n_steps=3)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")

    assert find_runs([tmp_path / "runs"]) == [two, one]
    assert find_runs([one, one]) == [one]


def test_the_list_has_a_new_version_only_if_a_run_has_changed(tmp_path):
    write_run(tmp_path / "one", n_steps=200)
    store = RunStore([tmp_path])
    store.update_list()
    version = store.list_version

    store.update_list()
    assert store.list_version == version

    write_run(tmp_path / "two", n_steps=3)
    store.update_list()
    assert store.list_version == version + 1
    assert {entry["name"]: entry["best_si_sdri"] is None for entry in store.overviews.values()} == {
        "one": False,
        "two": True,
    }
