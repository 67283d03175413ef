# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Opens every page of the built site in Chromium, wide and narrow, light and dark, and searches it.

    python tests/browse_site.py FOLDER

Prints what is wrong, one line for each page, view and fault, and exits with 1 if anything is.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import browser
from browser import Browser

from galore_jax.presets import PRESETS

WIDTHS = (1400, 400)
SCHEMES = ("light", "dark")
TERMS = ("OOM", "NaN", "cite", "changelog", "colab", "--rank", *PRESETS)

# What is wrong with the page as it is laid out now.
LOOK = """
(async dark => {
  const frame = () => new Promise(requestAnimationFrame);
  const scheme = () => document.body.dataset.mdColorScheme === "slate";
  for (let tries = 0; tries < 60 && scheme() !== dark; tries++) await frame();
  await frame(); await frame();

  const faults = [];
  const said = element => (element.alt || element.innerText || "").replace(/\\s+/g, " ").trim();
  const named = element => `<${element.localName}> ${[...said(element)].slice(0, 50).join("")}`;
  if (scheme() !== dark) faults.push(`its colors are not ${dark ? "dark" : "light"}`);
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`it scrolls sideways, ${wide} px wide`);

  for (const image of document.images) {
    if (!image.alt.trim()) faults.push(`an image without alt text: ${image.src}`);
    if (image.complete && !image.naturalWidth) faults.push(`an image that does not load: ${image.src}`);
    const other = image.src.endsWith(dark ? "#only-light" : "#only-dark");
    if (other && image.getClientRects().length) faults.push(`an image for the other colors: ${image.src}`);
  }

  const column = document.querySelector(".md-content__inner");
  const right = element => element.getBoundingClientRect().right;
  const edge = innerWidth < 720 ? innerWidth : right(column);
  const scrolls = element => getComputedStyle(element).overflowX !== "visible";
  for (const element of column.querySelectorAll("pre, table, img, math")) {
    let box = element;
    for (let outer = element; outer !== column; outer = outer.parentElement) if (scrolls(outer)) box = outer;
    const over = right(box) - (box.matches(".md-typeset__scrollwrap") ? right(column.parentElement) : edge); // it has margins
    if (over > 1) faults.push(`${Math.ceil(over)} px wider than its column: ${named(element)}`);
  }

  for (const cell of column.querySelectorAll("td, th")) {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const word of texts.currentNode.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, word.index);
        range.setEnd(texts.currentNode, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map(line => line.top));
        if (lines.size > 1) faults.push(`a table breaks the word ${word[0]}`);
      }
    }
  }
  return faults;
})
"""

# The texts of the results for a term, as the reader sees them who types it.
SEARCH = """
(async term => {
  const find = selector => document.querySelector(selector);
  const input = find(".md-search__input"), meta = find(".md-search-result__meta"), list = find(".md-search-result__list");
  meta.textContent = "";
  list.replaceChildren();
  find("#__search").checked = true;
  input.focus();
  input.value = term;
  input.dispatchEvent(new Event("keyup"));
  for (let tries = 0; tries < 500 && !meta.textContent; tries++) await new Promise(done => setTimeout(done, 20));
  return [...list.children].map(item => item.textContent);
})
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, as long as the context is open."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """The browser, as long as the context is open."""
    one = Browser(browser.find())
    try:
        yield one
    finally:
        one.close()


def faults_of_pages(tab: Browser, base: str, pages: Collection[str]) -> list[str]:
    """What is wrong with the pages: one sentence each, with the page and the view."""
    found = []
    for page in pages:
        tab.events.clear()
        for number, (scheme, width) in enumerate((scheme, width) for scheme in SCHEMES for width in WIDTHS):
            tab.view(width, scheme)
            if number == 0:
                tab.open(base + page)
            faults = tab.evaluate(f"{LOOK}({json.dumps(scheme == 'dark')})")
            found += [f"/{page} at {width} px, {scheme}: {fault}" for fault in dict.fromkeys(faults)]
        found += [f"/{page}: {fault}" for fault in dict.fromkeys(_faults_of_events(tab, base))]
    return found


def _faults_of_events(tab: Browser, base: str) -> Iterator[str]:
    for event in tab.events:
        match event:
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": str(url)}}}:
                if not url.startswith((base, "data:", "blob:")):
                    yield f"it asks another host for {url}"
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error", "text": text} as entry}}:
                yield f"the console has an error: {text} {entry.get('url', '')}"
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                yield f"a script fails: {details.get('exception', details).get('description', details['text'])}"
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error", "args": arguments}}:
                yield f"a script reports an error: {[argument.get('value') for argument in arguments]}"


def faults_of_search(tab: Browser, base: str, terms: Collection[str]) -> list[str]:
    """The terms that the site's search does not find."""
    tab.events.clear()
    tab.view(WIDTHS[0], SCHEMES[0])
    tab.open(base)
    found = {term: tab.evaluate(f"{SEARCH}({json.dumps(term)})") for term in terms}
    return [
        f"The search for {term!r} has {len(texts)} results, and the term is in none of them."
        for term, texts in found.items()
        if not any(term.lower() in text.lower() for text in texts)
    ]


def pages_of(folder: Path) -> list[str]:
    """The addresses of the pages, relative to the site's."""
    pages = sorted(folder.rglob("*.html"))
    return [path.relative_to(folder).as_posix().removesuffix("index.html") for path in pages]


def main() -> int:
    folder = Path(sys.argv[1])
    with served(folder) as base, started() as tab:
        found = faults_of_pages(tab, base, pages_of(folder)) + faults_of_search(tab, base, TERMS)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
