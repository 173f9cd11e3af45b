// Asking the server. The key lives in this variable and nowhere else: not in storage, which browsers write to disk and
// bring back with a restored tab. Reloading or closing the tab forgets it.

import { byId } from "./dom.js";
import { parse } from "./json.js";

let key = "";
let asking = null;

/** A refusal or failure in the server's words. `param` is the field at fault, if one is. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

/** Whether there is a key. */
export const hasKey = () => key !== "";

/** The address of a path of this server, also behind a proxy that put a folder in front. */
export const address = (path) => new URL(path, document.baseURI).href;

/** A response that is not an error. Where the server wants a key it is asked for; ApiError for everything refused. */
export async function call(path, options = {}) {
  for (;;) {
    const response = await fetch(address(path), { ...options, headers: { ...options.headers, ...authorization() } });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || !(await askForKey(error.message))) throw error;
  }
}

/** The JSON that a GET gives. */
export async function get(path) {
  return parse(await (await call(path)).text());
}

function authorization() {
  // A header is bytes: the server reads a key as UTF-8, fetch takes one character for each byte.
  const bytes = String.fromCharCode(...new TextEncoder().encode(key));
  return key ? { Authorization: `Bearer ${bytes}` } : {};
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, parse(text).error);
  } catch {
    return new ApiError(response.status, { message: text.trim() || response.statusText || "no answer" });
  }
}

/** Ask for the key, once for all who wait for it. `reason` is shown. Whether one was given. */
export function askForKey(reason) {
  asking ??= openDialog(reason).finally(() => (asking = null));
  return asking;
}

function openDialog(reason) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-reason").textContent = reason;
  input.value = key;
  dialog.returnValue = "";
  dialog.showModal();
  input.select();
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close("use");
  };
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" && input.value.trim() !== "";
        if (given) key = input.value.trim();
        input.value = "";
        byId("key-button").dataset.set = String(hasKey());
        resolve(given);
      },
      { once: true },
    );
  });
}
