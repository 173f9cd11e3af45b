// JSON with whole numbers of any size: a seed goes up to 2^64-1, a JavaScript number is exact up to 2^53.
// Such a number is a BigInt on this side; it never passes through a float.

const TAG = "#integer";
const TOKEN = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
const NUMBER = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;
const INTEGER = /^-?\d+$/;

/** The value of a JSON text. */
export function parse(text) {
  const tagged = text.replace(TOKEN, (token) => {
    const large = INTEGER.test(token) && !Number.isSafeInteger(Number(token));
    return large ? `{"${TAG}":"${token}"}` : token;
  });
  return JSON.parse(tagged, (_, value) => (value?.[TAG] === undefined ? value : BigInt(value[TAG])));
}

/** What somebody typed as a number: a number, a BigInt, or the text itself, for the server to refuse by name. */
export function typedNumber(text) {
  if (!NUMBER.test(text)) return text;
  const value = Number(text);
  if (INTEGER.test(text) && !Number.isSafeInteger(value)) return BigInt(text);
  return Number.isFinite(value) ? value : text;
}

const IDENTIFIER = /^[A-Za-z_$][\w$]*$/;
const LANGUAGES = {
  json: { step: 2, words: { true: "true", false: "false", null: "null" }, key: JSON.stringify },
  python: { step: 4, words: { true: "True", false: "False", null: "None" }, key: JSON.stringify },
  javascript: {
    step: 2,
    words: { true: "true", false: "false", null: "null" },
    key: (name) => (IDENTIFIER.test(name) ? name : JSON.stringify(name)),
  },
};
const WIDTH = 76;

/**
 * A value as a literal of "json", "python" or "javascript" (a JSON string is a string of all three).
 * Short arrays and objects take one line; `indent` is the column of the line on which the literal begins.
 */
export function write(value, language = "json", indent = 0) {
  const { step, words, key } = LANGUAGES[language];
  if (typeof value === "string") return JSON.stringify(value);
  if (value === null || typeof value === "boolean") return words[String(value)];
  if (typeof value !== "object") return String(value);
  const list = Array.isArray(value);
  const [open, close] = list ? "[]" : "{}";
  const entries = list ? value.map((item) => ["", item]) : Object.entries(value).map(([k, v]) => [`${key(k)}: `, v]);
  if (!entries.length) return open + close;
  const inner = list || language !== "javascript" ? "" : " ";
  const flat = open + inner + entries.map(([name, item]) => name + write(item, language)).join(", ") + inner + close;
  if (flat.length + indent <= WIDTH && !flat.includes("\n")) return flat;
  const pad = " ".repeat(indent + step);
  const comma = language === "json" ? "" : ",";
  const lines = entries.map(([name, item]) => pad + name + write(item, language, indent + step));
  return `${open}\n${lines.join(",\n")}${comma}\n${" ".repeat(indent)}${close}`;
}

/** A value as JSON on one line, for the wire. */
export function compact(value) {
  if (Array.isArray(value)) return `[${value.map(compact).join(",")}]`;
  if (value === null || typeof value !== "object") return write(value);
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}:${compact(item)}`).join(",")}}`;
}
