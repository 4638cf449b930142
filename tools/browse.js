// What tools/browse.py asks of a page. Each function returns a list of complaints.
// Evaluated in the page itself, after it has settled.

const look = {
  // Wait for what arrives after the load event: fonts, formulas, images. Colours are
  // judged at rest, so nothing may fade from one to the other.
  async settle() {
    if (!look.still) {
      look.still = document.head.appendChild(document.createElement("style"));
      look.still.textContent = "*, ::before, ::after { transition: none !important; animation: none !important; }";
    }
    if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
    await document.fonts.ready;
    await Promise.all([...document.images].map((image) => image.decode().catch(() => 0)));
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  },

  // Open everything that is folded, so that it is looked at as well.
  unfold() {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    for (const fold of document.querySelectorAll(".toggle-hidden"))
      fold.classList.remove("toggle-hidden");
  },

  describe(element) {
    const name = (e) => e.localName + (e.id ? `#${e.id}` : [...e.classList].slice(0, 3).map((c) => `.${c}`).join(""));
    return (element.parentElement ? name(element.parentElement) + " > " : "") + name(element);
  },

  seen(element) {
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return false;
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.height > 1;
  },

  images() {
    const faults = [];
    for (const image of document.images) {
      const source = image.getAttribute("src");
      if (!image.naturalWidth) faults.push(`missing image ${source}`);
      if (!image.hasAttribute("alt")) faults.push(`image without alt text ${source}`);
      else if (image.closest("article") && !image.alt.trim()) faults.push(`image with empty alt text ${source}`);
    }
    return faults;
  },

  // Text of the article outside code, where no markup may be left over.
  prose() {
    const article = document.querySelector("article") ?? document.body;
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT, (node) =>
      node.parentElement.closest("pre, code, script, style, svg, mjx-container")
        ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
    const parts = [];
    while (walker.nextNode()) parts.push(walker.currentNode.data);
    return parts.join("\n");
  },

  formulas() {
    const faults = [];
    for (const math of document.querySelectorAll(".math"))
      if (!math.querySelector("mjx-container"))
        faults.push(`formula not rendered: ${math.textContent.trim().slice(0, 60)}`);
    const wrong = '[data-mml-node="merror"], mjx-merror, merror, [data-mml-node="mtext"][fill="red"]';
    for (const error of document.querySelectorAll(wrong)) {
      const math = error.closest("mjx-container");
      faults.push(`formula with an error: ${(math ?? error).textContent.trim().slice(0, 60)}`);
    }
    const prose = look.prose();
    for (const raw of prose.match(/\\[([a-zA-Z].{0,40}|\$[$a-zA-Z({].{0,40}|[\w)}]\$(?!\w).{0,40}/g) ?? []) faults.push(`raw formula: ${raw}`);
    for (const raw of prose.match(/\{[a-z:]+\}`.{0,40}|^:{3,}.{0,40}/gm) ?? []) faults.push(`raw markup: ${raw}`);
    return faults;
  },

  // ---- Contrast, by the definition of the WCAG ----

  known: new Map(),

  // A CSS colour as [red, green, blue, opacity]; the canvas knows every notation.
  parse(colour) {
    if (look.known.has(colour)) return look.known.get(colour);
    const canvas = (look.canvas ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }));
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    look.known.set(colour, [r, g, b, a / 255]);
    return look.known.get(colour);
  },

  over([r, g, b, a], [r0, g0, b0]) {
    return [r * a + r0 * (1 - a), g * a + g0 * (1 - a), b * a + b0 * (1 - a), 1];
  },

  ground(element) {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = look.parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    const page = getComputedStyle(document.documentElement).colorScheme.startsWith("dark") ? [18, 18, 18, 1] : [255, 255, 255, 1];
    return layers.reduceRight((below, layer) => look.over(layer, below), page);
  },

  luminance([r, g, b]) {
    const [x, y, z] = [r, g, b].map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  },

  ratio(front, back) {
    const [a, b] = [look.luminance(look.over(front, back)), look.luminance(back)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  },

  contrast(least) {
    const faults = new Map();
    const judge = (element, style, back, label) => {
      const front = look.parse(element.closest("svg") && element.localName.startsWith("t") ? style.fill : style.color);
      const ratio = look.ratio(front, back);
      if (ratio < least) {
        const key = `contrast ${ratio.toFixed(2)} under ${least}: ${look.describe(element)}${label}`;
        if (!faults.has(key)) faults.set(key, (element.textContent ?? "").trim().slice(0, 30));
      }
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const done = new Set();
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || done.has(element)) continue;
      done.add(element);
      if (element.closest("script, style, noscript, title, desc, dialog, .headerlink, mjx-assistive-mml")) continue;
      if (look.seen(element)) judge(element, getComputedStyle(element), look.ground(element), "");
    }
    for (const math of document.querySelectorAll("mjx-container"))
      if (look.seen(math)) judge(math, getComputedStyle(math), look.ground(math), "");
    for (const element of document.querySelectorAll("article *"))
      for (const pseudo of ["::before", "::after"]) {
        const style = getComputedStyle(element, pseudo);
        if (!/^".*[A-Za-z].*"$/.test(style.content) || !look.seen(element)) continue;
        const own = look.parse(style.backgroundColor);
        judge(element, style, look.over(own, look.ground(element)), pseudo);
      }
    return [...faults].map(([what, text]) => `${what} ("${text}")`);
  },

  // ---- Room ----

  overflow() {
    const page = document.documentElement;
    if (page.scrollWidth <= page.clientWidth) return [];
    const wide = [...document.querySelectorAll("body *")].filter((element) => {
      if (!look.seen(element) || element.getBoundingClientRect().right <= page.clientWidth + 1) return false;
      for (let e = element.parentElement; e; e = e.parentElement)
        if (getComputedStyle(e).overflowX !== "visible" && e !== document.body) return false;
      return true;
    });
    const names = wide.slice(0, 3).map(look.describe).join("; ") || "unknown";
    return [`page is ${page.scrollWidth} px wide on a screen of ${page.clientWidth}: ${names}`];
  },

  codeRoom() {
    return [...document.querySelectorAll("div.cell_input pre")]
      .filter((pre) => look.seen(pre) && pre.scrollWidth > pre.clientWidth + 1)
      .map((pre) => {
        const longest = pre.textContent.split("\n").reduce((a, b) => (a.length < b.length ? b : a), "");
        return `code of ${longest.length} columns scrolls sideways: ${longest.trim().slice(0, 40)}`;
      });
  },

  searchBars() {
    const bars = [...document.querySelectorAll('input[type="search"], input[name="q"], .search-button__button, .search-button-field')];
    const shown = bars.filter((bar) => look.seen(bar) && !bar.closest("dialog"));
    return shown.length > 1 ? [`${shown.length} search bars: ${shown.map(look.describe).join("; ")}`] : [];
  },

  theme() {
    return document.documentElement.dataset.theme ?? "";
  },

  // For the check of links, which needs all pages.
  links() {
    const here = [...document.querySelectorAll("a[href]")].map((a) =>
      new URL(a.getAttribute("href"), document.baseURI).href);
    return { links: [...new Set(here)], ids: [...document.querySelectorAll("[id], a[name]")].map((e) => e.id || e.name) };
  },
};
