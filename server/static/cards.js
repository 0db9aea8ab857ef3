// Draws what requests.js gathered: a card for each running request, and the tables below.
// -- drawings -----------------------------------------------------------------------------------

const W = 330, H = 92;

function blocksChart(history) {
  const samples = history.samples, last = samples.at(-1);
  const top = Math.max(1, ...samples.map((s) => s.full), ...samples.map((s) => s.held));
  const start = samples[0]?.tokens ?? 0, end = Math.max(start + 1, last?.tokens ?? 1);
  const x = (s) => 4 + (s.tokens - start) / (end - start) * (W - 40);
  const y = (blocks) => H - 16 - blocks / top * (H - 28);
  const path = (value) => samples.map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(value(s)).toFixed(1)}`).join("") + "h0"; // a dot at least
  const label = (value) => element("text", { x: W - 32, y: y(value) + 4 }, value);
  const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "KV blocks by tokens" },
    element("line", { class: "axis", x1: 4, x2: W - 36, y1: H - 16, y2: H - 16 }),
    element("path", { class: "full", d: path((s) => s.full) }),
    element("path", { class: "held", d: path((s) => s.held) }),
    element("text", { x: 4, y: H - 3 }, `${number(start)} tokens`),
    element("text", { x: W - 36, y: H - 3, "text-anchor": "end" }, number(end)));
  if (last) {
    svg.append(label(last.held));
    if (y(last.held) - y(last.full) > 11) svg.append(label(last.full));
  }
  return svg;
}

function heatMap(history) {
  const canvas = element("canvas", { role: "img", "aria-label": "norm of the thought state of each layer" });
  const { columns, layers } = history;
  canvas.width = columns.length;
  canvas.height = layers.length;
  canvas.dataset.layers = layers.length;
  canvas.dataset.columns = columns.length;
  const all = columns.flatMap((column) => column.norms);
  const low = Math.min(...all), high = Math.max(...all);
  const [cold, hot] = ["--cold", "--hot"].map(colour);
  const context = canvas.getContext("2d");
  columns.forEach((column, i) => column.norms.forEach((norm, j) => {
    const part = high - low > 1e-6 * high ? (norm - low) / (high - low) : 0.5;
    context.fillStyle = `rgb(${cold.map((c, k) => Math.round(c + (hot[k] - c) * part)).join(" ")})`;
    context.fillRect(i, j, 1, 1);
  }));
  canvas.title = `layers ${layers[0]} (top) to ${layers.at(-1)}; folds ${columns[0].folds} to ${columns.at(-1).folds}`;
  return { canvas, low, high };
}

function colour(name) {
  // Of the scheme in force, as [red, green, blue].
  const probe = element("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return parts;
}

function rhoBars(rho) {
  const width = 600, height = 34, shown = rho.slice(-150), top = Math.max(...shown, 1e-9);
  const step = Math.min(12, width / shown.length);
  return element("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": "how far each fold moved the state" },
  ...shown.map((value, i) => element("rect", { class: "bar", x: i * step, width: Math.max(0.5, step - 1.5),
    y: height - value / top * height, height: Math.max(1, value / top * height) },
  element("title", {}, `fold ${rho.length - shown.length + i + 1}: ${value.toFixed(3)}`))));
}

let numEngines = 1; // of the server, as it said last

function requestCard(history) {
  const { record, running } = history;
  const full = Math.ceil(record.num_tokens / history.blockSize);
  const held = running ? record.held_blocks : record.peak_blocks;
  const card = element("section", { class: "card request", "data-id": record.request_id },
    element("header", {},
      element("span", { class: "id", title: record.request_id }, record.request_id),
      element("span", { class: "tag" }, record.adapter ?? "base model"),
      record.rule ? element("span", { class: "tag" }, `rule ${record.rule}`) : null,
      numEngines > 1 ? element("span", { class: "tag" }, `engine ${record.engine}`) : null,
      element("span", { class: `tag ${running ? "running" : ""}` }, running ? "running" : "finished")),
    element("div", { class: "soft" },
      `${number(record.num_tokens)} tokens · ${number(record.folds)} folds · ` +
      `${number(held)} KV blocks ${running ? "held" : "at most"}, ${number(full)} with full attention`));
  const charts = element("div", { class: "charts" },
    element("div", { class: "blocks" },
      element("div", { class: "label" }, "KV blocks held; dashed: full attention"), blocksChart(history)));
  card.append(charts);
  if (history.columns.length) {
    const { canvas, low, high } = heatMap(history);
    charts.append(element("div", { class: "heat" },
      element("div", { class: "label" },
        element("span", {}, "‖S‖ by layer"), high - low < 0.005 // normalised: all the same
          ? element("span", {}, number(high, 2))
          : element("span", {}, number(low, 2), element("i", { class: "scale" }), number(high, 2))), canvas));
  }
  if (history.rho.length) {
    const last = history.rho.at(-1);
    charts.append(element("div", { class: "rho" },
      element("div", { class: "label" }, element("span", {}, "ρ of each fold: ‖ΔS‖ / ‖S‖"),
        element("span", {}, `last ${last.toFixed(3)}`)), rhoBars(history.rho)));
  }
  return card;
}

function drawRequests() {
  const all = [...seen.values()].reverse();
  const drawn = [...all.filter((h) => h.running), ...all.filter((h) => !h.running)].slice(0, MAX_DRAWN);
  $("requests").replaceChildren(...drawn.map(requestCard));
  $("none").hidden = drawn.length > 0;
  const running = all.filter((h) => h.running).length;
  $("count").textContent = running > MAX_DRAWN ? `${running} running, ${MAX_DRAWN} drawn` : `${running} running`;
  for (const history of all) // what is not drawn and has finished is forgotten
    if (!history.running && !drawn.includes(history)) seen.delete(history.record.request_id);
}

function drawFacts(info, report) {
  const used = report.usable_blocks - report.free_blocks;
  const meter = element("meter", { min: 0, max: Math.max(1, report.usable_blocks), value: used });
  const fact = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value));
  const window_ = info.plan.window_tokens;
  numEngines = report.engines.length;
  const engines = numEngines < 2 ? [] : report.engines.map((engine, i) => fact(`engine ${i}`,
    `${number(engine.running)} running, ${number(engine.usable_blocks - engine.free_blocks)} blocks in use`));
  $("facts").replaceChildren(
    fact("KV blocks in use", `${number(used)} of ${number(report.usable_blocks)}`, meter),
    ...engines,
    fact("tokens a block", number(report.block_size)),
    fact("window", window_ ? `${number(window_)} tokens` : "full attention"),
    fact("a fold frees", `${number(100 * info.plan.evict_ratio)} % of it`),
    fact("longest sequence", `${number(info.max_model_len)} tokens`));
  $("server").textContent = `pte-vllm ${info.version}`;
}

function drawFinished(finished) {
  table($("finished"), [
    ["request", (r) => r.request_id, "mono"],
    ...(numEngines > 1 ? [["engine", (r) => r.engine, "number"]] : []),
    ["adapter", (r) => r.adapter ?? "base model"],
    ["rule", (r) => r.rule ?? "–"],
    ["tokens", (r) => number(r.num_tokens), "number"],
    ["folds", (r) => number(r.folds), "number"],
    ["most KV blocks", (r) => number(r.peak_blocks), "number"],
  ], finished.slice(-MAX_FINISHED).reverse(), "Nothing has finished yet.");
}

function drawAdapters(adapters) {
  const versions = adapters.flatMap((a) => a.versions.toReversed().map((v) => ({ name: a.name, newest: a.newest, ...v })));
  table($("adapters"), [
    ["adapter", (v) => v.name],
    ["version", (v) => v.version === v.newest ? `${v.version} (newest)` : v.version, "number"],
    ["rule", (v) => v.rule ?? "plain LoRA"],
    ["rollouts now", (v) => number(v.rollouts), "number"],
    ["size", (v) => `${number(v.bytes / 2 ** 20, 1)} MiB`, "number"],
    ["pushed", (v) => ago(v.created_s)],
    ["sha256", (v) => v.sha256.slice(0, 12), "mono"],
  ], versions, "No adapter was pushed.");
}
