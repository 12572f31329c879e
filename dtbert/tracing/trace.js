// Draws traces, as `Trace.to_dict` gives them, into an element; each may have a "title". Everything that comes from a
// text goes in as text, never as markup. Layers count from 0 in the data and from 1 for whoever reads.
"use strict";

function dtbertTrace(root, traces) {
  const SVG = "http://www.w3.org/2000/svg";
  const numLayers = traces[0].windows[0].layers.length;
  const columns = [];
  let layer = numLayers; // what is shown is after so many layers
  let shown = null; // the word that the tip is about

  function make(name, options = {}, ...children) {
    const element = options.svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (key === "text") element.textContent = value;
      else if (key !== "svg" && value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
  const percent = (part) => `${(100 * part).toFixed(0)}%`;
  const passed = (token) => (token.left === null ? numLayers : token.left);

  // Words of one part of a window: where they stand in the text, their tokens, and how many layers they passed.
  function wordsOf(view, part) {
    const words = [];
    view.tokens.forEach((token, position) => {
      if (token.part !== part) return;
      let word = words.at(-1);
      if (!word || word.number !== token.word) {
        word = { number: token.word, start: token.start, end: token.end, positions: [], passed: 0 };
        words.push(word);
      }
      word.end = Math.max(word.end, token.end);
      word.positions.push(position);
      word.passed = Math.max(word.passed, passed(token));
    });
    return words;
  }

  const inside = (word, span) => word.start < span.end && word.end > span.start;

  // ---- the text -----------------------------------------------------------------------------------------------------

  function drawText(column, name, part, text, start, end) {
    const box = make("div", {
      class: "text", tabindex: "0", role: "group", dir: "auto", lang: "",
      "aria-label": `${name}; arrow keys go from word to word`,
    });
    const words = wordsOf(column.window, part);
    // JavaScript counts units of UTF-16, the trace counts characters.
    const characters = Array.from(text);
    const piece = (from, to) => characters.slice(from, to).join("");
    const { answer, full_answer, survived } = column.trace;
    const isIn = (word, span) => part === "context" && word !== undefined && inside(word, span);
    if (start > 0) box.append("… ");
    let place = start;
    let target = box;
    words.forEach((word, index) => {
      if (word.start > place) target.append(piece(place, word.start));
      const from = Math.max(place, word.start);
      const span = make("span", { class: "word", text: piece(from, word.end) });
      if (isIn(word, full_answer) && target === box) {
        target = make("span", { class: "answer" });
        box.append(target);
      }
      if (!survived && isIn(word, answer)) span.classList.add("other");
      target.append(span);
      // One number for a run of words that left in the same layer.
      const next = words[index + 1];
      const ends = !next || next.passed !== word.passed;
      if (word.passed < numLayers && ends) {
        const mark = make("sub", { class: "layer", "aria-hidden": "true", text: word.passed + 1 });
        target.append(mark);
        column.marks.push([mark, word.passed]);
      }
      column.words.push({ ...word, span, box, part, column });
      place = Math.max(place, word.end);
      if (!isIn(next, full_answer)) target = box;
    });
    if (place < end) box.append(piece(place, end));
    if (end < characters.length) box.append(" …");
    box.addEventListener("keydown", (event) => walk(event, box, column));
    box.addEventListener("focus", () => show(column.words.find((word) => word.box === box && word === shown) ||
      column.words.find((word) => word.box === box)));
    box.addEventListener("blur", hide);
    return box;
  }

  function walk(event, box, column) {
    const own = column.words.filter((word) => word.box === box);
    const at = own.indexOf(shown);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: own.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in to)) return;
    event.preventDefault();
    const word = own[Math.min(own.length - 1, Math.max(0, to[event.key]))];
    word.span.scrollIntoView({ block: "nearest" });
    show(word);
  }

  // ---- a row per layer ----------------------------------------------------------------------------------------------

  // Runs of neighbours for which a test holds, as rectangles.
  function runs(svg, length, test, kind, y, height) {
    for (let from = 0; from < length; from++) {
      if (!test(from)) continue;
      let to = from;
      while (to < length && test(to)) to++;
      svg.append(make("rect", { svg: true, class: kind, x: from, y, width: to - from, height }));
      from = to;
    }
  }

  function strip(length, label) {
    return make("svg", {
      svg: true, viewBox: `0 0 ${length} 12`, preserveAspectRatio: "none", role: "img", "aria-label": label,
    });
  }

  function drawLayers(column) {
    const { tokens, layers, answer } = column.window;
    const holds = new Set(answer);
    const places = strip(tokens.length, `the question, then the context${answer.length ? " with the answer" : ""}`);
    runs(places, tokens.length, (at) => tokens[at].part === "question", "question", 8, 4);
    runs(places, tokens.length, (at) => holds.has(at), "answer", 0, 12);
    const body = make("tbody", {}, row("all", null, places, count(tokens.length, "token"), answer.length || "none"));
    layers.forEach((one, index) => {
      const kept = new Set(one.kept);
      const label = `layer ${index + 1} keeps ${one.kept.length} of ${count(one.entered, "token")}`;
      const bar = strip(tokens.length, label);
      runs(bar, tokens.length, (at) => passed(tokens[at]) === index, "drops", 4, 4);
      runs(bar, tokens.length, (at) => kept.has(at), "keeps", 0, 12);
      const left = answer.filter((at) => kept.has(at)).length;
      body.append(row(`${index + 1}`, index + 1, bar, `${one.kept.length} of ${one.entered}`,
        answer.length ? `${left} of ${answer.length}` : "none"));
    });
    const heads = ["layer", "its tokens, in the order of the text", "stay", "of the answer"];
    return make("table", {},
      make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col", text })))), body);

    function row(name, number, bar, stay, ofAnswer) {
      let head = name;
      if (number !== null) {
        head = make("button", { type: "button", text: name, "aria-label": `show the text after layer ${name}` });
        head.addEventListener("click", () => setLayer(number));
        column.buttons.push(head);
      }
      return make("tr", {}, make("th", { scope: "row" }, head), make("td", { class: "strip" }, bar),
        make("td", { class: "number", text: stay }), make("td", { class: "number", text: ofAnswer }));
    }
  }

  // ---- a column per trace -------------------------------------------------------------------------------------------

  function said(answer) {
    return make("q", { dir: "auto", lang: "", text: answer.text });
  }

  function outcome(trace) {
    const line = make("p", { class: "outcome" });
    if (trace.survived) {
      line.append(make("strong", { text: "Same answer" }), " as the full model: ", said(trace.answer));
    } else {
      line.append(make("strong", { text: "Another answer" }), ": ", said(trace.answer), " instead of ",
        said(trace.full_answer));
    }
    const fate = trace.answer_left === null ? "all tokens of the full model's answer stayed"
      : `the full model's answer lost its first token in layer ${trace.answer_left + 1}`;
    line.append(`; ${fate}.`);
    return line;
  }

  function draw(column, number) {
    const { trace, body } = column;
    Object.assign(column, { words: [], marks: [], buttons: [], window: trace.windows[number] });
    const { start, end } = column.window;
    const length = Array.from(trace.question).length;
    body.replaceChildren(
      drawLayers(column),
      make("h3", { text: "Question" }), drawText(column, "Question", "question", trace.question, 0, length),
      make("h3", { text: trace.windows.length > 1 ? `Context, window ${number + 1} of ${trace.windows.length}` : "Context" }),
      drawText(column, "Context", "context", trace.context, start, end),
    );
  }

  function addColumn(trace) {
    const title = trace.title || (trace.budget === null ? "schedule" : `budget ${trace.budget}`);
    const body = make("div");
    const section = make("section", {}, make("h2", { text: title }),
      make("p", { class: "work", text: `${percent(trace.work)} of the full model's work on this text` }),
      outcome(trace), body);
    columns.push({ trace, body });
    return section;
  }

  // ---- the slider ---------------------------------------------------------------------------------------------------

  const slider = make("input", { type: "range", min: 0, max: numLayers, step: 1, id: "dtbert-layer" });
  const layerName = make("output", { for: "dtbert-layer" });

  function setLayer(number) {
    layer = number;
    slider.value = number;
    const text = number === 0 ? "before layer 1" : number === numLayers ? `after all ${numLayers} layers` : `after layer ${number}`;
    layerName.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const column of columns) {
      for (const { span, passed } of column.words) {
        span.style.setProperty("--level", Math.min(passed, number) / numLayers);
        span.classList.toggle("gone", passed < number);
        span.classList.toggle("stays", number > 0 && passed >= number);
      }
      for (const [mark, left] of column.marks) mark.hidden = left >= number;
      column.buttons.forEach((button, index) => button.setAttribute("aria-pressed", index + 1 === number));
    }
  }

  slider.addEventListener("input", () => setLayer(Number(slider.value)));

  // ---- what a word scored -------------------------------------------------------------------------------------------

  const tip = make("div", { class: "tip", role: "status" });
  tip.hidden = true;

  function short(score) {
    const size = Math.abs(score);
    return size !== 0 && (size < 0.001 || size >= 100000) ? score.toExponential(2) : String(Number(score.toPrecision(3)));
  }

  function cell(token, layers, index) {
    if (token.left !== null && token.left < index) return "";
    const rank = token.ranks[index];
    if (rank === null) return "stays: nothing is dropped";
    const score = token.scores[index];
    const what = token.left === index ? "left" : "stays";
    return `${score === null ? "whatever its score" : short(score)}, rank ${rank} of ${layers[index].entered}: ${what}`;
  }

  function show(word) {
    if (!word) return;
    hide();
    shown = word;
    for (const column of columns) {
      const same = column.words.find((one) => one.part === word.part && one.number === word.number);
      if (same) same.span.classList.add("at");
    }
    const tokens = word.positions.map((position) => word.column.window.tokens[position]);
    const { layers } = word.column.window;
    const fate = word.passed === numLayers ? "stayed to the end" : `left in layer ${word.passed + 1} of ${numLayers}`;
    const rows = [];
    for (let index = 0; index < Math.min(numLayers, word.passed + 1); index++) {
      rows.push(make("tr", {}, make("th", { scope: "row", text: index + 1 }),
        ...tokens.map((token) => make("td", { text: cell(token, layers, index) }))));
    }
    const heads = ["layer", ...tokens.map((token) => token.text)];
    tip.replaceChildren(
      make("p", {}, make("strong", { dir: "auto", text: word.span.textContent }), ` ${fate}`),
      make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col", text })))),
        make("tbody", {}, ...rows)),
    );
    tip.hidden = false;
    const place = word.span.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const above = place.bottom + size.height + 8 > window.innerHeight && place.top > size.height + 8;
    tip.style.left = `${window.scrollX + Math.max(8, Math.min(place.left, room - size.width - 8))}px`;
    tip.style.top = `${window.scrollY + (above ? place.top - size.height - 6 : place.bottom + 6)}px`;
  }

  function hide() {
    tip.hidden = true;
    shown = null;
    for (const element of root.querySelectorAll(".word.at")) element.classList.remove("at");
  }

  const wordAt = (target) => {
    for (const column of columns) {
      const found = column.words.find((word) => word.span === target);
      if (found) return found;
    }
    return null;
  };
  root.addEventListener("pointerover", (event) => {
    if (event.target.classList.contains("word")) show(wordAt(event.target));
    else if (!event.target.closest(".text, .tip")) hide();
  });
  root.addEventListener("pointerleave", hide);
  window.addEventListener("resize", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // ---- the page -----------------------------------------------------------------------------------------------------

  const controls = make("div", { class: "controls" },
    make("label", { for: "dtbert-layer", text: "Layers" }), slider, layerName);
  if (traces[0].windows.length > 1) {
    const choice = make("select", { id: "dtbert-window" });
    traces[0].windows.forEach((view, index) => {
      const answer = index === traces[0].answer_window ? ", with the answer" : "";
      choice.append(make("option", {
        value: index, text: `${index + 1} of ${traces[0].windows.length}: characters ${view.start} to ${view.end}${answer}`,
      }));
    });
    choice.value = traces[0].answer_window;
    choice.addEventListener("change", () => {
      hide();
      columns.forEach((column) => draw(column, Number(choice.value)));
      setLayer(layer);
    });
    controls.append(make("label", { for: "dtbert-window", text: "Window" }), choice);
  }
  const scale = make("span", { class: "scale" });
  for (let index = 1; index <= numLayers; index++) {
    const step = make("span", { class: "word gone", text: index });
    step.style.setProperty("--level", (index - 1) / numLayers);
    scale.append(step);
  }
  const kept = make("span", { class: "word stays", text: "stayed" });
  kept.style.setProperty("--level", 1);
  const legend = make("p", { class: "legend" }, "Left in layer ", scale, " ", kept, ", ",
    make("span", { class: "answer", text: "the full model's answer" }), ", ",
    make("span", { class: "word other", text: "another answer" }),
    ". A small number behind words is the layer that dropped them. In a layer's row tall bars are the tokens that stay, "
    + "thin ones those that leave; in the first row the question is thin, the answer tall. Point at a word for what it "
    + "scored, or move from word to word with the arrow keys.");
  const grid = make("div", { class: "columns" }, ...traces.map(addColumn));
  root.classList.add("dtbert-trace");
  root.replaceChildren(controls, legend, grid, tip);
  columns.forEach((column) => draw(column, traces[0].answer_window));
  setLayer(numLayers);
}
