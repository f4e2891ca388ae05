// Colours for code: comments, strings, numbers, keywords, calls. Text goes in as text, never as HTML.

const C_LIKE =
  "auto bool break case catch char class const continue default delete do double else enum export " +
  "extends extern false final float for function goto if implements import in inline int interface " +
  "let long namespace new null nullptr of override private protected public return short signed " +
  "sizeof static struct super switch template this throw true try typedef typename typeof undefined " +
  "union unsigned using var virtual void volatile while yield async await package func go defer " +
  "chan map range select type fn impl match mod mut pub ref self trait use where crate dyn loop move";
const PYTHON =
  "False None True and as assert async await break class continue def del elif else except finally " +
  "for from global if import in is lambda match nonlocal not or pass raise return self try while " +
  "with yield";
const SHELL =
  "if then else elif fi for while do done case esac function in return export local echo cd exit set";
const SQL =
  "select from where and or not insert into values update set delete create table index join left " +
  "right inner outer on group by order having limit as distinct null primary key references";

const STRINGS = String.raw`"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?`;
const kinds = {
  python: { words: PYTHON, comment: "#[^\\n]*", strings: `"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|${STRINGS}` },
  shell: { words: SHELL, comment: "#[^\\n]*", strings: STRINGS },
  sql: { words: SQL, comment: "--[^\\n]*", strings: STRINGS, anyCase: true },
  c: { words: C_LIKE, comment: "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)", strings: "`(?:\\\\.|[^`\\\\])*`?|" + STRINGS },
};
const names = {
  python: "python py python3 pycon toml yaml yml ruby rb",
  shell: "shell sh bash zsh console make makefile dockerfile",
  sql: "sql",
};
const kindOf = {};
for (const [kind, list] of Object.entries(names)) for (const name of list.split(" ")) kindOf[name] = kind;

const rules = {};
function rule(kind) {
  if (!rules[kind]) {
    const { words, comment, strings, anyCase } = kinds[kind];
    rules[kind] = {
      words: new Set(words.split(" ")),
      anyCase,
      pattern: new RegExp(
        `(?<com>${comment})|(?<str>${strings})|(?<num>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)(?<call>(?=\\())?`,
        "g",
      ),
    };
  }
  return rules[kind];
}

/** A <code> element with the code in it. */
export function highlighted(code, language) {
  const { words, pattern, anyCase } = rule(kindOf[language.toLowerCase()] ?? "c");
  const element = document.createElement("code");
  let at = 0;
  for (const match of code.matchAll(pattern)) {
    const { com, str, num, word, call } = match.groups;
    let kind = com !== undefined ? "com" : str !== undefined ? "str" : num !== undefined ? "num" : "";
    if (word !== undefined) {
      if (words.has(anyCase ? word.toLowerCase() : word)) kind = "kw";
      else if (call !== undefined) kind = "fn";
    }
    if (!kind) continue;
    element.append(code.slice(at, match.index));
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = match[0];
    element.append(span);
    at = match.index + match[0].length;
  }
  element.append(code.slice(at));
  return element;
}
