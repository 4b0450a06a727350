"""A page in a headless browser, as wide as a desktop and as a phone: what overflows, and what the browser says."""

import re
import shutil
import subprocess

from tests.helpers import TIME_LIMIT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 390)  # CSS pixels
_TELL = """<script>addEventListener("load", () => {
  const wide = document.documentElement.clientWidth;
  const over = [...document.querySelectorAll("body *")].filter(one => {
    for (let up = one.parentElement; up; up = up.parentElement)
      if (/auto|scroll|hidden/.test(getComputedStyle(up).overflowX) && up !== document.body) return false;
    return one.getBoundingClientRect().right > wide + 1;
  }).map(one => one.tagName + "." + one.className).slice(0, 3);
  parent.postMessage([wide, document.documentElement.scrollWidth, document.body.innerText.length, over.join(" ")], "*");
})</script>"""
_FRAMES = """<body><script>addEventListener("message", event => {
  document.body.append("SEEN " + JSON.stringify(event.data) + " SEEN");
})</script>%s</body>"""


def complaints(page, folder):
    """What is wrong with a page in words, at each width; nothing where no browser is installed."""
    if BROWSER is None:
        return []
    folder.mkdir(exist_ok=True)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    (folder / "page.html").write_text(text + _TELL, encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>' for width in WIDTHS
    )
    (folder / "frames.html").write_text(_FRAMES % frames, encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=2000,1000",
        "--virtual-time-budget=10000",
    ]
    command = [BROWSER, *options, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    found = subprocess.run(
        [*command, f"file://{folder / 'frames.html'}"], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    said = re.findall(r"SEEN \[(\d+),(\d+),(\d+),(.*?)\] SEEN", found.stdout)
    if sorted(int(wide) for wide, *_ in said) != sorted(WIDTHS):
        return [f"the browser saw {said}: {found.stderr[-500:]}"]
    wrong = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    for wide, needed, letters, over in said:
        if int(needed) > int(wide) or over.strip('"'):
            wrong.append(f"at {wide} pixels it takes {needed}: {over}")
        if int(letters) < 500:
            wrong.append(f"at {wide} pixels it has {letters} letters")
    return wrong
