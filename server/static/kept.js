// Draws the strip that shows which tokens each KV head of a request keeps.
// -- kept tokens --------------------------------------------------------------------------------

const SHOWN_RUN = 60; // of tokens that are alike, the rest of a longer run is counted only
const written = new Map(); // request id -> texts so far; null where this key may not read them
let keptShown = null; // what the strip shows, to draw only what is new
let keptLook = 0; // counts looks: where two are under way, only the later one draws
let reading = Promise.resolve(); // the read of tokens under way: two at once would push the same

function options(select, values, name) {
  // Leaves the choice as it is while it exists.
  const before = select.value, wanted = values.map(String);
  if ([...select.options].map((o) => o.value).join() === wanted.join()) return;
  select.replaceChildren(...wanted.map((value) => element("option", { value }, name(value))));
  select.value = wanted.includes(before) ? before : wanted[0];
}

async function lookAtKept(report) {
  const turn = ++keptLook, isLatest = () => turn === keptLook;
  const keeping = [...report.running, ...report.finished].filter((r) => r.keep_tokens && r.folds).reverse();
  $("kept").hidden = !keeping.length;
  if (!keeping.length) return;
  options($("kept-request"), keeping.map((r) => r.request_id), (id) => id);
  const id = $("kept-request").value, record = keeping.find((r) => r.request_id === id);
  const slider = $("kept-fold"), latest = slider.value === slider.max || keptShown?.id !== id;
  slider.max = record.folds;
  if (latest) slider.value = record.folds;
  const asked = { id, fold: slider.value, layer: $("kept-layer").value || "all", head: $("kept-head").value || "all" };
  if (JSON.stringify(asked) === JSON.stringify(keptShown)) return;
  const query = ["fold", "layer", "head"].filter((name) => asked[name] !== "all").map((name) => `${name}=${asked[name]}`);
  try {
    const kept = await get(`thoughts/${encodeURIComponent(id)}/kept?${query.join("&")}`);
    if (!isLatest()) return;
    options($("kept-layer"), ["all", ...Array(kept.layers).keys()], (value) => value);
    options($("kept-head"), ["all", ...Array(kept.heads_per_layer).keys()], (value) => value);
    const complete = await readTokens(id, kept.at ?? kept.num_tokens, isLatest);
    if (!isLatest()) return;
    drawStrip(kept, written.get(id));
    keptShown = { ...asked, ...(complete ? {} : { again: true }) };
  } catch (error) {
    if (!(error instanceof HttpError) || error.status === 401) throw error;
    if (!isLatest()) return;
    keptShown = { ...asked, again: true }; // preempted, or gone since
    $("strip").replaceChildren();
    $("kept-at").textContent = "";
    $("kept-said").textContent = error.status === 404 ? "The server does not know this just now."
      : `Just now ${error.message}.`;
  }
}

function readTokens(id, end, isWanted) {
  // Whether there is nothing more to try; one read at a time.
  const read = reading.then(() => readMore(id, end, isWanted));
  reading = read.catch(() => {});
  return read;
}

async function readMore(id, end, isWanted) {
  for (const known of written.keys()) if (known !== id) written.delete(known);
  if (!written.has(id)) written.set(id, []);
  for (let texts = written.get(id); isWanted() && texts && texts.length < end;) {
    try {
      const part = await get(`thoughts/${encodeURIComponent(id)}/tokens?first=${texts.length}`);
      if (!part.token_ids.length) return true;
      texts.push(...(part.texts ?? part.token_ids.map((token) => `#${token} `)));
    } catch (error) {
      if (!(error instanceof HttpError)) throw error;
      if (![401, 403, 404].includes(error.status)) return false;
      written.set(id, null); // texts are for the admin key; without them there are positions
      return true;
    }
  }
  return true;
}

function runsOf(kept) {
  // [class, positions] of tokens that follow each other and are alike.
  const end = kept.at ?? kept.pinned[1], at = new Map(kept.positions.map((p, i) => [p, i])), runs = [];
  const lies = (spans, position) => spans.some(([first, last]) => first <= position && position < last);
  for (let position = 0; position < end; position++) {
    const i = at.get(position);
    const kind = lies([kept.pinned, ...kept.questions], position) ? "pinned" : lies(kept.window, position) ? "window"
      : i === undefined ? "gone" : !kept.after[i] ? "dropped" : kept.after[i] < kept.before[i] ? "kept fewer" : "kept";
    if (runs.at(-1)?.[0] !== kind) runs.push([kind, []]);
    runs.at(-1)[1].push(position);
  }
  return { runs, at };
}

function drawStrip(kept, texts) {
  const { runs, at } = runsOf(kept), nodes = [];
  const token = (kind, position) => {
    const i = at.get(position), text = texts?.[position] ?? `${position} `;
    const heads = i === undefined ? "" : `: ${kept.after[i]} of ${kept.heads} heads keep it, ${kept.before[i]} held it before`;
    const node = element("span", { class: kind, title: `position ${position}${heads}` }, text.replaceAll("\n", "⏎"));
    if (kind.startsWith("kept")) node.style.setProperty("--share", kept.after[i] / kept.heads);
    return node;
  };
  for (const [kind, positions] of runs) {
    const most = kind === "gone" ? 0 : kind === "pinned" || kind === "window" ? SHOWN_RUN : Infinity;
    const half = most / 2, cut = positions.length > 1.5 * most ? positions.length - most : 0;
    const [first, last] = cut ? [positions.slice(0, half), positions.slice(half + cut)] : [positions, []];
    nodes.push(...first.map((position) => token(kind, position)));
    if (cut) nodes.push(element("span", { class: kind, title: kind }, ` ⋯${number(cut)}⋯ `));
    nodes.push(...last.map((position) => token(kind, position)));
  }
  $("strip").replaceChildren(...nodes);
  $("kept-at").textContent = kept.fold ? `${kept.fold} of ${kept.folds}, before token ${number(kept.at)}` : "none yet";
  const held = kept.after.filter(Boolean).length;
  $("kept-said").textContent = `${number(held)} tokens are kept by ${kept.heads > 1 ? `at least one of ${number(kept.heads)} heads` : "this head"}; ` +
    `a head keeps ${number(kept.keep_tokens)} at most. This fold dropped ${number(kept.dropped.length)} for good.`;
}

for (const name of ["request", "layer", "head", "fold"])
  $(`kept-${name}`).addEventListener("change", () => { if (last) lookAtKept(last).catch(() => {}); });
