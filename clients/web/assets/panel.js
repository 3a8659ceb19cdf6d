// What every panel does alike: one question at a time, the newest wins; words for what came of it.

import { ask, Trouble } from "./service.js";
import { curl, python } from "./recipes.js";

/** A share of one for people: 0.998 is "99.8 %". */
export const percent = (share) => `${(share * 100).toFixed(share > 0.9995 ? 0 : 1)} %`;

/** An element with a class, a text and children. */
export function make(tag, className = "", text = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

export class Panel {
  #answer = null;
  #busy = false;
  #next = null;
  #last = null;
  #tab = "curl";

  constructor(model) {
    this.model = model;
    this.element = document.querySelector(`[data-model="${model}"]`);
    this.verdict = this.find("[data-verdict]");
    this.element.append(document.getElementById("recipe").content.cloneNode(true));
    this.#prepareTabs();
    this.#showRecipe();
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /**
   * Asks about `question`, unless a newer one comes while an older is under way.
   * `question`: {path, headers, body, recipe, show}; `show(predictions)` tells what came of it.
   */
  ask(question) {
    this.#next = question;
    this.#last = question;
    if (!this.#busy) void this.#work();
  }

  /** Forgets what was asked: an answer that is still to come is about nothing any more. */
  forget() {
    this.#next = null;
    this.#last = null;
    this.#answer = null;
    this.find("[data-meta]").textContent = "";
    this.element.removeAttribute("data-trouble");
  }

  /** Asks the last question once more, after the service was away. */
  repeat() {
    if (this.#last) this.ask(this.#last);
  }

  say(short, long) {
    const [head, tail] = this.verdict.children;
    if (head.textContent !== short) head.textContent = short;
    if (tail.textContent !== long) tail.textContent = long;
  }

  set isLoaded(loaded) {
    this.element.toggleAttribute("data-absent", !loaded);
    this.find(".stage").inert = !loaded;
    const note = this.find(".absent");
    if (loaded) note?.remove();
    else if (!note) this.find("header").append(document.getElementById("absent").content.cloneNode(true));
  }

  async #work() {
    this.#busy = true;
    this.element.setAttribute("aria-busy", "true");
    while (this.#next) {
      const question = this.#next;
      this.#next = null;
      this.recipe = question.recipe;
      this.#showRecipe();
      try {
        const body = question.body instanceof Function ? await question.body() : question.body;
        const told = await ask(question.path, { headers: question.headers, body });
        if (this.#last === null) continue; // cleared meanwhile
        this.#answer = told.answer;
        this.element.removeAttribute("data-trouble");
        question.show(told.answer.predictions);
        this.#showMeta(told);
        this.#showRecipe();
      } catch (error) {
        this.#fail(error);
      }
    }
    this.#busy = false;
    this.element.removeAttribute("aria-busy");
  }

  #fail(error) {
    if (!(error instanceof Trouble)) throw error;
    if (error.kind === "absent") {
      this.isLoaded = false;
      return;
    }
    this.element.setAttribute("data-trouble", error.kind);
    this.say("!", error.kind === "gone" ? "waiting for the service to come back" : error.message);
  }

  #showMeta({ answer, milliseconds, batch, compute }) {
    const parts = [`${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms there and back`];
    if (compute !== null) parts.push(`${compute < 10 ? compute.toFixed(1) : Math.round(compute)} ms in the network`);
    if (batch !== null) parts.push(batch === 1 ? "rode alone" : `rode in a batch of ${batch}`);
    parts.push(`${answer.model} ${answer.version}`);
    this.find("[data-meta]").textContent = parts.join("  ·  ");
  }

  // ---- the request, to copy ----

  #prepareTabs() {
    const tabs = [...this.element.querySelectorAll("[data-tab]")];
    const code = this.find("pre");
    code.id = `${this.model}-code`;
    for (const [place, tab] of tabs.entries()) {
      tab.id = `${this.model}-${tab.dataset.tab}`;
      tab.setAttribute("aria-controls", code.id);
      tab.addEventListener("click", () => this.#choose(tabs, place));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) this.#choose(tabs, (place + step + tabs.length) % tabs.length);
      });
    }
    code.setAttribute("aria-labelledby", tabs[0].id);
    const copy = this.find("[data-copy]");
    copy.addEventListener("click", async () => {
      const worked = await copyText(this.find("[data-code]"));
      copy.textContent = worked ? "Copied" : "Press Ctrl+C";
      setTimeout(() => (copy.textContent = "Copy"), 1600);
    });
  }

  #choose(tabs, place) {
    for (const [index, tab] of tabs.entries()) {
      tab.setAttribute("aria-selected", String(index === place));
      tab.tabIndex = index === place ? 0 : -1;
    }
    tabs[place].focus();
    this.#tab = tabs[place].dataset.tab;
    this.find("pre").setAttribute("aria-labelledby", tabs[place].id);
    this.#showRecipe();
  }

  #showRecipe() {
    const code = this.find("[data-code]");
    if (!this.recipe) code.textContent = "Ask something first.";
    else if (this.#tab === "curl") code.textContent = curl(this.recipe);
    else if (this.#tab === "python") code.textContent = python(this.recipe);
    else code.textContent = this.#answer ? short(this.#answer) : "No answer yet.";
  }
}

/** An answer as JSON, without the bulk of pictures. */
function short(answer) {
  const cut = (name, value) => (name === "image" && value.length > 48 ? `${value.slice(0, 48)}…` : value);
  return JSON.stringify(answer, cut, 2);
}

async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    // Without TLS, browsers keep the clipboard closed: the text is selected, for a person to copy.
    getSelection().selectAllChildren(element);
    return false;
  }
}
