// Where the page has its pictures from: each is asked for by its address, of the server or of the worker that makes it
// here, kept while something shows it, and given up, come or not, when nothing does.

import { ask as askServer } from "./asking.js";
import { $, say } from "./dom.js";
import { page } from "./state.js";

const fetched = new Map(); // by address: what is awaited, and how to end it
let maker = null; // what is asked in the server's place

/** Whoever is asked from now on: null for the server. What the other has made is forgotten. */
export function madeBy(other) {
  if (other === maker) return;
  for (const url of [...fetched.keys()]) forget(url);
  maker = other;
}

export const token = () => sessionStorage.getItem("token");

/** Ask the server. Where a token is needed, an <img> could not send it. */
export async function ask(url, signal) {
  try {
    return await askServer(url, { signal, token: token(), waiting: say });
  } catch (error) {
    if (error.status === 401) $("token-form").hidden = false;
    throw error;
  }
}

/** The address, on this page, of what an address gives. */
export function source(url) {
  const known = fetched.get(url);
  if (known) return known.made;
  const control = new AbortController();
  const file = maker ? maker.make(url, control.signal) : ask(url, control.signal).then((reply) => reply.blob());
  const made = file.then((blob) => URL.createObjectURL(blob));
  const entry = { made, control };
  fetched.set(url, entry);
  made.catch(() => fetched.get(url) === entry && fetched.delete(url));
  return made;
}

function forget(url) {
  const known = fetched.get(url);
  if (!known) return;
  fetched.delete(url);
  known.control.abort();
  known.made.then((made) => URL.revokeObjectURL(made), () => {});
}

export async function show(image, url) {
  image.dataset.url = url;
  try {
    const made = await source(url);
    if (image.dataset.url === url) image.src = made;
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
}

/** Give up the pictures of a place but those that it goes on to show. */
export function keep(place, wanted) {
  for (const url of place.urls ?? []) if (!wanted.includes(url)) forget(url);
  place.urls = wanted;
}

/** A worker that makes pictures of the models that the server shares. */
export class Maker {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #asked = new Map(); // by number: what is awaited
  #last = 0;

  /** `tell` is given what the worker says of its speed. */
  constructor(tell) {
    this.#worker.onmessage = ({ data: { number, blob, error, said, word } }) => {
      const asked = this.#asked.get(number);
      if (error) asked?.reject(new Error(error));
      if (blob) asked?.resolve(blob);
      if (error || blob) this.#asked.delete(number);
      if (said) tell(said);
      if (word) say(word);
    };
    this.#worker.onerror = (event) => say(event.message ?? "this browser cannot make pictures");
  }

  make(url, signal) {
    const number = (this.#last += 1);
    const model = page.models.find(({ digest }) => digest === url.split("/")[3]);
    return new Promise((resolve, reject) => {
      this.#asked.set(number, { resolve, reject });
      signal.addEventListener("abort", () => {
        this.#worker.postMessage({ leave: number });
        this.#asked.delete(number);
        reject(signal.reason);
      });
      this.#worker.postMessage({ number, url, model, token: token() });
    });
  }
}
