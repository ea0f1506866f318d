"use strict";
// Where the page has its data from: the server that sent it, or the report that it lies in.

function fromServer() {
  async function ask(path) {
    const answer = await fetch(path, { credentials: "same-origin" });
    const found = await answer.json().catch(() => ({ problem: "The answer could not be read." }));
    if (!answer.ok) throw new Error(found.problem || `The server answered ${answer.status}.`);
    return found;
  }
  const name = (id) => encodeURIComponent(id);
  return {
    isReport: false,
    runs: () => ask("/api/runs"),
    details: (id) => ask(`/api/run/${name(id)}`),
    judged: (id) => ask(`/api/judged/${name(id)}`),
    series: (id, first, last, n) => ask(`/api/series/${name(id)}?first=${first}&last=${last}&n=${n}`),
    sound: (id, file) => `/api/sound/${name(id)}?name=${encodeURIComponent(file)}`,
    picture: (id, file, like) =>
      `/api/picture/${name(id)}?name=${encodeURIComponent(file)}${like ? `&like=${encodeURIComponent(like)}` : ""}`,
    listen(hear) {
      let events = null;
      const open = () => {
        events = new EventSource("/api/live");
        events.onopen = () => hear("open");
        events.onerror = () => hear(events.readyState === EventSource.CLOSED ? "ended" : "lost");
        events.addEventListener("runs", (event) => hear("runs", JSON.parse(event.data)));
        events.addEventListener("grown", (event) => hear("grown", JSON.parse(event.data)));
      };
      // A browser has few connections to one place: a tab that is not seen gives its own back.
      document.addEventListener("visibilitychange", () => {
        if (events) events.close();
        events = null;
        if (!document.hidden) open();
      });
      if (!document.hidden) open();
    },
  };
}

function fromReport(found) {
  return {
    isReport: true,
    made: found.made,
    runs: async () => [found.run],
    details: async () => found.details,
    judged: async () => found.judged,
    series: async (id, first, last) => {
      const piece = found.pieces.find(({ window }) => window[0] <= first && last <= window[1]);
      return clipped({ ...found.series, ...piece }, first, last);
    },
    sound: (id, file) => found.sounds[file],
    picture: (id, file) => found.pictures[file],
    listen() {},
  };
}

function clipped(series, first, last) {
  const kept = series.steps.map((step, place) => step + series.n_steps[place] > first && step <= last);
  const keep = (values) => values.filter((_, place) => kept[place]);
  const each = (table) => Object.fromEntries(Object.entries(table).map(([name, values]) => [name, keep(values)]));
  return {
    ...series,
    steps: keep(series.steps),
    n_steps: keep(series.n_steps),
    mean: each(series.mean),
    low: each(series.low),
    high: each(series.high),
    left_out: each(series.left_out),
  };
}
