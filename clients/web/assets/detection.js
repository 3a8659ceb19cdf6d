// Find blood cells: boxes on the picture, a count for each kind.

import { make } from "./panel.js";
import { PicturePanel } from "./picture.js";

const NAMES = {
  RBC: ["red cell", "red cells"],
  WBC: ["white cell", "white cells"],
  Platelets: ["platelet", "platelets"],
};
const COLOURS = { RBC: "#d1495b", WBC: "#2f6fd0", Platelets: "#b57900" };
const OTHER = "#3b8f5a";

export class DetectionPanel extends PicturePanel {
  #waiting = 0;

  constructor() {
    super("detection", "cells.jpg");
    this.slider = document.getElementById("min-confidence");
    this.slider.addEventListener("input", () => {
      document.getElementById("min-confidence-words").textContent = `${Math.round(this.slider.value * 100)} %`;
      clearTimeout(this.#waiting);
      this.#waiting = setTimeout(() => this.file && this.ask(this.question(this.file)), 120);
    });
  }

  question(file) {
    const query = `?min_confidence=${this.slider.value}`;
    return {
      path: `detection${query}`,
      headers: { "Content-Type": file.type },
      body: file,
      recipe: { model: "detection", file: file.name, type: file.type, query, minConfidence: this.slider.value },
      show: ([found]) => {
        this.found = found;
        this.paint();
        this.#count(found.objects);
      },
    };
  }

  paint() {
    const sheet = super.paint();
    if (!sheet || !this.found) return sheet;
    const { pen } = sheet;
    // The service counts in pixels of what was sent, which may have been made smaller here.
    const scale = this.view.width / this.found.width;
    const line = Math.max(2, this.view.width / 360);
    pen.lineWidth = line;
    pen.font = `600 ${Math.max(12, this.view.width / 52)}px "Instrument Sans", sans-serif`;
    pen.textBaseline = "top";
    const high = Math.max(12, this.view.width / 52) * 1.3;
    for (const { label, confidence, box } of [...this.found.objects].reverse()) {
      const [left, top, right, bottom] = box.map((edge) => edge * scale);
      pen.strokeStyle = pen.fillStyle = COLOURS[label] ?? OTHER;
      pen.beginPath();
      pen.roundRect(left, top, right - left, bottom - top, line * 2);
      pen.stroke();
      const words = `${label} ${Math.round(confidence * 100)}`;
      const wide = pen.measureText(words).width + high * 0.6;
      const above = top - high >= 0 ? top - high : top;
      pen.beginPath();
      pen.roundRect(left, above, wide, high, line);
      pen.fill();
      pen.fillStyle = "#fff";
      pen.fillText(words, left + high * 0.3, above + high * 0.14);
    }
    return sheet;
  }

  #count(objects) {
    const counts = new Map(Object.keys(NAMES).map((label) => [label, 0]));
    for (const { label } of objects) counts.set(label, (counts.get(label) ?? 0) + 1);
    const items = [...counts].map(([label, count]) => {
      const name = NAMES[label]?.[count === 1 ? 0 : 1] ?? label;
      const item = make("li", "", "", make("b", "", String(count)), make("span", "", name));
      item.style.setProperty("--kind", COLOURS[label] ?? OTHER);
      return item;
    });
    document.getElementById("counts").replaceChildren(...items);
    this.say(String(objects.length), objects.length === 1 ? "object found" : "objects found");
  }
}
