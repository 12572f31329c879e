// The service's OpenAPI description as a page, without anything from elsewhere.
const spec = await (await fetch("/openapi.json")).json();

function made(name, text, ...children) {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

const resolve = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").at(-1)] : schema);

/** A type in a few words. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "anything";
}

/** A description, with what stands between backticks as code. */
function described(text) {
  return (text ?? "").split("`").map((part, number) => (number % 2 ? made("code", part) : part));
}

/** The fields of an object, and below it those of what it holds; each kind once. */
function fields(schema, seen = new Set()) {
  const object = resolve(schema);
  if (!object?.properties || seen.has(object)) return [];
  seen.add(object);
  const list = made("dl");
  const inner = [];
  for (const [name, field] of Object.entries(object.properties)) {
    const needed = object.required?.includes(name) ? ", needed" : "";
    list.append(made("dt", "", made("code", name), " ", made("span", typeOf(field) + needed)));
    list.append(made("dd", "", ...described(field.description)));
    for (const one of [field, field.items, ...(field.anyOf ?? []), ...(field.anyOf ?? []).map((any) => any.items)]) {
      if (one?.$ref) inner.push(made("p", `${typeOf(one)}: ${resolve(one).description ?? ""}`), ...fields(one, seen));
    }
  }
  return [list, ...inner];
}

function details(title, ...children) {
  return made("details", "", made("summary", title), ...children);
}

function curl(path, method, example) {
  const body = example ? ` -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(example).replaceAll("'", "'\\''")}'` : "";
  const code = made("pre", `curl ${method === "get" ? "" : "-X POST "}${location.origin}${path}${body}`);
  return code;
}

function operation(path, method, one) {
  const verb = made("span", method.toUpperCase());
  verb.className = "method";
  const section = made("section", "", made("h2", "", verb, ` ${path}`), made("p", one.summary));
  section.setAttribute("aria-label", `${method.toUpperCase()} ${path}`);
  const taken = one.requestBody?.content["application/json"].schema;
  for (const example of taken ? (resolve(taken).examples ?? []) : [null]) section.append(curl(path, method, example));
  if (taken) section.append(details("What it takes", ...fields(taken)));
  const given = one.responses["200"]?.content?.["application/json"]?.schema;
  if (given) section.append(details("What it gives", ...fields(given)));
  const problems = made("dl");
  for (const [status, response] of Object.entries(one.responses)) {
    if (status !== "200") problems.append(made("dt", status), made("dd", "", ...described(response.description)));
  }
  if (problems.children.length) section.append(details("What can go wrong", problems));
  return section;
}

const sections = Object.entries(spec.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, one]) => operation(path, method, one)),
);
document.getElementById("operations").replaceChildren(...sections);
