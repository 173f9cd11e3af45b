// The messages: an optional system message, turns that alternate, and an optional context in front of the last one.

import { element } from "./dom.js";

/** The editor of a conversation. Its order is always one that the server takes: user first, user last. */
export class Conversation {
  #root;
  #system;
  #context;
  #turns = []; // user, assistant, user, ...; the last is the user's
  #serial = 0;

  /** `example`: the first user message; `roles`: those the schema knows. */
  constructor(root, example, roles) {
    this.#root = root;
    const optional = (role, hint) => (roles.includes(role) ? this.#row(role, "", hint) : null);
    this.#system = optional("system", "Optional instructions");
    this.#context = optional("context", "Optional material for the next message");
    this.#turns = [this.#row("user", example, "Your message")];
    this.#arrange();
  }

  /** The messages as the request has them; optional ones that are empty are left out. */
  messages() {
    return this.#rows()
      .filter((row) => row.text.value !== "" || !(row === this.#system || row === this.#context))
      .map((row) => {
        const message = { role: row.role, content: row.text.value };
        if (row.reasoning?.value) message.reasoning_content = row.reasoning.value;
        return message;
      });
  }

  /** The control of message number `index` as the server counts them. */
  control(index) {
    const shown = this.#rows().filter((row) => row.text.value !== "" || this.#turns.includes(row));
    return shown[index]?.text;
  }

  /** One more exchange: what the assistant said, and room for the next message, which gets the focus. */
  append(content = "", reasoning = "") {
    const answer = this.#row("assistant", content, "What the assistant said", reasoning);
    this.#turns.push(answer, this.#row("user", "", "Your message"));
    this.#arrange();
    (content || reasoning ? this.#turns.at(-1) : answer).text.focus();
  }

  #rows() {
    const rows = [this.#system, ...this.#turns.slice(0, -1), this.#context, this.#turns.at(-1)];
    return rows.filter((row) => row !== null);
  }

  /** Without one exchange: a message and its answer, or the last message and the answer before it. */
  #remove(row) {
    const at = this.#turns.indexOf(row);
    this.#turns.splice(at === this.#turns.length - 1 ? at - 1 : at, 2);
    this.#arrange();
    this.#turns.at(-1).text.focus();
    this.#root.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #arrange() {
    this.#root.replaceChildren(...this.#rows().map((row) => row.box));
    for (const row of this.#turns) if (row.remove) row.remove.hidden = this.#turns.length === 1;
  }

  #row(role, content, placeholder, reasoning = null) {
    const id = `message-${++this.#serial}`;
    const text = element("textarea", { id, rows: content.length > 60 ? 3 : 1, placeholder });
    text.value = content;
    const row = { role, text };
    const cell = element("div", { class: "cell" }, text);
    if (role === "assistant") {
      const name = "Reasoning of this turn";
      row.reasoning = element("textarea", { rows: 3, "aria-label": name, placeholder: "Optional reasoning_content" });
      row.reasoning.value = reasoning;
      cell.append(element("details", { class: "turn-reasoning" }, element("summary", {}, "reasoning"), row.reasoning));
    }
    if (role === "user") {
      const remove = () => this.#remove(row);
      const title = "Remove this message and its answer";
      row.remove = element("button", { type: "button", class: "quiet", onclick: remove, title }, "Remove");
    }
    const label = element("div", { class: "who" }, element("label", { for: id }, role), row.remove);
    row.box = element("li", { class: `turn ${role}` }, label, cell);
    return row;
  }
}
