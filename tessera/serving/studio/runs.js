// The view "Runs": the runs below the folder of --runs, live while they train.
import { Field, announce, createStore, html, tellError, useEffect, useState } from "./ui.js";
import { follow, get, post, query } from "./api.js";
import { Chart } from "./chart.js";
import { Detail, Image, Progress, StepSlider, Table } from "./cells.js";
import { changes, createCell, forget, run as runCells } from "./jobs.js";
import { choices, models } from "./models.js";
import { sameWith, useAgain } from "./generate.js";

const runs = createStore({ list: null, state: null, diagnosis: null, error: null });
const nameOf = () => decodeURIComponent(location.hash.split("/").slice(1).join("/"));

export function Runs() {
  const { runs: hasRuns, version } = choices.use(), { list, state, diagnosis, error } = runs.use();
  const [name, setName] = useState(nameOf()), [newest, setNewest] = useState(null);
  useEffect(() => {
    const change = () => setName(nameOf());
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  useEffect(() => {
    if (!hasRuns) return undefined;
    const load = () => get("/v1/runs").then(({ data }) => {
      runs.set({ list: data });
      // The list is ordered by the last change. Of two runs that train, the page keeps showing the one it began with.
      setNewest((shown) => (data.some((each) => each.name === shown) ? shown : data[0]?.name));
    }).catch(tellError);
    load();
    const timer = setInterval(load, 10000);
    return () => clearInterval(timer);
  }, [hasRuns]);
  const current = name || newest;
  useEffect(() => {
    if (!current || !hasRuns) return undefined;
    runs.set({ state: null, diagnosis: null, error: null });
    return follow(`/v1/runs/events?${query({ run: current })}`, (event, data) => {
      if (event === "state") { runs.set({ state: data, error: null }); announce(`${data.name}: step ${data.step} of ${data.steps}`); }
      else runs.set({ error: data.message });
    }, (_, failure) => failure && runs.set({ error: failure.message }));
  }, [current, hasRuns]);
  const diagnosedAt = state && `${state.name} ${state.live ? Math.floor(state.step / Math.max(state.steps / 20, 1)) : state.step}`;
  useEffect(() => {
    if (diagnosedAt) get(`/v1/runs/findings?${query({ run: state.name })}`).then((data) => runs.set({ diagnosis: data })).catch((failure) => runs.set({ diagnosis: { error: failure.message } }));
  }, [diagnosedAt]);
  if (version && !hasRuns) return html`<p class="empty">This server shows no runs. Start it with a folder of runs: <code>tessera serve MODEL --runs runs</code></p>`;
  if (!list) return html`<p class="empty">Loading</p>`;
  if (!list.length) return html`<p class="empty">There are no runs yet. Start one with <code>tessera train RECIPE</code>; it appears here after its first step.</p>`;
  return html`
    <div class="runs">
      <nav class="panel" aria-label="Runs">
        <ul>${list.map((each) => html`
          <li key=${each.name}><a href=${`#runs/${encodeURIComponent(each.name)}`} aria-current=${each.name === current ? "true" : undefined}>
            <span>${each.name === "." ? "this run" : each.name}</span>${each.live && html`<b class="live">live</b>`}<small>step ${each.step} of ${each.steps}</small>
          </a></li>`)}</ul>
      </nav>
      <div class="run">
        ${error && html`<p class="problem" role="alert">${error}</p>`}
        ${state && html`<${Run} key=${state.name} state=${state} diagnosis=${diagnosis} />`}
      </div>
    </div>`;
}

const CHARTS = [["learning_rate", "Learning rate"], ["grad_norm", "Gradient norm", true], ["mfu", "Model FLOPs utilization", false, 100, " %"], ["images_per_second", "Images per second"]];

function Run({ state, diagnosis }) {
  const { series, scores, baselines } = state;
  const losses = [["loss", "training", "--accent"], ["loss_probe", "probe", "--second"], ["loss_ema", "probe, EMA", "--third"]].filter(([key]) => series[key]).map(([key, label, color]) => ({ label, color, ...series[key] }));
  const lines = "linear" in baselines ? [{ label: "linear baseline", value: baselines.linear }] : [];
  return html`
    <header class="run-title">
      <h2>${state.name === "." ? "This run" : state.name} ${state.live && html`<b class="live">live</b>`}</h2>
      <label>step ${state.step} of ${state.steps} <progress max=${state.steps || 1} value=${state.step}></progress></label>
    </header>
    <div class="charts">
      ${losses.length > 0 && html`<${Chart} title="Loss" series=${losses} lines=${lines} log />`}
      ${Object.entries(scores).map(([metric, curve]) => html`<${Chart} key=${metric} title=${`Score: ${metric}`} series=${[{ label: metric, color: "--second", ...curve }]} />`)}
      ${CHARTS.filter(([key]) => series[key]).map(([key, title, log, factor = 1, unit = ""]) => html`
        <${Chart} key=${key} title=${title} log=${log} unit=${unit} series=${[{ label: title, color: "--accent", steps: series[key].steps, values: series[key].values.map((value) => value * factor) }]} />`)}
    </div>
    ${state.samples.length > 0 && html`<${RunSamples} state=${state} />`}
    <${Diagnosis} diagnosis=${diagnosis} />
    ${state.checkpoints.length > 0 && html`<${Checkpoints} state=${state} />`}
    <details><summary>Recipe</summary><pre tabindex="0">${state.recipe}</pre></details>`;
}

function RunSamples({ state }) {
  const [index, setIndex] = useState(null), last = state.samples.length - 1, shown = state.samples[index ?? last];
  const path = (file) => `/v1/runs/samples/${file}?${query({ run: state.name })}`;
  return html`
    <section class="block"><h3>Samples</h3>
      <label class="slider"><span>Step</span>
        <input type="range" aria-label="Step of the samples" min="0" max=${last} value=${index ?? last} aria-valuetext=${`step ${shown.step}`} onInput=${(event) => setIndex(Number(event.target.value) === last ? null : Number(event.target.value))} />
        <output>${shown.step}</output></label>
      ${shown.files.map((file) => html`<${Image} key=${file} path=${path(file)} alt=${`grid of samples at step ${shown.step}`} class="sample-grid" />`)}
    </section>`;
}

function Diagnosis({ diagnosis }) {
  if (!diagnosis) return null;
  if (diagnosis.error) return html`<section class="block"><h3>Diagnostics</h3><p class="problem">${diagnosis.error}</p></section>`;
  return html`
    <section class="block"><h3>Diagnostics</h3>
      ${!diagnosis.findings.length && html`<p class="good">No problems found</p>`}
      ${diagnosis.findings.map((finding) => html`
        <article key=${finding.name} class="finding ${finding.severity}">
          <h4><b>${finding.severity}</b> ${finding.name}</h4><p>${finding.what}</p>
          <dl><div><dt>Evidence</dt><dd>${finding.evidence}</dd></div><div><dt>Change</dt><dd>${finding.change}</dd></div></dl>
        </article>`)}
      <dl>${Object.entries(diagnosis.facts).map(([name, text]) => html`<div key=${name}><dt>${name}</dt><dd>${text}</dd></div>`)}</dl>
    </section>`;
}

const compared = createStore({ run: null, table: null, step: null, selected: null });

/** Checkpoints side by side: a column for each, equal seeds in the rows. */
function Checkpoints({ state }) {
  const { run, table, step, selected } = compared.use();
  changes.use();
  const [chosen, setChosen] = useState(null), [input, setInput] = useState(state.text ? "" : "0"), [seeds, setSeeds] = useState(3);
  const steps = (chosen ?? state.checkpoints.slice(-3)).filter((each) => state.checkpoints.includes(each));
  const toggle = (each) => setChosen(steps.includes(each) ? steps.filter((other) => other !== each) : [...steps, each].sort((a, b) => a - b));
  const compare = async () => {
    const ids = [];
    for (const each of steps) ids.push((await post(`/v1/runs/models?${query({ run: state.name, step: each })}`)).id);
    const condition = state.text ? { text: [input] } : state.classes ? { label: [/^\d+$/.test(input) ? Number(input) : input] } : {};
    const cells = Array.from({ length: seeds }, (_, seed) => ids.map((model, index) => createCell({ model, seeds: [seed], condition, preview_every: 5 }, { title: `step ${steps[index]}, seed ${seed}` })));
    if (compared.get().table) forget(compared.get().table.cells.flat());
    compared.set({ run: state.name, step: null, selected: null, table: { title: "", rows: cells.map((_, seed) => `seed ${seed}`), columns: steps.map((each) => `step ${each}`), cells } });
    runCells(cells[0].map((_, index) => cells.map((row) => row[index])).flat()); // one model after the other
    models.refresh().catch(() => {});
  };
  return html`
    <section class="block"><h3>Checkpoints side by side</h3>
      <form class="toolbar" onSubmit=${(event) => { event.preventDefault(); compare().catch(tellError); }}>
        <fieldset class="inline"><legend>Checkpoints</legend>${state.checkpoints.map((each) => html`<label key=${each} class="check"><input type="checkbox" checked=${steps.includes(each)} onChange=${() => toggle(each)} /> ${each}</label>`)}</fieldset>
        ${(state.text || state.classes > 0) && html`<${Field} label=${state.text ? "Prompt" : "Class"}><input value=${input} onInput=${(event) => setInput(event.target.value)} /><//>`}
        <${Field} label="Seeds"><input type="number" min="1" max="8" value=${seeds} onInput=${(event) => setSeeds(Math.min(8, Math.max(1, Number(event.target.value) || 1)))} /><//>
        <button type="submit" disabled=${!steps.length}>Compare</button>
      </form>
      ${table && run === state.name && html`
        <div class="toolbar"><${Progress} cells=${table.cells.flat()} /><${StepSlider} cells=${table.cells.flat()} step=${step} onStep=${(next) => compared.set({ step: next })} /></div>
        <${Compared} table=${table} step=${step} selected=${selected} />`}
    </section>`;
}

function Compared({ table, step, selected }) {
  return html`
    <${Table} table=${table} step=${step} selected=${selected} onSelect=${(cell) => compared.set({ selected: cell })} />
    ${selected && html`<${Detail} item=${selected} step=${step} onStep=${(next) => compared.set({ step: next })} onClose=${() => compared.set({ selected: null })}
      actions=${[["Use again", () => models.refresh().then(() => useAgain(selected)).catch(tellError)], ["The same with", sameWith(selected)]]} />`}`;
}
