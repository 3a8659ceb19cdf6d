// Puts the page together.

import { DetectionPanel } from "./detection.js";
import { DigitPanel } from "./digit.js";
import { GeneratorPanel } from "./generator.js";
import { ImagePanel } from "./image.js";
import { SentimentPanel } from "./sentiment.js";
import { loadedModels, onHealth, useKey, wake } from "./service.js";
import { Strip } from "./strip.js";

const digit = new DigitPanel();
const generator = new GeneratorPanel((image) => digit.readPicture(image));
const panels = [digit, new ImagePanel(), new SentimentPanel(), generator, new DetectionPanel()];

const notice = document.getElementById("notice");
const words = document.getElementById("notice-words");
const keyForm = document.getElementById("key-form");
const WORDS = { asking: "asking", ready: "ready", gone: "away", locked: "locked" };

let wasReady = false;

onHealth((state, previous) => {
  document.getElementById("health").dataset.state = state;
  document.getElementById("health-words").textContent = WORDS[state];
  keyForm.hidden = state !== "locked";
  if (state === "gone") {
    tell("The service has stopped answering. Nothing is lost: this page asks again by itself, and carries on when it is back.");
  } else if (state === "locked") {
    tell("This service wants a key. It stays in this tab, and goes nowhere else.");
    document.getElementById("key").focus();
  } else if (state === "ready") {
    void settle();
    if (previous === "gone" && wasReady) {
      tell("The service is back.");
      setTimeout(() => words.textContent === "The service is back." && (notice.hidden = true), 4000);
      for (const panel of panels) panel.repeat();
    } else {
      notice.hidden = true;
      if (previous === "locked") for (const panel of panels) panel.repeat();
    }
    wasReady = true;
  }
});

function tell(sentence) {
  notice.hidden = false;
  words.textContent = sentence;
}

/** Marks the panels whose model is not loaded, and lets the generator show what it can. */
async function settle() {
  try {
    const loaded = await loadedModels();
    for (const panel of panels) panel.isLoaded = loaded === null || loaded.has(panel.model);
    if ((loaded === null || loaded.has("generator")) && !generator.grid.children.length) generator.draw();
  } catch {
    // The service went again, and `onHealth` tells when it is back.
  }
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(document.getElementById("key").value);
});

// A picture that misses its panel must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

new Strip(panels.map((panel) => panel.model));
void wake();
