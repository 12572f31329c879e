// The picture of F1 against work, and the bars of a schedule.
const SPACE = "http://www.w3.org/2000/svg";
const LEFT = 40, RIGHT = 330, TOP = 12, BOTTOM = 180;

function made(name, attributes, text) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The most accurate point within a part of the full model's work, as the service chooses it. */
export function within(front, budget) {
  const affordable = front.filter((point) => point.work <= budget);
  return affordable.reduce((best, one) => (one.f1 > best.f1 || (one.f1 === best.f1 && one.work < best.work) ? one : best));
}

/** Draw the front, with a dot on one of its points. */
export function drawFront(svg, front, here) {
  const low = Math.floor(Math.min(...front.map((point) => point.f1)) / 5) * 5;
  const high = Math.ceil(Math.max(...front.map((point) => point.f1)) / 5) * 5;
  const x = (work) => LEFT + (RIGHT - LEFT) * work;
  const y = (f1) => BOTTOM - ((BOTTOM - TOP) * (f1 - low)) / (high - low || 1);
  const parts = [made("title", { id: "front-title" }, describe(here))];
  const step = high - low > 20 ? 10 : 5;
  for (let f1 = low; f1 <= high; f1 += step) {
    parts.push(made("path", { class: "grid", d: `M${LEFT} ${y(f1)}H${RIGHT}` }));
    parts.push(made("text", { x: LEFT - 6, y: y(f1) + 4, "text-anchor": "end" }, f1));
  }
  for (const work of [0.25, 0.5, 0.75, 1]) {
    const anchor = work === 1 ? "end" : "middle";
    parts.push(made("text", { x: x(work), y: BOTTOM + 16, "text-anchor": anchor }, `${100 * work}%`));
  }
  parts.push(made("path", { class: "axis", d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}` }));
  parts.push(made("text", { x: (LEFT + RIGHT) / 2, y: BOTTOM + 34, "text-anchor": "middle" }, "work of the full model"));
  parts.push(made("text", { x: LEFT + 6, y: TOP + 10 }, "F1"));
  parts.push(made("path", { class: "front", d: "M" + front.map((one) => `${x(one.work)} ${y(one.f1)}`).join("L") }));
  for (const one of front) parts.push(made("circle", { class: "point", cx: x(one.work), cy: y(one.f1), r: 2.5 }));
  parts.push(made("circle", { class: "here", cx: x(here.work), cy: y(here.f1), r: 7 }));
  const side = here.work > 0.6 ? [-10, "end"] : [12, "start"];
  const label = { class: "label", x: x(here.work) + side[0], y: y(here.f1) + 20, "text-anchor": side[1] };
  parts.push(made("text", label, `F1 ${here.f1.toFixed(1)} at ${percent(here.work)}`));
  svg.replaceChildren(...parts);
}

/** A point in words. */
export function describe(point) {
  return `${percent(point.work)} of the full model's work, F1 ${point.f1.toFixed(1)}`;
}

export function percent(part) {
  return `${Math.round(100 * part)}%`;
}

/** Draw how many tokens each layer keeps; no schedule keeps all of them, and of some only a text can tell. */
export function drawBars(list, schedule, layers) {
  if (schedule && !schedule.length_config) {
    list.replaceChildren(Object.assign(document.createElement("li"), { className: "note", textContent: "The text decides: ask." }));
    return;
  }
  const lengths = schedule?.length_config ?? Array(layers).fill(1);
  const absolute = schedule?.kind === "absolute";
  const most = absolute ? Math.max(...lengths) : 1;
  list.replaceChildren(
    ...lengths.map((length, layer) => {
      const item = document.createElement("li");
      const bar = document.createElement("span");
      const fill = document.createElement("i");
      bar.className = "bar";
      fill.style.width = `${(100 * length) / most}%`;
      bar.append(fill);
      item.append(`Layer ${layer + 1}`, bar, absolute ? `${length} tokens` : percent(length));
      return item;
    }),
  );
}
