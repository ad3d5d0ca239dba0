"use strict";
// Draws the page from the JSON in #data: curves, the list of rollouts, and the one selected.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function drawn(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function number(value) {
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
}

// Curves

function curve(name, points) {
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (v) => 2 + (296 * (v - x0)) / (x1 - x0 || 1);
  const y = (v) => 86 - (80 * (v - y0)) / (y1 - y0 || 1);
  const path = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  const words = `${name}: from ${number(ys[0])} at step ${xs[0]} to ${number(ys.at(-1))} at step `
    + `${xs.at(-1)}, between ${number(y0)} and ${number(y1)}`;
  const picture = drawn("svg", { viewBox: "0 0 300 90", preserveAspectRatio: "none", role: "img", "aria-label": words },
    drawn("path", { d: path, fill: "none", stroke: "var(--accent)", "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" }));
  return element("figure", {}, picture, element("figcaption", {}, element("b", {}, name),
    ` ${number(ys[0])} to ${number(ys.at(-1))} (${number(y0)} to ${number(y1)}), steps ${xs[0]} to ${xs.at(-1)}`));
}

// Rollouts: a tree by name, roots in the order they were written

const rollouts = new Map(data.rollouts.map((rollout) => [rollout.name, { ...rollout, children: [] }]));
for (const rollout of rollouts.values()) rollouts.get(rollout.parent)?.children.push(rollout);
const roots = [...rollouts.values()].filter((rollout) => rollout.parent === null);

function below(rollout) {
  return [rollout, ...rollout.children.flatMap(below)];
}

for (const root of roots) {
  root.family = below(root);
  root.failed = root.family.some((one) => one.error !== null);
  root.words = root.family.flatMap((one) => one.turns.map((turn) => turn.text)).join("\n").toLowerCase();
}

function title(rollout) {
  return `step ${rollout.step}, ${rollout.environment}, rollout ${rollout.name}`;
}

// The list

let shown = roots, selected = null;

function fits(root, wanted) {
  return (wanted.min === "" || root.reward >= Number(wanted.min))
    && (wanted.max === "" || root.reward <= Number(wanted.max))
    && (wanted.stop === "" || root.stop_reason === wanted.stop)
    && (wanted.environment === "" || root.environment === wanted.environment)
    && (!wanted.failed || root.failed)
    && root.words.includes(wanted.words);
}

function filter() {
  const wanted = {
    min: byId("min-reward").value, max: byId("max-reward").value, stop: byId("stop-reason").value,
    environment: byId("environment").value, failed: byId("failed").checked,
    words: byId("words").value.toLowerCase(),
  };
  shown = roots.filter((root) => fits(root, wanted));
  byId("list").replaceChildren(...shown.map(option));
  byId("count").textContent = `${shown.length} of ${roots.length} rollouts`;
  select(shown.includes(selected) ? selected : shown[0] ?? null);
}

function option(root, place) {
  const reward = element("b", { class: root.reward > 0 ? "good" : "bad" }, number(root.reward));
  const failed = root.failed ? element("span", { class: "bad" }, " failed") : null;
  const row = element("li", { role: "option", id: `option-${place}`, "aria-selected": "false" },
    reward, ` ${title(root)}`, failed, element("small", {}, root.answer || root.stop_reason));
  row.addEventListener("click", () => select(root));
  return row;
}

function select(root, pageFollows = false) {
  selected = root;
  const list = byId("list"), place = shown.indexOf(root);
  list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
  if (place < 0) {
    list.removeAttribute("aria-activedescendant");
    byId("detail").replaceChildren(element("p", { class: "soft" }, "No rollout fits."));
    return;
  }
  const row = list.children[place];
  row.setAttribute("aria-selected", "true");
  const [x, y] = [scrollX, scrollY];
  row.scrollIntoView({ block: "nearest" });
  if (!pageFollows) scrollTo(x, y); // only the list scrolls: the page opens at its top
  list.setAttribute("aria-activedescendant", row.id);
  byId("detail").replaceChildren(...detail(root));
  byId("detail").scrollTop = 0;
}

byId("list").addEventListener("keydown", (event) => {
  const place = shown.indexOf(selected), last = shown.length - 1;
  const target = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: last,
    PageDown: place + 10, PageUp: place - 10 }[event.key];
  if (event.key === "Enter") byId("detail").focus();
  if (target === undefined || last < 0) return;
  event.preventDefault();
  select(shown[Math.min(Math.max(target, 0), last)], true);
});

// One rollout

function detail(root) {
  const heading = element("h3", {}, title(root));
  return [heading, facts(root), timeline(root), turns(root)].filter((part) => part !== null);
}

function facts(rollout) {
  const rows = [["reward", rollout.reward], ...Object.entries(rollout.rewards),
    ["ended by", rollout.stop_reason], ["failure", rollout.error], ["truth", JSON.stringify(rollout.truth)],
    ["sampled tokens", rollout.num_tokens], ...Object.entries(rollout.metrics)];
  return element("dl", {}, ...rows.filter((row) => row[1] !== null).flatMap(([key, value]) => [
    element("dt", {}, key), element("dd", key === "failure" ? { class: "bad" } : {}, number(value))]));
}

function timeline(root) {
  const timed = root.family.map((one) => [one, one.turns.filter((turn) => turn.began_s !== null)]);
  const turnsOfAll = timed.flatMap(([, some]) => some);
  if (!turnsOfAll.length) return null;
  const begin = Math.min(...turnsOfAll.map((turn) => turn.began_s));
  const length = Math.max(...turnsOfAll.map((turn) => turn.ended_s)) - begin || 1e-3;
  const x = (seconds) => 130 + (860 * (seconds - begin)) / length;
  const height = 22 * timed.length + 20;
  const label = `Timeline of ${timed.length} agents over ${number(length)} seconds; the turns below say the same in words`;
  const picture = drawn("svg", { class: "timeline", viewBox: `0 0 1000 ${height}`, role: "img", "aria-label": label });
  timed.forEach(([one, some], lane) => {
    const top = 22 * lane;
    picture.append(drawn("text", { x: 0, y: top + 15 }, one.agent.slice(0, 20)),
      drawn("line", { x1: 130, x2: 990, y1: top + 21, y2: top + 21 }));
    for (const turn of some) {
      const bar = drawn("rect", { class: turn.role, x: x(turn.began_s), y: top + 4, height: 14, rx: 2,
        width: Math.max(x(turn.ended_s) - x(turn.began_s), 2) },
        drawn("title", {}, `${one.agent}, turn ${turn.turn}, ${turn.role}: ${number(turn.ended_s - turn.began_s)} s`));
      bar.addEventListener("click", () => reveal(turnId(one, turn)));
      picture.append(bar);
    }
  });
  picture.append(drawn("text", { x: 130, y: height - 4 }, "0 s"),
    drawn("text", { x: 990, y: height - 4, "text-anchor": "end" }, `${number(length)} s`));
  return picture;
}

function turnId(rollout, turn) {
  return `turn-${rollout.name}-${turn.turn}`;
}

function reveal(id) {
  const node = byId(id);
  for (let box = node.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  node.scrollIntoView({ block: "center" });
  node.focus();
}

function turns(rollout) {
  return element("ol", { class: "turns", "aria-label": `Turns of ${rollout.agent}` },
    ...rollout.turns.map((turn) => element("li", {}, turnBox(rollout, turn),
      ...rollout.children.filter((one) => one.called_by_turn === turn.turn).map(childBox))));
}

function childBox(rollout) {
  const words = ` ended by ${rollout.stop_reason}, ${rollout.turns.length} turns`;
  const failure = rollout.error === null ? null : element("span", { class: "bad" }, ` ${rollout.error}`);
  return element("details", { class: "child" },
    element("summary", {}, element("b", {}, rollout.agent), words, failure), turns(rollout));
}

function turnBox(rollout, turn) {
  const time = turn.began_s === null ? "" : `, ${number(turn.ended_s - turn.began_s)} s`;
  const sampled = turn.num_tokens === null ? "" : `, ${turn.num_tokens} tokens of version ${[...new Set(turn.policy_versions)].join(" to ")}`;
  const box = element("article", { class: `turn ${turn.role}`, id: turnId(rollout, turn), tabindex: "-1",
    "aria-label": `Turn ${turn.turn}, ${turn.role}` },
    element("p", { class: "soft" }, element("b", {}, turn.agent_name ?? turn.role), ` turn ${turn.turn}${time}${sampled}`));
  if (turn.thinking) box.append(element("pre", { class: "thinking" }, turn.thinking));
  if (turn.text) box.append(element("pre", {}, turn.text));
  for (const call of turn.calls) box.append(element("pre", {}, `${call.name}(${call.arguments})`));
  for (const name of turn.pictures) box.append(element("img", { src: data.pictures[name], alt: `picture in turn ${turn.turn}`, loading: "lazy" }));
  return box;
}

// Begin

byId("summary").textContent = data.summary;
byId("curves").append(...data.curves.map(([name, points]) => curve(name, points)));
for (const [id, key] of [["stop-reason", "stop_reason"], ["environment", "environment"]]) {
  for (const value of [...new Set(roots.map((root) => root[key]))].sort()) {
    byId(id).append(element("option", { value }, value));
  }
}
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
filter();
