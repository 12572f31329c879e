import { examples } from "/static/examples.js";
import { describe, drawBars, drawFront, percent, within } from "/static/front.js";
import { keptOf, showMarked, showWords, wordsOf } from "/static/words.js";

const $ = (id) => document.getElementById(id);
const [context, question, budget] = [$("context"), $("question"), $("budget")];
let model = null;
let asking = null; // the requests that are under way, to be given up when another is made
let traced = null;
let playing = null;
const history = new Map(); // by budget, for the question that was asked last
let asked = "";

/** What the service says, as JSON; a problem is thrown as it stands in its document. */
async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { title: "The service cannot be reached", detail: "Is it running, and is this page its own?" };
  }
  const fields = await response.json().catch(() => ({ title: "The service answered with something else than JSON" }));
  if (response.ok) return fields;
  if (response.status === 401) $("key-field").hidden = false;
  const wait = response.headers.get("Retry-After");
  throw wait ? { ...fields, detail: `Ask again in ${wait} s.` } : fields;
}

function showProblem(problem) {
  const text = document.createElement("p");
  const title = document.createElement("strong");
  title.textContent = problem?.title ?? "This page has failed";
  text.append(title, `: ${problem?.detail ?? problem}`);
  $("problem").replaceChildren(text);
  $("answer").replaceChildren();
  $("facts").textContent = "";
  $("details").hidden = true;
}

/** The budget that the slider stands for: null is the full model. */
const chosen = () => (model?.front.length && Number(budget.value) < 100 ? Number(budget.value) / 100 : null);

function showBudget() {
  if (!model?.front.length) return;
  const part = chosen();
  const here = part === null ? model.front.at(-1) : within(model.front, part);
  const value = part === null ? "the full model" : `${budget.value}%`;
  $("budget-value").textContent = value;
  $("budget-note").textContent = `${describe(here)}, in the mean over ${model.measured_on}`;
  budget.setAttribute("aria-valuetext", `${value}: ${describe(here)}`);
  drawFront($("front"), model.front, here);
  drawBars($("bars"), here.schedule, model.layers);
}

/** Ask what stands there; where the answer is out of sight, as below the form on a phone, it may come into view. */
async function ask(intoView = false) {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const body = { question: question.value, context: context.value };
  const part = chosen();
  if (part !== null) body.budget = part;
  $("problem").replaceChildren();
  $("result").setAttribute("aria-busy", "true");
  try {
    const answered = await call("/v1/answer", { ...body, top_k: 5, no_answer: $("no-answer").checked }, signal);
    showAnswers(body, answered);
    if (intoView) $("result").scrollIntoView({ block: "nearest" });
    showTrace(body.context, answered.answers[0], (await call("/v1/trace", body, signal)).trace);
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem(error);
    $("result").scrollIntoView({ block: "nearest" });
  } finally {
    if (!signal.aborted) $("result").removeAttribute("aria-busy");
  }
}

function showAnswers(body, { answers, used }) {
  const [best, ...others] = answers;
  $("details").hidden = false;
  $("answer").textContent = best.text || "The text has no answer.";
  const shed = used.shed ? ` The service is busy: it answered at a budget of ${percent(used.budget)}.` : "";
  const time = `${used.total_ms.toFixed(0)} ms, of which ${used.waited_ms.toFixed(0)} ms waiting`;
  $("facts").textContent = `Score ${shortly(best.score)}; ${percent(used.work)} of the full model's work; ${time}.${shed}`;
  const show = (answer, pressed) => {
    showMarked($("text"), body.context, answer);
    for (const button of $("others").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button === pressed));
    }
  };
  $("others").replaceChildren(
    ...others.map((answer) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = answer.text || "no answer";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        const again = button.getAttribute("aria-pressed") === "true";
        show(again ? best : answer, again ? null : button);
      });
      item.append(button, ` score ${shortly(answer.score)}`);
      return item;
    }),
  );
  show(best, null);
  remember(body, best, used);
}

const shortly = (score) => (score >= 0.001 ? score.toFixed(3) : score.toExponential(1));

/** Add a row to what was measured for this question. */
function remember(body, best, used) {
  const now = JSON.stringify([body.question, body.context]);
  if (now !== asked) history.clear();
  asked = now;
  const key = used.budget ?? 1;
  history.set(key, [
    used.budget === null ? "full model" : percent(used.budget),
    percent(used.work),
    `${(used.total_ms - used.waited_ms).toFixed(1)} ms`,
    shortly(best.score),
    best.text || "no answer",
  ]);
  const rows = [...history.entries()].sort(([one], [other]) => one - other);
  $("history").replaceChildren(
    ...rows.map(([part, cells]) => {
      const row = document.createElement("tr");
      row.className = part === key ? "here" : "";
      for (const cell of cells) row.insertCell().textContent = cell;
      return row;
    }),
  );
  $("history-box").hidden = false;
}

function showTrace(text, answer, trace) {
  stop();
  const { layers, words } = wordsOf(trace);
  traced = { layers, words, elements: showWords($("trace"), text, words, answer) };
  $("layer").max = layers;
  $("layer").value = layers;
  showLayer();
  if (trace.schedule && !trace.schedule.length_config) drawBars($("bars"), keptOf(trace), layers);
}

function showLayer() {
  const layer = Number($("layer").value);
  $("layer-value").textContent = layer;
  if (!traced) return;
  let there = 0;
  traced.words.forEach((word, number) => {
    const gone = word.left < layer;
    traced.elements[number].classList.toggle("gone", gone);
    there += !gone;
  });
  const said = `${there} of ${traced.words.length} words are there after ${layer} of ${traced.layers} layers`;
  $("layer").setAttribute("aria-valuetext", said);
  $("trace-note").textContent = said;
}

function stop() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Play";
}

function play() {
  if (playing) return stop();
  const layer = $("layer");
  layer.value = 0;
  showLayer();
  $("play").textContent = "Stop";
  playing = setInterval(() => {
    layer.value = Number(layer.value) + 1;
    showLayer();
    if (layer.value === layer.max) stop();
  }, 800);
}

function showLength() {
  const length = Array.from(context.value).length;
  const most = model ? ` of at most ${model.limits.max_context.toLocaleString("en")}` : "";
  $("length").textContent = `${length.toLocaleString("en")}${most} characters`;
}

function takeExample() {
  const [, text, asks] = examples[$("example").value];
  context.value = text;
  question.value = asks;
  showLength();
}

async function begin() {
  $("example").replaceChildren(...examples.map(([name], number) => new Option(name, number)));
  takeExample();
  try {
    model = await call("/v1/model");
  } catch (problem) {
    showProblem(problem);
  }
  $("budget-field").hidden = $("work").hidden = !model?.front.length;
  if (model?.front.length) budget.min = Math.ceil(100 * model.front[0].work);
  showBudget();
  showLength();
}

let waiting = null;
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(waiting);
  // With the key that was missing, what depends on the model can be shown, too.
  (model ? Promise.resolve() : begin()).then(() => ask(true));
});
$("example").addEventListener("change", takeExample);
context.addEventListener("input", showLength);
context.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
budget.addEventListener("input", () => {
  showBudget();
  clearTimeout(waiting);
  if (asked) waiting = setTimeout(() => $("ask").reportValidity() && ask(), 150);
});
$("layer").addEventListener("input", () => {
  stop();
  showLayer();
});
$("play").addEventListener("click", play);
begin();
