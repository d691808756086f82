// preact, htm, and what all views share: a store, messages, small components.
import { cloneElement, h, render, Fragment } from "./vendor/preact.js";
import { useEffect, useId, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
export { Fragment, render, useEffect, useRef, useState };

/** A value that components share. `use()` renders again when it changes; changes are collected for a frame. */
export function createStore(value) {
  const listeners = new Set();
  let scheduled = false;
  const notify = () => {
    if (scheduled) return;
    scheduled = true;
    setTimeout(() => { scheduled = false; for (const listener of [...listeners]) listener(); }, 16);
  };
  return {
    get: () => value,
    set: (patch) => { value = { ...value, ...(typeof patch === "function" ? patch(value) : patch) }; notify(); },
    notify,
    use() {
      const [, update] = useState(0);
      useEffect(() => {
        const listener = () => update((count) => count + 1);
        listeners.add(listener);
        listener(); // a change between rendering and this effect
        return () => listeners.delete(listener);
      }, []);
      return value;
    },
  };
}

// Messages: errors stay until they are closed, others leave by themselves. All are read out.
export const messages = createStore({ list: [], progress: "" });
let messageCount = 0;

export function tell(text, kind = "info") {
  const id = ++messageCount;
  messages.set(({ list }) => ({ list: [...list.filter((each) => each.text !== text), { id, text, kind }].slice(-4) }));
  if (kind === "info") setTimeout(() => dismiss(id), 5000);
}

export const tellError = (error) => error?.name === "AbortError" || tell(error?.message || String(error), "error");
export const dismiss = (id) => messages.set(({ list }) => ({ list: list.filter((each) => each.id !== id) }));
/** A polite announcement to screen readers. */
export const announce = (text) => text === messages.get().progress || messages.set({ progress: text });

export function Messages() {
  const { list, progress } = messages.use();
  return html`
    <div class="messages" role="log" aria-label="Messages">
      ${list.map((each) => html`
        <div key=${each.id} class="message ${each.kind}" role=${each.kind === "error" ? "alert" : "status"}>
          <span>${each.text}</span>
          <button class="quiet" aria-label="Close this message" onClick=${() => dismiss(each.id)}>×</button>
        </div>`)}
    </div>
    <div class="hidden-text" aria-live="polite">${progress}</div>`;
}

/** A labelled control. hint: shown below it. after: shown beside it */
export function Field({ label, hint, after, children }) {
  const id = useId(), [control] = [children].flat();
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      <span class="joined">${cloneElement(control, { id, "aria-describedby": hint ? `${id}-hint` : undefined })}${after}</span>
      ${hint && html`<small id=${`${id}-hint`}>${hint}</small>`}
    </div>`;
}

export function Select({ value, options, onChange, ...rest }) {
  return html`<select value=${value} onChange=${(event) => onChange(event.target.value)} ...${rest}>
    ${options.map((each) => {
      const [id, text] = Array.isArray(each) ? each : [each, each];
      return html`<option key=${id} value=${id} selected=${id === value}>${text}</option>`;
    })}
  </select>`;
}

/** A button that opens a list of actions: [text, function]. */
export function Menu({ text, actions }) {
  const details = useRef();
  const close = () => { details.current.open = false; };
  return html`
    <details class="menu" ref=${details}
      onKeyDown=${(event) => { if (event.key === "Escape") { close(); details.current.firstElementChild.focus(); event.stopPropagation(); } }}
      onFocusOut=${() => setTimeout(() => details.current && !details.current.contains(document.activeElement) && close(), 150)}>
      <summary>${text}</summary>
      <div>${actions.map(([name, action]) => html`
        <button key=${name} type="button" onClick=${() => { close(); action(); }}>${name}</button>`)}</div>
    </details>`;
}

/** A modal dialog; it is open while it is rendered. */
export function Dialog({ title, onClose, children, wide }) {
  const dialog = useRef();
  useEffect(() => { dialog.current.showModal(); }, []);
  return html`
    <dialog ref=${dialog} class=${wide ? "wide" : ""} aria-label=${title} onClose=${onClose}>
      <header><h2>${title}</h2><button class="quiet" type="button" aria-label="Close" onClick=${() => dialog.current.close()}>×</button></header>
      ${children}
    </dialog>`;
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed without https
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  tell(`${what} copied`);
}

export const number = (value, digits = 3) =>
  !Number.isFinite(value) ? "–" : Number(value) !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? Number(value).toExponential(digits - 1) : String(Number(Number(value).toPrecision(digits)));
