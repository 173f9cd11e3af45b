// The answer as it streams: reasoning folded apart, the budget it uses, the answer beneath, and what it cost.

import { byId, copyText, element } from "./dom.js";

const EVERY_MS = 80; // how often counters move; text is appended as it comes
const FINISH = {
  stop: "stop: the answer ended",
  length: "length: max_tokens or the context was used up",
};
const PHASES = {
  waiting: "Waiting for the first token",
  thinking: "Thinking",
  answering: "Answering",
  done: "Done",
  stopped: "Stopped",
  failed: "Failed",
};

/** Shows one run at a time in the panel with the id "answer". */
export class AnswerView {
  #run = null;
  #boxes = [];
  #timer = null;
  #said = "";

  /** `onContinue(choice)` is called where the reader takes an answer into the conversation. */
  constructor(onContinue) {
    this.onContinue = onContinue;
    this.root = byId("answer-body");
    this.facts = byId("answer-facts");
    this.status = byId("status");
  }

  /** A new run: forget the last one. */
  begin(run) {
    this.#run = run;
    this.#boxes = [];
    this.root.replaceChildren(element("p", { class: "waiting" }, PHASES.waiting, element("span", { class: "dots" })));
    byId("answer-error").hidden = true;
    this.#counters();
  }

  /** More text of one choice. */
  delta(choice, channel, text) {
    if (!this.#boxes[choice.index]) {
      this.#boxes[choice.index] = this.#open(choice);
      this.#counters();
    }
    const box = this.#boxes[choice.index];
    box[channel].appendData(text);
    if (channel === "reasoning") box.folded.hidden = false;
  }

  /** The counters, soon; at once when the run is over. */
  change() {
    if (this.#run.ended) {
      clearTimeout(this.#timer);
      this.#timer = null;
      this.#counters();
      this.#close();
    } else {
      this.#timer ??= setTimeout(() => {
        this.#timer = null;
        this.#counters();
      }, EVERY_MS);
    }
  }

  /** A failure in the server's words. `target`: the control it is about; it can be gone to. */
  showError(error, target) {
    const box = byId("answer-error");
    const go = target && quietButton(`Go to ${error.param}`, () => target.focus());
    const about = [error.status || "", target ? "" : error.param, error.code].filter(Boolean);
    const codes = about.map((part) => element("code", {}, `${part}`));
    box.replaceChildren(element("p", {}, error.message), element("p", { class: "about" }, ...codes, go));
    box.hidden = false;
  }

  #open(choice) {
    this.root.querySelector(".waiting")?.remove();
    const many = (this.#run.body.n ?? 1) > 1;
    const reasoning = document.createTextNode("");
    const content = document.createTextNode("");
    const count = element("span", { class: "count" });
    const bar = element("progress", { max: 1, value: 0, "aria-label": "Reasoning budget used" });
    const named = { tabindex: 0, role: "group", "aria-label": "Reasoning" };
    const thoughts = element("div", { class: "text", ...named }, reasoning);
    const details = element("details", {}, element("summary", {}, count), thoughts);
    const folded = element("div", { class: "reasoning", hidden: true }, details, bar);
    const text = element("div", { class: "text answer" }, content);
    const end = element("p", { class: "end" });
    const heading = many ? element("h3", {}, `Choice ${choice.index}`) : null;
    const article = element("article", { class: "choice" }, heading, folded, text, end);
    const after = this.#boxes.slice(choice.index + 1).find(Boolean);
    this.root.insertBefore(article, after?.article ?? null);
    return { article, folded, reasoning, content, count, bar, end, choice, text };
  }

  #counters() {
    const run = this.#run;
    for (const box of this.#boxes.filter(Boolean)) this.#budget(box, run);
    const seconds = (from, to) => (from === undefined || to === undefined ? null : (to - from) / 1000);
    const first = seconds(run.started, run.first);
    const total = seconds(run.started, run.ended ?? run.last);
    const finish = [...new Set(run.choices.map((choice) => choice.finish).filter(Boolean))].join(", ");
    const facts = {
      "first token": first === null ? "–" : `${first.toFixed(2)} s`,
      [run.brief ? "speed, overall" : "speed"]: run.speed ? `${rounded(run.speed)} tokens/s` : "–",
      tokens: tokensOf(run),
      finish: run.phase === "stopped" ? "stopped here" : finish || "–",
      total: total === null ? "–" : `${total.toFixed(2)} s`,
    };
    this.facts.hidden = run.phase === "failed" && run.first === undefined;
    const pair = ([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
    this.facts.replaceChildren(...Object.entries(facts).map(pair));
    this.#say(PHASES[run.phase]);
  }

  #budget({ choice, count, bar, folded }, run) {
    const thinking = choice.channel === "reasoning" && !run.ended && !choice.finish;
    const used = choice.reasoningTokens;
    const verb = thinking ? "Thinking" : "Thought";
    const limit = run.budget === null || run.budget === -1 ? "tokens, no limit" : `of ${run.budget} budget tokens`;
    // A JSON answer with several choices has one count for all of them.
    const known = used > 0 || run.usage === null || run.choices.length === 1;
    count.textContent = known ? `${verb}: ${used} ${limit}` : verb;
    bar.hidden = !(run.budget > 0);
    bar.value = run.budget > 0 ? Math.min(1, used / run.budget) : 0;
    folded.classList.toggle("live", thinking);
  }

  #close() {
    const run = this.#run;
    this.root.querySelector(".waiting")?.remove();
    for (const { choice, end, text } of this.#boxes.filter(Boolean)) {
      const copy = quietButton("Copy answer", () => copyText(choice.content, text, copy));
      const go = quietButton("Continue from here", () => this.onContinue(choice));
      const why = FINISH[choice.finish] ?? (run.phase === "stopped" ? "stopped by you" : "no end was sent");
      const nothing = "No answer: it ended inside the reasoning.";
      if (!choice.content) text.append(element("span", { class: "nothing" }, nothing));
      end.replaceChildren(element("span", { class: "why" }, why), choice.content ? copy : "", go);
    }
    if (!this.#boxes.length && run.phase !== "failed") {
      const why = run.phase === "stopped" ? "Stopped before the first token." : "The answer is empty.";
      this.root.replaceChildren(element("p", { class: "empty" }, why));
    }
  }

  /** The line that screen readers hear: phases, not tokens. */
  #say(text) {
    if (text !== this.#said) this.status.textContent = this.#said = text;
  }
}

function quietButton(title, onclick) {
  return element("button", { type: "button", class: "quiet", onclick }, title);
}

function rounded(number) {
  return number.toFixed(number < 10 ? 1 : 0);
}

function tokensOf({ usage, tokens, choices }) {
  if (!usage) return choices.length ? `${tokens}` : "–";
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return `${usage.prompt_tokens} prompt${cached ? ` (${cached} cached)` : ""} + ${usage.completion_tokens}`;
}
