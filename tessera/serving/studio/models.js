// The models of the server, and the choices of the forms.
import { createStore } from "./ui.js";
import { get, post } from "./api.js";
import { form } from "./form.js";

export const choices = createStore({ version: "", samplers: [], timestep_spacings: [], runs: false });
export const models = createStore({ list: [], ready: false });

export const modelFacts = (id) => models.get().list.find((each) => each.id === id)?.facts ?? null;

/** Read the list again. Facts of a model are known once it was loaded. */
models.refresh = async () => {
  const { data } = await get("/v1/models");
  models.set({ list: data, ready: true });
  if (!data.some((each) => each.id === form.get().model)) form.set({ model: data[0]?.id ?? null });
};

/** Load a model, by a request for one image in one step, which is removed. */
models.load = async (model) => {
  const { id } = await post("/v1/studio/load?" + new URLSearchParams({ model }));
  await models.refresh();
  return id;
};

/** A page that is opened while the server still loads its models has no facts of them: ask again when it is ready. */
export async function start() {
  choices.set(await get("/v1/studio"));
  await models.refresh();
  while (models.get().list.length && !(await isReady())) await new Promise((resolve) => setTimeout(resolve, 300));
  await models.refresh();
}

async function isReady() {
  try {
    await get("/ready");
  } catch (error) {
    if (error.status === 503) return false;
    throw error;
  }
  return true;
}
