// Curves over steps: one chart per quantity with all runs in it. The charts share the cursor and the window of steps.

import { element } from "./dom.js";
import { digits, integer, transparent } from "./labels.js";
import { drawStrip, stripLegend, stripText } from "./strip.js";

const SMOOTHING_BUCKETS = 40; // length of the moving average

// Lines: `column` is a column of the steps, `validation` one of the validations, `values` computes one from a series.
export const CHARTS = [
  {
    key: "loss",
    title: "Loss",
    lines: [
      { column: "loss", smooth: true, range: true },
      { validation: "loss", name: "validation", pointsOnly: true },
    ],
    caption: "Trained steps only. Bold: moving average; shaded: range; dots: validation.",
  },
  {
    key: "si_sdri",
    title: "Validation: SI-SDR improvement, dB",
    lines: [{ validation: "si_sdri" }],
    caption: "On sources that are not trained on. 0 dB is the unprocessed mixture.",
  },
  {
    key: "norm",
    title: "Gradient norm",
    log: true,
    lines: [
      { column: "grad_norm", smooth: true, range: true, name: "before clipping" },
      { column: "max_norm", dash: [6, 4], name: "max_norm" },
      { column: "clipped_grad_norm", smooth: true, dash: [2, 3], name: "after clipping" },
    ],
    caption: "Bold: before clipping; dotted: after clipping; dashed: max_norm.",
  },
  {
    key: "update_ratio",
    title: "Update-to-weight ratio",
    log: true,
    lines: [{ column: "update_ratio" }],
    caption: "Norm of a step's update over the norm of the weights, median over blocks. About 1e-3 is usual with Adam.",
  },
  { key: "strip", title: "Clipped and skipped steps", strip: true },
  { key: "lr", title: "Learning rate", log: true, lines: [{ column: "lr" }] },
  {
    key: "speed",
    title: "Examples per second",
    lines: [{ column: "examples_per_second", smooth: true }],
    fromZero: true,
  },
  {
    key: "wait",
    title: "Waiting for data, % of step time",
    lines: [{ values: waitingPercent, smooth: true, name: "waiting" }],
    fromZero: true,
  },
  { key: "memory", title: "Peak memory, GiB", lines: [{ values: memoryGib, name: "peak" }], fromZero: true },
  { key: "sdr", title: "Training SI-SDR, dB", lines: [{ column: "si_sdr", smooth: true, range: true }] },
];

function memoryGib(series) {
  return series.mean.memory_bytes?.map((bytes) => (bytes === null ? null : bytes / 2 ** 30));
}

function waitingPercent(series) {
  const { data_seconds: waiting, seconds: working } = series.mean;
  if (!waiting || !working) return undefined;
  return waiting.map((seconds, bucket) => {
    if (seconds === null || working[bucket] === null) return null;
    return (100 * seconds) / (seconds + working[bucket] || 1);
  });
}

function isPresent(value) {
  return value !== null && value !== undefined;
}

// Centred moving average of the values that are present, by running sums.
function movingAverage(values) {
  const half = Math.floor(Math.min(SMOOTHING_BUCKETS, values.length / 12) / 2);
  const sums = [0];
  const counts = [0];
  for (const value of values) {
    sums.push(sums.at(-1) + (value ?? 0));
    counts.push(counts.at(-1) + (value === null ? 0 : 1));
  }
  return values.map((value, index) => {
    if (value === null) return null;
    const begin = Math.max(0, index - half);
    const end = Math.min(values.length, index + half + 1);
    return (sums[end] - sums[begin]) / (counts[end] - counts[begin]);
  });
}

// Return the rows that uPlot draws for a chart, each with its run and style, and the bands between two of them.
// Silent rows are not read out under the cursor.
function chartRows(spec, runs) {
  const rows = [];
  const bands = [];
  for (const run of runs) {
    const { series, colour } = run;
    for (const line of spec.lines) {
      const name = line.name ?? "";
      if (line.validation) {
        const { validation } = series;
        if (!validation?.step.length) continue;
        const y = validation[line.validation];
        rows.push({ run, x: validation.step, y, name, colour, width: 2, points: true, pointsOnly: line.pointsOnly });
        continue;
      }
      const x = series.steps;
      const values = line.values ? line.values(series) : series.mean[line.column];
      if (!values) continue;
      if (line.range && series.low[line.column]) {
        const edge = { run, x, colour: "transparent", width: 0, silent: true };
        rows.push({ ...edge, y: series.high[line.column] }, { ...edge, y: series.low[line.column] });
        bands.push({ series: [rows.length - 1, rows.length], fill: transparent(colour, 0.16) }); // series 0 is x
      }
      if (line.smooth && !line.dash)
        rows.push({ run, x, y: values, colour: transparent(colour, 0.3), width: 1, silent: true });
      const y = line.smooth ? movingAverage(values) : values;
      rows.push({ run, x, y, exact: values, name, colour, width: line.dash ? 1.5 : 2, dash: line.dash });
    }
  }
  return { rows, bands };
}

// The strip is drawn by hand; empty rows give it the axis of steps.
function stripRows(runs) {
  return runs.map((run) => {
    const x = run.series.steps;
    return { run, x, y: x.map(() => 0), colour: "transparent", width: 0, silent: true };
  });
}

// Runs have different steps: align them on one axis.
function alignedData(rows) {
  const tables = rows.length ? rows.map((row) => [row.x, row.y]) : [[[], []]];
  return uPlot.join(
    tables,
    tables.map(() => [0, 0]),
  );
}

export class Chart {
  // view: window(), zoom(window), highlight(), theme() and colour(cssVariable), as app.js has them.
  constructor(spec, view) {
    this.spec = spec;
    this.view = view;
    this.plot = null;
    this.layoutKey = "";
    this.readout = element("span", { className: "readout" });
    this.plotBox = element("div");
    this.legend = element("div", { className: "legend" });
    this.box = element(
      "div",
      { className: "card chart", id: `chart-${spec.key}` },
      element("div", { className: "title" }, element("h3", {}, spec.title), this.readout),
      this.plotBox,
      spec.caption && element("p", { className: "caption" }, spec.caption),
      spec.strip && this.legend,
    );
  }

  draw(runs) {
    const { spec } = this;
    const { rows, bands } = spec.strip ? { rows: stripRows(runs), bands: [] } : chartRows(spec, runs);
    if (spec.log) for (const row of rows) row.y = row.y.map((value) => (value > 0 ? value : null));
    this.runs = runs;
    this.rows = rows;
    if (spec.strip) this.legend.replaceChildren(...(runs.length ? stripLegend(runs[0].series.flag_names) : []));

    this.box.hidden = !spec.strip && !rows.some((row) => row.y.some(isPresent));
    if (this.box.hidden) {
      this.destroy();
      return;
    }

    // New data go into the plot that is there; only a change of its rows or colours needs a new one.
    const styles = rows.map((row) => [row.colour, row.width, row.run.id, row.name]);
    const layoutKey = JSON.stringify([styles, runs.length, this.view.theme()]);
    if (this.plot && layoutKey === this.layoutKey) {
      this.plot.setData(alignedData(rows));
      return;
    }
    this.destroy();
    this.layoutKey = layoutKey;
    this.plot = new uPlot(this.options(rows, bands), alignedData(rows), this.plotBox);
    const canvas = this.plotBox.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${spec.title}: ${runs.map((run) => this.lastValueText(run)).join("; ")}`);
  }

  lastValueText(run) {
    const lastStep = run.series.steps.at(-1);
    if (this.spec.strip) return `${run.name}, ${stripText(run, bucketAt(run.series, lastStep))}`;
    const row = this.rows.find((candidate) => candidate.run.id === run.id && !candidate.silent);
    const value = row ? valueNear(row, lastStep) : null;
    return `${run.name} ends at ${value === null ? "no value" : digits(value)}`;
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }

  size() {
    const height = this.spec.strip ? 44 + 26 * Math.max(1, this.runs.length) : 210;
    return { width: Math.max(120, this.plotBox.clientWidth || 400), height };
  }

  resize(width) {
    this.plot?.setSize({ ...this.size(), ...(width ? { width } : {}) });
  }

  options(rows, bands) {
    const { spec, view } = this;
    const stroke = view.colour("--soft");
    const grid = { stroke: view.colour("--grid"), width: 1 };
    const axis = { stroke, grid, ticks: grid, font: "11px system-ui" };
    const stepLabels = (_, steps) => steps.map((step) => (Number.isInteger(step) ? shortInteger(step) : ""));
    const valueLabels = (_, values) => values.map((value) => (spec.strip || value === null ? "" : digits(value)));
    const yScale = { distr: spec.log ? 3 : 1, range: spec.log ? undefined : valueRange(spec.fromZero) };
    return {
      ...this.size(),
      scales: { x: { time: false, range: () => view.window() }, y: spec.strip ? { range: () => [0, 1] } : yScale },
      series: [{}, ...rows.map(seriesOptions)],
      bands,
      axes: [
        { ...axis, size: 28, values: stepLabels },
        { ...axis, size: 54, values: valueLabels, grid: spec.strip ? { show: false } : grid },
      ],
      legend: { show: false },
      cursor: {
        y: false,
        sync: { key: "steps", scales: ["x", null] },
        drag: { x: true, y: false, setScale: false },
        points: { show: !spec.strip },
        bind: { dblclick: () => () => view.zoom(null) },
      },
      hooks: {
        drawClear: [(plot) => drawHighlight(plot, view.highlight(), view.colour("--warning"))],
        draw: spec.strip ? [(plot) => drawStrip(plot, this.runs, view.colour("--grid"))] : [],
        setSelect: [(plot) => this.zoomToSelection(plot)],
        setCursor: [(plot) => this.updateReadout(plot)],
      },
    };
  }

  zoomToSelection(plot) {
    const { left, width } = plot.select;
    if (width < 4) return; // a click, not a drag
    const first = Math.floor(plot.posToVal(left, "x"));
    const last = Math.ceil(plot.posToVal(left + width, "x"));
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.view.zoom([first, last]);
  }

  updateReadout(plot) {
    const { left } = plot.cursor;
    const isOutside = !isPresent(left) || left < 0;
    this.readout.textContent = isOutside ? "" : this.readoutText(plot.posToVal(left, "x"));
    this.readout.title = this.readout.textContent;
  }

  readoutText(step) {
    const prefix = (run, separator) => (this.runs.length > 1 ? run.name + separator : "");
    if (this.spec.strip) {
      return this.runs.map((run) => prefix(run, ", ") + stripText(run, bucketAt(run.series, step))).join("; ");
    }
    const parts = [];
    for (const row of this.rows) {
      const value = row.silent ? null : valueNear(row, step);
      if (value !== null) parts.push(`${prefix(row.run, " ")}${row.name ? `${row.name} ` : ""}${digits(value)}`);
    }
    return parts.length ? `step ${integer(Math.max(0, step))}: ${parts.join(", ")}` : "";
  }
}

function seriesOptions(row) {
  // A single value is no line: show it as a point.
  const isSinglePoint = !row.silent && row.y.filter(isPresent).length === 1;
  return {
    stroke: row.colour,
    width: row.width,
    dash: row.dash,
    spanGaps: true,
    paths: row.pointsOnly ? () => null : undefined,
    points: { show: Boolean(row.points) || isSinglePoint, size: 5, fill: row.colour, stroke: row.colour },
  };
}

function shortInteger(step) {
  if (Math.abs(step) >= 1e6) return `${Number((step / 1e6).toPrecision(4))}M`;
  return Math.abs(step) >= 1e4 ? `${Number((step / 1e3).toPrecision(5))}k` : String(step);
}

// Return uPlot's function of the smallest and largest value: some margin, or down to zero.
function valueRange(fromZero) {
  return (_, low, high) => {
    if (!isPresent(low)) return [0, 1];
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    return [fromZero ? Math.min(0, low) : low - margin, high + margin];
  };
}

// Index of the step nearest to a given one, by bisection; -1 if there are no steps.
function nearestIndex(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  if (high < 0) return -1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function bucketAt(series, step) {
  const bucket = nearestIndex(series.steps, step);
  return bucket > 0 && series.steps[bucket] > step ? bucket - 1 : bucket;
}

// The value nearest to a step. Some columns have values at every 50th step only, so nulls are dropped first.
function valueNear(row, step) {
  if (!row.present) {
    const values = row.exact || row.y;
    const indices = [...values.keys()].filter((index) => isPresent(values[index]));
    row.present = { x: indices.map((index) => row.x[index]), y: indices.map((index) => values[index]) };
  }
  const index = nearestIndex(row.present.x, step);
  return index < 0 ? null : row.present.y[index];
}

function drawHighlight(plot, steps, colour) {
  if (!steps) return;
  const { ctx, bbox } = plot;
  const left = Math.max(bbox.left, plot.valToPos(steps[0], "x", true));
  const right = Math.min(bbox.left + bbox.width, Math.max(left + 2, plot.valToPos(steps[1], "x", true)));
  if (right <= left) return;
  ctx.save();
  ctx.globalAlpha = 0.16;
  ctx.fillStyle = colour;
  ctx.fillRect(left, bbox.top, right - left, bbox.height);
  ctx.restore();
}
