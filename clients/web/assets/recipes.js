// The requests as one would write them oneself: as a line for the shell, and in Python.

import { address, needsKey } from "./service.js";

const service = () => address("").replace(/\/$/, "");
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const literal = (text) => JSON.stringify(text);

/** `recipe`: {model, file, type, query} for a picture, {model, json} for anything else. */
export function curl(recipe) {
  const parts = ["curl -s"];
  if (needsKey()) parts.push("-H 'Authorization: Bearer YOUR-KEY'");
  if (recipe.json) {
    parts.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(recipe.json))}`);
  } else {
    parts.push(`-H 'Content-Type: ${recipe.type}'`, `--data-binary @${quoted(recipe.file)}`);
  }
  parts.push(quoted(`${service()}/${recipe.model}${recipe.query ?? ""}`));
  return parts.join(" \\\n  ");
}

export function python(recipe) {
  const key = needsKey() ? ', key="YOUR-KEY"' : "";
  return [
    "from quintet_client import Client",
    "",
    `with Client(${literal(service())}${key}) as quintet:`,
    ...lines(recipe).map((line) => `    ${line}`),
  ].join("\n");
}

function lines({ model, file, json, minConfidence }) {
  switch (model) {
    case "sentiment":
      return [`print(quintet.sentiment(${literal(json.texts[0])}))`];
    case "generator":
      return [
        `for drawn in quintet.generator([${json.digits.join(", ")}], seed=${json.seed}):`,
        '    drawn.save(f"{drawn.digit}.png")',
      ];
    case "detection":
      return [
        `found = quintet.detection(${literal(file)}, min_confidence=${minConfidence})`,
        "print(found)",
        'found.save("boxes.png")',
      ];
    default:
      return [`print(quintet.${model}(${literal(file)}))`];
  }
}
