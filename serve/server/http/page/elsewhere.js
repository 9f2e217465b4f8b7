// The same for a shell and for Python, and the model's card.

import { $ } from "./dom.js";
import { block, id, page, permalink, STEPS } from "./state.js";

export function tell() {
  const { model, seed, temperature, pins } = page.state;
  const { address, tls, token } = page.grpc;
  const warm = temperature !== 1;
  const start = pins[0] ?? page.top;
  const count = pins.length ? 1 : block();
  const way = pins.length > 1;

  const whose = `sample-cli --server ${address}${tls ? " --tls" : ""}${token ? " --token TOKEN" : ""}`;
  const which = way
    ? pins.slice(1).map((b, leg) => [`--interpolate ${pins[leg]} ${b} --steps ${STEPS}`, `pictures/${pins[leg]}-${b}/`])
    : [[`--start ${start} --n ${count}`, "pictures/"]];
  $("shell").textContent = which.map(([what, out]) =>
    `${whose} --model ${id(model)} --seed ${seed} ${what}${warm ? ` --temperature ${temperature}` : ""} --out ${out}`).join("\n");

  const options = [...(tls ? ["tls=True"] : []), ...(token ? [`token="TOKEN"`] : [])].join(", ");
  $("python").textContent = [
    `from balanced_vae import Client${options ? ", Options" : ""}`,
    ...(way ? ["from serve.noise import way"] : []),
    "",
    `with Client("${address}"${options ? `, Options(${options})` : ""}) as client:`,
    `    model = client.model("${model.name}", "${model.version}")`,
    ...(way ? [
      `    ends = [${pins.join(", ")}]`,
      `    ways = [way(${seed}, a, b, ${STEPS}, ${temperature}, model.card.noise_size) for a, b in zip(ends, ends[1:])]`,
      `    images = [model.decode(noise) for noise in ways]`,
    ] : [`    images = model.sample(seed=${seed}, start=${start}, count=${count}${warm ? `, temperature=${temperature}` : ""})`]),
  ].join("\n");
  $("link").textContent = permalink();
}

export function describe() {
  const { model } = page.state;
  const { card } = model;
  const facts = {
    Model: id(model), Digest: model.digest, Arithmetic: model.arithmetic, Precision: card.precision,
    Prior: card.prior, Pictures: card.image_shape.join(" x "), Noise: card.noise_size, Licence: card.licence || "not stated",
    Notes: card.notes, "Made of": card.recipe?.name,
  };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

/** Copy a text to the clipboard; tell whether the page may. */
export async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch { // there is none but at localhost and by TLS
    getSelection().selectAllChildren(element);
    return false;
  }
}
