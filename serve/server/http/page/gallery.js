// The gallery: its controls, and how it gets from one state to the next.

import { $, say } from "./dom.js";
import { copy, describe, tell } from "./elsewhere.js";
import { layOut, lead, look, mark, move, restart, whenGone } from "./grid.js";
import { ask, madeBy, Maker } from "./pictures.js";
import { around, play, slide, stop, tray } from "./pins.js";
import { block, COLUMNS, id, INDICES, page, permalink, read, SEEDS, shown } from "./state.js";

let maker = null; // makes pictures in this browser, once that was asked for

function go(change, anew = true) {
  page.state = { ...page.state, ...change };
  page.state.here &&= shown().every((model) => model.in_browser);
  if (page.state.here) maker ??= new Maker(speed);
  else $("speed").textContent = "";
  madeBy(page.state.here ? maker : null);
  if (anew) restart();
  else mark();
  controls();
  tray(pin);
  address();
}

function pin(index) {
  const { pins } = page.state;
  go({ pins: pins.includes(index) ? pins.filter((each) => each !== index) : [...pins, index] }, false);
}

// What is at the window's top goes into the address, and into what is copied.
function address() {
  history.replaceState(null, "", permalink());
  $("start").value = page.top;
  tell();
}

// How fast this browser is, and how near to what the server makes.
function speed({ count, seconds, by, off }) {
  if (!page.state.here) return;
  const same = off === null ? "" : off ? `, within ${off} of 255 grey levels of the server's` : ", the server's exactly";
  $("speed").textContent = `This browser: ${(count / seconds).toFixed(0)} images/s by ${by}${same}.`;
}

function controls() {
  const { model, beside, seed, temperature, columns, here } = page.state;
  $("model").replaceChildren(...page.models.map((each) => new Option(id(each), id(each))));
  $("model").value = id(model);
  const fit = page.models.filter((each) => each !== model && each.card.noise_size === model.card.noise_size);
  $("beside").replaceChildren(new Option("nothing", ""), ...fit.map((each) => new Option(id(each), id(each))));
  $("beside").value = beside ? id(beside) : "";
  $("seed").value = seed;
  $("temperature").value = temperature;
  $("warmth").textContent = temperature.toFixed(2);
  $("columns").replaceChildren(new Option("as fit", ""),
    ...COLUMNS.filter((each) => each <= block()).map((each) => new Option(each, each)));
  $("columns").value = columns ?? "";
  $("made").value = here ? "here" : "";
  $("made-by").hidden = !shown().every((each) => each.in_browser);
  document.title = `${model.name}, seed ${seed} - balanced-vae`;
  describe();
}

function changed(event) {
  event.preventDefault();
  for (const [name, most, words] of [["seed", SEEDS, "2^64"], ["start", INDICES, "2^63"]]) {
    const text = $(name).value || "0";
    $(name).setCustomValidity(/^[0-9]+$/.test(text) && BigInt(text) < most ? "" : `a whole number below ${words}`);
  }
  if (!$("address").reportValidity()) return;
  const named = (name) => page.models.find((each) => id(each) === $(name).value);
  const [model, beside, seed] = [named("model"), named("beside"), BigInt($("seed").value || 0)];
  const fits = beside && beside !== model && beside.card.noise_size === model.card.noise_size;
  go({
    model, seed, start: BigInt($("start").value || 0),
    // The slider has steps; an address may say what is between two.
    temperature: event.target === $("temperature") ? Number($("temperature").value) : page.state.temperature,
    columns: Number($("columns").value) || null, beside: fits ? beside : null,
    here: $("made").value === "here",
    pins: seed === page.state.seed ? page.state.pins : [],
  });
  scrollTo(0, 0);
}

async function begin() {
  try {
    const { models, grpc } = await (await ask("/v1/models")).json();
    page.models = models;
    page.grpc = grpc;
    // Who listens on every address is at this one too.
    grpc.address = grpc.address.replace(/^(0\.0\.0\.0|\[::\])(?=:)/, location.hostname);
  } catch (error) {
    say(error.message);
    return;
  }
  if (!page.models.length) {
    say("the server has no model yet; asking again");
    setTimeout(begin, 1000);
    return;
  }
  page.state = read();
  go({});
}

// A model may be replaced while it is looked at.
whenGone(() => {
  const before = page.state.model.digest;
  begin().then(() => page.state.model.digest !== before && say("the server has another model now"));
});

$("address").addEventListener("submit", changed);
for (const name of ["model", "beside", "made", "temperature", "columns", "seed", "start"]) {
  $(name).addEventListener("change", changed);
}
$("temperature").addEventListener("input", () => { $("warmth").textContent = Number($("temperature").value).toFixed(2); });
$("pictures").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  lead(cell);
  pin(BigInt(cell.dataset.index));
});
$("pictures").addEventListener("keydown", move);
$("clear").addEventListener("click", () => go({ pins: [] }, false));
$("at").addEventListener("input", () => { stop(); slide(); });
$("far").addEventListener("input", around);
$("play").addEventListener("click", play);
$("card-open").addEventListener("click", () => $("card").showModal());
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    say((await copy($(button.dataset.copy))) ? "copied" : "selected: this page may not copy it");
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token-form").hidden = true;
  begin();
});

let looking = 0;
addEventListener("scroll", () => {
  clearTimeout(looking); // once it rests: browsers bound how often an address may change
  looking = setTimeout(() => { if (page.state && look()) address(); }, 150);
}, { passive: true });
addEventListener("resize", () => { if (page.state) layOut(); });
addEventListener("popstate", () => {
  if (!page.state || location.href.split("#")[0] === permalink()) return; // only the place on the page is another
  page.state = read();
  go({});
});

// What has the focus is not to lie below what lies over the page.
const over = new ResizeObserver(() => {
  const { style } = document.documentElement;
  const header = document.querySelector("header");
  style.scrollPaddingTop = `${getComputedStyle(header).position === "sticky" ? header.offsetHeight + 8 : 0}px`;
  style.scrollPaddingBottom = `${$("tray").offsetHeight + 8}px`;
});
over.observe(document.querySelector("header"));
over.observe($("tray"));
begin();
