// Makes pictures in the browser, at the addresses that the server has for them: the contract's noise, and the model in
// onnxruntime-web, which lies beside. One request after the other; what is given up is left out.

import { ask } from "./asking.js";
import { between, draw } from "./noise.mjs";

const BATCH = 8; // pictures at a time: whatever is given up ends between two
const ORT = new URL("ort/", import.meta.url).href;
const waiting = new Map(); // by number: requests, in their order
const models = new Map(); // by digest: what is promised of them
let working = false;

onmessage = ({ data }) => {
  if (data.leave) waiting.delete(data.leave);
  else waiting.set(data.number, data);
  if (!working) work();
};

async function work() {
  working = true;
  for (;;) {
    const [next] = waiting.values();
    if (!next) break;
    try {
      await answer(next);
    } catch (error) {
      postMessage({ number: next.number, error: String(error?.message || error) }); // a runtime may throw numbers
    }
    waiting.delete(next.number);
  }
  working = false;
}

async function answer({ number, url, model, token }) {
  const { digest } = model;
  const size = model.card.noise_size;
  if (!models.has(digest)) {
    models.set(digest, load(model, token));
    models.get(digest).catch(() => models.delete(digest)); // to be tried again
  }
  const loaded = await models.get(digest);
  const { noise, columns } = wanted(url, size);
  const begin = performance.now();
  let images;
  try {
    images = await run(loaded, noise, model.card, () => waiting.has(number));
  } catch (error) {
    models.delete(digest); // a graphics processor that was lost comes back to another session only
    throw error;
  }
  if (!images) return;
  const seconds = (performance.now() - begin) / 1000;
  const [height, width] = model.card.image_shape;
  const count = images.length / (height * width * 4);
  postMessage({ number, blob: await sheet(images, count, columns, height, width) });
  // Made before anything else is, as a session does one thing at a time; the server's is not waited for.
  loaded.first ??= await run(loaded, draw(0n, 0n, 1, size), model.card, () => true);
  loaded.off ??= compared(loaded.first, model, token).catch(() => null);
  const said = { count, seconds, by: loaded.by };
  loaded.off.then((off) => postMessage({ said: { ...said, off } }));
}

/** The noise that an address stands for, and how many of its pictures go into a row. */
function wanted(url, size) {
  const { pathname, searchParams: query } = new URL(url, location);
  const [kind, seed, first, last, frame] = pathname.replace(/\.\w+$/, "").split("/").slice(4);
  const columns = kind === "grid" ? Number(query.get("columns")) : 1;
  let noise;
  if (kind === "between") {
    const steps = Number(query.get("steps"));
    const [a, b] = [first, last].map((index) => draw(BigInt(seed), BigInt(index), 1, size));
    noise = between(a, b, steps).slice(frame * size, (Number(frame) + 1) * size);
  } else {
    noise = draw(BigInt(seed), BigInt(first), columns * Number(query.get("rows") ?? 1), size);
  }
  const scale = Math.fround(Number(query.get("temperature") ?? 1));
  return { noise: noise.map((value) => value * scale), columns };
}

/** A model's session. */
async function load(model, token) {
  const reply = await ask(`/v1/digests/${model.digest}/model.onnx`, { token, waiting: (word) => postMessage({ word }) });
  const bytes = new Uint8Array(await reply.arrayBuffer());
  // Graphics processors compute in float32 what they are given as such; whole numbers are the processor's.
  const gpu = model.card.precision === "fp32" && (await navigator.gpu?.requestAdapter());
  return (gpu && (await session(bytes, "webgpu"))) || session(bytes, "wasm");
}

/** A session of a provider; null where WebGPU does not take the model. */
async function session(bytes, provider) {
  try {
    const ort = await import(`${ORT}ort.${provider}.min.mjs`);
    ort.env.logLevel = "error"; // it warns of what is as it should be
    ort.env.wasm.wasmPaths = ORT;
    const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
    ort.env.wasm.numThreads = threads;
    const made = await ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
    const by = provider === "webgpu" ? "WebGPU" : `WebAssembly on ${threads} thread${threads > 1 ? "s" : ""}`;
    return { ort, made, by };
  } catch (error) {
    if (provider === "wasm") throw error;
    console.warn(`WebGPU does not take this model, WebAssembly does it: ${error.message}`);
    return null;
  }
}

/** Noise to RGBA; null where nobody waits any more. */
async function run({ ort, made }, noise, { noise_size: size, image_shape: [height, width, channels] }, wanted) {
  const count = noise.length / size;
  const images = new Uint8ClampedArray(count * height * width * 4).fill(255);
  for (let from = 0; from < count; from += BATCH) {
    if (!wanted()) return null;
    const part = noise.subarray(from * size, Math.min(from + BATCH, count) * size);
    const feed = { noise: new ort.Tensor("float32", part, [part.length / size, size]) };
    const { data } = (await made.run(feed, ["images"])).images;
    const begin = from * height * width;
    for (let pixel = 0; pixel < data.length / channels; pixel += 1) {
      for (let channel = 0; channel < 3; channel += 1) {
        images[4 * (begin + pixel) + channel] = data[pixel * channels + Math.min(channel, channels - 1)];
      }
    }
    await new Promise((done) => setTimeout(done)); // messages are read in between
  }
  return images;
}

/** Pictures in rows, without margins, as a file. */
function sheet(images, count, columns, height, width) {
  const canvas = new OffscreenCanvas(columns * width, Math.ceil(count / columns) * height);
  const context = canvas.getContext("2d");
  for (let each = 0; each < count; each += 1) {
    const data = images.subarray(each * height * width * 4, (each + 1) * height * width * 4);
    context.putImageData(new ImageData(data, width, height), (each % columns) * width, Math.floor(each / columns) * height);
  }
  return canvas.convertToBlob();
}

/** By how many grey levels a picture differs from the server's, at most: the proof that both are the same model. */
async function compared(ours, model, token) {
  const [height, width] = model.card.image_shape;
  const query = model.arithmetic === "exact" ? "" : `?arithmetic=${model.arithmetic}`;
  const url = `/v1/digests/${model.digest}/samples/0/0.png${query}`;
  const reply = await ask(url, { token });
  const there = await createImageBitmap(await reply.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(there, 0, 0);
  const theirs = context.getImageData(0, 0, width, height).data;
  return ours.reduce((most, value, at) => Math.max(most, Math.abs(value - theirs[at])), 0);
}
