// The openai client for Node against the server: node client.mjs URL. Prints what it got as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 2 });
const asked = { model: "scripted/model", messages: [{ role: "user", content: "What is 2 + 2?" }] };
const out = {};

const body = await client.chat.completions.create(asked);
out.body = body.choices[0].message;
out.total = body.usage.total_tokens;
out.id = body._request_id;

const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
});
out.content = "";
out.reasoning = "";
for await (const chunk of stream) {
  out.content += chunk.choices[0]?.delta.content ?? "";
  out.reasoning += chunk.choices[0]?.delta.reasoning_content ?? "";
  out.streamed = chunk.usage?.total_tokens;
}

const helper = client.chat.completions.stream(asked);
out.helped = (await helper.finalMessage()).content;

try {
  await client.chat.completions.create({ ...asked, temperature: 1.5 });
} catch (error) {
  out.error = [error.constructor.name, error.status, error.param];
}

const cut = await client.chat.completions.create({
  ...asked,
  messages: [{ role: "user", content: "break" }],
  stream: true,
});
try {
  for await (const _ of cut);
} catch (error) {
  out.cut = error.message;
}

const left = await client.chat.completions.create({
  ...asked,
  messages: [{ role: "user", content: "wait" }],
  stream: true,
});
for await (const _ of left) break; // leaving the loop closes the stream

out.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(out));
