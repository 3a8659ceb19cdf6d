// Panels that take a picture: dropped, chosen, pasted, photographed, or one of ours.

import { make, Panel } from "./panel.js";

const SERVED = new Set(["image/png", "image/jpeg", "image/webp", "image/bmp"]);
const MOST_PIXELS = 24_000_000; // the service takes 25 megapixels
const MOST_BYTES = 12 * 1024 * 1024; // and 16 MiB
const SMALLER = 2048; // the longer side of what is made smaller here

export class PicturePanel extends Panel {
  constructor(model, sample) {
    super(model);
    this.view = this.find("[data-view]");
    this.sample = sample;
    this.#listen();
  }

  /** A file to ask about. Panels say in `question(file)` what is asked, and in `paint()` what is seen. */
  async take(file) {
    try {
      const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
      this.picture?.close();
      this.picture = picture;
      this.file = await fit(file, picture);
    } catch {
      this.say("!", `${file.name || "This file"} is not a picture that this browser can open.`);
      this.element.setAttribute("data-trouble", "refused");
      return;
    }
    this.found = null;
    this.view.hidden = false;
    this.find("[data-hint]").hidden = true;
    this.paint();
    this.ask(this.question(this.file));
  }

  /** The picture on the canvas, as wide as there is room, never more than twice its size. */
  paint() {
    if (!this.picture) return null;
    const { width, height } = this.picture;
    const scale = Math.min(1.6, 1280 / width, 960 / height);
    this.view.width = Math.round(width * scale);
    this.view.height = Math.round(height * scale);
    const pen = this.view.getContext("2d");
    pen.imageSmoothingEnabled = width > 96; // a thumbnail shows its pixels
    pen.drawImage(this.picture, 0, 0, this.view.width, this.view.height);
    return { pen, scale: this.view.width / width };
  }

  #listen() {
    const drop = this.find("[data-drop]");
    const buttons = this.find("[data-buttons]");
    buttons.append(this.#chooser("Choose a picture", false));
    if (matchMedia("(pointer: coarse)").matches) buttons.append(this.#chooser("Take a photo", true));
    const ours = make("button", "", "Try ours");
    ours.type = "button";
    ours.addEventListener("click", async () => {
      const response = await fetch(new URL(`samples/${this.sample}`, import.meta.url));
      await this.take(new File([await response.blob()], this.sample, { type: "image/jpeg" }));
    });
    buttons.append(ours);
    for (const kind of ["dragenter", "dragover"]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.toggleAttribute("data-over", true);
      });
    }
    for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.removeAttribute("data-over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (file) void this.take(file);
    });
    drop.addEventListener("click", () => this.find("input[type=file]").click());
    this.element.addEventListener("paste", (event) => {
      const [file] = event.clipboardData.files;
      if (file) void this.take(file);
    });
  }

  #chooser(words, isCamera) {
    const input = make("input", "visually-hidden");
    input.type = "file";
    input.accept = "image/*";
    if (isCamera) input.setAttribute("capture", "environment");
    input.addEventListener("change", () => {
      if (input.files[0]) void this.take(input.files[0]);
      input.value = "";
    });
    return make("label", "button", words, input);
  }
}

/** The file as it is, or made to fit what the service takes. */
async function fit(file, picture) {
  const { width, height } = picture;
  if (SERVED.has(file.type) && width * height <= MOST_PIXELS && file.size <= MOST_BYTES) return file;
  const scale = Math.min(1, SMALLER / Math.max(width, height));
  const sheet = new OffscreenCanvas(Math.round(width * scale), Math.round(height * scale));
  sheet.getContext("2d").drawImage(picture, 0, 0, sheet.width, sheet.height);
  const body = await sheet.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return new File([body], file.name.replace(/\.\w+$/, "") + ".jpg", { type: "image/jpeg" });
}
