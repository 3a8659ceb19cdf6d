// Invent digits: a grid of pictures that nobody wrote.

import { make, Panel } from "./panel.js";

const MOST = 60;

export class GeneratorPanel extends Panel {
  /** `onChosen(image)` gets the picture that a person picks. */
  constructor(onChosen) {
    super("generator");
    this.onChosen = onChosen;
    this.grid = document.getElementById("grid");
    this.digits = document.getElementById("digits");
    this.seed = document.getElementById("seed");
    document.getElementById("generator-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.draw();
    });
    document.getElementById("shuffle").addEventListener("click", () => {
      this.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
      this.draw();
    });
  }

  draw() {
    const digits = [...this.digits.value].filter((sign) => sign >= "0" && sign <= "9").map(Number).slice(0, MOST);
    if (!digits.length) {
      this.say("", "Name at least one digit, such as 314.");
      this.digits.focus();
      return;
    }
    const json = { digits, seed: Math.trunc(Number(this.seed.value)) || 0 };
    this.ask({
      path: "generator",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(json),
      recipe: { model: "generator", json },
      show: (drawn) => this.#show(drawn, json.seed),
    });
  }

  #show(drawn, seed) {
    const tiles = drawn.map(({ digit, image }, place) => {
      const picture = make("img");
      picture.src = `data:image/png;base64,${image}`;
      picture.alt = "";
      picture.width = picture.height = 84;
      const button = make("button", "tile", "", picture);
      button.type = "button";
      button.setAttribute("aria-label", `An invented ${digit}: have it read`);
      button.style.setProperty("--place", place);
      button.addEventListener("click", () => this.onChosen(picture));
      return make("li", "", "", button);
    });
    this.grid.replaceChildren(...tiles);
    const count = drawn.length === 1 ? "one picture" : `${drawn.length} pictures`;
    this.say("", `${count} from seed ${seed}`);
  }
}
