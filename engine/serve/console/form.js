// The parameter form, made from the schema: names, defaults, ranges and descriptions are the server's.

import { element } from "./dom.js";
import { compact, parse, typedNumber, write } from "./json.js";
import { rangeOf } from "./schema.js";

// Only the order on the page is decided here; a parameter that no group names comes under the last one.
const GROUPS = [
  { title: "Reasoning", open: true, paths: ["reasoning_effort", "reasoning_budget"] },
  { title: "Sampling", open: true, paths: ["temperature", "top_p", "max_tokens", "seed", "stop"] },
  { title: "Answer", paths: ["stream", "n", "logprobs", "top_logprobs", "stream_options.include_usage"] },
  { title: "chat_template_kwargs", prefix: "chat_template_kwargs." },
  { title: "More", prefix: "" },
];
const NOT_SET = "not set";

/** The controls of all parameters. Emits "input" events from inside `root`, as any form does. */
export class ParameterForm {
  #fields = new Map(); // path -> {field, control, box}

  constructor(root, fields, refused) {
    root.replaceChildren();
    let left = fields;
    for (const group of GROUPS) {
      const inside = left.filter(({ path }) => group.paths?.includes(path) ?? path.startsWith(group.prefix));
      if (group.paths) inside.sort((a, b) => group.paths.indexOf(a.path) - group.paths.indexOf(b.path));
      left = left.filter((field) => !inside.includes(field));
      if (inside.length) root.append(this.#group(group, inside));
    }
    root.lastElementChild.append(refusedNote(refused));
    root.addEventListener("input", () => this.#mark());
    this.#mark();
  }

  /** The value of a parameter; undefined where the field is empty, which means absent. */
  value(path) {
    const entry = this.#fields.get(path);
    return entry && valueOf(entry.field, entry.control);
  }

  /** Whether a parameter has another value than the schema's default. */
  changed(path) {
    const value = this.value(path);
    return value !== undefined && compact(value) !== compact(this.#fields.get(path).field.default);
  }

  /** Every path, in the schema's order. */
  paths() {
    return [...this.#fields.keys()];
  }

  /** The control of a parameter, undefined if there is none of that name. */
  control(path) {
    return this.#fields.get(path)?.control;
  }

  /** Every parameter back to the schema's default. */
  reset() {
    for (const { field, control } of this.#fields.values()) setDefault(field, control);
    this.clearErrors();
    this.#mark();
  }

  /** Show which parameter the server refused; null if it is none of these. */
  showError(path) {
    const entry = this.#fields.get(path);
    if (!entry) return null;
    entry.control.setAttribute("aria-invalid", "true");
    entry.box.closest("details").open = true;
    return entry.control;
  }

  /** Nothing is refused any more. */
  clearErrors() {
    for (const { control } of this.#fields.values()) control.removeAttribute("aria-invalid");
  }

  #group({ title, open }, fields) {
    const changes = element("span", { class: "changes" });
    const grid = element("div", { class: "grid" }, ...fields.map((field) => this.#box(field)));
    return element("details", { class: "group", open }, element("summary", {}, title, changes), grid);
  }

  #box(field) {
    const id = `parameter-${field.path}`;
    const control = controlOf(field, id);
    const label = element("label", { for: id }, shortName(field.path));
    const hint = element("p", { class: "hint", id: `${id}-hint` }, hintOf(field));
    const slider = sliderOf(field, control);
    const input = slider ? element("div", { class: "pair" }, slider, control) : control;
    const parts = control.type === "checkbox" ? [element("div", { class: "check" }, control, label)] : [label, input];
    const box = element("div", { class: "field", "data-path": field.path }, ...parts, hint);
    this.#fields.set(field.path, { field, control, box });
    return box;
  }

  #mark() {
    for (const [path, { field, control, box }] of this.#fields) {
      box.classList.toggle("changed", this.changed(path));
      box.classList.toggle("outside", isOutside(field, valueOf(field, control)));
    }
    for (const group of new Set([...this.#fields.values()].map(({ box }) => box.closest("details")))) {
      const count = group.querySelectorAll(".field.changed").length;
      group.querySelector(".changes").textContent = count ? `${count} changed` : "";
    }
  }
}

function refusedNote(names) {
  const list = element("code", {}, names.join(", "));
  return element("p", { class: "hint refused" }, "Known and refused until they are implemented: ", list);
}

function shortName(path) {
  return path.startsWith("chat_template_kwargs.") ? path.split(".")[1] : path;
}

function hintOf(field) {
  const facts = [rangeOf(field), field.default === null ? "" : `default ${write(field.default)}`].filter(Boolean);
  const spread = facts.join(", ");
  const text = spread && spread[0].toUpperCase() + spread.slice(1) + ".";
  const lines = field.kind === "lines" ? 'One a line; a line in double quotes is JSON, as "\\n\\n".' : "";
  return [field.description, text, lines].filter(Boolean).join(" ");
}

function controlOf(field, id) {
  const common = { id, name: field.path, "aria-describedby": `${id}-hint`, autocomplete: "off", spellcheck: "false" };
  let control;
  if (field.kind === "boolean" && field.default !== null) {
    control = element("input", { ...common, type: "checkbox" });
  } else if (field.kind === "boolean" || field.kind === "choice") {
    const options = field.kind === "boolean" ? [true, false] : field.options;
    const unset = field.default === null ? [element("option", { value: "" }, NOT_SET)] : [];
    const named = options.map((value) => element("option", { value: `${value}` }, `${value}`));
    control = element("select", common, ...unset, ...named);
  } else if (field.kind === "lines" || field.kind === "json") {
    control = element("textarea", { ...common, rows: 1, placeholder: field.kind === "json" ? "JSON" : "none" });
  } else {
    const mode = { integer: "numeric", number: "decimal" }[field.kind];
    control = element("input", { ...common, type: "text", inputmode: mode, placeholder: NOT_SET });
  }
  setDefault(field, control);
  return control;
}

/** A slider beside the number, where the range is short enough to aim at. */
function sliderOf(field, control) {
  if (field.kind !== "number" || field.minimum === undefined || field.maximum === undefined) return null;
  const { minimum: min, maximum: max, path } = field;
  const slider = element("input", { type: "range", min, max, step: 0.01, "aria-label": `${path}, slider` });
  slider.value = control.value;
  slider.addEventListener("input", () => (control.value = String(Number(slider.value))));
  control.addEventListener("input", () => (slider.value = control.value || String(field.default)));
  control.addEventListener("reset-default", () => (slider.value = control.value));
  return slider;
}

function setDefault(field, control) {
  const shown = field.default === null ? "" : typeof field.default === "string" ? field.default : write(field.default);
  if (control.type === "checkbox") control.checked = field.default;
  else control.value = shown;
  control.dispatchEvent(new Event("reset-default"));
}

function valueOf({ kind, options }, control) {
  if (control.type === "checkbox") return control.checked;
  const text = control.value;
  if (text === "") return undefined;
  if (kind === "boolean") return text === "true";
  if (kind === "choice") return options.find((option) => String(option) === text);
  if (kind === "integer" || kind === "number") return text.trim() === "" ? undefined : typedNumber(text.trim());
  if (kind === "lines") return text.split("\n").filter((line) => line !== "").map(lineOf);
  return kind === "json" ? (parsed(text) ?? text) : text;
}

function lineOf(line) {
  const value = line.startsWith('"') ? parsed(line) : undefined;
  return typeof value === "string" ? value : line;
}

function parsed(text) {
  try {
    return parse(text);
  } catch {
    return undefined; // not JSON: it goes to the server as it is, which says what it should have been
  }
}

function isOutside({ minimum, maximum, kind }, value) {
  if (value === undefined || (kind !== "integer" && kind !== "number")) return false;
  const number = typeof value === "number" || typeof value === "bigint";
  return !number || value < minimum || value > maximum; // a bound that is not there compares as false
}
