// Read a mood: a face and a scale that follow the words.

import { Panel, percent } from "./panel.js";

const PAUSE_MS = 180; // between the last key and the question

export class SentimentPanel extends Panel {
  #waiting = 0;

  constructor() {
    super("sentiment");
    this.text = document.getElementById("text");
    this.text.addEventListener("input", () => {
      clearTimeout(this.#waiting);
      this.#waiting = setTimeout(() => this.#read(), PAUSE_MS);
    });
    for (const sample of document.querySelectorAll("#text-samples button")) {
      sample.addEventListener("click", () => {
        this.text.value = sample.textContent;
        this.#read();
      });
    }
    this.#feel(0.5);
  }

  #read() {
    const text = this.text.value.trim();
    if (!text) {
      this.forget();
      this.#feel(0.5);
      this.say("…", "waiting for words");
      return;
    }
    const json = { texts: [text] };
    this.ask({
      path: "sentiment",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(json),
      recipe: { model: "sentiment", json },
      show: ([mood]) => {
        this.#feel(mood.probabilities.positive ?? 0.5);
        this.say(mood.label, `${percent(mood.confidence)} sure`);
      },
    });
  }

  /** Shows how positive it sounds, 0 to 1. */
  #feel(positive) {
    document.getElementById("mood-mark").style.setProperty("--share", positive);
    document.getElementById("face").style.setProperty("--share", positive);
    const bend = (positive - 0.5) * 44; // how far the middle of the mouth hangs down
    const corner = 78 - bend * 0.35;
    document.getElementById("mouth").setAttribute("d", `M36 ${corner} Q60 ${corner + bend} 84 ${corner}`);
  }
}
