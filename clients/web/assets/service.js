// Asks the service that sent this page, and notices when it goes and comes back.

const PATIENCE_MS = 15_000;
const root = new URL("../", import.meta.url); // the page's own address, behind whatever prefix

let key = "";
let state = "asking"; // asking, ready, busy, gone, locked
const listeners = new Set();

/** What went wrong, as a sentence for people. `kind`: gone, locked, busy, absent, refused or late. */
export class Trouble extends Error {
  constructor(kind, sentence) {
    super(sentence);
    this.kind = kind;
  }
}

/** Calls `listener(state, words)` at every change of how the service is. */
export function onHealth(listener) {
  listeners.add(listener);
}

export function useKey(text) {
  key = text.trim();
  state = "asking";
  void wake();
}

export const address = (path) => new URL(path, root).href;

export const isAway = () => state === "gone";

export const needsKey = () => key !== "";

/** One question; `sent` is what `fetch` takes as headers and body. */
export async function ask(path, sent) {
  const started = performance.now();
  const response = await reach(path, { method: "POST", ...sent });
  const milliseconds = performance.now() - started;
  return {
    answer: await response.json(),
    milliseconds,
    batch: Number(response.headers.get("Quintet-Batch-Size")) || null,
    compute: duration(response.headers.get("Server-Timing"), "compute"),
    queue: duration(response.headers.get("Server-Timing"), "queue"),
  };
}

/** A page of the service as text: the metrics. */
export async function read(path) {
  return (await reach(path, { method: "GET" })).text();
}

/** Which models are loaded, or null where the service does not say. */
export async function loadedModels() {
  try {
    const response = await reach("v2/repository/index", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: "{}",
    });
    const models = await response.json();
    return new Set(models.filter((one) => one.state === "READY").map((one) => one.name));
  } catch (trouble) {
    if (trouble.kind === "refused" || trouble.kind === "absent") return null;
    throw trouble;
  }
}

async function reach(path, options) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(address(path), {
      cache: "no-store",
      ...options,
      headers,
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
  } catch (error) {
    if (error.name === "TimeoutError") {
      throw new Trouble("late", "The service took longer than 15 seconds; try again, or try something smaller.");
    }
    lose();
    throw new Trouble("gone", "The service does not answer.");
  }
  // One answer does not make a service ready, the metrics least of all: `wake` asks it itself.
  if (response.ok) return response;
  const sentence = await problem(response);
  switch (response.status) {
    case 401:
      become("locked");
      throw new Trouble("locked", sentence);
    case 404:
      throw new Trouble("absent", sentence);
    case 429:
      throw new Trouble("busy", "The service has more work than it can take just now; try again in a moment.");
    case 503:
      // The service as a whole, or only the model that was asked?
      if (await isReady()) throw new Trouble("absent", sentence);
      lose();
      throw new Trouble("gone", sentence);
    default:
      throw new Trouble("refused", sentence);
  }
}

async function problem(response) {
  try {
    const body = await response.json();
    return body.detail ?? body.error ?? `The service answered with status ${response.status}.`;
  } catch {
    return `The service answered with status ${response.status}.`;
  }
}

function duration(header, name) {
  const found = new RegExp(`(?:^|,)\\s*${name};dur=([0-9.]+)`).exec(header ?? "");
  return found ? Number(found[1]) : null;
}

function become(next) {
  if (next === state) return;
  const previous = state;
  state = next;
  for (const listener of listeners) listener(next, previous);
}

let knocking = null;

function lose() {
  become("gone");
  knocking ??= knock();
}

/** Asks again and again, ever less often, until the service takes requests. */
async function knock() {
  let pause = 700;
  while (state === "gone") {
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(pause * 1.3, 4000);
    await wake();
  }
  knocking = null;
}

/** Looks once whether the service takes requests. */
export async function wake() {
  if (!(await isReady())) lose();
  else if (state !== "locked") become("ready");
}

async function isReady() {
  try {
    const response = await fetch(address("readyz"), { cache: "no-store", signal: AbortSignal.timeout(3000) });
    return response.ok;
  } catch {
    return false;
  }
}
