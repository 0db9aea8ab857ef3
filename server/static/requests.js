// The first part of the script of /pte (server/page.py joins them): asks the routes under /pte/v1, and
// remembers what each request did while the page was open.
"use strict";
const POLL_MS = 1000, ADAPTERS_EVERY = 5, MAX_SAMPLES = 300, MAX_COLUMNS = 64;
const MAX_DRAWN = 12, MAX_FINISHED = 12;
const KEY = "pte-key";
const $ = (id) => document.getElementById(id);

// -- the server ---------------------------------------------------------------------------------

class HttpError extends Error {
  constructor(status) { super(`the server answers ${status}`); this.status = status; }
}

async function get(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const reply = await fetch(`pte/v1/${path}`, { headers, cache: "no-store" });
  if (!reply.ok) throw new HttpError(reply.status);
  return reply.json();
}

function askForKey() {
  $("wrong").textContent = sessionStorage.getItem(KEY) ? "The server refused that key." : "";
  return new Promise((resolve) => {
    $("ask").addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("key").value = "";
      resolve();
    }, { once: true });
    if (!$("ask").open) $("ask").showModal();
  });
}

// -- small parts --------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                   : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null).map((child) => child?.nodeType ? child : String(child)));
  return node;
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function table(target, columns, rows, empty) {
  // Each column: [title, cell of a row, class].
  const head = columns.map(([title, , kind = ""]) => element("th", { class: kind === "number" ? kind : "", scope: "col" }, title));
  const body = rows.map((row) => element("tr", {}, ...columns.map(([, cell, kind = ""]) => {
    const value = cell(row);
    return element("td", { class: kind, title: value }, value);
  })));
  if (!rows.length) body.push(element("tr", {}, element("td", { colspan: columns.length, class: "soft" }, empty)));
  target.replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

const ago = (seconds) => {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 90) return `${number(past)} s ago`;
  return past < 5400 ? `${number(past / 60)} min ago` : `${number(past / 3600)} h ago`;
};

// -- what one request did while we looked ---------------------------------------------------------

const seen = new Map(); // request id -> history

function observe(record, blockSize, running) {
  if (!seen.has(record.request_id)) seen.set(record.request_id, { samples: [], columns: [], rho: [], asked: -1 });
  const history = seen.get(record.request_id);
  history.record = record;
  history.running = running;
  history.blockSize = blockSize;
  const full = Math.ceil(record.num_tokens / blockSize);
  const held = record.held_blocks || history.samples.at(-1)?.held; // given back when it finished
  if (record.num_tokens && held !== undefined) {
    history.samples.push({ tokens: record.num_tokens, held, full });
    // Half of them go when there are many: the picture keeps its whole length.
    if (history.samples.length > MAX_SAMPLES) history.samples = history.samples.filter((_, i) => i % 2);
  }
  return history;
}

async function askThoughts(history) {
  // Asked when something folded since; 404 where the request has gone, or the server is older.
  const { request_id: id, folds, rule } = history.record;
  if (!rule || history.asked === folds) return;
  history.asked = folds;
  try {
    const thoughts = await get(`thoughts/${encodeURIComponent(id)}`);
    history.rho = thoughts.rho ?? [];
    history.layers = thoughts.layers.map((layer) => layer.layer);
    if (thoughts.layers.length) {
      history.columns.push({ folds: thoughts.folds, norms: thoughts.layers.map((layer) => layer.norm) });
      if (history.columns.length > MAX_COLUMNS) history.columns = history.columns.filter((_, i) => i % 2);
    }
  } catch (error) {
    if (!(error instanceof HttpError)) throw error;
  }
}
