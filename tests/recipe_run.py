"""Run a recipe in this process, and read what it recorded."""

from unbraid.config.recipe import load_recipe
from unbraid.records import TIMING_FIELDS, Event, StepRecord, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory


def run_recipe(file, path, *overrides, resume=False):
    """Train by a recipe with overrides; return the run directory and everything that was yielded."""
    run = RunDirectory(path)
    return run, list(train(load_recipe(file, overrides), run, resume=resume))


def steps_of(records):
    """Return the step records among all records."""
    return [record for record in records if isinstance(record, StepRecord)]


def without_events(records):
    """Return the step and validation records among all records."""
    return [record for record in records if not isinstance(record, Event)]


def event_codes(records):
    """Return the codes of the events among all records."""
    return [record.code for record in records if isinstance(record, Event)]


def without_times(log):
    """Return the rows of a log without measurements of time and memory, which differ from run to run."""
    return [{key: value for key, value in row.items() if key not in TIMING_FIELDS} for row in read_rows(log)[0]]
