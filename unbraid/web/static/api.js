// The source of the page's data: the server it came from, or the report that contains it.

export function serverSource() {
  async function getJson(path) {
    const response = await fetch(path, { credentials: "same-origin" });
    const content = await response.json().catch(() => ({ problem: "The server's answer could not be read." }));
    if (!response.ok) throw new Error(content.problem || `The server answered with status ${response.status}.`);
    return content;
  }
  const encode = encodeURIComponent;
  return {
    isReport: false,
    runs: () => getJson("/api/runs"),
    details: (id) => getJson(`/api/details/${encode(id)}`),
    diagnosis: (id) => getJson(`/api/diagnosis/${encode(id)}`),
    series: (id, first, last, n) => getJson(`/api/series/${encode(id)}?first=${first}&last=${last}&n=${n}`),
    audio: (id, name) => `/api/audio/${encode(id)}?name=${encode(name)}`,
    spectrogram(id, name, reference) {
      const scale = reference ? `&reference=${encode(reference)}` : "";
      return `/api/spectrogram/${encode(id)}?name=${encode(name)}${scale}`;
    },
    listen,
  };
}

// Call onEvent(kind, data) with each event of the server, and when the connection opens, is lost or has ended.
function listen(onEvent) {
  let events = null;
  const open = () => {
    events = new EventSource("/api/live");
    events.onopen = () => onEvent("open");
    events.onerror = () => onEvent(events.readyState === EventSource.CLOSED ? "ended" : "lost");
    events.addEventListener("runs", (event) => onEvent("runs", JSON.parse(event.data)));
    events.addEventListener("grown", (event) => onEvent("grown", JSON.parse(event.data)));
  };
  // A browser allows about six connections to a host: hidden tabs give theirs back.
  document.addEventListener("visibilitychange", () => {
    if (events) events.close();
    events = null;
    if (!document.hidden) open();
  });
  if (!document.hidden) open();
}

export function reportSource(report) {
  return {
    isReport: true,
    date: report.date,
    runs: async () => [report.run],
    details: async () => report.details,
    diagnosis: async () => report.diagnosis,
    async series(_id, first, last) {
      // The first findings come with finer curves around them.
      const zoom = report.zooms.find(({ window }) => window[0] <= first && last <= window[1]);
      return inWindow({ ...report.series, ...zoom }, first, last);
    },
    audio: (_id, name) => report.audio[name],
    spectrogram: (_id, name) => report.spectrograms[name],
    listen() {},
  };
}

function inWindow(series, first, last) {
  const isInside = series.steps.map((step, bucket) => step + series.n_steps[bucket] > first && step <= last);
  const select = (values) => values.filter((_, bucket) => isInside[bucket]);
  const selectAll = (table) =>
    Object.fromEntries(Object.entries(table).map(([name, values]) => [name, select(values)]));
  return {
    ...series,
    steps: select(series.steps),
    n_steps: select(series.n_steps),
    mean: selectAll(series.mean),
    low: selectAll(series.low),
    high: selectAll(series.high),
    flags: selectAll(series.flags),
  };
}
