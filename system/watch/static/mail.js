// The page of `espalier tree --html`: one tree, whose texts stand in the file.

import { pressed } from "./dom.js";
import { treeView } from "./treeview.js";

const held = JSON.parse(document.getElementById("tree").textContent);
const source = {
  text: async (node, first) => (first === 0 ? held.texts[node] : { ...held.texts[node], first, pieces: [], arguments: [] }),
};
const view = treeView(held.tree, source, Math.max(900, window.innerWidth - 60));
document.getElementById("main").replaceChildren(view.box);
addEventListener("keydown", (event) => event.target.tagName === "SELECT" || pressed(event) || view.keys(event));
