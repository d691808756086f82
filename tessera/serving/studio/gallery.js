// The view "Gallery": the images of all jobs in the output folder.
import { Field, Select, createStore, html, tell, tellError, useEffect, useState } from "./ui.js";
import { get, query, remove } from "./api.js";
import { Detail, Image, rowParameters } from "./cells.js";
import { sameWith, useAgain } from "./generate.js";

const PAGE = 100;
const gallery = createStore({ jobs: [], hasMore: false, loading: false });

async function load(more = false) {
  if (gallery.get().loading) return;
  gallery.set({ loading: true });
  try {
    const last = more ? gallery.get().jobs.at(-1)?.id : null;
    const page = await get(`/v1/jobs?${query({ limit: PAGE, ...(last && { after: last }) })}`);
    gallery.set(({ jobs }) => ({ jobs: more ? [...jobs, ...page.data] : page.data, hasMore: page.has_more }));
  } catch (error) {
    tellError(error);
  }
  gallery.set({ loading: false });
}

/** The images of jobs, in the form of cells. */
function imagesOf(jobs) {
  return jobs.filter((record) => record.client !== "thumbnails").flatMap((record) => record.seeds.map((seed, index) => {
    const settings = record.results[index] ? record.settings[index] : null, parameters = rowParameters(record, index);
    const condition = settings?.class_names?.[0] ?? parameters.condition.text?.[0] ?? parameters.condition.label?.[0];
    return {
      key: `${record.id}/${index}`, job: record.id, index, parameters, settings, state: record.state, error: record.error, frames: [],
      url: record.results[index] && `/v1/jobs/${record.id}/results/${index}`, numSteps: record.num_steps, step: record.num_steps, inputs: record.inputs,
      created: record.created, title: [condition, `seed ${seed}`].filter((part) => part !== undefined && part !== "").join(", "),
      text: [record.model, condition, `seed ${seed}`, record.state, Object.values(parameters.settings).join(" "), settings?.sampling?.sampler.kind,
        `${settings?.sampling?.num_steps} steps`, record.user, record.inputs.includes("mask.png") ? "inpainting" : record.inputs.length ? "image-to-image" : ""].join(" ").toLowerCase(),
    };
  }));
}

/** Whether a word of the search is in a text: a number as a whole, other words from their beginning. */
const contains = (text, word) => (/^[\d.]+$/.test(word) ? text.split(/\s+/).includes(word) : ` ${text}`.includes(` ${word}`));

export function Gallery() {
  const { jobs, hasMore, loading } = gallery.use(), [search, setSearch] = useState(""), [model, setModel] = useState(""), [state, setState] = useState("images");
  const [key, setKey] = useState(null);
  useEffect(() => { load(); }, []);
  const all = imagesOf(jobs), words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = all.filter((item) => (!model || item.parameters.model === model) && (state === "images" ? item.url : !item.url) && words.every((word) => contains(item.text, word)));
  const selected = all.find((item) => item.key === key);
  const deleteJob = async () => {
    const count = all.filter((item) => item.job === selected.job).length;
    if (!confirm(`Delete ${count === 1 ? "this image" : `the job with its ${count} images`} from the output folder?`)) return;
    await remove(`/v1/jobs/${selected.job}`);
    gallery.set(({ jobs }) => ({ jobs: jobs.filter((record) => record.id !== selected.job) }));
    tell("Deleted");
  };
  return html`
    <div class="gallery">
      <div class="toolbar" role="search">
        <${Field} label="Search"><input type="search" placeholder="class, prompt, seed, sampler, model …" value=${search} onInput=${(event) => setSearch(event.target.value)} /><//>
        <${Field} label="Model"><${Select} value=${model} onChange=${setModel} options=${[["", "All models"], ...new Set(all.map((item) => item.parameters.model))]} /><//>
        <${Field} label="Show"><${Select} value=${state} onChange=${setState} options=${[["images", "Images"], ["others", "Without an image"]]} /><//>
        <button type="button" onClick=${() => load()}>Refresh</button>
        <span aria-live="polite">${loading ? "Loading" : `${shown.length} of ${all.length}${hasMore ? " loaded" : ""}`}</span>
      </div>
      <section aria-label="Images">
        ${!shown.length && !loading && html`<p class="empty">${all.length ? "Nothing matches. Change the search." : "Nothing here yet: images appear when they are generated."}</p>`}
        <ul class="images">
          ${shown.map((item) => html`
            <li key=${item.key}>
              <button type="button" class="image" aria-pressed=${item.key === key} aria-label=${`${item.title}${item.url ? "" : `: ${item.state}`}`} onClick=${() => setKey(item.key)}>
                ${item.url ? html`<${Image} path=${item.url} format=${item.parameters.output_format} alt="" loading="lazy" />` : html`<span class="no-image">${item.state}</span>`}
              </button>
              <small title=${item.title}>${item.title}</small>
            </li>`)}
        </ul>
        ${hasMore && html`<button type="button" disabled=${loading} onClick=${() => load(true)}>More</button>`}
      </section>
      ${selected && html`<${Detail} item=${selected} step=${null} onStep=${() => {}} onClose=${() => setKey(null)}
        actions=${[["Use again", () => useAgain(selected).catch(tellError)], ["The same with", sameWith(selected)], ["Delete", () => deleteJob().catch(tellError)]]} />`}
    </div>`;
}
