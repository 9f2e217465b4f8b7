// What is shown, which is in the page's address alone, and the addresses that pictures have for ever, at the model's
// digest, so that what the browser has seen it keeps. Seeds and indices are BigInt: they go to 2^64.

export const SEEDS = 2n ** 64n;
export const INDICES = 2n ** 63n;
export const SIDE = 8; // of a block: that many pictures in a row of the one file that a block is asked for by
export const COLUMNS = [2, 4, 8, 16, 32]; // on the page; blocks are whole rows of each
export const STEPS = 24; // between two pinned pictures

/** All that the page knows: the server's models and its gRPC side, what is shown, and which sample is at the window's top. */
export const page = { models: [], grpc: {}, state: null, top: 0n };

export const id = (model) => `${model.name}@${model.version}`;
export const shown = () => [page.state.model, page.state.beside].filter(Boolean);

// What a server gives at a time depends on the size of its pictures.
const most = () => Math.min(...shown().map((model) => model.max_pictures));
export const block = () => Math.min(SIDE * SIDE, 2 ** Math.floor(Math.log2(most())));
export const columns = () => Math.min(page.state.columns ?? (innerWidth < 480 ? 4 : innerWidth < 1600 ? 8 : 16), block());
export const moving = () => Math.min(STEPS, page.state.model.max_pictures); // pictures of an animation

export function read() {
  const query = new URLSearchParams(location.search);
  const whole = (name, most, otherwise) => {
    const text = query.get(name) ?? "";
    return /^[0-9]{1,20}$/.test(text) && BigInt(text) < most ? BigInt(text) : otherwise;
  };
  const number = (name, least, most, otherwise) => {
    const value = Number.parseFloat(query.get(name) ?? "");
    return value >= least && value <= most ? value : otherwise;
  };
  const named = (name) => page.models.find((model) => id(model) === query.get(name));
  return {
    model: named("model") ?? page.models[0],
    beside: named("beside") ?? null,
    seed: whole("seed", SEEDS, 0n),
    start: whole("start", INDICES, 0n),
    temperature: number("temperature", 0, 1.5, 1),
    columns: COLUMNS.find((each) => String(each) === query.get("columns")) ?? null,
    here: query.get("made") === "here",
    pins: (query.get("pins") ?? "").split(",").filter((text) => /^[0-9]{1,19}$/.test(text)).map(BigInt)
      .filter((index) => index < INDICES),
  };
}

/** The page's own address, at which it shows what it shows now. */
export function permalink() {
  const { model, beside, seed, temperature, columns: wide, here, pins } = page.state;
  const query = new URLSearchParams({ model: id(model), seed, start: page.top });
  if (temperature !== 1) query.set("temperature", temperature);
  if (wide) query.set("columns", wide);
  if (beside) query.set("beside", id(beside));
  if (here) query.set("made", "here");
  if (pins.length) query.set("pins", pins.join(","));
  return `${location.origin}${location.pathname}?${query}`;
}

function at(model, tail, query = {}) {
  const rest = new URLSearchParams(query);
  if (page.state.temperature !== 1) rest.set("temperature", page.state.temperature);
  if (model.arithmetic !== "exact") rest.set("arithmetic", model.arithmetic);
  const text = rest.toString();
  return `/v1/digests/${model.digest}/${tail}${text ? `?${text}` : ""}`;
}

export const sample = (index) => at(page.state.model, `samples/${page.state.seed}/${index}.png`);
export const grid = (model, start, columns, rows) =>
  at(model, `grid/${page.state.seed}/${start}.webp`, { columns, rows });
export const between = (a, b, frame, steps) =>
  at(page.state.model, `between/${page.state.seed}/${a}/${b}/${frame}.png`, { steps });
export const animation = (a, b) => at(page.state.model, `between/${page.state.seed}/${a}/${b}.webp`, { steps: moving() });
