// The view "Generate": the form, the tables of images, and the details of the selected one.
import { Field, Select, announce, createStore, html, tell, tellError, useEffect, useState } from "./ui.js";
import { dataUrl, events, fetchDataUrl, query } from "./api.js";
import { AXES, EMPTY, axisValues, fill, form, othersText, plan, usesText } from "./form.js";
import { Detail, Image, Progress, StepSlider, Table } from "./cells.js";
import { ACTIVE, cancel, changes, forget, run } from "./jobs.js";
import { MaskEditor, readFile } from "./mask.js";
import { choices, modelFacts, models } from "./models.js";

export const results = createStore({ tables: [], selected: null, step: null });
const allCells = () => results.get().tables.flatMap((table) => table.cells.flat());
let ended = true;

/** Submit the table of the form. What a model needs is known once it was loaded. */
export async function generate() {
  try {
    if (!models.get().ready) await models.refresh();
    if (!modelFacts(form.get().model)) await models.load(form.get().model);
    const values = form.get(), tables = plan(values, modelFacts(values.model));
    forget(allCells());
    results.set({ tables, selected: null, step: null });
    ended = false;
    const cells = tables.flatMap((table) => table.cells.flat());
    run(cells);
    announce(`${cells.length} images requested`);
  } catch (error) {
    tellError(error);
  }
}

export const cancelAll = () => cancel(allCells());

/** Use an image for another one: its settings in the form. record, index: of the gallery */
export async function useAgain(item, extra = {}) {
  const known = () => models.get().list.some(({ id }) => id === item.parameters.model);
  if (!known()) await models.refresh();
  if (!known()) throw new Error(`This server has no model “${item.parameters.model}”, which this image is of.`);
  const inputs = item.inputs || [], read = (name) => (inputs.includes(`${name}.png`) ? fetchDataUrl(`/v1/jobs/${item.job}/inputs/${name}.png`) : null);
  const { parameters } = item;
  const [init, mask] = await Promise.all([parameters.init_image || read("init-image"), parameters.mask || read("mask")]);
  const controls = {};
  for (const [name, control] of Object.entries(parameters.controls || {})) {
    controls[name] = { strength: control.strength ?? 1, is_map: control.is_map ?? false, image: control.image || await read(`control-${name}`) };
  }
  const classes = modelFacts(parameters.model)?.classes ?? []; // a request may name its classes
  const labels = (parameters.condition?.label ?? []).map((label) => (classes.includes(label) ? classes.indexOf(label) : label));
  fill(parameters, { labels, init: init && { url: init, name: "image of the job" }, mask, controls, ...extra });
  location.hash = "#generate";
}

/** "The same with ...": what changes, and whether it is generated at once. */
export function sameWith(item) {
  const facts = modelFacts(item.parameters.model), steps = item.settings?.sampling.num_steps ?? 50, seed = item.parameters.seeds[0];
  const go = (extra) => useAgain(item, extra).then(generate).catch(tellError);
  const axis = (columns) => go({ rows: "condition", columns, columnValues: axisValues(columns, facts, namesOf()) });
  const fromImage = async () => useAgain(item, { init: { url: await fetchDataUrl(item.url), name: `seed ${seed}` }, mask: null, strength: "", count: 4 });
  return [
    ["Other seeds", () => go({ seed: String(seed + 1), count: 8 })],
    ["Twice the steps", () => go({ num_steps: 2 * steps })],
    ["Several guidance scales", () => axis("guidance_scale")],
    ["Several step counts", () => axis("num_steps")],
    ["All samplers", () => axis("sampler")],
    ...(facts?.clips ? [] : [["This image as the start", () => fromImage().catch(tellError)]]),
  ];
}

const namesOf = () => ({ ...choices.get(), models: models.get().list.map((each) => each.id) });

export function Generate() {
  const values = form.use(), { list } = models.use(), { tables, selected, step } = results.use();
  choices.use();
  changes.use();
  const facts = modelFacts(values.model), cells = allCells(), active = cells.some((cell) => ACTIVE.has(cell.state));
  useEffect(() => {
    if (!active && cells.length && !ended) {
      ended = true;
      const count = (state) => cells.filter((cell) => cell.state === state).length;
      announce(`${count("finished")} images finished${count("failed") ? `, ${count("failed")} failed` : ""}`);
    }
  });
  const set = (name) => (value) => form.set({ [name]: value });
  const input = (name) => ({ value: values[name], onInput: (event) => form.set({ [name]: event.target.value }) });
  const sampling = facts?.sampling;
  if (models.get().ready && !list.length) return html`<p class="empty">This server has no model yet. Compare checkpoints of a run under <a href="#runs">Runs</a>, or start it with one: <code>tessera serve MODEL</code></p>`;
  return html`
    <div class="generate">
      <form class="panel" aria-label="Settings" onSubmit=${(event) => { event.preventDefault(); generate(); }}>
        ${list.length > 1 && html`<${Field} label="Model"><${Select} value=${values.model} onChange=${(model) => form.set({ model, labels: [], controls: {} })} options=${list.map((each) => each.id)} /><//>`}
        ${!facts && list.length > 0 && html`<p class="note">This model is loaded when it is used first. <button type="button" onClick=${() => models.load(values.model).catch(tellError)}>Load it</button></p>`}
        ${usesText(facts) ? html`
          <${Field} label="Prompt" hint="One in each line"><textarea rows="3" ...${input("prompts")}></textarea><//>
          <${Field} label="Negative prompt" hint="What guidance leads away from"><input ...${input("negative")} /><//>` : facts?.classes.length > 0 && html`<${Classes} key=${values.model} facts=${facts} model=${values.model} labels=${values.labels} onChange=${set("labels")} />`}
        <div class="pair">
          <${Field} label="First seed" after=${html`<button type="button" aria-label="Random seed" title="Random seed" onClick=${() => form.set({ seed: String(Math.floor(Math.random() * 2 ** 32)) })}>⚄</button>`}>
            <input inputmode="numeric" ...${input("seed")} /><//>
          <${Field} label="Seeds"><input type="number" min="1" max="64" required value=${values.count} onInput=${(event) => form.set({ count: Math.min(64, Math.max(1, Math.round(Number(event.target.value)) || 1)) })} /><//>
        </div>
        <div class="pair">
          <${Field} label="Steps"><input type="number" min="1" max="1000" placeholder=${sampling?.num_steps} ...${input("num_steps")} /><//>
          <${Field} label="Guidance scale"><input type="number" step="any" placeholder=${sampling?.guidance_scale} disabled=${facts && !facts.can_be_guided} ...${input("guidance_scale")} /><//>
        </div>
        <${Field} label="Sampler"><${Select} value=${values.sampler} onChange=${set("sampler")} options=${[["", `${sampling?.sampler.kind ?? "the model's"} (of the model)`], ...choices.get().samplers]} /><//>
        <details><summary>Size and more</summary>
          <div class="pair">
            ${["height", "width"].map((name, index) => html`<${Field} key=${name} label=${`${name[0].toUpperCase()}${name.slice(1)}`}><input type="number" min="1" step=${facts?.size_multiple || 1} placeholder=${facts?.size.at(index - 2)} ...${input(name)} /><//>`)}
          </div>
          ${facts?.clips && html`<${Field} label="Frames"><input type="number" min="1" placeholder=${facts.size.at(-3)} ...${input("frames")} /><//>`}
          <${Field} label="Timestep spacing"><${Select} value=${values.timestep_spacing} onChange=${set("timestep_spacing")} options=${[["", `${sampling?.timestep_spacing.kind ?? "the model's"} (of the model)`], ...choices.get().timestep_spacings]} /><//>
          <${Field} label="Guidance rescale" hint="0 to 1"><input type="number" min="0" max="1" step="any" placeholder=${sampling?.guidance_rescale} ...${input("guidance_rescale")} /><//>
          ${facts?.adapters.length > 0 && html`<p class="note">Adapters of this model: ${facts.adapters.join(", ")}</p>`}
        </details>
        ${othersText(values) && html`<p class="note">Also used, from the image: ${othersText(values)} <button type="button" onClick=${() => form.set({ others: EMPTY.others })}>Remove these</button></p>`}
        <${Start} values=${values} facts=${facts} />
        ${facts?.controls.map((name) => html`<${Control} key=${name} name=${name} control=${values.controls[name]} onChange=${(control) => form.set({ controls: { ...values.controls, [name]: control } })} />`)}
        <${Axes} values=${values} facts=${facts} />
        <div class="submit">
          <button class="primary" type="submit">Generate</button>
          <button type="button" disabled=${!active} onClick=${cancelAll}>Cancel all</button>
          <button type="button" onClick=${() => form.set({ ...EMPTY, model: values.model })}>Reset</button>
        </div>
      </form>
      <section class="results" aria-label="Images">
        ${cells.length === 0 ? html`<p class="empty">Choose what to generate, then press Generate (Ctrl + Enter). Every cell shows its preview while it is computed.</p>` : html`
          <div class="toolbar"><${Progress} cells=${cells} /><${StepSlider} cells=${cells} step=${step} onStep=${(next) => results.set({ step: next })} /></div>
          ${tables.map((table, index) => html`<${Table} key=${index} table=${table} step=${step} selected=${selected} onSelect=${(cell) => results.set({ selected: cell })} />`)}`}
      </section>
      ${selected && html`<${Detail} item=${selected} step=${step} onStep=${(next) => results.set({ step: next })} onClose=${() => results.set({ selected: null })}
        actions=${[["Use again", () => useAgain(selected).then(() => tell("The form has the settings of this image")).catch(tellError)], ["The same with", sameWith(selected)]]} />`}
    </div>`;
}

const SHOWN = 60; // classes at a time

function Classes({ facts, model, labels, onChange }) {
  const [search, setSearch] = useState(""), [thumbnails, setThumbnails] = useState({});
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = facts.classes.map((name, label) => ({ name, label })).filter(({ name, label }) => words.every((word) => name.toLowerCase().includes(word) || String(label) === word));
  const shown = matches.slice(0, SHOWN), wanted = shown.map(({ label }) => label).filter((label) => !(label in thumbnails));
  useEffect(() => {
    if (!wanted.length) return undefined;
    const control = new AbortController();
    const timer = setTimeout(async () => {
      try {
        for await (const [name, data] of events(`/v1/studio/thumbnails?${query({ model, label: wanted })}`, control.signal)) {
          if (name === "thumbnail") setThumbnails((all) => ({ ...all, [data.label]: dataUrl(data.b64_json, "webp") }));
        }
      } catch { /* without thumbnails, for example while the server is busy: names are enough */ }
    }, 300);
    return () => { clearTimeout(timer); control.abort(); };
  }, [model, search]);
  const toggle = (label) => onChange(labels.includes(label) ? labels.filter((each) => each !== label) : [...labels, label]);
  return html`
    <fieldset class="classes">
      <legend>Classes <span class="count">${labels.length ? `${labels.length} chosen` : "none chosen: the first one"}</span></legend>
      <div class="search">
        <input type="search" placeholder="Search by name or number" aria-label="Search classes" value=${search} onInput=${(event) => setSearch(event.target.value)}
          onKeyDown=${(event) => { if (event.key === "Enter" && !event.ctrlKey && shown.length) { event.preventDefault(); toggle(shown[0].label); } }} />
        <button type="button" disabled=${!labels.length} onClick=${() => onChange([])}>None</button>
        ${facts.classes.length <= SHOWN && html`<button type="button" onClick=${() => onChange(facts.classes.map((_, label) => label))}>All</button>`}
      </div>
      <div class="class-list" tabindex="-1">
        ${shown.map(({ name, label }) => html`
          <label key=${label} class="class" title=${name}>
            <input type="checkbox" checked=${labels.includes(label)} onChange=${() => toggle(label)} />
            ${thumbnails[label] ? html`<img src=${thumbnails[label]} alt="" class=${facts.size.at(-1) < 128 ? "pixels" : ""} />` : html`<span class="no-image"></span>`}
            <span>${name}</span>
          </label>`)}
      </div>
      ${matches.length > SHOWN && html`<small>${matches.length - SHOWN} more: search for them</small>`}
      ${!matches.length && html`<small>No class has this name or number</small>`}
    </fieldset>`;
}

function FileInput({ label, onImage }) {
  const read = async (file) => { if (file) try { onImage({ url: await readFile(file), name: file.name }); } catch (error) { tellError(error); } };
  return html`
    <label class="file" onDragOver=${(event) => event.preventDefault()} onDrop=${(event) => { event.preventDefault(); read(event.dataTransfer.files[0]); }}>
      <input type="file" accept="image/png,image/jpeg,image/webp" onChange=${(event) => { read(event.target.files[0]); event.target.value = ""; }} /><span>${label}</span>
    </label>`;
}

function Start({ values, facts }) {
  const [editing, setEditing] = useState(false), { init, mask } = values;
  if (facts?.clips) return null;
  return html`
    <details open=${Boolean(init)}><summary>Start from an image</summary>
      ${!init ? html`<${FileInput} label="Choose an image, or drop it here" onImage=${(image) => form.set({ init: image, mask: null })} />` : html`
        <div class="start">
          <div class="stack"><${Image} path=${init.url} alt=${init.name} />${mask && html`<img class="mask pixels" src=${mask} alt="the mask" />`}</div>
          <div>
            <button type="button" onClick=${() => setEditing(true)}>${mask ? "Change the mask" : "Paint a mask"}</button>
            ${mask && html`<button type="button" onClick=${() => form.set({ mask: null })}>Remove the mask</button>`}
            <button type="button" onClick=${() => form.set({ init: null, mask: null })}>Remove the image</button>
          </div>
        </div>
        <${Field} label="Strength" hint=${mask ? "The painted part is replaced; 1 replaces it wholly" : "How much may change, above 0 and at most 1"}>
          <input type="number" min="0.01" max="1" step="any" placeholder=${mask ? "1" : "0.6"} value=${values.strength} onInput=${(event) => form.set({ strength: event.target.value })} /><//>`}
      ${editing && html`<${MaskEditor} image=${init.url} mask=${mask} onClose=${() => setEditing(false)} onMask=${(next) => form.set({ mask: next })} />`}
    </details>`;
}

function Control({ name, control = { image: null, strength: 1, is_map: false }, onChange }) {
  return html`
    <details open=${Boolean(control.image)}><summary>Control: ${name}</summary>
      ${control.image ? html`<div class="start"><img src=${control.image} alt=${`image of ${name}`} /><button type="button" onClick=${() => onChange({ ...control, image: null })}>Remove</button></div>`
        : html`<${FileInput} label="Choose an image, or drop it here" onImage=${(image) => onChange({ ...control, image: image.url })} />`}
      <${Field} label=${`Strength of ${name}`}><input type="number" step="any" value=${control.strength} onInput=${(event) => onChange({ ...control, strength: event.target.value })} /><//>
      <label class="check"><input type="checkbox" checked=${control.is_map} onChange=${(event) => onChange({ ...control, is_map: event.target.checked })} /> The image is the map itself, such as a sketch</label>
    </details>`;
}

function Axes({ values, facts }) {
  const options = Object.entries(AXES).filter(([name]) => name !== "model" || models.get().list.length > 1).map(([name, { label }]) => [name, label]);
  const one = (name, label) => html`
    <${Field} label=${label}><${Select} value=${values[name]} options=${options} onChange=${(axis) => form.set({ [name]: axis, [`${name === "rows" ? "row" : "column"}Values`]: axisValues(axis, facts, namesOf()) })} /><//>
    ${AXES[values[name]].parse && html`<${Field} label=${`Values of the ${name}`}><input value=${values[name === "rows" ? "rowValues" : "columnValues"]} onInput=${(event) => form.set({ [name === "rows" ? "rowValues" : "columnValues"]: event.target.value })} /><//>`}`;
  return html`
    <fieldset><legend>Table</legend>
      ${one("rows", "Rows")}${one("columns", "Columns")}
      <button type="button" onClick=${() => form.set({ rows: values.columns, rowValues: values.columnValues, columns: values.rows, columnValues: values.rowValues })}>Swap rows and columns</button>
    </fieldset>`;
}
