// The page put together: what the server describes becomes the form; the form becomes requests and code.

import { AnswerView } from "./answer.js";
import { address, askForKey, get, hasKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, copyText, element, makeTabs } from "./dom.js";
import { ParameterForm } from "./form.js";
import { parse } from "./json.js";
import { bodyOf, budgetOf, controlOf } from "./request.js";
import { RequestsView } from "./requests.js";
import { readSpec } from "./schema.js";
import { LANGUAGES } from "./snippets.js";
import { Run } from "./stream.js";

const AGAIN_MS = 1500; // how soon a server that is still loading is asked again
const NARROW = "(max-width: 959px)";

let spec, form, conversation, run;
let language = "curl";
const running = () => run !== undefined && !run.ended;

const requests = new RequestsView();
const showTab = makeTabs(byId("tabs"), (panel) => {
  if (panel === "requests") requests.load();
  if (panel === "formats") showExamples();
});
const answer = new AnswerView((choice) => {
  conversation.append(choice.content, choice.reasoning);
  showCode();
});

async function begin() {
  for (;;) {
    try {
      const response = await fetch(address("openapi.json"));
      spec = readSpec(parse(await response.text()));
      if (spec.model !== null) break;
      say("Loading the model", "waiting");
    } catch (error) {
      say(`The server cannot be reached: ${error.message}`, "bad");
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
  form = new ParameterForm(byId("parameters"), spec.fields, spec.refused);
  conversation = new Conversation(byId("turns"), spec.example, spec.roles);
  byId("key-button").hidden = !spec.wantsKey;
  byId("run").disabled = false;
  say(spec.model, "good");
  showCode();
  await showModel();
}

/** What only the holder of a key may know; so a key is asked for here, and checked at once. */
async function showModel() {
  if (spec.wantsKey && !hasKey() && !(await askForKey("This server wants an API key."))) return;
  try {
    const [card] = (await get("v1/models")).data;
    byId("context").textContent = `context ${card.max_model_len}`;
  } catch (error) {
    byId("context").textContent = error.status === 401 ? "" : error.message;
  }
}

function say(text, state) {
  byId("model").textContent = text;
  byId("light").dataset.state = state;
}

async function start() {
  if (running() || !form) return;
  const body = bodyOf(spec, form, conversation);
  form.clearErrors();
  run = new Run(body, budgetOf(body));
  byId("stop").disabled = false;
  byId("run").setAttribute("aria-disabled", "true");
  showTab("answer");
  if (matchMedia(NARROW).matches) byId("result").scrollIntoView();
  answer.begin(run);
  await run.start(
    (choice, channel, text) => answer.delta(choice, channel, text),
    () => answer.change(),
  );
  if (run.error) answer.showError(run.error, controlOf(run.error.param, form, conversation));
  if (document.activeElement === byId("stop")) byId("run").focus();
  byId("stop").disabled = true;
  byId("run").removeAttribute("aria-disabled");
  byId("last-answer").hidden = !run.raw.length;
  byId("last-type").textContent = run.rawType;
  byId("last-raw").textContent = run.raw.join("");
}

function showCode() {
  const { make, note } = LANGUAGES[language];
  byId("code-text").textContent = make(bodyOf(spec, form, conversation), spec.wantsKey);
  byId("code-note").textContent = note;
}

let shown = false;
async function showExamples() {
  if (shown) return;
  shown = true;
  for (const [id, file] of [["example-json", "example.json"], ["example-events", "example.sse"]]) {
    byId(id).textContent = await (await fetch(address(`console/${file}`))).text();
  }
}

function wire() {
  for (const [id, { title }] of Object.entries(LANGUAGES)) {
    const radio = { type: "radio", name: "language", value: id, id: `language-${id}`, checked: id === language };
    byId("languages").append(element("input", radio), element("label", { for: radio.id }, title));
  }
  byId("languages").addEventListener("change", (event) => {
    language = event.target.value;
    showCode();
  });
  byId("compose").addEventListener("input", () => form && showCode());
  byId("compose").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  byId("stop").addEventListener("click", () => run.stop());
  byId("reset").addEventListener("click", () => {
    form.reset();
    showCode();
  });
  byId("add-turn").addEventListener("click", () => {
    conversation.append();
    showCode();
  });
  byId("copy-code").addEventListener("click", ({ currentTarget: button }) => {
    copyText(byId("code-text").textContent, byId("code-text"), button);
  });
  byId("key-button").addEventListener("click", async () => {
    if (await askForKey("Another key for this tab.")) await showModel();
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  document.addEventListener("keydown", (event) => {
    if (byId("key-dialog").open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    } else if (event.key === "Escape" && running()) {
      event.preventDefault();
      run.stop();
    }
  });
}

wire();
begin();
