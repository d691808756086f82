// What to generate: the settings of the form, and the table of jobs that they describe.
import { createStore } from "./ui.js";
import { createCell } from "./jobs.js";

export const MAX_CELLS = 256;
const numbers = { parse: (word) => (Number.isFinite(Number(word)) && word !== "" ? Number(word) : null), what: "numbers" };
const names = { parse: (word) => word || null, what: "names" };

/** What a row or a column of the table can be. values: what is offered first, from the model and the server's choices. */
export const AXES = {
  condition: { label: "Class or prompt" },
  seed: { label: "Seed" },
  guidance_scale: { label: "Guidance scale", ...numbers, values: () => "1, 1.5, 2, 4" },
  num_steps: { label: "Steps", ...numbers, values: () => "5, 10, 25, 50" },
  sampler: { label: "Sampler", ...names, values: (facts, choices) => choices.samplers.join(", ") },
  timestep_spacing: { label: "Timestep spacing", ...names, values: (facts, choices) => choices.timestep_spacings.slice(0, 4).join(", ") },
  guidance_rescale: { label: "Guidance rescale", ...numbers, values: () => "0, 0.3, 0.7" },
  strength: { label: "Strength", ...numbers, values: () => "0.3, 0.5, 0.7, 0.9" },
  model: { label: "Model", ...names, values: (facts, choices) => choices.models.join(", ") },
};

export const EMPTY = {
  model: null, labels: [], prompts: "", negative: "", seed: "0", count: 4,
  num_steps: "", guidance_scale: "", sampler: "", timestep_spacing: "", guidance_rescale: "", frames: "", height: "", width: "",
  rows: "condition", rowValues: "", columns: "seed", columnValues: "",
  init: null, mask: null, strength: "", controls: {},
  others: { settings: {} }, // parameters of an image that is used again, for which the form has no field
};
export const form = createStore(EMPTY);

export const usesText = (facts) => Boolean(facts?.text);
const quoted = (name) => (/[,"]/.test(name) ? `"${name}"` : name);

/** The labels or prompts that are asked for; [null] if the model has neither. */
export function conditions(values, facts) {
  if (usesText(facts)) {
    const prompts = values.prompts.split("\n").map((line) => line.trim()).filter(Boolean);
    return prompts.length ? prompts : [""];
  }
  if (!facts?.classes.length) return [null];
  return values.labels.length ? values.labels : [0];
}

export const conditionText = (condition, facts) =>
  condition === null ? "unconditional" : usesText(facts) ? condition || "(empty prompt)" : facts?.classes[condition] ?? `class ${condition}`;

function axis(name, text, values, facts) {
  if (name === "condition") return conditions(values, facts).map((value) => ({ value, text: conditionText(value, facts) }));
  if (name === "seed") {
    const first = Number(values.seed);
    if (!Number.isSafeInteger(first) || first < 0) throw new Error(`The seed is “${values.seed}”: enter a whole number of 0 or more.`);
    return Array.from({ length: values.count }, (_, index) => ({ value: first + index, text: `seed ${first + index}` }));
  }
  const { label, parse, what } = AXES[name];
  const parsed = text.split(",").map((word) => parse(word.trim()));
  if (!parsed.length || parsed.includes(null)) throw new Error(`${label} has the values “${text}”: enter ${what} with commas between them.`);
  return parsed.map((value) => ({ value, text: `${label.toLowerCase()} ${value}` }));
}

const settingNames = ["num_steps", "sampler", "timestep_spacing", "guidance_rescale"];

function toNumber(values, name, label) {
  if (values[name] === "" || values[name] === null) return null;
  const value = Number(values[name]);
  if (!Number.isFinite(value)) throw new Error(`${label} is “${values[name]}”: enter a number.`);
  return value;
}

const fields = ["model", "seeds", "condition", "negative", "guidance_scale", "size", "init_image", "strength", "mask", "settings", "controls", "preview_every"];
const defaults = { precision: "float32", cut_long: false, output_format: "png" };
const isChoice = (value) => typeof value === "object" && value !== null && Object.keys(value).length === 1; // {kind: "heun"}

/** The parameters of an image that the form has no field for; of a sampler with options, all of them. */
function withoutField({ settings = {}, ...parameters }) {
  const rest = Object.entries(parameters).filter(([name, value]) => !fields.includes(name) && value !== null && value !== defaults[name]);
  const more = Object.entries(settings).filter(([name, value]) => !settingNames.includes(name) || (typeof value === "object" && value !== null && !isChoice(value)));
  for (const [name, inForm] of [["condition", ["label", "text"]], ["negative", ["text"]]]) {
    const inputs = Object.entries(parameters[name] ?? {}).filter(([field]) => !inForm.includes(field));
    if (inputs.length) rest.push([name, Object.fromEntries(inputs)]);
  }
  return { ...Object.fromEntries(rest), settings: Object.fromEntries(more) };
}

/** As words, for the note below the fields. Options of a sampler count while the field names that sampler. */
export function othersText(values) {
  const { settings, ...rest } = values.others, word = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const used = Object.entries(settings).filter(([name, value]) => !settingNames.includes(name) || value.kind === values[name]);
  return [...Object.entries(rest), ...used].map(([name, value]) => `${name}=${word(value)}`).join(", ");
}

/** The body of /v1/jobs. point: the values of this cell, over those of the form. */
function parameters(values, point, facts) {
  const all = { ...values, ...point }, result = { ...all.others, model: all.model, seeds: [point.seed], settings: {} };
  if (point.condition !== null) result.condition = { ...all.others.condition, [usesText(facts) ? "text" : "label"]: [point.condition] };
  if (usesText(facts) && all.negative) result.negative = { ...all.others.negative, text: [all.negative] };
  const guidance = toNumber(all, "guidance_scale", "The guidance scale");
  const counts = (isUsed, name) => isUsed || name in point || "model" in point; // not what the form hides for this model
  if (guidance !== null && counts(facts?.can_be_guided ?? true, "guidance_scale")) result.guidance_scale = guidance;
  for (const name of settingNames) {
    const value = name.startsWith("num") || name.endsWith("rescale") ? toNumber(all, name, name) : all[name] || null;
    if (value !== null) result.settings[name] = all.others.settings[name]?.kind === value ? all.others.settings[name] : value;
  }
  for (const [name, value] of Object.entries(all.others.settings)) if (!settingNames.includes(name)) result.settings[name] = value;
  const size = ["frames", "height", "width"].slice(facts?.clips ? 0 : 1).map((name, index) => toNumber(all, name, name) ?? facts?.size.at(index - (facts.clips ? 3 : 2)));
  if (["frames", "height", "width"].some((name) => all[name] !== "")) result.size = size;
  if (all.init && counts(!facts?.clips, "strength")) {
    result.init_image = all.init.url;
    if (all.mask) result.mask = all.mask;
    const strength = toNumber(all, "strength", "The strength");
    if (strength !== null) result.strength = strength;
  }
  const controls = Object.entries(all.controls).filter(([, control]) => control.image);
  if (controls.length) result.controls = Object.fromEntries(controls.map(([name, { image, strength, is_map }]) => [name, { image, strength: Number(strength), is_map }]));
  const steps = result.settings.num_steps ?? facts?.sampling.num_steps ?? 50;
  result.preview_every = Math.ceil(steps / 24);
  return result;
}

/** The tables of the form: one for each class and seed that is neither a row nor a column. Throws errors with what to do. */
export function plan(values, facts) {
  if (values.rows === values.columns) throw new Error("Rows and columns show the same setting: choose another one for one of them.");
  if (!values.init && [values.rows, values.columns].includes("strength")) throw new Error("A strength needs an image to start from: add one under “Start from an image”.");
  const rows = axis(values.rows, values.rowValues, values, facts), columns = axis(values.columns, values.columnValues, values, facts);
  const onAxis = (name) => [values.rows, values.columns].includes(name);
  const rest = (name) => (onAxis(name) ? [null] : axis(name, "", values, facts));
  const tables = [];
  for (const condition of rest("condition")) {
    for (const seed of rest("seed")) {
      const fixed = { ...(condition && { condition: condition.value }), ...(seed && { seed: seed.value }) };
      const title = [condition?.text, seed?.text].filter(Boolean).join(", ");
      const cells = rows.map((row) => columns.map((column) => {
        const point = { ...fixed, [values.rows]: row.value, [values.columns]: column.value };
        return createCell(parameters(values, point, facts), { title: [title, row.text, column.text].filter(Boolean).join(", ") });
      }));
      tables.push({ title, rows: rows.map(({ text }) => text), columns: columns.map(({ text }) => text), cells });
    }
  }
  const count = tables.length * rows.length * columns.length;
  if (count > MAX_CELLS) throw new Error(`This makes ${count} images; a table has at most ${MAX_CELLS}: choose fewer seeds, classes or values.`);
  return tables;
}

/** Fill the form with the parameters of an image: those of one row of a job. */
export function fill(parameters, extra = {}) {
  const { settings = {}, condition = {}, negative = {}, size } = parameters;
  form.set({
    ...EMPTY,
    model: parameters.model,
    labels: condition.label ? condition.label.slice() : [],
    prompts: condition.text ? condition.text.join("\n") : "",
    negative: negative.text?.[0] ?? "",
    seed: String(parameters.seeds[0]), count: 1,
    guidance_scale: parameters.guidance_scale ?? "",
    ...Object.fromEntries(settingNames.map((name) => [name, typeof settings[name] === "object" ? settings[name].kind : settings[name] ?? ""])),
    ...(size && { width: size.at(-1), height: size.at(-2), frames: size.length === 3 ? size[0] : "" }),
    strength: parameters.strength ?? "",
    others: withoutField(parameters),
    ...extra,
  });
}

/** Use other values for an axis of the table. */
export const axisValues = (name, facts, choices) => AXES[name].values?.(facts, choices) ?? "";
export { quoted };
