// A slide that is too full is made smaller until it fits: prose flows anew, so nothing is cut off.
const HEIGHT = 720 - 2 * 30;
const SMALLEST = 0.5;

function fit(section) {
  if (!section || section.dataset.scale || section.querySelector("section")) return;
  const box = document.createElement("div");
  box.className = "fit";
  box.append(...[...section.childNodes].filter((node) => node.nodeName !== "ASIDE"));
  section.prepend(box);
  let scale = 1;
  while (scale > SMALLEST && (box.offsetHeight * scale > HEIGHT || box.scrollWidth > box.clientWidth)) {
    scale -= 0.05;
    box.style.zoom = scale;
  }
  section.dataset.scale = scale.toFixed(2);
}

async function start() {
  if (window.mermaid) {
    mermaid.initialize({ startOnLoad: false });
    for (const [n, source] of document.querySelectorAll("pre.mermaid").entries()) {
      source.querySelectorAll("br").forEach((line) => line.replaceWith("<br/>"));
      source.outerHTML = (await mermaid.render(`diagram${n}`, source.textContent)).svg;
    }
  }
  const deck = new Reveal({
    width: 1280, height: 720, margin: 0, center: false, hash: true, slideNumber: "c/t",
    controls: false, transition: "none", plugins: [RevealNotes],
  });
  deck.on("ready", (event) => fit(event.currentSlide));
  deck.on("slidechanged", (event) => fit(event.currentSlide));
  deck.on("pdf-ready", () => document.querySelectorAll(".slides section").forEach(fit));
  window.deck = deck;
  await deck.initialize();
}

start();
