// Texts on the page: with an answer marked, or with the words that the layers left.

/** The text, with the characters of one answer marked; what is marked comes into view. */
export function showMarked(box, text, answer) {
  // Characters are code points here as in the service, not the halves that JavaScript counts.
  const characters = Array.from(text);
  const part = (from, to) => characters.slice(from, to).join("");
  if (!answer?.text) {
    box.replaceChildren(text);
    return;
  }
  const mark = document.createElement("mark");
  mark.textContent = part(answer.start, answer.end);
  box.replaceChildren(part(0, answer.start), mark, part(answer.end));
  box.scrollTop = Math.max(0, mark.offsetTop - box.offsetTop - box.clientHeight / 2);
}

/** The part of a trace's tokens that each layer kept, as the schedule of lengths that would keep so many. */
export function keptOf(trace) {
  const tokens = trace.windows.reduce((sum, window) => sum + window.tokens.length, 0);
  const kept = trace.windows[0].layers.map((_, layer) =>
    trace.windows.reduce((sum, window) => sum + window.layers[layer].kept.length, 0),
  );
  return { kind: "ratios", length_config: kept.map((count) => count / tokens) };
}

/** The words of a trace: where they stand, and after how many layers they had gone; all layers if they stayed. */
export function wordsOf(trace) {
  const layers = trace.windows[0].layers.length;
  const words = new Map();
  for (const window of trace.windows) {
    for (const token of window.tokens) {
      if (token.part !== "context") continue;
      const left = token.left ?? layers;
      const word = words.get(token.word);
      if (word === undefined) {
        words.set(token.word, { start: token.start, end: token.end, left });
      } else {
        // A word is there as long as one of its tokens is, in one of the windows that read it.
        word.start = Math.min(word.start, token.start);
        word.end = Math.max(word.end, token.end);
        word.left = Math.max(word.left, left);
      }
    }
  }
  return { layers, words: [...words.values()].sort((one, other) => one.start - other.start) };
}

/** The text as words that can be struck out; gives the elements, in the order of the words. */
export function showWords(box, text, words, answer) {
  const characters = Array.from(text);
  const parts = [];
  const elements = [];
  let at = 0;
  for (const word of words) {
    if (word.start > at) parts.push(characters.slice(at, word.start).join(""));
    const element = document.createElement("span");
    element.className = "word";
    if (answer?.text && word.start < answer.end && word.end > answer.start) element.classList.add("answer");
    element.textContent = characters.slice(Math.max(at, word.start), word.end).join("");
    parts.push(element);
    elements.push(element);
    at = Math.max(at, word.end);
  }
  parts.push(characters.slice(at).join(""));
  box.replaceChildren(...parts);
  return elements;
}
