// A row's details: what each of its runs gave, in a dialog.

function open(id) {
  state.row = id;
  writeAddress();
  showDetails();
}

function showDetails() {
  const dialog = document.getElementById("details");
  const row = state.row ? DATA.rows.find((candidate) => candidate.id === state.row) : null;
  if (!row) {
    if (dialog.open) dialog.close();
    return;
  }
  dialog.replaceChildren(
    make(
      "div",
      { class: "inside" },
      make("button", { type: "button", class: "close", click: () => dialog.close() }, "Close"),
      make("h2", { id: "details-title" }, row.victim, make("small", {}, [row.place, row.defense, row.budget].filter(Boolean).join(", "))),
      facts(row),
      row.marks.length ? make("ul", { class: "notes" }, row.marks.map((name) => note(DATA.marks[name]))) : null,
      row.records.length ? runsTable(row) : null,
      row.records.length ? make("p", { class: "quiet" }, [...new Set(row.records.map((run) => DATA.provenance[run.where]))].join("; ")) : null,
    ),
  );
  if (!dialog.open) dialog.showModal();
}

function note(mark) {
  return mark ? make("li", { class: mark.serious ? "serious" : null }, make("b", {}, mark.letter), make("span", {}, `${mark.text}.`)) : null;
}

function facts(row) {
  const rate = (name, estimate) => (estimate ? [name, percent(estimate)] : null);
  const count = (value) => (value === null ? null : Math.round(value).toLocaleString("en"));
  const pairs = [
    row.status === "done" ? null : ["not measured", row.why],
    rate("DER", row.estimates.der),
    rate("accuracy", row.estimates.accuracy),
    rate("accuracy lost", row.estimates.lost),
    rate("attack success", row.estimates.asr),
    rate("robust accuracy", row.estimates.ra),
    row.baseline ? null : ["runs", `${row.done} of ${row.runs} measured${row.networks > 1 ? `, on ${row.networks} networks` : ""}`],
    row.clean_samples === null ? null : ["clean samples", row.per_class === 0 ? `${count(row.clean_samples)} (all there are)` : `${count(row.clean_samples)} (${row.per_class} a class)`],
    row.estimates.seconds ? ["seconds", seconds(row.estimates.seconds)] : null,
    row.images === null ? null : ["images in training", count(row.images)],
    row.peak_memory_mib === null ? null : ["peak memory", `${count(row.peak_memory_mib)} MiB`],
    row.attack_spec === null ? null : ["attack", make("code", {}, row.attack_spec)],
    row.baseline ? null : ["defense", make("code", {}, row.defense)],
    row.published ? ["published", `${row.published} (ACC / ASR / RA / DER), ${row.published_source}, on ${row.published_on}${row.published_note ? `; ${row.published_note}` : ""}`] : null,
  ];
  return make(
    "dl",
    { class: "list" },
    pairs.filter(Boolean).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
}

function runsTable(row) {
  const several = new Set(row.records.map((run) => run.network)).size > 1;
  const pair = (values) => {
    if (!values || values[1] === null) return NOTHING;
    return `${values[0] === null ? NOTHING : fixed(100 * values[0])} → ${fixed(100 * values[1])}`;
  };
  const heads = ["seed", several ? "network" : null, "ACC", "ASR", "RA", "DER", "s"].filter(Boolean);
  const body = row.records.map((run) => {
    const first = [make("th", { scope: "row", title: `key ${run.key}` }, String(run.seed)), several ? make("td", { class: "n" }, run.network === null ? run.name : `seed ${run.network}`) : null];
    if (run.status !== "done") return make("tr", {}, first, make("td", { class: "why", colspan: "6" }, make("b", {}, run.status), `: ${run.reason}`));
    const remarks = [...run.flags, ...run.notes, ...Object.entries(run.values).map(([name, value]) => `${name} ${value}`)];
    const numbers = [pair(run.accuracy), pair(run.asr), pair(run.ra), run.der === null ? NOTHING : fixed(100 * run.der), run.seconds === null ? NOTHING : seconds([run.seconds])];
    return make("tr", {}, first, numbers.map((text) => make("td", { class: "n" }, text)), make("td", { class: "w3 settings" }, remarks.join("; ")));
  });
  return make(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Every run" },
    make(
      "table",
      { class: "runs" },
      make("thead", {}, make("tr", {}, heads.map((head, i) => make("th", { scope: "col", class: i ? "n" : null }, head)), make("th", { scope: "col", class: "w3" }, "flags, notes and what the defense says"))),
      make("tbody", {}, body),
    ),
  );
}
