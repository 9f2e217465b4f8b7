// The endless grid: a block is filled as it comes near the window, and emptied as it leaves; its place stays.

import { $, say } from "./dom.js";
import { keep, source } from "./pictures.js";
import { block, columns, grid, INDICES, page, shown, SIDE } from "./state.js";

const waiting = []; // blocks whose pictures are asked for next
let current = null; // the index of the cell that Tab leads to
let gone = () => {}; // called where the server no longer has a model

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) (entry.isIntersecting ? fill : empty)(entry.target);
  reachable();
}, { rootMargin: "400px" });
const end = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) extend();
}, { rootMargin: "800px" });

export const whenGone = (what) => { gone = what; };

export function restart() {
  seen.disconnect();
  for (const each of $("pictures").children) keep(each, []);
  $("pictures").replaceChildren();
  current = page.top = page.state.start;
  layOut();
  end.unobserve($("more"));
  end.observe($("more"));
}

export function layOut() {
  const [height, width] = page.state.model.card.image_shape;
  $("pictures").style.setProperty("--columns", columns());
  $("pictures").style.setProperty("--shape", `${width} / ${height}`);
}

function extend() {
  const from = page.state.start + BigInt($("pictures").childElementCount * block());
  if (from >= INDICES) return;
  const place = document.createElement("div");
  place.className = "block";
  place.dataset.from = from;
  $("pictures").append(place);
  seen.observe(place);
  end.unobserve($("more")); // it tells again whether there is room for another
  requestAnimationFrame(() => end.observe($("more")));
  place.style.minHeight = `${place.previousElementSibling?.offsetHeight ?? 0}px`;
}

function fill(place) {
  if (place.childElementCount) return;
  const from = BigInt(place.dataset.from);
  const left = INDICES - from;
  const count = left < BigInt(block()) ? Number(left) : block();
  const across = Math.min(SIDE, count);
  const down = Math.floor(count / across); // at the very end of all indices some may be left out
  for (let number = 0; number < across * down; number += 1) {
    const index = from + BigInt(number);
    const cell = document.createElement("button");
    cell.type = "button";
    cell.className = "cell";
    cell.dataset.index = index;
    cell.setAttribute("aria-label", `Sample ${index} of seed ${page.state.seed}`);
    cell.setAttribute("aria-pressed", page.state.pins.includes(index));
    cell.tabIndex = index === current ? 0 : -1;
    place.append(cell);
  }
  place.style.minHeight = "";
  waiting.push({ place, urls: shown().map((model) => grid(model, from, across, down)), across, down });
  if (waiting.length === 1) askInTurn();
}

// One block after the other: the first is whole sooner than if all shared what the server can do.
async function askInTurn() {
  for (; waiting.length; waiting.shift()) {
    const [{ place, urls, across, down }] = waiting;
    if (!place.childElementCount || !place.isConnected) continue; // emptied meanwhile
    keep(place, urls);
    try {
      const sheets = await Promise.all(urls.map(source));
      if (place.urls !== urls) continue;
      [...place.children].forEach((cell, number) => {
        const [column, row] = [number % across, Math.floor(number / across)];
        cell.replaceChildren(...sheets.map((sheet) => part(sheet, column, row, across, down)));
      });
      say("");
    } catch (error) {
      if (error.name !== "AbortError") say(error.message);
      if (error.status === 404) gone();
    }
  }
}

// One picture of a sheet.
function part(sheet, column, row, across, down) {
  const span = document.createElement("span");
  span.className = "part";
  Object.assign(span.style, {
    backgroundImage: `url("${sheet}")`,
    backgroundSize: `${across * 100}% ${down * 100}%`,
    backgroundPosition: [[column, across], [row, down]].map(([at, of]) => `${of > 1 ? (at / (of - 1)) * 100 : 0}%`).join(" "),
  });
  return span;
}

function empty(place) {
  if (!place.childElementCount || place.contains(document.activeElement)) return;
  place.style.minHeight = `${place.offsetHeight}px`;
  place.replaceChildren();
  keep(place, []);
}

// The block at the window's top, below what lies over it.
function topmost() {
  const over = document.querySelector("header").getBoundingClientRect().bottom;
  return [...$("pictures").children].find((place) => place.getBoundingClientRect().bottom > Math.max(0, over));
}

/** Take note of which sample is at the window's top; tell whether it is another one than before. */
export function look() {
  const top = BigInt(topmost()?.dataset.from ?? page.state.start);
  if (top === page.top) return false;
  page.top = top;
  return true;
}

// The keyboard: one cell is in the order of Tab, and arrows lead from it to the others.

function reachable() {
  if ($("pictures").querySelector(".cell[tabindex='0']")) return;
  const cell = topmost()?.querySelector(".cell");
  if (cell) lead(cell);
}

export function move(event) {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
  if (!step) return;
  event.preventDefault();
  const cells = [...$("pictures").querySelectorAll(".cell")];
  const next = cells[cells.indexOf(cell) + step];
  if (!next) return;
  lead(next);
  next.focus();
}

export function lead(cell) {
  for (const before of $("pictures").querySelectorAll(".cell[tabindex='0']")) before.tabIndex = -1;
  cell.tabIndex = 0;
  current = BigInt(cell.dataset.index);
}

/** Mark what is pinned. */
export function mark() {
  for (const cell of $("pictures").querySelectorAll(".cell")) {
    cell.setAttribute("aria-pressed", page.state.pins.includes(BigInt(cell.dataset.index)));
  }
}
