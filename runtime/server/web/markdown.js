// Markdown as models write it, into DOM nodes. No HTML is ever parsed: all text goes in as text.

import { highlighted } from "/web/highlight.js";

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

const INLINE =
  /(?<ticks>`+)(?<code>[\s\S]*?[^`])\k<ticks>(?!`)|\*\*(?<bold>[^*\n]+(?:\*[^*\n]+)*)\*\*|(?<![\w*])\*(?<em>[^*\s][^*\n]*)\*(?!\w)|~~(?<gone>[^~\n]+)~~|\[(?<label>[^\]\n]+)\]\((?<url>[^)\s]+)\)/g;

/** Nodes of a line's text. */
function inline(text, depth = 0) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    const { code, bold, em, gone, label, url } = match.groups;
    nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const inner = (part) => (depth < 4 ? inline(part, depth + 1) : [part]);
    if (code !== undefined) nodes.push(element("code", code.trim()));
    else if (bold !== undefined) nodes.push(element("strong", ...inner(bold)));
    else if (em !== undefined) nodes.push(element("em", ...inner(em)));
    else if (gone !== undefined) nodes.push(element("s", ...inner(gone)));
    else if (/^https?:\/\//i.test(url)) {
      const link = element("a", ...inner(label));
      link.href = url;
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      nodes.push(link);
    } else nodes.push(match[0]); // javascript:, data: and the like stay text
  }
  nodes.push(text.slice(at));
  return nodes;
}

function codeBlock(code, language) {
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  });
  const caption = element("figcaption", element("span", language || "code"), copy);
  return element("figure", caption, element("pre", highlighted(code, language)));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (line, name) => element("tr", ...cells(line).map((cell) => element(name, ...inline(cell))));
  return element("table", element("thead", row(lines[0], "th")),
    element("tbody", ...lines.slice(2).map((line) => row(line, "td"))));
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

/** A list from line `i` on; items that are indented further are lists inside. */
function list(lines, i, depth = 0) {
  const [, indent, mark] = lines[i].match(ITEM);
  const made = element(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) made.start = parseInt(mark, 10);
  while (i < lines.length) {
    const found = lines[i].match(ITEM);
    if (!found) {
      if (!lines[i].trim() || !/^\s{2,}/.test(lines[i]) || !made.lastChild) break;
      made.lastChild.append(" ", ...inline(lines[i++].trim()));
    } else if (found[1].length < indent.length) break;
    else if (found[1].length > indent.length + 1 && made.lastChild && depth < 8) {
      const [inner, next] = list(lines, i, depth + 1);
      made.lastChild.append(inner);
      i = next;
    } else {
      made.append(element("li", ...inline(found[3])));
      i++;
    }
  }
  return [made, i];
}

/** The nodes of a text that may still be growing: an open code block is shown as one. */
export function rendered(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const nodes = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) nodes.push(element("p", ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = line.match(/^\s*(```+|~~~+)\s*([\w+#.-]*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    if (fence) {
      flush();
      const code = [];
      for (i++; i < lines.length && !lines[i].trim().startsWith(fence[1]); i++) code.push(lines[i]);
      i++;
      nodes.push(codeBlock(code.join("\n"), fence[2]));
    } else if (heading) {
      flush();
      nodes.push(element(`h${Math.min(4, heading[1].length + 1)}`, ...inline(heading[2])));
      i++;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      nodes.push(element("hr"));
      i++;
    } else if (ITEM.test(line)) {
      flush();
      const [made, next] = list(lines, i);
      nodes.push(made);
      i = next;
    } else if (/^\s*>/.test(line)) {
      flush();
      const quoted = [];
      for (; i < lines.length && /^\s*>/.test(lines[i]); i++) quoted.push(lines[i].replace(/^\s*>\s?/, ""));
      nodes.push(element("blockquote", ...inline(quoted.join("\n"))));
    } else if (line.includes("|") && /^[\s|:-]+$/.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      flush();
      const rows = [];
      for (; i < lines.length && lines[i].includes("|"); i++) rows.push(lines[i]);
      nodes.push(table(rows));
    } else if (!line.trim()) {
      flush();
      i++;
    } else {
      paragraph.push(line);
      i++;
    }
  }
  flush();
  return nodes;
}
