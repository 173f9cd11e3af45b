// The form's state as code that runs as it stands: curl, Python (openai), JavaScript (fetch), and the engine itself.

import { address } from "./api.js";
import { write } from "./json.js";

const KEY = "HEADRACE_API_KEY"; // the key itself is never written into code
const EMBEDDED = "headrace-tiny";

// What openai's create() has an argument for; the rest goes into extra_body.
const OPENAI = new Set([
  "model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop", "n", "logprobs",
  "top_logprobs", "stream", "stream_options",
]);
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed", "stop", "n", "logprobs", "top_logprobs", "ignore_eos"];

/** Languages by id: a title, how to run it, and `make(body, wantsKey)`, which gives the code. */
export const LANGUAGES = {
  curl: { title: "curl", note: "bash or zsh", make: curl },
  python: { title: "Python", note: "pip install openai", make: python },
  javascript: { title: "JavaScript", note: "Node 18 or newer, as a .mjs file, without packages", make: javascript },
  engine: { title: "Engine", note: "pip install headrace, in your own process, without a server", make: engine },
};

function curl(body, wantsKey) {
  const key = wantsKey ? `  -H "Authorization: Bearer $${KEY}" \\\n` : "";
  return `curl --no-buffer ${address("v1/chat/completions")} \\
  -H "Content-Type: application/json" \\
${key}  --data-binary @- <<'JSON'
${write(body)}
JSON`;
}

function assignments(fields, indent) {
  return Object.entries(fields)
    .map(([name, value]) => `${" ".repeat(indent)}${name}=${write(value, "python", indent)},\n`)
    .join("");
}

function python(body, wantsKey) {
  const entries = Object.entries(body);
  const known = Object.fromEntries(entries.filter(([name]) => OPENAI.has(name)));
  const extra = Object.fromEntries(entries.filter(([name]) => !OPENAI.has(name)));
  const key = wantsKey ? `os.environ["${KEY}"]` : '"none"';
  const call = `client.chat.completions.create(\n${assignments({ ...known, extra_body: extra }, 4)})`;
  const head = `${wantsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${address("v1")}", api_key=${key})
`;
  if (!body.stream) {
    return `${head}completion = ${call}
for choice in completion.choices:
    print(getattr(choice.message, "reasoning_content", None) or "")
    print(choice.message.content or "")`;
  }
  return `${head}stream = ${call}
for chunk in stream:
    for choice in chunk.choices:
        reasoning = getattr(choice.delta, "reasoning_content", None)
        print(reasoning or choice.delta.content or "", end="", flush=True)
print()`;
}

function javascript(body, wantsKey) {
  const key = wantsKey ? `\n    Authorization: \`Bearer \${process.env.${KEY}}\`,` : "";
  // A number beyond 2^53 would be rounded by JSON.stringify: it is put in as text.
  const large = typeof body.seed === "bigint";
  const { seed, ...rest } = body;
  const text = `JSON.stringify(${write(large ? rest : body, "javascript", 2)})`;
  const exact = large ? `.replace(/}$/, ',"seed":${seed}}'), // beyond 2^53: written as text` : ",";
  const head = `const response = await fetch("${address("v1/chat/completions")}", {
  method: "POST",
  headers: {
    "Content-Type": "application/json",${key}
  },
  body: ${text}${exact}
});
if (!response.ok) throw new Error(await response.text());
`;
  if (!body.stream) {
    return `${head}for (const { message } of (await response.json()).choices) {
  console.log(message.reasoning_content ?? "");
  console.log(message.content ?? "");
}`;
  }
  return `${head}let rest = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + text).split("\\n\\n");
  rest = events.pop();
  for (const event of events) {
    const data = event.slice("data: ".length);
    if (data === "[DONE]") continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    for (const { delta } of chunk.choices) {
      process.stdout.write(delta.reasoning_content ?? delta.content ?? "");
    }
  }
}
console.log();`;
}

function engine(body) {
  const given = { ...body, max_tokens: body.max_tokens ?? body.max_completion_tokens };
  const params = Object.fromEntries(SAMPLING.map((name) => [name, given[name]]).filter(([, v]) => v !== undefined));
  const model = body.model === EMBEDDED ? "" : `"path/to/checkpoint"`;
  const head = `from headrace.engine import ChatOptions, ${body.stream ? "Delta, " : ""}Engine, SamplingParams

messages = ${write(body.messages, "python")}
params = SamplingParams(
${assignments(params, 4)})
options = ChatOptions(
${assignments({ chat_template_kwargs: body.chat_template_kwargs }, 4)})

with Engine(${model}) as engine:
`;
  if (!body.stream) {
    return `${head}    completion = engine.chat(messages, params, options)
    for choice in completion.choices:
        print(choice.reasoning_content or "")
        print(choice.content or "")`;
  }
  return `${head}    for event in engine.chat_stream(messages, params, options):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
    print()`;
}
