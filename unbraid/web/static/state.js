// What the page shows now, shared by all its parts.

import { reportSource, serverSource } from "./api.js";
import { RUN_COLOURS } from "./labels.js";

const reportData = document.getElementById("report-data");
export const source = reportData ? reportSource(JSON.parse(reportData.textContent)) : serverSource();

export const state = {
  runs: [], // entries of the list
  selected: [], // ids of the runs in the charts; the first one's details are shown
  series: {}, // by id, as are the next three
  details: {},
  diagnosis: {},
  errors: {},
  window: null, // [first, last] step; null for all
  highlight: null, // [first, last] step of the finding that was opened
  notice: "",
};

export function runById(id) {
  return state.runs.find((run) => run.id === id);
}

export function runName(id) {
  return runById(id)?.name ?? "";
}

export function runColour(id) {
  const index = state.selected.indexOf(id);
  return index < 0 ? null : RUN_COLOURS[index % RUN_COLOURS.length];
}

// The first and last step of all selected runs.
export function allSteps() {
  let first = Number.POSITIVE_INFINITY;
  let last = Number.NEGATIVE_INFINITY;
  for (const id of state.selected) {
    const series = state.series[id];
    if (!series?.last_step) continue;
    first = Math.min(first, series.first_step);
    last = Math.max(last, series.last_step);
  }
  if (last < first) return [0, 1];
  return [Math.min(first, last - 1), last]; // a single step still needs an axis of some width
}
