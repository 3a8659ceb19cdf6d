// Draw a digit: ten bars move as you draw.

import { make, Panel, percent } from "./panel.js";

const SIDE = 280; // units of the drawing, and pixels of what is sent
const PEN = 22;
const STEP = 10; // what one press of an arrow moves the pen

export class DigitPanel extends Panel {
  #strokes = [];
  #isDown = false;
  #cursor = null; // the pen of who draws by keyboard

  constructor() {
    super("digit");
    this.pad = document.getElementById("pad");
    this.bars = Array.from({ length: 10 }, (_, digit) => {
      const value = make("span", "value", "");
      const column = make("li", "", "", make("i"), make("span", "name", String(digit)), value);
      document.getElementById("digit-bars").append(column);
      return { column, value };
    });
    this.#listen();
    new ResizeObserver(() => this.#paint()).observe(this.pad);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
  }

  /** Reads a picture that was not drawn here: an invented digit. */
  readPicture(image) {
    this.clear();
    this.picture = image;
    this.#paint();
    this.#send();
    this.element.scrollIntoView({ block: "nearest" });
  }

  clear() {
    this.#strokes = [];
    this.picture = null;
    this.#isDown = false;
    this.forget();
    this.#show({});
    this.say("?", "nothing drawn yet");
    this.#paint();
    document.getElementById("pad-save").removeAttribute("href");
  }

  #listen() {
    const pad = this.pad;
    pad.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      pad.focus({ preventScroll: true });
      pad.setPointerCapture(event.pointerId);
      this.#cursor = null;
      this.picture = null;
      this.#isDown = true;
      this.#strokes.push([this.#place(event)]);
      this.#changed();
    });
    pad.addEventListener("pointermove", (event) => {
      if (!this.#isDown || this.#cursor) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.#strokes.at(-1).push(this.#place(one));
      this.#changed();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      pad.addEventListener(end, () => {
        if (this.#isDown && !this.#cursor) this.#isDown = false;
      });
    }
    pad.addEventListener("keydown", (event) => this.#key(event));
    pad.addEventListener("blur", () => {
      this.#cursor = null;
      this.#isDown = false;
      this.#paint();
    });
    document.getElementById("pad-clear").addEventListener("click", () => this.clear());
    document.getElementById("pad-undo").addEventListener("click", () => {
      this.#strokes.pop();
      if (this.#strokes.length) this.#changed();
      else this.clear();
    });
  }

  #key(event) {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (x !== undefined) {
      this.#cursor ??= [SIDE / 2, SIDE / 4];
      const keep = (value) => Math.min(SIDE - PEN, Math.max(PEN, value));
      this.#cursor = [keep(this.#cursor[0] + x * STEP), keep(this.#cursor[1] + y * STEP)];
      if (this.#isDown) {
        this.#strokes.at(-1).push(this.#cursor);
        this.#changed();
      } else {
        this.#paint();
      }
    } else if (event.key === " ") {
      this.#cursor ??= [SIDE / 2, SIDE / 4];
      this.#isDown = !this.#isDown;
      if (this.#isDown) {
        this.picture = null;
        this.#strokes.push([this.#cursor]);
        this.#changed();
      }
      this.#paint();
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
  }

  #place(event) {
    const box = this.pad.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
  }

  #changed() {
    this.#paint();
    this.#send();
  }

  /** Draws on what a person sees, in the colours of the page. */
  #paint() {
    const { pad } = this;
    const pixels = Math.round(pad.clientWidth * devicePixelRatio) || SIDE;
    if (pad.width !== pixels) pad.width = pad.height = pixels;
    const pen = pad.getContext("2d");
    pen.setTransform(pixels / SIDE, 0, 0, pixels / SIDE, 0, 0);
    pen.clearRect(0, 0, SIDE, SIDE);
    const style = getComputedStyle(pad);
    if (this.picture) {
      pen.save();
      // White ink on black, as the generator draws: turned into ink on paper by day.
      if (!matchMedia("(prefers-color-scheme: dark)").matches) pen.filter = "invert(1)";
      pen.drawImage(this.picture, 0, 0, SIDE, SIDE);
      pen.restore();
    }
    strokes(pen, this.#strokes, style.color);
    if (this.#cursor) {
      pen.beginPath();
      pen.arc(...this.#cursor, PEN / 2 + 4, 0, 2 * Math.PI);
      pen.lineWidth = 2;
      pen.strokeStyle = style.getPropertyValue("--voice") || style.color;
      pen.setLineDash(this.#isDown ? [] : [4, 4]);
      pen.stroke();
      pen.setLineDash([]);
    }
    document.getElementById("pad-hint").hidden = this.#strokes.length > 0 || Boolean(this.picture);
  }

  #send() {
    this.ask({
      path: "digit",
      headers: { "Content-Type": "image/png" },
      // Made when its turn comes, from what is drawn by then.
      body: () => this.#sheet(),
      recipe: { model: "digit", file: "drawing.png", type: "image/png" },
      show: ([reading]) => {
        this.#show(reading.probabilities, reading.label);
        this.say(reading.label, `${percent(reading.confidence)} sure`);
      },
    });
  }

  /** The drawing as a PNG file, black on white. */
  async #sheet() {
    const sheet = new OffscreenCanvas(SIDE, SIDE);
    const pen = sheet.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, SIDE, SIDE);
    if (this.picture) {
      pen.filter = "invert(1)";
      pen.drawImage(this.picture, 0, 0, SIDE, SIDE);
      pen.filter = "none";
    }
    strokes(pen, this.#strokes, "#000");
    const body = await sheet.convertToBlob({ type: "image/png" });
    if (this.#strokes.length || this.picture) this.#offer(body);
    return body;
  }

  /** The drawing as a file, so that the request can be repeated elsewhere. */
  #offer(body) {
    const link = document.getElementById("pad-save");
    if (link.href) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(body);
  }

  #show(probabilities, label) {
    for (const [digit, { column, value }] of this.bars.entries()) {
      const share = probabilities[digit] ?? 0;
      column.style.setProperty("--share", share);
      column.toggleAttribute("data-best", String(digit) === label);
      value.textContent = label === undefined ? "" : percent(share);
    }
  }
}

function strokes(pen, lines, colour) {
  pen.lineWidth = PEN;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = pen.fillStyle = colour;
  for (const line of lines) {
    pen.beginPath();
    if (line.length === 1) {
      pen.arc(...line[0], PEN / 2, 0, 2 * Math.PI);
      pen.fill();
      continue;
    }
    pen.moveTo(...line[0]);
    // Through the middles of the steps, so that a quick hand leaves no corners.
    for (let index = 1; index < line.length - 1; index += 1) {
      const [x, y] = line[index];
      const [nextX, nextY] = line[index + 1];
      pen.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
    }
    pen.lineTo(...line.at(-1));
    pen.stroke();
  }
}
