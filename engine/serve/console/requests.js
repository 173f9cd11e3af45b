// The table of recent requests: those of the key in use, newest first, a page at a time. Never their text.

import { get } from "./api.js";
import { byId, element } from "./dom.js";

const PAGE = 20;

/** Reads GET /v1/requests into the panel "requests". */
export class RequestsView {
  #last = null;

  constructor() {
    this.rows = byId("requests-rows");
    this.note = byId("requests-note");
    byId("requests-refresh").addEventListener("click", () => this.load());
    byId("requests-older").addEventListener("click", () => this.load(this.#last));
  }

  /** The newest page, or the one behind the entry `after`. */
  async load(after = null) {
    try {
      const page = await get(`v1/requests?limit=${PAGE}${after ? `&after=${encodeURIComponent(after)}` : ""}`);
      if (!after) this.rows.replaceChildren();
      this.rows.append(...page.data.map(rowOf));
      this.#last = page.last_id ?? this.#last;
      byId("requests-older").hidden = !page.has_more;
      byId("requests-table").hidden = !this.rows.children.length;
      this.note.textContent = this.rows.children.length ? "" : "None yet. Run a request, and it appears here.";
    } catch (error) {
      this.note.textContent = `The list cannot be read: ${error.message}`;
    }
  }
}

function rowOf(entry) {
  const when = new Date(entry.created * 1000);
  const time = element("time", { datetime: when.toISOString(), title: when.toLocaleString() }, clock(when));
  const good = entry.status < 400 && !entry.error;
  const status = element("span", { class: good ? "pill good" : "pill bad" }, `${entry.status}`);
  const kind = entry.stream === null ? "" : entry.stream ? "stream" : "json";
  return element(
    "tr",
    {},
    element("td", {}, time),
    element("td", {}, status, entry.error ? element("small", {}, entry.error) : null),
    element("td", {}, entry.path.replace(/^\/v1\//, ""), kind ? element("small", {}, kind) : null),
    element("td", { class: "agent", title: entry.user_agent }, shortAgent(entry.user_agent) || "–"),
    element("td", { class: "number" }, `${entry.prompt_tokens}`),
    element("td", { class: "number" }, `${entry.completion_tokens}`),
    element("td", { class: "number" }, `${entry.reasoning_tokens}`),
    element("td", { class: "number" }, seconds(entry.time_to_first_token_seconds)),
    element("td", { class: "number" }, seconds(entry.latency_seconds)),
  );
}

function clock(when) {
  const today = when.toDateString() === new Date().toDateString();
  const time = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  return today ? time : `${when.toLocaleDateString([], { month: "short", day: "numeric" })} ${time}`;
}

/** A browser's user agent begins with what every browser says; what tells them apart stands behind it. */
function shortAgent(agent) {
  const browser = agent.match(/(Firefox|Edg|HeadlessChrome|Chrome|Version)\/[\d.]+/);
  return agent.startsWith("Mozilla/") && browser ? browser[0].replace("Version/", "Safari ") : agent;
}

function seconds(value) {
  return value === null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}
