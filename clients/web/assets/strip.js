// The live strip: the service's own numbers, and its requests as notes on five lines.

import { isAway, read } from "./service.js";

const EVERY_MS = 1000;
const SECONDS_SHOWN = 60;
const SECONDS_COUNTED = 10; // the figures speak of so long

export class Strip {
  #samples = []; // of /metrics, the newest last
  #notes = []; // {moment, line, count}
  #frame = 0;

  constructor(models) {
    this.models = models;
    this.canvas = document.getElementById("staff");
    this.isStill = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.#paint()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
    document.fonts.ready.then(() => this.#paint());
    void this.#listen();
  }

  async #listen() {
    for (;;) {
      if (!document.hidden && !isAway()) {
        try {
          this.#take(parse(await read("metrics")));
        } catch {
          this.#samples = []; // a service that comes back counts from nought
          this.#tell();
        }
      }
      await new Promise((done) => setTimeout(done, EVERY_MS));
    }
  }

  #take(metrics) {
    const now = { moment: performance.now(), ...totals(metrics) };
    const previous = this.#samples.at(-1);
    if (previous && now.requests < previous.requests) this.#samples = [];
    else if (previous) {
      for (const [line, model] of this.models.entries()) {
        const count = (now.byModel.get(model) ?? 0) - (previous.byModel.get(model) ?? 0);
        if (count > 0) this.#notes.push({ moment: now.moment, line, count });
      }
    }
    this.#samples.push(now);
    while (this.#samples.length > 2 && now.moment - this.#samples[0].moment > SECONDS_COUNTED * 1000) {
      this.#samples.shift();
    }
    this.#notes = this.#notes.filter((note) => now.moment - note.moment < SECONDS_SHOWN * 1000);
    this.#tell();
    this.#animate();
  }

  /** Writes the figures of the last seconds. */
  #tell() {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    const seconds = first && last ? (last.moment - first.moment) / 1000 : 0;
    const requests = seconds ? last.requests - first.requests : 0;
    show("rate", seconds ? tidy(requests / seconds) : "–");
    const slowest = requests ? quantile(first.buckets, last.buckets, 0.95) : null;
    show("p95", slowest === null ? "–" : `${tidy(slowest * 1000)} ms`);
    const batches = seconds ? last.batches - first.batches : 0;
    show("batch", batches ? tidy((last.batched - first.batched) / batches) : "–");
  }

  #animate() {
    if (this.isStill.matches) {
      this.#paint();
      return;
    }
    if (this.#frame) return;
    const step = () => {
      this.#paint();
      this.#frame = this.#notes.length && !document.hidden ? requestAnimationFrame(step) : 0;
    };
    this.#frame = requestAnimationFrame(step);
  }

  #paint() {
    const { canvas } = this;
    const scale = devicePixelRatio;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(wide * scale)) canvas.width = Math.round(wide * scale);
    if (canvas.height !== Math.round(high * scale)) canvas.height = Math.round(high * scale);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, wide, high);
    const style = getComputedStyle(canvas);
    const gap = high / (this.models.length + 1);
    pen.font = `500 11px "Instrument Sans", sans-serif`;
    pen.textBaseline = "middle";
    const start = Math.max(...this.models.map((model) => pen.measureText(model).width)) + 12;
    for (const [line, model] of this.models.entries()) {
      const y = Math.round(gap * (line + 1)) + 0.5;
      pen.fillStyle = style.getPropertyValue(`--${model}`);
      pen.fillText(model, 0, y);
      pen.strokeStyle = style.getPropertyValue("--line");
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(start, y);
      pen.lineTo(wide, y);
      pen.stroke();
    }
    const now = performance.now();
    for (const { moment, line, count } of this.#notes) {
      const age = (now - moment) / 1000 / SECONDS_SHOWN;
      const x = wide - 8 - age * (wide - start - 8);
      if (x < start) continue;
      const size = Math.min(gap * 0.62, 2.6 + Math.log2(1 + count) * 1.15);
      pen.globalAlpha = 1 - age ** 3;
      pen.fillStyle = style.getPropertyValue(`--${this.models[line]}`);
      pen.beginPath();
      pen.ellipse(x, gap * (line + 1) + 0.5, size * 1.2, size, -0.35, 0, 2 * Math.PI);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }
}

function show(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}

const tidy = (value) => (value === 0 ? "0" : value >= 100 ? String(Math.round(value)) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

/** Prometheus' text format, as far as it is needed: name, labels, value of every line. */
export function parse(text) {
  const lines = [];
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(/(\w+)="([^"]*)"/g)].map((one) => [one[1], one[2]]));
    lines.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return lines;
}

function totals(lines) {
  const byModel = new Map();
  const buckets = new Map();
  let [requests, batches, batched] = [0, 0, 0];
  for (const { name, labels, value } of lines) {
    if (name === "quintet_requests_total") {
      requests += value;
      byModel.set(labels.model, (byModel.get(labels.model) ?? 0) + value);
    } else if (name === "quintet_request_seconds_bucket") {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      buckets.set(bound, (buckets.get(bound) ?? 0) + value);
    } else if (name === "quintet_batch_size_count") batches += value;
    else if (name === "quintet_batch_size_sum") batched += value;
  }
  return { requests, byModel, buckets, batches, batched };
}

/** The seconds that a share of the requests between two samples stayed under; straight lines within a bucket. */
export function quantile(before, after, share) {
  const bounds = [...after.keys()].sort((one, other) => one - other);
  const counts = bounds.map((bound) => after.get(bound) - (before.get(bound) ?? 0));
  const rank = share * (counts.at(-1) ?? 0);
  if (!rank) return null;
  const place = counts.findIndex((count) => count >= rank);
  const [low, high] = [place ? bounds[place - 1] : 0, bounds[place]];
  if (high === Infinity) return low;
  const below = place ? counts[place - 1] : 0;
  return low + ((high - low) * (rank - below)) / (counts[place] - below);
}
