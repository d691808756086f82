// Tables of images with live previews, and the details of one image.
import { html, useEffect, useRef, useState } from "./ui.js";
import { Menu, copy, number, tell, tellError } from "./ui.js";
import { fetchDataUrl, get, query, useImage } from "./api.js";
import { ACTIVE, cancel, changes, frameAt } from "./jobs.js";

/** An image or a clip. format: of its file; videos play, and animations are images */
export function Image({ path, alt, format, ...rest }) {
  const url = useImage(path);
  if (url && VIDEOS.has(format)) return html`<video src=${url} aria-label=${alt || null} autoplay loop muted playsinline controls=${Boolean(alt)}
    onLoadedMetadata=${(event) => event.target.classList.toggle("pixels", event.target.videoWidth < 128)}></video>`;
  return url ? html`<img src=${url} alt=${alt} draggable=${false} decoding="async"
    onLoad=${(event) => event.target.classList.toggle("pixels", event.target.naturalWidth < 128)} ...${rest} />` : html`<span class="no-image"></span>`;
}

const VIDEOS = new Set(["mp4", "webm"]);
const formatOf = (item, frame) => (frame === item.url ? item.parameters.output_format : null); // previews are images

const STATES = { waiting: "waiting", submitted: "in the queue", running: "running", finished: "finished", cancelled: "cancelled", failed: "failed" };

function Cell({ cell, step, selected, onSelect, ...rest }) {
  const active = ACTIVE.has(cell.state), frame = frameAt(cell, step);
  const text = cell.state === "running" ? `step ${cell.step} of ${cell.numSteps}` : STATES[cell.state];
  return html`
    <div class="cell ${cell.state} ${selected ? "selected" : ""}">
      <button type="button" class="image" aria-label=${`${cell.title}: ${text}`} aria-pressed=${selected} onClick=${onSelect}
        onKeyDown=${(event) => { if (event.key === "Delete" || event.key === "Backspace") cancel([cell]); }} ...${rest}>
        ${frame ? html`<${Image} path=${frame} format=${formatOf(cell, frame)} alt="" />` : html`<span class="no-image">${cell.state === "failed" ? "failed" : cell.state === "cancelled" ? "cancelled" : ""}</span>`}
      </button>
      ${active && html`
        <progress max=${cell.numSteps || 1} value=${cell.step} aria-label=${`Progress: ${cell.title}`}></progress>
        <button type="button" class="cancel" tabindex="-1" aria-label=${`Cancel ${cell.title}`} title="Cancel (Delete)" onClick=${() => cancel([cell])}>×</button>`}
    </div>`;
}

/** One table of cells; arrow keys move in it. */
export function Table({ table, step, selected, onSelect }) {
  const [focus, setFocus] = useState([0, 0]);
  const body = useRef();
  const move = (event, row, column) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [0, 0];
    const next = [row + down, column + right];
    if ((!down && !right) || !table.cells[next[0]]?.[next[1]]) return;
    event.preventDefault();
    setFocus(next);
    body.current.rows[next[0]].cells[next[1] + 1].querySelector("button").focus();
  };
  return html`
    <div class="table-scroll">
      <table class="cells">
        ${table.title && html`<caption>${table.title}</caption>`}
        <thead><tr><td></td>${table.columns.map((text, index) => html`<th key=${index} scope="col">${text}</th>`)}</tr></thead>
        <tbody ref=${body}>
          ${table.cells.map((row, y) => html`
            <tr key=${y}>
              <th scope="row">${table.rows[y]}</th>
              ${row.map((cell, x) => html`
                <td key=${x} onKeyDown=${(event) => move(event, y, x)}>
                  <${Cell} cell=${cell} step=${step} selected=${selected === cell} tabindex=${focus[0] === y && focus[1] === x ? 0 : -1}
                    onSelect=${() => { setFocus([y, x]); onSelect(cell); }} />
                </td>`)}
            </tr>`)}
        </tbody>
      </table>
    </div>`;
}

/** A slider over the steps of all cells. step: null is the newest. */
export function StepSlider({ cells, step, onStep }) {
  const steps = Math.max(...cells.map((cell) => cell.numSteps), 1);
  return html`
    <label class="slider"><span>Step</span>
      <input type="range" aria-label="Step" min="0" max=${steps} value=${step ?? steps} aria-valuetext=${step === null ? "newest" : `step ${step} of ${steps}`}
        onInput=${(event) => onStep(Number(event.target.value) >= steps ? null : Number(event.target.value))} />
      <output>${step === null ? "newest" : step}</output>
    </label>`;
}

export function Progress({ cells }) {
  const done = cells.filter((cell) => cell.state === "finished").length, ended = cells.filter((cell) => !ACTIVE.has(cell.state)).length;
  const steps = cells.reduce((sum, cell) => sum + (ACTIVE.has(cell.state) ? cell.step / (cell.numSteps || 1) : 1), 0);
  return html`<span class="total"><progress max=${cells.length} value=${steps} aria-label="Progress of all images"></progress>
    ${ended < cells.length ? `${ended} of ${cells.length}` : `${done} of ${cells.length} finished`}</span>`;
}

/** Parameters of one image of a job: its row of every list. */
export function rowParameters(record, index) {
  const at = (list) => [list[list.length === 1 ? 0 : index]];
  const lists = (values) => Object.fromEntries(Object.entries(values || {}).map(([name, list]) => [name, at(list)]));
  const { parameters } = record, scale = parameters.guidance_scale;
  return {
    ...parameters, seeds: [record.seeds[index]], condition: lists(parameters.condition), negative: lists(parameters.negative),
    ...(Array.isArray(scale) && { guidance_scale: at(scale)[0] }),
  };
}

export function python(parameters, settings, job) {
  const value = (data) => (data === null ? "None" : typeof data === "boolean" ? (data ? "True" : "False") : Array.isArray(data) ? `[${data.map(value).join(", ")}]`
    : typeof data === "object" ? `{${Object.entries(data).map(([name, each]) => `${JSON.stringify(name)}: ${value(each)}`).join(", ")}}` : JSON.stringify(data));
  const { condition = {}, negative = {}, settings: sampling = {} } = parameters, options = settings?.options || {};
  const words = condition.label ? [value(condition.label)] : [];
  words.push(`seeds=${value(parameters.seeds)}`);
  if (condition.text) words.push(`prompts=${value(condition.text)}`);
  if (negative.text) words.push(`negative_prompts=${value(negative.text)}`);
  if (parameters.guidance_scale != null) words.push(`guidance_scale=${value(parameters.guidance_scale)}`);
  if (parameters.size) words.push(`size=(${parameters.size.join(", ")})`);
  for (const [name, each] of Object.entries(sampling)) words.push(`${name}=${value(each)}`);
  const reads = [];
  if (options["init-image"]) {
    reads.push("import numpy as np", "from PIL import Image");
    words.push(`init_image=np.asarray(Image.open(${value(options["init-image"])}).convert("RGB"))`);
    if (options.mask) words.push(`mask=np.asarray(Image.open(${value(options.mask)}).convert("L")) >= 128`);
    if (parameters.strength != null) words.push(`strength=${value(parameters.strength)}`);
  }
  const note = Object.keys(parameters.controls || {}).length ? "# The control images are not part of this call: see the command line.\n" : "";
  return `${[...reads, "import tessera"].join("\n")}\n\n${note}model = tessera.load(${value(settings?.model || parameters.model)})\nimages = tessera.generate(model, ${words.join(", ")})\n`;
}

export function curl(parameters, job) {
  const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const { preview_every: _, init_image: image, mask, ...body } = parameters;
  const left = image || mask || Object.keys(body.controls || {}).length || job?.inputs?.length;
  const auth = " -H \"Authorization: Bearer $TESSERA_KEY\"".repeat(Number(Boolean(sessionStorage.getItem("tessera-key"))));
  return `${left ? "# Add the images as base64: init_image, mask, controls.NAME.image\n" : ""}curl ${location.origin}/v1/jobs -H 'Content-Type: application/json'${auth} -d ${shell(JSON.stringify(body))}\n`;
}

const SHOWN = [["seeds", "Seed"], ["class_names", "Class"], ["prompts", "Prompt"], ["negative_prompts", "Negative prompt"], ["guidance_scales", "Guidance scale"]];

/** An image with its settings and what can be done with it. item: a cell, or an image of the gallery in the same form. */
export function Detail({ item, step, onStep, actions = [], onClose }) {
  changes.use();
  const heading = useRef();
  useEffect(() => heading.current?.scrollIntoView?.({ block: "nearest" }), [item]);
  const { settings, parameters } = item, frame = frameAt(item, step);
  const rows = settings ? SHOWN.filter(([name]) => settings[name]?.[0] != null).map(([name, label]) => [label, settings[name].join(", ")]) : [["Seed", parameters.seeds[0]]];
  const sampling = settings?.sampling;
  if (sampling) {
    if (settings.guidance_scales?.[0] == null) rows.push(["Guidance scale", sampling.guidance_scale]);
    rows.push(["Steps", sampling.num_steps], ["Sampler", sampling.sampler.kind], ["Spacing", sampling.timestep_spacing.kind]);
  }
  if (parameters.size) rows.push(["Size", parameters.size.join(" × ")]);
  if (parameters.strength != null) rows.push(["Strength", parameters.strength]);
  rows.push(["Model", parameters.model]);
  if (item.created) rows.push(["Time", new Date(item.created * 1000).toLocaleString()]);
  const command = async () => copy((await get(`/v1/studio/command?${query({ job: item.job, image: item.index || 0 })}`)).command, "Command");
  return html`
    <aside class="detail" aria-label="Selected image">
      <header><h2 ref=${heading}>${item.title}</h2>${onClose && html`<button class="quiet" type="button" aria-label="Close the details" onClick=${onClose}>×</button>`}</header>
      <div class="large">${frame ? html`<${Image} path=${frame} format=${formatOf(item, frame)} alt=${item.title} />` : html`<span class="no-image">${item.error ? "" : STATES[item.state]}</span>`}</div>
      ${item.error && html`<p class="problem">${item.error}</p>`}
      ${item.frames?.length > 0 && html`
        <div class="strip" role="group" aria-label="Steps of this image">
          ${[...item.frames, ...(item.url ? [{ step: item.numSteps, url: item.url }] : [])].map((each) => html`
            <button key=${each.step} type="button" aria-pressed=${step === each.step || (step === null && each.url === item.url)} aria-label=${`Step ${each.step}`}
              onClick=${() => onStep(each.url === item.url ? null : each.step)}><${Image} path=${each.url} format=${formatOf(item, each.url)} alt="" /><small>${each.step}</small></button>`)}
        </div>`}
      ${item.url && html`
        <div class="actions">
          ${actions.map(([name, action]) => (Array.isArray(action) ? html`<${Menu} key=${name} text=${name} actions=${action} />`
            : html`<button key=${name} type="button" onClick=${action}>${name}</button>`))}
          <${Menu} text="Copy as" actions=${[
            ["Command line", () => command().catch(tellError)],
            ["Python", () => copy(python(parameters, settings, item), "Python")],
            ["curl", () => copy(curl(parameters, item), "curl command")],
            ["Settings (JSON)", () => copy(JSON.stringify(settings, null, 2), "Settings")],
          ]} />
          <button type="button" onClick=${() => download(item).catch(tellError)}>Download</button>
        </div>`}
      <dl>${rows.map(([label, text]) => html`<div key=${label}><dt>${label}</dt><dd>${typeof text === "number" && !Number.isInteger(text) ? number(text) : text}</dd></div>`)}</dl>
      ${settings && html`<details><summary>All settings</summary><pre tabindex="0">${JSON.stringify(settings, null, 2)}</pre></details>`}
    </aside>`;
}

async function download(item) {
  const link = document.createElement("a");
  link.href = await fetchDataUrl(item.url);
  link.download = `${item.job}-${item.index || 0}.${item.parameters.output_format || "png"}`;
  link.click();
  tell("Saved to the folder of downloads");
}
