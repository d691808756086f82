// The server: requests with the API key, server-sent events, images.
import { createStore, useEffect, useState } from "./ui.js";

export class ApiError extends Error {
  constructor(status, message, { code, retryAfter } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, retryAfter });
  }
}

const storage = "tessera-key";
const stored = () => { try { return sessionStorage.getItem(storage); } catch { return null; } };
let key = stored();
/** `resolve` is set while the page waits for the person's key. */
export const keyDialog = createStore({ resolve: null, wrong: false, count: 0 });
let asking = null;

/** Ask for the key, once: all requests wait for the same answer. */
function askKey(wrong) {
  asking ||= new Promise((resolve) => keyDialog.set(({ count }) => ({ resolve, wrong, count: count + 1 }))).then((value) => {
    keyDialog.set({ resolve: null });
    if (!value) throw new ApiError(401, "This server needs an API key. Reload the page to enter one.");
    key = value;
    try { sessionStorage.setItem(storage, key); } catch { /* storage is blocked: kept in memory */ }
    asking = null;
  });
  return asking;
}

export const hasKey = () => Boolean(key);

async function send(path, { method = "GET", body, signal } = {}) {
  for (;;) {
    const used = key;
    const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer. Check that `tessera serve` still runs, then try again.");
    }
    if (response.ok) return response;
    const { error = {} } = await response.json().catch(() => ({}));
    if (response.status === 401) {
      if (used === key) await askKey(Boolean(used));
      continue;
    }
    const text = error.message ? error.message[0].toUpperCase() + error.message.slice(1) : response.statusText;
    const message = `${text}${/[.!?]$/.test(text) ? "" : "."}`;
    throw new ApiError(response.status, message, { code: error.code, retryAfter: Number(response.headers.get("retry-after")) || null });
  }
}

export const get = async (path, signal) => (await send(path, { signal })).json();
export const post = async (path, body = null, signal) => (await send(path, { method: "POST", body, signal })).json();
export const remove = async (path) => (await send(path, { method: "DELETE" })).json();
export const query = (values) => new URLSearchParams(Object.entries(values).flatMap(([name, value]) => [value].flat().map((each) => [name, each])));

/** Server-sent events as [name, data]. EventSource cannot send a key. */
export async function* events(path, signal, onOpen = () => {}) {
  const response = await send(path, { signal });
  onOpen();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const fields = Object.fromEntries(buffer.slice(0, end).split("\n").map((line) => line.split(/: ?(.*)/s).slice(0, 2)));
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

/** Follow events until the returned function is called, and connect again after an interruption. onState: connected,
 * ended, or failed with the error. */
export function follow(path, onEvent, onState = () => {}) {
  const control = new AbortController();
  (async () => {
    for (let wait = 1; !control.signal.aborted; wait = Math.min(2 * wait, 15)) {
      try {
        for await (const [name, data] of events(path, control.signal, () => onState("connected"))) { wait = 1; onEvent(name, data); }
        onState("ended");
      } catch (error) {
        if (control.signal.aborted) return;
        onState("failed", error);
        if (error.status === 404 || error.status === 401) return;
      }
      await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    }
  })();
  return () => control.abort();
}

export const dataUrl = (base64, format) => `data:image/${format};base64,${base64}`;

export async function fetchDataUrl(path) {
  const blob = await (await send(path)).blob();
  return new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: () => reject(reader.error) });
    reader.readAsDataURL(blob);
  });
}

/** The address for an <img>: with a key, which <img> cannot send, an object URL. */
export function useImage(path) {
  const direct = !path || !path.startsWith("/v1/") || !hasKey();
  const [url, setUrl] = useState(null);
  useEffect(() => {
    if (direct) return undefined;
    let current = null, active = true;
    send(path).then((response) => response.blob()).then((blob) => {
      if (active) setUrl(current = URL.createObjectURL(blob));
    }).catch(() => {});
    return () => { active = false; setUrl(null); if (current) URL.revokeObjectURL(current); };
  }, [path, direct]);
  return direct ? path : url;
}
