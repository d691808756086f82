// The page: views by the address (#generate, #gallery, #runs), theme, keys, shortcuts.
import { Dialog, Field, Messages, createStore, html, render, tellError, useEffect, useState } from "./ui.js";
import { keyDialog } from "./api.js";
import { Generate, cancelAll, generate } from "./generate.js";
import { Gallery } from "./gallery.js";
import { Runs } from "./runs.js";
import { choices, start } from "./models.js";

const VIEWS = { generate: ["Generate", Generate], gallery: ["Gallery", Gallery], runs: ["Runs", Runs] };
const SHORTCUTS = [
  ["Alt + 1, 2, 3", "Generate, Gallery, Runs"], ["Ctrl + Enter", "Generate the table"], ["Ctrl + Backspace", "Cancel all images"],
  ["Arrow keys", "Move in a table of images, or the brush in the mask"], ["Enter or Space", "Show the details of an image; paint in the mask"],
  ["Delete", "Cancel the image that has the focus"], ["Ctrl + Z, Ctrl + Shift + Z", "Undo and redo in the mask"], ["Escape", "Close a dialog or a menu"], ["?", "These shortcuts"],
];
const THEMES = { "": "System", light: "Light", dark: "Dark" };
const dialog = createStore({ shortcuts: false });

function KeyDialog() {
  const { resolve, wrong, count } = keyDialog.use(), [key, setKey] = useState("");
  if (!resolve) return null;
  return html`
    <${Dialog} key=${count} title="API key" onClose=${() => resolve(key)}>
      <form method="dialog">
        <p>${wrong ? "The server does not accept this key. Check it, and enter it again." : "This server needs a key. Whoever runs it has a file with a key for each client."}</p>
        <${Field} label="Key"><input type="password" autocomplete="off" required minlength="16" value=${key} onInput=${(event) => setKey(event.target.value)} /><//>
        <p class="note">It is kept until this tab is closed.</p>
        <button class="primary">Use this key</button>
      </form>
    <//>`;
}

function Shortcuts() {
  if (!dialog.use().shortcuts) return null;
  return html`
    <${Dialog} title="Keyboard shortcuts" onClose=${() => dialog.set({ shortcuts: false })}>
      <dl class="shortcuts">${SHORTCUTS.map(([keys, text]) => html`<div key=${keys}><dt><kbd>${keys}</kbd></dt><dd>${text}</dd></div>`)}</dl>
    <//>`;
}

function onKey(event) {
  const control = event.ctrlKey || event.metaKey, typing = event.target.matches?.("input, textarea, select, [contenteditable]");
  if (document.querySelector("dialog[open]")) return;
  if (event.altKey && Object.keys(VIEWS)[Number(event.key) - 1]) location.hash = `#${Object.keys(VIEWS)[Number(event.key) - 1]}`;
  else if (control && event.key === "Enter") generate();
  else if (control && event.key === "Backspace" && !typing) cancelAll();
  else if (event.key === "?" && !typing) dialog.set({ shortcuts: true });
  else return;
  event.preventDefault();
}

const viewOf = () => Object.keys(VIEWS).find((name) => location.hash.slice(1).split("/")[0] === name) || "generate";

function App() {
  const [view, setView] = useState(viewOf()), [theme, setTheme] = useState(document.documentElement.dataset.theme || "");
  const { version } = choices.use();
  useEffect(() => {
    const change = () => setView(viewOf());
    addEventListener("hashchange", change);
    addEventListener("keydown", onKey);
    start().catch(tellError);
    return () => { removeEventListener("hashchange", change); removeEventListener("keydown", onKey); };
  }, []);
  useEffect(() => { document.title = `${VIEWS[view][0]} – Tessera studio`; }, [view]);
  const next = Object.keys(THEMES)[(Object.keys(THEMES).indexOf(theme) + 1) % 3];
  const chooseTheme = () => {
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    try { localStorage.setItem("tessera-theme", next); } catch { /* storage is blocked */ }
    setTheme(next);
    dispatchEvent(new Event("themechange"));
  };
  const [, View] = VIEWS[view];
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>Skip to the content</a>
    <header class="top">
      <h1><img src="icon.svg" alt="" /> Tessera <span>${version}</span></h1>
      <nav aria-label="Views">${Object.entries(VIEWS).map(([name, [text]], index) => html`
        <a key=${name} href=${`#${name}`} aria-current=${name === view ? "page" : undefined} title=${`Alt + ${index + 1}`}>${text}</a>`)}</nav>
      <div>
        <button type="button" class="quiet" aria-label=${`Theme: ${THEMES[theme]}. Change to ${THEMES[next]}`} onClick=${chooseTheme}>${THEMES[theme]} theme</button>
        <button type="button" class="quiet" aria-label="Keyboard shortcuts" onClick=${() => dialog.set({ shortcuts: true })}>?</button>
      </div>
    </header>
    <main id="main" tabindex="-1"><${View} /></main>
    <${KeyDialog} /><${Shortcuts} /><${Messages} />`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
