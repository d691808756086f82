// The jobs of this page: one for each cell, so that each can be cancelled. The server puts them into the same network calls.
import { announce, createStore, tellError } from "./ui.js";
import { dataUrl, follow, get, post } from "./api.js";

const MAX_ACTIVE = 32; // jobs at the server, whose queue has a limit
const MAX_SUBMITTING = 3; // a request waits while its model is loaded, and browsers have few connections
export const ACTIVE = new Set(["waiting", "submitted", "running"]);

export const changes = createStore({}); // notified when any cell changes
const byJob = new Map(); // cells
const early = new Map(); // events of jobs whose number has not arrived yet
let waiting = [], submitting = 0, pausedUntil = 0, following = null;

/** parameters: of /v1/jobs, with one seed. place: anything that a view shows beside it */
export function createCell(parameters, place = {}) {
  return { parameters, ...place, state: "waiting", step: 0, numSteps: 0, frames: [], job: null, url: null, settings: null, error: null };
}

export function run(cells) {
  following ||= new Promise((resolve) => follow("/v1/jobs/events", handle, (state) => {
    resolve(); // jobs are submitted from now on: the end of a fast one would be missed before
    if (state === "connected") refresh();
  }));
  waiting.push(...cells);
  pump();
}

export async function cancel(cells) {
  const active = cells.filter((cell) => ACTIVE.has(cell.state));
  waiting = waiting.filter((cell) => !active.includes(cell));
  for (const cell of active) {
    cell.state = "cancelled";
    if (cell.job) post(`/v1/jobs/${cell.job}/cancel`).catch(tellError);
  }
  changes.notify();
  if (active.length) announce(`${active.length} cancelled`);
  pump();
}

/** Free the memory of cells that are no longer shown. */
export function forget(cells) {
  cancel(cells);
  for (const cell of cells) if (cell.job) byJob.delete(cell.job);
}

function pump() {
  const active = [...byJob.values()].filter((cell) => ACTIVE.has(cell.state)).length;
  const room = Math.min(MAX_ACTIVE - active - submitting, MAX_SUBMITTING - submitting);
  if (Date.now() >= pausedUntil) for (const cell of waiting.splice(0, Math.max(room, 0))) submit(cell);
  changes.notify();
}

async function submit(cell) {
  submitting++;
  try {
    await following;
    const record = await post("/v1/jobs", cell.parameters);
    cell.job = record.id;
    byJob.set(record.id, cell);
    if (cell.state === "cancelled") await post(`/v1/jobs/${record.id}/cancel`);
    else apply(cell, "state", record);
    for (const [name, data] of early.get(record.id) || []) apply(cell, name, data);
    early.delete(record.id);
  } catch (error) {
    if ((error.status === 429 || error.status === 503) && cell.state === "waiting") {
      waiting.unshift(cell); // the server's queue is full, or a model is loading
      pausedUntil = Date.now() + 1000 * (error.retryAfter || 1);
      setTimeout(pump, 1000 * (error.retryAfter || 1) + 50);
    } else if (cell.state === "waiting") {
      Object.assign(cell, { state: "failed", error: error.message });
      tellError(error);
    }
  }
  submitting--;
  pump();
}

function handle(name, data) {
  const id = data.job ?? data.id, cell = byJob.get(id);
  if (cell) apply(cell, name, data);
  else if (submitting) early.set(id, [...(early.get(id) || []), [name, data]]);
  else early.clear();
}

function apply(cell, name, data) {
  if (cell.state === "cancelled" || cell.state === "finished") return;
  if (name === "state" || name === "end") {
    cell.step = Math.max(cell.step, data.steps?.[0] || 0);
    cell.numSteps = data.num_steps || cell.numSteps;
    Object.assign(cell, { error: data.error, seed: data.seeds[0], created: data.created });
    if (data.results?.[0]) Object.assign(cell, { url: `/v1/jobs/${cell.job}/results/0`, settings: data.settings[0] });
    if (name === "end" || data.state !== "submitted" || cell.state === "waiting") cell.state = data.state;
    if (data.state === "failed") tellError(new Error(`A job failed: ${data.error}`));
    if (!ACTIVE.has(cell.state)) pump();
  } else if (name === "progress" || name === "preview") {
    Object.assign(cell, { step: Math.max(cell.step, data.step), numSteps: data.num_steps, state: "running" });
    if (name === "preview") cell.frames.push({ step: data.step, url: dataUrl(data.b64_json, data.output_format) });
  } else if (name === "result") {
    Object.assign(cell, { url: data.url, settings: data.settings, step: cell.numSteps });
  }
  changes.notify();
}

/** After an interruption: what was missed. */
async function refresh() {
  for (const cell of byJob.values()) {
    if (!ACTIVE.has(cell.state)) continue;
    const record = await get(`/v1/jobs/${cell.job}`).catch(() => null);
    if (record) apply(cell, ACTIVE.has(record.state) ? "state" : "end", record);
  }
}

/** What an image of a cell shows at a step; null: the newest. */
export function frameAt(cell, step) {
  const last = cell.frames.at(-1)?.url ?? null;
  if (step === null || (cell.url && step >= cell.numSteps)) return cell.url ?? last;
  return cell.frames.findLast((frame) => frame.step <= step)?.url ?? null;
}
