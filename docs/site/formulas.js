for (const formula of document.querySelectorAll(".arithmatex")) {
  const tex = formula.textContent.trim().slice(2, -2); // without \( \) or \[ \]
  katex.render(tex, formula, { displayMode: formula.tagName === "DIV" });
}
