// One request while it is answered: fetch, server-sent events, counting, and the stop.

import { ApiError, call } from "./api.js";
import { compact, parse } from "./json.js";

const BRIEF_MS = 100;

/** The data of each server-sent event of a response, as text; `onText` sees everything as it came. */
export async function* eventsOf(response, onText = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onText(value);
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

/** A request being answered. `phase`: waiting, thinking, answering; then done, stopped or failed. */
export class Run {
  phase = "waiting";
  choices = []; // {reasoning, content, reasoningTokens, tokens, finish} by index
  usage = null;
  error = null;
  raw = [];
  rawType = "";
  #abort = new AbortController();
  #firstTokens = 0;

  /** `body` as bodyOf makes it; `budget` as budgetOf tells it. */
  constructor(body, budget) {
    this.body = body;
    this.budget = budget;
  }

  /** End it; what has come stays. */
  stop() {
    this.#abort.abort();
  }

  /** Ask, and call `onDelta(index, channel, text)` and `onChange()` as the answer comes. Never throws. */
  async start(onDelta, onChange) {
    this.started = performance.now();
    this.onDelta = onDelta;
    try {
      await this.#ask(onChange);
      this.phase = "done";
    } catch (error) {
      this.phase = this.#abort.signal.aborted ? "stopped" : "failed";
      if (this.phase === "failed") this.error = error instanceof ApiError ? error : unreachable(error);
    }
    this.ended = performance.now();
    onChange();
  }

  async #ask(onChange) {
    // The page counts tokens as they come, so it asks for their ids and for the usage beside what the form says.
    const extra = this.body.stream === false ? {} : { stream_options: { include_usage: true }, return_token_ids: true };
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: compact({ ...this.body, ...extra }),
      signal: this.#abort.signal,
    });
    this.rawType = response.headers.get("content-type").split(";")[0];
    if (this.rawType === "application/json") return this.#whole(await response.text());
    let ended = false;
    for await (const data of eventsOf(response, (text) => this.raw.push(text))) {
      if (data === "[DONE]") ended = true;
      else this.#chunk(parse(data));
      onChange();
    }
    if (!ended) throw new ApiError(0, { message: "the stream broke off before its end" });
  }

  #whole(text) {
    this.raw.push(text);
    const answer = parse(text);
    this.last = performance.now();
    for (const { index, message, finish_reason: finish } of answer.choices) {
      this.#add(index, "reasoning", message.reasoning_content ?? "", 0);
      this.#add(index, "content", message.content ?? "", 0);
      this.#choice(index).finish = finish;
    }
    this.#finish(answer.usage);
  }

  #chunk(chunk) {
    if (chunk.error) throw new ApiError(200, chunk.error);
    this.last = performance.now();
    for (const { index, delta, finish_reason: finish, token_ids: ids } of chunk.choices) {
      const choice = this.#choice(index);
      const channel = delta.content ? "content" : delta.reasoning_content ? "reasoning" : choice.channel;
      this.#add(index, channel, delta.content || delta.reasoning_content || "", ids?.length ?? 0);
      if (finish) choice.finish = finish;
    }
    if (this.first === undefined) {
      this.first = this.last;
      this.#firstTokens = this.tokens;
    }
    if (chunk.usage) this.#finish(chunk.usage);
  }

  #choice(index) {
    const thinks = this.budget !== null;
    this.choices[index] ??= {
      index,
      channel: thinks ? "reasoning" : "content",
      reasoning: "",
      content: "",
      reasoningTokens: 0,
      tokens: 0,
      finish: null,
    };
    return this.choices[index];
  }

  #add(index, channel, text, tokens) {
    const choice = this.#choice(index);
    choice.channel = channel;
    choice.tokens += tokens;
    if (channel === "reasoning") choice.reasoningTokens += tokens;
    choice[channel] += text;
    this.phase = channel === "reasoning" ? "thinking" : "answering";
    if (text) this.onDelta(choice, channel, text);
  }

  #finish(usage) {
    this.usage = usage;
    // The ids counted on the way include the mark that ends the reasoning; the server's count does not.
    if (this.choices.length === 1) this.choices[0].reasoningTokens = usage.completion_tokens_details.reasoning_tokens;
  }

  /** Tokens so far, of all choices. */
  get tokens() {
    return this.usage?.completion_tokens ?? this.choices.reduce((sum, choice) => sum + choice.tokens, 0);
  }

  /** Whether it all came at once: then the time between first and last chunk says nothing of the server. */
  get brief() {
    return !(this.last - this.first >= BRIEF_MS);
  }

  /** Tokens a second: from the first chunk to the last, or, where those came at once, of the whole request. */
  get speed() {
    const [tokens, from] = this.brief ? [this.tokens, this.started] : [this.tokens - this.#firstTokens, this.first];
    return this.last > from ? (1000 * tokens) / (this.last - from) : null;
  }
}

function unreachable(error) {
  return new ApiError(0, { message: `the server cannot be reached, or broke off: ${error.message}` });
}
