// Name a picture: ten bars, the likeliest first.

import { make, percent } from "./panel.js";
import { PicturePanel } from "./picture.js";

const SHOWN = 5;

export class ImagePanel extends PicturePanel {
  constructor() {
    super("image", "cat.jpg");
    this.bars = document.getElementById("image-bars");
  }

  question(file) {
    return {
      path: "image",
      headers: { "Content-Type": file.type },
      body: file,
      recipe: { model: "image", file: file.name, type: file.type },
      show: ([named]) => {
        const ranked = Object.entries(named.probabilities).sort((one, other) => other[1] - one[1]);
        this.bars.replaceChildren(...ranked.slice(0, SHOWN).map(([label, share]) => this.#bar(label, share)));
        this.say(named.label, `${percent(named.confidence)} sure`);
      },
    };
  }

  #bar(label, share) {
    const bar = make("li", "", "", make("span", "name", label), make("i"), make("span", "value", percent(share)));
    bar.style.setProperty("--share", share);
    return bar;
  }
}
