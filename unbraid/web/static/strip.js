// The strip of clipped, skipped and rescued steps: one lane per run.

import { element } from "./dom.js";
import { integer, outcomeColour, outcomeText, transparent } from "./labels.js";

// In each lane, the upper half shows the share of clipped steps, the lower half skipped and rescued steps by reason.
export function drawStrip(plot, runs, gridColour) {
  const { ctx, bbox } = plot;
  const laneHeight = bbox.height / Math.max(1, runs.length);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  runs.forEach((run, lane) => {
    const top = bbox.top + lane * laneHeight;
    drawLane(plot, run, top, laneHeight);
    if (lane) {
      ctx.fillStyle = gridColour;
      ctx.fillRect(bbox.left, top, bbox.width, 1);
    }
  });
  ctx.restore();
}

function drawLane(plot, run, top, laneHeight) {
  const { ctx } = plot;
  const { steps, n_steps: nSteps, mean, flags, flag_names: flagNames } = run.series;
  steps.forEach((step, bucket) => {
    const left = Math.round(plot.valToPos(step, "x", true));
    const right = Math.round(plot.valToPos(step + nSteps[bucket], "x", true));
    const width = Math.max(1, right - left);
    const clippedShare = mean.clipped?.[bucket];
    if (clippedShare) {
      ctx.fillStyle = transparent(run.colour, 0.12 + 0.78 * clippedShare);
      ctx.fillRect(left, top + 1, width, 0.44 * laneHeight);
    }
    // Several reasons in one bucket lie on top of each other, each a little lower than the one before.
    let offset = 0;
    for (const { name, is_fault: isFault } of flagNames) {
      if (!flags[name]?.[bucket]) continue;
      ctx.fillStyle = outcomeColour(name, isFault);
      const y = Math.round(top + 0.5 * laneHeight + offset);
      ctx.fillRect(left, y, Math.max(3, width), Math.round(0.44 * laneHeight - offset)); // 3 pixels: one step is seen
      offset += 0.12 * laneHeight;
    }
  });
}

// Say in words what happened in the bucket that contains a step.
export function stripText(run, bucket) {
  const { steps, n_steps: nSteps, mean, flags, flag_names: flagNames } = run.series;
  if (bucket < 0) return "";
  const n = nSteps[bucket];
  const parts = [];
  const clippedShare = mean.clipped?.[bucket];
  if (typeof clippedShare === "number") {
    if (n > 1) parts.push(`${(100 * clippedShare).toFixed(0)} % clipped`);
    else parts.push(clippedShare ? "clipped" : "not clipped");
  }
  for (const { name } of flagNames) {
    const count = flags[name]?.[bucket];
    if (!count) continue;
    const verb = name === "rescued" ? "rescued" : "skipped";
    parts.push(`${n > 1 ? `${integer(count)} ` : ""}${verb} (${outcomeText(name)})`);
  }
  const first = steps[bucket];
  const where = n > 1 ? `steps ${integer(first)} to ${integer(first + n - 1)}` : `step ${integer(first)}`;
  return `${where}: ${parts.join(", ") || "nothing"}`;
}

export function stripLegend(flagNames) {
  const items = [element("span", {}, "top: share of clipped steps; bottom: skipped and rescued steps:")];
  for (const { name, is_fault: isFault } of flagNames) {
    const dot = element("span", { className: "dot" });
    dot.style.background = outcomeColour(name, isFault);
    items.push(element("span", {}, dot, outcomeText(name)));
  }
  return items;
}
