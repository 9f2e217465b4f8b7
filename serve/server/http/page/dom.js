// What all modules of the page need.

export const $ = (id) => document.getElementById(id);
export const say = (text) => { $("status").textContent = text; };
