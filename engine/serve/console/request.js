// From the form to a request body: what the page sends and what the snippets show are made here, once.

// Written also where they have their default: whoever copies a request wants to see what there is to turn.
const ALWAYS = ["model", "temperature", "top_p", "max_tokens", "stream"];
const KWARGS = "chat_template_kwargs";

/** The body for the form's state. Effort and budget stand as the model's own chat_template_kwargs. */
export function bodyOf(spec, form, conversation) {
  const body = { model: form.value("model"), messages: conversation.messages() };
  const skipped = new Set(["model", "reasoning_effort", "reasoning_budget"]);
  // Two names of one field: the other one may not stand beside it with its default.
  if (form.changed("max_completion_tokens") && !form.changed("max_tokens")) skipped.add("max_tokens");
  for (const path of form.paths()) {
    if (skipped.has(path) || path.startsWith(`${KWARGS}.`)) continue;
    if (ALWAYS.includes(path) || form.changed(path)) put(body, path, form.value(path));
  }
  body[KWARGS] = kwargsOf(spec, form);
  if (body.model === undefined) delete body.model;
  return body;
}

function put(body, path, value) {
  if (value === undefined) return;
  const [name, inner] = path.split(".");
  if (inner === undefined) body[name] = value;
  else body[name] = { ...body[name], [inner]: value };
}

function kwargsOf(spec, form) {
  const given = {};
  for (const path of form.paths()) {
    const value = path.startsWith(`${KWARGS}.`) ? form.value(path) : undefined;
    if (value !== undefined) given[path.slice(KWARGS.length + 1)] = value;
  }
  const merged = mergeKwargs(spec.templateArguments[form.value("reasoning_effort")], given);
  const budget = form.value("reasoning_budget");
  if (merged.enable_thinking !== false && budget !== undefined) merged.reasoning_budget ??= budget;
  return merged;
}

/** An effort's arguments and those given beside it, which win (template_options of the tokenizer does the same). */
export function mergeKwargs(effort, given) {
  const merged = { ...effort, ...given };
  if (merged.enable_thinking) return merged;
  if (given.low_effort && !("enable_thinking" in given)) merged.enable_thinking = true;
  else if (!("low_effort" in given)) delete merged.low_effort;
  return merged;
}

/** The budget that holds for a body: a number, -1 for no limit, null where nothing is reasoned. */
export function budgetOf(body) {
  const { enable_thinking: thinking, reasoning_budget: budget } = body[KWARGS];
  return thinking === false ? null : (budget ?? null);
}

/** The control that an error's `param` speaks of; undefined if there is none. */
export function controlOf(param, form, conversation) {
  const [name] = (param ?? "").split("[");
  if (name === "messages") return conversation.control(Number(param.match(/\[(\d+)\]/)?.[1] ?? 0));
  const budget = `${KWARGS}.reasoning_budget`;
  const path = name === budget && form.value(budget) === undefined ? "reasoning_budget" : name;
  return form.showError(path) ?? undefined;
}
