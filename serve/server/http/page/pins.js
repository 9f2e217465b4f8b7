// Pinned pictures, what is between them, and around a single one.

import { $, say } from "./dom.js";
import { ask, keep, show, source, token } from "./pictures.js";
import { animation, between, INDICES, moving, page, sample, STEPS } from "./state.js";

const NEAR = 16; // steps to a neighbour, of which the first ones are around a picture
const NEIGHBOURS = 12;
const AHEAD = 8; // frames that are asked for before they are played
const FRAME = 80; // milliseconds

let frames = [];
let playing = null; // an object for as long as it plays

/** Show the pinned pictures; `take` is called with the index of one to take off. */
export function tray(take) {
  stop();
  const { pins } = page.state;
  $("tray").hidden = !pins.length;
  const had = [...$("pins").children].findIndex((item) => item.contains(document.activeElement));
  keep($("pins"), pins.map(sample));
  $("pins").replaceChildren(...pins.map((index) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.append(picture(sample(index), `Sample ${index}: take it off`));
    button.addEventListener("click", () => take(index));
    item.append(button, link(sample(index), index, ""));
    return item;
  }));
  if (had >= 0) ($("pins").querySelectorAll("button")[had] ?? $("clear")).focus();
  $("way").hidden = pins.length < 2;
  $("walk").hidden = pins.length !== 1;
  frames = pins.slice(1).flatMap((b, leg) =>
    Array.from({ length: STEPS }, (_, frame) => between(pins[leg], b, frame, STEPS)).slice(leg ? 1 : 0));
  keep($("frame"), frames);
  if (frames.length) {
    $("at").max = frames.length - 1;
    $("at").value = Math.min($("at").value, frames.length - 1);
    slide();
  }
  $("downloads").replaceChildren(...(moving() < 2 ? [] : pins.slice(1)).flatMap((b, leg) => [
    link(animation(pins[leg], b), `Animation ${pins[leg]} to ${b}`, `${page.state.model.name}-${page.state.seed}-${pins[leg]}-${b}.webp`),
    " ",
  ]));
  around();
}

// A link to what the server has, which is also had where a token is needed.
function link(url, text, download) {
  const made = document.createElement("a");
  made.href = url;
  made.textContent = text;
  if (download) made.download = download;
  made.addEventListener("click", async (event) => {
    if (!token() || made.href.startsWith("blob:")) return; // the address does
    event.preventDefault();
    try {
      made.href = URL.createObjectURL(await (await ask(url)).blob());
      made.click();
    } catch (error) {
      say(error.message);
    }
  });
  return made;
}

function picture(url, label) {
  const image = document.createElement("img");
  image.alt = label;
  show(image, url);
  return image;
}

export function slide() {
  const frame = Number($("at").value);
  $("frame").alt = `Step ${frame + 1} of ${frames.length} between the pinned pictures`;
  return show($("frame"), frames[frame]);
}

export function around() {
  const { pins } = page.state;
  const others = pins.length === 1
    ? Array.from({ length: NEIGHBOURS }, (_, number) => (pins[0] + BigInt(number) + 1n) % INDICES) : [];
  const far = $("far").value;
  const urls = others.map((other) => between(pins[0], other, far, NEAR));
  keep($("around"), urls);
  $("around").replaceChildren(...others.map((other, number) => {
    const item = document.createElement("li");
    item.append(picture(urls[number], `${far} of ${NEAR - 1} steps towards sample ${other}`));
    return item;
  }));
}

export async function play() {
  if (playing) return stop();
  const mine = (playing = {});
  $("play").setAttribute("aria-pressed", "true");
  while (playing === mine) {
    const frame = (Number($("at").value) + 1) % frames.length;
    for (let next = frame; next < frame + AHEAD; next += 1) source(frames[next % frames.length]).catch(() => {});
    $("at").value = frame;
    await Promise.all([slide(), new Promise((done) => setTimeout(done, FRAME))]);
  }
}

export function stop() {
  playing = null;
  $("play").setAttribute("aria-pressed", "false");
}
