"use strict";
// Curves over steps: one chart a quantity, all runs laid over each other, cursor and window shared by all charts.

const SMOOTHED = 40; // buckets in the bold line's mean

const CHARTS = [
  { key: "loss", title: "Loss", lines: [{ of: "loss", smooth: true, spread: true }, { score: "loss", name: "validation" }],
    say: "Trained steps alone. Bold: mean of neighbours; shade: least and greatest; dots: validation." },
  { key: "si_sdri", title: "Validation: SI-SDR improvement, dB", lines: [{ score: "si_sdri" }],
    say: "On sources not trained on. Zero is the mixture itself." },
  { key: "norm", title: "Gradient norm", log: true,
    lines: [{ of: "grad_norm", smooth: true, spread: true, name: "before clipping" }, { of: "limit", dash: [6, 4], name: "limit" },
      { of: "clipped_grad_norm", smooth: true, name: "after", dash: [2, 3] }],
    say: "Bold: before clipping; dotted: after; dashed: the limit." },
  { key: "update_ratio", title: "Update over weight", log: true, lines: [{ of: "update_ratio" }],
    say: "How far a step moves the weights, as a share of them (median over blocks). Around 1e-3 is usual with Adam." },
  { key: "strip", title: "Clipped, and left out", strip: true },
  { key: "lr", title: "Learning rate", log: true, lines: [{ of: "lr" }] },
  { key: "speed", title: "Examples a second", lines: [{ of: "examples_per_second", smooth: true, faint: true }], zero: true },
  { key: "wait", title: "Waiting for data, % of a step", lines: [{ make: waiting, smooth: true, faint: true, name: "waiting" }], zero: true },
  { key: "memory", title: "Peak memory, GiB", lines: [{ make: (s) => scaled(s.mean.memory_bytes, 2 ** -30), name: "peak" }], zero: true },
  { key: "sdr", title: "SI-SDR in training, dB", lines: [{ of: "si_sdr", smooth: true, spread: true }] },
];

function scaled(values, factor) {
  return values && values.map((value) => (value === null ? null : value * factor));
}

function waiting(series) {
  const { data_seconds: wait, seconds: work } = series.mean;
  return wait && work && wait.map((value, at) => (value === null || work[at] === null ? null : (100 * value) / (value + work[at] || 1)));
}

function smoothed(values) {
  const half = Math.floor(Math.min(SMOOTHED, values.length / 12) / 2);
  const sums = [0], counts = [0];
  for (const value of values) {
    sums.push(sums[sums.length - 1] + (value === null ? 0 : value));
    counts.push(counts[counts.length - 1] + (value === null ? 0 : 1));
  }
  return values.map((value, at) => {
    const from = Math.max(0, at - half), to = Math.min(values.length, at + half + 1);
    return value === null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
  });
}

function thread(colour, alpha) {
  return colour + Math.round(255 * alpha).toString(16).padStart(2, "0");
}

// The series of one chart: for uPlot each a row of values over the steps of its run, with how to draw it.
function rowsOf(chart, runs) {
  const rows = [], bands = [];
  for (const run of runs) {
    for (const line of chart.lines) {
      const series = run.series;
      if (line.score) {
        const scores = series.scores;
        if (!scores || !scores.step.length) continue;
        rows.push({ run, x: scores.step, y: scores[line.score], name: line.name || "", colour: run.colour, width: 2, dots: true, bare: Boolean(line.name) });
        continue;
      }
      const values = line.make ? line.make(series) : series.mean[line.of];
      if (!values) continue;
      const x = series.steps;
      if (line.spread && series.low[line.of]) {
        const hidden = { run, x, colour: "transparent", width: 0, silent: true };
        rows.push({ ...hidden, y: series.high[line.of] }, { ...hidden, y: series.low[line.of] });
        bands.push({ series: [rows.length - 1, rows.length], fill: thread(run.colour, 0.16) });
      }
      if (line.smooth && !line.dash) rows.push({ run, x, y: values, colour: thread(run.colour, 0.3), width: 1, silent: true });
      rows.push({ run, x, y: line.smooth ? smoothed(values) : values, exact: values, name: line.name || "", colour: run.colour,
        width: line.dash ? 1.5 : 2, dash: line.dash });
    }
  }
  return { rows, bands };
}

function joined(rows) {
  const tables = rows.map((row) => [row.x, row.y]);
  return uPlot.join(tables.length ? tables : [[[], []]], tables.map(() => [0, 0]));
}

function positive(values) {
  return values.map((value) => (value === null || value === undefined || value <= 0 ? null : value));
}

class Chart {
  constructor(chart, room) {
    this.chart = chart;
    this.read = make("span", { className: "read" });
    this.place = make("div");
    this.box = make("div", { className: "card chart", id: `chart-${chart.key}` },
      make("div", { className: "title" }, make("h3", {}, chart.title), this.read), this.place,
      chart.say && make("p", { className: "say" }, chart.say), chart.strip && reasons());
    this.room = room;
    this.plot = null;
    this.shape = "";
  }

  draw(runs) {
    this.runs = runs;
    const { rows, bands } = this.chart.strip ? { rows: stripRows(runs), bands: [] } : rowsOf(this.chart, runs);
    if (this.chart.log) for (const row of rows) row.y = positive(row.y);
    const known = rows.some((row) => row.y.some((value) => value !== null && value !== undefined));
    this.box.hidden = !known && !this.chart.strip;
    if (this.box.hidden) return this.forget();
    this.rows = rows;
    const shape = JSON.stringify([rows.map((row) => [row.colour, row.width, row.run.id, row.name]), runs.length, this.room.theme()]);
    if (this.plot && shape === this.shape) {
      this.plot.setData(joined(rows));
      return undefined;
    }
    this.forget();
    this.shape = shape;
    this.plot = new uPlot(this.options(rows, bands), joined(rows), this.place);
    const canvas = this.place.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${this.chart.title}, ${runs.map((run) => this.inWords(run)).join("; ")}`);
    return undefined;
  }

  inWords(run) {
    const last = run.series.steps[run.series.steps.length - 1];
    if (this.chart.strip) return `${run.name}: ${stripWords(run, last)} at the end`;
    const row = this.rows.find((one) => one.run.id === run.id && !one.silent);
    const value = row ? valueAt(row, last) : null;
    return `${run.name}: ${value === null ? "not known" : digits(value)} at the end`;
  }

  forget() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }

  size() {
    return { width: Math.max(120, this.place.clientWidth || 400), height: this.chart.strip ? 44 + 26 * Math.max(1, this.runs.length) : 210 };
  }

  options(rows, bands) {
    const { chart, room } = this;
    const ink = room.colour("--soft");
    const grid = { stroke: room.colour("--grid"), width: 1 };
    return {
      ...this.size(),
      scales: {
        x: { time: false, range: () => room.window() },
        y: chart.strip ? { range: () => [0, 1] } : { distr: chart.log ? 3 : 1, range: chart.log ? undefined : span(chart.zero) },
      },
      series: [{}, ...rows.map((row) => ({
        stroke: row.colour, width: row.width, dash: row.dash, spanGaps: true, paths: row.bare ? () => null : undefined,
        points: { show: Boolean(row.dots) || (!row.silent && row.y.filter((value) => value !== null && value !== undefined).length === 1), size: 5, fill: row.colour, stroke: row.colour },
      }))],
      bands,
      axes: [
        { stroke: ink, grid, ticks: grid, size: 28, font: "11px system-ui", values: (_, marks) => marks.map((mark) => (Number.isInteger(mark) ? short(mark) : "")) },
        { stroke: ink, grid: chart.strip ? { show: false } : grid, ticks: grid, size: 54, font: "11px system-ui",
          values: (_, marks) => marks.map((mark) => (chart.strip || mark === null ? "" : digits(mark))) },
      ],
      legend: { show: false },
      cursor: { y: false, sync: { key: "steps", scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, points: { show: !chart.strip },
        bind: { dblclick: () => () => room.zoom(null) } },
      hooks: {
        drawClear: [(plot) => mark(plot, room.marked(), room.colour("--warning"))],
        draw: chart.strip ? [(plot) => drawStrip(plot, this.runs, room)] : [],
        setSelect: [(plot) => {
          if (plot.select.width < 4) return;
          const from = plot.posToVal(plot.select.left, "x");
          const to = plot.posToVal(plot.select.left + plot.select.width, "x");
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          room.zoom([Math.floor(from), Math.ceil(to)]);
        }],
        setCursor: [(plot) => this.tell(plot)],
      },
    };
  }

  tell(plot) {
    const { left } = plot.cursor;
    if (left === null || left === undefined || left < 0) {
      this.read.textContent = "";
      return;
    }
    const step = plot.posToVal(left, "x");
    if (this.chart.strip) {
      this.read.textContent = this.runs.map((run) => (this.runs.length > 1 ? `${run.name}, ` : "") + stripWords(run, step)).join("; ");
      return;
    }
    const parts = [];
    for (const row of this.rows) {
      if (row.silent) continue;
      const value = valueAt(row, step);
      if (value === null) continue;
      const who = this.runs.length > 1 ? `${row.run.name} ` : "";
      parts.push(`${who}${row.name ? `${row.name} ` : ""}${digits(value)}`);
    }
    this.read.textContent = parts.length ? `step ${whole(Math.max(0, step))}: ${parts.join(", ")}` : "";
    this.read.title = this.read.textContent;
  }
}

function short(mark) {
  if (Math.abs(mark) >= 1e6) return `${Number((mark / 1e6).toPrecision(4))}M`;
  return Math.abs(mark) >= 1e4 ? `${Number((mark / 1e3).toPrecision(5))}k` : String(mark);
}

function span(zero) {
  return (_, low, high) => {
    if (low === null || low === undefined) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.08;
    return [zero ? Math.min(0, low) : low - room, high + room];
  };
}

function nearest(x, step) {
  let low = 0, high = x.length - 1;
  if (high < 0) return -1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - x[low - 1] < x[low] - step ? low - 1 : low;
}

// The value known nearest to a step: some are known at every 50th alone.
function valueAt(row, step) {
  if (!row.known) {
    const values = row.exact || row.y;
    const places = row.x.map((_, at) => at).filter((at) => values[at] !== null && values[at] !== undefined);
    row.known = { x: places.map((at) => row.x[at]), y: places.map((at) => values[at]) };
  }
  const at = nearest(row.known.x, step);
  return at < 0 ? null : row.known.y[at];
}

function mark(plot, marked, colour) {
  if (!marked) return;
  const { ctx, bbox } = plot;
  const from = Math.max(bbox.left, plot.valToPos(marked[0], "x", true));
  const to = Math.min(bbox.left + bbox.width, Math.max(from + 2, plot.valToPos(marked[1], "x", true)));
  if (to <= from) return;
  ctx.save();
  ctx.globalAlpha = 0.16;
  ctx.fillStyle = colour;
  ctx.fillRect(from, bbox.top, to - from, bbox.height);
  ctx.restore();
}

function stripRows(runs) {
  return runs.map((run) => ({ run, x: run.series.steps, y: run.series.steps.map(() => 0), colour: "transparent", width: 0, silent: true }));
}

// Of each run a lane: above how many of its steps were clipped, below those that were left out, by reason.
function drawStrip(plot, runs, room) {
  const { ctx, bbox } = plot;
  const lane = bbox.height / Math.max(1, runs.length);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  runs.forEach((run, number) => {
    const { steps, n_steps: sizes, mean, left_out: leftOut } = run.series;
    const top = bbox.top + number * lane;
    steps.forEach((step, at) => {
      const from = Math.round(plot.valToPos(step, "x", true));
      const wide = Math.max(1, Math.round(plot.valToPos(step + sizes[at], "x", true)) - from);
      const clipped = mean.clipped ? mean.clipped[at] : null;
      if (clipped) {
        ctx.fillStyle = thread(run.colour, 0.12 + 0.78 * clipped);
        ctx.fillRect(from, top + 1, wide, 0.44 * lane);
      }
      let depth = 0;
      for (const reason of Object.keys(REASONS)) {
        const count = leftOut[reason] ? leftOut[reason][at] : 0;
        if (!count) continue;
        ctx.fillStyle = REASON_COLOURS[reason];
        ctx.fillRect(from, Math.round(top + 0.5 * lane + depth), Math.max(3, wide), Math.round(0.44 * lane - depth));
        depth += 0.12 * lane;
      }
    });
    if (number) {
      ctx.fillStyle = room.colour("--grid");
      ctx.fillRect(bbox.left, top, bbox.width, 1);
    }
  });
  ctx.restore();
}

function stripWords(run, step) {
  const { steps, n_steps: sizes, mean, left_out: leftOut } = run.series;
  let at = nearest(steps, step);
  if (at > 0 && steps[at] > step) at -= 1;
  if (at < 0) return "";
  const last = steps[at] + sizes[at] - 1;
  const where = sizes[at] > 1 ? `steps ${whole(steps[at])} to ${whole(last)}` : `step ${whole(steps[at])}`;
  const parts = [];
  if (mean.clipped && mean.clipped[at] !== null) parts.push(sizes[at] > 1 ? `${(100 * mean.clipped[at]).toFixed(0)} % clipped` : mean.clipped[at] ? "clipped" : "not clipped");
  for (const [reason, words] of Object.entries(REASONS)) {
    const count = leftOut[reason] ? leftOut[reason][at] : 0;
    const how = reason === "rescued" ? "rescued" : "left out";
    if (count) parts.push(`${sizes[at] > 1 ? `${whole(count)} ${how}` : how} (${words})`);
  }
  return `${where}: ${parts.join(", ") || "nothing"}`;
}

function reasons() {
  const key = make("div", { className: "key" }, make("span", {}, "above: share clipped; below, left out:"));
  for (const [reason, words] of Object.entries(REASONS)) {
    const dot = make("span", { className: "dot" });
    dot.style.background = REASON_COLOURS[reason];
    key.append(make("span", {}, dot, words));
  }
  return key;
}
