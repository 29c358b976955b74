// One prompt's answer: a request, its stream, and the card that shows it.

/** Makes an element with text and children; nothing that comes from the server is ever parsed as HTML. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** What a failed response says. */
export async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** Yields the JSON of every server-sent event. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** The card of one model; `run` streams its answer into it. */
export class Answer {
  constructor(model, isBase) {
    this.model = model;
    this.title = element("h3", {}, element("span", {}, model), element("span", { class: "hint" }, isBase ? "bare model" : ""));
    this.text = element("pre", { "aria-live": "off" });
    this.footer = element("footer", { role: "status" }, "waiting");
    this.node = element("article", { class: isBase ? "answer base" : "answer", "aria-label": `Answer of ${model}` }, this.title, this.text, this.footer);
  }

  async run(body, headers, signal) {
    const began = performance.now();
    let tokens = 0;
    let first = null;
    let reason = null;
    this.text.replaceChildren(element("span", { class: "given" }, body.prompt));
    const output = document.createTextNode("");
    this.text.append(output);
    const seconds = () => (performance.now() - began) / 1000;
    try {
      const response = await fetch("/v1/completions", {
        method: "POST",
        headers: { ...headers, "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, model: this.model, stream: true, stream_options: { include_usage: true } }),
        signal,
      });
      if (!response.ok) throw new Error(await problemOf(response));
      for await (const event of eventsOf(response)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) {
          if (first === null) first = seconds();
          output.appendData(choice.text);
          reason = choice.finish_reason ?? reason;
        }
        if (event.usage) tokens = event.usage.completion_tokens;
        else this.footer.textContent = `${first.toFixed(2)} s to the first token`;
      }
      const rate = tokens / seconds();
      this.footer.textContent = `${tokens} tokens, ${rate.toFixed(0)} tokens/s, first after ${(first ?? seconds()).toFixed(2)} s, ended by ${reason}`;
    } catch (error) {
      if (error.name !== "AbortError") this.node.classList.add("failed");
      this.footer.textContent = error.name === "AbortError" ? "stopped" : error.message;
    }
  }
}
